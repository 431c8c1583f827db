//! A virtiofsd: where it is, how it is started, what it says, and how it ends.

use super::{Cache, Sandbox, ShareOptions};
use crate::eintr::uninterrupted;
use crate::messages;
use crate::virtio::deadline::Deadline;
use crate::virtio::vhost_user::VhostUser;
use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder};
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};

/// Its name.
const PROGRAM: &str = "virtiofsd";
/// Where distributions put it, outside everyone's PATH; the last one had QEMU's, up to version
/// 7.2, which takes other options.
const FOLDERS: [&str; 3] = ["/usr/libexec", "/usr/lib", "/usr/lib/qemu"];

/// How long it may take to end when its connection closed, and again when it was killed.
const FAREWELL: Timespec = Timespec {
    tv_sec: 2,
    tv_nsec: 0,
};
/// The most bytes of what it says that are taken at once, and how often in one go.
const MOST_WORDS: usize = 4096;
const MOST_READS: usize = 16;

/// Features that the transport offers to every driver (VERSION_1, INDIRECT_DESC, EVENT_IDX).
const WANTED_FEATURES: u64 = armlet_devices::virtio::FEATURE_VERSION_1
    | armlet_devices::virtio::FEATURE_INDIRECT
    | armlet_devices::virtio::FEATURE_EVENT_IDX;
/// Its queues: one before all others, and one for requests.
const QUEUES: u64 = 1 + super::REQUESTS as u64;

/// The program: in a folder of `path` ($PATH) or where distributions put it.
///
/// # Errors
/// None, with the package that has it.
pub(super) fn find(path: Option<&OsStr>) -> Result<PathBuf> {
    let folders = std::env::split_paths(path.unwrap_or_default());
    let mut places = folders.chain(FOLDERS.map(PathBuf::from));
    let found = places.find_map(|folder| {
        let program = folder.join(PROGRAM);
        // A relative folder would mean another one after a change of folder.
        (folder.is_absolute() && program.is_file()).then_some(program)
    });
    found.with_context(|| {
        format!(
            "--share needs {PROGRAM}, which is neither in PATH nor in {}; the package {PROGRAM} \
             has it (Debian 12: qemu-system-common)",
            FOLDERS.join(", ")
        )
    })
}

/// How to start it.
#[derive(Debug)]
pub(super) struct Launch {
    program: PathBuf,
    arguments: Vec<OsString>,
    sandbox: Sandbox,
}

impl Launch {
    /// For a folder, with the user's options.
    ///
    /// # Errors
    /// What QEMU's does not know.
    pub(super) fn new(program: PathBuf, options: &ShareOptions, folder: PathBuf) -> Result<Launch> {
        let arguments = match program.ends_with("qemu/virtiofsd") {
            true => qemus_arguments(options, &folder)?,
            false => arguments(options, folder),
        };
        Ok(Launch {
            program,
            arguments,
            sandbox: options.sandbox,
        })
    }

    /// Starts one and makes acquaintance with it, for the device called `name`.
    ///
    /// # Errors
    /// That it cannot be started, or ended; with what it said and what would work.
    pub(super) fn start(&self, name: &str, deadline: Deadline) -> Result<Daemon> {
        let (listener, stream) = socket_pair().context("cannot make a socket for virtiofsd")?;
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Control-C at the terminal is for armlet; this one is needed until the guest is down.
            .process_group(0);
        let child = command.spawn();
        // Our end of the listening socket with it: who waits for one who listens no more hears so.
        drop(command);
        let shown = self.program.display();
        let mut child = child.with_context(|| format!("cannot start {shown}"))?;
        let mut words = Words::new(child.stderr.take())?;
        let connected = VhostUser::connect(stream, deadline);
        let failed = match connected {
            Ok(connection) => {
                let daemon = Daemon {
                    name: name.to_owned(),
                    child,
                    connection,
                    words,
                };
                return daemon
                    .check()
                    .with_context(|| format!("cannot use {shown}"));
            }
            Err(error) => error,
        };
        // It may have said why, and will say no more.
        let by_itself = wait(&child);
        kill(&child);
        wait(&child);
        let ended = child.try_wait().ok().flatten();
        let said = words.hear_all().join("; ");
        let why = match (said.is_empty(), ended) {
            (false, _) => anyhow!("{said}"),
            (true, Some(status)) if by_itself => anyhow!("it ended at once ({status})"),
            (true, _) => failed,
        };
        Err(why.context(format!("cannot start {shown}{}", self.advice(&said))))
    }

    /// What may help, by what it said.
    fn advice(&self, said: &str) -> &'static str {
        let said = said.to_lowercase();
        let of = |words: [&str; 3]| words.iter().any(|word| said.contains(word));
        match self.sandbox {
            Sandbox::Namespace if of(["sandbox", "unshare", "namespace"]) => {
                " (sandbox=none, or chroot as root, needs no namespaces)"
            }
            Sandbox::Chroot if of(["sandbox", "chroot", "root"]) => {
                " (sandbox=none needs no rights)"
            }
            _ if said.contains("readonly") => " (readonly needs virtiofsd 1.13)",
            _ => "",
        }
    }
}

fn arguments(options: &ShareOptions, folder: PathBuf) -> Vec<OsString> {
    let sandbox = match options.sandbox {
        Sandbox::Namespace => "namespace",
        Sandbox::Chroot => "chroot",
        Sandbox::None => "none",
    };
    let cache = match options.cache {
        Cache::Auto => "auto",
        Cache::Always => "always",
        Cache::Never => "never",
        Cache::Metadata => "metadata",
    };
    let mut arguments: Vec<OsString> = ["--fd", "0", "--log-level", "error"].map(Into::into).into();
    arguments.extend(["--sandbox", sandbox, "--cache", cache].map(Into::into));
    if options.xattr {
        arguments.push("--xattr".into());
    }
    if options.readonly {
        arguments.push("--readonly".into());
    }
    arguments.push("--shared-dir".into());
    arguments.push(folder.into());
    arguments
}

/// For the one that came with QEMU (its docs/tools/virtiofsd.rst of version 7.2).
fn qemus_arguments(options: &ShareOptions, folder: &Path) -> Result<Vec<OsString>> {
    let other = "take another virtiofsd: the package virtiofsd has it";
    let sandbox = match options.sandbox {
        Sandbox::Namespace => "sandbox=namespace",
        Sandbox::Chroot => "sandbox=chroot",
        Sandbox::None => bail!("QEMU's virtiofsd has no sandbox=none; {other}"),
    };
    let cache = match options.cache {
        Cache::Auto => "cache=auto",
        Cache::Always => "cache=always",
        Cache::Never => "cache=none",
        Cache::Metadata => bail!("QEMU's virtiofsd has no cache=metadata; {other}"),
    };
    if options.readonly {
        bail!("QEMU's virtiofsd has no readonly; {other}");
    }
    let mut source = b"source=".to_vec();
    for byte in folder.as_os_str().as_bytes() {
        if b",\\".contains(byte) {
            source.push(b'\\');
        }
        source.push(*byte);
    }
    let mut arguments: Vec<OsString> = vec!["--fd=0".into()];
    let mut add = |option: OsString| arguments.extend(["-o".into(), option]);
    add(OsString::from_vec(source));
    for option in [sandbox, cache, "log_level=err"] {
        add(option.into());
    }
    if options.xattr {
        add("xattr".into());
    }
    Ok(arguments)
}

/// A listening socket with one connection that is to be accepted, and the connection's other end.
/// (virtiofsd takes no connected socket.)
fn socket_pair() -> Result<(UnixListener, UnixStream)> {
    let mut number = [0; 16];
    let none = rustix::rand::GetRandomFlags::empty();
    uninterrupted(|| rustix::rand::getrandom(&mut number, none))?;
    let number = u128::from_ne_bytes(number);
    let folder = std::env::temp_dir().join(format!("armlet-{number:032x}"));
    // Nobody else gets in: who connects first may read and write the shared folder.
    DirBuilder::new().mode(0o700).create(&folder)?;
    let path = folder.join("s");
    let pair =
        UnixListener::bind(&path).and_then(|listener| Ok((listener, UnixStream::connect(&path)?)));
    let _ = fs::remove_file(&path);
    let _ = fs::remove_dir(&folder);
    Ok(pair?)
}

/// One that runs. When it is dropped it has ended.
#[derive(Debug)]
pub(super) struct Daemon {
    name: String,
    child: Child,
    connection: VhostUser,
    words: Words,
}

impl Daemon {
    fn check(self) -> Result<Daemon> {
        let lacks = WANTED_FEATURES & !self.connection.features();
        if lacks != 0 {
            bail!("it lacks the features {lacks:#x} of virtio");
        }
        let queues = self.connection.queues();
        if queues < QUEUES {
            bail!("it works on {queues} queues; {QUEUES} are needed");
        }
        Ok(self)
    }

    pub(super) fn connection(&self) -> &VhostUser {
        &self.connection
    }

    /// Descriptors that are ready to be read when it said something or ended.
    pub(super) fn watched(&self) -> impl Iterator<Item = RawFd> {
        let words = self.words.pipe.as_ref().map(AsRawFd::as_raw_fd);
        [self.connection.as_raw_fd()].into_iter().chain(words)
    }

    /// Whether it still holds its end of the connection.
    pub(super) fn is_alive(&self) -> bool {
        self.connection.is_alive()
    }

    /// What it said since, in lines.
    pub(super) fn hear(&mut self) -> Vec<String> {
        self.words.hear()
    }

    /// Ends it, and says how it ended.
    pub(super) fn end(&mut self) -> String {
        self.connection.hang_up();
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            wait(&self.child);
            kill(&self.child);
            wait(&self.child);
        }
        let ended = self.child.try_wait().ok().flatten();
        ended.map_or_else(|| "it does not end".to_owned(), |status| status.to_string())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.end();
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let name = &self.name;
            log::error!("{name}: virtiofsd does not end, and may still write to guest memory");
        }
    }
}

/// Waits a while for the end of a process, which leaves its number taken. Returns whether it has
/// ended.
fn wait(child: &Child) -> bool {
    let pidfd = pid_of(child).map(|pid| pidfd_open(pid, PidfdFlags::empty()));
    let Some(Ok(pidfd)) = pidfd else {
        return false;
    };
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    // A signal makes the wait shorter.
    poll(&mut fds, Some(&FAREWELL)).is_ok_and(|ready| ready > 0)
}

/// Kills what is left of a process that nobody has asked yet how it ended: in namespaces the work is
/// another's, which the end of the first one need not end.
fn kill(child: &Child) {
    if let Some(pid) = pid_of(child) {
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

fn pid_of(child: &Child) -> Option<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw)
}

/// What it says on its standard error.
#[derive(Debug)]
struct Words {
    pipe: Option<ChildStderr>,
    /// What it said last, as far as it is no whole line.
    rest: Vec<u8>,
}

impl Words {
    fn new(pipe: Option<ChildStderr>) -> Result<Words> {
        if let Some(pipe) = &pipe {
            let flags = fcntl_getfl(pipe)?;
            fcntl_setfl(pipe, flags | OFlags::NONBLOCK)?;
        }
        Ok(Words {
            pipe,
            rest: Vec::new(),
        })
    }

    /// Whole lines out of what can be read now.
    fn hear(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut part = [0; MOST_WORDS];
        for _ in 0..MOST_READS {
            let read = self.pipe.as_mut().map(|pipe| pipe.read(&mut part));
            let Some(Ok(len @ 1..)) = read else {
                break;
            };
            self.rest.extend(&part[..len]);
            self.take_lines(&mut lines);
        }
        lines
    }

    /// As [`Self::hear`], and what is no whole line, of one who says no more.
    fn hear_all(&mut self) -> Vec<String> {
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
