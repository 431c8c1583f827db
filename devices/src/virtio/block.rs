//! The block device (virtio 1.2, section 5.2). An [`Engine`] carries its requests out, at once or
//! many at a time.

use std::os::fd::RawFd;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::queue::{Segment, parts};
use super::{Chain, ConfigSpace, Driver, Link, Source, StartError, VirtioDevice, Virtqueue};

/// Device ID.
const ID: u32 = 2;
/// Entries of each queue.
const ENTRIES: u16 = 256;
/// The most buffers of one request's data: header and status take two more entries.
const SEG_MAX: u32 = ENTRIES as u32 - 2;
/// The most bytes of one read or write. Drivers make far smaller ones; a guest that points at the
/// same memory over and over would keep the host busy with one request for ever.
const MOST_BYTES: usize = 1 << 30;
/// The unit of sector numbers, in bytes, whatever the block size.
const SECTOR: u64 = 512;
/// The most sectors of a discard: 1 GiB.
const DISCARD_SECTORS: u32 = 1 << 21;
/// The most sectors of a write of zeroes: 128 MiB, for hosts where each zero has to be written.
const ZERO_SECTORS: u32 = 1 << 18;

/// VIRTIO_BLK_F_SEG_MAX, bit 2 (virtio 1.2, section 5.2.3, as all of these).
pub const FEATURE_SEG_MAX: u64 = 1 << 2;
/// VIRTIO_BLK_F_RO.
pub const FEATURE_RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_BLK_SIZE.
pub const FEATURE_BLK_SIZE: u64 = 1 << 6;
/// VIRTIO_BLK_F_FLUSH.
pub const FEATURE_FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_TOPOLOGY.
pub const FEATURE_TOPOLOGY: u64 = 1 << 10;
/// VIRTIO_BLK_F_CONFIG_WCE.
pub const FEATURE_CONFIG_WCE: u64 = 1 << 11;
/// VIRTIO_BLK_F_MQ.
pub const FEATURE_MQ: u64 = 1 << 12;
/// VIRTIO_BLK_F_DISCARD.
pub const FEATURE_DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES.
pub const FEATURE_WRITE_ZEROES: u64 = 1 << 14;

/// Request types (virtio 1.2, section 5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Bytes of a request's header: type, a reserved word, sector.
const HEADER: usize = 16;
/// Bytes that say what to discard or to zero: sector, number of sectors, flags.
const RANGE: usize = 16;
/// The flag by which the driver allows zeroes to take no room.
const UNMAP: u32 = 1;
/// Bytes of a serial number.
const SERIAL: usize = 20;

/// Status bytes.
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Offsets in the configuration space (virtio 1.2, section 5.2.4).
mod field {
    pub(super) const CAPACITY: usize = 0;
    pub(super) const SEG_MAX: usize = 12;
    pub(super) const BLK_SIZE: usize = 20;
    pub(super) const PHYSICAL_BLOCK_EXP: usize = 24;
    pub(super) const MIN_IO_SIZE: usize = 26;
    pub(super) const OPT_IO_SIZE: usize = 28;
    pub(super) const WRITEBACK: usize = 32;
    pub(super) const NUM_QUEUES: usize = 34;
    pub(super) const MAX_DISCARD_SECTORS: usize = 36;
    pub(super) const MAX_DISCARD_SEG: usize = 40;
    pub(super) const DISCARD_SECTOR_ALIGNMENT: usize = 44;
    pub(super) const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub(super) const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub(super) const WRITE_ZEROES_MAY_UNMAP: usize = 56;
    /// As far as the features reach that are offered here.
    pub(super) const END: usize = 60;
}

/// What the guest sees of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Its size in bytes; what lies behind the last whole sector is not seen.
    pub size: u64,
    /// Whether the guest may only read it.
    pub readonly: bool,
    /// Its serial number: up to 20 bytes, more are cut off.
    pub serial: String,
    /// Its queues: 1 or more.
    pub queues: u16,
    /// Bytes of the smallest piece that the guest should read or write: a power of two from 512.
    pub block_size: u32,
    /// Bytes of the smallest piece that the storage writes without reading it first: a power of
    /// two from `block_size`.
    pub physical_block_size: u32,
    /// Bytes that are best read or written at once; 0 where nobody knows.
    pub optimal_io_size: u32,
    /// Bytes of the smallest piece that can be discarded: a multiple of 512.
    pub discard_granularity: u32,
}

/// Carries a disk's requests out.
pub trait Engine: Send {
    /// Requests will come, with data in this memory.
    fn start(&mut self, memory: &Arc<GuestMemoryMmap>);

    /// Begins a request. `None` says that it is under way: [`Self::finished`] says when it is done.
    /// No request has the tag of another that is under way.
    fn begin(&mut self, request: &Request<'_>) -> Option<Outcome>;

    /// The last of a number of requests was begun.
    fn submit(&mut self) {}

    /// A request that was under way and is done now: its tag, and what came of it.
    fn finished(&mut self) -> Option<(u16, Outcome)> {
        None
    }

    /// Waits until a request that is under way is done; there is one.
    fn wait(&mut self) {}

    /// The most requests that may be under way; their tags are smaller than this.
    fn depth(&self) -> u16 {
        1
    }

    /// A descriptor that is readable when a request is done.
    fn source(&self) -> Option<RawFd> {
        None
    }

    /// No request is under way, none comes before the next start: memory is let go.
    fn stop(&mut self);
}

/// A request of which all is checked: it lies within the disk, and a disk that is read-only gets
/// no writes.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Tells it from others under way.
    pub tag: u16,
    /// What is to be done.
    pub operation: Operation,
    /// Where on the disk, in bytes: a multiple of 512.
    pub offset: u64,
    /// How much of the disk, in bytes: a multiple of 512, as much as there is data.
    pub len: u64,
    /// Guest memory to read to or to write from; empty for what has no data.
    pub data: Data<'a>,
    /// Whether what it changes must have reached stable storage when it is done.
    pub durable: bool,
}

/// What a request does with its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reads it into memory.
    Read,
    /// Writes memory to it.
    Write,
    /// Brings all writes that were done to stable storage, of the whole disk.
    Flush,
    /// Says that its contents do not matter any more.
    Discard,
    /// Makes it read as zeroes.
    WriteZeroes {
        /// Whether it may lose its place on the storage.
        unmap: bool,
    },
}

/// What came of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Done,
    /// The storage failed; the engine has told the user.
    Failed,
}

/// A part of some pieces of guest memory, all of which are there.
#[derive(Clone, Copy, Debug, Default)]
pub struct Data<'a> {
    segments: &'a [Segment],
    skip: usize,
    len: usize,
}

impl<'a> Data<'a> {
    /// `len` bytes from `skip`; fewer where there are fewer.
    #[must_use]
    pub fn new(segments: &'a [Segment], skip: usize, len: usize) -> Data<'a> {
        Data {
            segments,
            skip,
            len,
        }
    }

    /// Its pieces in order.
    pub fn parts(&self) -> impl Iterator<Item = Segment> + 'a {
        parts(self.segments, self.skip, self.len)
    }

    /// The part of it that begins `offset` bytes later, of `len` bytes.
    #[must_use]
    pub fn slice(&self, offset: usize, len: usize) -> Data<'a> {
        Data {
            skip: self.skip + offset,
            len: len.min(self.len.saturating_sub(offset)),
            ..*self
        }
    }

    /// Its bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A block device.
pub struct Block {
    engine: Box<dyn Engine>,
    config: Arc<ConfigSpace>,
    /// In bytes.
    capacity: u64,
    readonly: bool,
    serial: [u8; SERIAL],
    features: u64,
    queues: Vec<Option<Virtqueue>>,
    running: Option<Running>,
    /// Requests under way, by tag.
    slots: Vec<Option<Pending>>,
    /// Tags that are free, of those that were in use before.
    free: Vec<u16>,
}

/// What the driver agreed to.
struct Running {
    link: Arc<Link>,
    memory: Arc<GuestMemoryMmap>,
    features: u64,
    /// Whether a write may be done before it reached stable storage.
    writeback: bool,
    /// Queues that have requests for which there is no tag now.
    held: Vec<usize>,
}

/// A request under way.
struct Pending {
    queue: usize,
    chain: Chain,
    /// Whether it fills the buffers before the status byte.
    is_read: bool,
}

/// What a request's header and framing say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// The engine does it: what, the first byte on the disk, bytes.
    Do(Operation, u64, u64),
    /// The serial number goes into the buffers.
    Identify,
    /// There is nothing to do, and this is the status.
    Answer(u8),
}

impl Block {
    /// A disk of this shape, whose requests `engine` carries out.
    #[must_use]
    pub fn new(shape: &Shape, engine: Box<dyn Engine>) -> Block {
        let mut features = FEATURE_SEG_MAX | FEATURE_BLK_SIZE | FEATURE_TOPOLOGY | FEATURE_FLUSH;
        features |= match shape.readonly {
            true => FEATURE_RO,
            false => FEATURE_CONFIG_WCE | FEATURE_DISCARD | FEATURE_WRITE_ZEROES,
        };
        if shape.queues > 1 {
            features |= FEATURE_MQ;
        }
        let mut serial = [0; SERIAL];
        for (to, from) in serial.iter_mut().zip(shape.serial.bytes()) {
            *to = from;
        }
        Block {
            engine,
            config: ConfigSpace::new(config_bytes(shape)),
            capacity: shape.size / SECTOR * SECTOR,
            readonly: shape.readonly,
            serial,
            features,
            queues: (0..shape.queues).map(|_| None).collect(),
            running: None,
            slots: Vec::new(),
            free: Vec::new(),
        }
    }

    /// The disk has this many bytes from now on; a driver that is there is told.
    pub fn set_size(&mut self, size: u64) {
        let sectors = size / SECTOR;
        if sectors * SECTOR == self.capacity {
            return;
        }
        self.capacity = sectors * SECTOR;
        self.config
            .change(|bytes| put(bytes, field::CAPACITY, &sectors.to_le_bytes()));
        if let Some(running) = &self.running {
            running.link.config_changed();
        }
    }

    /// Takes requests from a queue and begins them, as many as there are and may be under way.
    fn serve(&mut self, index: usize) {
        let size = self.queue(index).map(|queue| queue.size());
        // A driver that fills the ring as fast as it is emptied cannot keep the device's lock.
        let mut left = size.unwrap_or(0);
        while let Some(queue) = self.queue(index) {
            queue.silence();
            let emptied = loop {
                if left == 0 || !self.has_tag() {
                    break false;
                }
                let Some(chain) = self.queue(index).and_then(Virtqueue::pop) else {
                    break true;
                };
                left -= 1;
                self.begin(index, chain);
            };
            self.engine.submit();
            self.collect();
            if emptied {
                if !self.queue(index).is_some_and(Virtqueue::listen) {
                    return;
                }
            } else if left == 0 {
                let kick = self.queue(index).map(|queue| Arc::clone(queue.kick()));
                // The counter cannot overflow before it is read.
                let _ = kick.map(|kick| kick.write(1));
                return;
            } else if !self.has_tag() {
                if let Some(running) = &mut self.running
                    && !running.held.contains(&index)
                {
                    running.held.push(index);
                }
                return;
            }
        }
    }

    /// Interrupts the driver for what was completed.
    fn signal(&mut self) {
        for queue in self.queues.iter_mut().flatten() {
            queue.signal();
        }
    }

    /// Completes the requests that the engine is done with.
    fn collect(&mut self) {
        while let Some((tag, outcome)) = self.engine.finished() {
            let slot = self.slots.get_mut(usize::from(tag));
            if let Some(pending) = slot.and_then(Option::take) {
                self.free.push(tag);
                self.complete(pending, status_of(outcome));
            }
        }
    }

    fn begin(&mut self, queue: usize, chain: Chain) {
        let Some(running) = &self.running else {
            return;
        };
        let room = chain.writable_len();
        let order = match room {
            0 => Order::Answer(IOERR),
            _ => self.order(running, &chain),
        };
        let durable = !running.writeback;
        let mut pending = Pending {
            queue,
            chain,
            is_read: matches!(order, Order::Do(Operation::Read, ..)),
        };
        let (operation, offset, len) = match order {
            Order::Do(operation, offset, len) => (operation, offset, len),
            Order::Identify => {
                let wanted = SERIAL.min(room - 1);
                let memory = &running.memory;
                pending.chain.write(memory, 0, &self.serial[..wanted]);
                pending.is_read = wanted == room - 1;
                return self.complete(pending, OK);
            }
            Order::Answer(status) => return self.complete(pending, status),
        };
        let data = match operation {
            Operation::Read => Data::new(pending.chain.writable(), 0, len as usize),
            Operation::Write => Data::new(pending.chain.readable(), HEADER, len as usize),
            _ => Data::default(),
        };
        let tag = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            // Below the engine's depth.
            (self.slots.len() - 1) as u16
        });
        let outcome = self.engine.begin(&Request {
            tag,
            operation,
            offset,
            len,
            data,
            durable,
        });
        match outcome {
            Some(outcome) => {
                self.free.push(tag);
                self.complete(pending, status_of(outcome));
            }
            None => self.slots[usize::from(tag)] = Some(pending),
        }
    }

    /// What a request wants, as far as it may have it.
    fn order(&self, running: &Running, chain: &Chain) -> Order {
        let mut header = [0; HEADER];
        if chain.read(&running.memory, 0, &mut header) < HEADER {
            running.link.fault(format_args!(
                "a request has less than {HEADER} bytes of header"
            ));
            return Order::Answer(IOERR);
        }
        let [kind, _, low, high] = words(&header);
        let sector = u64::from(high) << 32 | u64::from(low);
        let checked = match kind {
            IN => self.transfer(Operation::Read, sector, chain.writable_len() - 1),
            OUT => self.transfer(Operation::Write, sector, chain.readable_len() - HEADER),
            FLUSH => Ok(Order::Do(Operation::Flush, 0, 0)),
            GET_ID => Ok(Order::Identify),
            DISCARD if running.features & FEATURE_DISCARD != 0 => {
                self.range(running, chain, DISCARD_SECTORS, |flags| {
                    (flags == 0).then_some(Operation::Discard)
                })
            }
            WRITE_ZEROES if running.features & FEATURE_WRITE_ZEROES != 0 => {
                self.range(running, chain, ZERO_SECTORS, |flags| {
                    let unmap = flags & UNMAP != 0;
                    (flags & !UNMAP == 0).then_some(Operation::WriteZeroes { unmap })
                })
            }
            // Drivers try what the device did not offer; the status is the answer.
            _ => Ok(Order::Answer(UNSUPP)),
        };
        checked.unwrap_or_else(|what| {
            running.link.fault(format_args!("a request {what}"));
            Order::Answer(IOERR)
        })
    }

    fn transfer(
        &self,
        operation: Operation,
        sector: u64,
        len: usize,
    ) -> Result<Order, &'static str> {
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
        running: &Running,
        chain: &Chain,
        most: u32,
        operation: impl FnOnce(u32) -> Option<Operation>,
    ) -> Result<Order, &'static str> {
        let mut range = [0; RANGE];
        let there = chain.readable_len() - HEADER;
        if there != RANGE || chain.read(&running.memory, HEADER, &mut range) < RANGE {
            return Err("does not have one range of sectors");
        }
        let [low, high, sectors, flags] = words(&range);
        let Some(operation) = operation(flags) else {
            return Ok(Order::Answer(UNSUPP));
        };
        if sectors > most {
            return Err("has a range of more sectors than the device takes");
        }
        let sector = u64::from(high) << 32 | u64::from(low);
        self.within(operation, sector, u64::from(sectors) * SECTOR)
    }

    fn within(&self, operation: Operation, sector: u64, len: u64) -> Result<Order, &'static str> {
        let offset = sector.checked_mul(SECTOR).filter(|offset| {
            offset
                .checked_add(len)
                .is_some_and(|end| end <= self.capacity)
        });
        match offset {
            Some(_) if len == 0 => Ok(Order::Answer(OK)),
            Some(offset) => Ok(Order::Do(operation, offset, len)),
            None => Err("reaches behind the end of the disk"),
        }
    }

    /// Says what came of a request.
    fn complete(&mut self, pending: Pending, status: u8) {
        let Pending {
            queue,
            chain,
            is_read,
        } = pending;
        let Some(queue) = self.queue(queue) else {
            return;
        };
        let Some(last) = chain.writable_len().checked_sub(1) else {
            let head = chain.head();
            queue.break_ring(format_args!(
                "the request at descriptor {head} has no room for its status"
            ));
            return;
        };
        chain.write(queue.memory(), last, &[status]);
        // The bytes from the first on that are there for sure.
        let written = match is_read && status == OK || last == 0 {
            true => last + 1,
            false => 0,
        };
        queue.complete(chain, written as u32);
    }

    fn queue(&mut self, index: usize) -> Option<&mut Virtqueue> {
        self.queues.get_mut(index).and_then(Option::as_mut)
    }

    fn has_tag(&self) -> bool {
        !self.free.is_empty() || self.slots.len() < usize::from(self.engine.depth())
    }

    fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// The cache's mode as the driver sees it, where it can change it.
    fn set_writeback(&mut self, writeback: bool) {
        self.config
            .change(|bytes| bytes[field::WRITEBACK] = u8::from(writeback));
        if let Some(running) = &mut self.running {
            running.writeback = writeback;
        }
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![ENTRIES; self.queues.len()]
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let Some(running) = &self.running else {
            return;
        };
        let is_mode = running.features & FEATURE_CONFIG_WCE != 0 && offset == field::WRITEBACK;
        match data {
            [mode @ (0 | 1)] if is_mode => self.set_writeback(*mode == 1),
            _ => running.link.fault(format_args!(
                "the driver writes {data:?} to byte {offset} of the configuration"
            )),
        }
    }

    fn start(&mut self, mut driver: Driver) -> Result<(), StartError> {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            *queue = driver.take(index);
        }
        // Section 5.2.6.2: who does not flush is told that a write is done when it is stable.
        let flushes = driver.features & FEATURE_FLUSH != 0;
        self.engine.start(&driver.memory);
        self.running = Some(Running {
            link: driver.link,
            memory: driver.memory,
            features: driver.features,
            writeback: flushes,
            held: Vec::new(),
        });
        if !flushes {
            self.set_writeback(false);
        }
        for queue in self.queues.iter().flatten() {
            // Its thread begins the requests that are there, not the vCPU that starts it.
            let _ = queue.kick().write(1);
        }
        Ok(())
    }

    fn stop(&mut self) {
        while !self.is_idle() {
            // The driver does not wait for them any more.
            match self.engine.finished() {
                Some((tag, _)) => {
                    let slot = self.slots.get_mut(usize::from(tag));
                    if slot.and_then(Option::take).is_some() {
                        self.free.push(tag);
                    }
                }
                None => self.engine.wait(),
            }
        }
        if let Some(running) = self.running.take() {
            self.engine.stop();
            // The next driver finds the cache as the first one did.
            if !running.writeback {
                self.set_writeback(true);
            }
        }
        self.queues.fill_with(|| None);
    }

    fn stop_queue(&mut self, queue: usize) {
        let is_under_way = |slots: &[Option<Pending>]| {
            let mut pending = slots.iter().flatten();
            pending.any(|pending| pending.queue == queue)
        };
        // Their data lies in the driver's buffers, so they are completed first.
        loop {
            self.collect();
            if !is_under_way(&self.slots) {
                break;
            }
            self.engine.wait();
        }
        self.signal();
        if let Some(ring) = self.queues.get_mut(queue) {
            *ring = None;
        }
        // Those that waited for a tag may have one now.
        let held = self
            .running
            .as_mut()
            .map(|now| std::mem::take(&mut now.held));
        for ring in held.unwrap_or_default() {
            if let Some(ring) = self.queue(ring) {
                // The counter cannot overflow before it is read.
                let _ = ring.kick().write(1);
            }
        }
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Result<(), StartError> {
        let index = usize::from(queue.index());
        if let Some(ring) = self.queues.get_mut(index) {
            *ring = Some(queue);
        }
        Ok(())
    }

    fn kicked(&mut self, queue: usize) {
        self.serve(queue);
        self.signal();
    }

    fn sources(&self) -> Vec<Source> {
        let source = self.engine.source().map(|fd| Source {
            fd,
            output: false,
            edge: false,
        });
        source.into_iter().collect()
    }

    fn ready(&mut self, _source: usize) {
        self.collect();
        let held = self
            .running
            .as_mut()
            .map(|now| std::mem::take(&mut now.held));
        for queue in held.unwrap_or_default() {
            self.serve(queue);
        }
        self.signal();
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.stop();
    }
}

fn status_of(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Done => OK,
        Outcome::Failed => IOERR,
    }
}

fn config_bytes(shape: &Shape) -> Vec<u8> {
    let mut bytes = vec![0; field::END];
    let mut set = |offset, value: &[u8]| put(&mut bytes, offset, value);
    let blocks = |size: u32| size / shape.block_size;
    let exponent = blocks(shape.physical_block_size).max(1).ilog2() as u8;
    let min_io = u16::try_from(blocks(shape.physical_block_size)).unwrap_or(1);
    set(field::CAPACITY, &(shape.size / SECTOR).to_le_bytes());
    set(field::SEG_MAX, &SEG_MAX.to_le_bytes());
    set(field::BLK_SIZE, &shape.block_size.to_le_bytes());
    set(field::PHYSICAL_BLOCK_EXP, &[exponent]);
    set(field::MIN_IO_SIZE, &min_io.to_le_bytes());
    let optimal = blocks(shape.optimal_io_size);
    set(field::OPT_IO_SIZE, &optimal.to_le_bytes());
    set(field::WRITEBACK, &[1]);
    set(field::NUM_QUEUES, &shape.queues.to_le_bytes());
    if !shape.readonly {
        let granularity = shape.discard_granularity / SECTOR as u32;
        set(field::MAX_DISCARD_SECTORS, &DISCARD_SECTORS.to_le_bytes());
        set(field::MAX_DISCARD_SEG, &1_u32.to_le_bytes());
        set(field::DISCARD_SECTOR_ALIGNMENT, &granularity.to_le_bytes());
        set(field::MAX_WRITE_ZEROES_SECTORS, &ZERO_SECTORS.to_le_bytes());
        set(field::MAX_WRITE_ZEROES_SEG, &1_u32.to_le_bytes());
        set(field::WRITE_ZEROES_MAY_UNMAP, &[1]);
    }
    bytes
}

fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    bytes[offset..offset + value.len()].copy_from_slice(value);
}

/// Little-endian words.
fn words(bytes: &[u8; 16]) -> [u32; 4] {
    let word =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    [word(0), word(4), word(8), word(12)]
}

#[cfg(test)]
mod tests;
