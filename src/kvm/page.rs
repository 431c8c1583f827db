//! Memory that the guest reads in place of device registers, without an exit.
//!
//! It is a read-only memslot (KVM_MEM_READONLY, Documentation/virt/kvm/api.rst,
//! KVM_SET_USER_MEMORY_REGION): reads find memory, a write is an MMIO exit, or what an ioeventfd
//! takes. The guest maps it as device memory, so on a CPU without FEAT_S2FWB its reads pass by the
//! caches. KVM cleans them when it maps the page (arch/arm64/kvm/hyp/pgtable.c:
//! stage2_map_walker_try_leaf); what changes later is cleaned here.

use anyhow::{Context, Result, ensure};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use rustix::mm::{MapFlags, ProtFlags};
use std::os::fd::BorrowedFd;
use std::ptr::{NonNull, null_mut};

/// Memory of this process, until it is dropped.
pub(super) struct Mapping {
    pub(super) start: NonNull<u8>,
    /// Bytes; a multiple of the host's page.
    pub(super) size: usize,
}

// SAFETY: a mapping is memory of the process and not bound to a thread.
unsafe impl Send for Mapping {}
// SAFETY: whoever shares it writes whole words only.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// One page of a file, at `offset` bytes, shared with whoever else maps it.
    pub(super) fn of_file(file: BorrowedFd<'_>, offset: u64) -> Result<Mapping> {
        let size = rustix::param::page_size();
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start =
            unsafe { rustix::mm::mmap(null_mut(), size, prot, MapFlags::SHARED, file, offset) }?;
        Mapping::at(start.cast(), size)
    }

    /// `size` bytes, zero; rounded up to pages.
    pub(super) fn anonymous(size: usize) -> Result<Mapping> {
        let size = size.next_multiple_of(rustix::param::page_size());
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start =
            unsafe { rustix::mm::mmap_anonymous(null_mut(), size, prot, MapFlags::PRIVATE) }?;
        Mapping::at(start.cast(), size)
    }

    fn at(start: *mut u8, size: usize) -> Result<Mapping> {
        let start = NonNull::new(start).context("the kernel mapped it at 0")?;
        Ok(Mapping { start, size })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing borrows from it any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.size) };
    }
}

/// Registers in memory.
pub struct ReadOnlyPages {
    memslot: u32,
    /// The window's guest-physical address.
    address: u64,
    memory: Mapping,
}

impl ReadOnlyPages {
    /// Allocates memory for the registers of `size` bytes from `address`, all zero, not yet shown. It
    /// takes whole pages of the host, in which no other device may lie.
    ///
    /// # Errors
    /// A window that does not begin at a page of the host.
    pub fn new(memslot: u32, address: u64, size: usize) -> Result<ReadOnlyPages> {
        let page = rustix::param::page_size();
        ensure!(
            address.is_multiple_of(page as u64),
            "the window at {address:#x} is not aligned to pages of {page} bytes"
        );
        let memory = Mapping::anonymous(size).context("cannot map a page")?;
        Ok(ReadOnlyPages {
            memslot,
            address,
            memory,
        })
    }

    /// Returns the window's guest-physical address.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Changes the word at `offset` bytes, a multiple of 4.
    pub fn store(&self, offset: usize, value: u32) {
        if offset.is_multiple_of(4) && offset + 4 <= self.memory.size {
            // SAFETY: the word lies in the mapping, which is aligned. The guest may read it at the
            // same time, so it is written as a whole.
            unsafe {
                let word: *mut u32 = self.memory.start.as_ptr().add(offset).cast();
                word.write_volatile(value.to_le());
                super::clean_to_memory(word.cast());
            }
        }
    }

    /// Changes the two words at `offset` bytes, a multiple of 8, at once.
    pub fn store_two(&self, offset: usize, value: u64) {
        if offset.is_multiple_of(8) && offset + 8 <= self.memory.size {
            // SAFETY: as in `store`; both architectures write an aligned 64-bit word as a whole.
            unsafe {
                let words: *mut u64 = self.memory.start.as_ptr().add(offset).cast();
                words.write_volatile(value.to_le());
                super::clean_to_memory(words.cast());
            }
        }
    }

    /// Makes the guest read the memory in place of registers.
    ///
    /// # Errors
    /// A KVM without read-only memslots, or without room for one more.
    pub fn show(&self, vm: &VmFd) -> Result<()> {
        self.give(vm, self.memory.size as u64)
            .context("cannot show the guest a page of registers")
    }

    /// Hides the memory again: the guest's reads are exits.
    pub fn hide(&self, vm: &VmFd) {
        // It does not fail for what `show` has made.
        let _ = self.give(vm, 0);
    }

    /// Makes the first `size` bytes a memslot; none removes it.
    fn give(&self, vm: &VmFd, size: u64) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot: self.memslot,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: self.address,
            memory_size: size,
            userspace_addr: self.memory.start.as_ptr() as u64,
        };
        // SAFETY: the memory stays mapped as long as this value, and a VM that outlives it loses
        // it by the kernel's MMU notifier.
        Ok(unsafe { vm.set_user_memory_region(region) }?)
    }
}
