//! The process that unpacks a compressed kernel: what its data may do to a decompressor ends there.
//!
//! It is forked while the kernel is opened, before there are threads and guest memory, and lives as
//! long as the kernel is held, because a confined armlet cannot fork at a reset. It has three
//! descriptors: requests, results, and the kernel's file. `sys` takes everything else from it.
//!
//! A result is a sequence of frames: a word with the frame's kind and length, and so many bytes.

mod sys;

use super::unpack::{unpack_all, unpack_head};
use anyhow::{Context as _, Result, bail, ensure};
use armlet_arch::image::{Compression, HEAD};
use armlet_system::deadline::Deadline;
use armlet_system::eintr::uninterrupted;
use armlet_system::messages::visible;
use rustix::event::PollFlags;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::process::{Pid, PidfdFlags, WaitOptions, pidfd_open, waitpid};
use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// How long unpacking may take: xz on a slow core takes tens of seconds.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long the process may take to end.
const END: Duration = Duration::from_secs(1);
/// The bytes that the pipe of results should hold, so that both sides work at once.
const PIPE: usize = 1 << 20;
/// The most bytes of a message.
const LONGEST: usize = 1024;
/// The kinds of frames, in the uppermost byte of the word: data, the end of them, and an error.
const DATA: u32 = 0;
const DONE: u32 = 1;
const FAILED: u32 = 2;
/// Where the kind is in the word.
const KIND: u32 = 24;
/// The request for the first bytes; any other number is the most bytes of the whole.
const FIRST_BYTES: u64 = 0;

/// A compressed kernel in a file.
#[derive(Debug)]
pub(super) struct Packed {
    file: File,
    span: Range<u64>,
    compression: Compression,
}

/// The process, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct Unpacker {
    pid: Option<Pid>,
    /// `None` once it is to end.
    requests: Option<OwnedFd>,
    results: OwnedFd,
    /// Fuzzers want to see what the decompressors do.
    packed: Packed,
}

impl Unpacker {
    /// Starts the process.
    ///
    /// # Errors
    /// What the system refuses.
    pub(super) fn start(
        file: &File,
        span: &Range<u64>,
        compression: Compression,
    ) -> Result<Unpacker> {
        let cannot = "cannot make the process that unpacks it";
        let packed = Packed {
            file: file.try_clone().context(cannot)?,
            span: span.clone(),
            compression,
        };
        let (asked, requests) = pipe_with(PipeFlags::CLOEXEC).context(cannot)?;
        let (results, given) = pipe_with(PipeFlags::CLOEXEC).context(cannot)?;
        // A user who has many pipes gets smaller ones.
        let _ = fcntl_setpipe_size(&results, PIPE);
        let mut pid = None;
        if !cfg!(fuzzing) {
            let work = |asked: &OwnedFd, given: &OwnedFd, file: &File| {
                serve(asked, given, file, &packed.span, compression)
            };
            pid = Some(sys::start(asked, given, &packed.file, work).context(cannot)?);
        }
        Ok(Unpacker {
            pid,
            requests: Some(requests),
            results,
            packed,
        })
    }

    /// Unpacks the first [`HEAD`] bytes, or fewer if there are no more.
    ///
    /// # Errors
    /// Damaged data, in the decompressor's words.
    pub(super) fn head(&self) -> Result<Vec<u8>> {
        if cfg!(fuzzing) {
            let packed = &self.packed;
            return unpack_head(&packed.file, &packed.span, packed.compression);
        }
        let mut head = vec![0; HEAD];
        let got = self.ask(FIRST_BYTES, &mut head)?;
        head.truncate(got);
        Ok(head)
    }

    /// Unpacks everything into `dst`, and fails if it does not fit. Returns the number of bytes
    /// written.
    ///
    /// # Errors
    /// Damaged data, in the decompressor's words.
    pub(super) fn all(&self, dst: &mut [u8]) -> Result<u64> {
        if cfg!(fuzzing) {
            let packed = &self.packed;
            let (file, span, most) = (&packed.file, &packed.span, dst.len() as u64);
            let mut done = 0;
            return unpack_all(file, span, packed.compression, most, &mut |piece| {
                dst[done..done + piece.len()].copy_from_slice(piece);
                done += piece.len();
                Ok(())
            });
        }
        ensure!(!dst.is_empty(), "there is no room for it");
        Ok(self.ask(dst.len() as u64, dst)? as u64)
    }

    fn ask(&self, request: u64, dst: &mut [u8]) -> Result<usize> {
        let deadline = Deadline::after(PATIENCE);
        let requests = self.requests.as_ref().context(GONE)?;
        if uninterrupted(|| rustix::io::write(requests, &request.to_le_bytes())).is_err() {
            bail!(GONE);
        }
        let mut done = 0;
        loop {
            let mut word = [0; 4];
            self.read(&mut word, deadline)?;
            let word = u32::from_le_bytes(word);
            let length = (word & ((1 << KIND) - 1)) as usize;
            match word >> KIND {
                DATA => {
                    let place = dst.get_mut(done..done + length);
                    self.read(place.context(GONE)?, deadline)?;
                    done += length;
                }
                DONE => return Ok(done),
                FAILED => {
                    let mut message = vec![0; length.min(LONGEST)];
                    self.read(&mut message, deadline)?;
                    bail!("{}", visible(&message, LONGEST));
                }
                _ => bail!(GONE),
            }
        }
    }

    /// Reads until `dst` is full.
    fn read(&self, mut dst: &mut [u8], deadline: Deadline) -> Result<()> {
        while !dst.is_empty() {
            if !deadline.wait(&self.results, PollFlags::IN)? {
                bail!("it is not unpacked within {PATIENCE:?}");
            }
            match uninterrupted(|| rustix::io::read(&self.results, &mut *dst))? {
                0 => bail!(GONE),
                got => dst = &mut dst[got..],
            }
        }
        Ok(())
    }
}

impl Drop for Unpacker {
    fn drop(&mut self) {
        // Without requests it ends. One that does not ends with armlet at the latest.
        drop(self.requests.take());
        if let Some(pid) = self.pid
            && let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty())
            && let Ok(true) = Deadline::after(END).wait(pidfd, PollFlags::IN)
        {
            let _ = waitpid(Some(pid), WaitOptions::NOHANG);
        }
    }
}

/// What is said where the process is no more, or does what it never should.
const GONE: &str = "the process that unpacks it failed: its data are hostile, or memory is short";

/// Answers requests until there is nobody who makes them. It runs in the process.
fn serve(
    requests: &OwnedFd,
    results: &OwnedFd,
    file: &File,
    span: &Range<u64>,
    compression: Compression,
) {
    loop {
        let mut request = [0; 8];
        match uninterrupted(|| rustix::io::read(requests, &mut request)) {
            Ok(8) => {}
            _ => return,
        }
        let result = match u64::from_le_bytes(request) {
            FIRST_BYTES => unpack_head(file, span, compression)
                .and_then(|head| Ok(send(results, DATA, &head)?)),
            room => unpack_all(file, span, compression, room, &mut |piece| {
                send(results, DATA, piece)
            })
            .map(|_| ()),
        };
        let said = match result {
            Ok(()) => send(results, DONE, &[]),
            Err(error) => {
                let message = format!("{error:#}");
                let end = message.floor_char_boundary(LONGEST);
                send(results, FAILED, &message.as_bytes()[..end])
            }
        };
        if said.is_err() {
            return;
        }
    }
}

/// Writes a frame of at most [`PIPE`] bytes.
fn send(results: &OwnedFd, kind: u32, bytes: &[u8]) -> io::Result<()> {
    let word = (kind << KIND | bytes.len() as u32).to_le_bytes();
    let frame = [IoSlice::new(&word), IoSlice::new(bytes)];
    // It waits until all is written; no signal interrupts it, for all are blocked.
    let written = rustix::io::writev(results, &frame)?;
    match written == word.len() + bytes.len() {
        true => Ok(()),
        false => Err(io::ErrorKind::WriteZero.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `work` as the process that unpacks, and returns what armlet makes of it.
    fn with(work: impl FnOnce(&OwnedFd)) -> String {
        let file = tempfile::tempfile().expect("a file");
        let (asked, requests) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        let (results, given) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        let pid = sys::start(asked, given, &file, |asked, given, _| {
            // One that ends before it is asked cannot be asked.
            let _ = uninterrupted(|| rustix::io::read(asked, &mut [0; 8]));
            work(given);
        });
        let pid = Some(pid.expect("a process"));
        let packed = Packed {
            file,
            span: 0..0,
            compression: Compression::Gzip,
        };
        let unpacker = Unpacker {
            pid,
            requests: Some(requests),
            results,
            packed,
        };
        match unpacker.all(&mut [0; 100]) {
            Ok(got) => format!("{got} bytes"),
            Err(error) => format!("{error:#}"),
        }
    }

    #[test]
    fn the_unpacker_can_read_and_write_and_take_memory() {
        let said = with(|given| {
            let block = vec![7_u8; 10 << 20];
            let _ = send(given, DATA, &block[..100]);
            let _ = send(given, DONE, &[]);
        });
        assert_eq!(said, "100 bytes");
    }

    #[test]
    fn an_unpacker_that_fails_or_lies_is_an_error() {
        for (name, lie) in [
            ("nothing", (|_| {}) as fn(&OwnedFd)),
            ("half a frame", |given| {
                let _ = rustix::io::write(given, &[9, 0]);
            }),
            ("a frame without its bytes", |given| {
                let _ = rustix::io::write(given, &9_u32.to_le_bytes());
            }),
            ("more than was asked for", |given| {
                let _ = send(given, DATA, &[0; 101]);
            }),
            ("no known kind", |given| {
                let _ = send(given, 7, &[]);
            }),
        ] {
            assert_eq!(with(lie), GONE, "{name}");
        }
        let said = with(|given| {
            let _ = send(given, FAILED, &[b"\x1b[2J\n", &[b'x'; 3000][..]].concat());
        });
        assert!(
            said.starts_with("\\x1b[2J\\n") && said.len() < 1100,
            "{said}"
        );
    }
}
