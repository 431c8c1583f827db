//! Calls that are interrupted.

use super::*;
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
    let mut answers = vec![Ok(()), Err(vmm_sys_util::errno::Error::new(libc::EINTR))];
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
