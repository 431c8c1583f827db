//! What a balloon should hold.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a balloon should hold, through all starts of its guest: whoever has it may change it.
#[derive(Debug)]
pub struct BalloonTarget {
    bytes: AtomicU64,
    /// Bytes that the guest has.
    memory: u64,
}

impl BalloonTarget {
    /// The target of a balloon in a guest with `memory` bytes.
    pub(super) fn new(bytes: u64, memory: u64) -> BalloonTarget {
        BalloonTarget {
            bytes: AtomicU64::new(bytes),
            memory,
        }
    }

    /// Returns it in bytes.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Changes it for the devices that are made from now on.
    ///
    /// # Errors
    /// More than the guest can spare, in a sentence.
    pub fn set(&self, bytes: u64) -> Result<(), String> {
        if bytes >= self.memory {
            return Err(too_large(bytes, self.memory));
        }
        self.bytes.store(bytes, Ordering::Relaxed);
        Ok(())
    }
}

/// Says that a balloon takes all of a guest's memory.
pub(super) fn too_large(balloon: impl fmt::Display, memory: impl fmt::Display) -> String {
    format!(
        "a balloon of {balloon} leaves nothing of the guest's {memory}; use less, and leave it what it needs to run"
    )
}
