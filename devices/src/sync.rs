//! Synchronization between threads: mutexes and eventfds.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Locks a mutex, even if a thread panicked while it held it: the panic has been reported, and the
/// data behind mutexes here stays consistent.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Creates a non-blocking, close-on-exec eventfd.
///
/// # Errors
/// When the process has no room for another descriptor.
pub fn bell() -> io::Result<EventFd> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
}

/// Signals an eventfd: whoever waits for it to become readable wakes up. This cannot fail, because
/// a 64-bit counter does not overflow in steps of one.
pub fn ring(bell: &EventFd) {
    let _ = bell.write(1);
}
