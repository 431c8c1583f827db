//! Persistent memory as it is asked for.

use crate::options::{Options, path_first};
use anyhow::{Context, Result};
use armlet_devices::rate::Limits;
use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

pub(super) const FLAG: &str = "--pmem";

/// What an image's size is a multiple of, and its place in the guest's memory too, in bytes: the
/// guest adds memory in such pieces (Linux: include/linux/mmzone.h, SUBSECTION_SIZE).
pub const ALIGN: u64 = 2 << 20;

/// A file that a guest is to have as memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PmemOptions {
    /// The image: a file or block device of a multiple of [`ALIGN`] bytes.
    pub path: PathBuf,
    /// Whether the guest only reads it.
    pub readonly: bool,
    /// How much may be flushed in how much time; a flush counts for all of its bytes.
    pub limits: Limits,
}

impl PmemOptions {
    /// Reads the value of `--pmem`: `path=IMG` and more, or an image's name and more.
    ///
    /// # Errors
    /// A value that makes no sense.
    pub fn parse(text: &str) -> Result<PmemOptions> {
        let text = &path_first(text, &["readonly"]);
        let mut options = Options::parse(FLAG, text, &[])?;
        options.refuse("file", "path=")?;
        let path = PathBuf::from(options.require("path")?);
        let readonly = options.switch("readonly")?;
        let limits = options.limits("bps", "iops")?;
        options.finish()?;
        Ok(PmemOptions {
            path,
            readonly,
            limits,
        })
    }
}

/// The size of a file or block device in bytes.
pub(super) fn size_of(file: &File) -> Result<u64> {
    let metadata = file.metadata().context("cannot be looked at")?;
    if metadata.file_type().is_block_device() {
        let size = rustix::fs::seek(file, rustix::fs::SeekFrom::End(0));
        return size.context("its size cannot be found");
    }
    Ok(metadata.len())
}
