//! Locks on images, the same as QEMU's, so that each of the two programs knows what the other does.
//!
//! Who uses an image says what it does with it (permissions), and what others must not do
//! meanwhile. Each is a shared lock on a byte of the file: there is one byte for each permission,
//! and one for each that is not shared. Locks are for an open file description (fcntl(2),
//! F_OFD_SETLK). Who has set its own looks whether others have set a byte that does not go with
//! them; whoever comes second sees the other. In QEMU: block/file-posix.c (raw_check_lock_bytes,
//! RAW_LOCK_PERM_BASE), block.c (bdrv_default_perms), docs/system/images.rst.

use crate::pages::{is_byte_locked, lock_byte};
use std::fs::File;
use std::io;
use std::time::Duration;

/// The byte of the first permission, and of the first that is not shared.
const TAKEN: u64 = 100;
const UNSHARED: u64 = 200;
/// Numbers of permissions (QEMU's include/block/block-common.h: BLK_PERM_*): to read what makes
/// sense, to write, to change the size. To write what does not change the contents is number 2,
/// which nobody here needs or minds.
const CONSISTENT_READ: u64 = 0;
const WRITE: u64 = 1;
const RESIZE: u64 = 3;
/// How often locks are tried that do not go with those of another, and after what time: a process
/// that was killed has its files for a moment longer, while the kernel ends what it began.
const TRIES: usize = 20;
const BETWEEN_TRIES: Duration = Duration::from_millis(20);

/// What is done with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// A guest reads its bytes; others must not write, and may make it longer.
    ReadRaw,
    /// A guest reads and writes its bytes.
    WriteRaw,
    /// What is read follows from tables in it, or another image lies on it: it stays as it is.
    ReadFormat,
    /// Its tables are changed.
    WriteFormat,
}

impl Use {
    /// The permissions that are taken, and those that others must not take.
    fn permissions(self) -> (&'static [u64], &'static [u64]) {
        match self {
            Use::ReadRaw => (&[CONSISTENT_READ], &[WRITE]),
            Use::WriteRaw => (&[CONSISTENT_READ, WRITE], &[WRITE]),
            Use::ReadFormat => (&[CONSISTENT_READ], &[WRITE, RESIZE]),
            Use::WriteFormat => (&[CONSISTENT_READ, WRITE, RESIZE], &[WRITE, RESIZE]),
        }
    }

    fn bytes(self) -> impl Iterator<Item = u64> {
        let (taken, unshared) = self.permissions();
        let taken = taken.iter().map(|number| TAKEN + number);
        taken.chain(unshared.iter().map(|number| UNSHARED + number))
    }
}

/// Why an image cannot be used now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// Another program writes to it, or may change its size.
    Written,
    /// Another program relies on it that nobody writes to it.
    Kept,
}

/// Sets the locks that a use of an image needs. They go when it is closed.
///
/// # Errors
/// What the system says; a file system may have no locks.
pub fn lock(file: &File, used: Use) -> io::Result<Result<(), Conflict>> {
    for _ in 0..TRIES {
        match try_lock(file, used)? {
            Ok(()) => return Ok(Ok(())),
            Err(_) => std::thread::sleep(BETWEEN_TRIES),
        }
    }
    try_lock(file, used)
}

fn try_lock(file: &File, used: Use) -> io::Result<Result<(), Conflict>> {
    let result = set(file, used);
    if !matches!(result, Ok(Ok(()))) {
        for byte in used.bytes() {
            // What was not set is not given back.
            let _ = lock_byte(file, byte, false);
        }
    }
    result
}

fn set(file: &File, used: Use) -> io::Result<Result<(), Conflict>> {
    let (taken, unshared) = used.permissions();
    for byte in used.bytes() {
        match lock_byte(file, byte, true) {
            // Other programs lock the whole file.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Ok(Err(Conflict::Kept));
            }
            set => set?,
        }
    }
    for number in taken {
        if is_byte_locked(file, UNSHARED + number)? {
            return Ok(Err(Conflict::Kept));
        }
    }
    for number in unshared {
        if is_byte_locked(file, TAKEN + number)? {
            return Ok(Err(Conflict::Written));
        }
    }
    Ok(Ok(()))
}

#[cfg(test)]
mod tests;
