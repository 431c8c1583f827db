//! The stack and a guest's, on links that lose, repeat and reorder.

use super::guest::Peer;
use super::*;
use proptest::prelude::*;
use smoltcp::iface::SocketHandle;

/// What happens to a frame.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Comes,
    IsLost,
    ComesTwice,
    /// It comes after the next one.
    ComesLate,
}

/// A link between a guest and the service, with its time.
struct Link {
    stack: Stack,
    peer: Peer,
    now: Duration,
    /// What happens to the next frames; those after them come.
    fates: Vec<Fate>,
    /// Frames that come late, to the guest and to the service.
    late: [Vec<Vec<u8>>; 2],
    /// The bytes of the longest frame for the guest.
    longest: usize,
}

impl Link {
    fn new(stack: Stack, peer: Peer) -> Link {
        Link {
            stack,
            peer,
            now: Duration::ZERO,
            fates: Vec::new(),
            late: Default::default(),
            longest: 0,
        }
    }

    /// The frames that come of one that is sent.
    fn pass(&mut self, way: usize, frame: Vec<u8>) -> Vec<Vec<u8>> {
        let mut coming = match self.fates.pop().unwrap_or(Fate::Comes) {
            Fate::Comes => vec![frame],
            Fate::IsLost => vec![],
            Fate::ComesTwice => vec![frame.clone(), frame],
            Fate::ComesLate => {
                self.late[way].push(frame);
                return Vec::new();
            }
        };
        coming.append(&mut self.late[way]);
        coming
    }

    /// Lets time go on until there is something to do, and does it.
    fn step(&mut self) {
        self.peer.poll(self.now);
        self.stack.work(self.now);
        while let Some(frame) = self.peer.wire.sent.pop_front() {
            for frame in self.pass(1, frame) {
                let is_ours = frame[12..14] == [8, 6] || frame[30..34] == ADDRESS.octets();
                assert!(is_ours, "the guest has no other peer");
                self.stack.receive(&frame, self.now);
            }
        }
        while let Some(frame) = self.stack.take_frame() {
            self.longest = self.longest.max(frame.len());
            let frames = self.pass(0, frame);
            self.peer.wire.coming.extend(frames);
        }
        let least = self.now + Duration::from_millis(1);
        let due = [self.peer.due(self.now), self.stack.due(self.now)];
        let due = due.into_iter().flatten().min().unwrap_or(least);
        self.now = match self.peer.wire.coming.is_empty() {
            true => due.max(least).min(self.now + Duration::from_secs(1)),
            false => self.now + Duration::from_micros(10),
        };
    }

    /// The answers to requests on one connection.
    fn answers(&mut self, handle: SocketHandle, requests: &[String]) -> Vec<(u16, String, bool)> {
        self.try_answers(handle, requests)
            .expect("the connection lasts")
    }

    /// As [`Self::answers`]; `None` where the connection ended.
    fn try_answers(
        &mut self,
        handle: SocketHandle,
        requests: &[String],
    ) -> Option<Vec<(u16, String, bool)>> {
        let mut answers = Vec::new();
        let mut received = Vec::new();
        let mut steps = 0;
        for request in requests {
            let mut left = request.as_bytes();
            let answer = loop {
                let socket = self.peer.socket(handle);
                if !socket.is_open() {
                    return None;
                }
                if socket.may_send() && !left.is_empty() {
                    let sent = socket.send_slice(left).expect("open");
                    left = &left[sent..];
                }
                while let Ok(1..) = socket.recv(|bytes| {
                    received.extend_from_slice(bytes);
                    (bytes.len(), bytes.len())
                }) {}
                if let Some(answer) = parse(&received) {
                    break answer;
                }
                steps += 1;
                assert!(steps < 20_000, "no end at {:?}", self.now);
                self.step();
            };
            received.clear();
            answers.push(answer);
        }
        Some(answers)
    }
}

fn get(path: &str, version: u8) -> String {
    format!("GET {path} HTTP/1.{version}\r\nHost: 169.254.169.254\r\n\r\n")
}

#[test]
fn a_guest_reads_on_one_connection_until_it_or_the_service_closes_it() {
    let mut link = Link::new(stack(&options(false)), Peer::new(1500, false));
    let handle = link.peer.connect(50_000);
    let requests = [
        get("/latest/meta-data/ami-id", 1),
        get("/latest/user-data", 1),
        get("/", 0),
    ];
    let answers = link.answers(handle, &requests);
    let expected = [
        "ami-1".to_owned(),
        "x".repeat(20_000),
        "age\nlatest/\n~/".to_owned(),
    ];
    for (answer, body) in answers.iter().zip(&expected) {
        assert_eq!((answer.0, &answer.1), (200, body));
    }
    assert_eq!(
        answers.iter().map(|answer| answer.2).collect::<Vec<_>>(),
        [false, false, true]
    );
    // The service has closed it, and the guest does.
    link.peer.socket(handle).close();
    while link.stack.connections() > 0 {
        link.step();
        assert!(link.now < Duration::from_secs(20), "a connection stays");
    }
    assert_eq!(link.stack.due(link.now), None, "a timer for nothing");
    assert_eq!(link.longest, 14 + 1500);
}

#[test]
fn requests_come_in_pieces_of_any_size_and_several_in_one() {
    for mtu in [68, 576, 1500, 9000] {
        let mut link = Link::new(stack(&options(false)), Peer::new(mtu, false));
        let handle = link.peer.connect(1);
        let request = get("/latest/meta-data/macs/02:00:00:00:00:07/n", 1);
        for answer in link.answers(handle, &[request.clone(), request.clone()]) {
            assert_eq!(answer, (200, "0".to_owned(), false));
        }
        // Two in one segment: the second is answered when the first is.
        let both = request.clone() + &request;
        let first = link.answers(handle, &[both]);
        assert_eq!(first[0].1.as_bytes()[..1], *b"0");
    }
}

#[test]
fn a_guest_may_leave_checksums_to_its_card() {
    let mut link = Link::new(stack(&options(false)), Peer::new(1500, true));
    let handle = link.peer.connect(2);
    let answers = link.answers(handle, &[get("/age", 1)]);
    assert_eq!(answers[0].0, 501);
}

#[test]
fn frames_are_no_longer_than_the_cards_mtu() {
    let options = options(false);
    let service = Service::new(&options);
    let stack = Stack::new(service, options.address, Some(600), 0, 1);
    let mut link = Link::new(stack, Peer::new(1500, false));
    let handle = link.peer.connect(3);
    let answers = link.answers(handle, &[get("/latest/user-data", 1)]);
    assert_eq!(answers[0].1.len(), 20_000);
    assert_eq!(link.longest, 14 + 600);
}

#[test]
fn connections_and_frames_are_few_and_the_newest_connection_works() {
    let mut link = Link::new(stack(&options(false)), Peer::new(1500, false));
    let mut last = link.peer.connect(1000);
    for port in 1001..1100 {
        for _ in 0..5 {
            link.step();
        }
        assert!(link.stack.connections() <= MOST_CONNECTIONS);
        last = link.peer.connect(port);
    }
    assert_eq!(link.answers(last, &[get("/age", 1)])[0].0, 501);
    // A guest that takes no frames.
    for port in 2000..2200 {
        link.peer.connect(port);
        link.peer.poll(link.now);
        while let Some(frame) = link.peer.wire.sent.pop_front() {
            link.stack.receive(&frame, link.now);
        }
    }
    let due = link.stack.due(link.now).expect("connections wait");
    assert!(
        due >= link.now + Duration::from_secs(1),
        "it cannot do anything before"
    );
    let frames = std::iter::from_fn(|| link.stack.take_frame()).count();
    assert!(frames <= MOST_FRAMES, "{frames}");
    assert!(link.stack.connections() <= MOST_CONNECTIONS);
}

#[test]
fn a_silent_connection_ends_and_a_guest_that_starts_anew_is_let_in() {
    let mut link = Link::new(stack(&options(false)), Peer::new(1500, false));
    let handle = link.peer.connect(4);
    link.answers(handle, &[get("/age", 1)]);
    assert_eq!(link.stack.connections(), 1);
    // The guest is reset, and its new kernel begins with the same port.
    link.peer = Peer::new(1500, false);
    let handle = link.peer.connect(4);
    assert_eq!(link.answers(handle, &[get("/age", 1)])[0].0, 501);
    assert_eq!(link.stack.connections(), 1);
    link.now += Duration::from_secs(31);
    link.stack.work(link.now);
    assert_eq!(link.stack.connections(), 0);
}

#[test]
fn answers_go_where_a_connection_came_from_without_arp() {
    let mut link = Link::new(stack(&options(false)), Peer::new(1500, false));
    link.peer.connect(5);
    link.peer.poll(link.now);
    // ARP first; what comes then, as if by way of a router.
    let arp = link.peer.wire.sent.pop_front().expect("a frame");
    assert_eq!(arp[12..14], [8, 6]);
    let mut other = stack(&options(false));
    other.receive(&arp, link.now);
    link.peer.wire.coming.extend(other.take_frame());
    link.now += Duration::from_secs(1);
    link.peer.poll(link.now);
    link.peer.poll(link.now);
    let mut segment = link.peer.wire.sent.pop_front().expect("a frame");
    assert_eq!(segment[..6], MAC);
    segment[..6].copy_from_slice(&[2, 0, 0, 0, 0, 99]);
    link.stack.receive(&segment, link.now);
    let answer = link.stack.take_frame().expect("an answer");
    assert_eq!(answer[..6], GUEST_MAC);
    assert_eq!(answer[12..14], [8, 0]);
    // SYN and ACK.
    assert_eq!(answer[47] & 0x12, 0x12);
}

#[test]
fn only_tcp_is_answered_and_other_ports_are_refused() {
    let mut link = Link::new(stack(&options(false)), Peer::new(1500, false));
    link.peer.connect(6);
    link.peer.poll(link.now);
    let mut frames = Vec::new();
    for _ in 0..4 {
        while let Some(frame) = link.peer.wire.sent.pop_front() {
            link.stack.receive(&frame, link.now);
            frames.push(frame);
        }
        link.peer.wire.coming.extend(link.stack.take_frame());
        link.now += Duration::from_millis(1);
        link.peer.poll(link.now);
    }
    let segment = frames
        .iter()
        .find(|frame| frame[12..14] == [8, 0])
        .expect("a segment");
    let mut stack = stack(&options(false));
    let mut answer = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = segment.clone();
        change(&mut frame);
        // The checksum of the header.
        frame[24..26].fill(0);
        let words = frame[14..34].chunks(2);
        let sum: u32 = words
            .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
            .sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        stack.receive(&frame, Duration::ZERO);
        stack.take_frame()
    };
    let reset = answer(&|frame| frame[37] = 81).expect("a refusal");
    assert_eq!(reset[47] & 0x04, 0x04);
    assert!(answer(&|frame| frame[23] = 17).is_none(), "UDP");
    assert!(answer(&|frame| frame[23] = 1).is_none(), "ICMP");
    assert!(answer(&|frame| frame[20] = 0x20).is_none(), "a fragment");
    assert!(answer(&|frame| frame[33] = 9).is_none(), "another address");
    assert!(
        answer(&|frame| frame[26..30].fill(0)).is_none(),
        "from no address"
    );
    assert!(answer(&|_| {}).is_some());
}

fn any_fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        3 => Just(Fate::Comes),
        1 => Just(Fate::IsLost),
        1 => Just(Fate::ComesTwice),
        1 => Just(Fate::ComesLate),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn answers_come_over_a_link_that_loses_repeats_and_reorders(
        fates in proptest::collection::vec(any_fate(), 0..60),
        seed in any::<u64>(),
        mtu in 100_usize..1501,
    ) {
        let options = options(false);
        let stack = Stack::new(Service::new(&options), options.address, None, 0, seed);
        let mut link = Link::new(stack, Peer::new(mtu, false));
        link.fates = fates;
        let requests = [get("/latest/user-data", 1), get("/latest/meta-data/", 1)];
        // A connection that is silent for long ends, and a guest tries again.
        let answers = (1..4).find_map(|port| {
            let handle = link.peer.connect(port);
            link.try_answers(handle, &requests)
        });
        let answers = answers.expect("the link is better in the end");
        prop_assert_eq!(&answers[0].1, &"x".repeat(20_000));
        prop_assert_eq!(&answers[1].1, "ami-id\nlist\nmacs/");
        prop_assert!(link.stack.connections() <= 3);
    }
}
