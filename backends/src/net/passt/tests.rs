//! passt itself where this host has it, and streams of frames.

use super::super::tests::{Guest, open};
use super::*;
use crate::alone::{assert_none_is_left, hold, is_alone, is_gone, kill};
use armlet_devices::virtio::net::HEADER;
use armlet_devices::virtio::net::feature::MRG_RXBUF;
use proptest::prelude::*;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use vm_memory::VolatileSlice;

const MAC: &str = "02:00:00:00:00:07";
const MAC_BYTES: [u8; 6] = [2, 0, 0, 0, 0, 7];

/// Whether this host has passt; says so where it has not.
fn has_passt() -> bool {
    let found = broker::find(PROGRAM, std::env::var_os("PATH").as_deref(), &[]);
    if found.is_none() {
        eprintln!("skipped: this host has no passt");
    }
    found.is_some()
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
    let broker = Broker::fork(Some(&crate::broker::tests::native())).expect("a process");
    let start = |program: &str| {
        let started = Passt::start_program(&broker, Path::new(program), &[], MAC_BYTES, PATIENCE);
        format!("{:#}", started.err().expect("it is no passt"))
    };
    let missing = start("/bin/passt-of-another-host");
    assert!(
        missing.starts_with("cannot start /bin/passt-of-another-host: No such"),
        "{missing}"
    );
    let quiet = start("/bin/true");
    assert_eq!(quiet, "passt does not start: exit status: 0");
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
    let passt = Passt::start(
        &Broker::fork(Some(&crate::broker::tests::native())).expect("a process"),
        &[],
        MAC_BYTES,
    )
    .expect("it starts");
    let frames = PasstFrames::new(passt);
    let card = super::super::NetworkCard {
        name: "net0".to_owned(),
        mac: MAC_BYTES,
        metadata: None,
        throttles: [None, None],
        counts: Arc::default(),
        connection: super::super::Connection::User(frames.clone()),
    };
    let mut guest = Guest::new(&card, u64::MAX);
    assert!(guest.is_up());
    kill(frames.passt().process.pid().cast_unsigned());
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
    let passt = Passt::start(
        &Broker::fork(Some(&crate::broker::tests::native())).expect("a process"),
        &[],
        MAC_BYTES,
    )
    .expect("it starts");
    let process = passt.process.pid().cast_unsigned();
    assert!(!is_gone(process));
    drop(passt);
    assert!(is_gone(process));
}

#[test]
fn nothing_of_passt_is_left_when_armlet_is_killed() {
    const NAME: &str = "net::passt::tests::nothing_of_passt_is_left_when_armlet_is_killed";
    if !has_passt() {
        return;
    }
    if !is_alone(NAME) {
        // passt and the broker.
        return assert_none_is_left(NAME, 2);
    }
    let card = open(&format!("user,mac={MAC}")).expect("passt starts");
    let mut guest = Guest::new(&card, u64::MAX);
    guest.send(0, [0; HEADER], &question());
    guest.receive("answer of passt", is_answer);
    hold();
}

/// A passt that is a shell script.
fn fake(broker: &Arc<Broker>, script: &str, patience: Duration) -> Result<Passt> {
    let folder = tempfile::tempdir().expect("a folder");
    let program = folder.path().join("passt");
    std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).expect("a file");
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&program, executable).expect("ours");
    Passt::start_program(broker, &program, &[], MAC_BYTES, patience)
}

/// Has `work` done in a thread, which does not take for ever.
fn in_bounded_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || sender.send(work()));
    let done = receiver.recv_timeout(Duration::from_secs(60));
    let done = done.expect("it waits without limit, or failed");
    thread.join().expect("it ended").expect("it was heard");
    done
}

#[test]
fn one_that_closes_its_standard_error_and_lives_on_holds_nothing_up() {
    let short = Duration::from_millis(300);
    let broker = Broker::fork(Some(&crate::broker::tests::native())).expect("a process");
    // It reads nothing; says too much; or closes its socket as well.
    for (script, patience) in [
        ("exec 2>&-; sleep 1000", short),
        ("while :; do echo 'no end of it' >&2; done", short),
        ("exec 2>&- 3>&-; sleep 1000", PATIENCE),
    ] {
        let broker = Arc::clone(&broker);
        let pid = in_bounded_time(move || match fake(&broker, script, patience) {
            Ok(mut passt) => {
                assert!(matches!(passt.report(), SourceEvent::Nothing), "{script}");
                Some(passt.process.pid().cast_unsigned())
            }
            Err(error) => {
                let error = format!("{error:#}");
                assert_eq!(
                    error,
                    "passt does not start: it does not work any more, and was killed"
                );
                None
            }
        });
        assert_eq!(pid.is_none(), script.contains("3>&-"), "{script}");
        assert!(pid.is_none_or(is_gone), "{script}");
    }
}

#[test]
fn one_that_closes_its_standard_error_later_can_go_on_and_its_end_is_noticed() {
    // It takes the first frame, and is there until it is told to go.
    let script = "head -c 64 <&3 >/dev/null; exec 2>&-; head -c 64 <&3 >/dev/null; exit 3";
    let broker = Broker::fork(Some(&crate::broker::tests::native())).expect("a process");
    let mut passt = fake(&broker, script, PATIENCE).expect("it reads");
    assert!(matches!(passt.report(), SourceEvent::Nothing));
    assert!(!passt.is_gone);
    send(&mut passt.stream, &[0; 60], 60).expect("room");
    let deadline = Deadline::after(PATIENCE);
    let ended = passt.process.ended(deadline).expect("an end").to_owned();
    assert_eq!(ended, "exit status: 3");
    let SourceEvent::Gone(why) = passt.report() else {
        panic!("it has ended");
    };
    assert_eq!(why, "passt has ended: exit status: 3");
}

#[test]
fn control_characters_of_passts_are_shown_and_do_nothing() {
    let script = "printf 'a\\033[2Jb\\rc\\n' >&2; exit 1";
    let broker = Broker::fork(Some(&crate::broker::tests::native())).expect("a process");
    let error = fake(&broker, script, PATIENCE).err().expect("it ends");
    let error = format!("{error:#}");
    assert_eq!(error, "passt does not start: a\\x1b[2Jb\\rc");
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
