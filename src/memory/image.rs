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
    /// the memory `is_plain`, small pages that nobody shares.
    ///
    /// # Safety
    /// The bytes are a mapping of this process, and nothing uses them.
    pub(super) unsafe fn put(
        &self,
        base: *mut u8,
        size: usize,
        offset: u64,
        is_plain: bool,
    ) -> Result<()> {
        if is_plain && !self.is_copied {
            let prot = ProtFlags::READ | ProtFlags::WRITE;
            let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
            // SAFETY: the caller's promise.
            unsafe { mmap(base.cast::<c_void>(), size, prot, flags, self.file, offset) }?;
            return Ok(());
        }
        // SAFETY: the caller's promise.
        let memory = unsafe { std::slice::from_raw_parts_mut(base, size) };
        self.read(memory, offset)
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
