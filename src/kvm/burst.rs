//! A device window that hardly ever makes the guest exit: KVM collects the writes to one register
//! in a ring, and the guest reads all registers from a page of memory.
//!
//! Both are KVM's own: coalesced MMIO (Documentation/virt/kvm/api.rst,
//! KVM_REGISTER_COALESCED_MMIO), and a read-only memslot, to which a write is an MMIO exit
//! (KVM_MEM_READONLY). The guest maps the window as device memory, so on a CPU without FEAT_S2FWB
//! its reads pass by the caches. KVM cleans them when it maps the page
//! (arch/arm64/kvm/hyp/pgtable.c: stage2_map_walker_try_leaf); what changes later is cleaned here.

use anyhow::{Context, Result, ensure};
use kvm_bindings::{
    KVM_COALESCED_MMIO_PAGE_OFFSET, KVM_MEM_READONLY, kvm_coalesced_mmio, kvm_coalesced_mmio_ring,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// The memslot of the page, behind those of RAM.
const SLOT: u32 = 1000;

/// Bytes of the register whose writes are collected; it stands first in the window.
const REGISTER_BYTES: u32 = 4;

/// The window of one device.
pub struct BurstWindow {
    vm: Arc<VmFd>,
    /// The ring, in a page that all vCPUs of the VM share.
    ring: Mapping,
    /// What the guest reads while the window is open.
    page: Mapping,
    /// The window's guest-physical address.
    address: u64,
}

impl BurstWindow {
    /// The window at `address`, closed. It takes a whole page of the host, in which no other
    /// device may lie.
    ///
    /// # Errors
    /// A window that does not begin at a page of the host, or a KVM without the ring.
    pub fn new(vm: Arc<VmFd>, vcpu: &VcpuFd, address: u64) -> Result<BurstWindow> {
        let size = rustix::param::page_size();
        ensure!(
            address.is_multiple_of(size as u64),
            "the window at {address:#x} is not aligned to pages of {size} bytes"
        );
        // SAFETY: the descriptor is the vCPU's, which is borrowed for the time of the call.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        Ok(BurstWindow {
            vm,
            ring: Mapping::of_ring(fd).context("cannot map KVM's ring of collected writes")?,
            page: Mapping::anonymous().context("cannot map a page")?,
            address,
        })
    }

    /// Opens the window: from now on the guest reads `words` (offset in bytes, value), and its
    /// writes to the first register are collected. Other writes are exits as before.
    ///
    /// # Errors
    /// What KVM says; the window is then closed.
    pub fn open(&mut self, words: impl Iterator<Item = (usize, u32)>) -> Result<()> {
        self.update(words);
        self.collect().context("cannot have KVM collect writes")?;
        if let Err(error) = self.show(self.page.size as u64) {
            self.close();
            return Err(error).context("cannot show the guest a page of registers");
        }
        Ok(())
    }

    /// Changes what the guest reads.
    pub fn update(&mut self, words: impl Iterator<Item = (usize, u32)>) {
        for (offset, value) in words.filter(|(offset, _)| offset + 4 <= self.page.size) {
            // SAFETY: the word lies in the page, which is aligned. The guest may read it at the
            // same time, so it is written as a whole.
            unsafe {
                let word: *mut u32 = self.page.start.as_ptr().add(offset).cast();
                word.write_volatile(value.to_le());
                super::clean_to_memory(word.cast());
            }
        }
    }

    /// Closes the window. What was collected stays to be drained.
    pub fn close(&mut self) {
        // Neither fails for what `open` has made.
        let _ = self.show(0);
        let zone = IoEventAddress::Mmio(self.address);
        let _ = self.vm.unregister_coalesced_mmio(zone, REGISTER_BYTES);
    }

    fn collect(&self) -> Result<()> {
        let zone = IoEventAddress::Mmio(self.address);
        Ok(self.vm.register_coalesced_mmio(zone, REGISTER_BYTES)?)
    }

    /// Makes the first `size` bytes of the page a memslot; none removes it.
    fn show(&self, size: u64) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot: SLOT,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: self.address,
            memory_size: size,
            userspace_addr: self.page.start.as_ptr() as u64,
        };
        // SAFETY: the page stays mapped as long as this value, and a VM that outlives it loses
        // the page by the kernel's MMU notifier.
        Ok(unsafe { self.vm.set_user_memory_region(region) }?)
    }

    /// Takes the low byte of each collected write, oldest first.
    pub fn drain(&mut self, bytes: &mut Vec<u8>) {
        let room = self.ring.size - size_of::<kvm_coalesced_mmio_ring>();
        let entries = (room / size_of::<kvm_coalesced_mmio>()) as u32;
        let ring: *mut kvm_coalesced_mmio_ring = self.ring.start.as_ptr().cast();
        // SAFETY: the ring is mapped; the kernel writes `last` and the entries before it, and
        // reads `first`, under its own lock and with barriers
        // (virt/kvm/coalesced_mmio.c: coalesced_mmio_write).
        let (first, last, written) = unsafe {
            (
                AtomicU32::from_ptr(&raw mut (*ring).first),
                AtomicU32::from_ptr(&raw mut (*ring).last),
                (*ring).coalesced_mmio.as_ptr(),
            )
        };
        let end = last.load(Ordering::Acquire);
        let mut next = first.load(Ordering::Relaxed);
        // Only the kernel and we write the ring; the bounds hold memory safe all the same.
        while next != end && next < entries && end < entries {
            // SAFETY: `next` is below the number of entries, and the kernel has written it.
            bytes.push(unsafe { (*written.add(next as usize)).data[0] });
            next = (next + 1) % entries;
        }
        first.store(next, Ordering::Release);
    }
}

/// A page of this process, until it is dropped.
struct Mapping {
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: a mapping is memory of the process and not bound to a thread.
unsafe impl Send for Mapping {}

impl Mapping {
    fn of_ring(vcpu: BorrowedFd<'_>) -> Result<Mapping> {
        let size = rustix::param::page_size();
        let offset = u64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * size as u64;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start =
            unsafe { rustix::mm::mmap(null_mut(), size, prot, MapFlags::SHARED, vcpu, offset) }?;
        Mapping::at(start.cast(), size)
    }

    fn anonymous() -> Result<Mapping> {
        let size = rustix::param::page_size();
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
