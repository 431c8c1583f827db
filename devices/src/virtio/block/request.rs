//! What a driver's request asks for, checked against the disk that it is for.

use vm_memory::GuestMemoryMmap;

use super::engine::Operation;
use super::shape::{DISCARD_SECTORS, FEATURE_DISCARD, FEATURE_WRITE_ZEROES, SECTOR, ZERO_SECTORS};
use crate::virtio::{Chain, Virtqueue};

/// The most bytes of one read or write. Drivers make far smaller ones; a guest that points at the
/// same memory over and over would keep the host busy with one request for ever.
const MOST_BYTES: usize = 1 << 30;

/// Request types (virtio 1.2, section 5.2.6).
pub(super) const IN: u32 = 0;
pub(super) const OUT: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;

/// Bytes of a request's header: type, a reserved word, sector.
pub(super) const HEADER: usize = 16;
/// Bytes that say what to discard or to zero: sector, number of sectors, flags.
const RANGE: usize = 16;
/// The flag by which the driver allows zeroes to take no room.
pub(super) const UNMAP: u32 = 1;
/// Bytes of a serial number.
pub(super) const SERIAL: usize = 20;

/// VIRTIO_BLK_S_OK, and the two other statuses of a request.
pub(super) const OK: u8 = 0;
/// VIRTIO_BLK_S_IOERR.
pub(super) const IOERR: u8 = 1;
/// VIRTIO_BLK_S_UNSUPP.
pub(super) const UNSUPP: u8 = 2;

/// A disk, as far as it decides what a request may do.
pub(super) struct Disk {
    /// In bytes: whole sectors.
    pub(super) capacity: u64,
    pub(super) readonly: bool,
    pub(super) serial: [u8; SERIAL],
    /// The features that the driver accepted, also before it starts the device.
    pub(super) agreed: u64,
    /// Whether a write may be completed before it reached stable storage.
    pub(super) writeback: bool,
    /// Whether anything has to reach stable storage.
    pub(super) flushes: bool,
}

/// What a request's header and framing say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// The engine carries it out: what, from which byte of the disk, how many bytes.
    Run(Operation, u64, u64),
    /// The serial number goes into the buffers.
    Identify,
    /// There is nothing to carry out, and this is the status.
    Done(u8),
}

impl Disk {
    /// Reads the header of a request that has a byte for its status, and checks what it asks for.
    pub(super) fn parse(&self, queue: &Virtqueue, chain: &Chain) -> Parsed {
        let (memory, link) = (queue.memory(), queue.link());
        let Some(header) = queue.read_first(chain) else {
            link.fault(format_args!(
                "a request has less than {HEADER} bytes of header"
            ));
            return Parsed::Done(IOERR);
        };
        let [kind, _, low, high] = words(&header);
        let sector = u64::from(high) << 32 | u64::from(low);
        let checked = match kind {
            IN => self.transfer(Operation::Read, sector, chain.writable_len() - 1),
            OUT => self.transfer(Operation::Write, sector, chain.readable_len() - HEADER),
            FLUSH if !self.flushes => Ok(Parsed::Done(OK)),
            FLUSH => Ok(Parsed::Run(Operation::Flush, 0, 0)),
            GET_ID => Ok(Parsed::Identify),
            DISCARD if self.agreed & FEATURE_DISCARD != 0 => {
                self.range(memory, chain, DISCARD_SECTORS, |flags| {
                    (flags == 0).then_some(Operation::Discard)
                })
            }
            WRITE_ZEROES if self.agreed & FEATURE_WRITE_ZEROES != 0 => {
                self.range(memory, chain, ZERO_SECTORS, |flags| {
                    let unmap = flags & UNMAP != 0;
                    (flags & !UNMAP == 0).then_some(Operation::WriteZeroes { unmap })
                })
            }
            // Drivers try what the device did not offer; the status is the answer.
            _ => Ok(Parsed::Done(UNSUPP)),
        };
        checked.unwrap_or_else(|what| {
            link.fault(format_args!("a request {what}"));
            Parsed::Done(IOERR)
        })
    }

    fn transfer(
        &self,
        operation: Operation,
        sector: u64,
        len: usize,
    ) -> Result<Parsed, &'static str> {
        if self.readonly && operation != Operation::Read {
            return Err("writes to a disk that is read-only");
        }
        if !(len as u64).is_multiple_of(SECTOR) {
            return Err("has data that are no whole sectors");
        }
        if len > MOST_BYTES {
            return Err("has more than 1 GiB of data");
        }
        self.within(operation, sector, len as u64)
    }

    /// Reads the one range of a discard or a write of zeroes; `operation` knows the flags.
    fn range(
        &self,
        memory: &GuestMemoryMmap,
        chain: &Chain,
        most: u32,
        operation: impl FnOnce(u32) -> Option<Operation>,
    ) -> Result<Parsed, &'static str> {
        let mut range = [0; RANGE];
        let there = chain.readable_len() - HEADER;
        if there != RANGE || chain.read(memory, HEADER, &mut range) < RANGE {
            return Err("does not have one range of sectors");
        }
        let [low, high, sectors, flags] = words(&range);
        let Some(operation) = operation(flags) else {
            return Ok(Parsed::Done(UNSUPP));
        };
        if sectors > most {
            return Err("has a range of more sectors than the device takes");
        }
        let sector = u64::from(high) << 32 | u64::from(low);
        self.within(operation, sector, u64::from(sectors) * SECTOR)
    }

    fn within(&self, operation: Operation, sector: u64, len: u64) -> Result<Parsed, &'static str> {
        let offset = sector.checked_mul(SECTOR).filter(|offset| {
            offset
                .checked_add(len)
                .is_some_and(|end| end <= self.capacity)
        });
        match offset {
            Some(_) if len == 0 => Ok(Parsed::Done(OK)),
            Some(offset) => Ok(Parsed::Run(operation, offset, len)),
            None => Err("reaches behind the end of the disk"),
        }
    }
}

/// Little-endian words.
fn words(bytes: &[u8; 16]) -> [u32; 4] {
    let word =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    [word(0), word(4), word(8), word(12)]
}
