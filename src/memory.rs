//! Guest memory: memory of this process, aligned so that KVM can map it in huge blocks.

mod image;
mod pool;

use anyhow::{Context, Result, anyhow, bail, ensure};
use armlet_arch::Range;
use armlet_arch::backing::HugePages;
use armlet_arch::size::show_size;
use armlet_backends::pmem::PmemImage;
use armlet_system::huge::huge_page;
use armlet_system::page_size::page_size;
pub use image::Image;
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::ffi::c_void;
use std::fs::File;
use std::ptr::null_mut;
use std::sync::Arc;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

/// Who can access guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Only this process.
    Private,
    /// Each process that gets its descriptor, as vhost-user needs.
    Shared,
}

/// How guest memory is backed, and when it is allocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backing {
    /// The host's pages.
    pub pages: HugePages,
    /// Allocate all of it before the guest starts rather than on first touch.
    pub prefault: bool,
    /// Let the host's kernel merge pages of the same content (KSM).
    pub mergeable: bool,
    /// Lock it in memory. This allocates all of it before the guest starts, too.
    pub locked: bool,
}

impl Backing {
    /// Checks for options that exclude each other.
    ///
    /// # Errors
    /// What does not go together, as a sentence.
    pub fn check(&self, sharing: Sharing) -> Result<()> {
        if !self.mergeable {
            return Ok(());
        }
        // mm/ksm.c: vma_ksm_compatible.
        if sharing == Sharing::Shared {
            bail!(
                "--mergeable: a device shares guest memory with another process, and only memory of one process can be merged; leave one of them out"
            );
        }
        if let HugePages::Of(size) = self.pages {
            let size = show_size(size);
            bail!("--mergeable: pages of {size} are never merged; use --hugepages thp or none");
        }
        Ok(())
    }
}

/// Maps the banks. The memory is zeroed, or what `image` holds, and allocated on first touch unless
/// `backing` says otherwise.
///
/// # Errors
/// When this process cannot map or lock that much memory, the host lacks the pages, or the image is
/// of other memory.
pub fn map(
    banks: &[Range],
    sharing: Sharing,
    backing: Backing,
    image: Option<&Image<'_>>,
) -> Result<GuestMemoryMmap> {
    backing.check(sharing)?;
    if let Some(image) = image {
        image.check(banks)?;
    }
    let mut offset = 0;
    let mut regions = Vec::new();
    for (index, bank) in banks.iter().enumerate() {
        // A shortage is reported for everything that is still to be mapped.
        let wanted = banks[index..].iter().map(|bank| bank.size()).sum();
        let content = image.map(|image| (image, offset));
        let region = map_bank(*bank, sharing, backing, wanted, content)
            .with_context(|| format!("cannot map {} of guest memory", show_size(bank.size())))?;
        regions.push(region);
        offset += bank.size();
    }
    GuestMemoryMmap::from_regions(regions).context("cannot collect the guest's memory banks")
}

fn map_bank(
    bank: Range,
    sharing: Sharing,
    backing: Backing,
    wanted: u64,
    content: Option<(&Image<'_>, u64)>,
) -> Result<GuestRegionMmap> {
    let size = usize::try_from(bank.size())?;
    let base = reserve(bank, size, backing.pages)?;
    let file = put_pages(base, bank, wanted, sharing, backing.pages)?;
    let mut is_mapped = false;
    if let Some((image, offset)) = content {
        let is_plain = file.is_none() && !matches!(backing.pages, HugePages::Of(_));
        // SAFETY: the range is the mapping made above, which nothing uses yet.
        is_mapped = unsafe { image.put(base, size, offset, is_plain) }
            .context("cannot take guest memory from the snapshot")?;
    }
    let advise = |advice| {
        // SAFETY: the range is the mapping made above, and none of these changes what is in it.
        unsafe { rustix::mm::madvise(base.cast::<c_void>(), size, advice) }
    };
    // Without huge pages, or on a kernel that does not support them, the guest runs, but slower.
    let _ = match backing.pages {
        HugePages::Transparent => advise(Advice::LinuxHugepage),
        HugePages::None => advise(Advice::LinuxNoHugepage),
        HugePages::Of(_) => Ok(()),
    };
    // Otherwise a core dump of armlet would contain guest memory.
    let _ = advise(Advice::LinuxDontDump);
    if backing.mergeable {
        advise(Advice::LinuxMergeable)
            .context("--mergeable: this kernel does not merge pages (CONFIG_KSM)")?;
    }
    if backing.prefault {
        advise(Advice::LinuxPopulateWrite).with_context(|| {
            format!(
                "--prefault: cannot take {} from the host (it needs Linux 5.14 and that much free memory)",
                show_size(bank.size())
            )
        })?;
    }
    if backing.locked {
        // SAFETY: the range is the mapping made above.
        unsafe { rustix::mm::mlock(base.cast::<c_void>(), size) }
            .with_context(|| format!("--mlock: {}", why_unlocked(wanted)))?;
    }
    let flags = match sharing {
        Sharing::Private if is_mapped => libc::MAP_PRIVATE,
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

/// Returns why `bytes` more could not be locked, and what would help.
fn why_unlocked(bytes: u64) -> String {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock);
    // CAP_IPC_LOCK, which root has, is not limited (mlock(2)).
    let is_limited = !rustix::process::geteuid().is_root();
    advice_on_lock(bytes, is_limited.then_some((limit.current, limit.maximum)))
}

/// Like [`why_unlocked`], for a process with these soft and hard limits in bytes, if any.
fn advice_on_lock(bytes: u64, limit: Option<(Option<u64>, Option<u64>)>) -> String {
    let size = show_size(bytes);
    match limit {
        Some((Some(soft), hard)) if soft < bytes => {
            let advice = match hard.map(|hard| hard >> 10) {
                None => "'ulimit -l unlimited' raises it".to_owned(),
                Some(hard) if bytes >> 10 < hard => format!("'ulimit -l {hard}' raises it"),
                Some(_) => "as root, 'prlimit --memlock=unlimited --pid PID' raises it for the shell with that PID ('echo $$'), and LimitMEMLOCK=infinity for a service".to_owned(),
            };
            format!(
                "cannot lock {size}, the limit is {} KiB; {advice}",
                soft >> 10
            )
        }
        _ => format!("cannot lock {size}, this host has no such room; use less --memory"),
    }
}

/// Reserves a mapping of `size` bytes at an address that suits huge pages.
fn reserve(bank: Range, size: usize, pages: HugePages) -> Result<*mut u8> {
    // A huge block needs guest-physical and host-virtual address to agree modulo its size
    // (arch/arm64/kvm/mmu.c: fault_supports_stage2_huge_mapping).
    let block = match pages {
        HugePages::Of(huge) => usize::try_from(huge)?,
        _ => huge_page(page_size()),
    };
    let wanted = bank.start() as usize % block;
    let lead = |start: usize| (wanted + block - start % block) % block;
    let start = map_anywhere(size)?;
    // Since 6.7, Linux aligns mappings of whole huge pages (mm/mmap.c: __get_unmapped_area).
    if lead(start) == 0 {
        return Ok(start as *mut u8);
    }
    // SAFETY: it was mapped just now, and nothing refers to it.
    unsafe { unmap(start, size) }?;
    let reserved = size
        .checked_add(block)
        .ok_or_else(|| anyhow!("it does not fit the address space"))?;
    let start = map_anywhere(reserved)?;
    let lead = lead(start);
    let base = start + lead;
    // SAFETY: both ranges lie in the mapping made above, outside the `size` bytes from `base`.
    unsafe {
        unmap(start, lead)?;
        unmap(base + size, block - lead)?;
    }
    Ok(base as *mut u8)
}

/// Maps `size` bytes anywhere, and returns their address.
fn map_anywhere(size: usize) -> Result<usize> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new anonymous mapping at an address that the kernel chooses.
    let start = unsafe {
        rustix::mm::mmap_anonymous(null_mut(), size, ProtFlags::READ | ProtFlags::WRITE, flags)
    }?;
    Ok(start as usize)
}

/// Replaces the reserved mapping of a bank at `base` with the requested kind of memory. Returns the
/// descriptor by which other processes can share it, if any. `wanted` is what this bank and those
/// after it need of a pool of huge pages, in bytes.
fn put_pages(
    base: *mut u8,
    bank: Range,
    wanted: u64,
    sharing: Sharing,
    pages: HugePages,
) -> Result<Option<File>> {
    let size = usize::try_from(bank.size())?;
    let huge = match pages {
        HugePages::Of(huge) => huge,
        _ => 0,
    };
    // The flags encode a size as its logarithm in bits 31:26
    // (include/uapi/asm-generic/hugetlb_encode.h).
    let encoded = huge.checked_ilog2().unwrap_or(0) << 26;
    if huge > 0 && !(bank.start() | bank.size()).is_multiple_of(huge) {
        bail!(
            "--hugepages {}: the bank at {:#x} with {} is no whole number of such pages; change --memory",
            show_size(huge),
            bank.start(),
            show_size(bank.size())
        );
    }
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let no_pages = |error: Errno| {
        let why = pool::shortage(huge, wanted);
        anyhow!("--hugepages {}: {why} ({error})", show_size(huge))
    };
    match sharing {
        Sharing::Private if huge == 0 => Ok(None),
        Sharing::Private => {
            let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::HUGETLB;
            let flags = flags | MapFlags::from_bits_retain(encoded as _);
            // SAFETY: it replaces a mapping of ours that nothing uses.
            unsafe { rustix::mm::mmap_anonymous(base.cast::<c_void>(), size, prot, flags) }
                .map_err(no_pages)?;
            Ok(None)
        }
        Sharing::Shared => {
            let mut kind = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let mut flags = MapFlags::SHARED | MapFlags::FIXED;
            if huge > 0 {
                kind |= MemfdFlags::HUGETLB | MemfdFlags::from_bits_retain(encoded);
            } else {
                flags |= MapFlags::NORESERVE;
            }
            let file = match rustix::fs::memfd_create("guest memory", kind) {
                Err(error) if huge > 0 => return Err(no_pages(error)),
                file => file.context("cannot make memory that other processes can share")?,
            };
            rustix::fs::ftruncate(&file, size as u64)?;
            // Without the seals, a process that has the descriptor could truncate the memory
            // beneath the guest, and each access to the missing part would kill armlet by SIGBUS.
            // Holes can still be punched.
            let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
            rustix::fs::fcntl_add_seals(&file, seals)
                .context("cannot fix the size of memory that other processes share")?;
            // SAFETY: it replaces a mapping of ours that nothing uses.
            unsafe { rustix::mm::mmap(base.cast::<c_void>(), size, prot, flags, &file, 0) }
                .map_err(|error| match huge {
                    0 => error.into(),
                    _ => no_pages(error),
                })?;
            Ok(Some(File::from(file)))
        }
    }
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

/// Gives the VM its memory: one memslot for each bank, from slot 0.
///
/// # Errors
/// KVM's error, with the bank.
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

/// Returns guest memory as devices see it: RAM, and persistent memory, because a guest may read a
/// disk into a file that it has mapped from there.
///
/// # Errors
/// When an image is not as large as planned, or overlaps other memory.
pub fn with_pmem<'a>(
    ram: &GuestMemoryMmap,
    images: impl IntoIterator<Item = (&'a PmemImage, Range)>,
) -> Result<GuestMemoryMmap> {
    let mut memory = ram.clone();
    for (image, place) in images {
        let region = image.region(GuestAddress(place.start()))?;
        memory = memory
            .insert_region(Arc::new(region))
            .with_context(|| format!("cannot show devices the persistent memory at {place}"))?;
    }
    Ok(memory)
}

/// The first memslot of persistent memory, after those of RAM and registers.
const PMEM_SLOT: u32 = 1100;

/// Gives the VM persistent memory at its planned place.
///
/// # Errors
/// KVM's error, or an image that is not as large as planned.
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

/// Guest memory that nothing else accesses: it borrows the vCPUs exclusively, so none can be
/// running, and its creator vouches for everything else.
pub struct IdleMemory<'a> {
    memory: &'a GuestMemoryMmap,
    _vcpus: &'a mut [VcpuFd],
}

impl<'a> IdleMemory<'a> {
    /// Creates the view of the memory of the VM that has exactly these vCPUs.
    ///
    /// # Safety
    /// For as long as it lives, nobody reads or writes this memory in another way: no device is at
    /// work, in this process, in the kernel (vhost) or in another process that shares it, and no
    /// vCPU of another VM.
    #[must_use]
    pub unsafe fn new(memory: &'a GuestMemoryMmap, vcpus: &'a mut [VcpuFd]) -> IdleMemory<'a> {
        IdleMemory {
            memory,
            _vcpus: vcpus,
        }
    }

    /// Returns the bytes of a range, to load the guest's software into.
    ///
    /// # Errors
    /// When the range does not lie within one bank.
    pub fn slice_mut(&mut self, range: Range) -> Result<&mut [u8]> {
        let size = usize::try_from(range.size())?;
        let slice = self
            .memory
            .get_slice(GuestAddress(range.start()), size)
            .with_context(|| format!("{range} is no guest memory"))?;
        // SAFETY: the mapping lives until the process ends; no vCPU runs, nobody else uses it, as
        // `new` was promised, and the borrow of `self` keeps a second slice away.
        Ok(unsafe { std::slice::from_raw_parts_mut(slice.ptr_guard_mut().as_ptr(), size) })
    }
}

/// Warns if the guest may use more memory than the host has.
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
mod tests;
