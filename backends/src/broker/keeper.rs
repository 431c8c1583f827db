//! The broker itself: starts processes, notes their ends, and leaves none behind.

mod confine;
mod drafts;
mod services;

use super::protocol::{MOST_DESCRIPTORS, MOST_REQUEST, Request, SOCKET, Word};
use super::sys;
use armlet_system::deadline::Deadline;
use armlet_system::eintr::uninterrupted;
use armlet_system::seccomp::Native;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, getpgid, getpid, kill_process, kill_process_group,
    pidfd_open, set_child_subreaper, setsid, waitpgid, waitpid,
};
use services::{Known, Services};
use std::ffi::OsString;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// How long processes that were killed may take to be gone, before the broker goes on without.
const DEATH: Duration = Duration::from_secs(5);
/// The pauses between two looks at processes that are dying: the first, and the longest.
const FIRST_LOOK: Duration = Duration::from_micros(200);
const LONGEST_LOOK: Duration = Duration::from_millis(20);

/// A process that was started; it leads a process group of its own.
struct Kept {
    pid: Pid,
    pidfd: OwnedFd,
    line: OwnedFd,
}

/// Does what it is asked for on `socket`, until that is closed; then ends all that it started.
/// It is confined when it is sealed, if it is told how system calls are made here.
pub(super) fn keep(socket: OwnedFd, native: Option<&Native>) {
    let Ok(socket) = settle(socket) else {
        return;
    };
    let mut services = Services::default();
    let mut kept = Vec::new();
    // Which one's turn it is does not matter: each event is still there at the next look.
    while let Some(event) = wait(&socket, &kept) {
        match event {
            Event::Request => match receive(&socket) {
                Asked::For(Request::Seal, _) => {
                    services.seal();
                    if let Some(native) = native
                        && confine::enter(&services, native).is_err()
                    {
                        // Who asks for something hears that nobody is here.
                        break;
                    }
                }
                Asked::For(request, descriptors) => {
                    kept.extend(serve(&mut services, request, descriptors));
                }
                // Its line is closed with it, which armlet notices.
                Asked::Unreadable => {}
                Asked::Nothing => break,
            },
            Event::Over(index) => {
                end(&kept.swap_remove(index));
                end_strays(&kept);
            }
        }
    }
    services.remove_sockets();
    for process in kept.drain(..) {
        end(&process);
    }
    if services.has_programs() {
        end_strays(&kept);
    }
}

/// Lets go of all that armlet had.
fn settle(socket: OwnedFd) -> std::io::Result<OwnedFd> {
    sys::ignore_signals();
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    drop(null);
    // The number that is given to programs is then free in them to be taken.
    let socket = sys::keep_only(socket, SOCKET)?;
    setsid()?;
    set_child_subreaper(Some(getpid()))?;
    // For ps(1) and top(1).
    let _ = rustix::thread::set_name(c"armlet-broker");
    std::env::set_current_dir("/")?;
    Ok(socket)
}

enum Event {
    /// armlet asks for something, or is gone.
    Request,
    /// This one ended, or is to end.
    Over(usize),
}

/// Waits for the next event; `None` if that cannot be done.
fn wait(socket: &OwnedFd, kept: &[Kept]) -> Option<Event> {
    let mut fds = vec![PollFd::new(socket, PollFlags::IN)];
    for process in kept {
        fds.push(PollFd::new(&process.pidfd, PollFlags::IN));
        fds.push(PollFd::new(&process.line, PollFlags::IN));
    }
    uninterrupted(|| poll(&mut fds, None)).ok()?;
    let ready = fds.iter().position(|fd| !fd.revents().is_empty())?;
    Some(match ready {
        0 => Event::Request,
        index => Event::Over((index - 1) / 2),
    })
}

/// What came on the socket for requests.
enum Asked {
    /// A request and the descriptors that came with it.
    For(Request, Vec<OwnedFd>),
    /// None that is understood, or one whose descriptors there was no room for.
    Unreadable,
    /// armlet is gone.
    Nothing,
}

fn receive(socket: &OwnedFd) -> Asked {
    let mut words = vec![0; MOST_REQUEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = uninterrupted(|| {
        let mut parts = [IoSliceMut::new(&mut words)];
        recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
    });
    let Some(got) = received.ok().filter(|got| got.bytes > 0) else {
        return Asked::Nothing;
    };
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            files.extend(rights);
        }
    }
    if got
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Asked::Unreadable;
    }
    match Request::from_bytes(&words[..got.bytes]) {
        Some(request) => Asked::For(request, files),
        None => Asked::Unreadable,
    }
}

/// Carries a request out, and says so on its line. Returns the process that it started.
fn serve(services: &mut Services, request: Request, descriptors: Vec<OwnedFd>) -> Option<Kept> {
    let mut descriptors = descriptors.into_iter();
    let (index, port) = match request {
        Request::Offer(service) => {
            services.add(service, descriptors.next());
            return None;
        }
        Request::Seal => return None,
        Request::Open(index, path) => {
            let line = descriptors.next()?;
            match services.get(index) {
                Some(Known::Snapshots(drafts)) => answer_draft(&line, drafts.create(&path)),
                Some(known) => answer(&line, known.open(&path)),
                None => answer(&line, Err(Errno::NOENT.into())),
            }
            return None;
        }
        Request::Do(index, port) => (index, port),
    };
    let line = descriptors.next()?;
    let done = match services.get(index) {
        Some(Known::Program {
            path,
            arguments,
            listens,
            gains_rights,
        }) => {
            let standard_error = descriptors.next()?;
            let (socket, connection) = match listens {
                true => match services::listening_socket() {
                    Ok((listener, connection)) => (listener, Some(connection)),
                    Err(error) => {
                        tell(&line, Word::NoSocket(errno(&error)), None);
                        return None;
                    }
                },
                false => (descriptors.next()?, None),
            };
            match start(path, arguments, standard_error, socket, *gains_rights) {
                Ok((pid, pidfd)) => {
                    tell(&line, Word::Done(pid.as_raw_pid()), connection.as_ref());
                    return Some(Kept { pid, pidfd, line });
                }
                Err(error) => Err(error),
            }
        }
        Some(Known::Snapshots(drafts)) => {
            answer_draft(&line, drafts.step(port));
            return None;
        }
        Some(known) => known.get(port),
        None => Err(Errno::NOENT.into()),
    };
    answer(&line, done);
    None
}

/// Hands a descriptor over, or says why not.
fn answer(line: &OwnedFd, done: io::Result<OwnedFd>) {
    match done {
        Ok(descriptor) => tell(line, Word::Done(0), Some(&descriptor)),
        Err(error) => tell(line, Word::Failed(errno(&error)), None),
    }
}

/// Hands a file of a snapshot over, or a pipe that says why there is none.
fn answer_draft(line: &OwnedFd, done: io::Result<(bool, OwnedFd)>) {
    match done {
        Ok((is_file, descriptor)) => {
            tell(line, Word::Done(i32::from(!is_file)), Some(&descriptor));
        }
        Err(error) => answer(line, Err(error)),
    }
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// Starts a program.
fn start(
    program: &Path,
    arguments: &[OsString],
    standard_error: OwnedFd,
    socket: OwnedFd,
    gains_rights: bool,
) -> io::Result<(Pid, OwnedFd)> {
    let mut command = Command::new(program);
    let path = std::env::var_os("PATH");
    command
        .args(arguments)
        .env_clear()
        .envs(path.map(|path| ("PATH", path)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::from(standard_error));
    sys::prepare(&mut command, socket, SOCKET, gains_rights);
    let spawned = command.spawn();
    // With it go the descriptors that are the process's now.
    drop(command);
    let child = spawned?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(Errno::SRCH)?;
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => Ok((pid, pidfd)),
        Err(error) => {
            end_group(pid);
            Err(error.into())
        }
    }
}

fn tell(line: &OwnedFd, word: Word, descriptor: Option<&OwnedFd>) {
    let descriptors: Vec<_> = descriptor.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    // A line takes a few words at any time. Where nobody hears it, nobody wants to know.
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let _ = sendmsg(line, &[IoSlice::new(&word.to_bytes())], &mut control, flags);
}

/// Ends a process and its group, and says how it ended once they are gone.
fn end(process: &Kept) {
    if let Some(status) = end_group(process.pid) {
        tell(&process.line, Word::Ended(status), None);
    }
}

/// Kills a process group and waits for its members; returns the leader's status, unless some are
/// still there at the deadline.
fn end_group(leader: Pid) -> Option<i32> {
    // Once is enough: a fork that is under way begins anew and finds the signal. The leader is not
    // reaped yet, so the number is its group's still.
    let _ = kill_process_group(leader, Signal::KILL);
    let deadline = Deadline::after(DEATH);
    let mut pause = FIRST_LOOK;
    let mut status = None;
    loop {
        match uninterrupted(|| waitpgid(leader, WaitOptions::NOHANG)) {
            Ok(Some((pid, how))) => {
                if pid == leader {
                    status = Some(how.as_raw());
                }
            }
            // A member that is nobody's child here has a parent that is dying, too.
            Ok(None) if !deadline.left().is_zero() => {
                std::thread::sleep(pause);
                pause = (2 * pause).min(LONGEST_LOOK);
            }
            Ok(None) => return None,
            Err(_) => return status,
        }
    }
}

/// Ends what left its group, and whose parent has ended, so that it became ours: whose work it does
/// nobody can tell any more. None of `kept` is meant.
fn end_strays(kept: &[Kept]) {
    let deadline = Deadline::after(DEATH);
    let mut pause = FIRST_LOOK;
    loop {
        let strays: Vec<Pid> = children()
            .into_iter()
            .filter(|pid| !kept.iter().any(|process| process.pid == *pid))
            .filter(|pid| {
                let group = getpgid(Some(*pid)).ok();
                !kept.iter().any(|process| Some(process.pid) == group)
            })
            .collect();
        if strays.is_empty() || deadline.left().is_zero() {
            return;
        }
        for stray in strays {
            // It is ours to reap, so the number is its own.
            let _ = kill_process(stray, Signal::KILL);
            let _ = waitpid(Some(stray), WaitOptions::NOHANG);
        }
        std::thread::sleep(pause);
        pause = (2 * pause).min(LONGEST_LOOK);
    }
}

/// The children of this process, of which some may have ended (proc(5): needs
/// CONFIG_PROC_CHILDREN, which distributions' kernels have).
fn children() -> Vec<Pid> {
    let path = "/proc/thread-self/children";
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let numbers = text.split_whitespace().filter_map(|word| word.parse().ok());
    numbers.filter_map(Pid::from_raw).collect()
}
