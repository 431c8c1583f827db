//! A device's way to its driver, whatever the transport: interrupts, and faults that are counted.

use std::fmt;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::limit::{Admitted, RateLimit};

/// What a device interrupts the guest for. Each transport has its own interrupt for it: one line for
/// all over MMIO, an entry of a table over PCI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vector {
    /// The configuration space or the device's status changed.
    Config,
    /// A buffer of this queue was used (virtio 1.2, section 2.3).
    Queue(u16),
}

/// How a transport interrupts the guest. What differs between transports, and nothing else.
pub trait Interrupts: Send + Sync {
    /// Interrupts the guest for this.
    fn signal(&self, vector: Vector);

    /// Shows DEVICE_NEEDS_RESET in the device's status (virtio 1.2, section 2.1.2).
    fn needs_reset(&self);

    /// A descriptor by which another process or the kernel interrupts the guest (a vhost call
    /// descriptor); `None` where the transport has none. It stays the same whatever interrupt the
    /// driver chooses.
    fn descriptor(&self, vector: Vector) -> Option<Arc<EventFd>>;
}

/// A device's way to its driver: interrupts, and a count of what the driver did wrong.
pub struct Link {
    name: String,
    interrupts: Box<dyn Interrupts>,
    faults: RateLimit,
}

impl Link {
    /// The way of the device called `name` ("disk0", for messages).
    #[must_use]
    pub fn new(name: String, interrupts: Box<dyn Interrupts>) -> Link {
        Link {
            name,
            interrupts,
            faults: RateLimit::default(),
        }
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A buffer of this queue was used: interrupts the guest.
    pub fn queue_used(&self, queue: u16) {
        self.interrupts.signal(Vector::Queue(queue));
    }

    /// The configuration space changed: interrupts the guest.
    pub fn config_changed(&self) {
        self.interrupts.signal(Vector::Config);
    }

    /// As [`Interrupts::descriptor`], for a queue.
    #[must_use]
    pub fn call(&self, queue: u16) -> Option<Arc<EventFd>> {
        self.interrupts.descriptor(Vector::Queue(queue))
    }

    /// Counts what the driver did wrong, and logs it at a limited rate. The device goes on.
    pub fn fault(&self, what: fmt::Arguments<'_>) {
        self.faults.log(log::Level::Warn, |Admitted { count, .. }| {
            format!("{}: {what} (fault {count} of this device)", self.name)
        });
    }

    /// Counts what the driver broke beyond repair, and asks it for a reset.
    pub fn broken(&self, what: fmt::Arguments<'_>) {
        self.fault(what);
        self.interrupts.needs_reset();
    }

    /// What the driver did wrong so far, counted.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.faults.count()
    }
}
