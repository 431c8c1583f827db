//! Virtio devices as the user asks for them: their options, and what stands behind them on the
//! host.
//!
//! A [`Backend`] is opened once and lives as long as armlet: a disk stays locked, a network
//! connection open. At each start of the guest it makes a device.

use crate::cli::MachineArgs;
use crate::status::{Fault, Status};
use anyhow::{Result, bail};
use armlet_devices::virtio::VirtioDevice;
use std::sync::{Arc, Mutex};

pub mod options;
pub mod rng;
pub mod slots;
pub mod vhost;

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

/// A virtio device that the user asked for, not opened yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its name: "disk0".
    pub name: String,
    kind: Kind,
    /// The value of its option.
    text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Rng,
}

/// The devices that the options ask for, in the order of their slots.
///
/// # Errors
/// A switch that is neither on nor off.
pub fn wanted(args: &MachineArgs) -> Result<Vec<Wanted>> {
    let mut wanted = Vec::new();
    match args.rng.as_deref() {
        None | Some("on") => wanted.push(Wanted {
            name: "rng".to_owned(),
            kind: Kind::Rng,
            text: String::new(),
        }),
        Some("off") => {}
        Some(other) => bail!("--rng '{other}' is not known; use on or off"),
    }
    Ok(wanted)
}

/// Opens what stands behind the devices.
///
/// # Errors
/// What cannot be opened, and what would help.
pub fn open(wanted: &[Wanted]) -> Result<Vec<Box<dyn Backend>>> {
    let open = |wanted: &Wanted| -> Result<Box<dyn Backend>> {
        match wanted.kind {
            Kind::Rng => Ok(Box::new(rng::HostEntropy)),
        }
    };
    wanted
        .iter()
        .map(|wanted| open(wanted).fault(Status::Usage))
        .collect()
}
