//! A virtqueue of which no entry is trusted: requests come out whole and checked, or not at all.

use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;

use self::area::Area;
use self::chain::Table;
use super::Link;
use crate::sync::ring;

mod area;
mod buffers;
mod chain;
mod segment;

pub(super) use buffers::{Buffer, Way};
pub use chain::Chain;
pub(super) use segment::Regions;
pub use segment::{Segment, parts};

/// The most requests that [`Virtqueue::serve`] takes in one go, so that a driver that makes them as
/// fast as they are served does not keep the thread, and with it the device's lock, for ever.
const MOST_AT_ONCE: usize = 256;

/// A request that had room for more segments than this gives it back when it is completed: what
/// one large request once needed is not kept for ever, by each of a queue's entries.
const KEPT_SEGMENTS: usize = 64;

/// VIRTQ_USED_F_NO_NOTIFY (virtio 1.2, section 2.7.8).
const NO_NOTIFY: u16 = 1;
/// Where the index of the available and of the used ring lies, and where its entries begin.
const INDEX: usize = 2;
const ENTRIES: usize = 4;

/// VIRTQ_AVAIL_F_NO_INTERRUPT (virtio 1.2, section 2.7.6).
const NO_INTERRUPT: u16 = 1;

/// A queue that is in use.
///
/// It works on the rings by itself, and not by the crate `virtio-queue`: that looks guest memory up
/// at each access, which would be most of what a request costs us.
pub struct Virtqueue {
    index: u16,
    size: u16,
    event_idx: bool,
    /// The next entry of the available ring that is taken; it runs over, as the ring's own index.
    next_available: u16,
    /// The next entry of the used ring that is written; it runs over.
    next_used: u16,
    descriptors: Area,
    available: Area,
    used: Area,
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

/// Where a device stands in a queue while it does not work on it: plain data, by which it goes on
/// later, or another device in its stead.
///
/// Every request before `next_available` was answered: what was taken and not answered was handed
/// back ([`Virtqueue::hand_back`]). A queue that the driver has just set up is at the start of both
/// rings ([`Position::default`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Index in the available ring of the request that is taken next, modulo 2^16.
    pub next_available: u16,
    /// Index in the used ring of the request that is completed next, modulo 2^16.
    pub next_used: u16,
    /// Whether the driver broke the ring: nothing is taken from it until it is set up again.
    pub broken: bool,
}

/// Where a ring lies, as the driver set it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// What is wrong with size or addresses.
    pub(crate) fn new(
        index: u16,
        (most, size): (u16, u16),
        (addresses, position): (Addresses, Position),
        event_idx: bool,
        memory: Arc<GuestMemoryMmap>,
        link: Arc<Link>,
        kick: Arc<EventFd>,
    ) -> Result<Virtqueue, String> {
        if !size.is_power_of_two() || size > most {
            return Err(format!(
                "queue {index} has {size} entries; it takes up to {most}"
            ));
        }
        let count = usize::from(size);
        for (name, address, align, bytes) in [
            ("descriptor table", addresses.descriptors, 16, 16 * count),
            ("available ring", addresses.available, 2, 6 + 2 * count),
            ("used ring", addresses.used, 4, 6 + 8 * count),
        ] {
            let start = GuestAddress(address);
            let fits = Regions::new(&memory).are_memory(start, bytes, address == addresses.used);
            if !(address.is_multiple_of(align) && fits) {
                return Err(format!(
                    "queue {index} has its {name} at {address:#x}, where no {bytes} bytes of aligned memory are"
                ));
            }
        }
        let area = |address, bytes| Area::new(&memory, GuestAddress(address), bytes);
        Ok(Virtqueue {
            index,
            size,
            event_idx,
            next_available: position.next_available,
            next_used: position.next_used,
            descriptors: area(addresses.descriptors, 16 * count),
            available: area(addresses.available, 6 + 2 * count),
            used: area(addresses.used, 6 + 8 * count),
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
        self.size
    }

    /// Where its rings lie.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        Addresses {
            descriptors: self.descriptors.start.0,
            available: self.available.start.0,
            used: self.used.start.0,
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

    /// Finds places in guest memory: fast in the region of the descriptors.
    #[inline]
    pub(super) fn regions(&self) -> Regions<'_> {
        Regions::at(&self.memory, self.descriptors.region())
    }

    /// Reads a value of a request's readable buffers at their beginning; `None` where there are not
    /// so many bytes.
    #[must_use]
    pub fn read_first<T: ByteValued + Default>(&self, chain: &Chain) -> Option<T> {
        chain.first(&self.memory, self.regions())
    }

    /// Writes a number to the last byte that the device may write of a request, if it is in memory.
    pub fn put_last(&self, chain: &Chain, number: u8) {
        let slice = chain
            .last_writable()
            .and_then(|last| self.regions().slice(last, 1));
        if let Some(place) = slice.as_ref().and_then(|slice| slice.get_ref(0).ok()) {
            place.store(number);
        }
    }

    /// Takes the next request; `None` when there is none now, or the driver broke the ring.
    pub fn pop(&mut self) -> Option<Chain> {
        let head = self.take_head()?;
        self.follow(head)
    }

    /// Takes the head of the next request from the available ring.
    fn take_head(&mut self) -> Option<u16> {
        if self.broken {
            return None;
        }
        let available = &self.available;
        let index = available.load(&self.memory, INDEX, Ordering::Acquire);
        let Some(index) = index else {
            self.break_ring(format_args!("the available ring is not in memory"));
            return None;
        };
        let waiting = index.wrapping_sub(self.next_available);
        if waiting == 0 {
            return None;
        }
        let size = self.size;
        if waiting > size {
            self.break_ring(format_args!(
                "the available ring is wrong: it has {waiting} requests in {size} entries"
            ));
            return None;
        }
        let slot = ENTRIES + 2 * usize::from(self.next_available % self.size);
        let Some(head) = available.load(&self.memory, slot, Ordering::Relaxed) else {
            self.break_ring(format_args!("the available ring is not in memory"));
            return None;
        };
        self.next_available = self.next_available.wrapping_add(1);
        Some(head)
    }

    /// The request at descriptor `head`; `None` where the driver broke the ring.
    fn follow(&mut self, head: u16) -> Option<Chain> {
        let mut chain = self.spare.pop().unwrap_or_default();
        chain.reset(head);
        let table = Table {
            memory: &self.memory,
            address: self.descriptors.start,
            entries: self.size,
            whole: self.descriptors.slice(),
        };
        match chain.fill(self.regions(), table, head) {
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

    /// Whether [`Self::pop`] probably has something.
    #[must_use]
    pub fn has_next(&self) -> bool {
        let index = self.available.load(&self.memory, INDEX, Ordering::Relaxed);
        !self.broken && index.is_some_and(|index| index != self.next_available)
    }

    /// Puts the request that was popped last back: the next [`Self::pop`] gets it again.
    pub fn undo_pop(&mut self, chain: Chain) {
        self.next_available = self.next_available.wrapping_sub(1);
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
            next_available: self.next_available,
            next_used: self.next_used,
            broken: self.broken,
        }
    }

    /// Keeps a request's lists for the next one, unless they are large.
    fn keep(&mut self, chain: Chain) {
        if chain.capacity() <= KEPT_SEGMENTS {
            self.spare.push(chain);
        }
    }

    /// Completes a request into whose writable buffers `written` bytes were put.
    pub fn complete(&mut self, chain: Chain, written: u32) {
        if self.broken {
            return;
        }
        self.put_used(chain.head(), written);
        self.show_used();
        self.keep(chain);
    }

    /// Puts a request into the used ring, where the driver does not see it yet.
    fn put_used(&mut self, head: u16, written: u32) {
        if self.broken {
            return;
        }
        // struct virtq_used_elem (section 2.7.8).
        let slot = ENTRIES + 8 * usize::from(self.next_used % self.size);
        let entry = [u32::from(head).to_le(), written.to_le()];
        self.next_used = self.next_used.wrapping_add(1);
        if self.used.put(&self.memory, slot, entry).is_none() {
            self.break_ring(format_args!("the used ring is not in memory"));
        }
    }

    /// Has the driver see what was put into the used ring.
    fn show_used(&mut self) {
        if self.broken {
            return;
        }
        let (used, next) = (&self.used, self.next_used);
        match used.store(&self.memory, INDEX, next, Ordering::Release) {
            Some(()) => self.unsignalled = true,
            None => self.break_ring(format_args!("the used ring is not in memory")),
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
        let used = self.next_used;
        let before = std::mem::replace(&mut self.signalled, used);
        // What was completed is to be seen before it is read what the driver wants.
        fence(Ordering::SeqCst);
        let at = match self.event_idx {
            true => ENTRIES + 2 * usize::from(self.size),
            false => 0,
        };
        let said = self.available.load(&self.memory, at, Ordering::Acquire)?;
        match self.event_idx {
            true => Some(used.wrapping_sub(said).wrapping_sub(1) < used.wrapping_sub(before)),
            false => Some(said & NO_INTERRUPT == 0),
        }
    }

    /// Asks the driver not to kick while the queue is looked after anyway.
    pub fn silence(&mut self) {
        // With event indexes it kicks once for each time that it is asked to.
        if !self.event_idx {
            // It is a hint: without it there are kicks too many.
            let _ = self
                .used
                .store(&self.memory, 0, NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Asks the driver to kick again; true when there is something new already, which it will not
    /// kick for.
    pub fn listen(&mut self) -> bool {
        if self.broken {
            return false;
        }
        let (at, value) = match self.event_idx {
            true => (ENTRIES + 8 * usize::from(self.size), self.next_available),
            false => (0, 0),
        };
        let asked = self.used.store(&self.memory, at, value, Ordering::Relaxed);
        // The driver sees what it is asked for, or what it did before is seen here.
        fence(Ordering::SeqCst);
        let index = self.available.load(&self.memory, INDEX, Ordering::Relaxed);
        match index.filter(|_| asked.is_some()) {
            Some(index) => index != self.next_available,
            None => {
                self.break_ring(format_args!("its rings are not in memory"));
                false
            }
        }
    }

    /// Takes each request that is there and hands it to `serve`, which completes it, now or later;
    /// interrupts the driver at the end. Where there are very many it kicks itself for the rest.
    pub fn serve(&mut self, mut serve: impl FnMut(&mut Virtqueue, Chain)) {
        self.serve_while(|queue, chain| {
            serve(queue, chain);
            Ok(())
        });
    }

    /// As [`Self::serve`], until `serve` hands a request back: it is the next one when the queue is served
    /// again, and no kick comes before that.
    pub fn serve_while(
        &mut self,
        mut serve: impl FnMut(&mut Virtqueue, Chain) -> Result<(), Chain>,
    ) {
        let mut left = MOST_AT_ONCE;
        loop {
            self.silence();
            while left > 0
                && let Some(chain) = self.pop()
            {
                if let Err(chain) = serve(self, chain) {
                    self.undo_pop(chain);
                    self.signal();
                    return;
                }
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
        self.next_available
    }

    /// Resumes where another process or the kernel stopped working on the ring: at the request
    /// `next`, or, where it does not say, at the first one that it did not complete, if it completes
    /// them in order.
    pub fn adopt(&mut self, next: Option<u16>) {
        match self.used.load(&self.memory, INDEX, Ordering::Acquire) {
            Some(index) => {
                self.next_available = next.unwrap_or(index);
                self.next_used = index;
                self.signalled = index;
            }
            None => self.break_ring(format_args!("the used ring is not in memory")),
        }
    }

    /// Marks the ring as broken, and asks the driver for a reset: it sent what this device cannot make
    /// sense of.
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

#[cfg(test)]
mod tests;
