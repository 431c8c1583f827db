//! Pieces of guest memory, and where this process has them.

use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion,
    VolatileMemory, VolatileSlice,
};

/// PROT_WRITE (include/uapi/asm-generic/mman-common.h): persistent memory may lack it.
const PROT_WRITE: i32 = 2;

/// A piece of guest memory that is part of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: GuestAddress,
    /// Bytes; never 0.
    pub len: usize,
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

/// Finds where addresses lie in guest memory: fast where one lies in the same region as the one
/// before it, as nearly all do.
pub(in crate::virtio) struct Regions<'a> {
    memory: &'a GuestMemoryMmap,
    /// The last one, and where it begins.
    last: Option<(&'a MmapRegion, u64)>,
}

impl<'a> Regions<'a> {
    pub(in crate::virtio) fn new(memory: &'a GuestMemoryMmap) -> Regions<'a> {
        Regions { memory, last: None }
    }

    /// As [`Self::new`], where addresses probably lie in this region, if there is one, which begins
    /// at this address.
    pub(super) fn at(
        memory: &'a GuestMemoryMmap,
        last: Option<(&'a MmapRegion, u64)>,
    ) -> Regions<'a> {
        Regions { memory, last }
    }

    /// The region of an address, and how many bytes behind its beginning the address is.
    #[inline]
    pub(in crate::virtio) fn find(
        &mut self,
        address: GuestAddress,
    ) -> Option<(&'a MmapRegion, usize)> {
        if let Some((region, start)) = self.last {
            // Less than its beginning is more than any size.
            let offset = address.0.wrapping_sub(start);
            if offset < region.size() as u64 {
                return Some((region, offset as usize));
            }
        }
        self.find_other(address)
    }

    #[cold]
    fn find_other(&mut self, address: GuestAddress) -> Option<(&'a MmapRegion, usize)> {
        let (region, offset) = self.memory.to_region_addr(address)?;
        self.last = Some((region, region.start_addr().0));
        Some((region, offset.0 as usize))
    }

    /// Bytes that lie in one region.
    #[inline]
    pub(in crate::virtio) fn slice(
        &mut self,
        address: GuestAddress,
        bytes: usize,
    ) -> Option<VolatileSlice<'a>> {
        let (region, offset) = self.find(address)?;
        VolatileMemory::get_slice(region, offset, bytes).ok()
    }

    /// Whether all of a range is memory that may be read, and written where `to_write`.
    #[inline]
    pub(super) fn are_memory(&mut self, start: GuestAddress, len: usize, to_write: bool) -> bool {
        match self.find(start) {
            Some((region, offset)) if len <= region.size() - offset => {
                !to_write || region.prot() & PROT_WRITE != 0
            }
            Some(_) => self.are_regions(start, len, to_write),
            None => false,
        }
    }

    /// As [`Self::are_memory`], for a range that may lie in several regions that meet.
    #[cold]
    fn are_regions(&mut self, start: GuestAddress, len: usize, to_write: bool) -> bool {
        let (mut at, mut left) = (start, len);
        loop {
            let Some((region, offset)) = self.find(at) else {
                return false;
            };
            if to_write && region.prot() & PROT_WRITE == 0 {
                return false;
            }
            let there = region.size() - offset;
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
}
