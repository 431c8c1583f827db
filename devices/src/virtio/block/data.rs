//! The data of a request: pieces of guest memory, and where this process has them.

use vm_memory::{Address, GuestAddress, GuestMemoryMmap};

use crate::virtio::queue::{Regions, Segment, parts};

/// A piece of guest memory as this process has it: what `struct iovec` is, with an address that may
/// go from thread to thread.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Where it begins.
    pub address: usize,
    /// Bytes.
    pub len: usize,
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

    /// Where it lies in this process, in pieces of up to `most` bytes, which are added to `places`.
    /// Returns its bytes; `None` where it is not in `memory`. Whoever uses the pieces keeps the
    /// memory alive.
    #[must_use]
    pub fn places(
        &self,
        memory: &GuestMemoryMmap,
        most: usize,
        places: &mut Vec<Place>,
    ) -> Option<usize> {
        let mut regions = Regions::new(memory);
        let (mut skip, mut bytes) = (self.skip, 0);
        places.reserve(self.segments.len());
        for segment in self.segments {
            if skip >= segment.len {
                skip -= segment.len;
                continue;
            }
            let mut address = GuestAddress(segment.address.0 + skip as u64);
            let mut left = (segment.len - skip).min(self.len - bytes);
            if left == 0 {
                break;
            }
            (skip, bytes) = (0, bytes + left);
            // A buffer may lie in several regions that meet.
            loop {
                let (region, offset) = regions.find(address)?;
                let len = left.min(region.size() - offset).min(most);
                places.push(Place {
                    address: region.as_ptr() as usize + offset,
                    len,
                });
                left -= len;
                if left == 0 {
                    break;
                }
                address = address.checked_add(len as u64)?;
            }
        }
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::GuestMemoryBackend;

    /// Two regions that meet at this address, and their size.
    const MIDDLE: u64 = 0x1_0000;
    const SIZE: usize = 0x1_0000;

    proptest! {
        #[test]
        fn places_are_the_bytes_of_the_parts_in_order(
            cuts in prop::collection::vec((0..2 * SIZE as u64 - 600, 1_usize..600), 0..8),
            (skip, len) in (0_usize..3000, 0_usize..3000),
            most in 1_usize..700,
        ) {
            let banks = [(GuestAddress(0), SIZE), (GuestAddress(MIDDLE), SIZE)];
            let memory = GuestMemoryMmap::<()>::from_ranges(&banks).expect("memory");
            let segments: Vec<_> = cuts
                .iter()
                .map(|(address, len)| Segment { address: GuestAddress(*address), len: *len })
                .collect();
            let data = Data::new(&segments, skip, len);
            let mut places = Vec::new();
            let bytes = data.places(&memory, most, &mut places).expect("all of it is memory");
            let host = |address| memory.get_host_address(address).expect("memory") as usize;
            let expected: Vec<usize> = data
                .parts()
                .flat_map(|part| (0..part.len).map(move |at| part.address.unchecked_add(at as u64)))
                .map(host)
                .collect();
            let found: Vec<usize> =
                places.iter().flat_map(|place| place.address..place.address + place.len).collect();
            prop_assert_eq!(bytes, expected.len());
            prop_assert_eq!(found, expected);
            prop_assert!(places.iter().all(|place| (1..=most).contains(&place.len)));
        }
    }

    #[test]
    fn data_outside_memory_have_no_place() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(MIDDLE), SIZE)]);
        let memory = memory.expect("memory");
        for (address, len) in [(0, 1), (MIDDLE - 1, 2), (2 * MIDDLE - 1, 2), (u64::MAX, 1)] {
            let segments = [Segment {
                address: GuestAddress(address),
                len,
            }];
            let data = Data::new(&segments, 0, len);
            assert_eq!(data.places(&memory, 4096, &mut Vec::new()), None);
        }
    }
}
