//! Virtio devices as a user asks for them, and the opening of what stands behind them.

use crate::backend::Backend;
use crate::balloon::BalloonOptions;
use crate::broker::Broker;
use crate::console::HvcConsole;
use crate::disk::{self, DiskOptions};
use crate::net::NetOptions;
use crate::pmem::{PmemImage, PmemOptions};
use crate::rng;
use crate::share::ShareOptions;
use crate::vsock::VsockOptions;
use anyhow::{Context, Result};
use armlet_system::signals;
use std::sync::Arc;

/// A virtio device that the user asked for, not opened yet.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its name: "disk0".
    pub name: String,
    /// DeviceOptions it is to be.
    pub options: DeviceOptions,
}

/// A device of one kind, with its options.
#[derive(Clone, Debug)]
pub enum DeviceOptions {
    /// A disk.
    Disk(DiskOptions),
    /// A network device.
    Net(NetOptions),
    /// A folder of the host.
    Share(ShareOptions),
    /// Sockets between guest and host.
    Vsock(VsockOptions),
    /// Persistent memory.
    Pmem(PmemOptions),
    /// Memory that guest and host give each other.
    Balloon(BalloonOptions),
    /// The terminal.
    Console,
    /// Random numbers.
    Rng,
}

impl Wanted {
    /// Whether another process works in guest memory for it.
    #[must_use]
    pub fn shares_memory(&self) -> bool {
        matches!(self.options, DeviceOptions::Share(_))
    }

    /// Whether a program works for it, which a broker starts.
    fn needs_broker(&self) -> bool {
        match &self.options {
            DeviceOptions::Share(_) => true,
            DeviceOptions::Net(net) => net.needs_broker(),
            _ => false,
        }
    }
}

/// Forks the broker that [`open`] wants, if it wants one. There are to be no other threads yet.
///
/// # Errors
/// DeviceOptions the system refuses.
pub fn fork_broker(wanted: &[Wanted]) -> Result<Option<Arc<Broker>>> {
    let is_needed = wanted.iter().any(Wanted::needs_broker);
    is_needed.then(Broker::fork).transpose()
}

/// Opens what stands behind the devices of a guest, in their order; `console` stands behind the
/// console, and `broker` starts programs ([`fork_broker`]).
///
/// # Errors
/// DeviceOptions cannot be opened, and what would help.
pub fn open(
    wanted: &[Wanted],
    console: Option<&Arc<HvcConsole>>,
    broker: Option<&Arc<Broker>>,
) -> Result<Vec<Box<dyn Backend>>> {
    let mut backends: Vec<Box<dyn Backend>> = Vec::new();
    let disks: Vec<DiskOptions> = wanted
        .iter()
        .filter_map(|wanted| match &wanted.options {
            DeviceOptions::Disk(disk) => Some(disk.clone()),
            _ => None,
        })
        .collect();
    let disks = match disks.is_empty() {
        // Most guests have none, and what opens them stays out of memory.
        true => Vec::new(),
        false => {
            signals::waiting_for("the images of disks to be opened");
            disk::open_all(&disks)?
        }
    };
    let mut disks = disks.into_iter();
    let (mut nets, mut pmems) = (0.., 0..);
    for wanted in wanted {
        signals::waiting_for(format_args!("{} to be opened", wanted.name));
        let backend: Option<Box<dyn Backend>> = match &wanted.options {
            DeviceOptions::Disk(_) => disks.next().map(|disk| Box::new(disk) as Box<dyn Backend>),
            DeviceOptions::Net(net) => {
                let number = nets.next().unwrap_or_default();
                Some(Box::new(net.open(number, broker)?))
            }
            DeviceOptions::Share(share) => {
                let broker = broker.context("nobody starts virtiofsd")?;
                Some(share.open(&wanted.name, broker)?)
            }
            DeviceOptions::Vsock(vsock) => Some(vsock.open()?),
            DeviceOptions::Pmem(pmem) => {
                let number = pmems.next().unwrap_or_default();
                Some(Box::new(PmemImage::open(pmem, number)?))
            }
            DeviceOptions::Balloon(balloon) => Some(Box::new(balloon.open())),
            DeviceOptions::Console => console.map(|console| Box::new(Arc::clone(console)) as _),
            DeviceOptions::Rng => Some(Box::new(rng::HostEntropy)),
        };
        backends.push(backend.with_context(|| format!("nothing stands behind {}", wanted.name))?);
    }
    Ok(backends)
}
