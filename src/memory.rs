//! Guest memory: memory of this process, aligned so that KVM can map it in huge blocks.

use crate::virtio::pmem::PmemImage;
use anyhow::{Context, Result, anyhow, ensure};
use armlet_arch::Range;
use armlet_arch::size::show_size;
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::ffi::c_void;
use std::fs::File;
use std::ptr::null_mut;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

/// Whose memory the guest's is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Of this process alone.
    Private,
    /// Of each process that gets its descriptor: what vhost-user needs.
    Shared,
}

/// Maps the banks. The memory is zero, and taken from the host only where the guest touches it.
///
/// # Errors
/// More memory than this process can map.
pub fn map(banks: &[Range], sharing: Sharing) -> Result<GuestMemoryMmap> {
    let mut regions = Vec::new();
    for bank in banks {
        let region = map_bank(*bank, sharing)
            .with_context(|| format!("cannot map {} of guest memory", show_size(bank.size())))?;
        regions.push(region);
    }
    GuestMemoryMmap::from_regions(regions).context("cannot collect the guest's memory banks")
}

fn map_bank(bank: Range, sharing: Sharing) -> Result<GuestRegionMmap> {
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
    let file = match sharing {
        Sharing::Private => None,
        Sharing::Shared => Some(map_file(base, size)?),
    };
    // SAFETY: the range is the mapping made above. Without huge pages the guest runs, slower.
    let _ = unsafe { rustix::mm::madvise(base.cast::<c_void>(), size, Advice::LinuxHugepage) };
    // SAFETY: as above. Without it a core dump of armlet would hold the guest's memory.
    let _ = unsafe { rustix::mm::madvise(base.cast::<c_void>(), size, Advice::LinuxDontDump) };
    let flags = match sharing {
        Sharing::Private => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        Sharing::Shared => libc::MAP_SHARED,
    };
    let mut builder = MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags | libc::MAP_NORESERVE);
    if let Some(file) = file {
        builder = builder.with_file_offset(FileOffset::new(file, 0));
    }
    // SAFETY: `base` is a mapping of `size` bytes that lives until the process ends.
    let region = unsafe { builder.with_raw_mmap_pointer(base) }.build()?;
    GuestRegionMmap::new(region, GuestAddress(bank.start()))
        .ok_or_else(|| anyhow!("it ends past 2^64"))
}

/// Puts memory that has a descriptor in the place of the `size` bytes at `base`, which are a mapping
/// of ours that nobody uses.
fn map_file(base: *mut u8, size: usize) -> Result<File> {
    let file = rustix::fs::memfd_create("guest memory", MemfdFlags::CLOEXEC)
        .context("cannot make memory that other processes can share")?;
    rustix::fs::ftruncate(&file, size as u64)?;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: it replaces a mapping that the caller has just made.
    unsafe { rustix::mm::mmap(base.cast::<c_void>(), size, prot, flags, &file, 0) }?;
    Ok(File::from(file))
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

/// The first memslot of persistent memory, behind those of RAM and registers.
const PMEM_SLOT: u32 = 1100;

/// Gives the VM persistent memory in its place.
///
/// # Errors
/// What KVM says, or an image that is not as large as planned.
pub fn give_pmem(image: &PmemImage, place: Range, index: usize, vm: &VmFd) -> Result<()> {
    let (start, size) = (place.start(), image.size());
    ensure!(
        size == place.size(),
        "persistent memory {index} has {size} bytes, and had {} when it was planned",
        place.size()
    );
    image.place(start);
    let slot = kvm_userspace_memory_region {
        slot: PMEM_SLOT + index as u32,
        flags: if image.is_readonly() {
            KVM_MEM_READONLY
        } else {
            0
        },
        guest_phys_addr: start,
        memory_size: size,
        userspace_addr: image.address() as u64,
    };
    // SAFETY: the image is mapped until the process ends.
    unsafe { vm.set_user_memory_region(slot) }
        .with_context(|| format!("cannot give the VM persistent memory {index} at {place}"))
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
    use vm_memory::Bytes;

    #[test]
    fn memory_is_aligned_with_the_guests_addresses() {
        let bank = Range::new(0x4000_0000, 6 << 20).expect("a bank");
        let odd = Range::new(0x8000_0000 + 0x1_0000, 1 << 20).expect("a bank");
        let memory = map(&[bank, odd], Sharing::Private).expect("7 MiB");
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
    fn shared_memory_has_a_descriptor_by_which_another_process_sees_it() {
        let bank = Range::new(0x4000_0000, 4 << 20).expect("a bank");
        let memory = map(&[bank], Sharing::Shared).expect("4 MiB");
        let at = GuestAddress(bank.last());
        memory.write_slice(b"x", at).expect("memory");
        let region = memory.iter().next().expect("a bank");
        let file = region.file_offset().expect("a file");
        let mut byte = [0];
        rustix::io::pread(file.file(), &mut byte, bank.size() - 1).expect("a byte");
        assert_eq!(&byte, b"x");
        let block = rustix::param::page_size() / 8 * rustix::param::page_size();
        assert_eq!(region.as_ptr() as usize % block, 0x4000_0000 % block);
    }

    #[test]
    fn more_than_the_address_space_is_an_error() {
        let bank = Range::new(0, 1 << 60).expect("a range");
        let error = map(&[bank], Sharing::Private).expect_err("an exbibyte");
        assert!(format!("{error:#}").contains("guest memory"), "{error:#}");
    }

    #[test]
    fn a_range_across_banks_is_no_slice() {
        let bank = Range::new(0x4000_0000, 1 << 20).expect("a bank");
        let memory = map(&[bank], Sharing::Private).expect("1 MiB");
        let beyond = Range::new(0x4000_0000, 2 << 20).expect("a range");
        let mut idle = IdleMemory::new(&memory, &mut []);
        assert!(idle.slice_mut(beyond).is_err());
    }
}
