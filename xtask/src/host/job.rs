//! What an emulated host runs, and how that ends.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// A file of this machine to put into the emulated one.
#[derive(Clone, Debug)]
pub(crate) struct HostFile {
    /// Where it is here.
    pub(crate) from: PathBuf,
    /// Where it shall be there.
    pub(crate) to: PathBuf,
    /// Its permission bits there.
    pub(crate) mode: u32,
}

impl HostFile {
    /// Returns a program, which `from` is here and `to` shall be there.
    pub(crate) fn program(from: &Path, to: impl Into<PathBuf>) -> Self {
        Self {
            from: from.to_owned(),
            to: to.into(),
            mode: 0o755,
        }
    }
}

/// What an emulated host shall run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Job {
    /// The files that it needs.
    pub(crate) files: Vec<HostFile>,
    /// The program and its arguments.
    pub(crate) command: Vec<String>,
    /// Variables to set for it.
    pub(crate) environment: Vec<(String, String)>,
    /// The folder to run it in, made when missing.
    pub(crate) folder: PathBuf,
    /// How long it may take once the host is up.
    pub(crate) limit: Option<Duration>,
    /// Disk images of this machine that it writes to, each with the serial number by which it is
    /// found.
    pub(crate) disks: Vec<(PathBuf, String)>,
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// With this exit status; 128 and more for a signal, as a shell has it.
    Exit(i32),
    /// Because the user pressed Ctrl-].
    Left,
    /// Because xtask got this signal.
    Signal(i32),
}
