//! The parts of a ring in guest memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, MmapRegion, VolatileMemory,
    VolatileSlice,
};

/// One of the three parts of a ring, which is looked up once. All of it is memory.
pub(super) struct Area {
    pub(super) start: GuestAddress,
    bytes: usize,
    /// The region that it lies in and how far behind its beginning, if it lies in one.
    place: Option<(Arc<MmapRegion>, usize)>,
}

impl Area {
    pub(super) fn new(memory: &GuestMemoryMmap, start: GuestAddress, bytes: usize) -> Area {
        let place = memory.to_region_addr(start).and_then(|(region, offset)| {
            let offset = offset.0 as usize;
            let fits = bytes <= region.size() - offset;
            fits.then(|| (region.get_mmap(), offset))
        });
        Area {
            start,
            bytes,
            place,
        }
    }

    /// All of it, if it lies in one region.
    pub(super) fn slice(&self) -> Option<VolatileSlice<'_>> {
        let (mapping, start) = self.place.as_ref()?;
        VolatileMemory::get_slice(&**mapping, *start, self.bytes).ok()
    }

    /// The region that it lies in, if it lies in one, and where that begins.
    #[inline]
    pub(super) fn region(&self) -> Option<(&MmapRegion, u64)> {
        let (mapping, offset) = self.place.as_ref()?;
        Some((mapping, self.start.0 - *offset as u64))
    }

    /// Where this process has bytes that lie in the same region as the area, all of them.
    #[inline]
    pub(super) fn host(&self, address: GuestAddress, bytes: usize) -> Option<usize> {
        let (mapping, start) = self.region()?;
        let at = address.0.checked_sub(start)? as usize;
        let fits = at.checked_add(bytes)? <= mapping.size();
        fits.then(|| mapping.as_ptr() as usize + at)
    }

    /// The little-endian number at so many bytes.
    #[inline]
    pub(super) fn load(
        &self,
        memory: &GuestMemoryMmap,
        offset: usize,
        order: Ordering,
    ) -> Option<u16> {
        let value = match &self.place {
            Some((mapping, start)) => {
                let number = mapping.get_atomic_ref::<AtomicU16>(start + offset);
                number.ok()?.load(order)
            }
            None => {
                let address = self.start.checked_add(offset as u64)?;
                memory.load(address, order).ok()?
            }
        };
        Some(u16::from_le(value))
    }

    /// As [`Self::load`], the other way.
    #[inline]
    pub(super) fn store(
        &self,
        memory: &GuestMemoryMmap,
        offset: usize,
        value: u16,
        order: Ordering,
    ) -> Option<()> {
        match &self.place {
            Some((mapping, start)) => {
                let number = mapping.get_atomic_ref::<AtomicU16>(start + offset);
                number.ok()?.store(value.to_le(), order);
            }
            None => {
                let address = self.start.checked_add(offset as u64)?;
                memory.store(value.to_le(), address, order).ok()?;
            }
        }
        Some(())
    }

    /// Writes an entry of the used ring at so many bytes.
    #[inline]
    pub(super) fn put(
        &self,
        memory: &GuestMemoryMmap,
        offset: usize,
        entry: [u32; 2],
    ) -> Option<()> {
        match &self.place {
            Some((mapping, start)) => mapping.get_ref(start + offset).ok()?.store(entry),
            None => {
                let address = self.start.checked_add(offset as u64)?;
                memory.write_obj(entry, address).ok()?;
            }
        }
        Some(())
    }
}
