//! Virtio (OASIS virtio 1.2): devices, transports, and the interface between them.
//!
//! A [`VirtioDevice`] has features, queues and a configuration space, and processes requests when
//! its queues are kicked; a transport ([`mmio::Mmio`], [`pci::Pci`]) presents it to the guest
//! and owns the register state machine. A device interrupts the guest by a [`Link`]. Whoever runs the device
//! waits for its kicks and its [sources](VirtioDevice::sources) and calls it.

pub(crate) use crate::sync::lock;

pub mod balloon;
pub mod block;
mod config;
pub mod console;
mod device;
pub mod fs;
mod link;
pub mod mailbox;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod pmem;
pub mod queue;
mod registers;
pub mod rng;
mod state;
mod transport;
pub mod vsock;

#[cfg(test)]
pub(crate) mod fake;

pub use crate::persist::RestoreError;
pub use config::ConfigSpace;
pub use device::{Change, Driver, Positions, Source, StartError, VirtioDevice, quiesced};
pub use link::{Interrupts, Link, Vector};
pub use queue::{Chain, Position, Virtqueue};
pub use registers::{MmioState, PciState, Registers, RegistersState};
pub use state::{DeviceState, FsState, Statistics};
pub use transport::{QueueState, TransportState};

/// VIRTIO_F_INDIRECT_DESC, bit 28 (virtio 1.2, section 6).
pub const FEATURE_INDIRECT: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX, bit 29.
pub const FEATURE_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1, bit 32.
pub const FEATURE_VERSION_1: u64 = 1 << 32;
