//! Persistent memory as it is asked for.

use super::PmemImage;
use crate::backend::Backend;
use crate::kind::{DeviceOptions, Kind, Place};
use crate::options::{Options, path_first};
use anyhow::{Context, Result};
use armlet_system::files::{self, Accepted};
use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

/// Persistent memory.
pub static KIND: Kind = Kind {
    name: "pmem",
    letter: None,
    value: "PMEM",
    help: "persistent memory: PATH, or path=IMG[,readonly]; may be\nrepeated",
    repeats: true,
    slot: 4,
    default: None,
    parse: |text, _| Ok(Some(Box::new(PmemOptions::parse(text)?))),
};

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
        options.finish()?;
        Ok(PmemOptions { path, readonly })
    }
}

impl DeviceOptions for PmemOptions {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    /// The image is neither locked nor kept open.
    fn pmem_size(&self) -> Result<Option<u64>> {
        let shown = self.path.display();
        let file = files::open(&self.path, Accepted::FileOrDisk, false)
            .with_context(|| format!("{FLAG}: cannot open {shown}"))?;
        let size = size_of(&file).with_context(|| format!("{FLAG}: {shown}"))?;
        Ok(Some(size))
    }

    fn open_backend(&self, place: &Place<'_>) -> Result<Box<dyn Backend>> {
        Ok(Box::new(PmemImage::open(self, place.number)?))
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
