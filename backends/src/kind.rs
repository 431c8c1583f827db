//! Kinds of virtio devices: what a user may ask for of each, and what comes of it.
//!
//! A kind is a [`Kind`], which is a row of the table in [`crate::open`], and a type with
//! [`DeviceOptions`]. The command line, its help and the plan know kinds by these alone.

use crate::backend::Backend;
use crate::broker::Broker;
use anyhow::Result;
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

/// A kind of virtio device: its option, and how that is read.
pub struct Kind {
    /// What the option is called, without dashes, and the device in messages: "disk".
    pub name: &'static str,
    /// The option's letter with its dash, if it has one.
    pub letter: Option<&'static str>,
    /// What stands for its value in the help: "DISK".
    pub value: &'static str,
    /// What the help says, in lines of up to 60 characters.
    pub help: &'static str,
    /// Whether a guest may have several.
    pub repeats: bool,
    /// Its place among the kinds in the order of a machine's slots. The help has that of the table.
    pub slot: u8,
    /// The value of an option that is not given, where that asks for a device too.
    pub default: Option<&'static str>,
    /// Reads a value.
    pub parse: fn(&str, &Guest) -> Parsed,
}

/// The device that a value asks for; `None` where it asks for none.
pub type Parsed = Result<Option<Box<dyn DeviceOptions>>>;

/// What a virtio device is connected to the guest by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// What suits it best: MMIO.
    #[default]
    Auto,
    /// A window of registers (virtio 1.2, section 4.2).
    Mmio,
    /// A PCI function (virtio 1.2, section 4.1).
    Pci,
}

impl FromStr for Transport {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Transport::Auto),
            "mmio" => Ok(Transport::Mmio),
            "pci" => Ok(Transport::Pci),
            other => Err(format!(
                "transport '{other}' is not known; use auto, mmio or pci"
            )),
        }
    }
}

/// What is known of the guest when its devices are asked for, and how sizes are written.
pub struct Guest {
    /// Its memory in bytes.
    pub memory: u64,
    /// Reads a size of memory.
    pub parse_size: fn(&str) -> Result<u64, String>,
    /// Writes a size.
    pub show_size: fn(u64) -> String,
}

/// What guests tell devices of a kind apart by.
pub struct Identity<'a> {
    /// What it is called in the option.
    pub name: &'static str,
    /// What it is.
    pub value: &'a str,
    /// The device's file, for messages.
    pub path: &'a Path,
}

/// Where a device's backend is opened.
pub struct Place<'a> {
    /// The device's name: "disk0".
    pub name: &'a str,
    /// Its number among those of its kind, from 0.
    pub number: usize,
    /// The guest's memory in bytes.
    pub memory: u64,
    /// Starts programs and opens things later, where a device [needs](DeviceOptions::needs_broker) that.
    pub broker: Option<&'a Arc<Broker>>,
    /// Whether clients may have devices changed while the guest runs.
    pub changes: bool,
    /// What stands behind the console that is [connected to the terminal](DeviceOptions::is_terminal).
    pub console: Option<&'a Arc<dyn Backend + Sync>>,
}

/// What a device needs of the host once the process is confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A thread of its own.
    Thread,
    /// To read and write images.
    Storage,
    /// To find out why a page of a file that is guest memory is missing, on the vCPU that meets it.
    Pages,
    /// To talk through sockets that are connected.
    Sockets,
    /// To ask the broker for programs and connections.
    Broker,
    /// To control a TAP that is open.
    Tap,
    /// To control vhost devices that are open.
    Vhost,
    /// To discard blocks of a block device.
    Discards,
    /// To use a ring of io_uring.
    Ring,
    /// To look at another image.
    Images,
    /// To follow the registers of PCI functions: routes of MSIs, and kicks.
    Pci,
    /// To read and change vCPUs, and to say where they stop; no device does.
    Debugger,
    /// To save and restore vCPUs; no device does.
    Snapshots,
    /// To restore a machine; no device does.
    Restoring,
    /// To record which pages a restored guest uses; no device does.
    Recording,
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Need::Thread => "work in threads of devices",
            Need::Storage => "read and write images",
            Need::Pages => "look for missing pages of persistent memory",
            Need::Sockets => "talk through connected sockets",
            Need::Broker => "ask the broker",
            Need::Tap => "control the TAP",
            Need::Vhost => "control vhost",
            Need::Discards => "discard blocks",
            Need::Ring => "use a ring of io_uring",
            Need::Images => "look at other images",
            Need::Pci => "follow PCI functions",
            Need::Debugger => "debug vCPUs",
            Need::Snapshots => "save the machine",
            Need::Restoring => "restore the machine",
            Need::Recording => "record the pages that the guest needs first",
        })
    }
}

/// A device as it is asked for: public fields, for each kind a type.
pub trait DeviceOptions: Send + Sync {
    /// Its kind.
    fn kind(&self) -> &'static Kind;

    /// Checks it against the guest. What can be wrong with it alone is checked by whoever opens it.
    ///
    /// # Errors
    /// What does not go with the guest, and what would.
    fn check_for(&self, guest: &Guest) -> Result<()> {
        let _ = guest;
        Ok(())
    }

    /// What no other device of its kind may have.
    fn identity(&self) -> Option<Identity<'_>> {
        None
    }

    /// Whether another process works in guest memory for it.
    fn shares_memory(&self) -> bool {
        false
    }

    /// Whether a program works for it, or it opens something while the guest runs: a broker's work.
    fn needs_broker(&self) -> bool {
        false
    }

    /// What it needs of the host once the process is confined, beyond what all devices do.
    fn needs(&self) -> Vec<Need> {
        Vec::new()
    }

    /// What it needs besides where clients may have it changed while the guest runs.
    fn needs_for_changes(&self) -> Vec<Need> {
        Vec::new()
    }

    /// Whether the terminal is connected to it.
    fn is_terminal(&self) -> bool {
        false
    }

    /// Words for the kernel's command line where the user gives none; `number` counts those of its
    /// kind from 0.
    fn cmdline(&self, number: usize) -> Option<&'static str> {
        let _ = number;
        None
    }

    /// Bytes of persistent memory that the guest gets with it, for a plan.
    ///
    /// # Errors
    /// A file that cannot be looked at.
    fn pmem_size(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Opens what stands behind it: the first step of [`Backend`].
    ///
    /// # Errors
    /// What cannot be opened, and what would help.
    fn open_backend(&self, place: &Place<'_>) -> Result<Box<dyn Backend>>;
}
