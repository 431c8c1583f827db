//! Guest memory: anonymous memory of this process, aligned so that KVM can map it in huge blocks.

use anyhow::{Context, Result, anyhow};
use armlet_arch::Range;
use armlet_arch::size::show_size;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::ffi::c_void;
use std::ptr::null_mut;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

/// Maps the banks. The memory is private and zero, and taken from the host only where the guest
/// touches it.
///
/// # Errors
/// More memory than this process can map.
pub fn map(banks: &[Range]) -> Result<GuestMemoryMmap> {
    let mut regions = Vec::new();
    for bank in banks {
        let region = map_bank(*bank)
            .with_context(|| format!("cannot map {} of guest memory", show_size(bank.size())))?;
        regions.push(region);
    }
    GuestMemoryMmap::from_regions(regions).context("cannot collect the guest's memory banks")
}

fn map_bank(bank: Range) -> Result<GuestRegionMmap> {
    let size = usize::try_from(bank.size())?;
    // A huge block needs guest-physical and host-virtual address to agree modulo its size
    // (arch/arm64/kvm/mmu.c: fault_supports_stage2_huge_mapping); anonymous memory comes in blocks
    // of one page-table page: 2 MiB on 4 KiB pages, 32 MiB on 16 KiB, 512 MiB on 64 KiB.
    let page = rustix::param::page_size();
    let block = page / 8 * page;
    let reserved = size
        .checked_add(block)
        .ok_or_else(|| anyhow!("it does not fit the address space"))?;
    // SAFETY: a new anonymous mapping at an address that the kernel chooses.
    let start = unsafe {
        rustix::mm::mmap_anonymous(
            null_mut(),
            reserved,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }? as usize;
    let wanted = bank.start() as usize % block;
    let lead = (wanted + block - start % block) % block;
    let base = (start + lead) as *mut u8;
    // SAFETY: both ranges lie in the mapping made above, outside the `size` bytes from `base`.
    unsafe {
        unmap(start, lead)?;
        unmap(start + lead + size, block - lead)?;
    }
    // SAFETY: the range is the mapping made above. Without huge pages the guest runs, slower.
    let _ = unsafe { rustix::mm::madvise(base.cast::<c_void>(), size, Advice::LinuxHugepage) };
    // SAFETY: as above. Without it a core dump of armlet would hold the guest's memory.
    let _ = unsafe { rustix::mm::madvise(base.cast::<c_void>(), size, Advice::LinuxDontDump) };
    let builder = MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: `base` is a mapping of `size` bytes that lives until the process ends.
    let region = unsafe { builder.with_raw_mmap_pointer(base) }.build()?;
    GuestRegionMmap::new(region, GuestAddress(bank.start()))
        .ok_or_else(|| anyhow!("it ends past 2^64"))
}

/// # Safety
/// Nothing may use the range any more.
unsafe fn unmap(start: usize, size: usize) -> Result<()> {
    if size > 0 {
        // SAFETY: the caller's promise.
        unsafe { rustix::mm::munmap(start as *mut c_void, size) }?;
    }
    Ok(())
}

/// The bytes of a range of guest memory, to load the guest's software to.
///
/// # Errors
/// A range that is not in one bank.
///
/// # Safety
/// No vCPU may run, and no other slice of the range exist, while the slice lives.
#[expect(
    clippy::mut_from_ref,
    reason = "it is mapped memory; that nobody else uses it is the caller's promise"
)]
pub unsafe fn slice_mut(memory: &GuestMemoryMmap, range: Range) -> Result<&mut [u8]> {
    let size = usize::try_from(range.size())?;
    let slice = memory
        .get_slice(GuestAddress(range.start()), size)
        .with_context(|| format!("{range} is no guest memory"))?;
    // SAFETY: the mapping lives until the process ends, and the caller promises that nothing
    // else uses the range.
    Ok(unsafe { std::slice::from_raw_parts_mut(slice.ptr_guard_mut().as_ptr(), size) })
}

/// The banks as KVM's memslots want them: guest-physical address, size, host-virtual address.
pub fn slots(memory: &GuestMemoryMmap) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
    memory
        .iter()
        .map(|region| (region.start_addr().0, region.len(), region.as_ptr() as u64))
}

/// Says so if the guest may take more memory than the host has.
pub fn warn_if_scarce(asked: u64) {
    let system = rustix::system::sysinfo();
    let has = (system.totalram as u64).saturating_mul(u64::from(system.mem_unit));
    if asked > has {
        log::warn!(
            "the guest has {} of memory, this host {} MiB: it will swap, or be killed when the guest uses it all",
            show_size(asked),
            has >> 20
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_with_the_guests_addresses() {
        let bank = Range::new(0x4000_0000, 6 << 20).expect("a bank");
        let odd = Range::new(0x8000_0000 + 0x1_0000, 1 << 20).expect("a bank");
        let memory = map(&[bank, odd]).expect("7 MiB");
        let block = rustix::param::page_size() / 8 * rustix::param::page_size();
        for (guest, size, host) in slots(&memory) {
            assert_eq!(guest % block as u64, host % block as u64);
            let range = Range::new(guest, size).expect("a bank");
            // SAFETY: nothing else knows of this memory.
            let bytes = unsafe { slice_mut(&memory, range) }.expect("all of it");
            assert!(bytes.iter().all(|byte| *byte == 0));
            bytes[size as usize - 1] = 1;
        }
    }

    #[test]
    fn more_than_the_address_space_is_an_error() {
        let bank = Range::new(0, 1 << 60).expect("a range");
        let error = map(&[bank]).expect_err("an exbibyte");
        assert!(format!("{error:#}").contains("guest memory"), "{error:#}");
    }

    #[test]
    fn a_range_across_banks_is_no_slice() {
        let bank = Range::new(0x4000_0000, 1 << 20).expect("a bank");
        let memory = map(&[bank]).expect("1 MiB");
        let beyond = Range::new(0x4000_0000, 2 << 20).expect("a range");
        // SAFETY: no slice comes of it.
        assert!(unsafe { slice_mut(&memory, beyond) }.is_err());
    }
}
