//! Persistent memory (`--pmem`): a file that the guest has as memory, and mounts without a page
//! cache of its own.

mod image;
mod options;
#[cfg(test)]
mod tests;

pub use image::{FileMemory, Missing, PmemImage};
pub use options::{ALIGN, PmemOptions};

use crate::backend::{Backend, Flow};
use crate::kind::{DeviceOptions, Kind, Need, Place};
use crate::timer;
use anyhow::{Context, Result};
use armlet_devices::rate::Throttle;
use armlet_devices::virtio::VirtioDevice;
use armlet_system::files::{self, Accepted};
use options::{FLAG, size_of};
use std::sync::{Arc, Mutex};

/// Persistent memory.
pub static KIND: Kind = Kind {
    name: "pmem",
    letter: None,
    value: "PMEM",
    help: "persistent memory: PATH, or path=IMG[,readonly][,bps=SIZE]\n\
        [,iops=N], which limit flushes; may be repeated",
    repeats: true,
    slot: 4,
    default: None,
    parse: |text, _| Ok(Some(Box::new(PmemOptions::parse(text)?))),
};

impl DeviceOptions for PmemOptions {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    /// The image is neither locked nor kept open.
    fn pmem_size(&self) -> Result<Option<u64>> {
        let shown = self.path.display();
        let file = files::open(&self.path, Accepted::FileOrDisk, false)
            .with_context(|| format!("{FLAG}: cannot open {shown}"))?;
        let size = size_of(&file).with_context(|| format!("{FLAG}: {shown}"))?;
        Ok(Some(size))
    }

    fn needs(&self) -> Vec<Need> {
        vec![Need::Thread, Need::Storage, Need::Pages]
    }

    fn open_backend(&self, place: &Place<'_>) -> Result<Box<dyn Backend>> {
        let throttle = timer::throttle(&self.limits, place.changes);
        let throttle =
            throttle.with_context(|| format!("cannot make the timer of {}", place.name))?;
        let image = PmemImage::open(self, place.number)?;
        Ok(Box::new(image.held_to(throttle)))
    }
}

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

    fn throttle(&self, flow: Flow) -> Option<&Throttle> {
        self.throttle.as_deref().filter(|_| flow == Flow::All)
    }

    /// A flush takes as long as the storage takes.
    fn is_busy(&self) -> bool {
        true
    }
}
