//! Requests: chains of descriptors, followed and checked.

use vm_memory::{
    Address, ByteValued, Bytes, GuestAddress, GuestMemoryMmap, VolatileMemory, VolatileSlice,
};

use super::segment::{Regions, Segment, parts};

/// The most segments of one request: the device's queue sizes bound direct chains, and Linux
/// bounds indirect ones by the same; more is a guest that wants our memory.
pub(super) const MOST_SEGMENTS: usize = 4096;

/// Bytes of a descriptor (virtio 1.2, section 2.7.5).
const DESCRIPTOR: u32 = 16;
/// VIRTQ_DESC_F_NEXT (virtio 1.2, section 2.7.5, as the next two).
pub(super) const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE.
pub(super) const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT.
pub(super) const INDIRECT: u16 = 4;

/// A request: buffers that the device reads, then buffers that it writes.
///
/// All that is shown lies in guest memory. Of a request of which a buffer does not, it is the
/// buffers before that one: the device fails such a request and goes on with the next
/// ([`Chain::is_whole`]).
#[derive(Debug, Default)]
pub struct Chain {
    /// Behind a pointer, because a request goes through many hands.
    parts: Box<Parts>,
}

#[derive(Debug, Default)]
struct Parts {
    head: u16,
    /// The readable ones, and the writable ones.
    lists: [List; 2],
    /// The last writable byte, if it is in memory.
    last: Option<GuestAddress>,
}

/// Buffers that go one way.
#[derive(Debug, Default)]
struct List {
    segments: Vec<Segment>,
    bytes: usize,
    /// Whether one is not in memory.
    lacks: bool,
}

impl Chain {
    /// A number that tells this request from the others of its queue that are under way.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.parts.head
    }

    /// Makes it the request at descriptor `head`, without buffers so far.
    pub(super) fn reset(&mut self, head: u16) {
        self.parts.head = head;
        for list in &mut self.parts.lists {
            list.segments.clear();
            (list.bytes, list.lacks) = (0, false);
        }
        self.parts.last = None;
    }

    /// The segments that its lists have room for.
    pub(super) fn capacity(&self) -> usize {
        let [readable, writable] = &self.parts.lists;
        let room = |list: &List| list.segments.capacity();
        room(readable).max(room(writable))
    }

    /// Whether all of its buffers are in memory.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        !self.parts.lists[0].lacks && !self.parts.lists[1].lacks
    }

    /// The last byte that the device may write, if there is one and it is in memory: where some
    /// devices say how a request ended, also of one that is not whole.
    #[must_use]
    pub fn last_writable(&self) -> Option<GuestAddress> {
        self.parts.last
    }

    /// Buffers that the device reads.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        &self.parts.lists[0].segments
    }

    /// Buffers that the device writes.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        &self.parts.lists[1].segments
    }

    /// Bytes of the buffers that the device reads.
    #[must_use]
    pub fn readable_len(&self) -> usize {
        self.parts.lists[0].bytes
    }

    /// Bytes of the buffers that the device writes.
    #[must_use]
    pub fn writable_len(&self) -> usize {
        self.parts.lists[1].bytes
    }

    /// Copies from the readable buffers at `offset` bytes; returns how many bytes there were.
    pub fn read(&self, memory: &GuestMemoryMmap, offset: usize, data: &mut [u8]) -> usize {
        let mut done = 0;
        for part in parts(self.readable(), offset, data.len()) {
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

    /// Copies to the writable buffers at `offset` bytes; returns how many bytes there was room
    /// for.
    pub fn write(&self, memory: &GuestMemoryMmap, offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for part in parts(self.writable(), offset, data.len()) {
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

    /// Reads a value of the readable buffers at their beginning.
    pub(super) fn first<T: ByteValued + Default>(
        &self,
        memory: &GuestMemoryMmap,
        mut regions: Regions<'_>,
    ) -> Option<T> {
        // As a rule all of it lies in the first buffer.
        if let Some(first) = self.readable().first()
            && first.len >= size_of::<T>()
            && let Some(slice) = regions.slice(first.address, size_of::<T>())
        {
            return Some(slice.get_ref(0).ok()?.load());
        }
        let mut value = T::default();
        let there = self.read(memory, 0, value.as_mut_slice());
        (there == size_of::<T>()).then_some(value)
    }

    /// Takes the request apart whose first descriptor is `head` of `table`.
    pub(super) fn fill<'a>(
        &mut self,
        mut regions: Regions<'a>,
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
            let len = descriptor.len;
            if descriptor.flags & INDIRECT != 0 {
                let entries = u16::try_from(len / DESCRIPTOR).map_err(|_| ASTRAY)?;
                if is_indirect || len % DESCRIPTOR != 0 {
                    return Err(ASTRAY);
                }
                let (address, bytes) = (GuestAddress(descriptor.address), len as usize);
                table = Table {
                    address,
                    entries,
                    whole: regions.slice(address, bytes),
                    ..table
                };
                (index, left, is_indirect) = (0, entries, true);
                continue;
            }
            bytes = bytes.checked_add(len).ok_or(ASTRAY)?;
            self.parts.add(&mut regions, &descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(ASTRAY)
    }
}

impl Parts {
    #[inline]
    fn add(
        &mut self,
        regions: &mut Regions<'_>,
        descriptor: &Descriptor,
    ) -> Result<(), &'static str> {
        let address = GuestAddress(descriptor.address);
        let len = descriptor.len as usize;
        let is_writable = descriptor.flags & WRITE != 0;
        let [readable, writable] = &mut self.lists;
        let list = match is_writable {
            true => writable,
            false if !writable.segments.is_empty() || writable.lacks => {
                return Err("has a readable buffer behind a writable one");
            }
            false => readable,
        };
        if len == 0 {
            return Ok(());
        }
        if list.segments.len() == MOST_SEGMENTS {
            return Err("has too many buffers");
        }
        let is_there = regions.are_memory(address, len, is_writable);
        if is_writable {
            // What is in memory does not run over.
            let last = GuestAddress(address.0.wrapping_add(len as u64 - 1));
            self.last = is_there.then_some(last);
        }
        list.lacks |= !is_there;
        if !list.lacks {
            list.segments.push(Segment { address, len });
            list.bytes += len;
        }
        Ok(())
    }
}

/// A table of descriptors.
pub(super) struct Table<'a> {
    pub(super) memory: &'a GuestMemoryMmap,
    pub(super) address: GuestAddress,
    pub(super) entries: u16,
    /// All of it, where it lies in one region.
    pub(super) whole: Option<VolatileSlice<'a>>,
}

impl Table<'_> {
    /// A descriptor; `None` where the table ends before, or is not in memory.
    fn get(&self, index: u16) -> Option<Descriptor> {
        if index >= self.entries {
            return None;
        }
        let offset = usize::from(index) * DESCRIPTOR as usize;
        let words = match &self.whole {
            Some(whole) => whole.get_ref(offset).ok()?.load(),
            None => {
                let address = self.address.checked_add(offset as u64)?;
                self.memory.read_obj(address).ok()?
            }
        };
        Some(Descriptor::of(words))
    }
}

/// struct virtq_desc (virtio 1.2, section 2.7.5).
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// The one that has these bytes.
    fn of(words: [u64; 2]) -> Descriptor {
        let [address, rest] = words.map(u64::from_le);
        Descriptor {
            address,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }
}
