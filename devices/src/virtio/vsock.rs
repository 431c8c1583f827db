//! The socket device (virtio 1.2, section 5.10) with its host side over Unix sockets.
//!
//! A guest that connects to port P of the host reaches the listening Unix socket that the given
//! closure connects to for P. A process of the host that wants port P of the guest connects to
//! the device's own listening socket and writes `CONNECT P` and a newline; it reads `OK` and the
//! port that it has on the host's side, and from there on what the guest sends. (Both as
//! Firecracker does it: docs/vsock.md there.)
//!
//! Nothing here blocks, and what a connection takes is bounded: of the guest's data at most
//! `connection::BUFFER` bytes while the host does not read, and nothing of the host's.

use crate::sync::ring;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use self::connection::{Connection, Dead, Got, State};
use self::packet::{HEADER, Header, Op, STREAM};
use super::{
    Chain, ConfigSpace, DeviceState, Driver, Link, Positions, RestoreError, Source, StartError,
    VirtioDevice, Virtqueue, quiesced,
};

mod connection;
mod events;
pub(super) mod packet;

pub use super::state::VsockState;
pub use events::{EVENTS, Events};

/// Device ID.
const ID: u32 = 19;
/// VIRTIO_VSOCK_F_STREAM.
const FEATURE_STREAM: u64 = 1;
/// Entries of the queues to and from the guest, and of the one for events, which has none.
const ENTRIES: [u16; 3] = [256, 256, 8];
/// Index of the queue to the guest, and of that from it.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// VMADDR_CID_HOST: the host's address.
const HOST_CID: u64 = 2;

/// The most packets "no such connection" that wait for the guest to make room; when there are more
/// its own packets wait.
const MOST_RESETS: usize = 256;
/// The most packets for one turn, so that whoever waits for the device gets it.
const TURN: usize = 512;
/// The most bytes in one packet to the guest: what Linux sends in one, so that many connections
/// get their turns.
const MOST_DATA: usize = 64 << 10;
/// The most connections that are taken in one turn.
const ACCEPTS: usize = 32;
/// The most events of descriptors that are looked at in one turn.
const WAKES: usize = 64;
/// Ports of the host's side for those who connect to the guest: from here up, clear of those that
/// guests listen and connect to.
const FIRST_PORT: u32 = 1 << 30;

/// Token of the listening socket; connections have smaller ones.
const LISTENER: u64 = u64::MAX;

/// Connects to what stands for a port of the host. It must not wait for anyone.
pub type Connect = Box<dyn FnMut(u32) -> io::Result<UnixStream> + Send>;

/// What the connections may take of the process that the device runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The most connections at a time, those that wait for an answer among them.
    pub connections: usize,
    /// The first number that no connection's descriptor has. A new descriptor gets the smallest
    /// number that is free, so those from here up are left for the rest of the process.
    pub descriptors: RawFd,
}

/// A socket device.
pub struct Vsock {
    cid: u32,
    config: Arc<ConfigSpace>,
    host: Host,
    running: Option<Running>,
    /// The queue to the guest and that from it, where the driver stopped one of them: there are no
    /// connections then.
    parked: [Option<Virtqueue>; 2],
    /// Whether a driver has the device in use.
    in_use: bool,
    held: Held,
    events: Events,
}

/// What a driver's use of the device left, while the machine is held.
enum Held {
    /// Nothing: the device works, or nobody uses it.
    No,
    /// Connections, unless one of the queues was stopped.
    Here(Option<Box<Running>>),
    /// What another device left, whose connections are not here.
    Moved(VsockState),
}

/// The host's side.
struct Host {
    connect: Connect,
    listener: UnixListener,
    epoll: Epoll,
    limits: Limits,
}

/// What a driver that took the device into use makes.
struct Running {
    cid: u64,
    to_guest: Virtqueue,
    from_guest: Virtqueue,
    link: Arc<Link>,
    connections: HashMap<u64, Connection>,
    /// Tokens by port of the host and port of the guest.
    tokens: HashMap<(u32, u32), u64>,
    next_token: u64,
    next_port: u32,
    /// Those that have something for the guest, in turn.
    waiting: VecDeque<u64>,
    /// Answers "no such connection" to be sent.
    resets: VecDeque<Header>,
    /// Whether someone may wait to be accepted.
    accepting: bool,
}

impl Vsock {
    /// The device of the guest with the address `cid`. Who connects to `listener` gets to the
    /// guest; `connect` makes the guest's connections to the host. What is beyond the `limits` is
    /// refused.
    ///
    /// # Errors
    /// A process without room for more descriptors.
    pub fn new(
        cid: u32,
        listener: UnixListener,
        connect: Connect,
        limits: Limits,
    ) -> io::Result<Vsock> {
        listener.set_nonblocking(true)?;
        let host = Host {
            connect,
            listener,
            epoll: Epoll::new()?,
            limits,
        };
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        host.watch(host.listener.as_raw_fd(), edge, LISTENER)?;
        Ok(Vsock {
            cid,
            config: ConfigSpace::new(u64::from(cid).to_le_bytes().to_vec()),
            host,
            running: None,
            parked: [None, None],
            in_use: false,
            held: Held::No,
            events: Events::default(),
        })
    }

    /// Connections that there are now.
    #[must_use]
    pub fn connections(&self) -> usize {
        let running = self.running.as_ref();
        running.map_or(0, |running| running.connections.len())
    }

    /// Begins to work on both queues, with these packets to be sent first.
    fn run(
        &mut self,
        to_guest: Virtqueue,
        from_guest: Virtqueue,
        packets: impl IntoIterator<Item = Header>,
    ) {
        let running = self.running.insert(Running {
            cid: u64::from(self.cid),
            link: Arc::clone(to_guest.link()),
            to_guest,
            from_guest,
            connections: HashMap::new(),
            tokens: HashMap::new(),
            next_token: 0,
            next_port: FIRST_PORT,
            waiting: VecDeque::new(),
            resets: packets.into_iter().collect(),
            // Who came before the driver did waits still.
            accepting: true,
        });
        running.turn(&mut self.host);
    }

    /// Takes up the queues that there are, when the machine goes on.
    fn go_on(&mut self, queues: [Option<Virtqueue>; 2], held: Held) {
        let (running, packets) = match held {
            Held::No => (None, Vec::new()),
            Held::Here(running) => (running, Vec::new()),
            Held::Moved(state) => (None, state.packets),
        };
        match queues {
            [Some(to_guest), Some(from_guest)] => match running {
                Some(mut running) => {
                    running.link = Arc::clone(to_guest.link());
                    (running.to_guest, running.from_guest) = (to_guest, from_guest);
                    self.running.insert(*running).turn(&mut self.host);
                }
                None => {
                    let packets = packets.iter().map(Header::from_bytes);
                    self.run(to_guest, from_guest, packets);
                }
            },
            parked => self.parked = parked,
        }
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM
    }

    fn queue_sizes(&self) -> Vec<u16> {
        ENTRIES.to_vec()
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn start(&mut self, mut driver: Driver) -> Result<(), StartError> {
        self.events.set_queue(driver.take(EVENTS));
        self.events.tell();
        let (to_guest, from_guest) = (driver.take(RECEIVE), driver.take(TRANSMIT));
        self.in_use = true;
        let held = std::mem::replace(&mut self.held, Held::No);
        if !matches!(held, Held::No) {
            self.go_on([to_guest, from_guest], held);
            return Ok(());
        }
        let (Some(to_guest), Some(from_guest)) = (to_guest, from_guest) else {
            self.reset();
            return Err(StartError("a socket device needs both queues".to_owned()));
        };
        self.run(to_guest, from_guest, []);
        Ok(())
    }

    fn quiesce(&mut self) -> Positions {
        if !std::mem::take(&mut self.in_use) {
            return Positions::new();
        }
        let mut positions = quiesced(self.parked.iter_mut().flatten());
        self.parked = [None, None];
        positions.extend(self.events.quiesce());
        let mut running = self.running.take();
        if let Some(Running {
            to_guest,
            from_guest,
            ..
        }) = &mut running
        {
            positions.extend(quiesced([to_guest, from_guest]));
        }
        self.held = Held::Here(running.map(Box::new));
        positions
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(match &self.held {
            Held::No => VsockState::default(),
            Held::Moved(state) => state.clone(),
            Held::Here(running) => {
                let running = running.as_ref();
                let packets = running.map(|running| running.resets.iter());
                VsockState {
                    in_use: true,
                    had_connections: self.events.owes_reset()
                        || running.is_some_and(|running| !running.connections.is_empty()),
                    packets: packets
                        .into_iter()
                        .flatten()
                        .map(|packet| packet.to_bytes())
                        .collect(),
                }
            }
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Vsock(state) = state else {
            return Err(RestoreError::kind(state));
        };
        let most = MOST_RESETS + self.host.limits.connections;
        let has_data = |packet: &[u8; HEADER]| Header::from_bytes(packet).len != 0;
        if state.packets.len() > most || state.packets.iter().any(has_data) {
            return Err(RestoreError(format!(
                "more than {most} packets wait for the guest, or some that have data"
            )));
        }
        if state.in_use {
            self.events.owe_reset(state.had_connections);
            self.held = Held::Moved(state.clone());
        }
        Ok(())
    }

    fn reset(&mut self) {
        // The host's ends see their connections close.
        self.running = None;
        self.held = Held::No;
        self.parked = [None, None];
        self.events = Events::default();
        self.in_use = false;
    }

    fn stop_queue(&mut self, queue: usize) {
        if queue > TRANSMIT {
            self.events.set_queue(None);
            return;
        }
        if let Some(running) = self.running.take() {
            self.parked = [Some(running.to_guest), Some(running.from_guest)];
        }
        self.parked[queue] = None;
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Result<(), StartError> {
        let index = usize::from(queue.index());
        match self.parked.get_mut(index) {
            Some(place) => *place = Some(queue),
            None => {
                self.events.set_queue(Some(queue));
                self.events.tell();
            }
        }
        if self.parked.iter().all(Option::is_some)
            && let [Some(to_guest), Some(from_guest)] = std::mem::take(&mut self.parked)
        {
            self.run(to_guest, from_guest, []);
        }
        Ok(())
    }

    fn kicked(&mut self, queue: usize) {
        if queue == EVENTS {
            self.events.tell();
        }
        if let Some(running) = &mut self.running {
            running.turn(&mut self.host);
        }
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source {
            fd: self.host.epoll.as_raw_fd(),
            output: false,
            edge: false,
        }]
    }

    fn ready(&mut self, _source: usize) {
        let mut events = [EpollEvent::default(); WAKES];
        // An error is a signal that came in between: what is ready stays so.
        let count = self.host.epoll.wait(0, &mut events).unwrap_or(0);
        let running = match (&mut self.running, &mut self.held) {
            (Some(running), _) => running,
            (None, Held::Here(Some(running))) => &mut **running,
            _ => return,
        };
        for event in &events[..count] {
            running.note(event.data(), event.event_set());
        }
        if let Some(running) = &mut self.running {
            running.turn(&mut self.host);
        }
    }
}

impl Host {
    fn watch(&self, fd: i32, events: EventSet, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(events, token);
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }
}

impl Running {
    /// Takes note of what happened to a descriptor.
    fn note(&mut self, token: u64, events: EventSet) {
        if token == LISTENER {
            self.accepting = true;
        }
        // One that went since the event came is not found.
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if events.intersects(EventSet::OUT) {
            connection.flush();
        }
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            connection.note_gone();
        }
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP) {
            connection.note_readable();
        }
        if let State::Greeting(_) = connection.state {
            self.greet(token);
        }
        self.settle(token);
    }

    /// Does what there is to do on both sides, but not for ever.
    fn turn(&mut self, host: &mut Host) {
        let mut left = TURN;
        let mut more = self.accept(host);
        loop {
            self.send(&mut left);
            let taken = self.take(host, &mut left);
            if left == 0 {
                more = true;
                break;
            }
            // What was taken may have an answer.
            if taken == 0 {
                break;
            }
        }
        self.to_guest.signal();
        self.from_guest.signal();
        if more {
            ring(self.from_guest.kick());
        }
    }

    // ------------------------------------------------------------------------- from the host

    /// Takes those who connect to the guest; returns whether there may be more of them.
    fn accept(&mut self, host: &Host) -> bool {
        for _ in 0..ACCEPTS {
            if !self.accepting {
                return false;
            }
            match host.listener.accept() {
                // Beyond the bound the stream closes at once, and who connected sees that.
                Ok((stream, _)) if self.connections.len() < host.limits.connections => {
                    let _ = self.add(host, stream, State::Greeting(Vec::new()));
                }
                Ok(_) => {}
                // Nobody there; or no descriptors left, and then it goes on with the next one
                // who connects.
                Err(_) => self.accepting = false,
            }
        }
        self.accepting
    }

    /// Adds a connection and returns its token.
    fn add(&mut self, host: &Host, stream: UnixStream, state: State) -> io::Result<u64> {
        if stream.as_raw_fd() >= host.limits.descriptors {
            return Err(io::Error::other("its descriptor is kept for other things"));
        }
        stream.set_nonblocking(true)?;
        let token = self.next_token;
        let all = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        host.watch(stream.as_raw_fd(), all, token)?;
        self.next_token += 1;
        self.connections
            .insert(token, Connection::new(stream, state));
        Ok(token)
    }

    /// Reads where a host's end wants to go, and has the guest asked for it.
    fn greet(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        match connection.greet() {
            Ok(None) => {}
            Ok(Some(guest_port)) => {
                let host_port = self.free_port(guest_port);
                self.name(token, (host_port, guest_port), State::Asking);
            }
            Err(Dead) => self.forget(token),
        }
    }

    /// A port of the host's side that has no connection to this one of the guest.
    fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let port = self.next_port;
            // u32::MAX stands for "any port".
            self.next_port = match port {
                FIRST_PORT..0xffff_fffe => port + 1,
                _ => FIRST_PORT,
            };
            // There are fewer connections than ports.
            if !self.tokens.contains_key(&(port, guest_port)) {
                return port;
            }
        }
    }

    fn name(&mut self, token: u64, ports: (u32, u32), state: State) {
        if let Some(connection) = self.connections.get_mut(&token) {
            (connection.host_port, connection.guest_port) = ports;
            connection.state = state;
            self.tokens.insert(ports, token);
        }
    }

    /// After something happened to a connection: it ends, or waits for its turn to send, or waits.
    fn settle(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if connection.is_abandoned() && connection.state == State::Asking {
            // The guest never heard of it.
            self.forget(token);
        } else if connection.is_abandoned() || connection.is_over() {
            self.reset(token);
        } else if !connection.queued && connection.next().is_some() {
            connection.queued = true;
            self.waiting.push_back(token);
        }
    }

    /// Ends a connection for the host's end.
    fn forget(&mut self, token: u64) {
        if let Some(connection) = self.connections.remove(&token) {
            let ports = (connection.host_port, connection.guest_port);
            if self.tokens.get(&ports) == Some(&token) {
                self.tokens.remove(&ports);
            }
            // A guest that takes nothing must not make it grow.
            if connection.queued {
                self.waiting.retain(|waiting| *waiting != token);
            }
        }
    }

    /// Ends a connection for both ends.
    fn reset(&mut self, token: u64) {
        if let Some(connection) = self.connections.get(&token) {
            let mut header = Header {
                src_cid: HOST_CID,
                dst_cid: self.cid,
                kind: STREAM,
                op: Op::Reset.number(),
                ..Header::default()
            };
            connection.name(&mut header);
            self.resets.push_back(header);
            self.forget(token);
        }
    }

    // -------------------------------------------------------------------------- to the guest

    /// Sends what there is, as long as the guest has buffers.
    fn send(&mut self, left: &mut usize) {
        self.to_guest.silence();
        while *left > 0 && (!self.resets.is_empty() || !self.waiting.is_empty()) {
            let Some(chain) = self.to_guest.pop() else {
                if self.to_guest.listen() {
                    continue;
                }
                return;
            };
            *left -= 1;
            if !chain.is_whole() {
                self.to_guest.complete(chain, 0);
                continue;
            }
            if chain.writable_len() <= HEADER {
                let room = chain.writable_len();
                self.link.fault(format_args!(
                    "a buffer for packets has {room} bytes, no more than the {HEADER} of a header"
                ));
                self.to_guest.complete(chain, 0);
                continue;
            }
            match self.resets.pop_front() {
                Some(header) => self.put(chain, header),
                None => self.send_next(chain),
            }
        }
    }

    /// Sends one packet of the connection whose turn it is, or leaves the buffer be.
    fn send_next(&mut self, chain: Chain) {
        let token = self.waiting.pop_front();
        let connection = token.and_then(|token| self.connections.get_mut(&token));
        let (Some(token), Some(connection)) = (token, connection) else {
            self.to_guest.undo_pop(chain);
            return;
        };
        connection.queued = false;
        let mut header = Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            kind: STREAM,
            ..Header::default()
        };
        let got = match connection.next() {
            None => Ok(Got::Nothing),
            Some(Op::Data) => {
                let room = (chain.writable_len() - HEADER).min(MOST_DATA);
                let room = room.min(connection.credit() as usize);
                let got = connection.read_into(self.to_guest.memory(), &chain, room);
                if let Ok(Got::Bytes(len)) = got {
                    connection.sending(Op::Data, len, &mut header);
                }
                got
            }
            Some(op) => {
                connection.sending(op, 0, &mut header);
                Ok(Got::Bytes(0))
            }
        };
        match got {
            Ok(Got::Bytes(_)) => self.put(chain, header),
            Ok(Got::Nothing) => self.to_guest.undo_pop(chain),
            Err(Dead) => {
                self.to_guest.undo_pop(chain);
                self.reset(token);
            }
        }
        self.settle(token);
    }

    /// Completes a buffer that has the packet's data in it already.
    fn put(&mut self, chain: Chain, header: Header) {
        chain.write(self.to_guest.memory(), 0, &header.to_bytes());
        self.to_guest.complete(chain, HEADER as u32 + header.len);
    }

    // ------------------------------------------------------------------------ from the guest

    /// Takes packets of the guest; returns how many.
    fn take(&mut self, host: &mut Host, left: &mut usize) -> usize {
        let mut taken = 0;
        self.from_guest.silence();
        // With too many answers to be sent it goes on when the guest makes room for them.
        while *left > 0 && self.resets.len() < MOST_RESETS {
            let Some(chain) = self.from_guest.pop() else {
                if self.from_guest.listen() {
                    continue;
                }
                break;
            };
            *left -= 1;
            taken += 1;
            self.packet(host, &chain);
            self.from_guest.complete(chain, 0);
        }
        taken
    }

    fn packet(&mut self, host: &mut Host, chain: &Chain) {
        let mut bytes = [0; HEADER];
        if chain.read(self.from_guest.memory(), 0, &mut bytes) < HEADER {
            let len = chain.readable_len();
            let link = &self.link;
            link.fault(format_args!("a packet has {len} bytes, less than a header"));
            return;
        }
        let header = Header::from_bytes(&bytes);
        if header.src_cid != self.cid {
            self.link.fault(format_args!(
                "a packet comes from address {}, not from the guest's {}",
                header.src_cid, self.cid
            ));
            return;
        }
        let ports = (header.dst_port, header.src_port);
        let here = header.dst_cid == HOST_CID && header.kind == STREAM;
        let token = self.tokens.get(&ports).copied().filter(|_| here);
        let op = Op::of(header.op);
        match (op, token) {
            (Some(Op::Reset), Some(token)) => self.forget(token),
            (Some(Op::Reset), None) => {}
            (Some(Op::Request), None) if here => self.request(host, &header),
            (Some(op), Some(token)) => {
                if self.operate(token, op, &header, chain) == Err(Dead) {
                    self.link.fault(format_args!(
                        "{op:?} of {} bytes is against the rules of connection {ports:?}",
                        header.len
                    ));
                    self.reset(token);
                }
                self.settle(token);
            }
            (None, Some(token)) => {
                let op = header.op;
                self.link.fault(format_args!("operation {op} is not known"));
                self.reset(token);
            }
            // No such connection, address or type.
            (_, None) => self.refuse(&header),
        }
    }

    /// The guest connects to a port of the host.
    fn request(&mut self, host: &mut Host, header: &Header) {
        if self.connections.len() >= host.limits.connections {
            self.refuse(header);
            return;
        }
        let stream = (host.connect)(header.dst_port);
        let added = stream.and_then(|stream| self.add(host, stream, State::Answering));
        let Ok(token) = added else {
            self.refuse(header);
            return;
        };
        let ports = (header.dst_port, header.src_port);
        self.name(token, ports, State::Answering);
        if let Some(connection) = self.connections.get_mut(&token) {
            connection.take_credit(header);
        }
        self.settle(token);
    }

    /// Does what a packet for a connection asks for.
    fn operate(&mut self, token: u64, op: Op, header: &Header, chain: &Chain) -> Result<(), Dead> {
        let connection = self.connections.get_mut(&token).ok_or(Dead)?;
        connection.take_credit(header);
        let len = header.len as usize;
        match (op, &connection.state) {
            (Op::Response, State::Asked) => connection.establish(),
            (Op::Data, State::Open) if len <= chain.readable_len() - HEADER => {
                connection.write_from(self.from_guest.memory(), chain, len)
            }
            (Op::Shutdown, State::Open) => {
                connection.shut(header.flags);
                Ok(())
            }
            (Op::CreditRequest, State::Open) => {
                connection.want_credit();
                Ok(())
            }
            (Op::CreditUpdate, _) => Ok(()),
            _ => Err(Dead),
        }
    }

    /// Answers that there is no such connection (virtio 1.2, section 5.10.6.4.2).
    fn refuse(&mut self, header: &Header) {
        self.resets.push_back(Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: header.kind,
            op: Op::Reset.number(),
            ..Header::default()
        });
    }
}

#[cfg(test)]
mod tests;
