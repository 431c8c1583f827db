//! What armlet may no longer do itself once it is confined: programs that work for a device (passt,
//! virtiofsd) are found here, started, heard and ended; devices are opened, and sockets connected to.
//!
//! A broker does it: a process that armlet forks before it has other threads, guest memory or
//! KVM objects. So a program gets the descriptors that are meant for it and no others, a clean
//! environment, no blocked or ignored signals, and a start costs no copy of armlet's page tables.
//! The broker is the reaper of all that they start in turn (`PR_SET_CHILD_SUBREAPER`), in other PID
//! namespaces too, and kills all of it when it is told to, or when armlet is gone in whatever way.
//!
//! What it does is named while devices are opened ([`Broker::offer`]), and nothing can be added once it
//! is sealed: who takes armlet over has the broker do only what the user's options mean.
//!
//! Between armlet and the broker is one socket for requests, and a line for each of them: the broker
//! says on it that the process started and how it ended, and kills the process when armlet closes it.
//! Each wait here has a deadline.

mod draft;
mod keeper;
mod protocol;
mod sys;
#[cfg(test)]
pub(crate) mod tests;

pub use draft::{DraftStep, Place};
pub use protocol::{FileId, SOCKET, Service};

use protocol::{MOST_DESCRIPTORS, MOST_REQUEST, MOST_SERVICES, Request, Word};

use anyhow::{Context, Result, bail};
use armlet_devices::sync::lock;
use armlet_snapshot::Id;
use armlet_system::deadline::Deadline;
use armlet_system::eintr::uninterrupted;
use armlet_system::messages;
use armlet_system::seccomp::Native;
use rustix::event::PollFlags;
use rustix::fs::{Access, OFlags, access};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType, recvmsg, sendmsg, shutdown,
    socketpair,
};
use rustix::process::{Pid, PidfdFlags, WaitOptions, pidfd_open, waitpid};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Where programs are that no folder of `$PATH` has.
const FOLDERS: [&str; 2] = ["/usr/local/bin", "/usr/bin"];
/// How long the broker may take for what needs nobody else.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long it may take for a step of a snapshot, which waits for a disk to have all of it.
const DRAFT_PATIENCE: Duration = Duration::from_secs(600);
/// How long a process may take to end once it is killed.
const DEATH: Duration = Duration::from_secs(2);
/// The most bytes of a path (PATH_MAX, include/uapi/linux/limits.h).
const MOST_PATH: usize = 4096;
/// The most bytes of what a process says that are taken at once, and how often in one go.
const MOST_WORDS: usize = 4096;
const MOST_READS: usize = 16;

/// Finds a program that this user may run: in a folder of `path` (`$PATH`), or in one of `folders`.
/// The path is absolute.
#[must_use]
pub fn find(name: &str, path: Option<&OsStr>, folders: &[&str]) -> Option<PathBuf> {
    let of_user = std::env::split_paths(path.unwrap_or_default());
    let mut places = of_user.chain(FOLDERS.iter().chain(folders).map(PathBuf::from));
    places.find_map(|folder| {
        let program = folder.join(name);
        // A relative folder would mean another one after a change of folder.
        let is_program =
            folder.is_absolute() && program.is_file() && access(&program, Access::EXEC_OK).is_ok();
        is_program.then_some(program)
    })
}

/// The process that starts others. When this is dropped, or armlet ends, all of them end.
#[derive(Debug)]
pub struct Broker {
    socket: OwnedFd,
    pid: Pid,
    offers: Mutex<Offers>,
}

#[derive(Debug, Default)]
struct Offers {
    count: u32,
    is_sealed: bool,
}

/// A service of a broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceId(u32);

impl Broker {
    /// Forks it. There are to be no other threads yet: one that holds a lock would hold it in the
    /// broker for ever. With `native` it confines itself once it is sealed.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn fork(native: Option<&Native>) -> Result<Arc<Broker>> {
        let cannot = "cannot make the process that starts others";
        let (ours, theirs) = pair().context(cannot)?;
        let pid = sys::fork(|| keeper::keep(theirs, native)).context(cannot)?;
        Ok(Arc::new(Broker {
            socket: ours,
            pid,
            offers: Mutex::default(),
        }))
    }

    /// Adds a service.
    ///
    /// # Errors
    /// A broker that is sealed; a command line that is too long; a folder of sockets that cannot be
    /// opened.
    pub fn offer(&self, mut service: Service) -> Result<ServiceId> {
        let mut folder = None;
        if let Service::Sockets(path) | Service::Removal(path, _) = &mut service {
            let (parent, name) = in_folder(path)?;
            folder = Some(parent);
            *path = name;
        }
        let request = Request::Offer(service).to_bytes();
        if request.len() > MOST_REQUEST {
            let length = request.len() - 1;
            let most = MOST_REQUEST - 1;
            bail!("its command line has {length} bytes; {most} are possible");
        }
        let mut offers = lock(&self.offers);
        if offers.is_sealed || offers.count as usize == MOST_SERVICES {
            bail!(
                "the broker does no more than the {} services it has",
                offers.count
            );
        }
        let descriptors: Vec<_> = folder.iter().collect();
        self.send(&request, &descriptors, Deadline::after(PATIENCE))?;
        offers.count += 1;
        Ok(ServiceId(offers.count - 1))
    }

    /// Has the socket that is at `path` now removed when the broker ends.
    ///
    /// # Errors
    /// As [`Self::offer`].
    pub fn offer_removal(&self, path: &Path) -> Result<()> {
        let Ok(found) = std::fs::symlink_metadata(path) else {
            return Ok(());
        };
        let file = FileId {
            device: found.dev(),
            inode: found.ino(),
        };
        self.offer(Service::Removal(path.to_owned(), file))
            .map(drop)
    }

    /// Lets nobody add a service any more.
    ///
    /// # Errors
    /// That the broker is gone.
    pub fn seal(&self) -> Result<()> {
        let mut offers = lock(&self.offers);
        offers.is_sealed = true;
        self.send(&Request::Seal.to_bytes(), &[], Deadline::after(PATIENCE))
    }

    /// Starts a program. It gets `socket` as descriptor [`SOCKET`]; without one it
    /// [listens](Service::Program), and the connection that it will accept is returned.
    ///
    /// # Errors
    /// That it cannot be run, in the system's words.
    pub fn start(
        self: &Arc<Broker>,
        program: ServiceId,
        socket: Option<OwnedFd>,
    ) -> Result<(Process, Option<OwnedFd>)> {
        let (line, far) = pair().context("cannot make a socket")?;
        let (words, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        rustix::fs::fcntl_setfl(&words, OFlags::RDONLY | OFlags::NONBLOCK)?;
        let deadline = Deadline::after(PATIENCE);
        let request = Request::Do(program.0, 0).to_bytes();
        let mut descriptors = vec![&far, &theirs];
        descriptors.extend(&socket);
        self.send(&request, &descriptors, deadline)?;
        // With them here, nobody would notice that they are closed there.
        drop((far, theirs, socket));
        let mut process = Process {
            line,
            pid: 0,
            words: Words::new(words),
            ended: None,
            _broker: Arc::clone(self),
        };
        let (word, connection) = process.hear(deadline);
        let (error, what) = match word {
            Some(Word::Done(pid)) => {
                process.pid = pid;
                return Ok((process, connection));
            }
            Some(Word::Failed(error)) => (error, None),
            Some(Word::NoSocket(error)) => (error, Some("cannot make a socket for it")),
            _ if process.ended.is_some() => bail!("{BROKER_GONE_OR_FULL}"),
            _ => bail!("it was not started within {PATIENCE:?}"),
        };
        process.ended = Some("it was never started".to_owned());
        let error = anyhow::Error::from(io::Error::from_raw_os_error(error));
        Err(match what {
            Some(what) => error.context(what),
            None => error,
        })
    }

    /// Opens a device, or connects to the socket of a port.
    ///
    /// # Errors
    /// What the system says to the broker; that the broker is gone.
    pub fn get(&self, service: ServiceId, port: u32) -> io::Result<OwnedFd> {
        self.descriptor(&Request::Do(service.0, port))
    }

    /// Opens the file at an absolute path, by a service for images.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn open(&self, service: ServiceId, path: &Path) -> io::Result<OwnedFd> {
        if path.as_os_str().len() > MOST_PATH {
            return Err(Errno::NAMETOOLONG.into());
        }
        self.descriptor(&Request::Open(service.0, path.to_owned()))
    }

    /// Begins a snapshot, by a service for these. Returns the file for its memory, or a pipe that says
    /// why there is none, and whether it is the file.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn draft(&self, service: ServiceId, id: Id, place: &Place) -> io::Result<(bool, File)> {
        let path = place.to_path(id);
        if path.as_os_str().len() > 2 * MOST_PATH {
            return Err(Errno::NAMETOOLONG.into());
        }
        self.answered(&Request::Open(service.0, path), DRAFT_PATIENCE)
            .map(|(kind, file)| (kind == 0, file.into()))
    }

    /// Goes on with the snapshot that was begun. Returns the file for its state, or as [`Self::draft`].
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn step(&self, service: ServiceId, step: DraftStep) -> io::Result<(bool, File)> {
        self.answered(&Request::Do(service.0, step as u32), DRAFT_PATIENCE)
            .map(|(kind, file)| (kind == 0, file.into()))
    }

    fn descriptor(&self, request: &Request) -> io::Result<OwnedFd> {
        self.answered(request, PATIENCE)
            .map(|(_, descriptor)| descriptor)
    }

    /// Sends a request, and waits for its answer: a number and a descriptor.
    fn answered(&self, request: &Request, patience: Duration) -> io::Result<(i32, OwnedFd)> {
        let other = |error: anyhow::Error| io::Error::other(format!("{error:#}"));
        let (line, far) = pair()?;
        let deadline = Deadline::after(patience);
        self.send(&request.to_bytes(), &[&far], deadline)
            .map_err(other)?;
        drop(far);
        match hear(&line, deadline) {
            Ok(Some((Word::Done(kind), Some(descriptor)))) => Ok((kind, descriptor)),
            Ok(Some((Word::Failed(error), _))) => Err(io::Error::from_raw_os_error(error)),
            Ok(None) => Err(io::Error::other(format!("no answer within {patience:?}"))),
            _ => Err(io::Error::other(BROKER_GONE_OR_FULL)),
        }
    }

    fn send(&self, request: &[u8], descriptors: &[&OwnedFd], deadline: Deadline) -> Result<()> {
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            let message = [IoSlice::new(request)];
            match uninterrupted(|| sendmsg(&self.socket, &message, &mut control, flags)) {
                Ok(_) => return Ok(()),
                Err(Errno::AGAIN) if deadline.wait(&self.socket, PollFlags::OUT)? => {}
                Err(Errno::AGAIN) => bail!("the broker took no request within {PATIENCE:?}"),
                Err(Errno::PIPE | Errno::CONNRESET) => bail!("{BROKER_GONE}"),
                Err(error) => return Err(error).context("cannot ask the broker"),
            }
        }
    }
}

const BROKER_GONE: &str = "armlet's process that starts others is gone";
const BROKER_GONE_OR_FULL: &str =
    "armlet's process that starts others is gone, or has no descriptor left ('ulimit -n')";

/// The folder of a path, and the name in it.
fn in_folder(path: &Path) -> Result<(OwnedFd, PathBuf)> {
    let shown = path.display();
    let name = path.file_name();
    let name = name.with_context(|| format!("{shown} is no name of a socket"))?;
    let parent = path.parent().filter(|parent| *parent != Path::new(""));
    let parent = parent.unwrap_or(Path::new("."));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(parent, flags, rustix::fs::Mode::empty());
    let folder = folder.with_context(|| format!("cannot open the folder of {shown}"))?;
    Ok((folder, name.into()))
}

/// What the broker says on a line by `deadline`: `None` if that is nothing.
///
/// # Errors
/// That it says no more.
fn hear(line: &OwnedFd, deadline: Deadline) -> Result<Option<(Word, Option<OwnedFd>)>, Errno> {
    let mut bytes = [0; Word::BYTES];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = uninterrupted(|| {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            recvmsg(line, &mut parts, &mut control, flags)
        });
        match received {
            Ok(got) if got.bytes == Word::BYTES => {
                let descriptor = control.drain().find_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
                    _ => None,
                });
                let word = Word::from_bytes(bytes).ok_or(Errno::PROTO)?;
                return Ok(Some((word, descriptor)));
            }
            Err(Errno::AGAIN) => match deadline.wait(line, PollFlags::IN) {
                Ok(true) => {}
                _ => return Ok(None),
            },
            _ => return Err(Errno::PIPE),
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // It ends all that is left when it sees that.
        let _ = shutdown(&self.socket, Shutdown::Both);
        let pidfd = pidfd_open(self.pid, PidfdFlags::empty());
        let has_ended = pidfd.is_ok_and(|pidfd| {
            matches!(
                Deadline::after(PATIENCE).wait(pidfd, PollFlags::IN),
                Ok(true)
            )
        });
        if has_ended {
            let _ = waitpid(Some(self.pid), WaitOptions::NOHANG);
        } else {
            log::error!("processes that worked for devices have not ended within {PATIENCE:?}");
        }
    }
}

fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = SocketFlags::CLOEXEC;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

/// A program that was started. When this is dropped it has ended, with all that it started, or a
/// message says that it has not.
#[derive(Debug)]
pub struct Process {
    line: OwnedFd,
    pid: i32,
    words: Words,
    /// How it ended.
    ended: Option<String>,
    _broker: Arc<Broker>,
}

impl Process {
    /// Its process ID.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// What it says on its standard error.
    pub fn words(&mut self) -> &mut Words {
        &mut self.words
    }

    /// The descriptor that is ready to be read when it has ended.
    #[must_use]
    pub fn end_fd(&self) -> RawFd {
        self.line.as_raw_fd()
    }

    /// The descriptor that is ready to be read when it said something or closed its standard error.
    #[must_use]
    pub fn words_fd(&self) -> RawFd {
        self.words.pipe.as_raw_fd()
    }

    /// How it ended, if it has by `deadline`.
    pub fn ended(&mut self, deadline: Deadline) -> Option<&str> {
        if self.ended.is_none()
            && let Some(Word::Ended(status)) = self.hear(deadline).0
        {
            self.ended = Some(ExitStatus::from_raw(status).to_string());
        }
        self.ended.as_deref()
    }

    /// Ends it and all that it started, in whatever state it is, unless it ends by itself within
    /// `grace`. Says how it ended.
    pub fn end(&mut self, grace: Duration) -> String {
        if self.ended(Deadline::after(grace)).is_none() {
            self.kill();
        }
        let ended = self.ended(Deadline::after(DEATH));
        ended.map_or_else(|| "it does not end".to_owned(), str::to_owned)
    }

    /// Has it killed, and does not wait for that.
    pub fn kill(&self) {
        // An error means that the broker is gone, or knows of its end.
        let _ = shutdown(&self.line, Shutdown::Write);
    }

    /// What the broker says of it by `deadline`.
    fn hear(&mut self, deadline: Deadline) -> (Option<Word>, Option<OwnedFd>) {
        match hear(&self.line, deadline) {
            Ok(Some((word, descriptor))) => (Some(word), descriptor),
            Ok(None) => (None, None),
            Err(_) => {
                self.ended = Some(BROKER_GONE.to_owned());
                (None, None)
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end(Duration::ZERO);
        if self.ended.is_none() {
            let pid = self.pid;
            log::error!("process {pid} does not end within {DEATH:?} although it was killed");
        }
    }
}

/// What a process says on its standard error, in lines.
#[derive(Debug)]
pub struct Words {
    pipe: OwnedFd,
    /// What it said last, as far as it is no whole line.
    rest: Vec<u8>,
}

impl Words {
    fn new(pipe: OwnedFd) -> Words {
        let rest = Vec::new();
        Words { pipe, rest }
    }

    /// Whole lines out of what can be read now, made harmless, and up to a bound: for one who
    /// writes faster than it is read.
    pub fn hear(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut part = [0; MOST_WORDS];
        for _ in 0..MOST_READS {
            match uninterrupted(|| rustix::io::read(&self.pipe, &mut part)) {
                Ok(len @ 1..) => {
                    self.rest.extend(&part[..len]);
                    self.take_lines(&mut lines);
                }
                _ => break,
            }
        }
        lines
    }

    /// As [`Self::hear`], and what is no whole line, of one who says no more.
    pub fn hear_all(&mut self) -> Vec<String> {
        let mut lines = self.hear();
        self.rest.push(b'\n');
        self.take_lines(&mut lines);
        lines
    }

    fn take_lines(&mut self, lines: &mut Vec<String>) {
        let whole: Vec<u8> = match self.rest.iter().rposition(|byte| *byte == b'\n') {
            Some(end) => self.rest.drain(..=end).collect(),
            None if self.rest.len() >= MOST_WORDS => std::mem::take(&mut self.rest),
            None => return,
        };
        lines.extend(messages::lines(&whole));
    }
}
