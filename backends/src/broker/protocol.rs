//! What is said between armlet and its broker.

use std::os::fd::RawFd;

/// The number of the socket that a program is given. It has standard input, output and error
/// beside it, and no other descriptor.
pub const SOCKET: RawFd = 3;

/// The most bytes of a request: a program and its arguments.
pub(super) const MOST_REQUEST: usize = 64 << 10;

/// What the broker says on a process's line: a kind and a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// It runs, with this ID.
    Started(i32),
    /// It could not be started: an errno.
    Failed(i32),
    /// It has ended, and all that it started with it: a status of waitpid(2).
    Ended(i32),
}

impl Word {
    pub(super) const BYTES: usize = 5;

    pub(super) fn to_bytes(self) -> [u8; Word::BYTES] {
        let (kind, number) = match self {
            Word::Started(number) => (0, number),
            Word::Failed(number) => (1, number),
            Word::Ended(number) => (2, number),
        };
        let mut bytes = [kind; Word::BYTES];
        bytes[1..].copy_from_slice(&number.to_le_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: [u8; Word::BYTES]) -> Option<Word> {
        let [kind, number @ ..] = bytes;
        let number = i32::from_le_bytes(number);
        match kind {
            0 => Some(Word::Started(number)),
            1 => Some(Word::Failed(number)),
            2 => Some(Word::Ended(number)),
            _ => None,
        }
    }
}
