//! What the user hears of a disk whose storage fails.

use armlet_devices::virtio::block::{Operation, Outcome};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Says what the host's storage refuses, at a limited rate.
pub(super) struct Complaints {
    /// The disk's name: "disk0".
    name: String,
    path: PathBuf,
    count: AtomicU64,
}

impl Complaints {
    /// Complaints about the image of the disk called `name`.
    pub(super) fn new(name: String, path: PathBuf) -> Complaints {
        Complaints {
            name,
            path,
            count: AtomicU64::new(0),
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
        let count = self.count.fetch_add(1, Relaxed) + 1;
        // The first few, then ever fewer.
        if count <= 4 || count.is_power_of_two() {
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
            log::warn!(
                "{name}: cannot {act}{what} {path}: {error}; the guest gets an I/O error (error {count} of this disk)"
            );
        }
        Outcome::Failed
    }
}
