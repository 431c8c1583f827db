//! Memory that the guest reads in place of device registers, without an exit.
//!
//! It is a read-only memslot (KVM_MEM_READONLY, Documentation/virt/kvm/api.rst,
//! KVM_SET_USER_MEMORY_REGION): reads access memory, and a write is an MMIO exit or signals an
//! ioeventfd. The guest maps it as device memory, so on a CPU without FEAT_S2FWB its reads bypass
//! the caches. KVM cleans them when it maps the page (arch/arm64/kvm/hyp/pgtable.c:
//! stage2_map_walker_try_leaf); later changes are cleaned here.

use anyhow::{Context, Result, ensure};
use armlet_system::page_size::page_size;
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use rustix::mm::{MapFlags, ProtFlags};
use std::os::fd::BorrowedFd;
use std::ptr::{NonNull, null_mut};

/// A memory mapping, unmapped when dropped.
pub(super) struct Mapping {
    pub(super) start: NonNull<u8>,
    /// Its size in bytes, a multiple of the host's page size.
    pub(super) size: usize,
}

// SAFETY: a mapping belongs to the process and not to a thread.
unsafe impl Send for Mapping {}
// SAFETY: it is only written by whole words.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps one page of a file, at `offset` bytes, shared with other mappings.
    pub(super) fn of_file(file: BorrowedFd<'_>, offset: u64) -> Result<Mapping> {
        let size = page_size();
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start =
            unsafe { rustix::mm::mmap(null_mut(), size, prot, MapFlags::SHARED, file, offset) }?;
        Mapping::at(start.cast(), size)
    }

    /// Maps `size` zeroed bytes, rounded up to whole pages.
    pub(super) fn anonymous(size: usize) -> Result<Mapping> {
        let size = size.next_multiple_of(page_size());
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
        // SAFETY: this value owns the mapping, and nothing borrows from it any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.size) };
    }
}

/// Register values in memory that the guest can only read.
pub struct ReadOnlyPages {
    memslot: u32,
    /// The window's guest-physical address.
    address: u64,
    memory: Mapping,
}

impl ReadOnlyPages {
    /// Allocates zeroed memory for `size` bytes of registers at `address`, not yet mapped into the
    /// guest. It occupies whole pages of the host, which no other device may share.
    ///
    /// # Errors
    /// When the window does not begin at a page boundary of the host.
    pub fn new(memslot: u32, address: u64, size: usize) -> Result<ReadOnlyPages> {
        let page = page_size();
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
            // SAFETY: the word lies in the mapping, which is aligned. The guest may read it
            // concurrently, so it is written by a single store.
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
            // SAFETY: as in `store`; on both architectures an aligned 64-bit store is single-copy
            // atomic.
            unsafe {
                let words: *mut u64 = self.memory.start.as_ptr().add(offset).cast();
                words.write_volatile(value.to_le());
                super::clean_to_memory(words.cast());
            }
        }
    }

    /// Maps the memory into the guest, in place of register accesses.
    ///
    /// # Errors
    /// When KVM lacks read-only memslots, or a free one.
    pub fn show(&self, vm: &VmFd) -> Result<()> {
        self.give(vm, self.memory.size as u64)
            .context("cannot show the guest a page of registers")
    }

    /// Unmaps the memory from the guest: its reads exit again.
    pub fn hide(&self, vm: &VmFd) {
        // This cannot fail for the memslot that `show` has created.
        let _ = self.give(vm, 0);
    }

    /// Makes the first `size` bytes a memslot; 0 removes it.
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
