//! Forks the process that unpacks, and confines it: system calls that no library has in a safe form.

use crate::kvm::{HostArch, KvmArch};
use armlet_system::descriptors::keep_only;
use armlet_system::seccomp::{Instruction, Outcome, Program, add_filter};
use rustix::process::{Pid, Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The most bytes of memory that it may take, beside what it begins with: a window, and as much
/// again.
const MOST_MEMORY: u64 = 1 << 30;

/// What it may call.
const CALLS: [i64; 12] = [
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
];
/// What it may call for memory that is not executable: their third argument says what it is.
const CALLS_FOR_MEMORY: [i64; 2] = [libc::SYS_mmap, libc::SYS_mprotect];

/// What is answered with EPERM: glibc's allocator looks into a file in /proc when it gives memory back,
/// and the standard library at the descriptors that it closes, and both go on without. All other calls
/// end the process.
const REFUSED: [i64; 2] = [libc::SYS_openat, libc::SYS_fcntl];

/// Runs `work` in a confined copy of this process that has these descriptors and no others. Returns
/// the copy's ID.
///
/// # Errors
/// What the system refuses.
pub(super) fn start(
    requests: OwnedFd,
    results: OwnedFd,
    file: &File,
    work: impl FnOnce(&OwnedFd, &OwnedFd, &File),
) -> io::Result<Pid> {
    // SAFETY: the copy runs on with its own memory. It has this thread alone; tests, which have
    // others, have the C library's allocator, whose locks fork(3) takes care of.
    match unsafe { libc::fork() } {
        0 => {
            let _ = catch_unwind(AssertUnwindSafe(|| {
                let kept = [requests.as_fd(), results.as_fd(), file.as_fd()];
                // SAFETY: the numbers may be those of descriptors that other objects own. This is a
                // process that was just forked, and will not use those.
                let kept = unsafe { keep_only(kept.map(|fd| fd.as_raw_fd()), 0) };
                if let Ok([requests, results, file]) = kept
                    && confine().is_ok()
                {
                    work(&requests, &results, &file.into());
                }
            }));
            // SAFETY: it ends the copy, without what this process wants done at its end.
            unsafe { libc::_exit(0) }
        }
        pid => Pid::from_raw(pid.max(0)).ok_or_else(io::Error::last_os_error),
    }
}

/// Gives up all that unpacking does not need.
fn confine() -> io::Result<()> {
    // SAFETY: the set is of our own, and the call changes this thread's signals alone.
    unsafe {
        let mut all = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
    }
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let limits = [
        (Resource::Data, MOST_MEMORY),
        (Resource::Core, 0),
        (Resource::Fsize, 0),
    ];
    for (resource, most) in limits {
        let [current, maximum] = [Some(most); 2];
        setrlimit(resource, Rlimit { current, maximum })?;
    }
    rustix::thread::set_no_new_privs(true)?;
    // A kernel without seccomp refuses it: then the process has no descriptors and no more.
    let _ = add_filter(&FILTER);
    Ok(())
}

const PROGRAM: Program = program();
static FILTER: [Instruction; PROGRAM.len()] = PROGRAM.exactly();

const fn program() -> Program {
    let mut program = Program::new(Outcome::Kill);
    let refused = program.end(Outcome::Fail(libc::EPERM));
    let (allowed, forbidden) = (program.allowed, program.forbidden);
    let memory = program.if_any_of(libc::PROT_EXEC as u32, forbidden, allowed);
    let memory = program.argument(2, memory);
    let cases = [
        (&CALLS as &[_], allowed),
        (&CALLS_FOR_MEMORY, memory),
        (&REFUSED, refused),
    ];
    program.decide(&HostArch::OTHER_CALLS.native, &cases, forbidden);
    program
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketType, socket};
    use rustix::pipe::{PipeFlags, pipe_with};
    use std::io::Read;

    /// Whether the process can do this and live on.
    fn survives(act: impl FnOnce()) -> bool {
        let file = tempfile::tempfile().expect("a file");
        let (asked, _requests) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        let (results, given) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        let work = |_: &OwnedFd, given: &OwnedFd, _: &File| {
            act();
            let _ = rustix::io::write(given, b"x");
        };
        start(asked, given, &file, work).expect("a process");
        let mut said = Vec::new();
        let read = File::from(results).read_to_end(&mut said);
        read.expect("a pipe");
        !said.is_empty()
    }

    fn map(protection: i32) -> *mut libc::c_void {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping takes no other's place.
        unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) }
    }

    fn execute() {
        let path = c"/bin/true".as_ptr();
        let (words, variables) = ([path, std::ptr::null()], [std::ptr::null()]);
        // SAFETY: the strings are constant, and the lists end with a null pointer.
        unsafe { libc::execve(path, words.as_ptr(), variables.as_ptr()) };
    }

    #[test]
    fn the_unpacker_may_take_memory_and_nothing_else() {
        type Act = (&'static str, fn());
        let allowed: [Act; 3] = [
            ("a refused file", || {
                assert!(std::fs::read("/etc/passwd").is_err());
            }),
            ("memory", || {
                drop(std::hint::black_box(vec![7_u8; 10 << 20]))
            }),
            ("mapping", || {
                map(libc::PROT_READ | libc::PROT_WRITE);
            }),
        ];
        for (name, act) in allowed {
            assert!(survives(act), "{name}");
        }
        let forbidden: [Act; 8] = [
            ("socket", || {
                drop(socket(AddressFamily::INET, SocketType::STREAM, None));
            }),
            ("execve", execute),
            ("fork", || {
                // SAFETY: the copy ends at once.
                unsafe {
                    if libc::fork() == 0 {
                        libc::_exit(0);
                    }
                }
            }),
            ("kill", || {
                let parent = rustix::process::getppid();
                let _ = parent.map(rustix::process::test_kill_process);
            }),
            ("executable mapping", || {
                map(libc::PROT_READ | libc::PROT_EXEC);
            }),
            ("mprotect to executable", || {
                let page = map(libc::PROT_READ);
                // SAFETY: the page was mapped by us, and nothing is in it.
                unsafe { libc::mprotect(page, 4096, libc::PROT_READ | libc::PROT_EXEC) };
            }),
            ("pipe", || drop(pipe_with(PipeFlags::CLOEXEC))),
            ("name", || {
                let _ = rustix::thread::set_name(c"other");
            }),
        ];
        for (name, act) in forbidden {
            assert!(!survives(act), "{name}");
        }
    }
}
