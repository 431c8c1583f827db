//! Restarts interrupted system calls: all of the program's calls that can fail with EINTR.
//!
//! Signals are not the only cause: the kernel completes io_uring requests by task work of the
//! submitter, and wakes that thread as if a signal were pending (TIF_NOTIFY_SIGNAL). Calls that
//! check `signal_pending` then fail with EINTR although there is no signal: KVM_CREATE_VM does
//! (mm/mmu_notifier.c and mm/vma.c: mm_take_all_locks), and fallocate and fsync may on FUSE and
//! network file systems. Signal handlers are installed with SA_RESTART, which poll(2) and
//! epoll_wait(2) ignore (signal(7)).

use rustix::io::Errno;
use std::io;
use vmm_sys_util::epoll::{Epoll, EpollEvent};

/// An error of a system call.
pub trait CallError {
    /// Returns whether the call was interrupted (EINTR).
    fn is_interrupted(&self) -> bool;
}

impl CallError for io::Error {
    fn is_interrupted(&self) -> bool {
        self.kind() == io::ErrorKind::Interrupted
    }
}

impl CallError for Errno {
    fn is_interrupted(&self) -> bool {
        *self == Errno::INTR
    }
}

// The error of KVM's ioctls, among others.
impl CallError for vmm_sys_util::errno::Error {
    fn is_interrupted(&self) -> bool {
        self.errno() == libc::EINTR
    }
}

/// Repeats a system call while it fails with EINTR. It is for calls that have no effect in that
/// case; one with a timeout has to recompute it each time ([`crate::deadline::Deadline`]).
///
/// # Errors
/// Any other error of the call.
pub fn uninterrupted<T, E: CallError>(mut call: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    loop {
        match call() {
            Err(error) if error.is_interrupted() => {}
            result => return result,
        }
    }
}

/// Waits up to `timeout` milliseconds, or indefinitely for -1, and returns the number of events: 0
/// if the wait was interrupted, so that the caller checks its deadlines.
///
/// # Errors
/// Any other error of epoll_wait(2).
pub fn events(epoll: &Epoll, timeout: i32, ready: &mut [EpollEvent]) -> io::Result<usize> {
    match epoll.wait(timeout, ready) {
        Err(error) if error.is_interrupted() => Ok(0),
        result => result,
    }
}

#[cfg(test)]
pub(crate) mod tests;
