//! A metadata service for a guest on its network card, as Firecracker's MMDS: JSON data that the guest
//! reads by HTTP at an address of its link (docs/mmds/mmds-user-guide.md of Firecracker).
//!
//! Frames that the guest sends to this address do not reach the network behind the card. A small TCP/IP
//! stack in armlet answers them.

use anyhow::{Result, bail};
use armlet_devices::sync::lock;
use serde_json::Value;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

#[cfg(feature = "mmds")]
mod file;
#[cfg(feature = "mmds")]
mod frames;
#[cfg(not(feature = "mmds"))]
#[path = "mmds/absent.rs"]
mod frames;
#[cfg(feature = "mmds")]
pub mod service;
#[cfg(feature = "mmds")]
pub mod stack;
#[cfg(all(test, feature = "mmds"))]
mod tests;
#[cfg(feature = "mmds")]
mod tokens;

pub(super) use frames::OpenMetadata;

/// The address where guests of clouds look for metadata.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// The data that a guest can read. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Metadata(Arc<Mutex<Arc<Value>>>);

impl Metadata {
    /// Sets other data in place of all that are there, also while a guest runs. A request that is
    /// answered meanwhile gets the old ones or these.
    pub fn set(&self, data: Value) {
        let mut data = Arc::new(data);
        std::mem::swap(&mut *lock(&self.0), &mut data);
        // The old data are freed here, where nobody waits for the lock.
    }

    /// Returns the data as they are now.
    #[must_use]
    pub fn get(&self) -> Arc<Value> {
        Arc::clone(&lock(&self.0))
    }
}

/// Two are equal if they share their data.
impl PartialEq for Metadata {
    fn eq(&self, other: &Metadata) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Metadata {}

/// A metadata service as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MmdsOptions {
    /// Where the guest finds it: an address of its link (169.254.0.0/16).
    pub address: Ipv4Addr,
    /// Whether each request needs a token, which the guest has to ask for first (version 2).
    pub needs_token: bool,
    /// Whether answers are plain text whatever a request accepts, as those of EC2 are.
    pub imds_compat: bool,
    /// What it tells.
    pub data: Metadata,
    /// A file that the data are read from when the card is opened.
    pub file: Option<PathBuf>,
}

impl Default for MmdsOptions {
    fn default() -> MmdsOptions {
        MmdsOptions {
            address: ADDRESS,
            needs_token: false,
            imds_compat: false,
            data: Metadata::default(),
            file: None,
        }
    }
}

impl MmdsOptions {
    /// Checks what has bounds.
    ///
    /// # Errors
    /// An address that is not of the link, and what would be.
    pub(super) fn check(&self) -> Result<()> {
        let address = self.address;
        if !address.is_link_local() || [0, 255].contains(&address.octets()[2]) {
            bail!(
                "metadata cannot be at {address}; use an address from 169.254.1.0 to \
                 169.254.254.255, such as {ADDRESS}"
            );
        }
        Ok(())
    }
}
