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
    /// Whether the call was interrupted (EINTR).
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
pub(crate) mod tests {
    use super::*;
    use crate::kvm::{HostArch, KvmArch, open};
    use armlet_arch::Region;
    use armlet_arch::{Range, Width};
    use vmm_sys_util::signal::{Killable, register_signal_handler};

    #[test]
    fn only_interrupted_calls_are_made_again() {
        let mut answers = vec![Ok(7), Err(Errno::INTR), Err(Errno::INTR)];
        let done = uninterrupted(|| answers.pop().expect("an answer"));
        assert_eq!(done.expect("the third"), 7);
        let mut calls = 0;
        let failed = uninterrupted(|| {
            calls += 1;
            Err::<(), _>(Errno::AGAIN)
        });
        assert_eq!((failed, calls), (Err(Errno::AGAIN), 1));
        // As kvm-ioctls says it.
        let mut answers = vec![Ok(()), Err(kvm_ioctls::Error::new(libc::EINTR))];
        uninterrupted(|| answers.pop().expect("an answer")).expect("the second");
    }

    /// Sends a thread that does `call` signals for as long as it takes.
    pub(crate) fn under_fire(call: impl FnOnce() + Send + 'static) {
        extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        // Not one of those that queue up: each call would find the next one pending.
        let signal = libc::SIGUSR2;
        register_signal_handler(signal, nothing).expect("a signal of the tests' own");
        let thread = std::thread::spawn(call);
        while !thread.is_finished() {
            thread.kill(signal).expect("its handle is held");
        }
        thread.join().expect("no failure in the thread");
    }

    #[test]
    fn signals_do_not_stop_the_making_of_a_vm() {
        let Ok(kvm) = open::open() else {
            println!("skipped: no KVM here");
            return;
        };
        let bits = 32;
        let range = Range::new(0, 1 << bits).expect("a range");
        let width = Width {
            bits,
            need: bits,
            highest: Region {
                name: "RAM".into(),
                range,
            },
            limit: bits,
            fixed: kvm.check_extension_int(kvm_ioctls::Cap::ArmVmIPASize) == 0,
            levels: 3,
            levels_at_limit: 3,
            host_page: 4096,
        };
        under_fire(move || {
            for _ in 0..300 {
                HostArch::create_vm(&kvm, &width).expect("a VM");
            }
        });
    }
}
