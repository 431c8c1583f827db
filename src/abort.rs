//! abort(3) by a system call that armlet may make once it is confined.
//!
//! That of musl sends SIGABRT by tkill, which takes the number of a thread of any process. The standard
//! library calls this one in its place, after panics and where there is no memory.

use armlet_system::raise::raise;

#[unsafe(no_mangle)]
extern "C" fn abort() -> ! {
    // Restores the terminal, if its modes were changed, and raises the signal again by default.
    raise(libc::SIGABRT);
    // SAFETY: the calls take numbers. Here the signal is ignored, or had a handler that returned.
    unsafe {
        libc::signal(libc::SIGABRT, libc::SIG_DFL);
        raise(libc::SIGABRT);
        libc::_exit(127)
    }
}
