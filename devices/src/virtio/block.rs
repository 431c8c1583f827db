//! The block device (virtio 1.2, section 5.2). An [`Engine`] carries its requests out, at once or
//! many at a time.

use crate::sync::ring;
use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, VolatileMemory};

#[cfg(test)]
use super::queue::Segment;
use super::{
    Chain, ConfigSpace, DeviceState, Driver, Link, Positions, RestoreError, Source, StartError,
    VirtioDevice, Virtqueue, quiesced,
};

mod data;
mod shape;

pub use super::state::BlockState;
pub use data::{Data, Place};
pub use shape::Shape;
use shape::{DISCARD_SECTORS, ENTRIES, SECTOR, ZERO_SECTORS, config_bytes, field, put};

/// Device ID.
const ID: u32 = 2;
/// The most bytes of one read or write. Drivers make far smaller ones; a guest that points at the
/// same memory over and over would keep the host busy with one request for ever.
const MOST_BYTES: usize = 1 << 30;
/// The most requests that the device takes up before it lets others have its lock.
const TURN: u16 = ENTRIES;
/// How long a reset waits for the storage before the user hears of it.
const PATIENCE: Duration = Duration::from_secs(2);

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

    /// Waits until a request that is under way is done, but not for longer than `most`; there is
    /// one.
    fn wait(&mut self, most: Duration) {
        let _ = most;
    }

    /// Nobody wants what is under way any more: each request ends as soon as it can, done or not.
    fn cancel(&mut self) {}

    /// The most requests that may be under way; their tags are smaller than this.
    fn depth(&self) -> u16 {
        1
    }

    /// The most bytes of one queue's requests that may be under way; a request that has more by
    /// itself goes alone.
    fn most_bytes(&self) -> u64 {
        32 << 20
    }

    /// A descriptor that is readable when a request is done.
    fn source(&self) -> Option<RawFd> {
        None
    }

    /// A descriptor that is readable when the storage may have become longer: then
    /// [`Self::grown`] looks.
    fn growth_fd(&self) -> Option<RawFd> {
        None
    }

    /// Bytes of the storage, if there are more than before.
    fn grown(&mut self) -> Option<u64> {
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
    /// Becomes true when nobody wants it any more. An engine that carries a long one out while its
    /// caller waits looks at it in between.
    pub cancelled: &'a Arc<AtomicBool>,
}

impl<'a> Request<'a> {
    /// Has a read or write carried out in parts of up to `most` bytes, a multiple of 512, of which
    /// only the last one has to be durable; anything else as it is.
    ///
    /// # Errors
    /// The first of `each`, which ends it.
    pub fn each_part<E>(
        &self,
        most: usize,
        mut each: impl FnMut(&Request<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let has_data = matches!(self.operation, Operation::Read | Operation::Write);
        let most = most as u64;
        if !has_data || self.len <= most {
            return each(self);
        }
        let mut start = 0;
        while start < self.len {
            let len = most.min(self.len - start);
            each(&Request {
                offset: self.offset + start,
                len,
                data: self.data.slice(start as usize, len as usize),
                durable: self.durable && start + len == self.len,
                ..*self
            })?;
            start += len;
        }
        Ok(())
    }
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

/// A block device.
pub struct Block {
    engine: Box<dyn Engine>,
    config: Arc<ConfigSpace>,
    /// In bytes.
    capacity: u64,
    readonly: bool,
    serial: [u8; SERIAL],
    features: u64,
    /// What the driver agreed to, also before it starts.
    agreed: u64,
    /// Whether a write may be done before it reached stable storage.
    writeback: bool,
    queues: Vec<Option<Virtqueue>>,
    running: Option<Running>,
    /// Queues whose turn it is, or that are held: the next request of each has no tag, or would be
    /// too many bytes of its queue.
    ///
    /// A queue is held only while a request is under way, of itself where bytes hold it. The end
    /// of any request, whoever meets it, gives all of them their turn (`is_freed`). So none waits
    /// for an event that does not come: the ring's descriptor tells of completions that nobody has
    /// fetched yet, and another queue's turn may have fetched the last of them.
    waiting: VecDeque<usize>,
    /// Whether something changed for the queues that wait.
    is_freed: bool,
    /// By queue: what is under way of it.
    loads: Vec<Load>,
    /// Whether the device is to be reset.
    cancelled: Arc<AtomicBool>,
    /// Whether somebody waits for it, to reset it or else.
    wanted: Arc<AtomicBool>,
    /// Requests under way, by tag.
    slots: Vec<Option<Pending>>,
    /// Tags that are free, of those that were in use before.
    free: Vec<u16>,
}

/// What a driver that started has.
struct Running {
    link: Arc<Link>,
    memory: Arc<GuestMemoryMmap>,
}

/// What is under way of a queue.
#[derive(Clone, Copy, Debug, Default)]
struct Load {
    requests: u16,
    bytes: u64,
}

/// A request under way.
struct Pending {
    queue: usize,
    chain: Chain,
    /// Whether it fills the buffers before the status byte.
    is_read: bool,
    /// Bytes of the disk that it is about.
    bytes: u64,
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
            agreed: 0,
            writeback: true,
            queues: (0..shape.queues).map(|_| None).collect(),
            running: None,
            waiting: VecDeque::new(),
            is_freed: false,
            loads: vec![Load::default(); usize::from(shape.queues)],
            cancelled: Arc::default(),
            wanted: Arc::default(),
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

    /// Gives the queues that wait their turns, until nothing can be begun now; interrupts the
    /// driver for what was completed.
    fn turn(&mut self) {
        let mut left = TURN;
        while std::mem::take(&mut self.is_freed) {
            for _ in 0..self.waiting.len() {
                // Those behind keep their places in the line.
                if !self.has_tag() {
                    break;
                }
                if let Some(index) = self.waiting.pop_front() {
                    self.serve(index, &mut left);
                }
            }
        }
        debug_assert!(
            self.waiting.iter().all(|index| self.may_be_held(*index)),
            "a queue is held while nothing is under way"
        );
        for queue in self.queues.iter_mut().flatten() {
            queue.signal();
        }
    }

    /// Whether the end of a request that is under way will give a queue its turn.
    fn may_be_held(&self, index: usize) -> bool {
        match self.has_tag() {
            true => self.loads.get(index).is_some_and(|load| load.requests > 0),
            false => !self.is_idle(),
        }
    }

    /// Takes requests from a queue and begins them, as many as there are and may be under way, up
    /// to `left` of them, which are counted down.
    fn serve(&mut self, index: usize, left: &mut u16) {
        while let Some(queue) = self.queue(index) {
            queue.silence();
            let mut is_held = false;
            let emptied = loop {
                // Whoever waits for the device, to reset it or else, gets it between two requests.
                if *left == 0 || self.wanted.load(Ordering::Relaxed) {
                    break false;
                }
                is_held = !self.has_tag();
                if is_held {
                    break false;
                }
                let Some(chain) = self.queue(index).and_then(Virtqueue::pop) else {
                    break true;
                };
                *left -= 1;
                if let Err(chain) = self.begin(index, chain) {
                    if let Some(queue) = self.queue(index) {
                        queue.undo_pop(chain);
                    }
                    is_held = true;
                    break false;
                }
            };
            self.engine.submit();
            self.collect();
            if emptied {
                if !self.queue(index).is_some_and(Virtqueue::listen) {
                    return;
                }
            } else if is_held {
                // What ended just now counts for it, too: then `turn` comes back at once.
                self.waiting.push_back(index);
                return;
            } else {
                // A driver that fills the ring as fast as it is emptied does not keep the device's
                // lock: the kick brings us back.
                let kick = self.queue(index).map(|queue| Arc::clone(queue.kick()));
                if let Some(kick) = kick {
                    ring(&kick);
                }
                return;
            }
        }
    }

    /// Completes the requests that the engine is done with.
    fn collect(&mut self) {
        while let Some((tag, outcome)) = self.engine.finished() {
            if let Some(pending) = self.take(tag) {
                self.complete(pending, status_of(outcome));
            }
        }
    }

    /// The request with this tag is not under way any more.
    fn take(&mut self, tag: u16) -> Option<Pending> {
        let pending = self
            .slots
            .get_mut(usize::from(tag))
            .and_then(Option::take)?;
        self.free.push(tag);
        self.is_freed = true;
        if let Some(load) = self.loads.get_mut(pending.queue) {
            load.requests -= 1;
            load.bytes -= pending.bytes;
        }
        Some(pending)
    }

    /// Begins a request, or answers it at once.
    ///
    /// # Errors
    /// A request that would be too much of its queue under way: the same again.
    fn begin(&mut self, queue: usize, chain: Chain) -> Result<(), Chain> {
        let Some(running) = &self.running else {
            return Ok(());
        };
        let room = chain.writable_len();
        let order = match room {
            _ if !chain.is_whole() => Order::Answer(IOERR),
            0 => Order::Answer(IOERR),
            _ => self.order(running, &chain),
        };
        let durable = !self.writeback;
        let mut pending = Pending {
            queue,
            chain,
            is_read: matches!(order, Order::Do(Operation::Read, ..)),
            bytes: 0,
        };
        let (operation, offset, len) = match order {
            Order::Do(operation, offset, len) => (operation, offset, len),
            Order::Identify => {
                let wanted = SERIAL.min(room - 1);
                let memory = &running.memory;
                pending.chain.write(memory, 0, &self.serial[..wanted]);
                pending.is_read = wanted == room - 1;
                self.complete(pending, OK);
                return Ok(());
            }
            Order::Answer(status) => {
                self.complete(pending, status);
                return Ok(());
            }
        };
        pending.bytes = len;
        let load = self.loads.get(queue).copied().unwrap_or_default();
        if load.requests > 0 && load.bytes + len > self.engine.most_bytes() {
            return Err(pending.chain);
        }
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
            cancelled: &self.cancelled,
        });
        match outcome {
            Some(outcome) => {
                self.free.push(tag);
                self.complete(pending, status_of(outcome));
            }
            None => {
                if let Some(load) = self.loads.get_mut(queue) {
                    load.requests += 1;
                    load.bytes += len;
                }
                self.slots[usize::from(tag)] = Some(pending);
            }
        }
        Ok(())
    }

    /// What a request wants, as far as it may have it.
    fn order(&self, running: &Running, chain: &Chain) -> Order {
        let Some(header) = chain.read_first(&running.memory) else {
            running.link.fault(format_args!(
                "a request has less than {HEADER} bytes of header"
            ));
            return Order::Answer(IOERR);
        };
        let [kind, _, low, high] = words(&header);
        let sector = u64::from(high) << 32 | u64::from(low);
        let checked = match kind {
            IN => self.transfer(Operation::Read, sector, chain.writable_len() - 1),
            OUT => self.transfer(Operation::Write, sector, chain.readable_len() - HEADER),
            FLUSH => Ok(Order::Do(Operation::Flush, 0, 0)),
            GET_ID => Ok(Order::Identify),
            DISCARD if self.agreed & FEATURE_DISCARD != 0 => {
                self.range(running, chain, DISCARD_SECTORS, |flags| {
                    (flags == 0).then_some(Operation::Discard)
                })
            }
            WRITE_ZEROES if self.agreed & FEATURE_WRITE_ZEROES != 0 => {
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
            ..
        } = pending;
        let Some(queue) = self.queue(queue) else {
            return;
        };
        match chain.last_writable() {
            Some(last) => {
                if let Ok(slice) = queue.memory().get_slice(last, 1)
                    && let Ok(place) = slice.get_ref(0)
                {
                    place.store(status);
                }
            }
            None if chain.is_whole() => {
                let head = chain.head();
                queue.break_ring(format_args!(
                    "the request at descriptor {head} has no room for its status"
                ));
                return;
            }
            // Nobody can be told more.
            None => {}
        }
        if !chain.is_whole() {
            queue.complete(chain, 0);
            return;
        }
        let last = chain.writable_len().saturating_sub(1);
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

    /// Ends what is under way; the driver does not wait for it any more.
    fn end_requests(&mut self) {
        if self.is_idle() {
            return;
        }
        self.engine.cancel();
        let forget = |disk: &mut Block| {
            while let Some((tag, _)) = disk.engine.finished() {
                disk.take(tag);
            }
        };
        self.wait_until("a reset", Block::is_idle, forget);
    }

    /// Waits for the engine until `is_over`, and says so where it takes long; `fetch` takes what the
    /// engine is done with.
    fn wait_until(
        &mut self,
        what: &str,
        is_over: impl Fn(&Block) -> bool,
        fetch: impl Fn(&mut Block),
    ) {
        let (begun, mut told) = (Instant::now(), PATIENCE);
        loop {
            fetch(self);
            if is_over(self) {
                return;
            }
            let waited = begun.elapsed();
            if waited >= told {
                told *= 2;
                let name = self
                    .running
                    .as_ref()
                    .map_or("a disk", |now| now.link.name());
                log::warn!(
                    "{name}: {what} has waited {} s for {} requests that the host's storage has not answered",
                    waited.as_secs(),
                    self.slots.len() - self.free.len()
                );
            }
            self.engine.wait(told.saturating_sub(waited));
        }
    }

    /// The cache's mode as the driver sees it, where it can change it.
    fn set_writeback(&mut self, writeback: bool) {
        if std::mem::replace(&mut self.writeback, writeback) != writeback {
            self.config
                .change(|bytes| bytes[field::WRITEBACK] = u8::from(writeback));
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
        let is_mode = self.agreed & FEATURE_CONFIG_WCE != 0 && offset == field::WRITEBACK;
        match (data, &self.running) {
            ([mode @ (0 | 1)], _) if is_mode => self.set_writeback(*mode == 1),
            (_, Some(running)) => running.link.fault(format_args!(
                "the driver writes {data:?} to byte {offset} of the configuration"
            )),
            _ => {}
        }
    }

    fn agree(&mut self, features: Option<u64>) {
        self.agreed = features.unwrap_or(0);
        // Sections 5.2.5.2 and 5.2.6.2: who does not flush is told that a write is done when it is
        // stable. The next driver finds the cache as the first one did.
        self.set_writeback(features.is_none_or(|features| features & FEATURE_FLUSH != 0));
    }

    fn start(&mut self, mut driver: Driver) -> Result<(), StartError> {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            *queue = driver.take(index);
        }
        self.engine.start(&driver.memory);
        self.running = Some(Running {
            link: driver.link,
            memory: driver.memory,
        });
        for queue in self.queues.iter().flatten() {
            // Its thread begins the requests that are there, not the vCPU that starts it.
            ring(queue.kick());
        }
        Ok(())
    }

    fn quiesce(&mut self) -> Positions {
        if self.running.is_none() {
            return Positions::new();
        }
        // What is under way ends; what nobody has taken from a queue that waits stays there.
        self.waiting.clear();
        self.wait_until("a pause", Block::is_idle, Block::collect);
        self.is_freed = false;
        let positions = quiesced(self.queues.iter_mut().flatten());
        self.running = None;
        self.engine.stop();
        self.queues.fill_with(|| None);
        positions
    }

    fn reset(&mut self) {
        self.waiting.clear();
        self.is_freed = false;
        self.end_requests();
        if self.running.take().is_some() {
            self.engine.stop();
        }
        self.queues.fill_with(|| None);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(BlockState {
            capacity: self.capacity,
            writeback: self.writeback,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Block(state) = state else {
            return Err(RestoreError::kind(state));
        };
        if state.capacity != self.capacity {
            return Err(RestoreError(format!(
                "the disk has {} bytes, and had {} when it was saved; it needs the same image",
                self.capacity, state.capacity
            )));
        }
        self.set_writeback(state.writeback);
        Ok(())
    }

    fn stop_queue(&mut self, queue: usize) {
        // Their data lies in the driver's buffers, so they are completed first.
        let is_over = |disk: &Block| {
            let load = disk.loads.get(queue);
            load.is_none_or(|load| load.requests == 0)
        };
        self.wait_until("the stop of a queue", is_over, Block::collect);
        for ring in self.queues.iter_mut().flatten() {
            ring.signal();
        }
        if let Some(ring) = self.queues.get_mut(queue) {
            *ring = None;
        }
        // Those that wait may have their turn now.
        while let Some(waiting) = self.waiting.pop_front() {
            if let Some(queue) = self.queue(waiting) {
                ring(queue.kick());
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

    fn cancel_flag(&self) -> Option<Arc<AtomicBool>> {
        Some(Arc::clone(&self.cancelled))
    }

    fn wanted_flag(&self) -> Option<Arc<AtomicBool>> {
        Some(Arc::clone(&self.wanted))
    }

    fn kicked(&mut self, queue: usize) {
        if !self.waiting.contains(&queue) {
            self.waiting.push_back(queue);
        }
        if !self.has_tag() {
            self.collect();
        }
        self.is_freed = true;
        self.turn();
    }

    fn sources(&self) -> Vec<Source> {
        let fds = [self.engine.source(), self.engine.growth_fd()];
        let source = |fd| Source {
            fd,
            output: false,
            edge: false,
        };
        fds.into_iter().flatten().map(source).collect()
    }

    fn ready(&mut self, source: usize) {
        let of_requests = usize::from(self.engine.source().is_some());
        if self.engine.growth_fd().is_some() && source == of_requests {
            if let Some(size) = self.engine.grown() {
                self.set_size(size);
            }
            return;
        }
        self.collect();
        self.turn();
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.reset();
    }
}

fn status_of(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Done => OK,
        Outcome::Failed => IOERR,
    }
}

/// Little-endian words.
fn words(bytes: &[u8; 16]) -> [u32; 4] {
    let word =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    [word(0), word(4), word(8), word(12)]
}

#[cfg(test)]
mod tests;
