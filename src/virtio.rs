//! The virtio devices that the command line asks for.

use crate::cli::MachineArgs;
use anyhow::{Result, bail};
use armlet_arch::size::{parse_memory, show_size};
use armlet_backends::balloon::BalloonOptions;
use armlet_backends::console::ConsoleKind;
use armlet_backends::disk::{self, DiskOptions};
use armlet_backends::net::NetOptions;
use armlet_backends::open::{DeviceOptions, Wanted};
use armlet_backends::pmem::PmemOptions;
use armlet_backends::root;
use armlet_backends::share::ShareOptions;
use armlet_backends::vsock::VsockOptions;
use std::collections::HashSet;

/// The devices that the options of a guest with `memory` bytes ask for, in the order of their slots.
/// Whatever of them is wrong on any host is found here, before anything is opened.
///
/// # Errors
/// An option that cannot be read, or that does not go with another.
pub fn wanted(args: &MachineArgs, memory: u64) -> Result<Vec<Wanted>> {
    let mut wanted = Vec::new();
    let mut tags = HashSet::new();
    let mut add = |name: &str, options| {
        let name = name.to_owned();
        wanted.push(Wanted { name, options });
    };
    let disks = args.disk.iter().map(|text| DiskOptions::parse(text));
    let disks = disks.collect::<Result<Vec<_>>>()?;
    disk::check_ids(&disks)?;
    for (number, disk) in disks.into_iter().enumerate() {
        add(&format!("disk{number}"), DeviceOptions::Disk(disk));
    }
    for (number, text) in args.net.iter().enumerate() {
        let net = NetOptions::parse(text)?;
        add(&format!("net{number}"), DeviceOptions::Net(net));
    }
    for (number, text) in args.share.iter().enumerate() {
        let share = ShareOptions::parse(text)?;
        if !tags.insert(share.tag.clone()) {
            bail!(
                "--share: tag '{}' is there twice; give each folder its own",
                share.tag
            );
        }
        add(&format!("share{number}"), DeviceOptions::Share(share));
    }
    if let Some(text) = &args.vsock {
        add("vsock", DeviceOptions::Vsock(VsockOptions::parse(text)?));
    }
    for (number, text) in args.pmem.iter().enumerate() {
        add(
            &format!("pmem{number}"),
            DeviceOptions::Pmem(PmemOptions::parse(text)?),
        );
    }
    if let Some(text) = &args.balloon {
        let balloon = BalloonOptions::parse(text, parse_memory)?;
        check_balloon(balloon.target, memory)?;
        add("balloon", DeviceOptions::Balloon(balloon));
    }
    if console(args)? == ConsoleKind::Virtio {
        add("console", DeviceOptions::Console);
    }
    match args.rng.as_deref() {
        None | Some("on") => add("rng", DeviceOptions::Rng),
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
    root::words(&disk.path)
}

/// Refuses a balloon of `bytes` that takes all of `memory`.
fn check_balloon(bytes: u64, memory: u64) -> Result<()> {
    if bytes >= memory {
        bail!(
            "--balloon: a balloon of {} leaves nothing of the guest's {}; use less, and leave it what it needs to run",
            show_size(bytes),
            show_size(memory)
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_balloon_leaves_the_guest_some_memory() {
        let wrong = |text: &str| {
            let args = MachineArgs {
                balloon: Some(text.to_owned()),
                ..MachineArgs::default()
            };
            wanted(&args, 1 << 30).expect_err(text).to_string()
        };
        assert!(wrong("size=1G").contains("leaves nothing of the guest's 1G"));
        assert!(wrong("size=512").contains("write 512M"));
    }
}
