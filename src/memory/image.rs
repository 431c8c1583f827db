//! Guest memory as a file: the banks one after another, with holes where the guest has zeros.

use anyhow::{Context, Result, bail, ensure};
use armlet_arch::Range;
use armlet_arch::size::show_size;
use armlet_system::eintr::uninterrupted;
use rustix::fs::{SeekFrom, seek};
use rustix::io::{Errno, pread};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::ffi::c_void;
use std::fs::File;

/// What a guest's memory is to hold from its first access on.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    /// The file.
    pub file: &'a File,
    /// Whether all of it is read at once, rather than mapped so that a page is read at its first use.
    pub is_copied: bool,
}

impl Image<'_> {
    /// Checks that it is of memory in these banks.
    ///
    /// # Errors
    /// A file that is shorter.
    pub(super) fn check(&self, banks: &[Range]) -> Result<()> {
        let memory: u64 = banks.iter().map(|bank| bank.size()).sum();
        let size = self.file.metadata().context("cannot read its size")?.len();
        // Beyond its end there would be no pages, and an access would end armlet.
        ensure!(
            size >= memory,
            "the snapshot's memory has {} in it, and the guest has {}: it was cut off, or is another guest's",
            show_size(size),
            show_size(memory)
        );
        Ok(())
    }

    /// Gives the `size` bytes of guest memory at `base` what stands at `offset`: by a private mapping if
    /// the memory `is_plain`, small pages that nobody shares. Returns whether it is that.
    ///
    /// # Safety
    /// The bytes are a mapping of this process, and nothing uses them.
    pub(super) unsafe fn put(
        &self,
        base: *mut u8,
        size: usize,
        offset: u64,
        is_plain: bool,
    ) -> Result<bool> {
        if is_plain && !self.is_copied {
            let prot = ProtFlags::READ | ProtFlags::WRITE;
            let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
            // SAFETY: the caller's promise.
            unsafe { mmap(base.cast::<c_void>(), size, prot, flags, self.file, offset) }?;
            return Ok(true);
        }
        // SAFETY: the caller's promise.
        let memory = unsafe { std::slice::from_raw_parts_mut(base, size) };
        self.read(memory, offset).map(|()| false)
    }

    /// Reads what stands at `offset` into `memory`, which holds zeros: holes are left out.
    fn read(&self, memory: &mut [u8], offset: u64) -> Result<()> {
        let end = offset + memory.len() as u64;
        let mut at = offset;
        while at < end {
            let data = match seek(self.file, SeekFrom::Data(at)) {
                Ok(data) => data.min(end),
                // No data behind it.
                Err(Errno::NXIO) => return Ok(()),
                // A file system that knows no holes.
                Err(Errno::INVAL) => at,
                Err(error) => return Err(error.into()),
            };
            let hole = match seek(self.file, SeekFrom::Hole(data)) {
                Ok(hole) => hole.min(end),
                Err(_) => end,
            };
            let mut from = data;
            while from < hole {
                let place = &mut memory[(from - offset) as usize..(hole - offset) as usize];
                match uninterrupted(|| pread(self.file, &mut *place, from))? {
                    0 => bail!("it was cut off at byte {from}"),
                    count => from += count as u64,
                }
            }
            at = hole.max(data + 1);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, Sharing, map};
    use armlet_backends::pages::discard;
    use armlet_snapshot::pages::{self, Piece};
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

    #[test]
    fn what_a_restored_guest_gives_back_is_zero_in_its_next_snapshot() {
        const SIZE: u64 = 4 << 20;
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(&vec![1; SIZE as usize], 0).expect("room");
        let image = Image {
            file: &file,
            is_copied: false,
        };
        let bank = Range::new(0x4000_0000, SIZE).expect("a bank");
        let memory = map(&[bank], Sharing::Private, Backing::default(), Some(&image));
        let memory = memory.expect("memory");
        let at = |offset| GuestAddress(bank.start() + offset);
        memory.write_obj(2_u8, at(0)).expect("memory");
        discard(&memory, at(1 << 20), 2 << 20).expect("given back");
        let mut expected = vec![1; SIZE as usize];
        expected[0] = 2;
        expected[1 << 20..3 << 20].fill(0);
        let mut now = vec![0; SIZE as usize];
        memory.read_slice(&mut now, at(0)).expect("memory");
        assert!(now == expected);
        let region = memory.iter().next().expect("a bank");
        let slice = region.as_volatile_slice().expect("memory");
        let pieces = [Piece::new(slice, pages::Backing::Copied(&file, 0))];
        let pagemap = File::open("/proc/self/pagemap").expect("a pagemap");
        let whole = tempfile::tempfile().expect("a file");
        pages::write(&pieces, Some(&pagemap), &whole, &mut |_| Ok(())).expect("written");
        whole.read_exact_at(&mut now, 0).expect("a file");
        assert!(now == expected);
        let diff = tempfile::tempfile().expect("a file");
        let base = pages::Base {
            whole: &file,
            later: Vec::new(),
        };
        let written = pages::write_diff(&pieces, Some(&pagemap), &base, &diff, &mut |_| Ok(()));
        assert_eq!(
            written.expect("written").changed.pages(),
            1 + (2 << 20) / 4096
        );
    }
}
