//! System calls that were interrupted, and are made again: all of the program's that can say EINTR.
//!
//! A signal is not all that interrupts: the kernel completes requests of io_uring by work that its
//! submitter does, and wakes that thread as if a signal were pending (TIF_NOTIFY_SIGNAL). Calls that
//! ask `signal_pending` then fail with EINTR although no signal comes: KVM_CREATE_VM does
//! (mm/mmu_notifier.c and mm/vma.c: mm_take_all_locks), as may fallocate and fsync where the file
//! system is another process or machine. Handlers of signals are set with SA_RESTART, which waits for
//! descriptors (poll(2), epoll_wait(2)) do not heed (signal(7)).

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

// Of KVM's ioctls, too.
impl CallError for vmm_sys_util::errno::Error {
    fn is_interrupted(&self) -> bool {
        self.errno() == libc::EINTR
    }
}

/// Makes a system call again as long as it says EINTR. It is for calls that do nothing when they say
/// so; one that waits reckons its time limit anew each time ([`crate::deadline::Deadline`]).
///
/// # Errors
/// Whatever else it says.
pub fn uninterrupted<T, E: CallError>(mut call: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    loop {
        match call() {
            Err(error) if error.is_interrupted() => {}
            result => return result,
        }
    }
}

/// Waits up to `timeout` milliseconds, or without an end for -1, and returns how many events there
/// are: none where the wait was interrupted, so that the caller looks at its deadlines.
///
/// # Errors
/// Whatever else epoll_wait(2) says.
pub fn events(epoll: &Epoll, timeout: i32, ready: &mut [EpollEvent]) -> io::Result<usize> {
    match epoll.wait(timeout, ready) {
        Err(error) if error.is_interrupted() => Ok(0),
        result => result,
    }
}

#[cfg(test)]
pub(crate) mod tests;
