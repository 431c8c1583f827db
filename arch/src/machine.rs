//! The parts of a planned machine: devices in their windows, and the initial contents of guest
//! memory.

use crate::board::PortKind;
use crate::irq::Spi;
use crate::range::Range;
use serde::Serialize;
use std::borrow::Cow;
use std::fmt;

/// Bytes of a PrimeCell device's register window: its last register is PCellID3 at 0xffc (Arm DDI
/// 0183, section 3.2).
pub const DEVICE_SIZE: u64 = 0x1000;

/// The GPIO line of the power key, as on QEMU's virt machine.
pub const POWER_KEY_LINE: u32 = 3;

/// Bytes of one virtio-mmio register window (virtio 1.2, section 4.2.2; 0x200 by custom).
pub const VIRTIO_MMIO_SIZE: u64 = 0x200;

/// A device in its window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Placed {
    /// What it is.
    pub kind: DeviceKind,
    /// Its registers.
    pub window: Range,
    /// Its interrupt.
    pub spi: Spi,
    /// The name of the user's device ("disk0"), for virtio.
    pub name: Option<String>,
}

impl Placed {
    pub(crate) fn title(&self) -> Cow<'static, str> {
        match &self.name {
            Some(name) => format!("{}: {name}", self.kind).into(),
            None => self.kind.title(),
        }
    }
}

impl fmt::Display for Placed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.title())
    }
}

/// A device at its I/O ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlacedPorts {
    /// What it is.
    pub kind: PortKind,
    /// Its ports; none is above 0xffff.
    pub ports: Range,
    /// Its interrupt, if it has one.
    pub irq: Option<Spi>,
}

/// Kinds of device that a machine can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// ARM PrimeCell UART: the serial console.
    Pl011,
    /// 16550A UART with its registers in memory: the serial console.
    #[serde(rename = "16550")]
    Uart16550,
    /// ARM PrimeCell real-time clock.
    Pl031,
    /// ARM PrimeCell GPIO with the power key on line 3.
    Pl061,
    /// A virtio device over MMIO.
    VirtioMmio {
        /// Its slot.
        slot: u32,
    },
}

impl DeviceKind {
    fn title(self) -> Cow<'static, str> {
        match self {
            DeviceKind::Pl011 => "PL011 serial console".into(),
            DeviceKind::Uart16550 => "16550 serial console".into(),
            DeviceKind::Pl031 => "PL031 real-time clock".into(),
            DeviceKind::Pl061 => "PL061 GPIO, power key".into(),
            DeviceKind::VirtioMmio { slot } => format!("virtio-mmio slot {slot}").into(),
        }
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.title())
    }
}

/// VMGenID and VMClock, by which the guest learns that it was cloned or goes on from an earlier state:
/// pages of RAM that it does not use otherwise, and one interrupt for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PlacedGeneration {
    /// The page that holds the generation ID.
    pub id: Range,
    /// The page that holds the clock. Guests map it cached and the other one, where a device tree names
    /// it, uncached (Linux, drivers/virt/vmgenid.c: vmgenid_add_of).
    pub clock: Range,
    /// Raised when both have changed.
    pub irq: Spi,
}

impl PlacedGeneration {
    /// What messages call the two.
    pub const NAME: &'static str = "VMGenID and VMClock";

    /// Returns the memory that both take together.
    #[must_use]
    pub fn memory(&self) -> Range {
        let size = self.id.size() + self.clock.size();
        // They are neighbours.
        Range::new(self.id.start(), size).unwrap_or(self.id)
    }
}

/// Where the guest's software is loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Payload {
    /// The memory of the kernel, including its BSS.
    pub kernel: Option<Range>,
    /// The first instruction of the boot CPU.
    pub entry: u64,
    /// The initrd.
    pub initrd: Option<Range>,
    /// The first blob: the device tree or the zero page.
    pub info: u64,
}

/// Bytes that the VMM writes to guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    /// What it is ("device tree").
    pub name: &'static str,
    /// Its first guest-physical address.
    pub address: u64,
    /// Its content.
    pub bytes: Vec<u8>,
}
