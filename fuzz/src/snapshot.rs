//! Snapshots: states, lists of pages, and pairs of files.

use std::os::fd::AsRawFd;
use std::path::PathBuf;

use armlet_snapshot::prefetch::Prefetch;
use armlet_snapshot::{Error, PAGE, Paths, Runs, Snapshot, State};
use crc::{CRC_32_ISO_HDLC, Crc};

use super::files::file;

/// The bytes of a state's header, whose last four are their checksum.
const HEADER: usize = 52;
/// The most memory of a snapshot whose pair of files is opened.
const MOST_MEMORY: u64 = 1 << 30;

/// Bytes that are damaged, and ones whose checksums are right: the first byte says which.
pub fn snapshot(data: &[u8]) {
    let Some((kind, bytes)) = data.split_first() else {
        return;
    };
    let mut bytes = bytes.to_vec();
    if kind & 1 == 1 {
        if kind & 2 == 0 && bytes.len() > HEADER {
            seal(&mut bytes[..HEADER]);
        }
        seal(&mut bytes);
    }
    if kind & 2 == 2 {
        return list(&bytes);
    }
    let state = State::read(&mut bytes.as_slice());
    let state_file = file(&bytes);
    let memory_file = file(&[]);
    let path = |fd: &std::fs::File| PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let paths = Paths::pair(&path(&state_file), &path(&memory_file));
    match state {
        Err(error) => {
            assert!(!matches!(error, Error::Io(_)), "{error}");
            assert!(!error.to_string().contains('\n'), "{error}");
            assert!(Snapshot::open(&paths).is_err());
        }
        Ok(state) => {
            assert_eq!(state.to_bytes().expect("it was read"), bytes);
            let size = state.memory_size();
            runs(&state.changed, size);
            assert!(size == 0 || Snapshot::open(&paths).is_err());
            if size <= MOST_MEMORY {
                memory_file.set_len(size).expect("a hole");
                let opened = Snapshot::open(&paths).expect("a pair");
                assert_eq!(opened.state, state);
            }
        }
    }
}

/// A list of pages of a snapshot whose memory has a mebibyte.
fn list(bytes: &[u8]) {
    let id = "00000000000000ab".parse().expect("an id");
    if let Some(list) = Prefetch::from_bytes(bytes, id, 1 << 20) {
        assert_eq!(list.to_bytes(id), bytes);
        runs(&list.read, 1 << 20);
        runs(&list.written, 1 << 20);
    }
}

/// Runs lie in order and within `size` bytes.
fn runs(runs: &Runs, size: u64) {
    let (mut end, mut pages) = (0, 0);
    for run in runs.iter() {
        assert!(run.start < run.end && run.start >= end && run.end <= size / PAGE);
        end = run.end;
        pages += run.end - run.start;
    }
    assert_eq!(pages, runs.pages());
}

/// Writes the checksum of what is before it into the last four bytes.
fn seal(bytes: &mut [u8]) {
    if let Some((bytes, sum)) = bytes.split_last_chunk_mut() {
        *sum = Crc::<u32>::new(&CRC_32_ISO_HDLC)
            .checksum(bytes)
            .to_le_bytes();
    }
}
