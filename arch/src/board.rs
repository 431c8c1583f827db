//! Board profiles: what a TOML file of `boards/` says, as a value.

mod error;
mod fields;
mod layers;
mod profile;
mod read;
mod signature;

pub use error::{BoardError, Place};
pub use layers::Find;
pub use profile::Profile;
pub use signature::{Identity, Signature, recognize};

use crate::aarch64::Offered;
use crate::architecture::Architecture;
use crate::backing::HugePages;
use crate::cores::{Core, HostCores, PinPolicy};
use crate::irq::GicChoice;
use crate::midr::Midr;
use crate::switch::Switch;
use crate::width::WidthPolicy;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A board: the machine that a guest gets and the host that it is meant for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Board {
    /// The name that `--board` takes.
    pub name: String,
    /// One sentence for `armlet boards`.
    pub description: String,
    /// The guest's instruction set.
    pub arch: Architecture,
    /// What to assume of the host when no host is asked.
    pub host: AssumedHost,
    /// What the guest gets where no flag says otherwise.
    pub guest: GuestDefaults,
    /// Banks of RAM, in the order of the file.
    pub memory: Vec<Bank>,
    /// The GIC's windows; present on aarch64 boards.
    pub gic: Option<GicWindows>,
    /// Devices at fixed places.
    pub devices: Vec<BoardDevice>,
    /// Devices at I/O ports; x86_64 boards alone have ports.
    pub ports: Vec<PortDevice>,
    /// Slots for virtio devices.
    pub virtio_mmio: Option<VirtioSlots>,
    /// The interrupt of VMGenID and VMClock.
    pub vmgenid: Option<u32>,
}

/// Facts to assume about a host when planning without it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AssumedHost {
    /// The maximum of guest-physical address bits.
    pub ipa_limit: u8,
    /// Page size in bytes.
    pub page_size: u64,
    /// GIC versions that KVM emulates (2, 3).
    pub gic: Vec<u8>,
    /// Page sizes in bytes that guest kernels may use, and host kernels too.
    pub guest_pages: Vec<u64>,
    /// The optional features that KVM offers on its cores.
    pub offered: Offered,
    /// The memory sizes of such hosts in bytes, in ascending order.
    pub ram: Vec<u64>,
    /// Its cores by kind, in the order of their numbers. A board without any is generic: nothing
    /// is known of the host.
    pub clusters: Vec<Cluster>,
    /// Notes on such hosts.
    pub notes: Vec<HostNote>,
}

impl AssumedHost {
    /// Returns its cores, numbered from 0 in the order of the board's file.
    #[must_use]
    pub fn cores(&self) -> HostCores {
        let mut cores = Vec::new();
        for cluster in &self.clusters {
            for _ in 0..cluster.cpus {
                cores.push(Core {
                    number: cores.len() as u32,
                    kind: cluster.midr,
                    capacity: cluster.capacity,
                });
            }
        }
        HostCores {
            cores,
            names: self.core_names(),
        }
    }

    /// Returns the names of its kinds of core, where they have one.
    #[must_use]
    pub fn core_names(&self) -> Vec<(Midr, String)> {
        let clusters = self.clusters.iter();
        clusters
            .filter_map(|cluster| Some((cluster.midr?, cluster.core.clone())))
            .collect()
    }
}

/// Cores of one kind with successive numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Their name ("Cortex-A76").
    pub core: String,
    /// What they are, by MIDR_EL1.
    pub midr: Option<Midr>,
    /// How many there are.
    pub cpus: u32,
    /// Computing power relative to the other kinds; 1024 is the maximum.
    pub capacity: u32,
}

/// How much a fact about a host matters, most first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Severity {
    /// No guest runs.
    Stops,
    /// Some guests do not run, or run slower.
    Limits,
    /// Good to know.
    Note,
}

/// What to know of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostNote {
    /// How much it matters.
    pub severity: Severity,
    /// What it is.
    pub what: String,
    /// What to do about it.
    pub fix: String,
}

/// Defaults for options that are not given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestDefaults {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Kernel command line.
    pub cmdline: String,
    /// GIC version.
    pub gic: GicChoice,
    /// IPA bits.
    pub width: WidthPolicy,
    /// Which CPUs the vCPUs run on.
    pub pin: PinPolicy,
    /// What pages its memory is made of.
    pub huge_pages: HugePages,
    /// Performance counters.
    pub pmu: Switch,
    /// Scalable vectors.
    pub sve: Switch,
    /// Pointer authentication.
    pub pauth: Switch,
    /// VMGenID and VMClock.
    pub vmgenid: Switch,
}

/// A bank of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bank {
    /// Its first guest-physical address.
    pub base: u64,
    /// How much of the guest's memory lies there.
    pub share: Share,
}

/// How much of the guest's memory a bank takes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Share {
    /// Exactly this much.
    Exactly(u64),
    /// The remainder, up to this much.
    UpTo(u64),
    /// The whole remainder.
    Rest,
}

/// Where the interrupt controller's frames lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GicWindows {
    /// GICD: 64 KiB (GICv3) or 4 KiB (GICv2).
    pub distributor: u64,
    /// GICC of GICv2: 8 KiB.
    pub cpu_interface: u64,
    /// GICR of GICv3: 128 KiB for each vCPU.
    pub redistributors: u64,
    /// How many redistributor frames fit there; further ones go above RAM.
    pub redistributor_frames: u32,
}

/// A device at a fixed place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardDevice {
    /// What it is.
    pub kind: BoardDeviceKind,
    /// Its first guest-physical address.
    pub base: u64,
    /// Its SPI number (INTID - 32).
    pub spi: u32,
}

/// Kinds of device that a board file can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BoardDeviceKind {
    /// ARM PrimeCell UART.
    Pl011,
    /// 16550A UART, with its registers in memory.
    Uart16550,
    /// ARM PrimeCell real-time clock.
    Pl031,
    /// ARM PrimeCell GPIO; its line 3 is the power key.
    Pl061,
}

/// A device at I/O ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortDevice {
    /// What it is.
    pub kind: PortKind,
    /// Its first port.
    pub base: u16,
    /// Its interrupt (GSI); there for the kinds that have one.
    pub irq: Option<u32>,
}

/// Kinds of device that stand at I/O ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortKind {
    /// 16550A UART: the serial console.
    #[serde(rename = "16550")]
    Uart16550,
    /// MC146818 real-time clock and CMOS memory.
    Cmos,
    /// Keyboard controller without a keyboard; its command 0xfe resets.
    I8042,
    /// The reset control register of Intel's chipsets.
    Reset,
    /// ACPI's sleep registers, and the power button's interrupt.
    Acpi,
}

impl PortKind {
    const ALL: [PortKind; 5] = [
        PortKind::Uart16550,
        PortKind::Cmos,
        PortKind::I8042,
        PortKind::Reset,
        PortKind::Acpi,
    ];

    /// Returns the name in board files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            PortKind::Uart16550 => "16550",
            PortKind::Cmos => "cmos",
            PortKind::I8042 => "i8042",
            PortKind::Reset => "reset",
            PortKind::Acpi => "acpi",
        }
    }

    /// Returns how many ports it takes.
    #[must_use]
    pub const fn ports(self) -> u16 {
        match self {
            PortKind::Uart16550 => 8,
            PortKind::Cmos | PortKind::Acpi => 2,
            // Data at 0, control port B at 1, command at 4.
            PortKind::I8042 => 5,
            PortKind::Reset => 1,
        }
    }

    /// Returns whether it raises an interrupt.
    #[must_use]
    pub const fn interrupts(self) -> bool {
        matches!(self, PortKind::Uart16550 | PortKind::Acpi)
    }
}

impl fmt::Display for PortKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PortKind::Uart16550 => "16550 serial console",
            PortKind::Cmos => "CMOS real-time clock",
            PortKind::I8042 => "i8042 keyboard controller",
            PortKind::Reset => "reset control register",
            PortKind::Acpi => "ACPI sleep registers, power button",
        })
    }
}

/// Slots for virtio devices over MMIO, 0x200 bytes each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioSlots {
    /// The first slot's address.
    pub base: u64,
    /// How many slots there are.
    pub slots: u32,
    /// SPI of the first slot; the next slot has the next one.
    pub spi: u32,
}
