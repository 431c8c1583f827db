//! Requests that are bytes in one direction and no more, as frames are: many may be taken before one is
//! answered, and their segments lie in one list.

use super::chain::WRITE;
use super::{Segment, Virtqueue};
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileMemory};

/// Which of a request's segments count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::virtio) enum Way {
    /// Those that the device reads.
    Out,
    /// Those that it writes.
    In,
}

/// A buffer of the driver.
#[derive(Clone, Copy, Debug)]
pub(in crate::virtio) struct Buffer {
    /// The number of its request.
    head: u16,
    /// So many segments of it.
    pub(in crate::virtio) pieces: u16,
    /// Their bytes.
    pub(in crate::virtio) room: usize,
}

impl Virtqueue {
    /// Takes the next request as a buffer, and puts its segments that go this way at the end of
    /// `segments`. `None` when there is none now, or the driver broke the ring; an error where it is not
    /// all in memory, and has been handed back to the driver.
    pub(in crate::virtio) fn pop_buffer(
        &mut self,
        way: Way,
        segments: &mut Vec<Segment>,
    ) -> Option<Result<Buffer, ()>> {
        let head = self.take_head()?;
        // As a rule it is one descriptor, for memory in the region of the rings.
        if let Some(segment) = self.single(head, way) {
            segments.push(segment);
            let (pieces, room) = (1, segment.len);
            return Some(Ok(Buffer { head, pieces, room }));
        }
        let chain = self.follow(head)?;
        if !chain.is_whole() {
            self.complete(chain, 0);
            return Some(Err(()));
        }
        let (list, room) = match way {
            Way::Out => (chain.readable(), chain.readable_len()),
            Way::In => (chain.writable(), chain.writable_len()),
        };
        segments.extend_from_slice(list);
        // No request has more than fit.
        let pieces = list.len() as u16;
        self.keep(chain);
        Some(Ok(Buffer { head, pieces, room }))
    }

    /// The segment of a request that has one only, which goes this way and lies in the region of the used
    /// ring: that can be written.
    fn single(&self, head: u16, way: Way) -> Option<Segment> {
        let offset = usize::from(head) * 16;
        let words: [u64; 2] = self.descriptors.slice()?.get_ref(offset).ok()?.load();
        // struct virtq_desc (virtio 1.2, section 2.7.5).
        let [address, rest] = words.map(u64::from_le);
        let (len, flags) = (rest as u32 as usize, (rest >> 32) as u16);
        let wanted = match way {
            Way::Out => 0,
            Way::In => WRITE,
        };
        let address = GuestAddress(address);
        let is_single = flags == wanted && len > 0 && self.used.host(address, len).is_some();
        is_single.then_some(Segment { address, len })
    }

    /// Puts the buffers that were taken last back, all of them in a row.
    pub(in crate::virtio) fn hand_back_buffers(&mut self, count: usize) {
        self.next_available = self.next_available.wrapping_sub(count as u16);
    }

    /// Completes buffers that belong together, `left` bytes in all: the driver sees all of them or none,
    /// as it must where a frame lies in several (virtio 1.2, section 5.1.6.4).
    pub(in crate::virtio) fn complete_buffers(&mut self, buffers: &[Buffer], mut left: usize) {
        for buffer in buffers {
            let written = buffer.room.min(left);
            left -= written;
            self.put_used(buffer.head, written as u32);
        }
        self.show_used();
    }

    /// Puts where this process has `segments` from their byte `skip` on at the end of `vector`: address
    /// and bytes of each piece, as struct iovec. All of them are in memory.
    pub(in crate::virtio) fn add_pieces(
        &self,
        segments: &[Segment],
        mut skip: usize,
        vector: &mut Vec<[usize; 2]>,
    ) {
        for segment in segments {
            if skip >= segment.len {
                skip -= segment.len;
                continue;
            }
            let from = std::mem::take(&mut skip);
            let address = GuestAddress(segment.address.0 + from as u64);
            let len = segment.len - from;
            if let Some(host) = self.used.host(address, len) {
                vector.push([host, len]);
                continue;
            }
            for slice in self.memory.get_slices(address, len).map_while(Result::ok) {
                vector.push([slice.ptr_guard_mut().as_ptr() as usize, slice.len()]);
            }
        }
    }
}
