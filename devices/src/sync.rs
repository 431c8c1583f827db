//! What threads share: locks, and eventfds that ring.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Takes a lock, also of a thread that panicked: that has been reported, and what is behind the
/// locks here is plain data.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes an eventfd whose reads do not wait, and which no program that is started inherits.
///
/// # Errors
/// A process without room for another descriptor.
pub fn bell() -> io::Result<EventFd> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
}

/// Rings: whoever waits for `bell` to be readable wakes. A counter of 64 bits does not overflow by
/// ones, so it cannot fail.
pub fn ring(bell: &EventFd) {
    let _ = bell.write(1);
}
