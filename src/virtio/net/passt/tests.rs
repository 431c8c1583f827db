//! passt itself where this host has it, and streams of frames.

use super::super::tests::{Guest, open};
use super::*;
use armlet_devices::virtio::net::HEADER;
use armlet_devices::virtio::net::feature::MRG_RXBUF;
use proptest::prelude::*;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use vm_memory::VolatileSlice;

const MAC: &str = "02:00:00:00:00:07";
const MAC_BYTES: [u8; 6] = [2, 0, 0, 0, 0, 7];

/// Whether this host has passt; says so where it has not.
fn has_passt() -> bool {
    let found = Command::new(PROGRAM)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if found.is_err() {
        eprintln!("skipped: this host has no passt");
    }
    found.is_ok()
}

/// A question who has an IPv4 address that is not the guest's: passt answers for the world.
fn question() -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(MAC_BYTES);
    frame.extend([0x08, 0x06]);
    // ARP (RFC 826): Ethernet, IPv4, sizes of addresses, request.
    frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(MAC_BYTES);
    frame.extend([0, 0, 0, 0]);
    frame.extend([0; 6]);
    frame.extend([198, 51, 100, 1]);
    frame
}

fn is_answer(frame: &[u8]) -> bool {
    let frame = &frame[HEADER..];
    frame.len() >= 42
        && frame[..6] == MAC_BYTES
        && frame[12..14] == [0x08, 0x06]
        && frame[20..22] == [0, 2]
        && frame[28..32] == [198, 51, 100, 1]
}

#[test]
fn passt_answers_each_guest_that_comes() {
    if !has_passt() {
        return;
    }
    let card = open(&format!("user,mac={MAC}")).expect("passt starts");
    // Two guests one after the other, the second with two drivers.
    for drivers in [1, 2] {
        let mut guest = Guest::new(&card, u64::MAX);
        assert!(guest.is_up());
        for driver in 0..drivers {
            if driver > 0 {
                guest.start(MRG_RXBUF);
            }
            guest.send(0, [0; HEADER], &question());
            guest.receive("answer of passt", is_answer);
            assert!(guest.interrupts() > 0);
        }
    }
}

#[test]
fn a_port_of_the_host_leads_to_the_guest() {
    if !has_passt() {
        return;
    }
    let port = free_port();
    let card = open(&format!("user,mac={MAC},hostfwd=tcp:127.0.0.1:{port}-:22"));
    let mut guest = Guest::new(&card.expect("passt starts"), u64::MAX);
    let connection = TcpStream::connect(("127.0.0.1", port)).expect("passt listens");
    // A segment that opens a connection, to the guest's port.
    guest.receive("connection", |frame| {
        let frame = &frame[HEADER..];
        let is_tcp = frame[12..14] == [0x08, 0x00] && frame[23] == 6;
        is_tcp && frame[36..38] == [0, 22] && frame[47] & 0x02 != 0
    });
    drop(connection);
}

/// A port that nobody uses now.
fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    listener.local_addr().expect("an address").port()
}

#[test]
fn when_passt_does_not_start_it_is_said_why() {
    let missing = Passt::start_program("passt-of-another-host", &[], MAC_BYTES);
    let missing = missing.err().expect("there is none").to_string();
    assert!(missing.contains("apt install passt"), "{missing}");
    let quiet = Passt::start_program("true", &[], MAC_BYTES);
    let quiet = quiet.err().expect("it ends at once").to_string();
    assert!(quiet.contains("passt does not start: "), "{quiet}");
    if !has_passt() {
        return;
    }
    let taken = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let error = open(&format!("user,hostfwd=tcp:127.0.0.1:{port}-:22"));
    let error = format!("{:#}", error.err().expect("the port is taken"));
    assert!(
        error.starts_with("--net user: passt does not start: "),
        "{error}"
    );
    assert!(error.contains(&port.to_string()), "{error}");
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn when_passt_ends_the_link_goes_down() {
    if !has_passt() {
        return;
    }
    let passt = Passt::start(&[], MAC_BYTES).expect("it starts");
    let frames = PasstFrames::new(passt);
    let card = super::super::NetworkCard {
        name: "net0".to_owned(),
        mac: MAC_BYTES,
        connection: super::super::Connection::User(frames.clone()),
    };
    let mut guest = Guest::new(&card, u64::MAX);
    assert!(guest.is_up());
    frames.passt().child.kill().expect("it runs");
    guest.wait("end of the link", |guest| (!guest.is_up()).then_some(()));
    // The guest can go on, and so can the next.
    guest.send(0, [0; HEADER], &question());
    drop(guest);
    let mut guest = Guest::new(&card, u64::MAX);
    assert!(!guest.is_up());
    guest.send(0, [0; HEADER], &question());
}

#[test]
fn passt_ends_with_the_card() {
    if !has_passt() {
        return;
    }
    let passt = Passt::start(&[], MAC_BYTES).expect("it starts");
    let process = format!("/proc/{}", passt.child.id());
    assert!(std::path::Path::new(&process).exists());
    drop(passt);
    assert!(!std::path::Path::new(&process).exists());
}

fn stream() -> (Stream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    for socket in [&ours, &theirs] {
        socket.set_nonblocking(true).expect("a flag");
    }
    (Stream::new(OwnedFd::from(ours)), theirs)
}

/// Sends `frame` in pieces of `piece` bytes.
fn send(stream: &mut Stream, frame: &[u8], piece: usize) -> Result<(), Broken> {
    let mut copy = frame.to_vec();
    let whole = VolatileSlice::from(&mut copy[..]);
    stream.send(frame.len(), || {
        (0..frame.len()).step_by(piece).map(|at| {
            let size = piece.min(frame.len() - at);
            whole.subslice(at, size).expect("within the frame")
        })
    })
}

fn behind_its_length(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn frames_leave_whole_through_a_socket_that_is_full(
        sizes in prop::collection::vec(prop_oneof![14..100_usize, 14..=LONGEST], 1..30),
        piece in 1..3000_usize,
        reads in prop::collection::vec(1..100_000_usize, 1..30),
    ) {
        let (mut stream, mut peer) = stream();
        let mut reads = reads.iter().cycle();
        let (mut expected, mut seen) = (Vec::new(), Vec::new());
        let mut read = |seen: &mut Vec<u8>| {
            let mut buffer = vec![0; *reads.next().expect("endless")];
            if let Ok(size) = peer.read(&mut buffer) {
                seen.extend(&buffer[..size]);
            }
        };
        for (index, size) in sizes.into_iter().enumerate() {
            let frame: Vec<u8> = (0..size).map(|at| (at / 256 + at + index) as u8).collect();
            expected.extend(behind_its_length(&frame));
            while let Err(error) = send(&mut stream, &frame, piece.max(size / 900)) {
                prop_assert_eq!(error, Broken::Wait);
                read(&mut seen);
            }
        }
        while stream.flush().is_err() || seen.len() < expected.len() {
            read(&mut seen);
        }
        prop_assert!(seen == expected);
    }

    #[test]
    fn frames_come_whole_however_the_bytes_come(
        sizes in prop::collection::vec(prop_oneof![1..100_usize, 1..=LONGEST], 1..30),
        writes in prop::collection::vec(prop_oneof![1..10_usize, 1..100_000_usize], 1..30),
    ) {
        let (mut stream, mut peer) = stream();
        let frames: Vec<Vec<u8>> = sizes
            .iter()
            .enumerate()
            .map(|(index, size)| (0..*size).map(|at| (at / 256 + at + index) as u8).collect())
            .collect();
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| behind_its_length(frame)).collect();
        let mut left = &bytes[..];
        let mut writes = writes.iter().cycle();
        let mut received = Vec::new();
        while received.len() < frames.len() {
            let size = left.len().min(*writes.next().expect("endless"));
            if let Ok(size) = peer.write(&left[..size]) {
                left = &left[size..];
            }
            loop {
                match stream.receive(<[u8]>::to_vec) {
                    Ok(frame) => received.push(frame),
                    Err(error) => {
                        prop_assert_eq!(error, Broken::Wait);
                        break;
                    }
                }
            }
        }
        prop_assert!(received == frames);
        peer.shutdown(Shutdown::Write).expect("open");
        prop_assert_eq!(stream.receive(|_| ()), Err(Broken::Closed));
    }

    #[test]
    fn no_bytes_are_read_as_more_than_frames(
        bytes in prop::collection::vec(prop_oneof![4 => Just(0_u8), 1 => any::<u8>()], 0..5000),
    ) {
        let (mut stream, mut peer) = stream();
        peer.write_all(&bytes).expect("room");
        peer.shutdown(Shutdown::Write).expect("open");
        let mut left = &bytes[..];
        loop {
            match stream.receive(<[u8]>::to_vec) {
                Ok(frame) => {
                    let expected = behind_its_length(&frame);
                    prop_assert!(left.starts_with(&expected));
                    left = &left[expected.len()..];
                }
                Err(Broken::Wrong(size)) => {
                    prop_assert!(size == 0 || size as usize > LONGEST);
                    prop_assert!(left.starts_with(&size.to_be_bytes()));
                    break;
                }
                Err(error) => {
                    prop_assert_eq!(error, Broken::Closed);
                    break;
                }
            }
        }
    }
}
