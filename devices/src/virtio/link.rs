//! A device's connection to its driver, independent of the transport: interrupts, and a count of
//! the driver's faults.

use std::fmt;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::limit::{Admitted, RateLimit};

/// What a device interrupts the guest for. The transport maps it to an interrupt: one line for all
/// of them over MMIO, an MSI-X entry each over PCI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vector {
    /// The configuration space or the device's status changed.
    Config,
    /// A buffer of this queue was used (virtio 1.2, section 2.3).
    Queue(u16),
}

/// How a transport interrupts the guest.
pub trait Interrupts: Send + Sync {
    /// Interrupts the guest for `vector`.
    fn signal(&self, vector: Vector);

    /// Shows DEVICE_NEEDS_RESET in the device's status (virtio 1.2, section 2.1.2).
    fn needs_reset(&self);

    /// Returns the eventfd by which another process or the kernel interrupts the guest (vhost's
    /// call eventfd); `None` where the transport has none. It stays the same when the driver remaps
    /// the vector.
    fn descriptor(&self, vector: Vector) -> Option<Arc<EventFd>>;
}

/// A device's connection to its driver: interrupts, and a count of the driver's faults.
pub struct Link {
    name: String,
    interrupts: Box<dyn Interrupts>,
    faults: RateLimit,
}

impl Link {
    /// Creates the link of the device called `name` ("disk0", for messages).
    #[must_use]
    pub fn new(name: String, interrupts: Box<dyn Interrupts>) -> Link {
        Link {
            name,
            interrupts,
            faults: RateLimit::default(),
        }
    }

    /// Returns the device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Interrupts the guest because a buffer of this queue was used.
    pub fn queue_used(&self, queue: u16) {
        self.interrupts.signal(Vector::Queue(queue));
    }

    /// Interrupts the guest because the configuration space changed.
    pub fn config_changed(&self) {
        self.interrupts.signal(Vector::Config);
    }

    /// Returns the queue's call eventfd, as [`Interrupts::descriptor`] does.
    #[must_use]
    pub fn call(&self, queue: u16) -> Option<Arc<EventFd>> {
        self.interrupts.descriptor(Vector::Queue(queue))
    }

    /// Counts a fault of the driver, and logs it at a limited rate. The device keeps working.
    pub fn fault(&self, what: fmt::Arguments<'_>) {
        self.faults.log(log::Level::Warn, |Admitted { count, .. }| {
            format!("{}: {what} (fault {count} of this device)", self.name)
        });
    }

    /// Counts a fault that the device cannot recover from, and asks the driver for a reset.
    pub fn broken(&self, what: fmt::Arguments<'_>) {
        self.fault(what);
        self.interrupts.needs_reset();
    }

    /// Returns the number of the driver's faults so far.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.faults.count()
    }
}
