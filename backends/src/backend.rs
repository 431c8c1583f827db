//! What stands behind a virtio device on the host.

use crate::pmem::PmemImage;
use anyhow::Result;
use armlet_devices::virtio::VirtioDevice;
use std::sync::{Arc, Mutex};

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

    /// Whether it gives the guest's memory back to the host: then it has to do with RAM only.
    fn takes_memory(&self) -> bool {
        false
    }

    /// The memory of the host that the guest gets with the device, for persistent memory.
    fn pmem(&self) -> Option<&PmemImage> {
        None
    }
}

impl<B: Backend + Sync + ?Sized> Backend for Arc<B> {
    fn name(&self) -> String {
        (**self).name()
    }

    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
        (**self).device()
    }

    fn is_busy(&self) -> bool {
        (**self).is_busy()
    }

    fn shares_memory(&self) -> bool {
        (**self).shares_memory()
    }
}
