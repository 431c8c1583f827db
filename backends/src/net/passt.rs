//! A network without privileges (`--net user`): passt(1), a program of its own that turns the
//! guest's frames into sockets of the host. It is started with one end of a pair of stream sockets,
//! where each frame follows its length in 4 bytes, and ends when the other end is closed.

use self::stream::{Broken, LONGEST, Stream};
use crate::broker::{self, Broker, Process, Service};
use anyhow::{Context, Result, bail};
use armlet_devices::limit::RateLimit;
use armlet_devices::sync::lock;
use armlet_devices::virtio::Source;
use armlet_devices::virtio::net::{Frame, FrameError, Frames, Network, Room, SourceEvent};
use armlet_system::deadline::Deadline;
use armlet_system::eintr;
use armlet_system::messages::LINES;
use rustix::fs::OFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::ffi::OsString;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

pub mod stream;
#[cfg(test)]
mod tests;

/// The program.
const PROGRAM: &str = "passt";
/// How long it may take to begin, on the slowest of hosts.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long it may take to end once it has closed its socket.
const GRACE: Duration = Duration::from_millis(500);
/// The most lines of what it says that are kept at a time.
const MOST_LINES: usize = 64;
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
    /// Its descriptors stay open after passt's end, as their numbers are those of sources.
    process: Process,
    /// Lines that it said: what is on the network may have it say much.
    said: RateLimit,
    is_gone: bool,
}

impl Passt {
    /// Starts passt for a guest with this MAC address, and waits until it works.
    ///
    /// # Errors
    /// A host without passt; what passt says when it does not start.
    pub fn start(broker: &Arc<Broker>, forwards: &[Forward], mac: [u8; 6]) -> Result<Passt> {
        let path = std::env::var_os("PATH");
        let program = broker::find(PROGRAM, path.as_deref(), &[]).context(
            "it needs the program passt, which is not in PATH, or not for this user to run; \
             'apt install passt' on Debian, or use --net tap=",
        )?;
        Passt::start_program(broker, &program, forwards, mac, PATIENCE)
    }

    fn start_program(
        broker: &Arc<Broker>,
        program: &Path,
        forwards: &[Forward],
        mac: [u8; 6],
        patience: Duration,
    ) -> Result<Passt> {
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
        let mut arguments: Vec<OsString> =
            ["--foreground", "--quiet", "--fd"].map(Into::into).into();
        arguments.push(broker::SOCKET.to_string().into());
        arguments.extend(forwards.iter().flat_map(Forward::option).map(Into::into));
        let service = Service::Program {
            path: program.to_owned(),
            arguments,
            listens: false,
            gains_rights: false,
        };
        let started = broker
            .offer(service)
            .and_then(|service| broker.start(service, Some(theirs)));
        let (process, _) =
            started.with_context(|| format!("cannot start {}", program.display()))?;
        let mut passt = Passt {
            stream: Stream::new(ours),
            process,
            said: RateLimit::new(LINES),
            is_gone: false,
        };
        passt.begin(mac, Deadline::after(patience))?;
        Ok(passt)
    }

    /// Waits until passt has read a frame that means nothing, or has ended.
    fn begin(&mut self, mac: [u8; 6], deadline: Deadline) -> Result<()> {
        const SOCKET: u64 = 0;
        const OTHER: u64 = 1;
        let epoll = Epoll::new().context("cannot wait for passt")?;
        let watch = |fd: RawFd, events, data| {
            let events = events | EventSet::EDGE_TRIGGERED;
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, data))
        };
        let room = EventSet::OUT | EventSet::READ_HANG_UP;
        watch(self.stream.socket.as_raw_fd(), room, SOCKET)?;
        watch(self.process.words_fd(), EventSet::IN, OTHER)?;
        watch(self.process.end_fd(), EventSet::IN, OTHER)?;
        let mut events = [EpollEvent::default(); 3];
        // That there is room now is no news; that there is room again will be.
        let _ = eintr::events(&epoll, 0, &mut events)?;
        let mut frame = [0; 60];
        frame[..6].fill(0xff);
        frame[6..12].copy_from_slice(&mac);
        frame[12..14].copy_from_slice(&EXPERIMENT);
        let length = (frame.len() as u32).to_be_bytes();
        let written = rustix::io::write(&self.stream.socket, &[&length[..], &frame].concat());
        let mut said = Vec::new();
        // One that has closed it already makes no news of that any more.
        let mut is_gone = written.is_err();
        loop {
            self.listen(&mut said);
            is_gone |= self
                .process
                .ended(Deadline::after(Duration::ZERO))
                .is_some();
            if is_gone {
                let how = self.ended(GRACE);
                self.listen(&mut said);
                bail!("passt does not start: {}", summary(&said, &how));
            }
            let left = deadline.left();
            if left.is_zero() {
                let patience = deadline.patience();
                log::warn!("passt has been silent for {patience:?}; going on without its word");
                return Ok(());
            }
            let left = left.as_millis() as i32 + 1;
            let count = eintr::events(&epoll, left, &mut events)?;
            let of_socket = events[..count].iter().find(|event| event.data() == SOCKET);
            let Some(event) = of_socket else {
                continue;
            };
            let gone = EventSet::HANG_UP | EventSet::READ_HANG_UP | EventSet::ERROR;
            is_gone = event.event_set().intersects(gone);
            if !is_gone {
                self.repeat(&said);
                return Ok(());
            }
        }
    }

    /// Takes what passt says, line by line, as far as it is worth saying.
    fn listen(&mut self, said: &mut Vec<String>) {
        let lines = self.process.words().hear().into_iter();
        said.extend(lines.filter(|line| !is_idle_talk(line)));
        said.truncate(MOST_LINES);
    }

    /// Hands on what passt says while it works.
    fn report(&mut self) -> SourceEvent {
        let mut said = Vec::new();
        self.listen(&mut said);
        self.repeat(&said);
        // One that closed its standard error and lives on has nothing more to say.
        match self.process.ended(Deadline::after(Duration::ZERO)) {
            Some(_) => SourceEvent::Gone(self.lost(Vec::new(), GRACE)),
            None => SourceEvent::Nothing,
        }
    }

    fn repeat(&self, said: &[String]) {
        for line in said {
            let warn = log::Level::Warn;
            self.said.log(warn, |held| format!("passt: {line}{held}"));
        }
    }

    /// Says how passt ended, or has it killed if it has not within `grace`.
    fn ended(&mut self, grace: Duration) -> String {
        let ended = self.process.ended(Deadline::after(grace));
        ended.map(str::to_owned).unwrap_or_else(|| {
            self.process.kill();
            "it does not work any more, and was killed".to_owned()
        })
    }

    /// passt has ended, or is of no use any more.
    fn lost(&mut self, mut said: Vec<String>, grace: Duration) -> String {
        if self.is_gone {
            return "passt has ended".to_owned();
        }
        self.is_gone = true;
        let how = self.ended(grace);
        self.listen(&mut said);
        format!("passt has ended: {}", summary(&said, &how))
    }

    /// What an error of the stream means.
    fn frame_error(&mut self, error: Broken) -> FrameError {
        FrameError::Gone(match error {
            Broken::Wait => return FrameError::Wait,
            Broken::Closed => self.lost(Vec::new(), GRACE),
            Broken::Wrong(size) => {
                let what = format!("it sent a frame of {size} bytes, which cannot be");
                self.lost(vec![what], Duration::ZERO)
            }
        })
    }

    fn send(&mut self, frame: Frame<'_>) -> Result<(), FrameError> {
        let size = frame.size();
        if size > LONGEST {
            return Err(FrameError::Lost(format!(
                "a frame has {size} bytes; passt takes up to {LONGEST}"
            )));
        }
        let sent = self.stream.send(size, || frame.slices());
        sent.map_err(|error| self.frame_error(error))
    }

    fn receive(&mut self, room: Room<'_>) -> Result<usize, FrameError> {
        let received = self.stream.receive(|frame| room.fill(frame));
        received.map_err(|error| self.frame_error(error))
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
            words: passt.process.words_fd(),
            passt: Arc::new(Mutex::new(passt)),
        }
    }

    fn passt(&self) -> MutexGuard<'_, Passt> {
        lock(&self.passt)
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

    fn woken(&mut self, source: usize) -> SourceEvent {
        let mut passt = self.passt();
        if source != SOCKET {
            return passt.report();
        }
        match passt.stream.flush() {
            Err(Broken::Closed) => match passt.frame_error(Broken::Closed) {
                FrameError::Gone(why) => SourceEvent::Gone(why),
                _ => SourceEvent::Nothing,
            },
            _ => SourceEvent::Frames(0),
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

    fn send(&mut self, _pair: usize, frame: Frame<'_>) -> Result<(), FrameError> {
        self.passt().send(frame)
    }

    fn receive(&mut self, _pair: usize, room: Room<'_>) -> Result<usize, FrameError> {
        self.passt().receive(room)
    }
}
