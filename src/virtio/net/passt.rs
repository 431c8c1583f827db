//! A network without privileges (`--net user`): passt(1), a program of its own that turns the
//! guest's frames into sockets of the host. It is started with one end of a pair of stream sockets,
//! where each frame follows its length in 4 bytes, and ends when the other end is closed.

use self::stream::{Broken, LONGEST, Stream};
use super::sys;
use crate::messages::{self, LINES};
use anyhow::{Context, Result, anyhow, bail};
use armlet_devices::limit::RateLimit;
use armlet_devices::virtio::Source;
use armlet_devices::virtio::net::{Frame, Frames, Network, Room, Trouble, Woken};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

pub mod stream;
#[cfg(test)]
mod tests;

/// The program.
const PROGRAM: &str = "passt";
/// How long it may take to begin, on the slowest of hosts.
const PATIENCE: Duration = Duration::from_secs(20);
/// The MTU in bytes for the guest: what passt says by DHCP too, for a network that ends here.
const MTU: u16 = 65520;
/// An EtherType for experiments (IEEE 802), which nobody answers.
const EXPERIMENT: [u8; 2] = [0x88, 0xb5];

/// A port of the host that leads to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// UDP, not TCP.
    pub udp: bool,
    /// The host's address; all of them if there is none.
    pub address: Option<IpAddr>,
    /// The host's port.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
}

impl Forward {
    /// Reads QEMU's `tcp:[HOSTADDR]:HOSTPORT-[GUESTADDR]:GUESTPORT`; the colon before the host's
    /// port may be left out with the address.
    ///
    /// # Errors
    /// Another form, or an address of the guest, which has one only.
    pub fn parse(text: &str) -> Result<Forward> {
        let read = || {
            let (protocol, rest) = text.split_once(':')?;
            let udp = match protocol {
                "tcp" => false,
                "udp" => true,
                _ => return None,
            };
            let (host, guest) = rest.rsplit_once('-')?;
            let (address, host) = host.rsplit_once(':').unwrap_or(("", host));
            let (guest_address, guest) = guest.rsplit_once(':')?;
            let bare = address.trim_start_matches('[').trim_end_matches(']');
            let port = |text: &str| text.parse().ok().filter(|port| *port != 0);
            let address = match bare {
                "" => None,
                bare => Some(bare.parse().ok()?),
            };
            let forward = Forward {
                udp,
                address,
                host: port(host)?,
                guest: port(guest)?,
            };
            Some((forward, guest_address))
        };
        match read() {
            Some((forward, "")) => Ok(forward),
            Some((_, address)) => bail!(
                "hostfwd={text}: the guest's address is not for you to choose; leave {address} out"
            ),
            None => bail!(
                "hostfwd={text} is not understood; write it like hostfwd=tcp:127.0.0.1:2222-:22"
            ),
        }
    }

    /// The option of passt(1) and its value.
    fn option(&self) -> [String; 2] {
        let option = if self.udp { "-u" } else { "-t" };
        let address = self.address.map(|address| format!("{address}/"));
        let ports = format!("{}:{}", self.host, self.guest);
        [option.to_owned(), address.unwrap_or_default() + &ports]
    }
}

/// A passt that runs, and what is under way to it and from it.
pub struct Passt {
    stream: Stream,
    child: Child,
    /// What it says goes here. It stays open after passt's end, as its number is a source's.
    words: ChildStderr,
    /// Lines that it said: what is on the network may have it say much.
    said: RateLimit,
    is_gone: bool,
}

impl Passt {
    /// Starts passt for a guest with this MAC address, and waits until it works.
    ///
    /// # Errors
    /// A host without passt; what passt says when it does not start.
    pub fn start(forwards: &[Forward], mac: [u8; 6]) -> Result<Passt> {
        Passt::start_program(PROGRAM, forwards, mac)
    }

    fn start_program(program: &str, forwards: &[Forward], mac: [u8; 6]) -> Result<Passt> {
        let cannot = "cannot make a socket for passt";
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .context(cannot)?;
        // Ours alone: passt waits in the middle of a frame.
        rustix::fs::fcntl_setfl(&ours, OFlags::NONBLOCK).context(cannot)?;
        let mut command = Command::new(program);
        command
            .args(["--foreground", "--quiet", "--fd"])
            .arg(theirs.as_raw_fd().to_string())
            .args(forwards.iter().flat_map(Forward::option))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        sys::leave_open(&mut command, theirs);
        let mut child = command.spawn().map_err(|error| match error.kind() {
            // Permission is also what lacks where a folder in PATH is not open to this user.
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => anyhow!(
                "--net user needs the program passt, which is not here or not for this user to \
                 run ({error}); 'apt install passt' on Debian, or use --net tap="
            ),
            _ => anyhow!("cannot start passt: {error}"),
        })?;
        // With it goes the last of our descriptors for passt's end.
        drop(command);
        let words = child.stderr.take().context("passt has no standard error")?;
        rustix::fs::fcntl_setfl(&words, OFlags::NONBLOCK).context(cannot)?;
        let mut passt = Passt {
            stream: Stream::new(ours),
            child,
            words,
            said: RateLimit::new(LINES),
            is_gone: false,
        };
        passt.begin(mac)?;
        Ok(passt)
    }

    /// Waits until passt has read a frame that means nothing, or has ended.
    fn begin(&mut self, mac: [u8; 6]) -> Result<()> {
        const SOCKET: u64 = 0;
        const WORDS: u64 = 1;
        let epoll = Epoll::new().context("cannot wait for passt")?;
        let watch = |fd: RawFd, events, data| {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, data))
        };
        let edges = EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        watch(self.stream.socket.as_raw_fd(), edges, SOCKET)?;
        watch(self.words.as_raw_fd(), EventSet::IN, WORDS)?;
        let mut events = [EpollEvent::default(); 2];
        // That there is room now is no news; that there is room again will be.
        let _ = epoll.wait(0, &mut events)?;
        let mut frame = [0; 60];
        frame[..6].fill(0xff);
        frame[6..12].copy_from_slice(&mac);
        frame[12..14].copy_from_slice(&EXPERIMENT);
        let length = (frame.len() as u32).to_be_bytes();
        // If passt has ended already, what comes says so.
        let _ = rustix::io::write(&self.stream.socket, &[&length[..], &frame].concat());
        let end = Instant::now() + PATIENCE;
        let mut said = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let count = match epoll.wait(left.as_millis() as i32, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                count => count?,
            };
            if count == 0 {
                log::warn!("passt has been silent for {PATIENCE:?}; going on without its word");
                return Ok(());
            }
            let lives = self.listen(&mut said);
            let has_read = events[..count].iter().any(|event| {
                let gone = EventSet::HANG_UP | EventSet::READ_HANG_UP | EventSet::ERROR;
                event.data() == SOCKET && !event.event_set().intersects(gone)
            });
            if !lives {
                let why = self.ended(lives);
                bail!("passt does not start: {}", summary(&said, &why));
            }
            if has_read {
                self.repeat(&said);
                return Ok(());
            }
        }
    }

    /// Takes what passt says, line by line; false when it has ended.
    fn listen(&self, said: &mut Vec<String>) -> bool {
        let mut text = Vec::new();
        let mut buffer = [0; 1024];
        let lives = loop {
            match rustix::io::read(&self.words, &mut buffer) {
                Ok(0) => break false,
                Ok(size) => text.extend_from_slice(&buffer[..size]),
                Err(Errno::INTR) => {}
                Err(error) => break error == Errno::AGAIN,
            }
        };
        said.extend(messages::lines(&text).filter(|line| !is_idle_talk(line)));
        lives
    }

    /// Hands on what passt says while it works.
    fn report(&mut self) -> Woken {
        let mut said = Vec::new();
        if !self.listen(&mut said) {
            return Woken::Gone(self.lost(&said, false));
        }
        self.repeat(&said);
        Woken::Nothing
    }

    fn repeat(&self, said: &[String]) {
        for line in said {
            let warn = log::Level::Warn;
            self.said.log(warn, |held| format!("passt: {line}{held}"));
        }
    }

    /// Ends passt if it still `lives`, and says how it ended.
    fn ended(&mut self, lives: bool) -> String {
        if lives {
            let _ = self.child.kill();
        }
        match self.child.wait() {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        }
    }

    /// passt has ended, or is of no use any more.
    fn lost(&mut self, said: &[String], lives: bool) -> String {
        self.is_gone = true;
        let how = self.ended(lives);
        format!("passt has ended: {}", summary(said, &how))
    }

    /// What an error of the stream means.
    fn trouble(&mut self, error: Broken) -> Trouble {
        let mut said = Vec::new();
        let lives = match error {
            Broken::Wait => return Trouble::Wait,
            // It closes what it says things by before the socket.
            Broken::Closed => self.listen(&mut said),
            Broken::Wrong(size) => {
                said.push(format!("it sent a frame of {size} bytes, which cannot be"));
                true
            }
        };
        Trouble::Gone(self.lost(&said, lives))
    }

    fn send(&mut self, frame: Frame<'_>) -> Result<(), Trouble> {
        let size = frame.size();
        if size > LONGEST {
            return Err(Trouble::Lost(format!(
                "a frame has {size} bytes; passt takes up to {LONGEST}"
            )));
        }
        let sent = self.stream.send(size, || frame.slices());
        sent.map_err(|error| self.trouble(error))
    }

    fn receive(&mut self, room: Room<'_>) -> Result<usize, Trouble> {
        let received = self.stream.receive(|frame| room.fill(frame));
        received.map_err(|error| self.trouble(error))
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It would end by itself when its socket closes, but who waits for armlet expects that all
        // of it is gone.
        self.ended(true);
    }
}

/// What passt says although all is well: as root, without a log daemon, on an old CPU.
fn is_idle_talk(line: &str) -> bool {
    const STARTS: [&str; 3] = [
        "Don't run as root",
        "Started as root",
        "Can't run AVX2 build",
    ];
    line.is_empty()
        || STARTS.iter().any(|start| line.starts_with(start))
        || (line.starts_with("Failed to send") && line.ends_with("to syslog"))
}

/// What passt said, or else how it ended.
fn summary(said: &[String], otherwise: &str) -> String {
    match said.is_empty() {
        true => otherwise.to_owned(),
        false => said.join("; "),
    }
}

/// passt as a network card's network, in as many lives of the guest as there are.
#[derive(Clone)]
pub struct PasstFrames {
    passt: Arc<Mutex<Passt>>,
    /// Its descriptors, which stay open as long as it is there.
    socket: RawFd,
    words: RawFd,
}

impl PasstFrames {
    /// The network behind `passt`.
    #[must_use]
    pub fn new(passt: Passt) -> PasstFrames {
        PasstFrames {
            socket: passt.stream.socket.as_raw_fd(),
            words: passt.words.as_raw_fd(),
            passt: Arc::new(Mutex::new(passt)),
        }
    }

    fn passt(&self) -> MutexGuard<'_, Passt> {
        self.passt.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The source of frames; the other is what passt says.
const SOCKET: usize = 0;

impl Network for PasstFrames {
    fn offloads(&self) -> u64 {
        0
    }

    fn mtu(&self) -> Option<u16> {
        Some(MTU)
    }

    fn is_up(&self) -> bool {
        !self.passt().is_gone
    }

    fn sources(&self) -> Vec<Source> {
        let source = |fd, output| Source {
            fd,
            output,
            edge: true,
        };
        vec![source(self.socket, true), source(self.words, false)]
    }

    fn woken(&mut self, source: usize) -> Woken {
        let mut passt = self.passt();
        if source != SOCKET {
            return passt.report();
        }
        match passt.stream.flush() {
            Err(Broken::Closed) => match passt.trouble(Broken::Closed) {
                Trouble::Gone(why) => Woken::Gone(why),
                _ => Woken::Nothing,
            },
            _ => Woken::Frames(0),
        }
    }

    fn configure(&mut self, _pairs: u16, _offloads: u64) -> Result<(), String> {
        Ok(())
    }
}

impl Frames for PasstFrames {
    fn has_header(&self) -> bool {
        false
    }

    fn send(&mut self, _pair: usize, frame: Frame<'_>) -> Result<(), Trouble> {
        self.passt().send(frame)
    }

    fn receive(&mut self, _pair: usize, room: Room<'_>) -> Result<usize, Trouble> {
        self.passt().receive(room)
    }
}
