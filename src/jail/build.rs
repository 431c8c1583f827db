//! Makes a jail, and becomes the program in it.
//!
//! What is outside of the jail is opened before its folder becomes the root; everything in it is made
//! after that, when a symbolic link that an earlier program left there cannot lead out of it.

use super::cgroup::Step;
use super::request::{DEVICES, FACTS, FOLDERS, Request};
use super::sys::{fork, leads_session, leave, microseconds, unshare};
use anyhow::{Context as _, Result, anyhow};
use armlet_system::files;
use rustix::fs::{CWD, FileType, Mode, OFlags, chown, makedev, mknodat, open, sendfile};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::mount::{mount_bind_recursive, mount_change, mount_remount, unmount};
use rustix::process::{Pid, Resource, Rlimit, getpid, pivot_root, setrlimit, setsid};
use rustix::thread::{CapabilitySet, LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use std::convert::Infallible;
use std::fmt::Display;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The permissions of a program's folders and devices, of its copy, and of files about the host.
const OWNERS_FOLDER: Mode = Mode::from_raw_mode(0o700);
const OWNERS_FILE: Mode = Mode::from_raw_mode(0o600);
const PROGRAM: Mode = Mode::from_raw_mode(0o755);
const READABLE: Mode = Mode::from_raw_mode(0o644);
/// The most bytes that one call copies (sendfile(2)).
const MOST_COPIED: usize = 0x7fff_f000;

/// Adds to an error which act on which thing it is of.
fn cannot<T, E: Into<anyhow::Error>>(
    act: &str,
    on: impl Display,
    result: Result<T, E>,
) -> Result<T> {
    result.map_err(|error| failed(error.into(), act, &on))
}

#[cold]
#[inline(never)]
fn failed(error: anyhow::Error, act: &str, on: &dyn Display) -> anyhow::Error {
    error.context(format!("cannot {act} {on}"))
}

/// Makes a folder and those that it is in, unless they are there.
fn make_folders(path: &Path) -> Result<()> {
    let mut made = PathBuf::new();
    for part in path {
        made.push(part);
        let result = match rustix::fs::mkdir(&made, Mode::from_raw_mode(0o777)) {
            Err(Errno::EXIST) => Ok(()),
            result => result,
        };
        cannot("make", made.display(), result)?;
    }
    Ok(())
}

/// Makes the jail and becomes the program.
///
/// # Errors
/// What the system refuses, with what it was for.
pub(super) fn build(request: &Request) -> Result<Infallible> {
    let began = microseconds(libc::CLOCK_MONOTONIC);
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let root = request.root.display();
    make_folders(&request.root)?;
    let (program, _) = cannot(
        "open",
        request.program.display(),
        files::open_regular(&request.program),
    )?;
    if let Some(path) = &request.network {
        cannot("join network namespace", path.display(), join(path))?;
    }
    for step in &request.groups {
        take(step)?;
    }
    let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let null = cannot("open", "/dev/null", null)?;
    let devices = DEVICES.map(|(path, number)| number.or_else(|| host_number(path)));
    let facts = facts();

    cannot("make", format!("{root} the root"), enter(&request.root))?;
    furnish(request, program, devices, &facts).with_context(|| format!("in {root}"))?;

    if !request.daemonize {
        return start(request, began, None);
    }
    // It is closed when the program begins, and has a message if that fails.
    let (news, teller) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    if fork()?.is_some() {
        drop(teller);
        let mut message = String::new();
        // This lasts until the program has begun, or its process ended.
        std::fs::File::from(news).read_to_string(&mut message)?;
        if message.is_empty() {
            leave(0);
        }
        return Err(anyhow!(message));
    }
    let Err(error) = start_in_background(request, began, &null);
    let _ = std::fs::File::from(teller).write_all(format!("{error:#}").as_bytes());
    leave(1);
}

/// Starts the program without a terminal, in a session that it does not lead, so that it never gets
/// one.
fn start_in_background(request: &Request, began: i64, null: &OwnedFd) -> Result<Infallible> {
    setsid()?;
    if fork()?.is_some() {
        leave(0);
    }
    start(request, began, Some(null))
}

/// Writes the file with the program's process ID, gives up root's rights and becomes the program.
fn start(request: &Request, began: i64, null: Option<&OwnedFd>) -> Result<Infallible> {
    if request.new_pid_namespace {
        // The end of a session's leader, which this process may be, would end the program.
        let is_leader = leads_session();
        let made = unshare(UnshareFlags::NEWPID);
        cannot("make", "a PID namespace", made)?;
        if let Some(pid) = fork()? {
            write_pid(request, pid)?;
            leave(0);
        }
        if is_leader {
            setsid()?;
        }
    } else {
        write_pid(request, getpid())?;
    }
    if let Some(null) = null {
        rustix::stdio::dup2_stdin(null)?;
        rustix::stdio::dup2_stdout(null)?;
        rustix::stdio::dup2_stderr(null)?;
    }
    // Nothing is written after that: the copy of the program may be larger than what it may write.
    limit(Resource::Fsize, request.file_size)?;
    limit(Resource::Nofile, Some(request.descriptors))?;
    cannot("give up", "root's rights", give_up_rights(request.owner))?;
    let path = format!("/{}", request.name);
    let mut command = Command::new(&path);
    if let Some(id) = &request.id {
        let used = microseconds(libc::CLOCK_PROCESS_CPUTIME_ID);
        command.args(["--id", id]);
        for (option, time) in [
            ("--start-time-us", began),
            ("--start-time-cpu-us", used),
            ("--parent-cpu-time-us", used),
        ] {
            command.args([option, &time.to_string()]);
        }
    }
    let error = command.args(&request.arguments).env_clear().exec();
    let hint = match error.kind() {
        std::io::ErrorKind::NotFound => "; a program in a jail has to be linked statically",
        _ => "",
    };
    Err(anyhow!("cannot start {path} in the jail: {error}{hint}"))
}

fn join(path: &Path) -> Result<(), Errno> {
    // Not to wait for the other end of a FIFO.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let namespace = open(path, flags, Mode::empty())?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
}

fn limit(resource: Resource, most: Option<u64>) -> Result<()> {
    let limits = Rlimit {
        current: most,
        maximum: most,
    };
    let made = most.map_or(Ok(()), |_| setrlimit(resource, limits));
    cannot("limit", format!("{resource:?} to {most:?}"), made)
}

/// Takes a step with a control group.
fn take(step: &Step) -> Result<()> {
    match step {
        Step::Make(group) => make_folders(group),
        Step::Write(file, value) => set(file, value),
        Step::Inherit(file) => {
            let read = |file: &Path| {
                let text = std::fs::read_to_string(file);
                cannot("read", file.display(), text)
            };
            if !read(file)?.trim().is_empty() {
                return Ok(());
            }
            let above = file.ancestors().nth(2).zip(file.file_name());
            let (folder, name) = above.context("a control group has one above it")?;
            set(file, read(&folder.join(name))?.trim())
        }
        Step::Enter(group) => set(&group.join("cgroup.procs"), "0"),
        Step::EnterExisting(group) => match group.is_dir() {
            true => set(&group.join("cgroup.procs"), "0"),
            false => Ok(()),
        },
    }
}

/// Writes to a file of a control group.
fn set(file: &Path, value: &str) -> Result<()> {
    let written = open(file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|file| rustix::io::write(&file, value.as_bytes()));
    cannot(&format!("write '{value}' to"), file.display(), written).map(|_| ())
}

/// Returns the number of one of the host's devices, if it is there.
fn host_number(path: &str) -> Option<(u32, u32)> {
    let found = std::fs::symlink_metadata(path).ok()?;
    let is_device = FileType::from_raw_mode(found.mode()) == FileType::CharacterDevice;
    let number = found.rdev();
    is_device.then(|| (rustix::fs::major(number), rustix::fs::minor(number)))
}

/// A file's path below the root, and its contents.
type Fact = (String, Vec<u8>);

/// Reads what the program may want to know of the host's CPUs.
fn facts() -> Vec<Fact> {
    let mut facts = Vec::new();
    for pattern in FACTS {
        for path in matching(pattern) {
            // Kinds of devices have different files.
            if let Ok(bytes) = std::fs::read(&path) {
                facts.push((path, bytes));
            }
        }
        if facts.is_empty() {
            break;
        }
    }
    facts
}

/// Returns the absolute paths that `pattern` may stand for.
fn matching(pattern: &str) -> Vec<String> {
    let pattern = format!("/{pattern}");
    let Some((before, after)) = pattern.split_once('*') else {
        return vec![pattern];
    };
    let (folder, begin) = before.rsplit_once('/').unwrap_or_default();
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let names = names.filter(|name| name.starts_with(begin));
    names
        .map(|name| format!("{folder}/{name}{after}"))
        .collect()
}

/// Makes a folder the root of a mount namespace in which nothing else is.
fn enter(root: &Path) -> std::io::Result<()> {
    unshare(UnshareFlags::NEWNS)?;
    let everything = MountPropagationFlags::REC;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | everything)?;
    // pivot_root(2) takes mount points only.
    mount_bind_recursive(root, root)?;
    std::env::set_current_dir(root)?;
    // Devices and programs have to work where the folder's file system is mounted without.
    mount_remount(".", MountFlags::BIND | MountFlags::NOSUID, "")?;
    // The old root comes to lie over the new one, and is taken away (pivot_root(2), "NOTES").
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    std::env::set_current_dir("/")
}

/// Makes what is in the jail.
fn furnish(
    request: &Request,
    program: impl AsFd,
    devices: [Option<(u32, u32)>; DEVICES.len()],
    facts: &[Fact],
) -> Result<()> {
    let (user, group) = request.owner;
    let own = |path: &str| {
        let user = rustix::process::Uid::from_raw(user);
        let group = rustix::process::Gid::from_raw(group);
        chown(path, Some(user), Some(group))
    };
    for folder in FOLDERS {
        let made = match rustix::fs::mkdir(folder, OWNERS_FOLDER) {
            Err(Errno::EXIST) => rustix::fs::chmod(folder, OWNERS_FOLDER),
            made => made,
        };
        cannot("make", folder, made.and_then(|()| own(folder)))?;
    }
    let copy = create(&format!("/{}", request.name), PROGRAM)?;
    while cannot(
        "copy",
        &request.name,
        sendfile(&copy, &program, None, MOST_COPIED),
    )? > 0
    {}
    for ((path, _), number) in DEVICES.iter().zip(devices) {
        let Some((major, minor)) = number else {
            continue;
        };
        let number = makedev(major, minor);
        let made = mknodat(CWD, *path, FileType::CharacterDevice, OWNERS_FILE, number);
        cannot("make", path, made.and_then(|()| own(path)))?;
    }
    for (path, bytes) in facts {
        let folder = Path::new(path).parent().unwrap_or(Path::new("/"));
        make_folders(folder)?;
        let file = create(path, READABLE)?;
        cannot("write", path, rustix::io::write(&file, bytes))?;
    }
    Ok(())
}

/// Creates a file that was not there.
fn create(path: &str, mode: Mode) -> Result<OwnedFd> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let made = open(path, flags, mode);
    let hint = match made {
        Err(Errno::EXIST) => ", which an earlier jail of this ID left; remove its folder first",
        _ => "",
    };
    cannot("create", format!("{path}{hint}"), made)
}

fn write_pid(request: &Request, pid: Pid) -> Result<()> {
    let path = format!("/{}.pid", request.name);
    let file = create(&path, READABLE)?;
    let digits = pid.as_raw_pid().to_string();
    let written = rustix::io::write(&file, digits.as_bytes());
    cannot("write", path, written).map(|_| ())
}

/// Becomes the jail's user, with no groups but its own, and with no way to more rights.
fn give_up_rights((user, group): (u32, u32)) -> Result<(), Errno> {
    let user = rustix::process::Uid::from_raw(user);
    if !user.is_root() {
        for bit in 0..64 {
            let capability = CapabilitySet::from_bits_retain(1 << bit);
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                // The kernel has no more.
                Err(Errno::INVAL) => break,
                removed => removed?,
            }
        }
    }
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_gid(rustix::process::Gid::from_raw(group))?;
    rustix::thread::set_thread_uid(user)?;
    rustix::thread::set_no_new_privs(true)
}
