//! The socket device between a guest made of rings and real Unix sockets.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::connection::BUFFER;
use super::packet::{SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND};
use super::*;
use crate::virtio::fake::Guest;
use crate::virtio::lock;

mod held;

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

    /// The next packet, which must be there and of this kind.
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

    /// A connection of the guest to a port of the host: the guest's port and the host's stream.
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

/// A packet of the guest's.
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

/// What can be read now.
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

/// Whether the other end sends no more.
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

// ------------------------------------------------------------------------- connections

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

// ------------------------------------------------------------------------------- ends

#[test]
fn the_hosts_end_of_sending_comes_behind_its_data() {
    let mut world = World::new();
    let mut stream = world.connection(1000, 52);
    let sent = pattern(10 * ROOM);
    stream.write_all(&sent).expect("room");
    stream.shutdown(Shutdown::Write).expect("a socket");
    let mut received = Vec::new();
    while received.len() < sent.len() {
        received.extend(world.expect(Op::Data).1);
    }
    assert!(received == sent);
    assert_eq!(world.expect(Op::Shutdown).0.flags, SHUT_SEND);
    // The other direction works on.
    world.send(packet(Op::Data, 1000, 52), b"still here");
    assert_eq!(read_now(&stream), b"still here");
    let end = Header {
        flags: SHUT_BOTH,
        ..packet(Op::Shutdown, 1000, 52)
    };
    world.send(end, &[]);
    world.expect(Op::Reset);
    assert!(is_ended(&stream));
    assert_eq!(world.connections(), 0);
}

#[test]
fn the_guests_end_of_sending_leaves_the_other_direction() {
    let mut world = World::new();
    let mut stream = world.connection(1000, 52);
    world.send(packet(Op::Data, 1000, 52), b"that is all");
    let end = Header {
        flags: SHUT_SEND,
        ..packet(Op::Shutdown, 1000, 52)
    };
    world.send(end, &[]);
    assert_eq!(read_now(&stream), b"that is all");
    assert!(is_ended(&stream));
    stream.write_all(b"not for me").expect("room");
    assert_eq!(world.expect(Op::Data).1, b"not for me");
    // What comes after the end breaks the rules.
    world.send(packet(Op::Data, 1000, 52), b"one more thing");
    world.expect(Op::Reset);
    assert_eq!(world.faults(), 1);
}

#[test]
fn a_guest_that_takes_no_more_stops_the_hosts_end() {
    let mut world = World::new();
    let mut stream = world.connection(1000, 52);
    let end = Header {
        flags: SHUT_RECEIVE,
        ..packet(Op::Shutdown, 1000, 52)
    };
    world.send(end, &[]);
    let error = stream.write_all(b"too late").expect_err("nobody reads it");
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    world.send(packet(Op::Data, 1000, 52), b"bye");
    assert_eq!(read_now(&stream), b"bye");
}

#[test]
fn the_hosts_close_is_told_and_answered() {
    let mut world = World::new();
    let mut stream = world.connection(1000, 52);
    stream.write_all(b"bye").expect("room");
    drop(stream);
    assert_eq!(world.expect(Op::Data).1, b"bye");
    assert_eq!(world.expect(Op::Shutdown).0.flags, SHUT_BOTH);
    // What was under way is nobody's any more, but the guest gets its room back.
    world.send(packet(Op::Data, 1000, 52), b"hello?");
    world.send(packet(Op::CreditRequest, 1000, 52), &[]);
    assert_eq!(world.expect(Op::CreditUpdate).0.fwd_cnt, 6);
    world.send(packet(Op::Reset, 1000, 52), &[]);
    assert_eq!(world.connections(), 0);
    world.expect_silence();
}

#[test]
fn the_guests_close_waits_for_the_host_to_take_all() {
    let mut world = World::new();
    let stream = world.connection(1000, 52);
    let sent = fill(&mut world);
    let end = Header {
        flags: SHUT_BOTH,
        ..packet(Op::Shutdown, 1000, 52)
    };
    world.send(end, &[]);
    world.expect_silence();
    let mut received = Vec::new();
    while received.len() < sent.len() {
        received.extend(read_now(&stream));
        world.run();
    }
    assert!(received == sent);
    // Like each packet of a connection it says how much room there is.
    let (reset, _) = world.expect(Op::Reset);
    assert_eq!(
        (reset.buf_alloc, reset.fwd_cnt),
        (BUFFER, sent.len() as u32)
    );
    assert!(is_ended(&stream));
}

#[test]
fn a_guest_reset_closes_all_and_the_next_driver_starts_anew() {
    let mut world = World::new();
    let stream = world.connection(1000, 52);
    let asked = world.dial("CONNECT 9\n");
    world.run();
    world.guest.write(0x70, 0);
    assert!(is_ended(&stream));
    assert!(is_ended(&asked));
    assert_eq!(world.connections(), 0);
    world.inbox.clear();
    world.start();
    world.give(BUFFERS);
    world.send(packet(Op::Data, 1000, 52), b"old");
    world.expect(Op::Reset);
    let stream = world.connection(1000, 53);
    world.send(packet(Op::Data, 1000, 53), b"new");
    assert_eq!(read_now(&stream), b"new");
}

// ----------------------------------------------------------------------- flow control

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
fn a_host_that_does_not_read_stops_the_guest_and_loses_nothing() {
    let mut world = World::new();
    let stream = world.connection(1000, 52);
    let sent = fill(&mut world);
    world.expect_silence();
    // Others are not in its way.
    let other = world.connection(1001, 53);
    world.send(packet(Op::Data, 1001, 53), b"through");
    assert_eq!(read_now(&other), b"through");
    let mut received = Vec::new();
    while received.len() < sent.len() {
        let part = read_now(&stream);
        assert!(!part.is_empty(), "it is stuck");
        received.extend(part);
        world.run();
    }
    assert!(received == sent);
    // And the guest hears of its room.
    let (update, _) = world.inbox.pop_back().expect("an update");
    assert_eq!(Op::of(update.op), Some(Op::CreditUpdate));
    assert!(sent.len() - update.fwd_cnt as usize <= BUFFER as usize / 2);
}

#[test]
fn a_host_that_leaves_unread_data_behind_does_not_hold_the_guest() {
    let mut world = World::new();
    let stream = world.connection(1000, 52);
    fill(&mut world);
    let end = Header {
        flags: SHUT_BOTH,
        ..packet(Op::Shutdown, 1000, 52)
    };
    world.send(end, &[]);
    world.expect_silence();
    drop(stream);
    world.expect(Op::Reset);
    assert_eq!(world.connections(), 0);
}

#[test]
fn a_guest_that_sends_more_than_it_may_loses_its_connection() {
    let mut world = World::new();
    let _stream = world.connection(1000, 52);
    fill(&mut world);
    world.send(packet(Op::Data, 1000, 52), b"x");
    world.expect(Op::Reset);
    assert_eq!(world.connections(), 0);
    assert_eq!(world.faults(), 1);
}

#[test]
fn a_guest_without_room_gets_nothing_until_it_has_some() {
    let mut world = World::new();
    let listener = world.listen(52);
    let small = Header {
        buf_alloc: 10,
        ..packet(Op::Request, 1000, 52)
    };
    world.send(small, &[]);
    world.expect(Op::Response);
    let (mut stream, _) = listener.accept().expect("a connection");
    stream.write_all(b"0123456789abcdef").expect("room");
    assert_eq!(world.expect(Op::Data).1, b"0123456789");
    world.expect(Op::CreditRequest);
    world.expect_silence();
    // Another connection is not in its way.
    let mut other = world.connection(1001, 53);
    other.write_all(b"through").expect("room");
    assert_eq!(world.expect(Op::Data).1, b"through");
    let update = Header {
        buf_alloc: 10,
        fwd_cnt: 4,
        ..packet(Op::CreditUpdate, 1000, 52)
    };
    world.send(update, &[]);
    assert_eq!(world.expect(Op::Data).1, b"abcd");
    world.expect(Op::CreditRequest);
    world.expect_silence();
    // One that takes back what it promised gets nothing either.
    let lie = Header {
        buf_alloc: 2,
        fwd_cnt: 4,
        ..packet(Op::CreditUpdate, 1000, 52)
    };
    world.send(lie, &[]);
    world.expect(Op::CreditRequest);
    world.expect_silence();
}

#[test]
fn a_stuck_end_of_the_host_costs_no_more_than_it_may() {
    let mut world = World::new();
    let mut stream = world.connection(1000, 52);
    world.refill = false;
    let sent = pattern(1 << 20);
    let mut written = 0;
    // The guest has few buffers: the host's end comes to a halt.
    while let Ok(len) = stream.write(&sent[written..]) {
        written += len;
        world.run();
    }
    assert!(written < sent.len());
    world.refill = true;
    world.give(BUFFERS);
    let mut received: Vec<u8> = Vec::new();
    while received.len() < sent.len() {
        world.run();
        assert!(!world.inbox.is_empty(), "it is stuck");
        received.extend(world.inbox.drain(..).flat_map(|(_, data)| data));
        written += stream.write(&sent[written..]).unwrap_or(0);
    }
    assert!(received == sent);
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to() {
    let mut world = World::new();
    world.refill = false;
    let mut taken = 0;
    for _ in 0..3 * MOST_RESETS {
        let header = packet(Op::Request, 1, 1).to_bytes();
        world.guest.request(TRANSMIT, &[&header], &[]);
        world.guest.kick(TRANSMIT);
        let used = world.guest.used(TRANSMIT).len();
        if used == 0 {
            break;
        }
        taken += used;
    }
    assert_eq!(taken, MOST_RESETS + BUFFERS);
    // With buffers it goes on, and each is answered.
    world.refill = true;
    world.give(BUFFERS);
    world.run();
    taken += world.guest.used(TRANSMIT).len();
    assert_eq!(taken, MOST_RESETS + BUFFERS + 1);
    assert_eq!(world.inbox.len(), taken);
}

// ----------------------------------------------------------------------- a wild guest

#[test]
fn packets_that_are_none_are_counted() {
    let mut world = World::new();
    world.guest.request(TRANSMIT, &[b"short"], &[]);
    world.guest.request(TRANSMIT, &[], &[100]);
    world.guest.kick(TRANSMIT);
    assert_eq!(world.guest.used(TRANSMIT).len(), 2);
    assert_eq!(world.faults(), 2);
    let stranger = Header {
        src_cid: 99,
        ..packet(Op::Request, 1000, 52)
    };
    world.send(stranger, &[]);
    assert_eq!(world.faults(), 3);
    world.expect_silence();
    assert!(!world.guest.is_broken());
}

#[test]
fn what_cannot_be_reached_is_refused_in_its_own_name() {
    let mut world = World::new();
    let elsewhere = Header {
        dst_cid: 99,
        ..packet(Op::Request, 1000, 52)
    };
    world.send(elsewhere, &[]);
    assert_eq!(world.expect(Op::Reset).0.src_cid, 99);
    let datagram = Header {
        kind: 3,
        ..packet(Op::Request, 1000, 52)
    };
    world.send(datagram, &[]);
    assert_eq!(world.expect(Op::Reset).0.kind, 3);
    for op in [Op::Data, Op::Shutdown, Op::CreditRequest, Op::Response] {
        world.send(packet(op, 1000, 52), &[]);
        world.expect(Op::Reset);
    }
    // An answer to an answer would go on for ever.
    world.send(packet(Op::Reset, 1000, 52), &[]);
    world.expect_silence();
}

#[test]
fn packets_against_the_rules_end_their_connection() {
    let longer = Header {
        len: 100,
        ..packet(Op::Data, 1000, 52)
    };
    let longest = Header {
        len: u32::MAX,
        ..packet(Op::Data, 1000, 52)
    };
    let unknown = Header {
        op: 77,
        ..packet(Op::Data, 1000, 52)
    };
    let response = packet(Op::Response, 1000, 52);
    let request = packet(Op::Request, 1000, 52);
    for header in [longer, longest, unknown, response, request] {
        let mut world = World::new();
        let stream = world.connection(1000, 52);
        world.send_raw(header, b"data");
        world.expect(Op::Reset);
        assert!(is_ended(&stream), "{header:?}");
        assert_eq!(world.connections(), 0, "{header:?}");
        assert_eq!(world.faults(), 1, "{header:?}");
    }
}

#[test]
fn buffers_without_room_are_given_back() {
    let mut world = World::asleep();
    world.start();
    for room in [1, HEADER] {
        world.guest.request(RECEIVE, &[], &[room]);
    }
    world.send(packet(Op::Request, 1000, 52), &[]);
    let used = world.guest.used(RECEIVE);
    assert!(used.iter().all(|(_, data)| data.is_empty()));
    assert_eq!(used.len(), 2);
    world.give(1);
    world.expect(Op::Reset);
    assert_eq!(world.faults(), 2);
}

/// A packet of a guest that may be anything, but has to do with the connections that there are.
fn wild_packet() -> impl Strategy<Value = (Header, Vec<u8>)> {
    let number = prop_oneof![
        Just(0_u32),
        Just(1),
        Just(BUFFER),
        Just(u32::MAX),
        any::<u32>()
    ];
    let header = (
        prop_oneof![9 => Just(u64::from(CID)), 1 => any::<u64>()],
        prop_oneof![9 => Just(HOST_CID), 1 => any::<u64>()],
        // Few ports, so that packets meet; nobody listens on 3, and the host's own come from
        // FIRST_PORT.
        0..4_u32,
        prop_oneof![3 => 0..4_u32, 1 => FIRST_PORT..FIRST_PORT + 4],
        prop_oneof![4 => Just(None), 1 => number.clone().prop_map(Some)],
        prop_oneof![9 => Just(STREAM), 1 => any::<u16>()],
        0..9_u16,
        prop_oneof![0..4_u32, any::<u32>()],
        (number.clone(), number),
    );
    let data = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..50),
        Just(vec![7; 60_000])
    ];
    (header, data).prop_map(|(header, data)| {
        let (src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, credit) = header;
        let header = Header {
            src_cid,
            dst_cid,
            src_port,
            dst_port,
            len: len.unwrap_or(data.len() as u32),
            kind,
            op,
            flags,
            buf_alloc: credit.0,
            fwd_cnt: credit.1,
        };
        (header, data)
    })
}

/// What guest and host do to the device.
#[derive(Clone, Debug)]
enum Deed {
    Packet(Header, Vec<u8>, usize),
    Buffers(Vec<usize>),
    Dial(&'static str),
    HostWrites,
    HostReads,
    HostCloses,
}

fn deed() -> impl Strategy<Value = Deed> {
    let cut = prop_oneof![4 => Just(HEADER), 1 => 0..HEADER];
    prop_oneof![
        6 => (wild_packet(), cut).prop_map(|((header, data), cut)| Deed::Packet(header, data, cut)),
        3 => prop::collection::vec(0..200_usize, 1..8).prop_map(Deed::Buffers),
        1 => prop::sample::select(vec!["CONNECT 1\n", "CONNECT 2\n", "CONN", "\n"])
            .prop_map(Deed::Dial),
        1 => Just(Deed::HostWrites),
        1 => Just(Deed::HostReads),
        1 => Just(Deed::HostCloses),
    ]
}

#[test]
fn a_buffer_outside_memory_fails_its_request_only() {
    let mut world = World::new();
    let mut stream = world.connection(5, 6);
    let faults = world.faults();
    world.guest.request_outside(TRANSMIT, &[false, false], 0);
    world.guest.request_outside(RECEIVE, &[true], 0);
    assert_eq!(world.guest.used(TRANSMIT).len(), 1);
    assert!(world.faults() > faults);
    // What still lies in memory of a packet is not all of it: its connection ends.
    world.send(packet(Op::Data, 5, 6), b"heard");
    world.run();
    assert_eq!(read_now(&stream), b"heard");
    stream.write_all(b"there").expect("room");
    assert_eq!(world.expect(Op::Data).1, b"there");
    let header = Header {
        len: 64,
        ..packet(Op::Data, 5, 6)
    };
    let header = world.guest.buffer(&header.to_bytes());
    let outside = Guest::<Vsock>::OUTSIDE;
    world
        .guest
        .chain(TRANSMIT, &[(header, 44, 0), (outside, 64, 0)]);
    world.guest.kick(TRANSMIT);
    world.expect(Op::Reset);
    assert!(is_ended(&stream));
    assert!(!world.guest.is_broken());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_guest_breaks_the_device(deeds in prop::collection::vec(deed(), 1..40)) {
        let mut world = World::asleep();
        let listeners = [0, 1, 2].map(|port| world.listen(port));
        for listener in &listeners {
            listener.set_nonblocking(true).expect("a socket");
        }
        world.start();
        let mut streams = VecDeque::new();
        for deed in deeds {
            match deed {
                Deed::Packet(header, data, cut) => {
                    let bytes = header.to_bytes();
                    world.guest.request(TRANSMIT, &[&bytes[..cut], &data], &[]);
                }
                Deed::Buffers(sizes) => {
                    for size in sizes {
                        world.guest.request(RECEIVE, &[], &[size]);
                    }
                }
                Deed::Dial(line) => streams.push_back(world.dial(line)),
                Deed::HostWrites => {
                    for mut stream in &streams {
                        let _ = stream.write(&[1; 5000]);
                    }
                }
                Deed::HostReads => {
                    for mut stream in &streams {
                        let _ = stream.read(&mut [0; 100_000]);
                    }
                }
                Deed::HostCloses => drop(streams.pop_front()),
            }
            lock(&world.guest.device).ready(0);
            world.guest.kick(RECEIVE);
            world.guest.kick(TRANSMIT);
            for listener in &listeners {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true).expect("a socket");
                    streams.push_back(stream);
                }
            }
            let device = lock(&world.guest.device);
            let running = device.running.as_ref().expect("it was started");
            prop_assert!(running.connections.len() <= LIMITS.connections);
            prop_assert!(running.waiting.len() <= running.connections.len());
            prop_assert!(running.tokens.len() <= running.connections.len());
            prop_assert!(running.resets.len() <= MOST_RESETS + LIMITS.connections);
        }
        // The next driver finds a device that works.
        world.guest.write(0x70, 0);
        drop(streams);
        world.start();
        world.give(BUFFERS);
        world.run();
        world.inbox.clear();
        let stream = world.connection(1000, 52);
        world.send(packet(Op::Data, 1000, 52), b"well");
        prop_assert_eq!(read_now(&stream), b"well");
    }
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
