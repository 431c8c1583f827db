//! Virtio devices as the user asks for them: their options, and what stands behind them on the
//! host.
//!
//! A [`Backend`] is opened once and lives as long as armlet: a disk stays locked, a network
//! connection open. At each start of the guest it makes a device.

use crate::cli::MachineArgs;
use crate::signals;
use anyhow::{Context, Result, bail};
use armlet_devices::virtio::VirtioDevice;
use balloon::BalloonOptions;
use broker::Broker;
use console::{ConsoleKind, HvcConsole};
use disk::DiskOptions;
use net::NetOptions;
use pmem::PmemImage;
use share::ShareOptions;
use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use vsock::VsockOptions;

#[cfg(test)]
mod alone;
pub mod balloon;
pub mod broker;
pub mod console;
pub mod disk;
pub mod locks;
pub mod net;
pub mod options;
pub mod pages;
pub mod pmem;
pub mod rng;
pub mod root;
pub mod share;
pub mod slots;
pub mod vhost;
pub mod vhost_user;
pub mod vsock;

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

/// A virtio device that the user asked for, not opened yet.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its name: "disk0".
    pub name: String,
    what: What,
}

#[derive(Clone, Debug)]
enum What {
    Disk(DiskOptions),
    Net(NetOptions),
    Share(ShareOptions),
    Vsock(VsockOptions),
    /// The value of its option.
    Pmem(String),
    Balloon(BalloonOptions),
    Console,
    Rng,
}

impl Wanted {
    /// Whether another process works in guest memory for it.
    #[must_use]
    pub fn shares_memory(&self) -> bool {
        matches!(self.what, What::Share(_))
    }

    /// Whether a program works for it, which a broker starts.
    fn needs_broker(&self) -> bool {
        match &self.what {
            What::Share(_) => true,
            What::Net(net) => net.needs_broker(),
            _ => false,
        }
    }
}

/// Forks the broker that [`open`] wants, if it wants one. There are to be no other threads yet.
///
/// # Errors
/// What the system refuses.
pub fn fork_broker(wanted: &[Wanted]) -> Result<Option<Arc<Broker>>> {
    let is_needed = wanted.iter().any(Wanted::needs_broker);
    is_needed.then(Broker::fork).transpose()
}

/// The devices that the options of a guest with `memory` bytes ask for, in the order of their slots.
/// Whatever of them is wrong on any host is found here, before anything is opened.
///
/// # Errors
/// An option that cannot be read, or that does not go with another.
pub fn wanted(args: &MachineArgs, memory: u64) -> Result<Vec<Wanted>> {
    let mut wanted = Vec::new();
    let mut tags = HashSet::new();
    let mut add = |name: &str, what| {
        let name = name.to_owned();
        wanted.push(Wanted { name, what });
    };
    let disks = args.disk.iter().map(|text| DiskOptions::parse(text));
    let disks = disks.collect::<Result<Vec<_>>>()?;
    disk::check_ids(&disks)?;
    for (number, disk) in disks.into_iter().enumerate() {
        add(&format!("disk{number}"), What::Disk(disk));
    }
    for (number, text) in args.net.iter().enumerate() {
        let net = NetOptions::parse(text)?;
        add(&format!("net{number}"), What::Net(net));
    }
    for (number, text) in args.share.iter().enumerate() {
        let share = ShareOptions::parse(text)?;
        if !tags.insert(share.tag().to_owned()) {
            bail!(
                "--share: tag '{}' is there twice; give each folder its own",
                share.tag()
            );
        }
        add(&format!("share{number}"), What::Share(share));
    }
    if let Some(text) = &args.vsock {
        add("vsock", What::Vsock(VsockOptions::parse(text)?));
    }
    for (number, text) in args.pmem.iter().enumerate() {
        add(&format!("pmem{number}"), What::Pmem(text.clone()));
    }
    if let Some(text) = &args.balloon {
        add(
            "balloon",
            What::Balloon(BalloonOptions::parse(text, memory)?),
        );
    }
    if console(args)? == ConsoleKind::Virtio {
        add("console", What::Console);
    }
    match args.rng.as_deref() {
        None | Some("on") => add("rng", What::Rng),
        Some("off") => {}
        Some(other) => bail!("--rng '{other}' is not known; use on or off"),
    }
    Ok(wanted)
}

/// The console that the options ask for.
///
/// # Errors
/// A word that names none.
pub fn console(args: &MachineArgs) -> Result<ConsoleKind> {
    let text = args.console.as_deref();
    text.map_or(Ok(ConsoleKind::Serial), ConsoleKind::parse)
}

/// The root file system on the first disk, in words for the kernel's command line.
#[must_use]
pub fn root(args: &MachineArgs) -> Option<&'static str> {
    let disk = DiskOptions::parse(args.disk.first()?).ok()?;
    root::words(disk.path())
}

/// Opens what stands behind the devices of a guest, in their order; `console` stands behind the
/// console, and `broker` starts programs ([`fork_broker`]).
///
/// # Errors
/// What cannot be opened, and what would help.
pub fn open(
    wanted: &[Wanted],
    console: Option<&Arc<HvcConsole>>,
    broker: Option<&Arc<Broker>>,
) -> Result<Vec<Box<dyn Backend>>> {
    let mut backends: Vec<Box<dyn Backend>> = Vec::new();
    let disks: Vec<DiskOptions> = wanted
        .iter()
        .filter_map(|wanted| match &wanted.what {
            What::Disk(disk) => Some(disk.clone()),
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
        let backend: Option<Box<dyn Backend>> = match &wanted.what {
            What::Disk(_) => disks.next().map(|disk| Box::new(disk) as Box<dyn Backend>),
            What::Net(net) => {
                let number = nets.next().unwrap_or_default();
                Some(Box::new(net.open(number, broker)?))
            }
            What::Share(share) => {
                let broker = broker.context("nobody starts virtiofsd")?;
                Some(share.open(&wanted.name, broker)?)
            }
            What::Vsock(vsock) => Some(vsock.open()?),
            What::Pmem(text) => {
                let number = pmems.next().unwrap_or_default();
                Some(Box::new(PmemImage::open(text, number)?))
            }
            What::Balloon(balloon) => Some(Box::new(balloon.open())),
            What::Console => console.map(|console| Box::new(Arc::clone(console)) as _),
            What::Rng => Some(Box::new(rng::HostEntropy)),
        };
        backends.push(backend.with_context(|| format!("nothing stands behind {}", wanted.name))?);
    }
    Ok(backends)
}
