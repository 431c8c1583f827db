//! What the broker gives up once it knows what it will be asked for.
//!
//! One that starts no program opens and removes what was named, and connects: it is confined as tightly as
//! armlet. Programs inherit what binds the broker, and passt and virtiofsd mount, change namespaces, users
//! and roots before they confine themselves, which Landlock and a short list of calls would keep them
//! from: a broker that starts them gives up what neither of them does.

use super::services::{Known, Services};
use armlet_system::landlock::{self, LIST, MAKE, READ, REMOVE, REQUESTS, TRUNCATE, WRITE};
use armlet_system::rights;
use armlet_system::seccomp::{Native, Outcome, Program, add_filter};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, set_no_new_privs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// What a broker without programs does: it hears and answers, opens, connects and removes.
const CALLS: [i64; 37] = [
    libc::SYS_brk,
    libc::SYS_chdir,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_connect,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fchdir,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_readlinkat,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_unlinkat,
    libc::SYS_write,
    libc::SYS_writev,
];
/// What it does besides for the files of snapshots.
const CALLS_FOR_SNAPSHOTS: [i64; 8] = [
    libc::SYS_flock,
    libc::SYS_fsetxattr,
    libc::SYS_fgetxattr,
    libc::SYS_fsync,
    libc::SYS_getdents64,
    libc::SYS_mkdirat,
    libc::SYS_pipe2,
    libc::SYS_renameat,
];
/// What it does for memory that is not executable.
const CALLS_FOR_MEMORY: [i64; 2] = [libc::SYS_mmap, libc::SYS_mprotect];

/// What neither a broker with programs does nor passt or virtiofsd do: to load code into the kernel, to look
/// into other processes, to stop the computer or set its clock, and interfaces that are wide and not theirs.
const NOBODYS: [i64; 38] = [
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_bpf,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_kcmp,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_lookup_dcookie,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_nfsservctl,
    libc::SYS_perf_event_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
];

/// Confines the broker, and what it starts from now on, to what its services need.
///
/// # Errors
/// A layer that the host has and refuses.
pub(super) fn enter(services: &Services, native: &Native) -> Result<(), Errno> {
    match services.has_programs() {
        true => with_programs(services, native),
        false => without_programs(services, native),
    }
}

fn without_programs(services: &Services, native: &Native) -> Result<(), Errno> {
    // Root's sockets and folders may be those of others.
    rights::give_up(CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH)?;
    let mut devices: Vec<OwnedFd> = Vec::new();
    let mut folders: Vec<BorrowedFd<'_>> = Vec::new();
    let mut images = 0;
    let mut snapshots: &[i64] = &[];
    for known in services.all() {
        match known {
            Known::Device(path) => {
                let flags = OFlags::PATH | OFlags::CLOEXEC;
                // One that is not there cannot be opened later either.
                devices.extend(openat(CWD, path, flags, Mode::empty()));
            }
            Known::Snapshots(_) => {
                snapshots = &CALLS_FOR_SNAPSHOTS;
                images |= READ | LIST | WRITE | TRUNCATE | REMOVE | MAKE;
            }
            Known::Images(writable) => images |= if *writable { READ | WRITE } else { READ },
            Known::Removal(folder, ..) => folders.push(folder.as_fd()),
            Known::Program { .. } | Known::Sockets(..) | Known::Nothing => {}
        }
    }
    // Clients may name any.
    let everything = match images {
        0 => None,
        _ => Some(openat(
            CWD,
            "/",
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
        )?),
    };
    let images = everything
        .iter()
        .map(|path| (path.as_fd(), images | REQUESTS));
    // Who is given a device makes its requests.
    let devices = devices
        .iter()
        .map(|device| (device.as_fd(), READ | WRITE | REQUESTS));
    let folders = folders.into_iter().map(|folder| (folder, REMOVE));
    landlock::restrict(&devices.chain(folders).chain(images).collect::<Vec<_>>())?;
    let mut program = Program::new(Outcome::Kill);
    let (allowed, forbidden) = (program.allowed, program.forbidden);
    let memory = program.if_any_of(libc::PROT_EXEC as u32, forbidden, allowed);
    let memory = program.argument(2, memory);
    let socket = program.if_equal(libc::AF_UNIX as u32, allowed, forbidden);
    let socket = program.argument(0, socket);
    let cases = [
        (&CALLS as &[_], allowed),
        (native.calls, allowed),
        (native.files, allowed),
        (snapshots, allowed),
        (&CALLS_FOR_MEMORY, memory),
        (&[libc::SYS_socket], socket),
    ];
    program.decide(native, &cases, forbidden);
    add_filter(program.code())
}

fn with_programs(services: &Services, native: &Native) -> Result<(), Errno> {
    let gain = |known: &Known| {
        matches!(
            known,
            Known::Program {
                gains_rights: true,
                ..
            }
        )
    };
    let gains_rights = services.all().iter().any(gain);
    if !gains_rights {
        set_no_new_privs(true)?;
    }
    let mut program = Program::new(Outcome::Fail(libc::EPERM));
    let (allowed, forbidden) = (program.allowed, program.forbidden);
    program.decide(native, &[(&NOBODYS, forbidden)], allowed);
    match add_filter(program.code()) {
        // Without root's rights, a filter is for those who gain none.
        Err(Errno::ACCESS) if gains_rights => Ok(()),
        added => added,
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::protocol::{FileId, Service};
    use super::super::super::sys::fork;
    use super::super::super::tests::native;
    use super::*;
    use rustix::net::{AddressFamily, SocketType, socket};
    use rustix::process::{WaitOptions, WaitStatus, waitpid};
    use std::fs::File;
    use std::path::Path;

    /// What is tried, with the path of a file.
    type Attempt = (&'static str, fn(*const libc::c_char) -> i64);

    /// A broker's services: these.
    fn services(offered: Vec<(Service, Option<OwnedFd>)>) -> Services {
        let mut services = Services::default();
        for (service, folder) in offered {
            services.add(service, folder);
        }
        services
    }

    fn program(gains_rights: bool) -> Service {
        Service::Program {
            path: "/bin/true".into(),
            arguments: Vec::new(),
            listens: false,
            gains_rights,
        }
    }

    /// What becomes of a process that is confined for these services and does this.
    fn fate(services: &Services, act: impl FnOnce() -> i32) -> WaitStatus {
        let pid = fork(|| {
            let entered = enter(services, &native());
            let status = if entered.is_ok() { act() } else { 99 };
            // SAFETY: it ends the copy.
            unsafe { libc::_exit(status) };
        });
        let pid = pid.expect("a process");
        let ended = waitpid(Some(pid), WaitOptions::empty());
        ended.expect("its end").expect("its end").1
    }

    fn error_of(result: i64) -> i32 {
        match result {
            0.. => 0,
            _ => std::io::Error::last_os_error().raw_os_error().unwrap_or(98),
        }
    }

    #[test]
    fn a_broker_without_programs_can_only_do_what_was_offered() {
        let path = c"/etc/passwd".as_ptr();
        let services = services(vec![(Service::Device("/dev/null".into()), None)]);
        for (what, attempt) in attempts() {
            let ended = fate(&services, || error_of(attempt(path)));
            assert_eq!(ended.terminating_signal(), Some(libc::SIGSYS), "{what}");
        }
    }

    /// Calls that nobody needs who starts no program.
    fn attempts() -> [Attempt; 10] {
        [
            // SAFETY: the arguments are a string and null pointers; nothing comes of it in the copy.
            ("execve", |path| unsafe {
                libc::syscall(libc::SYS_execve, path, 0, 0)
            }),
            // SAFETY: the copy of the copy ends at once.
            ("fork", |_| unsafe { libc::fork().into() }),
            ("inet", |_| {
                let made = socket(AddressFamily::INET, SocketType::STREAM, None);
                i64::from(made.is_err())
            }),
            // SAFETY: no pointers.
            ("kill", |_| unsafe { libc::kill(libc::getppid(), 0).into() }),
            // SAFETY: no pointers.
            ("ptrace", |_| unsafe {
                libc::syscall(libc::SYS_ptrace, 0, 0, 0, 0)
            }),
            // SAFETY: a new mapping takes no other's place.
            ("mmap", |_| unsafe {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_EXEC, flags, -1, 0) as i64
            }),
            // SAFETY: the strings are valid.
            ("mount", |path| unsafe {
                libc::syscall(libc::SYS_mount, path, path, 0, 0, 0)
            }),
            // SAFETY: no pointers.
            ("unshare", |_| unsafe {
                libc::syscall(libc::SYS_unshare, 0)
            }),
            // SAFETY: the string is valid.
            ("chmod", |path| unsafe {
                libc::syscall(libc::SYS_fchmodat, libc::AT_FDCWD, path, 0o644)
            }),
            // SAFETY: no pointers.
            ("ioctl", |_| unsafe { libc::ioctl(0, 0x5412).into() }),
        ]
    }

    #[test]
    fn by_landlock_it_reaches_the_files_that_were_offered_and_no_others() {
        if landlock::lack() == Some(landlock::Lack::All) {
            println!("skipped: this kernel has no Landlock");
            return;
        }
        let [folder, other] = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
        for folder in [&folder, &other] {
            File::create(folder.path().join("s")).expect("a file");
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let opened = openat(CWD, folder.path(), flags, Mode::empty()).expect("a folder");
        let file = FileId {
            device: 1,
            inode: 1,
        };
        let services = services(vec![
            (Service::Device("/dev/null".into()), None),
            (Service::Removal("s".into(), file), Some(opened)),
        ]);
        let open = |path: &str| {
            let flags = OFlags::RDWR | OFlags::CLOEXEC;
            fate(&services, || {
                match openat(CWD, path, flags, Mode::empty()) {
                    Ok(_) => 0,
                    Err(error) => error.raw_os_error(),
                }
            })
        };
        assert_eq!(open("/dev/null").exit_status(), Some(0));
        for path in ["/dev/zero", "/etc/passwd", "/proc/self/mem"] {
            assert_eq!(open(path).exit_status(), Some(libc::EACCES), "{path}");
        }
        let remove = |path: &Path| {
            fate(&services, || match rustix::fs::unlink(path) {
                Ok(()) => 0,
                Err(error) => error.raw_os_error(),
            })
        };
        let denied = remove(&other.path().join("s"));
        assert_ne!(denied.exit_status(), Some(0));
        assert!(other.path().join("s").exists());
    }

    #[test]
    fn a_broker_with_programs_gives_up_what_neither_does() {
        for gains_rights in [false, true] {
            let services = services(vec![(program(gains_rights), None)]);
            for call in NOBODYS {
                let ended = fate(&services, || {
                    // SAFETY: arguments of all ones are no valid pointers, descriptors or flags.
                    error_of(unsafe { libc::syscall(call, -1, -1, -1, -1, -1, -1) })
                });
                assert_eq!(ended.exit_status(), Some(libc::EPERM), "{call}");
            }
            let ended = fate(&services, || {
                let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
                let has_given_up = status.contains("NoNewPrivs:\t1");
                i32::from(has_given_up == gains_rights)
            });
            assert_eq!(ended.exit_status(), Some(0), "{gains_rights}");
            let runs = fate(&services, || {
                let (path, none) = (c"/bin/true".as_ptr(), std::ptr::null());
                let words = [path, none];
                // SAFETY: the lists end with a null pointer.
                unsafe { libc::execv(path, words.as_ptr()) }
            });
            assert_eq!(runs.exit_status(), Some(0), "{gains_rights}");
        }
    }
}
