//! PCI Express: a root complex with one bus (PCI Express Base 5.0, section 7.2.2) and functions of
//! type 0 with MSI-X (section 7.7.2).
//!
//! A function knows neither KVM nor where it lies: what it needs of the machine it gets as
//! [`MsiVectors`] and [`Placement`].

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

pub use crate::ioapic::Message;
pub use root::Root;

pub mod config;
pub mod msix;
pub mod root;

/// An MSI-X vector's way to the guest: an eventfd that becomes the message while it is routed.
///
/// While it is not routed, nobody reads the eventfd, whoever writes it (devices, the kernel's vhost,
/// another process): its counter is the pending bit. The implementation thus detaches the irqfd, and
/// does not only take its route away: KVM would read the eventfd and drop the edge. It attaches it
/// after it has set the route: KVM looks whether the eventfd is readable when an irqfd is attached
/// (virt/kvm/eventfd.c: `kvm_irqfd_assign`), so no edge is lost on either way.
pub trait MsiVector: Send + Sync {
    /// Returns the eventfd, which stays the same for as long as the vector exists.
    fn call(&self) -> Arc<EventFd>;

    /// Routes the eventfd to a message from now on, or to nothing.
    ///
    /// # Errors
    /// Why the machine refuses it, in a sentence; the route is then as it was.
    fn route(&self, message: Option<Message>) -> Result<(), String>;
}

/// Where a function gets its vectors from, each when the driver first needs it.
pub trait MsiVectors: Send + Sync {
    /// Makes a vector, routed to nothing.
    ///
    /// # Errors
    /// Why there is none, in a sentence.
    fn make(&self) -> Result<Box<dyn MsiVector>, String>;
}

/// What follows a BAR when the driver moves it: the window on the bus and the ioeventfds.
pub trait Placement: Send + Sync {
    /// Notes where the BAR begins from now on; `None` while the function does not decode it.
    ///
    /// # Errors
    /// Why it cannot lie there, in a sentence: it is then nowhere.
    fn moved(&self, bar: Option<u64>) -> Result<(), String>;
}

/// A function's side of configuration accesses: by ECAM, so any bytes of 4 KiB.
pub trait Function: Send {
    /// Reads the registers from `register`, an offset in bytes.
    fn read_config(&mut self, register: usize, data: &mut [u8]);

    /// Writes the registers from `register`, an offset in bytes.
    fn write_config(&mut self, register: usize, data: &[u8]);
}

#[cfg(test)]
pub(crate) mod fake;
