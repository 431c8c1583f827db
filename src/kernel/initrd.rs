//! Initial RAM disks.

use super::read::{open_regular, read_span};
use anyhow::{Context as _, Result};
use std::fs::File;
use std::path::{Path, PathBuf};

/// An initial RAM disk that stays open. What is in it is the guest's business.
#[derive(Debug)]
pub struct Initrd {
    path: PathBuf,
    file: File,
    size: u64,
}

impl Initrd {
    /// Opens an initrd file.
    ///
    /// # Errors
    /// A path that is no readable regular file, or an empty one.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, size) =
            open_regular(path).with_context(|| format!("cannot open initrd {}", path.display()))?;
        Ok(Self {
            path: path.into(),
            file,
            size,
        })
    }

    /// Bytes that [`Self::load_into`] writes: the size of the file when it was opened.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Loads the initrd to the start of `dst`, at least [`Self::size`] bytes of guest memory. Of a
    /// file that grew since, only as many bytes are read.
    ///
    /// # Errors
    /// The file shrank, cannot be read, or `dst` is too small.
    pub fn load_into(&self, dst: &mut [u8]) -> Result<u64> {
        read_span(&self.file, &(0..self.size), self.size, dst)
            .with_context(|| format!("cannot load initrd {}", self.path.display()))
    }
}
