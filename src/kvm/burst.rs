//! A device window that rarely causes exits: KVM coalesces the writes to one register in a ring,
//! and the guest reads all registers from a page of memory. I/O ports cannot be backed by memory, nor can
//! registers that change when they are read: each such read is still an exit.
//!
//! Both are features of KVM: coalesced MMIO and port I/O (Documentation/virt/kvm/api.rst,
//! KVM_REGISTER_COALESCED_MMIO), and [`ReadOnlyPages`].

use super::page::{Mapping, ReadOnlyPages};
use anyhow::{Context, Result};
use armlet_system::page_size::page_size;
use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// The memslot of the page, after those of RAM.
const MEMSLOT: u32 = 1000;

/// The sizes of registers in bytes.
const WORD: u32 = 4;
const BYTE: u32 = 1;

/// The window of one device.
pub struct BurstWindow {
    vm: Arc<VmFd>,
    /// The ring, in a page that all vCPUs of the VM share.
    ring: Mapping,
    /// The register whose writes are coalesced, and its size in bytes; it is the first one of the
    /// window.
    register: (IoEventAddress, u32),
    /// What the guest reads while the window is open.
    page: Option<ReadOnlyPages>,
}

impl BurstWindow {
    /// Creates the window at `address`, closed. It occupies a whole page of the host, which no
    /// other device may share.
    ///
    /// # Errors
    /// When the window does not begin at a page boundary of the host, or KVM lacks the ring.
    pub fn new(vm: Arc<VmFd>, vcpu: &VcpuFd, address: u64) -> Result<BurstWindow> {
        let page = ReadOnlyPages::new(MEMSLOT, address, page_size())?;
        let register = (IoEventAddress::Mmio(address), WORD);
        BurstWindow::on(vm, vcpu, register, Some(page))
    }

    /// Creates the window of a device at I/O ports from `port` on, closed.
    ///
    /// # Errors
    /// When KVM lacks the ring.
    pub fn at_ports(vm: Arc<VmFd>, vcpu: &VcpuFd, port: u64) -> Result<BurstWindow> {
        BurstWindow::on(vm, vcpu, (IoEventAddress::Pio(port), BYTE), None)
    }

    /// Creates the window of a device in memory whose registers have side effects when they are read,
    /// closed. Only writes to its first byte, at `address`, are coalesced; each read is an exit.
    ///
    /// # Errors
    /// When KVM lacks the ring.
    pub fn at_byte(vm: Arc<VmFd>, vcpu: &VcpuFd, address: u64) -> Result<BurstWindow> {
        BurstWindow::on(vm, vcpu, (IoEventAddress::Mmio(address), BYTE), None)
    }

    fn on(
        vm: Arc<VmFd>,
        vcpu: &VcpuFd,
        register: (IoEventAddress, u32),
        page: Option<ReadOnlyPages>,
    ) -> Result<BurstWindow> {
        let offset = u64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * page_size() as u64;
        // SAFETY: the descriptor belongs to the vCPU, which is borrowed for the duration of the
        // call.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let ring =
            Mapping::of_file(fd, offset).context("cannot map KVM's ring of coalesced writes")?;
        Ok(BurstWindow {
            vm,
            ring,
            register,
            page,
        })
    }

    /// Opens the window: from now on the guest reads `words` (offset in bytes, value), and its
    /// writes to the first register are coalesced. Other writes still exit.
    ///
    /// # Errors
    /// KVM's error; the window is then closed.
    pub fn open(&mut self, words: impl Iterator<Item = (usize, u32)>) -> Result<()> {
        self.update(words);
        self.collect().context("cannot have KVM coalesce writes")?;
        let shown = self.page.as_ref().map(|page| page.show(&self.vm));
        shown.unwrap_or(Ok(())).inspect_err(|_| self.close_zone())
    }

    /// Changes what the guest reads.
    pub fn update(&mut self, words: impl Iterator<Item = (usize, u32)>) {
        let Some(page) = &self.page else { return };
        for (offset, value) in words {
            page.store(offset, value);
        }
    }

    /// Closes the window. Coalesced writes stay in the ring to be drained.
    pub fn close(&mut self) {
        if let Some(page) = &self.page {
            page.hide(&self.vm);
        }
        self.close_zone();
    }

    fn collect(&self) -> Result<()> {
        let (address, bytes) = self.register;
        Ok(self.vm.register_coalesced_mmio(address, bytes)?)
    }

    /// Returns the register's address, in memory or among the ports.
    fn start(&self) -> u64 {
        match self.register {
            (IoEventAddress::Mmio(address) | IoEventAddress::Pio(address), _) => address,
        }
    }

    fn close_zone(&self) {
        let (address, bytes) = self.register;
        // This cannot fail for a zone that `collect` has registered.
        let _ = self.vm.unregister_coalesced_mmio(address, bytes);
    }

    /// Takes the low byte of each coalesced write to the register, oldest first. KVM also coalesces
    /// writes to the register's other bytes; these are dropped.
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
        // Only the kernel and this process write the ring; the bounds checks keep memory safe
        // regardless.
        while next != end && next < entries && end < entries {
            // SAFETY: `next` is below the number of entries, and the kernel has written it.
            bytes.extend(low_byte(
                unsafe { &*written.add(next as usize) },
                self.start(),
            ));
            next = (next + 1) % entries;
        }
        first.store(next, Ordering::Release);
    }
}

/// Returns the low byte of a write, if it was to the register at `start`.
fn low_byte(written: &kvm_coalesced_mmio, start: u64) -> Option<u8> {
    (written.phys_addr == start).then_some(written.data[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_beside_the_register_is_no_character() {
        let low_bytes = [0, 1, 2, 3].map(|offset| {
            let written = kvm_coalesced_mmio {
                phys_addr: 0x0900_0000 + offset,
                len: 1,
                data: [b'x', 0, 0, 0, 0, 0, 0, 0],
                ..Default::default()
            };
            low_byte(&written, 0x0900_0000)
        });
        assert_eq!(low_bytes, [Some(b'x'), None, None, None]);
    }
}
