//! System calls around fork(2) and exec(2) that no library has in a safe form.

use armlet_system::descriptors;
use rustix::process::Pid;
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

/// The highest number of a signal (include/uapi/asm-generic/signal.h: _NSIG).
const LAST_SIGNAL: i32 = 64;

/// Runs `child` in a copy of this process, which ends with it. Returns the copy's ID.
///
/// # Errors
/// What the system refuses.
pub(super) fn fork(child: impl FnOnce()) -> io::Result<Pid> {
    // SAFETY: the copy runs on with its own memory. It has this thread alone, which is why the
    // caller forks before there are others; tests, which do not, have the C library's allocator,
    // whose locks fork(3) takes care of.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let _ = catch_unwind(AssertUnwindSafe(child));
        // SAFETY: it ends the copy, without what this process wants done at its end.
        unsafe { libc::_exit(0) }
    }
    Pid::from_raw(pid)
        .filter(|_| pid > 0)
        .ok_or_else(io::Error::last_os_error)
}

/// Gives a descriptor this number, in place of what has it, and closes all others but standard
/// input, output and error.
///
/// # Errors
/// What the system refuses.
pub(super) fn keep_only(descriptor: OwnedFd, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the numbers may be those of descriptors that other objects own. The caller is a
    // process that was just forked, and will not use those; this one is not closed again.
    let kept = unsafe { descriptors::keep_only([descriptor.into_raw_fd()], number) };
    kept.map(|[kept]| kept)
}

/// Lets all signals do what they do by default, and blocks all or none of them.
fn reset_signals(blocked: bool) {
    // A struct sigaction of the kernel's: SIG_DFL and no flags, 32 bytes at most. The C library's
    // function leaves out the signals that it uses itself, and they are inherited like others.
    let default = [0_u64; 4];
    // SAFETY: the calls work on sets and structures of our own; they change this process's signals
    // alone, and the only error is that of a signal that cannot be changed.
    unsafe {
        let mut set = std::mem::zeroed();
        match blocked {
            true => libc::sigfillset(&mut set),
            false => libc::sigemptyset(&mut set),
        };
        for signal in 1..=LAST_SIGNAL {
            let none = std::ptr::null_mut::<libc::c_void>();
            libc::syscall(libc::SYS_rt_sigaction, signal, &default, none, 8_usize);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
    }
}

/// Blocks all signals: this process ends by its own decision, or by SIGKILL.
pub(super) fn ignore_signals() {
    reset_signals(true);
}

/// Has the program that `command` starts inherit `descriptor` by this number, begin with no signal
/// blocked or ignored in a session of its own, and end with this process, as far as the kernel does
/// that (prctl(2): PR_SET_PDEATHSIG). Unless it `gains_rights`, neither it nor what it executes can.
pub(super) fn prepare(
    command: &mut Command,
    descriptor: OwnedFd,
    number: RawFd,
    gains_rights: bool,
) {
    let prepare = move || {
        if !gains_rights {
            rustix::thread::set_no_new_privs(true)?;
        }
        rustix::process::setsid()?;
        reset_signals(false);
        let kill = Some(rustix::process::Signal::KILL);
        rustix::process::set_parent_process_death_signal(kill)?;
        // SAFETY: the number's owner, if it has one, is in the process that this is a copy of.
        let made = unsafe {
            match descriptor.as_raw_fd() == number {
                true => libc::fcntl(number, libc::F_SETFD, 0),
                false => libc::dup2(descriptor.as_raw_fd(), number),
            }
        };
        match made {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec it makes system calls, and does not allocate.
    unsafe { command.pre_exec(prepare) };
}
