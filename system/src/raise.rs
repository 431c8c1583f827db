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
