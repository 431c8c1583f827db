//! System calls of the jail that no library has in a safe form.

use armlet_system::descriptors::close_range;
use rustix::process::Pid;
use rustix::thread::UnshareFlags;
use std::io;

/// The first descriptor after standard input, output and error.
const FIRST: u32 = 3;

/// Closes all descriptors but standard input, output and error.
pub(super) fn close_inherited() {
    // SAFETY: nothing here owns a descriptor yet; this process has opened none.
    unsafe { close_range(FIRST, u32::MAX) };
}

/// Makes new namespaces for this process, or, of PIDs, for its children.
///
/// # Errors
/// What the system refuses.
pub(super) fn unshare(namespaces: UnshareFlags) -> io::Result<()> {
    // SAFETY: the flags name namespaces alone; the table of descriptors stays shared by the one
    // thread that there is.
    Ok(unsafe { rustix::thread::unshare_unsafe(namespaces) }?)
}

/// Copies this process, which has one thread. Returns the copy's ID, and `None` in the copy.
///
/// # Errors
/// What the system refuses.
pub(super) fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: the command is carried out by the one thread that the process begins with.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(Pid::from_raw(pid)),
    }
}

/// Ends this process at once.
pub(super) fn leave(status: i32) -> ! {
    // SAFETY: it has no preconditions.
    unsafe { libc::_exit(status) }
}

/// Returns whether this process leads its session.
pub(super) fn leads_session() -> bool {
    // Where the leader is in another PID namespace, or the session is that of the kernel's first
    // process, the number is 0, which rustix's function takes for impossible.
    // SAFETY: the calls have no preconditions.
    unsafe { libc::getsid(0) == libc::getpid() }
}

/// Returns what a clock shows, in microseconds.
pub(super) fn microseconds(clock: libc::clockid_t) -> i64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure is of our own.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec * 1_000_000 + time.tv_nsec / 1000
}
