//! Bytes on their way into a memory file.

use crate::PAGE;
use anyhow::{Context, Error, Result, anyhow};
use armlet_system::eintr::uninterrupted;
use rustix::fs::copy_file_range;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes that are written at once.
pub(crate) const CHUNK: usize = 1 << 20;

/// A memory file that is written.
pub(crate) struct Output<'a> {
    file: &'a File,
    size: u64,
    /// Bytes that were written; the rest are holes.
    written: u64,
    /// Whether the kernel copies from file to file here.
    is_copied: bool,
}

impl<'a> Output<'a> {
    /// Gives an empty file the size that it will have.
    pub(crate) fn new(file: &'a File, size: u64) -> Result<Output<'a>> {
        let output = Output {
            file,
            size,
            written: 0,
            is_copied: true,
        };
        let sized = uninterrupted(|| rustix::fs::ftruncate(file, size));
        sized.map_err(|error| output.explain(error.into()))?;
        Ok(output)
    }

    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Writes bytes at an offset.
    pub(crate) fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        let written = self.file.write_all_at(bytes, offset);
        written.map_err(|error| self.explain(error))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Writes those pages of `bytes` that are not zero.
    pub(crate) fn write_sparse(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        let mut rest = bytes.chunks(PAGE as usize).enumerate().peekable();
        while let Some((first, page)) = rest.next() {
            if is_zero(page) {
                continue;
            }
            let mut last = first;
            while let Some((index, _)) = rest.next_if(|(_, page)| !is_zero(page)) {
                last = index;
            }
            let from = first * PAGE as usize;
            let to = ((last + 1) * PAGE as usize).min(bytes.len());
            self.write(&bytes[from..to], offset + from as u64)?;
        }
        Ok(())
    }

    /// Copies bytes of another file, and those alone that are not zero if it has to look at them.
    /// Filesystems that can have both files share the same blocks.
    pub(crate) fn copy(&mut self, from: &File, at: u64, offset: u64, size: u64) -> Result<()> {
        let mut done = 0;
        while done < size && self.is_copied {
            let (mut source, mut target) = (at + done, offset + done);
            let most = (size - done).min(64 * CHUNK as u64) as usize;
            let copied = uninterrupted(|| {
                copy_file_range(from, Some(&mut source), self.file, Some(&mut target), most)
            });
            match copied {
                // Some filesystems copy nothing and say so like this; the end of the file is found below.
                Ok(0) => break,
                Ok(count) => {
                    done += count as u64;
                    self.written += count as u64;
                }
                Err(error @ (Errno::NOSPC | Errno::FBIG | Errno::DQUOT | Errno::IO)) => {
                    return Err(self.explain(error.into()));
                }
                // Two filesystems, or one that does not do it.
                Err(_) => self.is_copied = false,
            }
        }
        let mut buffer = Vec::new();
        while done < size {
            buffer.resize((size - done).min(CHUNK as u64) as usize, 0);
            read(from, &mut buffer, at + done)?;
            self.write_sparse(&buffer, offset + done)?;
            done += buffer.len() as u64;
        }
        Ok(())
    }

    /// Says what is wrong, and what would work.
    fn explain(&self, error: io::Error) -> Error {
        let (written, size) = (self.written, self.size);
        let remedy = match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::NOSPC | Errno::DQUOT) => "; make room, or write it to another filesystem",
            Some(Errno::FBIG) => {
                "; raise the limit of the size of files (ulimit -f), or write it to a filesystem that has larger ones"
            }
            _ => "",
        };
        anyhow!(
            "cannot write the guest's memory, {size} bytes without the zeros, after {written} of them: {error}{remedy}"
        )
    }
}

/// Reads bytes of a memory file, all of them.
pub(crate) fn read(file: &File, into: &mut [u8], offset: u64) -> Result<()> {
    file.read_exact_at(into, offset).with_context(|| {
        let count = into.len();
        format!("cannot read {count} bytes at {offset} of a memory file that a snapshot has")
    })
}

/// Returns whether all bytes of a page are zero.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    blocks(page).all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Returns whether two pages are the same. Some C libraries compare byte by byte.
pub(crate) fn is_same(one: &[u8], other: &[u8]) -> bool {
    blocks(one).zip(blocks(other)).all(|(one, other)| {
        let pairs = one.iter().zip(other);
        pairs.fold(0, |all, (one, other)| all | (one ^ other)) == 0
    })
}

/// Cuts a page into blocks of which the compiler makes vectors, with an end between two of them.
fn blocks(page: &[u8]) -> impl Iterator<Item = &[u8; 128]> {
    let (blocks, rest) = page.as_chunks();
    debug_assert!(rest.is_empty());
    blocks.iter()
}
