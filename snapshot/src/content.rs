//! Where the content of a guest's memory is, as far as the kernel tells without touching any of it.

use crate::PAGE;
use anyhow::{Context, Result, bail};
use armlet_system::eintr::uninterrupted;
use armlet_system::page_size::page_size;
use rustix::fs::{SeekFrom, fstat, seek};
use rustix::io::Errno;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap, VolatileSlice};

/// An entry of /proc/self/pagemap: the page is in memory, in swap, or that of a file
/// (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;
/// Entries that are read at once.
const ENTRIES: usize = 4096;
/// The flag of mmap(2) of a mapping whose changes others see.
const MAP_SHARED: i32 = 1;

/// What stands behind a piece of memory.
#[derive(Clone, Copy, Debug)]
pub enum Backing<'a> {
    /// Pages of this process alone; those that were never written are zero.
    Private,
    /// This file, from this offset, as whoever maps it sees it.
    Shared(&'a File, u64),
    /// Pages of this process alone; those that were never used another process gives
    /// ([`crate::faults`]).
    Handled,
    /// This file, from this offset, and pages of this process alone in place of those that were written
    /// (MAP_PRIVATE).
    Copied(&'a File, u64),
}

/// A piece of a guest's memory: a bank, or a part of one, of one kind.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    slice: VolatileSlice<'a>,
    backing: Backing<'a>,
}

impl<'a> Piece<'a> {
    /// Describes a piece.
    #[must_use]
    pub fn new(slice: VolatileSlice<'a>, backing: Backing<'a>) -> Piece<'a> {
        Piece { slice, backing }
    }

    /// Describes a whole region, by the flags and the file that it was mapped with.
    ///
    /// # Errors
    /// None in practice: a region that has no bytes.
    pub fn of(region: &'a GuestRegionMmap) -> Result<Piece<'a>> {
        let slice = region
            .as_volatile_slice()
            .context("memory of the guest is not mapped")?;
        let is_shared = region.flags() & MAP_SHARED != 0;
        let backing = match region.file_offset() {
            Some(file) if is_shared => Backing::Shared(file.file(), file.start()),
            Some(file) => Backing::Copied(file.file(), file.start()),
            None => Backing::Private,
        };
        Ok(Piece::new(slice, backing))
    }

    /// Returns its size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.slice.len() as u64
    }

    /// Copies what the mapping has at `offset`.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let part = self.slice.subslice(offset as usize, into.len());
        let copied = part
            .context("memory of the guest ends early")?
            .copy_to(into);
        debug_assert_eq!(copied, into.len());
        Ok(())
    }

    /// Returns the file and the offset in it of what was not written.
    pub(crate) fn file(&self) -> Option<(&'a File, u64)> {
        match self.backing {
            Backing::Copied(file, offset) => Some((file, offset)),
            Backing::Private | Backing::Handled | Backing::Shared(..) => None,
        }
    }

    /// Calls `each` for what the piece consists of, in order and without gaps.
    pub(crate) fn each_part(
        &self,
        pagemap: Option<&File>,
        mut each: impl FnMut(Range<u64>, Content) -> Result<()>,
    ) -> Result<()> {
        let all = 0..self.size();
        match (self.backing, pagemap) {
            (Backing::Shared(file, offset), _) => {
                each_extent(file, offset, all, |range, is_data| {
                    each(
                        range,
                        if is_data {
                            Content::Mapped
                        } else {
                            Content::Zero
                        },
                    )
                })
            }
            (Backing::Handled, _) | (_, None) => each(all, Content::Mapped),
            (Backing::Private, Some(pagemap)) => self.each_entry(pagemap, |range, entry| {
                let is_there = entry & (PRESENT | SWAPPED) != 0;
                each(
                    range,
                    if is_there {
                        Content::Mapped
                    } else {
                        Content::Zero
                    },
                )
            }),
            (Backing::Copied(file, offset), Some(pagemap)) => {
                self.each_entry(pagemap, |range, entry| {
                    let is_there = entry & (PRESENT | SWAPPED) != 0;
                    if is_there && entry & OF_FILE == 0 {
                        return each(range, Content::Mapped);
                    }
                    each_extent(file, offset, range, |range, is_data| {
                        each(
                            range,
                            if is_data {
                                Content::OfFile
                            } else {
                                Content::Zero
                            },
                        )
                    })
                })
            }
        }
    }

    /// Calls `each` for the parts of which there are pages: whether they are pages of this process alone,
    /// in place of those of a file.
    pub(crate) fn each_touched(
        &self,
        pagemap: &File,
        mut each: impl FnMut(Range<u64>, bool) -> Result<()>,
    ) -> Result<()> {
        self.each_entry(pagemap, |range, entry| match entry & (PRESENT | SWAPPED) {
            0 => Ok(()),
            _ => each(range, entry & OF_FILE == 0),
        })
    }

    /// Returns where the piece is mapped.
    pub(crate) fn address(&self) -> usize {
        self.slice.ptr_guard().as_ptr() as usize
    }

    /// Calls `each` for runs of pages whose entries in the pagemap have the same flags.
    fn each_entry(
        &self,
        pagemap: &File,
        mut each: impl FnMut(Range<u64>, u64) -> Result<()>,
    ) -> Result<()> {
        let page = page_size() as u64;
        let first = self.address() as u64 / page;
        let count = self.size().div_ceil(page);
        let mut bytes = vec![0; ENTRIES * 8];
        // The run that goes on, and its flags.
        let (mut run, mut flags) = (0..0_u64, None);
        for at in (0..count).step_by(ENTRIES) {
            let some = (count - at).min(ENTRIES as u64) as usize;
            let bytes = &mut bytes[..some * 8];
            pagemap
                .read_exact_at(bytes, (first + at) * 8)
                .context("cannot read which pages of the guest's memory are there")?;
            for (index, entry) in bytes.chunks_exact(8).enumerate() {
                let entry = u64::from_ne_bytes(entry.try_into().expect("eight bytes"));
                let these = Some(entry & (PRESENT | SWAPPED | OF_FILE));
                let start = (at + index as u64) * page;
                if flags != these {
                    if let Some(flags) = flags {
                        each(run.start..start, flags)?;
                    }
                    (run.start, flags) = (start, these);
                }
                run.end = (start + page).min(self.size());
            }
        }
        match flags {
            Some(flags) => each(run, flags),
            None => Ok(()),
        }
    }
}

/// Where the content of a part of memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// It is zero.
    Zero,
    /// In the mapping.
    Mapped,
    /// In the file behind the mapping; no page of it need be mapped.
    OfFile,
}

/// Calls `each` for the parts of `range` of a file, counted from `offset` in it: with data, and holes.
/// Filesystems that have no holes have data only. Ends are rounded so that whole pages are data.
pub(crate) fn each_extent(
    file: &File,
    offset: u64,
    range: Range<u64>,
    mut each: impl FnMut(Range<u64>, bool) -> Result<()>,
) -> Result<()> {
    let (mut at, end) = (range.start, range.end);
    while at < end {
        let data = match next(file, SeekFrom::Data(offset + at)) {
            Ok(data) => (data - offset) / PAGE * PAGE,
            // Nothing but a hole follows, or the file ends.
            Err(Errno::NXIO) => {
                check_size(file, offset + end)?;
                end
            }
            // There are no holes.
            Err(Errno::INVAL) => at,
            Err(error) => return Err(error).context("cannot find the data in a memory file"),
        };
        let data = data.clamp(at, end);
        if data > at {
            each(at..data, false)?;
        }
        if data == end {
            break;
        }
        let hole = match next(file, SeekFrom::Hole(offset + data)) {
            Ok(hole) => hole - offset,
            Err(Errno::INVAL) => end,
            Err(error) => return Err(error).context("cannot find the data in a memory file"),
        };
        at = hole.next_multiple_of(PAGE).clamp(data + 1, end);
        each(data..at, true)?;
    }
    Ok(())
}

/// Refuses a file that ends before `wanted` bytes: what is missing is no hole.
fn check_size(file: &File, wanted: u64) -> Result<()> {
    let size = uninterrupted(|| fstat(file))?.st_size.unsigned_abs();
    match size < wanted {
        true => bail!(
            "a memory file was truncated to {size} bytes while it was in use, of at least {wanted}; its content is lost"
        ),
        false => Ok(()),
    }
}

fn next(file: &File, from: SeekFrom) -> Result<u64, Errno> {
    uninterrupted(|| seek(file, from))
}
