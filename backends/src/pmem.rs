//! Persistent memory (`--pmem`): a file that the guest has as memory, and mounts without a page
//! cache of its own.

mod image;
mod options;
#[cfg(test)]
mod tests;

pub use image::{FileMemory, Missing, PmemImage};
pub use options::{ALIGN, KIND, PmemOptions};

use crate::backend::Backend;
use anyhow::Result;
use armlet_devices::virtio::VirtioDevice;
use std::sync::{Arc, Mutex};

impl Backend for PmemImage {
    fn name(&self) -> String {
        PmemImage::name(self).to_owned()
    }

    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
        Ok(Arc::new(Mutex::new(self.new_device())))
    }

    fn pmem(&self) -> Option<&PmemImage> {
        Some(self)
    }

    /// A flush takes as long as the storage takes.
    fn is_busy(&self) -> bool {
        true
    }
}
