//! The frontend with other processes that answer well, badly or not at all.

use super::*;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, recvmsg};
use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// VERSION_1, INDIRECT_DESC, EVENT_IDX and that of the connection.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28;

/// When something has come that comes at once.
fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

/// A message as the other process gets it.
struct Message {
    request: u32,
    flags: u32,
    payload: Vec<u8>,
    files: Vec<OwnedFd>,
}

impl Message {
    /// Reads one; `None` at the end of the connection.
    fn read(mut socket: &UnixStream) -> Option<Message> {
        let mut header = [0; HEADER];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut header)];
        let got = recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC);
        // A connection that is closed with an answer unread is reset.
        if got.map_or(0, |got| got.bytes) < HEADER {
            return None;
        }
        let mut files = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights);
            }
        }
        let word = |at: usize| u32::from_le_bytes(*header[at..].first_chunk().expect("4"));
        let mut payload = vec![0; word(8) as usize];
        socket.read_exact(&mut payload).expect("all of it");
        Some(Message {
            request: word(0),
            flags: word(4),
            payload,
            files,
        })
    }

    fn number(&self, at: usize) -> u64 {
        u64::from_le_bytes(*self.payload[at..].first_chunk().expect("8 bytes"))
    }

    /// The answer of one who does what it is asked to.
    fn answer(&self) -> Option<u64> {
        match self.request {
            1 => Some(FEATURES),
            15 => Some(0xff),
            17 => Some(2),
            _ => (self.flags & NEED_REPLY != 0).then_some(0),
        }
    }
}

fn reply(request: u32, number: u64) -> Vec<u8> {
    let mut bytes = Payload::default();
    bytes.u32(request).u32(VERSION | REPLY).u32(8).u64(number);
    bytes.0
}

/// Another process, as a thread: it answers as `answers` says, and hangs up at `None`. It
/// returns what it was sent.
fn backend(
    mut answers: impl FnMut(&Message) -> Option<Vec<u8>> + Send + 'static,
) -> (UnixStream, JoinHandle<Vec<Message>>) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let thread = std::thread::spawn(move || {
        let mut messages = Vec::new();
        while let Some(message) = Message::read(&theirs) {
            let answer = answers(&message);
            messages.push(message);
            match answer {
                Some(bytes) => (&theirs).write_all(&bytes).expect("room"),
                None => break,
            }
        }
        messages
    });
    (ours, thread)
}

/// As [`backend`], with a pause before each byte of an answer. The thread returns how many bytes
/// the last answer had when the connection was closed.
fn backend_in_pieces(
    mut answers: impl FnMut(&Message) -> (Option<Vec<u8>>, Duration) + Send + 'static,
) -> (UnixStream, JoinHandle<usize>) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let thread = std::thread::spawn(move || {
        let mut count = 0;
        while let Some(message) = Message::read(&theirs) {
            let (answer, pause) = answers(&message);
            count = 0;
            for byte in answer.unwrap_or_default() {
                std::thread::sleep(pause);
                if (&theirs).write_all(&[byte]).is_err() {
                    break;
                }
                count += 1;
            }
        }
        count
    });
    (ours, thread)
}

fn obedient(message: &Message) -> Option<Vec<u8>> {
    let answer = message.answer();
    Some(answer.map_or_else(Vec::new, |number| reply(message.request, number)))
}

fn memory() -> GuestMemoryMmap {
    let name = "armlet-test";
    let file = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC);
    let file = File::from(file.expect("a memfd"));
    file.set_len(3 << 20).expect("room");
    let offset = |start| {
        let file = file.try_clone().expect("a descriptor");
        Some(vm_memory::FileOffset::new(file, start))
    };
    let ranges = [
        (vm_memory::GuestAddress(0x4000_0000), 1 << 20, offset(0)),
        (
            vm_memory::GuestAddress(0x8000_0000),
            2 << 20,
            offset(1 << 20),
        ),
    ];
    GuestMemoryMmap::from_ranges_with_files(ranges).expect("memory")
}

#[test]
fn what_both_know_is_agreed_on() {
    let (socket, thread) = backend(obedient);
    let connection = VhostUser::connect(socket, soon()).expect("an obedient one");
    assert_eq!(connection.features(), 1 << 32 | 1 << 29 | 1 << 28);
    assert_eq!(connection.queues(), 2);
    assert!(connection.is_alive());
    connection.hang_up();
    let messages = thread.join().expect("it ran");
    let requests: Vec<u32> = messages.iter().map(|message| message.request).collect();
    assert_eq!(requests, [1, 15, 16, 17, 3]);
    // The features of the connection that it offers and that are known here.
    assert_eq!(messages[2].number(0), PROTOCOL_MQ | PROTOCOL_REPLY_ACK);
    assert!(messages.iter().all(|message| message.flags & 3 == VERSION));
    assert!(!connection.is_alive());
}

#[test]
fn memory_goes_over_as_files() {
    let (socket, thread) = backend(obedient);
    let connection = VhostUser::connect(socket, soon()).expect("an obedient one");
    connection
        .start(1 << 32, &memory(), &[], soon())
        .expect("memory");
    connection.hang_up();
    let messages = thread.join().expect("it ran");
    let features = &messages[5];
    assert_eq!(features.request, 2);
    assert_eq!(features.number(0), 1 << 32 | PROTOCOL_FEATURES);
    let table = &messages[6];
    assert_eq!(table.request, 5);
    assert_eq!(table.files.len(), 2);
    assert_eq!(table.payload.len(), 8 + 2 * 32);
    assert_eq!(table.payload[0], 2);
    let second: Vec<u64> = (0..4).map(|at| table.number(40 + 8 * at)).collect();
    assert_eq!(second, [0x8000_0000, 2 << 20, 0x8000_0000, 1 << 20]);
}

#[test]
fn persistent_memory_that_can_be_written_goes_over_as_well() {
    let file = |path: &Path| {
        let file = std::fs::File::options().read(true).write(true).open(path);
        file.expect("a file")
    };
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    std::fs::write(&path, vec![0; 4096]).expect("a file");
    let mut whole = memory();
    for (index, readonly) in [(0_u64, false), (1, true)] {
        let mapped = crate::pages::map_file(&file(&path), 4096, readonly);
        let address = mapped.expect("a mapping") as usize;
        let start = vm_memory::GuestAddress((1 << 40) + (index << 30));
        let region = crate::pages::region(start, address, 4096, file(&path), readonly);
        let region = Arc::new(region.expect("a region"));
        whole = whole.insert_region(region).expect("no overlap");
    }
    let banks = memory().num_regions();
    assert_eq!(whole.num_regions(), banks + 2);
    let shared: Vec<u64> = shared_regions(&whole)
        .expect("few of them")
        .iter()
        .map(|region| region.start_addr().0)
        .collect();
    assert_eq!(shared.len(), banks + 1);
    assert_eq!(shared.last(), Some(&(1 << 40)));
}

#[test]
fn memory_that_is_in_no_file_is_refused() {
    let (socket, _thread) = backend(obedient);
    let connection = VhostUser::connect(socket, soon()).expect("an obedient one");
    let ranges = [(vm_memory::GuestAddress(0), 1 << 20)];
    let memory = GuestMemoryMmap::from_ranges(&ranges).expect("memory");
    let error = connection
        .start(0, &memory, &[], soon())
        .expect_err("private");
    assert!(error.to_string().contains("in no file"), "{error:#}");
}

#[test]
fn a_ring_that_it_lets_go_of_has_a_number() {
    // The index of the ring in the lower half, the number in the upper one.
    for (answer, told) in [
        (1 | 7 << 32, Some(7)),
        (1 | 0xffff << 32, Some(0xffff)),
        (7 << 32, None),
        (1 | 0x1_0000 << 32, None),
    ] {
        let (socket, thread) = backend(move |message| match message.request {
            11 => Some(reply(11, answer)),
            _ => obedient(message),
        });
        let connection = VhostUser::connect(socket, soon()).expect("an obedient one");
        let paused = connection.pause(&[1], soon());
        connection.hang_up();
        let messages = thread.join().expect("it ran");
        let message = messages.last().expect("a message");
        assert_eq!((message.request, message.flags), (11, VERSION));
        assert_eq!(message.payload, [1, 0, 0, 0, 0, 0, 0, 0]);
        match (paused, told) {
            (Ok(bases), Some(told)) => assert_eq!(bases, [told]),
            (Err(error), None) => {
                let error = error.to_string();
                assert!(error.contains("GetVringBase of queue 1"), "{error}");
            }
            (paused, told) => panic!("{paused:?}, not {told:?}"),
        }
    }
}

#[test]
fn a_refusal_is_an_error() {
    let (socket, _thread) = backend(|message| match message.request {
        5 => Some(reply(5, 22)),
        _ => obedient(message),
    });
    let connection = VhostUser::connect(socket, soon()).expect("so far so good");
    let error = connection.start(0, &memory(), &[], soon()).expect_err("22");
    assert!(error.to_string().contains("refuses SetMemTable with 22"));
}

#[test]
fn answers_to_nothing_that_was_asked_are_errors() {
    let long = {
        let mut bytes = Payload::default();
        bytes.u32(1).u32(VERSION | REPLY).u32(u32::MAX);
        bytes.0
    };
    let no_answer = {
        let mut bytes = Payload::default();
        bytes.u32(1).u32(VERSION).u32(8).u64(FEATURES);
        bytes.0
    };
    for (answer, what) in [
        (reply(2, FEATURES), "answers GetFeatures with message 2"),
        (long, "of 4294967295 bytes"),
        (no_answer, "flags 0x1"),
    ] {
        let (socket, _thread) = backend(move |_| Some(answer.clone()));
        let error = VhostUser::connect(socket, soon()).expect_err(what);
        assert!(error.to_string().contains(what), "{error:#}");
    }
}

#[test]
fn one_that_hangs_up_or_says_nothing_is_not_waited_for() {
    let (socket, _thread) = backend(|_| None);
    let error = VhostUser::connect(socket, soon()).expect_err("it ends");
    assert!(
        error.to_string().contains("hung up at GetFeatures"),
        "{error:#}"
    );
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let error =
        VhostUser::connect(ours, Deadline::after(Duration::from_millis(1))).expect_err("silence");
    let text = error.to_string();
    assert!(
        text.contains("does not answer GetFeatures within 1 ms"),
        "{text}"
    );
    drop(theirs);
}

#[test]
fn one_that_answers_byte_by_byte_has_no_more_time_than_others() {
    // Each byte comes soon enough for a wait that begins anew with it.
    const PAUSE: Duration = Duration::from_millis(50);
    const PATIENCE: Duration = Duration::from_millis(300);
    for slow in [1, 5] {
        let (socket, thread) = backend_in_pieces(move |message| {
            let pause = match message.request == slow {
                true => PAUSE,
                false => Duration::ZERO,
            };
            (obedient(message), pause)
        });
        let error = match slow {
            1 => VhostUser::connect(socket, Deadline::after(PATIENCE)).map(drop),
            _ => VhostUser::connect(socket, soon()).and_then(|connection| {
                let patience = Deadline::after(PATIENCE);
                connection.start(0, &memory(), &[], patience)
            }),
        };
        let error = error.expect_err("20 bytes in a second");
        let error = error.to_string();
        assert!(error.contains("within 300 ms"), "{error}");
        let sent = thread.join().expect("it ran");
        assert!(sent < HEADER + 8, "{sent} bytes were waited for");
    }
}

#[test]
fn one_that_takes_its_time_for_each_answer_has_one_deadline_for_all() {
    let (socket, _thread) = backend(|message| {
        std::thread::sleep(Duration::from_millis(60));
        obedient(message)
    });
    let patience = Duration::from_millis(150);
    let error = VhostUser::connect(socket, Deadline::after(patience));
    let error = error.expect_err("five answers in 300 ms").to_string();
    assert!(error.contains("within 150 ms"), "{error}");
}

#[test]
fn one_that_reads_nothing_is_not_waited_for() {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    ours.set_nonblocking(true).expect("a socket");
    while (&ours).write(&[0; 4096]).is_ok() {}
    let error = VhostUser::connect(ours, Deadline::after(Duration::from_millis(1)));
    let error = error.expect_err("there is no room").to_string();
    assert!(error.contains("GetFeatures within 1 ms"), "{error}");
    drop(theirs);
}

#[test]
fn one_that_talks_unasked_is_as_good_as_gone() {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let other = theirs.try_clone().expect("a descriptor");
    let thread = std::thread::spawn(move || {
        while let Some(message) = Message::read(&theirs) {
            let bytes = obedient(&message).unwrap_or_default();
            (&theirs).write_all(&bytes).expect("room");
        }
    });
    let connection = VhostUser::connect(ours, soon()).expect("an obedient one");
    assert!(connection.is_alive());
    (&other).write_all(b"hello").expect("room");
    assert!(!connection.is_alive());
    connection.hang_up();
    thread.join().expect("it ran");
}
