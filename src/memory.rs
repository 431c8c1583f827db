//! Guest memory: anonymous memory of this process, aligned so that KVM can map it in huge blocks.

use anyhow::{Context, Result, anyhow};
use armlet_arch::Range;
use armlet_arch::size::show_size;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{VcpuFd, VmFd};
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

/// Gives the VM its memory: one memslot a bank, from slot 0.
///
/// # Errors
/// What KVM says, with the bank.
pub fn give(memory: &GuestMemoryMmap, vm: &VmFd) -> Result<()> {
    for (slot, region) in memory.iter().enumerate() {
        let (guest, size) = (region.start_addr().0, region.len());
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: guest,
            memory_size: size,
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the memory is mapped until the process ends.
        unsafe { vm.set_user_memory_region(slot) }
            .with_context(|| format!("cannot give the VM {size} bytes of memory at {guest:#x}"))?;
    }
    Ok(())
}

/// Guest memory that no vCPU uses: it holds on to the vCPUs, so none can be running.
pub struct IdleMemory<'a> {
    memory: &'a GuestMemoryMmap,
    _vcpus: &'a mut [VcpuFd],
}

impl<'a> IdleMemory<'a> {
    /// The memory of the VM that has these vCPUs and no others.
    #[must_use]
    pub fn new(memory: &'a GuestMemoryMmap, vcpus: &'a mut [VcpuFd]) -> IdleMemory<'a> {
        IdleMemory {
            memory,
            _vcpus: vcpus,
        }
    }

    /// The bytes of a range, to load the guest's software to.
    ///
    /// # Errors
    /// A range that is not in one bank.
    pub fn slice_mut(&mut self, range: Range) -> Result<&mut [u8]> {
        let size = usize::try_from(range.size())?;
        let slice = self
            .memory
            .get_slice(GuestAddress(range.start()), size)
            .with_context(|| format!("{range} is no guest memory"))?;
        // SAFETY: the mapping lives until the process ends; no vCPU runs, and the borrow of
        // `self` keeps others of us away.
        Ok(unsafe { std::slice::from_raw_parts_mut(slice.ptr_guard_mut().as_ptr(), size) })
    }
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
        for (region, bank) in memory.iter().zip([bank, odd]) {
            let (guest, host) = (region.start_addr().0, region.as_ptr() as u64);
            assert_eq!(guest % block as u64, host % block as u64);
            let mut idle = IdleMemory::new(&memory, &mut []);
            let bytes = idle.slice_mut(bank).expect("all of it");
            assert!(bytes.iter().all(|byte| *byte == 0));
            bytes[bank.size() as usize - 1] = 1;
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
        let mut idle = IdleMemory::new(&memory, &mut []);
        assert!(idle.slice_mut(beyond).is_err());
    }
}
