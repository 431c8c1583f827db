//! Names threads, in place of the C library's function.
//!
//! The standard library names threads by pthread_setname_np(3). musl's version can name other
//! threads too, by a path that it formats: that links all of printf, including 128-bit floating
//! point, 12 KiB that nothing else in a release needs.

use rustix::io::Errno;
use std::ffi::{CStr, c_char, c_int};

/// Names the calling thread, the only one that the standard library ever names.
///
/// # Safety
/// `name` is a NUL-terminated string, as for pthread_setname_np(3).
///
/// # Errors
/// ESRCH for another thread; ERANGE for a name of more than 15 bytes.
// SAFETY: it has the signature and the contract of the function that it replaces.
#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_setname_np(thread: libc::pthread_t, name: *const c_char) -> c_int {
    // SAFETY: pthread_self(3) has no preconditions.
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

/// The longest name in bytes (TASK_COMM_LEN, include/linux/sched.h, without the terminating NUL).
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
