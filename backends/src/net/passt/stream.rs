//! Frames in a stream, each behind its length in 4 bytes (QEMU's "-netdev stream"). Reading and
//! writing end where they like, and neither loses a byte or waits.

use crate::net::sys;
use armlet_system::eintr::uninterrupted;
use rustix::io::Errno;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use vm_memory::VolatileSlice;

/// Bytes of the length before each frame, which has the most significant one first.
const LENGTH: usize = 4;
/// Bytes of the longest frame that passt takes and gives (passt's tap.h: L2_MAX_LEN_PASST).
pub const LONGEST: usize = 65535;
/// Bytes for what was read: a frame in parts, and another one.
const INPUT_BYTES: usize = 2 * (LENGTH + LONGEST);

/// Why a frame was not moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// Not now.
    Wait,
    /// The other end is closed.
    Closed,
    /// A frame comes of so many bytes, which no frame has.
    Wrong(u32),
}

/// A socket with frames, and those that are under way.
pub struct Stream {
    pub(super) socket: OwnedFd,
    input: Input,
    /// The end of a frame of which a part was sent.
    output: Vec<u8>,
}

impl Stream {
    /// The frames of a stream socket that does not block.
    pub fn new(socket: OwnedFd) -> Stream {
        Stream {
            socket,
            input: Input::new(),
            output: Vec::new(),
        }
    }

    /// Sends the rest of a frame of which a part was sent.
    pub fn flush(&mut self) -> Result<(), Broken> {
        while !self.output.is_empty() {
            match uninterrupted(|| rustix::io::write(&self.socket, &self.output)) {
                Ok(size) => drop(self.output.drain(..size)),
                Err(error) => return Err(broken(error)),
            }
        }
        Ok(())
    }

    /// Sends a frame of `size` bytes, up to [`LONGEST`]. If only a part goes out now, the rest
    /// does at the next call or by [`Self::flush`].
    pub fn send<'a, P: Iterator<Item = VolatileSlice<'a>>>(
        &mut self,
        size: usize,
        pieces: impl Fn() -> P,
    ) -> Result<(), Broken> {
        self.flush()?;
        let length = (size as u32).to_be_bytes();
        let sent = match sys::write_from(self.socket.as_fd(), &length, pieces()) {
            Ok(sent) => sent,
            Err(error) => return Err(broken(Errno::from_io_error(&error).unwrap_or(Errno::IO))),
        };
        if sent == LENGTH + size {
            return Ok(());
        }
        let mut skip = sent.saturating_sub(LENGTH);
        self.output.extend_from_slice(&length[sent.min(LENGTH)..]);
        for piece in pieces() {
            let from = skip.min(piece.len());
            skip -= from;
            if let Ok(rest) = piece.offset(from) {
                let start = self.output.len();
                self.output.resize(start + rest.len(), 0);
                rest.copy_to(&mut self.output[start..]);
            }
        }
        Ok(())
    }

    /// Hands the next frame to `take`.
    pub fn receive<T>(&mut self, take: impl FnOnce(&[u8]) -> T) -> Result<T, Broken> {
        loop {
            match self.input.next() {
                Err(size) => return Err(Broken::Wrong(size)),
                Ok(Some(frame)) => return Ok(take(&self.input.bytes[frame])),
                Ok(None) => {}
            }
            match uninterrupted(|| rustix::io::read(&self.socket, self.input.space())) {
                Ok(0) => return Err(Broken::Closed),
                Ok(size) => self.input.end += size,
                Err(error) => return Err(broken(error)),
            }
        }
    }
}

fn broken(error: Errno) -> Broken {
    match error {
        Errno::AGAIN => Broken::Wait,
        _ => Broken::Closed,
    }
}

/// What was read, of which the last frame may be a part.
struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    fn new() -> Input {
        Input {
            bytes: vec![0; INPUT_BYTES],
            start: 0,
            end: 0,
        }
    }

    /// Takes the next frame, if it is there to its end: where it lies.
    ///
    /// # Errors
    /// A size in bytes that no frame has.
    fn next(&mut self) -> Result<Option<Range<usize>>, u32> {
        let data = &self.bytes[self.start..self.end];
        let Some((length, rest)) = data.split_first_chunk::<LENGTH>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length);
        let size = length as usize;
        if !(1..=LONGEST).contains(&size) {
            return Err(length);
        }
        if rest.len() < size {
            return Ok(None);
        }
        let from = self.start + LENGTH;
        self.start = from + size;
        Ok(Some(from..self.start))
    }

    /// Where to read to: always more than nothing after [`Self::next`] had no frame.
    fn space(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.bytes.len() - self.start < LENGTH + LONGEST {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.bytes[self.end..]
    }
}
