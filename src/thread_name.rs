//! How a thread is given its name, in place of the C library's way.
//!
//! The standard library has one way to name a thread, pthread_setname_np(3). musl's can name other
//! threads, too, by a path that it formats: it brings all of printf along, with floating-point
//! numbers of 128 bits, 12 KiB that nothing else in a release needs.

use rustix::io::Errno;
use std::ffi::{CStr, c_char, c_int};

/// Names the calling thread; the standard library names no other.
///
/// # Safety
/// `name` is a string that ends in a zero byte, as pthread_setname_np(3) asks.
///
/// # Errors
/// ESRCH for another thread; ERANGE for a name of more than 15 bytes.
// SAFETY: it has the arguments, the result and the contract of the function whose name it has.
#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_setname_np(thread: libc::pthread_t, name: *const c_char) -> c_int {
    // SAFETY: pthread_self(3) does nothing but answer.
    if thread != unsafe { libc::pthread_self() } {
        return Errno::SRCH.raw_os_error();
    }
    // SAFETY: the caller's promise.
    let name = unsafe { CStr::from_ptr(name) };
    if name.count_bytes() > LONGEST {
        return Errno::RANGE.raw_os_error();
    }
    match rustix::thread::set_name(name) {
        Ok(()) => 0,
        Err(error) => error.raw_os_error(),
    }
}

/// The longest name in bytes (TASK_COMM_LEN, include/linux/sched.h, without the zero byte).
const LONGEST: usize = 15;

#[cfg(test)]
mod tests {
    use std::thread;

    #[test]
    fn a_thread_has_the_name_that_it_was_given() {
        let named = thread::Builder::new().name("a thread's name".into());
        let read = || std::fs::read_to_string("/proc/thread-self/comm");
        let name = named
            .spawn(read)
            .expect("a thread")
            .join()
            .expect("no panic");
        assert_eq!(name.expect("a name"), "a thread's name\n");
    }
}
