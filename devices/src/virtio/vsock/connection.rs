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

/// Bytes that one connection buffers for the host at most; the guest is told so. They are only
/// taken while the host's end does not read.
pub(super) const BUFFER: u32 = 128 << 10;
/// "CONNECT ", the longest port and a carriage return.
const LONGEST_LINE: usize = 19;

/// How far a connection has come.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The host connected and says where it wants to go; its words so far.
    Greeting(Vec<u8>),
    /// The guest is to be asked.
    Asking,
    /// It was asked.
    Asked,
    /// The guest's request is to be answered.
    Answering,
    /// Data flows.
    Open,
}

/// A connection, seen from between its two ends.
pub(super) struct Connection {
    stream: UnixStream,
    pub(super) state: State,
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    /// Whether the stream may have something to read.
    readable: bool,
    /// Whether the host's end sends no more.
    ended: bool,
    /// Whether the host's end takes no more.
    deaf: bool,
    /// What the guest sent and the host's end did not take yet.
    waiting: VecDeque<u8>,
    /// Bytes to the guest so far, modulo 2^32; and what it said of its buffer.
    sent: u32,
    guest_alloc: u32,
    guest_forwarded: u32,
    /// Whether the guest was asked for room since it last said how much it has.
    asked_credit: bool,
    /// Bytes from the guest so far, those handed on, and what the guest knows of that.
    received: u32,
    forwarded: u32,
    told: u32,
    /// Whether the guest wants to know.
    wants_credit: bool,
    /// What the guest shut, and what it was told that the host did: SHUT_*.
    guest_shut: u32,
    told_shut: u32,
    /// What of the guest's was done to the stream.
    passed_on: u32,
    /// Whether it waits for its turn to send to the guest.
    pub(super) queued: bool,
}

/// That a connection cannot go on.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Dead;

/// What came out of the stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Got {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now, or nothing ever.
    Nothing,
}

impl Connection {
    /// A connection over `stream`, which does not block.
    pub(super) fn new(stream: UnixStream, state: State) -> Connection {
        Connection {
            stream,
            state,
            host_port: 0,
            guest_port: 0,
            // What came before it was waited for is announced when waiting begins.
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

    /// The stream has something to read, or its end.
    pub(super) fn note_readable(&mut self) {
        self.readable = true;
    }

    /// The host's end is gone: what waits for it never arrives.
    pub(super) fn note_gone(&mut self) {
        self.readable = true;
        self.deafen();
    }

    /// Takes what a packet says of the guest's buffer (virtio 1.2, section 5.10.6.3).
    pub(super) fn take_credit(&mut self, header: &Header) {
        self.guest_alloc = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        self.asked_credit = false;
    }

    /// The guest asks for our side of it.
    pub(super) fn want_credit(&mut self) {
        self.wants_credit = true;
    }

    /// What is to be sent to the guest next.
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

    /// Bytes that the guest has room for.
    pub(super) fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_alloc.saturating_sub(under_way)
    }

    /// Whether the guest believes less than half the buffer free, and is wrong.
    fn owes_credit(&self) -> bool {
        let believed = self.received.wrapping_sub(self.told);
        self.forwarded != self.told && believed > BUFFER / 2
    }

    fn host_shut(&self) -> u32 {
        let sends = if self.ended { SHUT_SEND } else { 0 };
        let takes = if self.deaf { SHUT_RECEIVE } else { 0 };
        sends | takes
    }

    /// Names the connection in the header of a packet to the guest, and says how much room there is:
    /// each one of its packets does (virtio 1.2, section 5.10.6.3.2).
    pub(super) fn name(&self, header: &mut Header) {
        header.src_port = self.host_port;
        header.dst_port = self.guest_port;
        header.buf_alloc = BUFFER;
        header.fwd_cnt = self.forwarded;
    }

    /// Completes the header of a packet that goes to the guest now with `len` bytes of data.
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

    /// Reads up to `most` bytes from the stream into a request, behind the header.
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
            // A part may lie across two mappings.
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
                    // What was read before is good.
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

    /// Hands `len` bytes of data behind a packet's header to the host's end, or keeps them for it.
    ///
    /// # Errors
    /// More data than the guest was told that there is room for.
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

    /// Writes from guest memory to the stream; returns how many bytes it took.
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

    /// The stream has room: it gets what waits.
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
        // Its room is for those that need it.
        self.waiting = VecDeque::new();
        self.pass_on_shut();
    }

    /// The host's end takes no more: what is for it is gone, and so it takes no room.
    fn deafen(&mut self) {
        self.deaf = true;
        self.waiting = VecDeque::new();
        self.forwarded = self.received;
    }

    /// The guest shuts its end, or a half of it.
    pub(super) fn shut(&mut self, flags: u32) {
        self.guest_shut |= flags & SHUT_BOTH;
        self.pass_on_shut();
    }

    /// Shuts the stream as the guest did; what goes to the host, once all of it went.
    fn pass_on_shut(&mut self) {
        let mut wanted = self.guest_shut;
        if !self.waiting.is_empty() {
            wanted &= !SHUT_SEND;
        }
        // Only once: each time is an event of its own.
        let new = wanted & !self.passed_on;
        self.passed_on = wanted;
        for (flag, how) in [(SHUT_RECEIVE, Shutdown::Read), (SHUT_SEND, Shutdown::Write)] {
            if new & flag != 0 {
                // An error means that the host's end is gone, which is noticed elsewhere.
                let _ = self.stream.shutdown(how);
            }
        }
    }

    /// Whether the guest wants no more of it, and the host has all that it sent.
    pub(super) fn is_over(&self) -> bool {
        self.guest_shut == SHUT_BOTH && self.waiting.is_empty()
    }

    /// Whether the host's end is gone before the connection came about.
    pub(super) fn is_abandoned(&self) -> bool {
        self.deaf && matches!(self.state, State::Asking | State::Asked)
    }

    /// Reads on in the host's first line, `CONNECT <port>`; returns the port at its end.
    ///
    /// # Errors
    /// Another line, or none.
    pub(super) fn greet(&mut self) -> Result<Option<u32>, Dead> {
        let State::Greeting(line) = &mut self.state else {
            return Ok(None);
        };
        loop {
            // One by one: what follows the line is for the guest.
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
        // There may be data right behind.
        self.readable = true;
        port.parse().map(Some).map_err(|_| Dead)
    }

    /// The guest took the connection: the host is told so, and data flows.
    ///
    /// # Errors
    /// A host's end that is gone.
    pub(super) fn establish(&mut self) -> Result<(), Dead> {
        let line = format!("OK {}\n", self.host_port);
        // The first bytes into an empty buffer: they all fit.
        match retry(|| (&self.stream).write(line.as_bytes())) {
            Ok(written) if written == line.len() => {
                self.state = State::Open;
                Ok(())
            }
            _ => Err(Dead),
        }
    }
}

/// Calls again what a signal broke off.
fn retry(mut call: impl FnMut() -> io::Result<usize>) -> Result<usize, ErrorKind> {
    loop {
        match call() {
            Ok(done) => return Ok(done),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.kind()),
        }
    }
}

/// As [`retry`], with guest memory: an error of memory is one of the stream.
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
