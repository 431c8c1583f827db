//! Coalesced MMIO: writes to one register that KVM collects in a ring instead of leaving the
//! guest for each (Documentation/virt/kvm/api.rst, KVM_REGISTER_COALESCED_MMIO).

use anyhow::{Context, Result};
use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes from the register's address on that belong to it: a 32-bit register, written in any
/// width up to that.
const REGISTER_SIZE: u32 = 4;

/// The writes to one register of a VM.
pub struct CoalescedWrites {
    vm: Arc<VmFd>,
    ring: NonNull<kvm_coalesced_mmio_ring>,
    /// How many entries the ring has.
    entries: u32,
    /// The register's guest-physical address.
    address: u64,
}

// SAFETY: the ring is memory shared with the kernel, mapped until the process ends or this value
// is dropped; it is not bound to a thread.
unsafe impl Send for CoalescedWrites {}

impl CoalescedWrites {
    /// The writes to the register at `address`; nothing is collected before
    /// [`start`](Self::start). Any vCPU of the VM will do: they share the ring.
    ///
    /// # Errors
    /// A KVM without the ring.
    pub fn new(vm: Arc<VmFd>, vcpu: &VcpuFd, address: u64) -> Result<CoalescedWrites> {
        let page = rustix::param::page_size();
        // SAFETY: the descriptor is the vCPU's, which is borrowed for the time of the call.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let offset = u64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * page as u64;
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let ring =
            unsafe { rustix::mm::mmap(null_mut(), page, flags, MapFlags::SHARED, fd, offset) }
                .context("cannot map KVM's ring of coalesced writes")?;
        let room = page - size_of::<kvm_coalesced_mmio_ring>();
        Ok(CoalescedWrites {
            vm,
            ring: NonNull::new(ring.cast()).context("KVM's ring lies at 0")?,
            entries: (room / size_of::<kvm_coalesced_mmio>()) as u32,
            address,
        })
    }

    /// From now on KVM collects writes.
    ///
    /// # Errors
    /// What KVM says.
    pub fn start(&self) -> Result<()> {
        self.vm
            .register_coalesced_mmio(IoEventAddress::Mmio(self.address), REGISTER_SIZE)
            .context("cannot have KVM collect writes")
    }

    /// From now on each write leaves the guest again. What was collected stays to be drained.
    ///
    /// # Errors
    /// What KVM says.
    pub fn stop(&self) -> Result<()> {
        self.vm
            .unregister_coalesced_mmio(IoEventAddress::Mmio(self.address), REGISTER_SIZE)
            .context("cannot have KVM stop collecting writes")
    }

    /// Takes the low byte of each collected write, oldest first.
    pub fn drain(&mut self, bytes: &mut Vec<u8>) {
        // SAFETY: the ring is mapped; the kernel writes `last` and the entries before it, and
        // reads `first`, all under its own lock and with barriers
        // (virt/kvm/coalesced_mmio.c: coalesced_mmio_write).
        let (first, last, entries) = unsafe {
            let ring = self.ring.as_ptr();
            (
                AtomicU32::from_ptr(&raw mut (*ring).first),
                AtomicU32::from_ptr(&raw mut (*ring).last),
                (*ring).coalesced_mmio.as_ptr(),
            )
        };
        let end = last.load(Ordering::Acquire);
        let mut next = first.load(Ordering::Relaxed);
        // Only the kernel and we write the ring; the bounds are for its sake all the same.
        while next != end && next < self.entries && end < self.entries {
            // SAFETY: `next` is below the number of entries, and the kernel has written it.
            bytes.push(unsafe { (*entries.add(next as usize)).data[0] });
            next = (next + 1) % self.entries;
        }
        first.store(next, Ordering::Release);
    }
}

impl Drop for CoalescedWrites {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new`, and nothing borrows from it.
        let _ =
            unsafe { rustix::mm::munmap(self.ring.as_ptr().cast(), rustix::param::page_size()) };
    }
}
