//! What is said between armlet and its broker.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// The number of the socket that a program is given. It has standard input, output and error
/// beside it, and no other descriptor.
pub const SOCKET: RawFd = 3;

/// The most bytes of a request: a program and its arguments.
pub(super) const MOST_REQUEST: usize = 64 << 10;
/// The most services of one broker.
pub(super) const MOST_SERVICES: usize = 256;
/// The most descriptors that come with a request: a line, a program's standard error, its socket.
pub(super) const MOST_DESCRIPTORS: usize = 3;

/// What a broker does when it is asked to. All services are named before the broker is sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Service {
    /// Starts the program at an absolute path.
    Program {
        /// The program.
        path: PathBuf,
        /// Its arguments.
        arguments: Vec<OsString>,
        /// Its socket is a listening one, where one connection waits to be accepted; else it is the
        /// socket that comes with the request.
        listens: bool,
        /// Whether it is to gain rights by programs that it executes (set-user-ID).
        gains_rights: bool,
    },
    /// Opens a device file for reading and writing.
    Device(PathBuf),
    /// Opens disk images, files and block devices that come as a path with the request: what a user who
    /// controls the machine may name while the guest runs.
    Images {
        /// Whether they are opened for writing, too; else only for reading.
        writable: bool,
    },
    /// Makes the files of snapshots at places that come with the request, one snapshot at a time: what
    /// clients who control the machine may ask for.
    Snapshots,
    /// Connects to the Unix stream sockets at this path with `_` and a number behind it.
    ///
    /// In a request it is a name in the folder whose descriptor comes with it: an absolute path may be
    /// too long for a socket where a relative one is not.
    Sockets(PathBuf),
    /// Removes the socket at this path when the broker ends, unless something else took its place. In a
    /// request, the path is as above.
    Removal(PathBuf, FileId),
}

/// What a file is, whatever its name: device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    /// The device.
    pub device: u64,
    /// The inode.
    pub inode: u64,
}

/// What armlet asks its broker for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// There is one more service. It has the next number, from 0.
    Offer(Service),
    /// There will be no more services.
    Seal,
    /// The service with this number is to be done, for this port if it has ports.
    Do(u32, u32),
    /// The service with this number is to open the file at this path.
    Open(u32, PathBuf),
}

impl Request {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let with = |kind: u8, text: &OsStr| [&[kind], text.as_bytes()].concat();
        match self {
            Request::Offer(Service::Program {
                path,
                arguments,
                listens,
                gains_rights,
            }) => {
                let kind = match (listens, gains_rights) {
                    (false, false) => b'p',
                    (true, false) => b'l',
                    (false, true) => b'P',
                    (true, true) => b'L',
                };
                let mut bytes = with(kind, path.as_os_str());
                for argument in arguments {
                    bytes.push(0);
                    bytes.extend(argument.as_bytes());
                }
                bytes
            }
            Request::Offer(Service::Device(path)) => with(b'd', path.as_os_str()),
            Request::Offer(Service::Images { writable }) => vec![b'i', u8::from(*writable)],
            Request::Offer(Service::Snapshots) => vec![b'w'],
            Request::Offer(Service::Sockets(path)) => with(b's', path.as_os_str()),
            Request::Offer(Service::Removal(path, file)) => {
                let file = [file.device.to_le_bytes(), file.inode.to_le_bytes()].concat();
                [&b"r"[..], &file, path.as_os_str().as_bytes()].concat()
            }
            Request::Seal => vec![b'!'],
            Request::Do(index, port) => {
                [&b"?"[..], &index.to_le_bytes(), &port.to_le_bytes()].concat()
            }
            Request::Open(index, path) => {
                [&b"o"[..], &index.to_le_bytes(), path.as_os_str().as_bytes()].concat()
            }
        }
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Request> {
        let (kind, rest) = bytes.split_first()?;
        let path_of = |bytes| PathBuf::from(OsStr::from_bytes(bytes));
        let path = || path_of(rest);
        Some(match kind {
            b'p' | b'l' | b'P' | b'L' => {
                let mut words = rest.split(|byte| *byte == 0).map(OsStr::from_bytes);
                Request::Offer(Service::Program {
                    path: words.next()?.into(),
                    arguments: words.map(OsStr::to_owned).collect(),
                    listens: kind.eq_ignore_ascii_case(&b'l'),
                    gains_rights: kind.is_ascii_uppercase(),
                })
            }
            b'd' => Request::Offer(Service::Device(path())),
            b'i' => match rest {
                [writable @ (0 | 1)] => Request::Offer(Service::Images {
                    writable: *writable == 1,
                }),
                _ => return None,
            },
            b'w' if rest.is_empty() => Request::Offer(Service::Snapshots),
            b'o' => {
                let (index, path) = rest.split_first_chunk()?;
                Request::Open(u32::from_le_bytes(*index), path_of(path))
            }
            b's' => Request::Offer(Service::Sockets(path())),
            b'r' => {
                let (device, rest) = rest.split_first_chunk()?;
                let (inode, rest) = rest.split_first_chunk()?;
                let (device, inode) = (u64::from_le_bytes(*device), u64::from_le_bytes(*inode));
                Request::Offer(Service::Removal(path_of(rest), FileId { device, inode }))
            }
            b'!' => Request::Seal,
            b'?' => {
                let (index, port) = rest.split_first_chunk()?;
                let port = port.try_into().ok()?;
                Request::Do(u32::from_le_bytes(*index), u32::from_le_bytes(port))
            }
            _ => return None,
        })
    }
}

/// What the broker says on a line: a kind and a number. A descriptor may come with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// It is done; a program runs, with this ID.
    Done(i32),
    /// It could not be done: an errno.
    Failed(i32),
    /// The program has ended, and all that it started with it: a status of waitpid(2).
    Ended(i32),
    /// No listening socket could be made for the program: an errno.
    NoSocket(i32),
}

impl Word {
    pub(super) const BYTES: usize = 5;

    pub(super) fn to_bytes(self) -> [u8; Word::BYTES] {
        let (kind, number) = match self {
            Word::Done(number) => (0, number),
            Word::Failed(number) => (1, number),
            Word::Ended(number) => (2, number),
            Word::NoSocket(number) => (3, number),
        };
        let mut bytes = [kind; Word::BYTES];
        bytes[1..].copy_from_slice(&number.to_le_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: [u8; Word::BYTES]) -> Option<Word> {
        let [kind, number @ ..] = bytes;
        let number = i32::from_le_bytes(number);
        match kind {
            0 => Some(Word::Done(number)),
            1 => Some(Word::Failed(number)),
            2 => Some(Word::Ended(number)),
            3 => Some(Word::NoSocket(number)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_as_they_were_written() {
        let program = |listens, gains_rights| Service::Program {
            path: "/bin/sh".into(),
            arguments: ["-c", "", "true"].map(Into::into).into(),
            listens,
            gains_rights,
        };
        let file = FileId {
            device: 1 << 40,
            inode: 3,
        };
        let requests = [
            Request::Offer(program(true, true)),
            Request::Offer(program(true, false)),
            Request::Offer(program(false, true)),
            Request::Offer(program(false, false)),
            Request::Offer(Service::Device("/dev/null".into())),
            Request::Offer(Service::Sockets("/tmp/v.sock".into())),
            Request::Offer(Service::Removal("/tmp/v.sock".into(), file)),
            Request::Seal,
            Request::Do(7, u32::MAX),
            Request::Offer(Service::Images { writable: true }),
            Request::Offer(Service::Snapshots),
            Request::Offer(Service::Images { writable: false }),
            Request::Open(7, "/tmp/disk.img".into()),
        ];
        for request in requests {
            assert_eq!(Request::from_bytes(&request.to_bytes()), Some(request));
        }
        for wrong in [
            &b""[..],
            b"x",
            b"?",
            b"?1234567",
            b"?123456789",
            b"i",
            b"i2",
            b"o12",
        ] {
            assert_eq!(Request::from_bytes(wrong), None);
        }
    }
}
