//! Virtio devices as the user asks for them: their options, and what stands behind them on the
//! host.
//!
//! A [`Backend`] is opened once and lives as long as armlet: a disk stays locked, a network
//! connection open. At each start of the guest it makes a device.

use anyhow::Result;
use armlet_devices::virtio::VirtioDevice;
use std::sync::{Arc, Mutex};

pub mod options;

/// What stands behind a virtio device on the host.
pub trait Backend: Send {
    /// What it is called in messages and in the name of its thread: "disk0", up to 15 bytes.
    fn name(&self) -> String;

    /// The device for the guest that starts now; the one of the guest before is gone.
    ///
    /// # Errors
    /// What the host refuses.
    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>>;

    /// Whether its work gets a thread of its own; light devices share the event loop.
    fn is_busy(&self) -> bool {
        false
    }

    /// Whether another process works in guest memory, which then has to be shareable.
    fn shares_memory(&self) -> bool {
        false
    }
}
