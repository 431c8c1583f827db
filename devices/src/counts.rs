//! What a device has done, counted by the one thread that serves it and read by others.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows. One thread adds to it, so that no lock and no atomic addition is needed.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds to it. Of two threads that do so at a time, one may be lost.
    pub fn add(&self, more: u64) {
        let now = self.0.load(Ordering::Relaxed);
        self.0.store(now.wrapping_add(more), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counts of a device. What goes to the guest is what it reads of a disk, or receives from a network.
#[derive(Debug, Default)]
pub struct Counts {
    /// Requests or frames whose data go to the guest, and their bytes.
    pub to_guest: Flow,
    /// Those whose data come from the guest.
    pub from_guest: Flow,
    /// Requests to bring data to stable storage.
    pub flushes: Count,
    /// Requests that failed, and frames that were lost.
    pub failed: Count,
}

/// What passes in one direction.
#[derive(Debug, Default)]
pub struct Flow {
    count: Count,
    bytes: Count,
}

impl Flow {
    /// Counts a request or frame of so many bytes.
    pub fn add(&self, bytes: u64) {
        self.count.add(1);
        self.bytes.add(bytes);
    }
}

/// Counts at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests or frames to the guest.
    pub to_guest: u64,
    /// Bytes to the guest.
    pub bytes_to_guest: u64,
    /// Requests or frames from the guest.
    pub from_guest: u64,
    /// Bytes from the guest.
    pub bytes_from_guest: u64,
    /// Flushes.
    pub flushes: u64,
    /// What failed.
    pub failed: u64,
}

impl Tally {
    /// What was added since an earlier moment.
    #[must_use]
    pub fn since(&self, before: &Tally) -> Tally {
        self.by(before, u64::wrapping_sub)
    }

    /// Both together.
    #[must_use]
    pub fn with(&self, other: &Tally) -> Tally {
        self.by(other, u64::wrapping_add)
    }

    fn by(&self, other: &Tally, of: fn(u64, u64) -> u64) -> Tally {
        Tally {
            to_guest: of(self.to_guest, other.to_guest),
            bytes_to_guest: of(self.bytes_to_guest, other.bytes_to_guest),
            from_guest: of(self.from_guest, other.from_guest),
            bytes_from_guest: of(self.bytes_from_guest, other.bytes_from_guest),
            flushes: of(self.flushes, other.flushes),
            failed: of(self.failed, other.failed),
        }
    }
}

impl Counts {
    /// What they are now; not all of one moment, where the device is at work.
    #[must_use]
    pub fn tally(&self) -> Tally {
        Tally {
            to_guest: self.to_guest.count.get(),
            bytes_to_guest: self.to_guest.bytes.get(),
            from_guest: self.from_guest.count.get(),
            bytes_from_guest: self.from_guest.bytes.get(),
            flushes: self.flushes.get(),
            failed: self.failed.get(),
        }
    }
}
