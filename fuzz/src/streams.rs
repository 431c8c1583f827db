//! What other processes say on sockets: passt's frames, answers of vhost-user.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use armlet_backends::net::passt::stream::{Broken, LONGEST, Stream};
use armlet_backends::vhost_user::VhostUser;
use armlet_system::deadline::Deadline;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, VolatileSlice};

use super::input::Input;

fn pair() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("descriptors");
    ours.set_nonblocking(true).expect("a socket");
    theirs.set_nonblocking(true).expect("a socket");
    (ours, theirs)
}

/// The frames that a stream of bytes holds, as far as they are whole; and the length that is none.
fn frames(mut bytes: &[u8]) -> (Vec<&[u8]>, Option<u32>) {
    let mut frames = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<4>() {
        let length = u32::from_be_bytes(*length);
        if length == 0 || length as usize > LONGEST {
            return (frames, Some(length));
        }
        let Some((frame, later)) = rest.split_at_checked(length as usize) else {
            break;
        };
        frames.push(frame);
        bytes = later;
    }
    (frames, None)
}

/// A stream of frames in both directions.
pub fn passt(data: &[u8]) {
    let mut input = Input::new(data);
    let (ours, mut theirs) = pair();
    let mut stream = Stream::new(OwnedFd::from(ours));
    let (mut said, mut heard) = (Vec::new(), Vec::new());
    let (mut sent, mut seen): (Vec<u8>, Vec<u8>) = Default::default();
    let mut wrong = None;
    let mut left = 64;
    while !input.is_empty() && left > 0 {
        left -= 1;
        match input.u8() {
            0..=95 => {
                let size = match input.u8() {
                    0..=199 => u32::from(input.u8()),
                    200..=239 => u32::from(input.u16()),
                    _ => input.number(),
                };
                let mut bytes = size.to_be_bytes().to_vec();
                if input.flag() {
                    // As much as was said, or less.
                    let most = (size as usize).min(LONGEST);
                    bytes.resize(4 + most - input.below(most + 1).min(most), input.u8());
                } else {
                    bytes.resize(4 + (size as usize).min(LONGEST), input.u8());
                }
                if let Ok(count) = theirs.write(&bytes) {
                    said.extend(&bytes[..count]);
                }
            }
            96..=127 => {
                let bytes = input.bytes(16);
                if let Ok(count) = theirs.write(bytes) {
                    said.extend(&bytes[..count]);
                }
            }
            128..=191 => {
                if wrong.is_none() {
                    match stream.receive(<[u8]>::to_vec) {
                        Ok(frame) => heard.push(frame),
                        Err(Broken::Wait) => {}
                        Err(Broken::Wrong(size)) => wrong = Some(size),
                        Err(Broken::Closed) => panic!("nobody closed it"),
                    }
                }
            }
            192..=239 => {
                let size = match input.rarely(4) {
                    true => usize::from(input.u16()).clamp(1, LONGEST),
                    false => 1 + input.below(255),
                };
                let mut frame = vec![input.u8(); size];
                let cut = input.below(size);
                let expected = [&(size as u32).to_be_bytes()[..], &frame].concat();
                let (first, second) = frame.split_at_mut(cut);
                let pieces = [VolatileSlice::from(first), VolatileSlice::from(second)];
                match stream.send(size, || pieces.iter().copied()) {
                    Ok(()) => sent.extend(expected),
                    Err(error) => assert_eq!(error, Broken::Wait),
                }
            }
            _ => {
                let mut room = vec![0; 1 + usize::from(input.u16())];
                if let Ok(count) = theirs.read(&mut room) {
                    seen.extend(&room[..count]);
                }
            }
        }
    }
    // All that was sent arrives.
    loop {
        let flushed = stream.flush();
        let mut room = vec![0; 1 << 16];
        let count = theirs.read(&mut room).unwrap_or(0);
        seen.extend(&room[..count]);
        if flushed.is_ok() && count == 0 {
            break;
        }
    }
    assert!(
        sent == seen,
        "{} bytes of {} arrive",
        seen.len(),
        sent.len()
    );
    // And all that was said is heard, as far as it is frames.
    theirs.shutdown(Shutdown::Write).expect("a socket");
    while wrong.is_none() {
        match stream.receive(<[u8]>::to_vec) {
            Ok(frame) => heard.push(frame),
            Err(Broken::Wrong(size)) => wrong = Some(size),
            Err(error) => {
                assert_eq!(error, Broken::Closed);
                break;
            }
        }
    }
    let expected = frames(&said);
    assert!(expected.0 == heard, "{} frames", heard.len());
    assert_eq!(expected.1, wrong);
}

/// Guest memory that another process can have.
fn memory() -> GuestMemoryMmap {
    const SIZE: usize = 1 << 16;
    let file = memfd_create("armlet-fuzz", MemfdFlags::CLOEXEC).expect("descriptors");
    rustix::fs::ftruncate(&file, SIZE as u64).expect("memory");
    let place = Some(FileOffset::new(file.into(), 0));
    let banks = [(GuestAddress(0), SIZE, place)];
    GuestMemoryMmap::from_ranges_with_files(banks).expect("memory")
}

/// Answers to what a vhost-user frontend asks.
pub fn vhost_user(data: &[u8]) {
    thread_local! {
        static MEMORY: GuestMemoryMmap = memory();
    }
    let mut input = Input::new(data);
    let (ours, mut theirs) = pair();
    let mut answers = Vec::new();
    let shape = input.u8();
    for request in [1, 15, 17, 3, 2, 5] {
        let number = match (request, input.u8()) {
            (1, 0..=191) => 1 << 30 | 1 << 32,
            (15, 0..=191) => u64::from(shape),
            (17, 0..=191) => 2,
            (2 | 3 | 5, 0..=223) => 0,
            _ => input.u64(),
        };
        let odd = input.u8();
        let words = [
            if odd == 1 { input.u32() } else { request },
            if odd == 2 { input.u32() } else { 5 },
            if odd == 3 { input.u32() } else { 8 },
        ];
        // One who does not confirm is not asked to.
        if matches!(request, 2 | 3 | 5) && shape & 8 == 0 {
            continue;
        }
        answers.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        answers.extend(number.to_le_bytes());
        if odd == 4 {
            answers.truncate(answers.len() - input.below(20));
            break;
        }
        if odd == 5 {
            answers.extend(input.bytes(32));
        }
    }
    answers.extend(input.rest());
    let _ = theirs.write(&answers);
    // One who does not hang up is waited for until the deadline, and whatever was said is there.
    let hangs_up = shape & 0xf0 != 0;
    let (patience, longest) = match hangs_up {
        true => (Duration::from_secs(60), Duration::from_secs(30)),
        false => (Duration::from_millis(2), Duration::from_secs(5)),
    };
    if hangs_up {
        theirs.shutdown(Shutdown::Write).expect("a socket");
    }
    let begun = Instant::now();
    if let Ok(user) = VhostUser::connect(ours, Deadline::after(patience)) {
        assert_eq!(user.features() & 1 << 30, 0);
        let _ = user.queues();
        assert!(!(hangs_up && user.is_alive()), "it hung up");
        let deadline = Deadline::after(patience);
        let _ = MEMORY.with(|memory| user.start(u64::MAX, memory, &[], deadline));
        user.hang_up();
    }
    let taken = begun.elapsed();
    assert!(taken < longest, "it took {taken:?}");
}
