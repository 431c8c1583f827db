//! The socket device between a guest made of rings and real Unix sockets.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::RawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EventSet};

use super::connection::BUFFER;
use super::packet::{Op, SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND, STREAM};
use super::traffic::{FIRST_PORT, HOST_CID};
use super::*;
use crate::virtio::fake::Guest;
use crate::virtio::lock;

mod anything;
mod ends;
mod held;
mod misuse;

const CID: u32 = 7;
/// Bytes of data in each of the guest's buffers.
const ROOM: usize = 2000;
/// Buffers that the guest has for packets, unless a test says otherwise.
const BUFFERS: usize = 16;
/// The guest's socket buffer.
const ALLOC: u32 = 1 << 20;

/// A test has both ends of each connection, and no more descriptors than others.
const LIMITS: Limits = Limits {
    connections: 100,
    descriptors: RawFd::MAX,
};

/// A guest with its driver, and the host around it.
struct World {
    guest: Guest<Vsock>,
    name: String,
    /// Packets that came and nobody looked at.
    inbox: VecDeque<(Header, Vec<u8>)>,
    /// Whether each buffer that was used is given again.
    refill: bool,
    /// Waits for the device's source, as whoever runs its thread does.
    reactor: Epoll,
}

fn address(name: &str) -> SocketAddr {
    SocketAddr::from_abstract_name(name).expect("a short name")
}

impl World {
    /// With a driver that has the device in use.
    fn new() -> World {
        let mut world = World::asleep();
        world.start();
        world.give(BUFFERS);
        world
    }

    /// With a driver that has not looked at the device.
    fn asleep() -> World {
        World::within(LIMITS)
    }

    fn within(limits: Limits) -> World {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("armlet-vsock-test-{}-{number}", std::process::id());
        let listener = UnixListener::bind_addr(&address(&name)).expect("a new name");
        let prefix = name.clone();
        let connect = move |port| UnixStream::connect_addr(&address(&format!("{prefix}_{port}")));
        let device = Vsock::new(CID, listener, Box::new(connect), limits).expect("descriptors");
        let reactor = Epoll::new().expect("a descriptor");
        let [source] = device.sources()[..] else {
            panic!("one source");
        };
        let event = EpollEvent::new(EventSet::IN, 0);
        let added = reactor.ctl(ControlOperation::Add, source.fd, event);
        added.expect("a descriptor");
        World {
            guest: Guest::new(device),
            name,
            inbox: VecDeque::new(),
            refill: true,
            reactor,
        }
    }

    fn start(&mut self) {
        self.guest.start(FEATURE_STREAM);
    }

    /// Gives the device buffers for packets.
    fn give(&mut self, count: usize) {
        for _ in 0..count {
            self.guest.request(RECEIVE, &[], &[HEADER + ROOM]);
        }
        self.guest.kick(RECEIVE);
    }

    /// Listens on a port of the host.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind_addr(&address(&format!("{}_{port}", self.name))).expect("a new port")
    }

    /// Connects to the device, which has to hear of it.
    fn dial(&mut self, line: &str) -> UnixStream {
        let mut stream = UnixStream::connect_addr(&address(&self.name)).expect("it listens");
        stream.set_nonblocking(true).expect("a socket");
        stream.write_all(line.as_bytes()).expect("room");
        stream
    }

    /// Sends a packet as the guest.
    fn send(&mut self, header: Header, data: &[u8]) {
        let len = data.len() as u32;
        self.send_raw(Header { len, ..header }, data);
    }

    fn send_raw(&mut self, header: Header, data: &[u8]) {
        self.guest
            .request(TRANSMIT, &[&header.to_bytes(), data], &[]);
        self.guest.kick(TRANSMIT);
        self.guest.used(TRANSMIT);
    }

    /// Lets the device work until there is nothing left that came in so far.
    fn run(&mut self) {
        loop {
            let events = self.reactor.wait(0, &mut [EpollEvent::default()]);
            let is_ready = events.expect("a wait") > 0;
            if is_ready {
                lock(&self.guest.device).ready(0);
            }
            self.guest.kick(RECEIVE);
            self.guest.kick(TRANSMIT);
            let used = self.guest.used(RECEIVE);
            if used.is_empty() && !is_ready {
                return;
            }
            if self.refill {
                self.give(used.len());
            }
            for (_, mut bytes) in used {
                let data = bytes.split_off(HEADER);
                let header = Header::from_bytes(&bytes.try_into().expect("a header"));
                assert_eq!(header.len as usize, data.len());
                assert_eq!(header.dst_cid, u64::from(CID));
                self.inbox.push_back((header, data));
            }
        }
    }

    /// Returns the next packet, which must be there and of this kind.
    fn expect(&mut self, op: Op) -> (Header, Vec<u8>) {
        if self.inbox.is_empty() {
            self.run();
        }
        let (header, data) = self.inbox.pop_front().expect("a packet");
        assert_eq!(Op::of(header.op), Some(op), "{header:?}");
        (header, data)
    }

    fn expect_silence(&mut self) {
        self.run();
        assert_eq!(self.inbox, []);
    }

    /// Returns a connection of the guest to a port of the host: the guest's port and the host's
    /// stream.
    fn connection(&mut self, guest_port: u32, host_port: u32) -> UnixStream {
        let listener = self.listen(host_port);
        self.send(packet(Op::Request, guest_port, host_port), &[]);
        let (answer, _) = self.expect(Op::Response);
        assert_eq!((answer.src_cid, answer.src_port), (HOST_CID, host_port));
        assert_eq!(answer.dst_port, guest_port);
        assert_eq!(answer.buf_alloc, BUFFER);
        let (stream, _) = listener.accept().expect("a connection");
        stream.set_nonblocking(true).expect("a socket");
        stream
    }

    fn connections(&self) -> usize {
        lock(&self.guest.device).connections()
    }

    fn faults(&self) -> u64 {
        self.guest.mmio.faults()
    }
}

/// Returns a packet of the guest's.
fn packet(op: Op, guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: u64::from(CID),
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: STREAM,
        op: op.number(),
        buf_alloc: ALLOC,
        ..Header::default()
    }
}

/// Returns what can be read now.
fn read_now(mut stream: &UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut part = [0; 4096];
    loop {
        match stream.read(&mut part) {
            Ok(0) => return all,
            Ok(len) => all.extend(&part[..len]),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
                return all;
            }
        }
    }
}

/// Returns whether the other end sends no more.
fn is_ended(mut stream: &UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(0) => true,
        Ok(_) => panic!("there is something to read"),
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

/// Bytes of which no two stretches are alike.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(next).collect()
}

/// Sends as the guest what it may until the host's end takes no more, and returns all of it.
fn fill(world: &mut World) -> Vec<u8> {
    let all = pattern(4 << 20);
    let mut sent = 0;
    let mut forwarded = 0;
    loop {
        let room = BUFFER as usize - (sent - forwarded);
        let len = room.min(60_000);
        if len == 0 {
            return all[..sent].to_vec();
        }
        world.send(packet(Op::Data, 1000, 52), &all[sent..sent + len]);
        sent += len;
        world.run();
        while let Some((header, _)) = world.inbox.pop_front() {
            assert_eq!(Op::of(header.op), Some(Op::CreditUpdate));
            forwarded = header.fwd_cnt as usize;
        }
    }
}

#[test]
fn the_guest_reaches_a_port_of_the_host() {
    let mut world = World::new();
    let mut stream = world.connection(1000, 52);
    world.send(packet(Op::Data, 1000, 52), b"from the guest");
    assert_eq!(read_now(&stream), b"from the guest");
    stream.write_all(b"from the host").expect("room");
    let (header, data) = world.expect(Op::Data);
    assert_eq!((header.src_port, header.dst_port), (52, 1000));
    assert_eq!(header.fwd_cnt, 14);
    assert_eq!(data, b"from the host");
    assert_eq!(world.faults(), 0);
}

#[test]
fn a_port_where_nobody_listens_is_refused() {
    let mut world = World::new();
    world.send(packet(Op::Request, 1000, 52), &[]);
    let (answer, _) = world.expect(Op::Reset);
    assert_eq!((answer.src_port, answer.dst_port), (52, 1000));
    assert_eq!(world.connections(), 0);
}

#[test]
fn the_host_reaches_a_port_of_the_guest() {
    let mut world = World::new();
    let mut stream = world.dial("CONNECT 52\n");
    let (request, _) = world.expect(Op::Request);
    assert_eq!((request.src_cid, request.dst_port), (HOST_CID, 52));
    let port = request.src_port;
    assert_eq!(read_now(&stream), b"");
    world.send(packet(Op::Response, 52, port), &[]);
    assert_eq!(read_now(&stream), format!("OK {port}\n").as_bytes());
    stream.write_all(b"hello").expect("room");
    assert_eq!(world.expect(Op::Data).1, b"hello");
    world.send(packet(Op::Data, 52, port), b"hello yourself");
    assert_eq!(read_now(&stream), b"hello yourself");
}

#[test]
fn what_the_host_sends_right_behind_its_greeting_arrives() {
    let mut world = World::new();
    let stream = world.dial("CONNECT 52\nhello");
    stream.shutdown(Shutdown::Write).expect("a socket");
    let port = world.expect(Op::Request).0.src_port;
    world.send(packet(Op::Response, 52, port), &[]);
    assert_eq!(world.expect(Op::Data).1, b"hello");
    assert_eq!(world.expect(Op::Shutdown).0.flags, SHUT_SEND);
}

#[test]
fn two_of_the_host_at_one_port_of_the_guest_are_told_apart() {
    let mut world = World::new();
    let first = world.dial("CONNECT 52\n");
    let second = world.dial("CONNECT 52\n");
    let ports = [(); 2].map(|()| world.expect(Op::Request).0.src_port);
    assert_ne!(ports[0], ports[1]);
    for port in ports {
        world.send(packet(Op::Response, 52, port), &[]);
    }
    world.send(packet(Op::Data, 52, ports[0]), b"one");
    world.send(packet(Op::Data, 52, ports[1]), b"two");
    assert!(read_now(&first).ends_with(b"\none"));
    assert!(read_now(&second).ends_with(b"\ntwo"));
}

#[test]
fn a_guest_that_refuses_closes_the_hosts_end() {
    let mut world = World::new();
    let stream = world.dial("CONNECT 52\n");
    let port = world.expect(Op::Request).0.src_port;
    world.send(packet(Op::Reset, 52, port), &[]);
    assert!(is_ended(&stream));
    assert_eq!(world.connections(), 0);
}

#[test]
fn who_connects_before_the_guest_is_up_waits() {
    let mut world = World::asleep();
    let stream = world.dial("CONNECT 52\n");
    world.run();
    world.start();
    world.give(BUFFERS);
    let port = world.expect(Op::Request).0.src_port;
    world.send(packet(Op::Response, 52, port), &[]);
    assert!(read_now(&stream).starts_with(b"OK "));
}

#[test]
fn a_greeting_may_come_in_pieces() {
    let mut world = World::new();
    let mut stream = world.dial("CONN");
    world.expect_silence();
    stream.write_all(b"ECT 52").expect("room");
    world.expect_silence();
    stream.write_all(b"\r\n").expect("room");
    assert_eq!(world.expect(Op::Request).0.dst_port, 52);
}

#[test]
fn a_wrong_greeting_is_hung_up_on() {
    let mut world = World::new();
    for greeting in [
        "\n",
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT 4294967296\n",
        "connect 52\n",
        "GET / HTTP/1.1 and more without an end",
        "CONNECT 52 \u{fffd}\n",
    ] {
        let stream = world.dial(greeting);
        world.expect_silence();
        assert!(is_ended(&stream), "{greeting:?}");
        assert_eq!(world.connections(), 0, "{greeting:?}");
    }
}

#[test]
fn one_who_leaves_before_an_answer_leaves_nothing_behind() {
    let mut world = World::new();
    let stream = world.dial("CONNECT 52\n");
    let port = world.expect(Op::Request).0.src_port;
    drop(stream);
    assert_eq!(world.expect(Op::Reset).0.src_port, port);
    assert_eq!(world.connections(), 0);

    // Where the guest was not asked yet, it does not hear of it.
    world.refill = false;
    for _ in 0..BUFFERS {
        world.send(packet(Op::Request, 1, 1), &[]);
    }
    world.run();
    let stream = world.dial("CONNECT 52\n");
    world.run();
    assert_eq!(world.connections(), 1);
    drop(stream);
    world.run();
    assert_eq!(world.connections(), 0);
    world.inbox.clear();
    world.give(BUFFERS);
    world.expect_silence();
}

#[test]
fn many_connections_work_side_by_side() {
    let mut world = World::new();
    let streams: Vec<UnixStream> = (0..LIMITS.connections as u32)
        .map(|index| world.connection(1000 + index, index))
        .collect();
    for (mut stream, index) in streams.iter().zip(0_u32..) {
        stream.write_all(&index.to_le_bytes()).expect("room");
    }
    for index in 0..LIMITS.connections as u32 {
        let header = packet(Op::Data, 1000 + index, index);
        world.send(header, &index.to_be_bytes());
    }
    for (stream, index) in streams.iter().zip(0_u32..) {
        assert_eq!(read_now(stream), index.to_be_bytes());
        let (header, data) = world.expect(Op::Data);
        assert_eq!(data, header.src_port.to_le_bytes());
    }
    // One more is one too many, from either side.
    let _listener = world.listen(5000);
    world.send(packet(Op::Request, 5000, 5000), &[]);
    world.expect(Op::Reset);
    let stream = world.dial("CONNECT 52\n");
    world.expect_silence();
    assert!(is_ended(&stream));
    // And when one ends there is room again.
    world.send(packet(Op::Reset, 1000, 0), &[]);
    world.send(packet(Op::Request, 5000, 5000), &[]);
    world.expect(Op::Response);
}

#[test]
fn connections_leave_descriptors_for_the_rest_of_the_process() {
    // All numbers below 3 are taken.
    let mut world = World::within(Limits {
        descriptors: 3,
        ..LIMITS
    });
    world.start();
    world.give(BUFFERS);
    let listener = world.listen(5000);
    world.send(packet(Op::Request, 1000, 5000), &[]);
    world.expect(Op::Reset);
    let (stream, _) = listener.accept().expect("it was there for a moment");
    stream.set_nonblocking(true).expect("a socket");
    assert!(is_ended(&stream));
    let stream = world.dial("CONNECT 52\n");
    world.expect_silence();
    assert!(is_ended(&stream));
    assert_eq!(world.connections(), 0);
}

#[test]
fn a_queue_that_is_stopped_ends_all_connections_and_new_ones_are_made_with_both() {
    for queue in [RECEIVE, TRANSMIT] {
        let mut world = World::new();
        let stream = world.connection(1000, 80);
        world.guest.stop_queue(queue as u32);
        assert!(is_ended(&stream));
        assert_eq!(world.connections(), 0);
        world.run();
        world.guest.set_up_queue(queue as u32);
        if queue == RECEIVE {
            world.give(BUFFERS);
        }
        let mut stream = world.connection(1001, 81);
        stream.write_all(b"hello").expect("room");
        assert_eq!(world.expect(Op::Data).1, b"hello");
        // That of events has none, stopped or not.
        world.guest.stop_queue(2);
        world.guest.set_up_queue(2);
        assert_eq!(world.connections(), 1);
        assert_eq!(world.faults(), 0);
    }
}
