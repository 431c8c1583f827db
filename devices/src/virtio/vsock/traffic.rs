//! The packets and connections of a guest that uses its socket device.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Dead, Got, State};
use super::host::{Host, LISTENER};
use super::packet::{HEADER, Header, Op, STREAM};
use crate::sync::ring;
use crate::virtio::{Chain, Link, Virtqueue};

/// VMADDR_CID_HOST: the host's address.
pub(super) const HOST_CID: u64 = 2;

/// The most reset packets that wait for the guest's buffers; beyond that, the guest's own packets
/// are not processed.
pub(super) const MOST_RESETS: usize = 256;
/// The most packets moved in one turn, so that whoever waits for the device gets it.
const TURN: usize = 512;
/// The most bytes in one packet to the guest, the same as Linux sends, so that connections share
/// the device fairly.
const MOST_DATA: usize = 64 << 10;
/// The most connections accepted in one turn.
const ACCEPTS: usize = 32;
/// The first of the host-side ports for processes that connect to the guest, chosen to avoid ports
/// that guests use.
pub(super) const FIRST_PORT: u32 = 1 << 30;

/// The connections and queues while a driver uses the device.
pub(super) struct Traffic {
    cid: u64,
    pub(super) to_guest: Virtqueue,
    pub(super) from_guest: Virtqueue,
    pub(super) link: Arc<Link>,
    pub(super) connections: HashMap<u64, Connection>,
    /// Tokens by host port and guest port.
    pub(super) tokens: HashMap<(u32, u32), u64>,
    next_token: u64,
    next_port: u32,
    /// The connections with something to send to the guest, in turn.
    pub(super) waiting: VecDeque<u64>,
    /// Reset packets ("no such connection") to be sent.
    pub(super) resets: VecDeque<Header>,
    /// Whether there may be connections to accept.
    accepting: bool,
}

impl Traffic {
    /// Creates the traffic of the guest with the address `cid` on these queues, with these packets
    /// to be sent first.
    pub(super) fn new(
        cid: u32,
        to_guest: Virtqueue,
        from_guest: Virtqueue,
        packets: impl IntoIterator<Item = Header>,
    ) -> Traffic {
        Traffic {
            cid: u64::from(cid),
            link: Arc::clone(to_guest.link()),
            to_guest,
            from_guest,
            connections: HashMap::new(),
            tokens: HashMap::new(),
            next_token: 0,
            next_port: FIRST_PORT,
            waiting: VecDeque::new(),
            resets: packets.into_iter().collect(),
            // Processes may have connected before the driver started.
            accepting: true,
        }
    }

    /// Records events of a descriptor.
    pub(super) fn note(&mut self, token: u64, events: EventSet) {
        if token == LISTENER {
            self.accepting = true;
        }
        // The connection may have ended since the event was raised.
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

    /// Moves packets both ways, up to [`TURN`] of them.
    pub(super) fn turn(&mut self, host: &mut Host) {
        let mut left = TURN;
        let mut more = self.accept(host);
        loop {
            self.send(&mut left);
            let taken = self.take(host, &mut left);
            if left == 0 {
                more = true;
                break;
            }
            // Packets that were processed may have replies.
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

    /// Accepts connections to the guest; returns whether there may be more.
    fn accept(&mut self, host: &Host) -> bool {
        for _ in 0..ACCEPTS {
            if !self.accepting {
                return false;
            }
            match host.listener.accept() {
                // Beyond the limit the stream is closed at once, which the other end sees.
                Ok((stream, _)) if self.connections.len() < host.limits.connections => {
                    let _ = self.add(host, stream, State::Greeting(Vec::new()));
                }
                Ok(_) => {}
                // No pending connection; or no descriptors left, and the next connection triggers
                // another attempt.
                Err(_) => self.accepting = false,
            }
        }
        self.accepting
    }

    /// Adds a connection and returns its token.
    fn add(&mut self, host: &Host, stream: UnixStream, state: State) -> io::Result<u64> {
        if stream.as_raw_fd() >= host.limits.descriptors {
            return Err(io::Error::other(
                "its descriptor is reserved for other uses",
            ));
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

    /// Reads the first line of a host's end, and queues the request to the guest when it is
    /// complete.
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

    /// Returns a host port that has no connection to this guest port.
    fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let port = self.next_port;
            // u32::MAX is VMADDR_PORT_ANY.
            self.next_port = match port {
                FIRST_PORT..0xffff_fffe => port + 1,
                _ => FIRST_PORT,
            };
            // This ends, because there are fewer connections than ports.
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

    /// Decides what follows an event of a connection: it ends, is queued to send, or stays idle.
    fn settle(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if connection.is_abandoned() && connection.state == State::Asking {
            // The guest was never told of it.
            self.forget(token);
        } else if connection.is_abandoned() || connection.is_over() {
            self.reset(token);
        } else if !connection.queued && connection.next().is_some() {
            connection.queued = true;
            self.waiting.push_back(token);
        }
    }

    /// Closes a connection's host end and forgets it.
    fn forget(&mut self, token: u64) {
        if let Some(connection) = self.connections.remove(&token) {
            let ports = (connection.host_port, connection.guest_port);
            if self.tokens.get(&ports) == Some(&token) {
                self.tokens.remove(&ports);
            }
            // Otherwise the list would grow while the guest has no buffers.
            if connection.queued {
                self.waiting.retain(|waiting| *waiting != token);
            }
        }
    }

    /// Resets a connection for both ends.
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

    /// Sends packets to the guest while it has buffers.
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
                    "a receive buffer has {room} bytes and cannot hold data beside the header of {HEADER}"
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

    /// Sends one packet of the next connection in turn, or puts the buffer back.
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

    /// Writes the header of a packet whose data is already in the buffer, and completes it.
    fn put(&mut self, chain: Chain, header: Header) {
        chain.write(self.to_guest.memory(), 0, &header.to_bytes());
        self.to_guest.complete(chain, HEADER as u32 + header.len);
    }

    // ------------------------------------------------------------------------ from the guest

    /// Processes packets of the guest; returns how many.
    fn take(&mut self, host: &mut Host, left: &mut usize) -> usize {
        let mut taken = 0;
        self.from_guest.silence();
        // When too many resets wait, this continues once the guest has buffers for them.
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
                        "{op:?} of {} bytes violates the protocol of connection {ports:?}",
                        header.len
                    ));
                    self.reset(token);
                }
                self.settle(token);
            }
            (None, Some(token)) => {
                let op = header.op;
                self.link.fault(format_args!("unknown operation {op}"));
                self.reset(token);
            }
            // No such connection, address or type.
            (_, None) => self.refuse(&header),
        }
    }

    /// Connects the guest to a port of the host, or refuses it.
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

    /// Handles a packet for an existing connection.
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
