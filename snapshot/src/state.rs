//! `state`: what a machine is besides its memory, in an envelope that tells damage and truncation.

use crate::PAGE;
use crate::runs::Runs;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::str::FromStr;

/// How the file begins.
const MAGIC: [u8; 8] = *b"armlet\x00S";
/// The version of the envelope. What head and body hold has versions of its own.
pub const VERSION: u32 = 1;
/// Magic, version, flags, id, base, three lengths, a field for later, and their checksum.
const HEADER: usize = 52;
/// The checksum at the end.
const TRAILER: usize = 4;
/// The most bytes of the head, of the list of pages, and of the body.
const MOST_HEAD: usize = 1 << 20;
const MOST_PAGES: usize = 64 << 20;
const MOST_BODY: usize = 64 << 20;
/// The most banks of memory.
const MOST_BANKS: usize = 64;
/// Address and size of a bank.
const BANK: usize = 16;

/// Why a file is not the state of a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It begins otherwise.
    #[error(
        "it is not the state of a snapshot; name the folder that 'armlet ctl PATH snapshot' made"
    )]
    Other,
    /// The envelope is one that this program does not know.
    #[error(
        "its format has version {0}, and this armlet reads version {VERSION}; use the armlet that made it, or a newer one"
    )]
    Version(u32),
    /// Bytes at the end are missing.
    #[error("it is truncated: it has {there} bytes of {wanted}; copy it again, whole")]
    Truncated {
        /// The bytes that are there.
        there: u64,
        /// Those that belong to it, as far as it tells.
        wanted: u64,
    },
    /// The checksum is another.
    #[error("it is damaged: its checksum is {found:#010x}, and {told:#010x} is written in it")]
    Damaged {
        /// The checksum of what is there.
        found: u32,
        /// The one that is written.
        told: u32,
    },
    /// A part is larger than any that armlet writes.
    #[error("its {part} has {size} bytes; up to {most} are possible")]
    TooLarge {
        /// The part.
        part: &'static str,
        /// Its bytes.
        size: usize,
        /// The most that are read.
        most: usize,
    },
    /// It is whole, and yet makes no sense.
    #[error("{0}")]
    Wrong(&'static str),
    /// It cannot be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What a snapshot is called, so that what belongs to it is told from what does not: a random number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Id(NonZeroU64);

impl Id {
    /// Returns one that no snapshot has.
    ///
    /// # Errors
    /// When the system has no random numbers.
    pub fn random() -> io::Result<Id> {
        loop {
            let mut bytes = [0; 8];
            rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
            if let Some(id) = NonZeroU64::new(u64::from_le_bytes(bytes)) {
                return Ok(Id(id));
            }
        }
    }

    /// Returns its bytes, as files have them.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 8] {
        self.0.get().to_le_bytes()
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for Id {
    type Err = ();

    fn from_str(text: &str) -> Result<Id, ()> {
        let is_id = text.len() == 16
            && text
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let number = u64::from_str_radix(text, 16).ok().filter(|_| is_id);
        number.and_then(NonZeroU64::new).map(Id).ok_or(())
    }
}

/// A bank of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bank {
    /// Its guest-physical address.
    pub start: u64,
    /// Its size in bytes: whole pages of [`PAGE`] bytes.
    pub size: u64,
}

/// What a machine is besides its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The snapshot.
    pub id: Id,
    /// For a diff, the snapshot that it changes.
    pub base: Option<Id>,
    /// The banks of memory, in the order in which the memory file has them.
    pub banks: Vec<Bank>,
    /// For a diff, the pages of the memory file that changed, by number from its beginning.
    pub changed: Runs,
    /// What people and `armlet plan` read: JSON.
    pub head: Vec<u8>,
    /// What restores a machine.
    pub body: Vec<u8>,
}

impl State {
    /// Returns the size in bytes of the memory that goes with it.
    #[must_use]
    pub fn memory_size(&self) -> u64 {
        self.banks.iter().map(|bank| bank.size).sum()
    }

    /// Returns it as a file has it.
    ///
    /// # Errors
    /// A part that is too large to be read again.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        let mut memory = (self.banks.len() as u32).to_le_bytes().to_vec();
        for bank in &self.banks {
            memory.extend(bank.start.to_le_bytes());
            memory.extend(bank.size.to_le_bytes());
        }
        memory.extend(self.changed.bytes());
        let parts = [&self.head, &memory, &self.body];
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.id.to_bytes());
        bytes.extend(self.base.map_or([0; 8], Id::to_bytes));
        for ((part, most), bytes_of) in LIMITS.into_iter().zip(parts) {
            let size = bytes_of.len();
            check_size(part, size, most)?;
            bytes.extend((size as u32).to_le_bytes());
        }
        bytes.extend([0; 4]);
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        for part in parts {
            bytes.extend(part);
        }
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        Ok(bytes)
    }

    /// Writes it to an empty file.
    ///
    /// # Errors
    /// What the system says, and a part that is too large.
    pub fn write(&self, file: &File) -> Result<(), Error> {
        Ok(file.write_all_at(&self.to_bytes()?, 0)?)
    }

    /// Reads it. It takes no more memory than twice the bytes that are there, and at most that of the
    /// largest state.
    ///
    /// The checksum tells what a disk or a copy damaged. It is none against those who mean harm:
    /// whoever uses head and body checks them.
    ///
    /// # Errors
    /// Why it is none.
    pub fn read(from: &mut impl Read) -> Result<State, Error> {
        let header = Header::read(from)?;
        let mut there = HEADER as u64;
        let wanted =
            header.sizes.iter().map(|size| *size as u64).sum::<u64>() + (HEADER + TRAILER) as u64;
        let mut sum = crc32fast::Hasher::new();
        sum.update(&header.bytes);
        let mut part = |size: usize| -> Result<Vec<u8>, Error> {
            let mut bytes = Vec::new();
            from.take(size as u64).read_to_end(&mut bytes)?;
            there += bytes.len() as u64;
            match bytes.len() == size {
                true => Ok(bytes),
                false => Err(Error::Truncated { there, wanted }),
            }
        };
        let [head, memory, body] = header.sizes;
        let parts = [part(head)?, part(memory)?, part(body)?];
        let trailer = part(TRAILER)?;
        for bytes in &parts {
            sum.update(bytes);
        }
        let (found, told) = (sum.finalize(), number(&trailer));
        if found != told {
            return Err(Error::Damaged { found, told });
        }
        if from.read(&mut [0])? != 0 {
            return Err(Error::Wrong("there is more behind its end"));
        }
        let [head, memory, body] = parts;
        let (banks, changed) = read_memory(&memory)?;
        if header.base.is_none() && !changed.is_empty() {
            return Err(Error::Wrong(
                "it lists changed pages, and names no snapshot that they change",
            ));
        }
        Ok(State {
            id: header.id,
            base: header.base,
            banks,
            changed,
            head,
            body,
        })
    }

    /// Reads only what a state is called.
    ///
    /// # Errors
    /// As for [`Self::read`].
    pub(crate) fn read_id(from: &mut impl Read) -> Result<Id, Error> {
        Ok(Header::read(from)?.id)
    }

    /// Reads only the version of its format, whether this program knows it or not.
    ///
    /// # Errors
    /// A file that is no state.
    pub fn read_version(from: &mut impl Read) -> Result<u32, Error> {
        let mut bytes = [0; MAGIC.len() + 4];
        from.read_exact(&mut bytes).map_err(|error| {
            match error.kind() == io::ErrorKind::UnexpectedEof {
                true => Error::Other,
                false => error.into(),
            }
        })?;
        match bytes.strip_prefix(&MAGIC) {
            Some(version) => Ok(number(version)),
            None => Err(Error::Other),
        }
    }
}

/// The parts after the header, with the most bytes of each.
const LIMITS: [(&str, usize); 3] = [
    ("head", MOST_HEAD),
    ("list of pages", MOST_PAGES),
    ("body", MOST_BODY),
];

fn check_size(part: &'static str, size: usize, most: usize) -> Result<(), Error> {
    match size > most {
        true => Err(Error::TooLarge { part, size, most }),
        false => Ok(()),
    }
}

/// What stands before the parts.
struct Header {
    bytes: [u8; HEADER],
    id: Id,
    base: Option<Id>,
    sizes: [usize; 3],
}

impl Header {
    fn read(from: &mut impl Read) -> Result<Header, Error> {
        let mut bytes = Vec::new();
        from.take(HEADER as u64).read_to_end(&mut bytes)?;
        let there = bytes.len();
        if bytes[..there.min(MAGIC.len())] != MAGIC[..there.min(MAGIC.len())] {
            return Err(Error::Other);
        }
        let field = |at: usize| bytes.get(at..at + 4).map(number);
        if let Some(version) = field(8).filter(|version| *version != VERSION) {
            return Err(Error::Version(version));
        }
        let Ok(bytes) = <[u8; HEADER]>::try_from(bytes.as_slice()) else {
            let (there, wanted) = (there as u64, (HEADER + TRAILER) as u64);
            return Err(Error::Truncated { there, wanted });
        };
        let (found, told) = (
            crc32fast::hash(&bytes[..HEADER - 4]),
            number(&bytes[HEADER - 4..]),
        );
        if found != told {
            return Err(Error::Damaged { found, told });
        }
        let long = |at: usize| NonZeroU64::new(number64(&bytes[at..at + 8])).map(Id);
        let id = long(16).ok_or(Error::Wrong("it has no id"))?;
        let mut sizes = [0; 3];
        for (index, (part, most)) in LIMITS.into_iter().enumerate() {
            let at = 32 + 4 * index;
            sizes[index] = number(&bytes[at..at + 4]) as usize;
            check_size(part, sizes[index], most)?;
        }
        let is_known = [12, 44].iter().all(|at| number(&bytes[*at..at + 4]) == 0);
        if !is_known {
            return Err(Error::Wrong(
                "it has what this armlet does not know; use a newer one",
            ));
        }
        Ok(Header {
            bytes,
            id,
            base: long(24),
            sizes,
        })
    }
}

/// Reads banks, and the list of changed pages behind them.
fn read_memory(bytes: &[u8]) -> Result<(Vec<Bank>, Runs), Error> {
    let cut = Error::Wrong("its list of memory banks ends early");
    let Some((count, rest)) = bytes.split_at_checked(4) else {
        return Err(cut);
    };
    let count = number(count) as usize;
    if count > MOST_BANKS {
        return Err(Error::Wrong("it has more memory banks than any machine"));
    }
    let Some((banks, changed)) = rest.split_at_checked(count * BANK) else {
        return Err(cut);
    };
    let banks: Vec<Bank> = banks
        .chunks_exact(BANK)
        .map(|bank| Bank {
            start: number64(&bank[..8]),
            size: number64(&bank[8..]),
        })
        .collect();
    let mut total = 0_u64;
    for bank in &banks {
        let end = bank.start.checked_add(bank.size);
        let sum = total.checked_add(bank.size);
        // Files have no larger offsets.
        let (Some(_), Some(sum)) = (end, sum.filter(|sum| i64::try_from(*sum).is_ok())) else {
            return Err(Error::Wrong("its memory banks are larger than any memory"));
        };
        if bank.size == 0 || bank.size % PAGE != 0 || bank.start % PAGE != 0 {
            return Err(Error::Wrong(
                "its memory banks do not consist of pages of 4 KiB",
            ));
        }
        total = sum;
    }
    let changed = Runs::from_bytes(changed, total / PAGE).ok_or(Error::Wrong(
        "its list of changed pages is none, or has pages that its memory does not have",
    ))?;
    Ok((banks, changed))
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes.try_into().expect("four bytes"))
}

fn number64(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The state of a diff, with this head.
    pub(crate) fn state(head: &[u8]) -> State {
        let mut changed = Runs::default();
        changed.push(3..5);
        changed.push(9..10);
        State {
            id: "00000000000000ab".parse().expect("an id"),
            base: Some(Id(NonZeroU64::MAX)),
            banks: vec![
                Bank {
                    start: 0x4000_0000,
                    size: 8 * PAGE,
                },
                Bank {
                    start: 0x8000_0000,
                    size: 2 * PAGE,
                },
            ],
            changed,
            head: head.to_vec(),
            body: (0..200).collect(),
        }
    }

    fn read(bytes: &[u8]) -> Result<State, Error> {
        State::read(&mut &*bytes)
    }

    #[test]
    fn a_state_is_read_as_it_was_written() {
        let state = state(b"{}");
        let bytes = state.to_bytes().expect("small parts");
        assert_eq!(read(&bytes).expect("a state"), state);
        assert_eq!(state.memory_size(), 10 * PAGE);
        assert_eq!(State::read_id(&mut &*bytes).expect("an id"), state.id);
    }

    #[test]
    fn the_version_of_any_state_is_read_and_of_nothing_else() {
        let mut bytes = state(b"{}").to_bytes().expect("small parts");
        let version = |bytes: &[u8]| State::read_version(&mut &*bytes);
        assert_eq!(version(&bytes).expect("a state"), VERSION);
        // Of one of the future, nothing more is known.
        bytes[8] = 7;
        assert_eq!(version(&bytes[..12]).expect("a state"), 7);
        assert!(matches!(version(&bytes[..11]), Err(Error::Other)));
        assert!(matches!(version(b"another file"), Err(Error::Other)));
    }

    #[test]
    fn a_truncated_state_is_refused_at_every_length() {
        let bytes = state(b"{}").to_bytes().expect("small parts");
        for length in 0..bytes.len() {
            let error = read(&bytes[..length]).expect_err("truncated");
            let Error::Truncated { there, wanted } = error else {
                panic!("{length}: {error}");
            };
            assert_eq!(there, length as u64);
            let told = if length < HEADER {
                HEADER + TRAILER
            } else {
                bytes.len()
            };
            assert_eq!(wanted, told as u64);
        }
        let longer = [&bytes[..], b"x"].concat();
        let error = read(&longer).expect_err("longer").to_string();
        assert!(error.contains("more behind its end"), "{error}");
    }

    #[test]
    fn a_flipped_bit_is_noticed_wherever_it_is() {
        let bytes = state(b"{}").to_bytes().expect("small parts");
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let error = read(&damaged).expect_err("damaged");
            let known = match bit / 64 {
                0 => matches!(error, Error::Other),
                1 if bit / 32 == 2 => matches!(error, Error::Version(_)),
                _ => matches!(error, Error::Damaged { .. }),
            };
            assert!(known, "bit {bit}: {error}");
        }
    }

    #[test]
    fn errors_say_what_would_work_in_a_line() {
        let mut newer = state(b"").to_bytes().expect("small parts");
        newer[8] = 7;
        for (bytes, words) in [
            (b"#!/bin/sh\n".as_slice(), "not the state of a snapshot"),
            (&newer, "has version 7, and this armlet reads version 1"),
            (b"", "0 bytes of 56"),
        ] {
            let error = read(bytes).expect_err("no state").to_string();
            assert!(error.contains(words) && !error.contains('\n'), "{error}");
        }
        let large = state(&vec![b' '; MOST_HEAD + 1]).to_bytes();
        let error = large.expect_err("too large").to_string();
        assert!(error.contains("its head has 1048577 bytes"), "{error}");
    }

    /// Writes both checksums anew.
    fn seal(bytes: &mut [u8]) {
        let end = bytes.len() - TRAILER;
        let sum = crc32fast::hash(&bytes[..HEADER - 4]);
        bytes[HEADER - 4..HEADER].copy_from_slice(&sum.to_le_bytes());
        let sum = crc32fast::hash(&bytes[..end]);
        bytes[end..].copy_from_slice(&sum.to_le_bytes());
    }

    /// A reader that says how much it was asked for.
    struct Endless(u64);

    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0 += buffer.len() as u64;
            buffer.fill(0);
            Ok(buffer.len())
        }
    }

    #[test]
    fn a_claimed_length_takes_no_memory() {
        let mut bytes = state(b"{}").to_bytes().expect("small parts");
        bytes[40..44].copy_from_slice(&(MOST_BODY as u32).to_le_bytes());
        seal(&mut bytes);
        assert!(matches!(read(&bytes), Err(Error::Truncated { .. })));
        bytes[40..44].copy_from_slice(&u32::MAX.to_le_bytes());
        seal(&mut bytes);
        assert!(matches!(
            read(&bytes),
            Err(Error::TooLarge { part: "body", .. })
        ));
        // A device that never ends is read up to a bound.
        let mut endless = Endless(0);
        let mut from = (&bytes[..HEADER]).chain(&mut endless);
        assert!(State::read(&mut from).is_err());
        assert!(endless.0 <= 4096, "{}", endless.0);
    }

    #[test]
    fn memory_that_cannot_be_is_refused() {
        let good = state(b"");
        let bank = |start, size| Bank { start, size };
        for (banks, words) in [
            (vec![bank(0, 4096 + 1)], "pages of 4 KiB"),
            (vec![bank(0, 0)], "pages of 4 KiB"),
            (vec![bank(1, 4096)], "pages of 4 KiB"),
            (vec![bank(u64::MAX - 4095, 4096)], "larger than any"),
            (vec![bank(0, 1 << 62), bank(0, 1 << 62)], "larger than any"),
            (vec![bank(0, 4096); MOST_BANKS + 1], "more memory banks"),
            (vec![bank(0, 4096)], "pages that its memory does not have"),
        ] {
            let state = State {
                banks,
                ..good.clone()
            };
            let error = read(&state.to_bytes().expect("bytes")).expect_err(words);
            assert!(error.to_string().contains(words), "{error}");
        }
        let full = State { base: None, ..good };
        let error = read(&full.to_bytes().expect("bytes")).expect_err("a base");
        assert!(error.to_string().contains("names no snapshot"), "{error}");
    }

    proptest! {
        #[test]
        fn whatever_is_sealed_is_read_or_refused(
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = state(b"{}").to_bytes().expect("small parts");
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            let length = HEADER + TRAILER + cut.index(bytes.len() - HEADER - TRAILER + 1);
            bytes.truncate(length);
            seal(&mut bytes);
            if let Ok(state) = read(&bytes) {
                prop_assert_eq!(state.to_bytes().expect("it was read"), bytes);
            }
        }
    }
}
