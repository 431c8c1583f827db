//! The TCP/IP stack of a metadata service, whose only peer is the guest: smoltcp, with one address, one
//! port and few connections.
//!
//! Nothing of it waits: it is given frames and the time, and is asked for frames and for the time when it
//! wants to be called again.

use super::service::{MOST_REQUEST, Service};
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    HardwareAddress, IpAddress, IpCidr, IpEndpoint, IpProtocol, Ipv4Packet, TcpPacket,
};
use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::Duration;

/// The MAC address of the service, which is that of Firecracker's.
pub const MAC: [u8; 6] = [0x06, 0x01, 0x23, 0x45, 0x67, 0x01];
/// The port of HTTP.
const PORT: u16 = 80;
/// The most connections. The one that was silent for longest goes when there is one more.
pub const MOST_CONNECTIONS: usize = 30;
/// How long a guest may say nothing on a connection.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes that a connection takes and gives ahead of what is read and acknowledged.
const TAKEN: usize = MOST_REQUEST;
const GIVEN: usize = 8192;
/// The most frames that wait for the guest. Without room for more, the stack stands still.
pub const MOST_FRAMES: usize = 64;
/// The MTU of Ethernet in bytes: frames are not longer, whatever the card's MTU is.
const MOST_MTU: u16 = 1500;
/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;
/// The shortest time after which it wants to be called again, and that where it stands still.
const SOON: Duration = Duration::from_millis(1);
const LATER: Duration = Duration::from_secs(1);

/// The stack.
pub struct Stack {
    interface: Interface,
    sockets: SocketSet<'static>,
    wire: Wire,
    address: Ipv4Addr,
    /// The socket that the next connection will be.
    listener: SocketHandle,
    connections: Vec<Connection>,
    service: Service,
}

/// A connection of the guest.
struct Connection {
    handle: SocketHandle,
    peer: IpEndpoint,
    /// The sequence number that the guest began with.
    first: u32,
    /// When something was heard on it last.
    heard: Duration,
    /// What is received of a request.
    received: Vec<u8>,
    /// What is to be sent, and how much of it the socket has.
    answer: Vec<u8>,
    sent: usize,
    /// Whether it ends with this answer.
    closes: bool,
}

impl Stack {
    /// A stack for `service` at `address`, with `mtu` in bytes for what it sends. Each frame for the
    /// guest begins with `header` zeros.
    #[must_use]
    pub fn new(
        service: Service,
        address: Ipv4Addr,
        mtu: Option<u16>,
        header: usize,
        seed: u64,
    ) -> Stack {
        let mut wire = Wire {
            header,
            mtu: mtu.map_or(MOST_MTU, |mtu| mtu.min(MOST_MTU)).into(),
            incoming: Vec::new(),
            is_loaded: false,
            outgoing: VecDeque::new(),
            is_starved: false,
        };
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(MAC)));
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut wire, Instant::ZERO);
        // Whatever address the guest has, it is on this link.
        interface.update_ip_addrs(|addresses| {
            let _ = addresses.push(IpCidr::new(IpAddress::Ipv4(address), 0));
        });
        let mut sockets = SocketSet::new(Vec::new());
        let listener = sockets.add(listen(address));
        Stack {
            interface,
            sockets,
            wire,
            address,
            listener,
            connections: Vec::new(),
            service,
        }
    }

    /// Takes a frame that the guest sent to the service; checksums of its TCP segment may be left for
    /// a card to fill in, and it may be longer than the MTU.
    pub fn receive(&mut self, frame: &[u8], now: Duration) {
        if self.admit(frame, now).is_none() {
            return;
        }
        self.feed(now, |incoming| {
            incoming.extend_from_slice(frame);
            // It may have come by way of a router's address.
            incoming[..6].copy_from_slice(&MAC);
        });
        self.work(now);
    }

    /// Whether the stack is to have a frame, for which it may have to be made ready.
    fn admit(&mut self, frame: &[u8], now: Duration) -> Option<()> {
        let frame = EthernetFrame::new_checked(frame).ok()?;
        match frame.ethertype() {
            EthernetProtocol::Arp => return Some(()),
            EthernetProtocol::Ipv4 => {}
            _ => return None,
        }
        let packet = Ipv4Packet::new_checked(frame.payload()).ok()?;
        let is_part = packet.more_frags() || packet.frag_offset() != 0;
        if packet.dst_addr() != self.address || packet.next_header() != IpProtocol::Tcp || is_part {
            return None;
        }
        let segment = TcpPacket::new_checked(packet.payload()).ok()?;
        let peer = IpEndpoint::new(IpAddress::Ipv4(packet.src_addr()), segment.src_port());
        let known = self.connections.iter().position(|one| one.peer == peer);
        let begins = segment.syn() && !segment.ack();
        let first = segment.seq_number().0 as u32;
        match known {
            Some(index) if !begins => self.connections[index].heard = now,
            // The same again.
            Some(index) if self.connections[index].first == first => return None,
            // The guest has forgotten what was before.
            Some(index) => {
                let forgotten = self.connections.swap_remove(index);
                self.sockets.remove(forgotten.handle);
            }
            None if begins && self.connections.len() >= MOST_CONNECTIONS => self.evict(now),
            None => {}
        }
        if begins {
            self.meet(frame.src_addr(), packet.src_addr(), now);
        }
        Some(())
    }

    /// Has the stack know where a guest's address is, as if the guest had told by ARP: answers go to
    /// where a connection came from, and nobody has to be asked.
    fn meet(&mut self, mac: EthernetAddress, address: Ipv4Addr, now: Duration) {
        let said = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: mac,
            source_protocol_addr: address,
            target_hardware_addr: EthernetAddress(MAC),
            target_protocol_addr: self.address,
        };
        self.feed(now, |incoming| {
            incoming.resize(ETHERNET + said.buffer_len(), 0);
            let mut frame = EthernetFrame::new_unchecked(&mut incoming[..]);
            frame.set_src_addr(mac);
            frame.set_dst_addr(EthernetAddress(MAC));
            frame.set_ethertype(EthernetProtocol::Arp);
            said.emit(&mut ArpPacket::new_unchecked(frame.payload_mut()));
        });
    }

    /// Gives the stack the frame that `write` writes.
    fn feed(&mut self, now: Duration, write: impl FnOnce(&mut Vec<u8>)) {
        self.wire.incoming.clear();
        write(&mut self.wire.incoming);
        self.wire.is_loaded = true;
        let (wire, sockets) = (&mut self.wire, &mut self.sockets);
        let _ = self
            .interface
            .poll_ingress_single(instant(now), wire, sockets);
        self.accept(now);
    }

    /// Makes the listener a connection, and another socket the listener, where the guest began one.
    fn accept(&mut self, now: Duration) {
        let socket: &Socket = self.sockets.get(self.listener);
        if socket.is_listening() {
            return;
        }
        let handle = std::mem::replace(&mut self.listener, self.sockets.add(listen(self.address)));
        let socket: &Socket = self.sockets.get(handle);
        let Some(peer) = socket.remote_endpoint() else {
            self.sockets.remove(handle);
            return;
        };
        self.connections.push(Connection {
            handle,
            peer,
            first: self.wire.sequence_number(),
            heard: now,
            received: Vec::new(),
            answer: Vec::new(),
            sent: 0,
            closes: false,
        });
    }

    /// Gives up the connection that is worth least.
    fn evict(&mut self, now: Duration) {
        let sockets = &self.sockets;
        let worth = |connection: &Connection| {
            let socket: &Socket = sockets.get(connection.handle);
            (socket.state() != State::TimeWait, connection.heard)
        };
        let found = self.connections.iter().enumerate();
        let Some((index, _)) = found.min_by_key(|(_, connection)| worth(connection)) else {
            return;
        };
        let handle = self.connections.swap_remove(index).handle;
        let socket: &mut Socket = self.sockets.get_mut(handle);
        if socket.state() != State::TimeWait {
            socket.abort();
            let (wire, sockets) = (&mut self.wire, &mut self.sockets);
            let _ = self.interface.poll_egress(instant(now), wire, sockets);
        }
        self.sockets.remove(handle);
    }

    /// Does what is due.
    pub fn work(&mut self, now: Duration) {
        self.wire.is_starved = false;
        // Each round but the last makes a frame.
        for _ in 0..=MOST_FRAMES {
            for connection in &mut self.connections {
                let socket = self.sockets.get_mut(connection.handle);
                connection.serve(socket, &mut self.service, now);
            }
            let (wire, sockets) = (&mut self.wire, &mut self.sockets);
            let made = self.interface.poll_egress(instant(now), wire, sockets);
            if made == PollResult::None {
                break;
            }
        }
        let sockets = &mut self.sockets;
        self.connections.retain(|connection| {
            let socket: &Socket = sockets.get(connection.handle);
            // A guest that takes back its first segment leaves a second listener.
            let is_over = matches!(socket.state(), State::Closed | State::Listen);
            if is_over {
                sockets.remove(connection.handle);
            }
            !is_over
        });
    }

    /// Returns when to call [`Self::work`] again, if no frame comes before.
    pub fn due(&mut self, now: Duration) -> Option<Duration> {
        let due = self.interface.poll_at(instant(now), &self.sockets)?;
        let due = Duration::from_micros(due.total_micros().unsigned_abs());
        let least = if self.wire.is_full() { LATER } else { SOON };
        Some(due.max(now + least))
    }

    /// Whether there are frames for the guest.
    #[must_use]
    pub fn has_frames(&self) -> bool {
        !self.wire.outgoing.is_empty()
    }

    /// Takes the next frame for the guest.
    pub fn take_frame(&mut self) -> Option<Vec<u8>> {
        self.wire.outgoing.pop_front()
    }

    /// Whether [`Self::work`] is to be called because frames were taken.
    #[must_use]
    pub fn is_starved(&self) -> bool {
        self.wire.is_starved && !self.wire.is_full()
    }

    /// Returns the number of connections.
    #[cfg(test)]
    pub(super) fn connections(&self) -> usize {
        self.connections.len()
    }
}

impl Connection {
    /// Moves what can be moved between socket and service.
    fn serve(&mut self, socket: &mut Socket<'static>, service: &mut Service, now: Duration) {
        loop {
            if self.sent < self.answer.len() {
                match socket.send_slice(&self.answer[self.sent..]) {
                    Ok(count) => self.sent += count,
                    // It is over.
                    Err(_) => return,
                }
                if self.sent < self.answer.len() {
                    return;
                }
                (self.answer, self.sent) = (Vec::new(), 0);
            }
            if self.closes {
                // What still comes is not left to lie, so that the end is seen behind it.
                while let Ok(1..) = socket.recv(|bytes| (bytes.len(), bytes.len())) {}
                socket.close();
                return;
            }
            while self.received.len() < MOST_REQUEST {
                let room = MOST_REQUEST - self.received.len();
                let took = socket.recv(|bytes| {
                    let count = bytes.len().min(room);
                    self.received.extend_from_slice(&bytes[..count]);
                    (count, count)
                });
                if !matches!(took, Ok(1..)) {
                    break;
                }
            }
            let reply = match self.received.is_empty() {
                true => None,
                false => service.reply(&self.received, now),
            };
            match reply {
                Some(reply) => {
                    self.received
                        .drain(..reply.consumed.min(self.received.len()));
                    self.answer = reply.bytes;
                    self.closes = reply.closes;
                }
                None => {
                    // The guest sends nothing more.
                    if socket.state() == State::CloseWait {
                        socket.close();
                    }
                    return;
                }
            }
        }
    }
}

/// A socket that waits for a connection.
fn listen(address: Ipv4Addr) -> Socket<'static> {
    let buffer = |bytes: usize| SocketBuffer::new(vec![0; bytes]);
    let mut socket = Socket::new(buffer(TAKEN), buffer(GIVEN));
    socket.set_timeout(Some(PATIENCE.into()));
    socket.set_ack_delay(None);
    socket.set_nagle_enabled(false);
    // It is new, and the port is not 0.
    let _ = socket.listen((IpAddress::Ipv4(address), PORT));
    socket
}

fn instant(now: Duration) -> Instant {
    Instant::from_micros(now.as_micros() as i64)
}

/// What lies between the stack and the guest.
struct Wire {
    /// Zeros before each frame for the guest, in bytes.
    header: usize,
    mtu: usize,
    /// The frame that the stack gets next, if it is loaded.
    incoming: Vec<u8>,
    is_loaded: bool,
    outgoing: VecDeque<Vec<u8>>,
    /// Whether the stack found no room for a frame.
    is_starved: bool,
}

impl Wire {
    fn is_full(&self) -> bool {
        self.outgoing.len() >= MOST_FRAMES
    }

    /// The sequence number in the frame that came last.
    fn sequence_number(&self) -> u32 {
        let frame = EthernetFrame::new_checked(&self.incoming[..]).ok();
        let packet = frame.and_then(|frame| Ipv4Packet::new_checked(frame.payload()).ok());
        let segment = packet.and_then(|packet| TcpPacket::new_checked(packet.payload()).ok());
        segment.map_or(0, |segment| segment.seq_number().0 as u32)
    }
}

impl Device for Wire {
    type RxToken<'a> = Incoming<'a>;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Incoming<'_>, Outgoing<'_>)> {
        if !std::mem::take(&mut self.is_loaded) || self.is_full() {
            return None;
        }
        let outgoing = Outgoing {
            header: self.header,
            frames: &mut self.outgoing,
        };
        Some((Incoming(&self.incoming), outgoing))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Outgoing<'_>> {
        if self.is_full() {
            self.is_starved = true;
            return None;
        }
        Some(Outgoing {
            header: self.header,
            frames: &mut self.outgoing,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = ETHERNET + self.mtu;
        // Nothing is changed between guest memory and here, and a guest may leave it to be filled in.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

/// A frame from the guest.
struct Incoming<'a>(&'a [u8]);

impl RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(self.0)
    }
}

/// Room for a frame to the guest.
struct Outgoing<'a> {
    header: usize,
    frames: &'a mut VecDeque<Vec<u8>>,
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut frame = vec![0; self.header + len];
        let result = write(&mut frame[self.header..]);
        self.frames.push_back(frame);
        result
    }
}
