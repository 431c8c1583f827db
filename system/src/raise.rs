//! A signal to the calling thread.

/// Sends a signal to the calling thread, by the one call for that which armlet may make once it is confined;
/// raise(3) of musl uses another. Async-signal-safe.
pub fn raise(signal: libc::c_int) {
    // SAFETY: the calls take and return numbers.
    unsafe {
        let (process, thread) = (libc::getpid(), libc::syscall(libc::SYS_gettid));
        libc::syscall(libc::SYS_tgkill, process, thread, signal);
    }
}

/// Ends the process by a signal that nothing handles any more. It returns where the signal is blocked.
pub fn end_by(signal: libc::c_int) {
    // SAFETY: the call sets what a signal does, and touches no memory.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    raise(signal);
}
