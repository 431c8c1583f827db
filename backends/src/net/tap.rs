//! TAP interfaces of the host (`--net tap=`): drivers/net/tun.c, Documentation/networking/tuntap.

use super::sys;
use anyhow::{Context, Result, anyhow, bail};
use armlet_devices::sync::lock;
use armlet_devices::virtio::Source;
use armlet_devices::virtio::net::feature::{
    CSUM, GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, HOST_ECN,
    HOST_TSO4, HOST_TSO6, HOST_USO,
};
use armlet_devices::virtio::net::{Frame, FrameError, Frames, HEADER, Network, Room, SourceEvent};
use armlet_system::messages::shell_word;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::raw::c_int;
use std::sync::{Arc, Mutex};

/// The device that each TAP comes from.
const TUN: &str = "/dev/net/tun";
/// The flags of all our queues: frames with virtio's header before them, and nothing else.
const FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// Ethernet's MTU in bytes, which a driver takes without being told.
const USUAL_MTU: u32 = 1500;
/// RTMGRP_LINK: what interfaces come, go and change (include/uapi/linux/rtnetlink.h).
const LINK_GROUP: u32 = 1;

/// Offloads of every TAP (Linux 2.6.27).
const OLD_OFFLOADS: u64 =
    CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | HOST_TSO4 | HOST_TSO6 | HOST_ECN;
/// Those for UDP (Linux 6.2).
const UDP_OFFLOADS: u64 = GUEST_USO4 | GUEST_USO6 | HOST_USO;

/// A TAP interface with the descriptors of its queues.
pub struct Tap {
    /// The interface's name when it was opened.
    name: String,
    queues: Vec<OwnedFd>,
    offloads: u64,
    mtu: Option<u16>,
    /// Tells when an interface of the host changes, where the host lets us ask.
    changes: Option<OwnedFd>,
    /// So many of the queues are in use.
    active: Mutex<usize>,
}

/// Attaches to the interface `name`, which is made if it is not there.
///
/// # Errors
/// What the system says.
pub fn make(name: &str) -> io::Result<OwnedFd> {
    let tun = open_tun().map_err(io::Error::other)?;
    sys::set_interface(&tun, name, FLAGS)?;
    Ok(tun)
}

/// What became of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Up,
    Down,
    Gone,
}

impl Tap {
    /// Opens the interface `name` with so many queues.
    ///
    /// # Errors
    /// What does not work, and what would.
    pub fn open(name: &str, queues: u16) -> Result<Tap> {
        let socket = netlink().context("cannot ask for network interfaces")?;
        if sys::flags(&socket, name).is_err() {
            bail!("there is no interface {name}; {}", making(name, queues));
        }
        let mut flags = FLAGS;
        if queues > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let mut opened = Vec::new();
        for _ in 0..queues {
            let tun = open_tun()?;
            let mut result = sys::set_interface(&tun, name, flags);
            // One that was made for several queues takes one too, if asked for several.
            if queues == 1 && is(&result, Errno::INVAL) {
                result = sys::set_interface(&tun, name, flags | libc::IFF_MULTI_QUEUE);
            }
            result.map_err(|error| anyhow!(refusal(name, queues, &error)))?;
            opened.push(tun);
        }
        Tap::finish(name.to_owned(), opened)
    }

    /// Takes descriptors of a TAP's queues that armlet was started with.
    ///
    /// # Errors
    /// One that is not open, or no TAP, or one that has no header before each frame.
    pub fn inherit(numbers: &[RawFd]) -> Result<Tap> {
        let mut name = String::new();
        let mut queues = Vec::new();
        for number in numbers {
            let tun = sys::inherited(*number)
                .map_err(|_| anyhow!("armlet was not started with descriptor {number} open"))?;
            let (interface, flags) = sys::interface(&tun).map_err(|_| {
                anyhow!("descriptor {number} is no TAP; open {TUN} and attach it with TUNSETIFF")
            })?;
            if flags & FLAGS as u32 != FLAGS as u32 {
                bail!(
                    "the TAP in descriptor {number} has flags {flags:#x}; attach it with \
                     IFF_TAP | IFF_NO_PI | IFF_VNET_HDR"
                );
            }
            if !queues.is_empty() && interface != name {
                bail!("descriptor {number} belongs to {interface}, those before it to {name}");
            }
            let now = rustix::fs::fcntl_getfl(&tun)?;
            rustix::fs::fcntl_setfl(&tun, now | OFlags::NONBLOCK)?;
            name = interface;
            queues.push(tun);
        }
        Tap::finish(name, queues)
    }

    fn finish(name: String, queues: Vec<OwnedFd>) -> Result<Tap> {
        for queue in &queues {
            sys::set_header_size(queue, HEADER)
                .with_context(|| format!("{name} has no headers of {HEADER} bytes"))?;
        }
        let first = &queues[0];
        let offloads = [OLD_OFFLOADS | UDP_OFFLOADS, OLD_OFFLOADS]
            .into_iter()
            .find(|offloads| sys::set_offload(first, tun_bits(*offloads)).is_ok());
        let changes = netlink()
            .inspect_err(|error| log::info!("{name} is not watched: {error}"))
            .ok();
        let mtu = changes
            .as_ref()
            .and_then(|socket| sys::mtu(socket, &name).ok())
            .filter(|mtu| *mtu != USUAL_MTU)
            .and_then(|mtu| u16::try_from(mtu).ok());
        let tap = Tap {
            active: Mutex::new(queues.len()),
            offloads: offloads.unwrap_or(0),
            name,
            queues,
            mtu,
            changes,
        };
        if tap.state() == State::Down {
            let name = &tap.name;
            log::warn!(
                "{name} is down, and so is the guest's link; 'ip link set {} up'",
                shell_word(name)
            );
        }
        tap.configure(1, 0).map_err(|what| anyhow!(what))?;
        Ok(tap)
    }

    /// Its queues.
    #[must_use]
    pub fn queues(&self) -> &[OwnedFd] {
        &self.queues
    }

    /// The offloads that it has, as features.
    #[must_use]
    pub fn offloads(&self) -> u64 {
        self.offloads
    }

    /// Its MTU in bytes, where it is not Ethernet's.
    #[must_use]
    pub fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// Has drivers be told this MTU in bytes, whatever the interface's is.
    pub fn tell_mtu(&mut self, mtu: u16) {
        self.mtu = Some(mtu);
    }

    /// Whether its interface is up.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.state() == State::Up
    }

    /// The source that is ready when its interface may have changed.
    #[must_use]
    pub fn changes(&self) -> Option<Source> {
        self.changes.as_ref().map(|socket| Source {
            fd: socket.as_raw_fd(),
            output: false,
            edge: false,
        })
    }

    /// Its interface may have changed: what that means.
    #[must_use]
    pub fn changed(&self) -> SourceEvent {
        // Which interface it is does not matter, as ours is looked at anyway.
        if let Some(socket) = &self.changes {
            let mut message = [0; 4096];
            while let Ok(1..) | Err(Errno::NOBUFS) = rustix::io::read(socket, &mut message) {}
        }
        match self.state() {
            State::Up => SourceEvent::Link(true),
            State::Down => SourceEvent::Link(false),
            State::Gone => SourceEvent::Gone(self.is_gone()),
        }
    }

    fn state(&self) -> State {
        let name = match sys::interface(&self.queues[0]) {
            Ok((name, _)) => name,
            Err(_) => return State::Gone,
        };
        let flags = self
            .changes
            .as_ref()
            .map(|socket| sys::flags(socket, &name));
        match flags {
            Some(Ok(flags)) if flags & libc::IFF_UP as u32 == 0 => State::Down,
            // An interface of another namespace cannot be asked.
            _ => State::Up,
        }
    }

    fn is_gone(&self) -> String {
        format!("the interface {} was removed", self.name)
    }

    /// Uses the first `pairs` queues, and gives frames that leave no more to the guest than the
    /// features `offloads`. An interface that is gone takes anything.
    ///
    /// # Errors
    /// What the kernel refuses, in words.
    pub fn configure(&self, pairs: u16, offloads: u64) -> Result<(), String> {
        match self.try_configure(usize::from(pairs), offloads) {
            Err((_, error)) if error.raw_os_error() == Some(libc::EBADFD) => Ok(()),
            Err((what, error)) => Err(format!("{}: cannot change {what}: {error}", self.name)),
            Ok(()) => Ok(()),
        }
    }

    fn try_configure(&self, pairs: usize, offloads: u64) -> Result<(), (&'static str, io::Error)> {
        let mut active = lock(&self.active);
        // One by one, and the count with them: what fails leaves it true.
        while *active != pairs {
            let attach = *active < pairs;
            let index = if attach { *active } else { *active - 1 };
            sys::set_queue(&self.queues[index], attach)
                .map_err(|error| ("the queues in use", error))?;
            *active = if attach { index + 1 } else { index };
        }
        let bits = tun_bits(offloads);
        sys::set_offload(&self.queues[0], bits).map_err(|error| ("offloads", error))
    }
}

/// The offloads (TUN_F_...) that a driver with these features can bear.
fn tun_bits(features: u64) -> u32 {
    let mut bits = 0;
    // All others need it (virtio 1.2, section 5.1.3.1).
    if features & GUEST_CSUM == 0 {
        return bits;
    }
    bits |= libc::TUN_F_CSUM;
    for (feature, bit) in [
        (GUEST_TSO4, libc::TUN_F_TSO4),
        (GUEST_TSO6, libc::TUN_F_TSO6),
    ] {
        if features & feature != 0 {
            bits |= bit;
            if features & GUEST_ECN != 0 {
                bits |= libc::TUN_F_TSO_ECN;
            }
        }
    }
    // The kernel has both or none.
    let both = GUEST_USO4 | GUEST_USO6;
    if features & both == both {
        bits |= libc::TUN_F_USO4 | libc::TUN_F_USO6;
    }
    bits
}

/// Whether an interface can have this name (net/core/dev.c: dev_valid_name).
///
/// # Errors
/// That it cannot.
pub fn check_name(name: &str) -> Result<()> {
    let is_wrong = |c: char| c == '/' || c == ':' || c == '%' || c.is_whitespace();
    let fits = (1..sys::NAME_BYTES).contains(&name.len());
    if !fits || name.contains(is_wrong) || [".", ".."].contains(&name) {
        bail!("no interface can be called '{name}'; a name has 1 to 15 characters");
    }
    Ok(())
}

fn open_tun() -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let user_mode = "or use --net user, which needs no rights";
    rustix::fs::open(TUN, flags, Mode::empty()).map_err(|error| match error {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => {
            anyhow!("this host has no {TUN}; load it with 'modprobe tun', {user_mode}")
        }
        Errno::ACCESS | Errno::PERM => anyhow!(
            "no permission for {TUN}; run as root or as a user that may open it, {user_mode}"
        ),
        error => anyhow!("cannot open {TUN}: {error}"),
    })
}

/// How an interface is made that this user may open.
fn making(name: &str, queues: u16) -> String {
    let user = rustix::process::geteuid().as_raw();
    let multi_queue = if queues > 1 { " multi_queue" } else { "" };
    let name = shell_word(name);
    format!(
        "'ip tuntap add dev {name} mode tap user {user}{multi_queue}' and 'ip link set {name} up', \
         as root, make it"
    )
}

/// Why the interface was not opened, and what would work.
fn refusal(name: &str, queues: u16, error: &io::Error) -> String {
    // 'ip tuntap' does not change one that is there.
    let remade = || {
        format!(
            "'ip link del {}', {}",
            shell_word(name),
            making(name, queues)
        )
    };
    match error.raw_os_error() {
        Some(libc::EPERM) => format!("{name} belongs to another user; {}", remade()),
        Some(libc::EBUSY) => format!("{name} is in use; each guest needs one of its own"),
        Some(libc::E2BIG) => format!("{name} has no room for {queues} queues more"),
        Some(libc::EINVAL) if queues > 1 && is_tap(name) => {
            format!("{name} was made without multi_queue; {}", remade())
        }
        Some(libc::EINVAL) => {
            format!("{name} is no TAP; use one, which 'ip tuntap add dev NAME mode tap' makes")
        }
        _ => format!("cannot attach to {name}: {error}"),
    }
}

/// Whether an interface is a TAP (drivers/net/tun.c: tun_flags_show).
fn is_tap(name: &str) -> bool {
    let flags = std::fs::read_to_string(format!("/sys/class/net/{name}/tun_flags"));
    let flags = flags.ok().and_then(|text| {
        let digits = text.trim().strip_prefix("0x")?.to_owned();
        c_int::from_str_radix(&digits, 16).ok()
    });
    flags.is_some_and(|flags| flags & libc::IFF_TAP != 0)
}

fn is<T>(result: &io::Result<T>, errno: Errno) -> bool {
    let number = result.as_ref().err().and_then(io::Error::raw_os_error);
    number == Some(errno.raw_os_error())
}

/// A socket by which the kernel tells of changed interfaces.
fn netlink() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    bind(&socket, &SocketAddrNetlink::new(0, LINK_GROUP))?;
    Ok(socket)
}

/// A TAP whose frames armlet moves.
#[derive(Clone)]
pub struct TapFrames(pub Arc<Tap>);

impl Network for TapFrames {
    fn offloads(&self) -> u64 {
        self.0.offloads()
    }

    fn pairs(&self) -> u16 {
        self.0.queues.len() as u16
    }

    fn mtu(&self) -> Option<u16> {
        self.0.mtu()
    }

    fn is_up(&self) -> bool {
        self.0.is_up()
    }

    fn sources(&self) -> Vec<Source> {
        let queue = |queue: &OwnedFd| Source {
            fd: queue.as_raw_fd(),
            // The kernel says that there is room only after it said that there was none.
            output: true,
            edge: true,
        };
        let queues = self.0.queues.iter().map(queue);
        queues.chain(self.0.changes()).collect()
    }

    fn woken(&mut self, source: usize) -> SourceEvent {
        match source < self.0.queues.len() {
            true => SourceEvent::Frames(source),
            false => self.0.changed(),
        }
    }

    fn configure(&mut self, pairs: u16, offloads: u64) -> Result<(), String> {
        self.0.configure(pairs, offloads)
    }
}

impl Frames for TapFrames {
    fn has_header(&self) -> bool {
        true
    }

    fn send(&mut self, pair: usize, mut frame: Frame<'_>) -> Result<(), FrameError> {
        match sys::write_pieces(self.0.queues[pair].as_fd(), frame.pieces()) {
            Ok(_) => Ok(()),
            Err(error) => Err(self.0.frame_error("send", &error)),
        }
    }

    fn receive(&mut self, pair: usize, mut room: Room<'_>) -> Result<usize, FrameError> {
        sys::read_pieces(self.0.queues[pair].as_fd(), room.pieces())
            .map_err(|error| self.0.frame_error("receive", &error))
    }
}

impl Tap {
    /// What an error of a frame means. ENOMEM and ENOBUFS pass, but no source tells when, so that
    /// such a frame is lost, as on a network that is too busy.
    fn frame_error(&self, what: &str, error: &io::Error) -> FrameError {
        let name = &self.name;
        match error.raw_os_error() {
            Some(libc::EAGAIN) => FrameError::Wait,
            Some(libc::EBADFD) => FrameError::Gone(self.is_gone()),
            // drivers/net/tun.c: tun_get_user.
            Some(libc::EIO) => FrameError::Lost(format!("a frame is lost, as {name} is down")),
            Some(libc::EINVAL) => {
                FrameError::Lost(format!("a frame has a header that {name} does not take"))
            }
            _ => FrameError::Lost(format!("{name} cannot {what} a frame: {error}")),
        }
    }
}

#[cfg(test)]
mod tests;
