//! Reads kernel and initrd files by position, so that a shared file offset is not moved.

use anyhow::{Context as _, Result, bail, ensure};
use armlet_arch::image::HEAD;
use armlet_system::eintr::uninterrupted;
use armlet_system::files;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Opens a non-empty file, and returns it with its size.
pub(super) fn open_regular(path: &Path) -> Result<(File, u64)> {
    let (file, size) = files::open_regular(path)?;
    ensure!(size > 0, "it is empty");
    Ok((file, size))
}

/// Reads the first [`HEAD`] bytes of a span, or the whole span if it is shorter.
pub(super) fn read_head(file: &File, span: &Range<u64>) -> Result<Vec<u8>> {
    let len = (span.end - span.start).min(HEAD as u64);
    let mut head = vec![0; len as usize];
    let got = read_at(file, &mut head, span.start).context("cannot read it")?;
    head.truncate(got);
    Ok(head)
}

/// Reads a span of the file directly into `dst`. `opened` is the file's size when it was opened.
pub(super) fn read_span(
    file: &File,
    span: &Range<u64>,
    opened: u64,
    dst: &mut [u8],
) -> Result<u64> {
    let (len, room) = (span.end - span.start, dst.len());
    let Some(dst) = usize::try_from(len).ok().and_then(|len| dst.get_mut(..len)) else {
        bail!("its {len} bytes do not fit into the {room} set aside for them");
    };
    let got = read_at(file, dst, span.start).context("cannot read it")?;
    ensure!(
        got == dst.len(),
        "the file shrank: it had {opened} bytes when it was opened, now {}",
        file.metadata().map_or(span.start + got as u64, |m| m.len())
    );
    Ok(len)
}

/// Reads until `dst` is full or the file ends; returns the number of bytes.
pub(super) fn read_at(file: &File, dst: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < dst.len() {
        match uninterrupted(|| file.read_at(&mut dst[done..], offset + done as u64))? {
            0 => break,
            got => done += got,
        }
    }
    Ok(done)
}
