//! What threads share: locks, and eventfds that ring.

use std::sync::{Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// Takes a lock, also of a thread that panicked: that has been reported, and what is behind the
/// locks here is plain data.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Rings: whoever waits for `bell` to be readable wakes. A counter of 64 bits does not overflow by
/// ones, so it cannot fail.
pub fn ring(bell: &EventFd) {
    let _ = bell.write(1);
}
