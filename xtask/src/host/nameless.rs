//! Files without a name.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use rustix::io::{FdFlags, fcntl_setfd};

/// A file without a name, which is gone when nobody has it open: also when xtask is killed.
pub(crate) struct NamelessFile {
    file: File,
}

impl NamelessFile {
    /// Creates an empty file, which programs started from here may open too.
    pub(crate) fn new() -> Result<Self> {
        let folder = std::env::temp_dir();
        let path = folder.join(format!("armlet-xtask-{}", std::process::id()));
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options
            .open(&path)
            .with_context(|| format!("cannot create {path:?}"))?;
        fs::remove_file(&path).with_context(|| format!("cannot remove {path:?}"))?;
        fcntl_setfd(&file, FdFlags::empty()).context("cannot let a file be inherited")?;
        Ok(Self { file })
    }

    /// Returns the file, to be written.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Returns a path by which this process, and those that it starts, may open the file.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}
