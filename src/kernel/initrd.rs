//! Initial RAM disks.

use super::read::{open_regular, read_span};
use anyhow::{Context as _, Result};
use std::fs::File;
use std::path::{Path, PathBuf};

/// An open initial RAM disk. Its content is not interpreted.
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
    /// When the path is not a readable regular file, or the file is empty.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, size) =
            open_regular(path).with_context(|| format!("cannot open initrd {}", path.display()))?;
        Ok(Self {
            path: path.into(),
            file,
            size,
        })
    }

    /// Returns how many bytes [`Self::load_into`] writes: the size of the file when it was opened.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Loads the initrd at the start of `dst`, which has at least [`Self::size`] bytes. If the file
    /// has grown since, the rest is ignored.
    ///
    /// # Errors
    /// When the file has shrunk or cannot be read, or `dst` is too small.
    pub fn load_into(&self, dst: &mut [u8]) -> Result<u64> {
        read_span(&self.file, &(0..self.size), self.size, dst)
            .with_context(|| format!("cannot load initrd {}", self.path.display()))
    }
}
