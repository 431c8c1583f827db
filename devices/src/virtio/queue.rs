//! A virtqueue of which no entry is trusted: requests come out whole and checked, or not at all.

use crate::sync::ring;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory,
    VolatileSlice,
};
use vmm_sys_util::eventfd::EventFd;

use super::Link;

/// The most segments of one request: the device's queue sizes bound direct chains, and Linux
/// bounds indirect ones by the same; more is a guest that wants our memory.
const MOST_SEGMENTS: usize = 4096;
/// The most requests that [`Virtqueue::serve`] takes in one go, so that a driver that makes them as
/// fast as they are served does not keep the thread, and with it the device's lock, for ever.
const MOST_AT_ONCE: usize = 256;

/// A request that had room for more segments than this gives it back when it is completed: what
/// one large request once needed is not kept for ever, by each of a queue's entries.
const KEPT_SEGMENTS: usize = 64;

/// Bytes of a descriptor (virtio 1.2, section 2.7.5).
const DESCRIPTOR: u32 = 16;

/// PROT_WRITE (include/uapi/asm-generic/mman-common.h): persistent memory may lack it.
const PROT_WRITE: i32 = 2;
/// VIRTQ_AVAIL_F_NO_INTERRUPT (virtio 1.2, section 2.7.6).
const NO_INTERRUPT: u16 = 1;

/// A queue that is in use.
pub struct Virtqueue {
    index: u16,
    queue: Queue,
    memory: Arc<GuestMemoryMmap>,
    link: Arc<Link>,
    kick: Arc<EventFd>,
    /// Whether the driver broke the ring; then nothing comes out of it any more.
    broken: bool,
    /// Requests that were completed since the driver was last asked whether to interrupt it.
    unsignalled: bool,
    /// The used ring's index when the driver was last asked.
    signalled: u16,
    /// Kept for their capacity.
    spare: Vec<Chain>,
}

/// A request: buffers that the device reads, then buffers that it writes.
///
/// All that is shown lies in guest memory. Of a request of which a buffer does not, it is the
/// buffers before that one: the device fails such a request and goes on with the next
/// ([`Chain::is_whole`]).
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    /// Whether a readable buffer, and a writable one, is not in memory.
    lacks: [bool; 2],
    /// The last writable byte, if it is in memory.
    last: Option<GuestAddress>,
}

/// A piece of guest memory that is part of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: GuestAddress,
    /// Bytes; never 0.
    pub len: usize,
}

/// Where a device stands in a queue while it does not work on it: plain data, by which it goes on
/// later, or another device in its stead.
///
/// Every request before `next_available` was answered: what was taken and not answered was handed
/// back ([`Virtqueue::hand_back`]). A queue that the driver has just set up is at the start of both
/// rings ([`Position::default`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Index in the available ring of the request that is taken next, modulo 2^16.
    pub next_available: u16,
    /// Index in the used ring of the request that is completed next, modulo 2^16.
    pub next_used: u16,
    /// Whether the driver broke the ring: nothing is taken from it until it is set up again.
    pub broken: bool,
}

/// Where a ring lies, as the driver set it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Of the driver area (available ring).
    pub available: u64,
    /// Of the device area (used ring).
    pub used: u64,
}

impl Virtqueue {
    /// The queue `index` of `size` entries with its rings at `addresses`, on which the work goes on
    /// at `position`.
    ///
    /// # Errors
    /// What is wrong with size or addresses, in words.
    pub(crate) fn new(
        index: u16,
        (most, size): (u16, u16),
        (addresses, position): (Addresses, Position),
        event_idx: bool,
        memory: Arc<GuestMemoryMmap>,
        link: Arc<Link>,
        kick: Arc<EventFd>,
    ) -> Result<Virtqueue, String> {
        let mut queue =
            Queue::new(most).map_err(|error| format!("queue {index} of {most}: {error}"))?;
        queue
            .try_set_size(size)
            .map_err(|_| format!("queue {index} has {size} entries; it takes up to {most}"))?;
        let count = usize::from(size);
        for (name, address, align, bytes) in [
            ("descriptor table", addresses.descriptors, 16, 16 * count),
            ("available ring", addresses.available, 2, 6 + 2 * count),
            ("used ring", addresses.used, 4, 6 + 8 * count),
        ] {
            let start = GuestAddress(address);
            let fits = is_memory(&memory, start, bytes, address == addresses.used);
            if !(address.is_multiple_of(align) && fits) {
                return Err(format!(
                    "queue {index} has its {name} at {address:#x}, where no {bytes} bytes of aligned memory are"
                ));
            }
        }
        let set = queue
            .try_set_desc_table_address(GuestAddress(addresses.descriptors))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(addresses.available)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(addresses.used)));
        set.map_err(|error| format!("queue {index}: {error}"))?;
        queue.set_event_idx(event_idx);
        queue.set_next_avail(position.next_available);
        queue.set_next_used(position.next_used);
        queue.set_ready(true);
        Ok(Virtqueue {
            index,
            queue,
            memory,
            link,
            kick,
            broken: position.broken,
            unsignalled: false,
            signalled: position.next_used,
            spare: Vec::new(),
        })
    }

    /// Its index.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Its entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Where its rings lie.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        Addresses {
            descriptors: self.queue.desc_table(),
            available: self.queue.avail_ring(),
            used: self.queue.used_ring(),
        }
    }

    /// The descriptor that the driver's kicks come by.
    #[must_use]
    pub fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// The way to the driver.
    #[must_use]
    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }

    /// Takes the next request; `None` when there is none now, or the driver broke the ring.
    pub fn pop(&mut self) -> Option<Chain> {
        if self.broken {
            return None;
        }
        let popped = match self.queue.iter(&*self.memory) {
            Ok(mut iter) => iter.next(),
            Err(error) => {
                self.break_ring(format_args!("the available ring is wrong: {error}"));
                return None;
            }
        };
        let head = popped?.head_index();
        let mut chain = self.spare.pop().unwrap_or_default();
        chain.reset(head);
        let table = GuestAddress(self.queue.desc_table());
        let table = Table::new(&self.memory, table, self.queue.size());
        match chain.fill(&self.memory, table, head) {
            Ok(()) => {
                if !chain.is_whole() {
                    self.link.fault(format_args!(
                        "queue {}: the request at descriptor {head} has a buffer that is not in memory",
                        self.index
                    ));
                }
                Some(chain)
            }
            Err(what) => {
                self.break_ring(format_args!("the request at descriptor {head} {what}"));
                None
            }
        }
    }

    /// Puts the request that was popped last back: the next [`Self::pop`] gets it again.
    pub fn undo_pop(&mut self, chain: Chain) {
        self.queue.go_to_previous_position();
        self.keep(chain);
    }

    /// Puts the requests that were popped last back, all of them in a row: the next [`Self::pop`]
    /// gets the first of them again.
    pub fn hand_back(&mut self, chains: impl IntoIterator<Item = Chain>) {
        for chain in chains {
            self.undo_pop(chain);
        }
    }

    /// Interrupts the driver for what was completed, if it wants to hear of it, and tells where the
    /// work stands. All requests that were popped have been completed or handed back.
    #[must_use = "where the work goes on later"]
    pub fn quiesce(&mut self) -> Position {
        self.signal();
        Position {
            next_available: self.queue.next_avail(),
            next_used: self.queue.next_used(),
            broken: self.broken,
        }
    }

    /// Keeps a request's lists for the next one, unless they are large.
    fn keep(&mut self, chain: Chain) {
        let segments = chain.readable.capacity().max(chain.writable.capacity());
        if segments <= KEPT_SEGMENTS {
            self.spare.push(chain);
        }
    }

    /// Completes a request into whose writable buffers `written` bytes were put.
    pub fn complete(&mut self, chain: Chain, written: u32) {
        if self.broken {
            return;
        }
        match self.queue.add_used(&*self.memory, chain.head, written) {
            Ok(()) => self.unsignalled = true,
            Err(error) => self.break_ring(format_args!("cannot complete a request: {error}")),
        }
        self.keep(chain);
    }

    /// Completes requests that belong together, with the bytes put into each: the driver sees all
    /// of them or none, as it must where a frame lies in several buffers (virtio 1.2, section
    /// 5.1.6.4).
    pub fn complete_together(&mut self, chains: impl IntoIterator<Item = (Chain, u32)>) {
        if self.broken {
            return;
        }
        let used = self.queue.used_ring();
        let mut next = self.queue.next_used();
        let mut result = Ok(());
        for (chain, written) in chains {
            // struct virtq_used_elem (section 2.7.8), behind two words of 16 bits.
            let slot = GuestAddress(used + 4 + 8 * u64::from(next % self.queue.size()));
            let entry = [u32::from(chain.head).to_le(), written.to_le()];
            result = result.and(self.memory.write_obj(entry, slot));
            next = next.wrapping_add(1);
            self.keep(chain);
        }
        self.queue.set_next_used(next);
        let index = GuestAddress(used + 2);
        result = result.and(self.memory.store(next.to_le(), index, Ordering::Release));
        match result {
            Ok(()) => self.unsignalled = true,
            Err(error) => self.break_ring(format_args!("cannot complete requests: {error}")),
        }
    }

    /// Interrupts the driver if requests were completed and it wants to hear of it.
    pub fn signal(&mut self) {
        if !std::mem::take(&mut self.unsignalled) {
            return;
        }
        // Without an answer it is interrupted once too often, which it must bear.
        if self.wants_interrupt().unwrap_or(true) {
            self.link.queue_used(self.index);
        }
    }

    /// Whether the driver wants to hear of what was completed since it was last asked (virtio 1.2,
    /// section 2.7.7.2).
    fn wants_interrupt(&mut self) -> Option<bool> {
        let used = self.queue.next_used();
        let before = std::mem::replace(&mut self.signalled, used);
        // What was completed is to be seen before it is read what the driver wants.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        if !self.queue.event_idx_enabled() {
            let flags = load_u16(&self.memory, available)?;
            return Some(flags & NO_INTERRUPT == 0);
        }
        let event = available + 4 + 2 * u64::from(self.queue.size());
        let wanted = load_u16(&self.memory, event)?;
        Some(used.wrapping_sub(wanted).wrapping_sub(1) < used.wrapping_sub(before))
    }

    /// Asks the driver not to kick while the queue is looked after anyway.
    pub fn silence(&mut self) {
        // It is a hint: without it there are kicks too many.
        let _ = self.queue.disable_notification(&*self.memory);
    }

    /// Asks the driver to kick again; true when there is something new already, which it will not
    /// kick for.
    pub fn listen(&mut self) -> bool {
        if self.broken {
            return false;
        }
        match self.queue.enable_notification(&*self.memory) {
            Ok(more) => more,
            Err(error) => {
                self.break_ring(format_args!("cannot ask for kicks: {error}"));
                false
            }
        }
    }

    /// Takes each request that is there and hands it to `serve`, which completes it, now or later;
    /// interrupts the driver at the end. Where there are very many it kicks itself for the rest.
    pub fn serve(&mut self, mut serve: impl FnMut(&mut Virtqueue, Chain)) {
        let mut left = MOST_AT_ONCE;
        loop {
            self.silence();
            while left > 0
                && let Some(chain) = self.pop()
            {
                serve(self, chain);
                left -= 1;
            }
            if !self.listen() {
                break;
            }
            if left == 0 {
                ring(&self.kick);
                break;
            }
        }
        self.signal();
    }

    /// Where the next request is taken from the available ring, for vhost.
    #[must_use]
    pub fn next_available(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Goes on where another process or the kernel stopped working on the ring: at the request
    /// `next`, or, where it does not say, at the first one that it did not complete, if it completes
    /// them in order.
    pub fn adopt(&mut self, next: Option<u16>) {
        let used = self.queue.used_ring() + 2;
        match load_u16(&self.memory, used) {
            Some(index) => {
                self.queue.set_next_avail(next.unwrap_or(index));
                self.queue.set_next_used(index);
                self.signalled = index;
            }
            None => self.break_ring(format_args!("the used ring is not in memory")),
        }
    }

    /// The driver sent what this device cannot make sense of: it is asked for a reset.
    pub fn break_ring(&mut self, what: std::fmt::Arguments<'_>) {
        self.broken = true;
        self.link
            .broken(format_args!("queue {}: {what}", self.index));
    }

    /// Whether the driver broke the ring.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken
    }
}

impl Chain {
    /// A number that tells this request from the others of its queue that are under way.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    fn reset(&mut self, head: u16) {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        self.lacks = [false; 2];
        self.last = None;
    }

    /// Whether all of its buffers are in memory.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.lacks == [false; 2]
    }

    /// The last byte that the device may write, if there is one and it is in memory: where some
    /// devices say how a request ended, also of one that is not whole.
    #[must_use]
    pub fn last_writable(&self) -> Option<GuestAddress> {
        self.last
    }

    /// Buffers that the device reads.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }

    /// Buffers that the device writes.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Bytes of the buffers that the device reads.
    #[must_use]
    pub fn readable_len(&self) -> usize {
        self.readable.iter().map(|segment| segment.len).sum()
    }

    /// Bytes of the buffers that the device writes.
    #[must_use]
    pub fn writable_len(&self) -> usize {
        self.writable.iter().map(|segment| segment.len).sum()
    }

    /// Copies from the readable buffers at `offset` bytes; returns how many bytes there were.
    pub fn read(&self, memory: &GuestMemoryMmap, offset: usize, data: &mut [u8]) -> usize {
        let mut done = 0;
        for part in parts(&self.readable, offset, data.len()) {
            if memory
                .read_slice(&mut data[done..done + part.len], part.address)
                .is_err()
            {
                break;
            }
            done += part.len;
        }
        done
    }

    /// Copies what lies in the writable buffers, from their first byte on: what was put there before.
    pub(crate) fn read_back(&self, memory: &GuestMemoryMmap, data: &mut [u8]) {
        let mut done = 0;
        for part in parts(&self.writable, 0, data.len()) {
            // All of it is memory.
            let _ = memory.read_slice(&mut data[done..done + part.len], part.address);
            done += part.len;
        }
    }

    /// Copies to the writable buffers at `offset` bytes; returns how many bytes there was room
    /// for.
    pub fn write(&self, memory: &GuestMemoryMmap, offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for part in parts(&self.writable, offset, data.len()) {
            if memory
                .write_slice(&data[done..done + part.len], part.address)
                .is_err()
            {
                break;
            }
            done += part.len;
        }
        done
    }

    /// Takes the request apart whose first descriptor is `head` of `table`.
    ///
    /// This is what `virtio_queue::DescriptorChain` does, which looks each descriptor's memory up
    /// by itself; that would be most of what a request costs us.
    fn fill<'a>(
        &mut self,
        memory: &'a GuestMemoryMmap,
        mut table: Table<'a>,
        head: u16,
    ) -> Result<(), &'static str> {
        const ASTRAY: &str = "does not end, or leads out of its table";
        let mut index = head;
        let mut left = table.entries;
        let mut is_indirect = false;
        // No request is longer than u32 can tell (virtio 1.2, section 2.7.5.2).
        let mut bytes = 0_u32;
        while left > 0 {
            left -= 1;
            let descriptor = table.get(index).ok_or(ASTRAY)?;
            let len = descriptor.len();
            if descriptor.refers_to_indirect_table() {
                let entries = u16::try_from(len / DESCRIPTOR).map_err(|_| ASTRAY)?;
                if is_indirect || len % DESCRIPTOR != 0 {
                    return Err(ASTRAY);
                }
                table = Table::new(memory, descriptor.addr(), entries);
                (index, left, is_indirect) = (0, entries, true);
                continue;
            }
            bytes = bytes.checked_add(len).ok_or(ASTRAY)?;
            self.add(memory, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
        Err(ASTRAY)
    }

    fn add(
        &mut self,
        memory: &GuestMemoryMmap,
        descriptor: &Descriptor,
    ) -> Result<(), &'static str> {
        let (address, len) = (descriptor.addr(), descriptor.len() as usize);
        let is_writable = descriptor.is_write_only();
        let segments = match is_writable {
            true => &mut self.writable,
            false if !self.writable.is_empty() || self.lacks[1] => {
                return Err("has a readable buffer behind a writable one");
            }
            false => &mut self.readable,
        };
        if len == 0 {
            return Ok(());
        }
        if segments.len() == MOST_SEGMENTS {
            return Err("has too many buffers");
        }
        let is_there = is_memory(memory, address, len, is_writable);
        if is_writable {
            let last = address.checked_add(len as u64 - 1);
            self.last = last.filter(|_| is_there);
        }
        let lacks = &mut self.lacks[usize::from(is_writable)];
        *lacks |= !is_there;
        if !*lacks {
            segments.push(Segment { address, len });
        }
        Ok(())
    }
}

/// Whether all of a range is memory that may be read, and written where `to_write`.
fn is_memory(memory: &GuestMemoryMmap, start: GuestAddress, len: usize, to_write: bool) -> bool {
    let (mut at, mut left) = (start, len);
    loop {
        // Most lie in one region.
        let Some((region, offset)) = memory.to_region_addr(at) else {
            return false;
        };
        if to_write && region.prot() & PROT_WRITE == 0 {
            return false;
        }
        let there = region.size() - offset.0 as usize;
        if left <= there {
            return true;
        }
        left -= there;
        match at.checked_add(there as u64) {
            Some(next) => at = next,
            None => return false,
        }
    }
}

/// A table of descriptors, where it is looked up once.
struct Table<'a> {
    memory: &'a GuestMemoryMmap,
    address: GuestAddress,
    entries: u16,
    /// All of it, where it lies in one region.
    whole: Option<VolatileSlice<'a>>,
}

impl<'a> Table<'a> {
    fn new(memory: &'a GuestMemoryMmap, address: GuestAddress, entries: u16) -> Table<'a> {
        let bytes = usize::from(entries) * DESCRIPTOR as usize;
        Table {
            memory,
            address,
            entries,
            whole: memory.get_slice(address, bytes).ok(),
        }
    }

    /// A descriptor; `None` where the table ends before, or is not in memory.
    fn get(&self, index: u16) -> Option<Descriptor> {
        if index >= self.entries {
            return None;
        }
        let offset = usize::from(index) * DESCRIPTOR as usize;
        match &self.whole {
            Some(whole) => Some(whole.get_ref(offset).ok()?.load()),
            None => {
                let address = self.address.checked_add(offset as u64)?;
                self.memory.read_obj(address).ok()
            }
        }
    }
}

/// The parts of `segments` that hold `len` bytes from `offset`.
pub fn parts(
    segments: &[Segment],
    offset: usize,
    len: usize,
) -> impl Iterator<Item = Segment> + '_ {
    let (mut skip, mut left) = (offset, len);
    segments.iter().filter_map(move |segment| {
        if skip >= segment.len {
            skip -= segment.len;
            return None;
        }
        let from = std::mem::take(&mut skip);
        let len = (segment.len - from).min(left);
        left -= len;
        let address = GuestAddress(segment.address.0 + from as u64);
        (len > 0).then_some(Segment { address, len })
    })
}

/// Loads a little-endian 16-bit number of a ring, for tests and checks.
#[must_use]
pub fn load_u16(memory: &GuestMemoryMmap, address: u64) -> Option<u16> {
    memory
        .load::<u16>(GuestAddress(address), Ordering::Acquire)
        .map(u16::from_le)
        .ok()
}

#[cfg(test)]
mod tests;
