//! One connection between a port of the guest and a Unix socket of the host.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vm_memory::{
    GuestMemoryBackend, GuestMemoryMmap, ReadVolatile, VolatileMemoryError, WriteVolatile,
};

use super::packet::{HEADER, Header, Op, SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND};
use crate::virtio::Chain;
use crate::virtio::queue::parts;

/// The most bytes that a connection buffers for the host, as advertised to the guest. They are
/// allocated only while the host's end does not read.
pub(super) const BUFFER: u32 = 128 << 10;
/// "CONNECT ", the longest port and a carriage return.
const LONGEST_LINE: usize = 19;

/// The state of a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The host's end has connected and is sending its first line; what it has sent so far.
    Greeting(Vec<u8>),
    /// A request is to be sent to the guest.
    Asking,
    /// The request was sent to the guest.
    Asked,
    /// The guest's request is to be answered.
    Answering,
    /// The connection is established.
    Open,
}

/// A connection between a port of the guest and a stream of the host.
pub(super) struct Connection {
    stream: UnixStream,
    pub(super) state: State,
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    /// Whether the stream may be readable.
    readable: bool,
    /// Whether the host's end has shut down sending.
    ended: bool,
    /// Whether the host's end no longer receives.
    deaf: bool,
    /// Data of the guest that the host's end has not accepted yet.
    waiting: VecDeque<u8>,
    /// Bytes sent to the guest so far, modulo 2^32, and the buffer space that it advertised.
    sent: u32,
    guest_alloc: u32,
    guest_forwarded: u32,
    /// Whether a credit request was sent since the guest's last credit update.
    asked_credit: bool,
    /// Bytes received from the guest so far, those passed on, and the count that the guest was told
    /// last.
    received: u32,
    forwarded: u32,
    told: u32,
    /// Whether the guest has requested a credit update.
    wants_credit: bool,
    /// What the guest has shut down, and what it was told that the host has (SHUT_*).
    guest_shut: u32,
    told_shut: u32,
    /// The guest's shutdowns that were applied to the stream.
    passed_on: u32,
    /// Whether it is queued to send to the guest.
    pub(super) queued: bool,
}

/// An error that ends a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Dead;

/// The result of reading the stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Got {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now, or nothing any more.
    Nothing,
}

impl Connection {
    /// Creates a connection over the non-blocking `stream`.
    pub(super) fn new(stream: UnixStream, state: State) -> Connection {
        Connection {
            stream,
            state,
            host_port: 0,
            guest_port: 0,
            // epoll reports data that arrived before the stream was added to it.
            readable: false,
            ended: false,
            deaf: false,
            waiting: VecDeque::new(),
            sent: 0,
            guest_alloc: 0,
            guest_forwarded: 0,
            asked_credit: false,
            received: 0,
            forwarded: 0,
            told: 0,
            wants_credit: false,
            guest_shut: 0,
            told_shut: 0,
            passed_on: 0,
            queued: false,
        }
    }

    /// Records that the stream has data or has ended.
    pub(super) fn note_readable(&mut self) {
        self.readable = true;
    }

    /// Records that the host's end is gone: buffered data will never arrive.
    pub(super) fn note_gone(&mut self) {
        self.readable = true;
        self.deafen();
    }

    /// Updates the guest's credit from a packet (virtio 1.2, section 5.10.6.3).
    pub(super) fn take_credit(&mut self, header: &Header) {
        self.guest_alloc = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        self.asked_credit = false;
    }

    /// Records that the guest has requested a credit update.
    pub(super) fn want_credit(&mut self) {
        self.wants_credit = true;
    }

    /// Returns the operation to be sent to the guest next.
    pub(super) fn next(&self) -> Option<Op> {
        match self.state {
            State::Greeting(_) | State::Asked => None,
            State::Asking => Some(Op::Request),
            State::Answering => Some(Op::Response),
            State::Open => self.next_while_open(),
        }
    }

    fn next_while_open(&self) -> Option<Op> {
        let flows = self.readable && !self.ended && self.guest_shut & SHUT_RECEIVE == 0;
        if flows && self.credit() > 0 {
            return Some(Op::Data);
        }
        if self.host_shut() != self.told_shut {
            return Some(Op::Shutdown);
        }
        if self.wants_credit || self.owes_credit() {
            return Some(Op::CreditUpdate);
        }
        (flows && !self.asked_credit).then_some(Op::CreditRequest)
    }

    /// Returns how many bytes the guest has room for.
    pub(super) fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_alloc.saturating_sub(under_way)
    }

    /// Returns whether the guest believes that less than half of the buffer is free although more
    /// is.
    fn owes_credit(&self) -> bool {
        let believed = self.received.wrapping_sub(self.told);
        self.forwarded != self.told && believed > BUFFER / 2
    }

    fn host_shut(&self) -> u32 {
        let sends = if self.ended { SHUT_SEND } else { 0 };
        let takes = if self.deaf { SHUT_RECEIVE } else { 0 };
        sends | takes
    }

    /// Fills the connection's ports and credit into the header of a packet to the guest, as each
    /// packet has them (virtio 1.2, section 5.10.6.3.2).
    pub(super) fn name(&self, header: &mut Header) {
        header.src_port = self.host_port;
        header.dst_port = self.guest_port;
        header.buf_alloc = BUFFER;
        header.fwd_cnt = self.forwarded;
    }

    /// Completes the header of a packet with `len` bytes of data that is being sent to the guest.
    pub(super) fn sending(&mut self, op: Op, len: usize, header: &mut Header) {
        self.name(header);
        header.op = op.number();
        header.len = len as u32;
        self.told = self.forwarded;
        self.wants_credit = false;
        self.sent = self.sent.wrapping_add(len as u32);
        match op {
            Op::Request => self.state = State::Asked,
            Op::Response => self.state = State::Open,
            Op::CreditRequest => self.asked_credit = true,
            Op::Shutdown => {
                self.told_shut = self.host_shut();
                header.flags = self.told_shut;
            }
            Op::Data | Op::Reset | Op::CreditUpdate => {}
        }
    }

    /// Reads up to `most` bytes from the stream into a buffer of the guest, after the header.
    ///
    /// # Errors
    /// A stream that broke.
    pub(super) fn read_into(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: &Chain,
        most: usize,
    ) -> Result<Got, Dead> {
        let mut done = 0;
        for part in parts(chain.writable(), HEADER, most) {
            // A segment may span two mappings.
            for slice in memory.get_slices(part.address, part.len) {
                let Ok(mut slice) = slice else {
                    return Err(Dead);
                };
                let wanted = slice.len();
                let read = retry_on_memory(|| self.stream.read_volatile(&mut slice));
                match read {
                    Ok(0) => self.ended = true,
                    Ok(len) => done += len,
                    Err(ErrorKind::WouldBlock) => self.readable = false,
                    // What was read before the error is valid.
                    Err(_) if done > 0 => return Ok(Got::Bytes(done)),
                    Err(_) => return Err(Dead),
                }
                if read != Ok(wanted) {
                    return Ok(match done {
                        0 => Got::Nothing,
                        _ => Got::Bytes(done),
                    });
                }
            }
        }
        Ok(Got::Bytes(done))
    }

    /// Passes the `len` bytes of data after a packet's header to the host's end, or buffers them.
    ///
    /// # Errors
    /// When there is more data than the guest had credit for.
    pub(super) fn write_from(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: &Chain,
        len: usize,
    ) -> Result<(), Dead> {
        if len + self.waiting.len() > BUFFER as usize || self.guest_shut & SHUT_SEND != 0 {
            return Err(Dead);
        }
        self.received = self.received.wrapping_add(len as u32);
        let done = match self.waiting.is_empty() && !self.deaf {
            true => self.write_now(memory, chain, len),
            false => 0,
        };
        if self.deaf {
            self.deafen();
            return Ok(());
        }
        self.forwarded = self.forwarded.wrapping_add(done as u32);
        if done < len {
            let mut rest = vec![0; len - done];
            chain.read(memory, HEADER + done, &mut rest);
            self.waiting.extend(rest);
        }
        Ok(())
    }

    /// Writes from guest memory to the stream; returns how many bytes were written.
    fn write_now(&mut self, memory: &GuestMemoryMmap, chain: &Chain, len: usize) -> usize {
        let mut done = 0;
        for part in parts(chain.readable(), HEADER, len) {
            for slice in memory.get_slices(part.address, part.len) {
                let Ok(slice) = slice else {
                    return done;
                };
                match retry_on_memory(|| self.stream.write_volatile(&slice)) {
                    Ok(written) => {
                        done += written;
                        if written < slice.len() {
                            return done;
                        }
                    }
                    Err(ErrorKind::WouldBlock) => return done,
                    Err(_) => {
                        self.deaf = true;
                        return done;
                    }
                }
            }
        }
        done
    }

    /// Writes buffered data to the stream, which has room.
    pub(super) fn flush(&mut self) {
        while !self.waiting.is_empty() {
            let (first, _) = self.waiting.as_slices();
            match retry(|| (&self.stream).write(first)) {
                Ok(written) => {
                    self.waiting.drain(..written);
                    self.forwarded = self.forwarded.wrapping_add(written as u32);
                }
                Err(ErrorKind::WouldBlock) => return,
                Err(_) => self.deafen(),
            }
        }
        // Frees the allocation.
        self.waiting = VecDeque::new();
        self.pass_on_shut();
    }

    /// Records that the host's end no longer receives, and drops the data buffered for it.
    fn deafen(&mut self) {
        self.deaf = true;
        self.waiting = VecDeque::new();
        self.forwarded = self.received;
    }

    /// Handles a shutdown by the guest, of one direction or both.
    pub(super) fn shut(&mut self, flags: u32) {
        self.guest_shut |= flags & SHUT_BOTH;
        self.pass_on_shut();
    }

    /// Applies the guest's shutdown to the stream; for the direction to the host, once all buffered
    /// data has been written.
    fn pass_on_shut(&mut self) {
        let mut wanted = self.guest_shut;
        if !self.waiting.is_empty() {
            wanted &= !SHUT_SEND;
        }
        // Only once, because each call raises another event.
        let new = wanted & !self.passed_on;
        self.passed_on = wanted;
        for (flag, how) in [(SHUT_RECEIVE, Shutdown::Read), (SHUT_SEND, Shutdown::Write)] {
            if new & flag != 0 {
                // An error means that the host's end is gone, which is handled elsewhere.
                let _ = self.stream.shutdown(how);
            }
        }
    }

    /// Returns whether the guest has shut down both directions, and the host has received
    /// everything.
    pub(super) fn is_over(&self) -> bool {
        self.guest_shut == SHUT_BOTH && self.waiting.is_empty()
    }

    /// Returns whether the host's end went away before the connection was established.
    pub(super) fn is_abandoned(&self) -> bool {
        self.deaf && matches!(self.state, State::Asking | State::Asked)
    }

    /// Reads more of the host's first line, `CONNECT <port>`; returns the port when it is complete.
    ///
    /// # Errors
    /// When the line is malformed or missing.
    pub(super) fn greet(&mut self) -> Result<Option<u32>, Dead> {
        let State::Greeting(line) = &mut self.state else {
            return Ok(None);
        };
        loop {
            // Byte by byte, because what follows the line is for the guest.
            let mut byte = [0];
            match retry(|| (&self.stream).read(&mut byte)) {
                Ok(1) if byte == *b"\n" => break,
                Ok(1) if line.len() < LONGEST_LINE => line.push(byte[0]),
                Ok(_) => return Err(Dead),
                Err(ErrorKind::WouldBlock) => return Ok(None),
                Err(_) => return Err(Dead),
            }
        }
        let line = str::from_utf8(line).map_err(|_| Dead)?;
        let port = line.trim_end().strip_prefix("CONNECT ").ok_or(Dead)?;
        // Data may follow immediately.
        self.readable = true;
        port.parse().map(Some).map_err(|_| Dead)
    }

    /// Establishes the connection that the guest accepted, and tells the host's end.
    ///
    /// # Errors
    /// When the host's end is gone.
    pub(super) fn establish(&mut self) -> Result<(), Dead> {
        let line = format!("OK {}\n", self.host_port);
        // These are the first bytes in an empty socket buffer, so they all fit.
        match retry(|| (&self.stream).write(line.as_bytes())) {
            Ok(written) if written == line.len() => {
                self.state = State::Open;
                Ok(())
            }
            _ => Err(Dead),
        }
    }
}

/// Repeats a call while it is interrupted by a signal.
fn retry(mut call: impl FnMut() -> io::Result<usize>) -> Result<usize, ErrorKind> {
    loop {
        match call() {
            Ok(done) => return Ok(done),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.kind()),
        }
    }
}

/// Like [`retry`], for transfers with guest memory; a memory error counts as one of the stream.
fn retry_on_memory(
    mut call: impl FnMut() -> Result<usize, VolatileMemoryError>,
) -> Result<usize, ErrorKind> {
    retry(|| {
        call().map_err(|error| match error {
            VolatileMemoryError::IOError(error) => error,
            other => io::Error::other(other),
        })
    })
}
