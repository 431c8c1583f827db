//! An armlet that was built without metadata.

use super::MmdsOptions;
use anyhow::{Result, bail};
use armlet_devices::rate::Throttle;
use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::net::Frames;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

/// A metadata service, of which there is none.
pub(in crate::net) struct OpenMetadata(Infallible);

impl OpenMetadata {
    /// Refuses to open one.
    ///
    /// # Errors
    /// That there is none.
    pub(in crate::net) fn open(_options: &MmdsOptions) -> Result<OpenMetadata> {
        bail!("this armlet was built without metadata for guests; build it with the feature mmds")
    }

    /// Is not called, as nothing was opened.
    pub(in crate::net) fn device(
        &self,
        _network: Box<dyn Frames>,
        _mac: [u8; 6],
        _throttles: [Option<Arc<Throttle>>; 2],
    ) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
        match self.0 {}
    }
}
