//! What the user hears of a disk whose storage fails.

use armlet_devices::limit::{Admitted, RateLimit};
use armlet_devices::virtio::block::{Operation, Outcome};
use rustix::io::Errno;
use std::io;
use std::path::PathBuf;

/// Why a request that nobody wants any more is not done.
pub(super) fn cancelled() -> io::Error {
    Errno::CANCELED.into()
}

fn is_cancelled(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::CANCELED)
}

/// Says what the host's storage refuses, at a limited rate.
pub(super) struct Complaints {
    /// The disk's name: "disk0".
    name: String,
    path: PathBuf,
    limit: RateLimit,
}

impl Complaints {
    /// Complaints about the image of the disk called `name`.
    pub(super) fn new(name: String, path: PathBuf) -> Complaints {
        Complaints {
            name,
            path,
            limit: RateLimit::default(),
        }
    }

    /// What comes of a request that ended with `result`.
    pub(super) fn outcome(
        &self,
        operation: Operation,
        offset: u64,
        len: u64,
        result: io::Result<()>,
    ) -> Outcome {
        let Err(error) = result else {
            return Outcome::Done;
        };
        if is_cancelled(&error) {
            return Outcome::Failed;
        }
        self.limit.log(log::Level::Warn, |Admitted { count, .. }| {
            let act = match operation {
                Operation::Read => "read",
                Operation::Write => "write",
                Operation::Flush => "flush",
                Operation::Discard => "discard",
                Operation::WriteZeroes { .. } => "zero",
            };
            let what = match operation {
                Operation::Flush => String::new(),
                _ => format!(" {len} bytes at byte {offset} of"),
            };
            let (name, path) = (&self.name, self.path.display());
            format!(
                "{name}: cannot {act}{what} {path}: {error}; the guest gets an I/O error (error {count} of this disk)"
            )
        });
        Outcome::Failed
    }
}
