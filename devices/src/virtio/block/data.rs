//! The data of a request: pieces of guest memory, and where this process has them.

use vm_memory::{Address, GuestMemoryMmap};

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
        let mut bytes = 0;
        for Segment { mut address, len } in self.parts() {
            let mut left = len;
            // A buffer may lie in several regions that meet.
            while let Some((region, offset)) = regions.find(address) {
                let len = left.min(region.size() - offset).min(most);
                places.push(Place {
                    address: region.as_ptr() as usize + offset,
                    len,
                });
                left -= len;
                match address.checked_add(len as u64) {
                    Some(next) if left > 0 => address = next,
                    _ => break,
                }
            }
            if left > 0 {
                return None;
            }
            bytes += len;
        }
        Some(bytes)
    }
}
