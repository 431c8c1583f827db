//! The plan of a machine, and the one function that makes it.

use crate::board::{BoardDeviceKind, PortKind, Share};
use crate::cores::Topology;
use crate::irq::{GicChoice, Spi};
use crate::range::Range;
use crate::size::{parse_size, show_size};
use crate::width::{MAX_BITS, Region, Width, WidthPolicy};
use crate::{Arch, Architecture, Board};
use serde::Serialize;
use std::borrow::Cow;
use std::fmt;

/// Guest memory and its banks are multiples of this many bytes: the largest host page, so that a
/// plan holds on every host.
pub const MEMORY_UNIT: u64 = 0x1_0000;

/// Bytes of a PrimeCell device's register window: its last register is PCellID3 at 0xffc (Arm DDI
/// 0183, section 3.2).
pub const DEVICE_SIZE: u64 = 0x1000;

/// The GPIO line of the power key, as on QEMU's virt machine.
pub const POWER_KEY_LINE: u32 = 3;

/// Bytes of one virtio-mmio register window (virtio 1.2, section 4.2.2; 0x200 by custom).
pub const VIRTIO_MMIO_SIZE: u64 = 0x200;

/// Persistent memory comes in multiples of this many bytes, and is aligned to it: guests add it to
/// their memory map in such pieces (Linux, include/linux/mmzone.h: SUBSECTION_SHIFT).
pub const PMEM_UNIT: u64 = 2 << 20;

/// What the user asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Request<A: Arch> {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// How to choose the address width.
    pub width: WidthPolicy,
    /// The interrupt controller; only aarch64 has a choice.
    pub gic: GicChoice,
    /// The kernel's header; a plan without a kernel shows the machine alone.
    pub kernel: Option<A::Kernel>,
    /// The initrd's size in bytes.
    pub initrd: Option<u64>,
    /// The kernel command line.
    pub cmdline: String,
    /// Random numbers for the guest; without them its tree is the same each time.
    pub seeds: Option<Seeds>,
    /// Names of the virtio devices ("disk0"), in the order of their slots.
    pub virtio: Vec<String>,
    /// Bytes of each persistent memory, in the order of their devices.
    pub pmem: Vec<u64>,
    /// What is wanted of the things that KVM offers beside a CPU.
    pub wishes: A::Wishes,
    /// What the guest is told of its cores.
    pub topology: Topology,
}

/// Fresh random numbers for one start of the guest.
#[derive(Clone, PartialEq, Eq)]
pub struct Seeds {
    /// `/chosen/kaslr-seed`: 64 bits that place the kernel in its address space.
    pub kaslr: u64,
    /// `/chosen/rng-seed`: credited to the guest's random number generator.
    pub rng: [u8; 64],
}

impl fmt::Debug for Seeds {
    /// Hides the numbers: they are secrets of the guest.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seeds(hidden)")
    }
}

/// Everything that is decided about a machine before KVM is asked to make it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan<A: Arch> {
    /// The board's name.
    pub board: String,
    /// Where everything lies.
    pub layout: Layout<A>,
    /// The address width, with its reason.
    pub width: Width,
    /// What KVM offers the guest beside a CPU.
    pub features: A::Features,
    /// The vCPUs, by index.
    pub vcpus: Vec<A::Vcpu>,
    /// What the VMM writes to guest memory beside kernel and initrd.
    #[serde(skip)]
    pub blobs: Vec<Blob>,
}

/// Where everything lies.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Layout<A: Arch> {
    /// Banks of RAM, by address.
    pub ram: Vec<Range>,
    /// Devices with their windows and interrupts, in the board's order.
    pub devices: Vec<Placed>,
    /// Devices at I/O ports, in the board's order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PlacedPorts>,
    /// The interrupt controller.
    pub irqchip: A::Irqchip,
    /// Persistent memory, in the order of its devices.
    pub pmem: Vec<Range>,
    /// Kernel, initrd and blobs.
    pub payload: Payload,
}

/// A device in its window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Placed {
    /// What it is.
    pub kind: DeviceKind,
    /// Its registers.
    pub window: Range,
    /// Its interrupt.
    pub spi: Spi,
    /// Which device of the user's it is ("disk0"), for virtio.
    pub name: Option<String>,
}

impl Placed {
    fn title(&self) -> Cow<'static, str> {
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

/// Where the guest's software is put.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Payload {
    /// The memory that the kernel takes, its BSS included.
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

impl<A: Arch> Layout<A> {
    /// Every region of the machine, by address: RAM, devices and interrupt controller.
    #[must_use]
    pub fn regions(&self) -> Vec<Region> {
        regions::<A>(&self.ram, &self.devices, &self.irqchip, &self.pmem)
    }
}

/// Why there is no plan. Each message says the numbers and what would work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A board of another architecture.
    #[error("board '{board}' is for {has} guests; this plan is for {wants}")]
    WrongArchitecture {
        /// The board.
        board: String,
        /// Its architecture.
        has: Architecture,
        /// The plan's.
        wants: Architecture,
    },
    /// No vCPU.
    #[error("0 vCPUs were asked for; use --cpus 1 or more")]
    NoCpus,
    /// More vCPUs than the interrupt controller or the host serves.
    #[error("{asked} vCPUs were asked for; {why}; use --cpus {most} or fewer")]
    TooManyCpus {
        /// Asked for.
        asked: u32,
        /// The most.
        most: u32,
        /// What sets the limit.
        why: String,
    },
    /// No memory.
    #[error("0 bytes of memory were asked for; use --memory 512M, say")]
    NoMemory,
    /// Memory that is no whole number of pages.
    #[error(
        "memory of {asked} bytes is not a multiple of 64 KiB; the next that is: --memory {next}"
    )]
    UnalignedMemory {
        /// Bytes asked for.
        asked: u64,
        /// The next size that fits, as one writes it.
        next: String,
    },
    /// A bank that is not aligned to 64 KiB.
    #[error(
        "RAM bank {bank} of board '{board}' ({range}) is not aligned to 64 KiB; change its base and size"
    )]
    UnalignedBank {
        /// The board.
        board: String,
        /// The bank, from 0.
        bank: usize,
        /// Where it lies.
        range: Range,
    },
    /// Memory that does not fill the board's banks of fixed size.
    #[error(
        "memory of {asked} is less than the banks of fixed size on board '{board}' take ({fixed}); use --memory {fixed} or more"
    )]
    BanksNotFilled {
        /// The board.
        board: String,
        /// Asked for, as one writes it.
        asked: String,
        /// What the banks take.
        fixed: String,
    },
    /// More memory than the board's banks hold.
    #[error(
        "memory of {asked} is more than the banks of board '{board}' hold ({most}); use --memory {most} or less"
    )]
    BanksFull {
        /// The board.
        board: String,
        /// Asked for, as one writes it.
        asked: String,
        /// What the banks hold.
        most: String,
    },
    /// Persistent memory of a size that guests cannot map.
    #[error("{name} has {size} bytes, which is no multiple of 2 MiB; enlarge its file")]
    UnalignedPmem {
        /// What it is.
        name: String,
        /// Its bytes.
        size: u64,
    },
    /// A range that ends past 2^64.
    #[error(
        "{name} at {start:#x} with {size:#x} bytes ends past 2^64; use less memory or a lower base"
    )]
    Wraps {
        /// What it is.
        name: String,
        /// Its first address.
        start: u64,
        /// Its bytes.
        size: u64,
    },
    /// Memory that ends past 2^64, let alone within the host's address bits.
    #[error("memory of {asked} does not fit into the {limit} address bits of this host; {advice}")]
    MemoryWraps {
        /// Asked for, as one writes it.
        asked: String,
        /// Bits that the host offers.
        limit: u8,
        /// What would work.
        advice: String,
    },
    /// Two things in one place.
    #[error(
        "{} ({}) and {} ({}) overlap on board '{board}'; {advice}",
        a.name, a.range, b.name, b.range
    )]
    Overlap {
        /// The board.
        board: String,
        /// The lower one.
        a: Box<Region>,
        /// The other.
        b: Box<Region>,
        /// What would work.
        advice: String,
    },
    /// Two devices on one interrupt.
    #[error("{a} and {b} share {line} {spi} on board '{board}'; give each its own")]
    SharedInterrupt {
        /// The board.
        board: String,
        /// What the architecture calls an interrupt ("SPI").
        line: &'static str,
        /// One.
        a: String,
        /// The other.
        b: String,
        /// The SPI.
        spi: u32,
    },
    /// An interrupt that no controller has.
    #[error(
        "{name} gets {line} {spi} on board '{board}'; {line}s are numbered 0 to {last}; change the board's file"
    )]
    NoSuchInterrupt {
        /// The board.
        board: String,
        /// What the architecture calls an interrupt ("SPI").
        line: &'static str,
        /// The highest that there is.
        last: u32,
        /// The device.
        name: String,
        /// The SPI.
        spi: u32,
    },
    /// More virtio devices than slots.
    #[error("{asked} virtio devices were asked for; board '{board}' has {slots} slots")]
    NoVirtioSlot {
        /// The board.
        board: String,
        /// Asked for.
        asked: u32,
        /// Slots.
        slots: u32,
    },
    /// A machine wider than the host.
    #[error("{name} ends at {last:#x} and needs {need} address bits; this host offers {limit}{only}; {advice}", only = if *fixed { " and no other number" } else { "" })]
    TooWide {
        /// The highest region.
        name: String,
        /// Its last address.
        last: u64,
        /// Bits that it needs.
        need: u8,
        /// Bits that the host offers.
        limit: u8,
        /// Whether the host offers just this width.
        fixed: bool,
        /// What would work.
        advice: String,
    },
    /// `--ipa-bits N` too few for the machine.
    #[error(
        "--ipa-bits {asked} is too few: {name} ends at {last:#x} and needs {need} bits; {advice}"
    )]
    TooNarrow {
        /// Bits asked for.
        asked: u8,
        /// The highest region.
        name: String,
        /// Its last address.
        last: u64,
        /// Bits that it needs.
        need: u8,
        /// What would work.
        advice: String,
    },
    /// `--ipa-bits N` that the host does not offer.
    #[error("--ipa-bits {asked}: this host offers {offered}; use --ipa-bits fit")]
    WidthNotOffered {
        /// Bits asked for.
        asked: u8,
        /// What the host offers ("32 to 44 bits").
        offered: String,
    },
    /// An interrupt controller that the host does not emulate.
    #[error("{asked} is not offered by this host's KVM, which has {offered}; {advice}")]
    IrqchipNotOffered {
        /// Asked for.
        asked: String,
        /// What the host has.
        offered: String,
        /// What would work.
        advice: String,
    },
    /// Something that KVM offers on other hosts.
    #[error("{asked} is not offered by this host's KVM, which has {offered}; leave it out")]
    FeatureNotOffered {
        /// Asked for.
        asked: String,
        /// What the host has.
        offered: String,
    },
    /// Performance counters for vCPUs on cores that have none in common.
    #[error("--pmu on: {0}; pin the vCPUs to CPUs of one kind (--pin), or leave it out")]
    NoCounters(String),
    /// A board that lacks what the plan needs.
    #[error("board '{board}' has no {what}; add it to the board's file")]
    BoardLacks {
        /// The board.
        board: String,
        /// What is missing.
        what: &'static str,
    },
    /// A kernel whose page size the host's CPUs lack.
    #[error(
        "the kernel uses {kernel} pages, which this host's CPUs cannot translate for a guest (they offer {offered}); use a kernel with such pages"
    )]
    PageSize {
        /// The kernel's page size.
        kernel: String,
        /// The host's.
        offered: String,
    },
    /// Memory too small for what is loaded.
    #[error("guest memory of {memory} is too small: {needs}; use --memory {advice} or more")]
    TooSmall {
        /// The memory of the bank that things are loaded to.
        memory: String,
        /// What takes how much.
        needs: String,
        /// Memory that would do.
        advice: String,
    },
    /// A first bank too small for what is loaded, which more memory does not enlarge.
    #[error(
        "the first RAM bank of board '{board}' ({memory}) is too small: {needs}; more memory does not enlarge it: change the board's file"
    )]
    BankTooSmall {
        /// The board.
        board: String,
        /// What the bank holds, as one writes it.
        memory: String,
        /// What takes how much.
        needs: String,
    },
    /// A placement that the boot protocol forbids.
    #[error("{0}")]
    BootProtocol(String),
    /// A device tree that cannot be encoded.
    #[error("{0}")]
    Tree(#[from] armlet_fdt::EncodeError),
}

/// Plans a machine: check, layout, overlap check, width, vCPUs, blobs.
///
/// # Errors
/// [`PlanError`], with the numbers and what would work.
pub fn plan<A: Arch>(
    board: &Board,
    request: &Request<A>,
    host: &A::Host,
) -> Result<Plan<A>, PlanError> {
    check::<A>(board, request)?;
    let map = map::<A>(board, request, host, request.memory)
        .map_err(|error| with_memory_limit::<A>(error, board, request, host))?;
    let highest = check_overlaps::<A>(board, &map)?;
    let width = A::width(&highest, request.width, host)
        .map_err(|error| with_advice::<A>(error, board, request, host))?;
    let features = A::features(request, host)?;
    let Map {
        ram,
        devices,
        ports,
        irqchip,
        pmem,
    } = map;
    let payload = A::payload(&ram, request, host)
        .map_err(|error| with_bank_limit::<A>(error, board, request, host))?;
    let vcpus: Vec<_> = (0..request.cpus)
        .map(|index| A::vcpu(index, &payload, &features, request))
        .collect();
    let layout = Layout {
        ram,
        devices,
        ports,
        irqchip,
        pmem,
        payload,
    };
    let blobs = A::blobs(board, &layout, &vcpus, &features, request)
        .map_err(|error| with_bank_limit::<A>(error, board, request, host))?;
    Ok(Plan {
        board: board.name.clone(),
        layout,
        width,
        features,
        vcpus,
        blobs,
    })
}

fn check<A: Arch>(board: &Board, request: &Request<A>) -> Result<(), PlanError> {
    if board.arch != A::ARCHITECTURE {
        return Err(PlanError::WrongArchitecture {
            board: board.name.clone(),
            has: board.arch,
            wants: A::ARCHITECTURE,
        });
    }
    if request.cpus == 0 {
        return Err(PlanError::NoCpus);
    }
    if request.memory == 0 {
        return Err(PlanError::NoMemory);
    }
    if !request.memory.is_multiple_of(MEMORY_UNIT) {
        let next = (request.memory / MEMORY_UNIT).saturating_add(1);
        return Err(PlanError::UnalignedMemory {
            asked: request.memory,
            next: show_size(next.saturating_mul(MEMORY_UNIT)),
        });
    }
    Ok(())
}

/// Where everything lies but the guest's software.
struct Map<A: Arch> {
    ram: Vec<Range>,
    devices: Vec<Placed>,
    ports: Vec<PlacedPorts>,
    irqchip: A::Irqchip,
    pmem: Vec<Range>,
}

/// The address map with `memory` bytes of RAM.
fn map<A: Arch>(
    board: &Board,
    request: &Request<A>,
    host: &A::Host,
    memory: u64,
) -> Result<Map<A>, PlanError> {
    let ram = place_ram(board, memory)?;
    let devices = place_devices(board, &request.virtio)?;
    let irqchip = A::irqchip(board, request, host, &ram)?;
    let below = regions::<A>(&ram, &devices, &irqchip, &[]);
    let end = below.iter().map(|region| region.range.last()).max();
    let pmem = place_pmem(&request.pmem, end.unwrap_or(0))?;
    Ok(Map {
        ram,
        devices,
        ports: place_ports(board)?,
        irqchip,
        pmem,
    })
}

/// Persistent memory lies above everything else, whose last address is `below`.
fn place_pmem(sizes: &[u64], below: u64) -> Result<Vec<Range>, PlanError> {
    let mut below = below;
    let mut placed = Vec::new();
    for (index, size) in sizes.iter().enumerate() {
        let name = format!("persistent memory {index}");
        let start = (below / PMEM_UNIT)
            .saturating_add(1)
            .saturating_mul(PMEM_UNIT);
        if *size == 0 || !size.is_multiple_of(PMEM_UNIT) {
            return Err(PlanError::UnalignedPmem { name, size: *size });
        }
        let range = Range::new(start, *size).ok_or(PlanError::Wraps {
            name,
            start,
            size: *size,
        })?;
        below = range.last();
        placed.push(range);
    }
    Ok(placed)
}

fn place_ram(board: &Board, memory: u64) -> Result<Vec<Range>, PlanError> {
    let fixed = board
        .memory
        .iter()
        .fold(0_u64, |sum, bank| match bank.share {
            Share::Exactly(size) => sum.saturating_add(size),
            _ => sum,
        });
    let Some(mut left) = memory.checked_sub(fixed) else {
        return Err(PlanError::BanksNotFilled {
            board: board.name.clone(),
            asked: show_size(memory),
            fixed: show_size(fixed),
        });
    };
    let mut ram = Vec::new();
    for (index, bank) in board.memory.iter().enumerate() {
        let size = match bank.share {
            Share::Exactly(size) => size,
            Share::UpTo(most) => left.min(most),
            Share::Rest => left,
        };
        if !matches!(bank.share, Share::Exactly(_)) {
            left -= size;
        }
        if size == 0 {
            continue;
        }
        let range = Range::new(bank.base, size).ok_or_else(|| PlanError::Wraps {
            name: format!("RAM bank {index}"),
            start: bank.base,
            size,
        })?;
        if !(bank.base | size).is_multiple_of(MEMORY_UNIT) {
            return Err(PlanError::UnalignedBank {
                board: board.name.clone(),
                bank: index,
                range,
            });
        }
        ram.push(range);
    }
    if left > 0 {
        return Err(PlanError::BanksFull {
            board: board.name.clone(),
            asked: show_size(memory),
            most: show_size(memory - left),
        });
    }
    ram.sort();
    Ok(ram)
}

fn place_devices(board: &Board, virtio: &[String]) -> Result<Vec<Placed>, PlanError> {
    let window = |name: &str, start, size| {
        Range::new(start, size).ok_or_else(|| PlanError::Wraps {
            name: name.to_owned(),
            start,
            size,
        })
    };
    let mut devices = Vec::new();
    for device in &board.devices {
        let kind = match device.kind {
            BoardDeviceKind::Pl011 => DeviceKind::Pl011,
            BoardDeviceKind::Pl031 => DeviceKind::Pl031,
            BoardDeviceKind::Pl061 => DeviceKind::Pl061,
        };
        devices.push(Placed {
            kind,
            window: window(&kind.to_string(), device.base, DEVICE_SIZE)?,
            spi: Spi(device.spi),
            name: None,
        });
    }
    let slots = board.virtio_mmio.map_or(0, |virtio| virtio.slots);
    if virtio.len() > slots as usize {
        return Err(PlanError::NoVirtioSlot {
            board: board.name.clone(),
            asked: virtio.len() as u32,
            slots,
        });
    }
    if let Some(slots) = board.virtio_mmio {
        for (slot, name) in (0..).zip(virtio) {
            let start = slots
                .base
                .saturating_add(u64::from(slot) * VIRTIO_MMIO_SIZE);
            let kind = DeviceKind::VirtioMmio { slot };
            devices.push(Placed {
                kind,
                window: window(&kind.to_string(), start, VIRTIO_MMIO_SIZE)?,
                spi: Spi(slots.spi.saturating_add(slot)),
                name: Some(name.clone()),
            });
        }
    }
    let (line, count) = board.arch.interrupts();
    match devices.iter().find(|device| device.spi.0 >= count) {
        None => Ok(devices),
        Some(device) => Err(PlanError::NoSuchInterrupt {
            board: board.name.clone(),
            line,
            last: count - 1,
            name: device.kind.to_string(),
            spi: device.spi.0,
        }),
    }
}

/// Ports are a space of their own: nothing there can meet a window of memory.
fn place_ports(board: &Board) -> Result<Vec<PlacedPorts>, PlanError> {
    let mut placed = Vec::new();
    for device in &board.ports {
        let (start, size) = (u64::from(device.base), u64::from(device.kind.ports()));
        placed.push(PlacedPorts {
            kind: device.kind,
            ports: Range::new(start, size).ok_or_else(|| PlanError::Wraps {
                name: device.kind.to_string(),
                start,
                size,
            })?,
            irq: device.irq.map(Spi),
        });
    }
    let mut by_port: Vec<&PlacedPorts> = placed.iter().collect();
    by_port.sort_by_key(|device| device.ports);
    for pair in by_port.windows(2) {
        if pair[0].ports.overlaps(pair[1].ports) {
            let region = |device: &PlacedPorts| {
                Box::new(Region {
                    name: device.kind.to_string().into(),
                    range: device.ports,
                })
            };
            return Err(PlanError::Overlap {
                board: board.name.clone(),
                a: region(pair[0]),
                b: region(pair[1]),
                advice: "change the board's file".to_owned(),
            });
        }
    }
    Ok(placed)
}

fn ram_regions(ram: &[Range]) -> Vec<Region> {
    ram.iter()
        .enumerate()
        .map(|(index, range)| Region {
            name: match ram.len() {
                1 => "guest RAM".into(),
                _ => format!("RAM bank {index}").into(),
            },
            range: *range,
        })
        .collect()
}

/// Every region, by address.
fn regions<A: Arch>(
    ram: &[Range],
    devices: &[Placed],
    irqchip: &A::Irqchip,
    pmem: &[Range],
) -> Vec<Region> {
    let mut regions = ram_regions(ram);
    regions.extend(devices.iter().map(|device| Region {
        name: device.title(),
        range: device.window,
    }));
    regions.extend(A::irqchip_regions(irqchip));
    regions.extend(pmem.iter().enumerate().map(|(index, range)| Region {
        name: format!("persistent memory {index}").into(),
        range: *range,
    }));
    regions.sort_by_key(|region| region.range);
    regions
}

/// Refuses overlaps and shared interrupts; returns the region with the highest address.
fn check_overlaps<A: Arch>(board: &Board, map: &Map<A>) -> Result<Region, PlanError> {
    let Map { ram, devices, .. } = map;
    let mut regions = regions::<A>(ram, devices, &map.irqchip, &map.pmem);
    for pair in regions.windows(2) {
        let [a, b] = pair else { continue };
        if a.range.overlaps(b.range) {
            let is_ram = |region: &Region| ram.contains(&region.range);
            return Err(PlanError::Overlap {
                board: board.name.clone(),
                a: Box::new(a.clone()),
                b: Box::new(b.clone()),
                advice: if is_ram(a) && !is_ram(b) {
                    format!(
                        "that bank holds {} at most",
                        show_size(b.range.start() - a.range.start())
                    )
                } else {
                    "change the board's file".to_owned()
                },
            });
        }
    }
    let mut lines: Vec<(u32, Cow<'static, str>)> = devices
        .iter()
        .map(|device| (device.spi.0, device.title()))
        .collect();
    let ports = map.ports.iter();
    lines.extend(ports.filter_map(|device| Some((device.irq?.0, device.kind.to_string().into()))));
    lines.sort();
    for pair in lines.windows(2) {
        if pair[0].0 == pair[1].0 {
            return Err(PlanError::SharedInterrupt {
                board: board.name.clone(),
                line: board.arch.interrupts().0,
                a: pair[0].1.to_string(),
                b: pair[1].1.to_string(),
                spi: pair[0].0,
            });
        }
    }
    regions.pop().ok_or(PlanError::NoMemory)
}

/// Turns memory that ends past 2^64 into an error that says what the host holds.
fn with_memory_limit<A: Arch>(
    error: PlanError,
    board: &Board,
    request: &Request<A>,
    host: &A::Host,
) -> PlanError {
    let PlanError::Wraps { start, .. } = error else {
        return error;
    };
    let bank = board.memory.iter().find(|bank| bank.base == start);
    let end = Range::new(u64::MAX, 1).filter(|_| bank.is_some());
    let too_wide = end.map(|range| {
        let name = "guest RAM".into();
        A::width(&Region { name, range }, WidthPolicy::Fit, host)
    });
    match too_wide {
        Some(Err(PlanError::TooWide { limit, .. })) => PlanError::MemoryWraps {
            asked: show_size(request.memory),
            limit,
            advice: advice_on_memory(most_memory::<A>(board, request, host, limit), &board.name),
        },
        _ => error,
    }
}

fn advice_on_memory(fits: Option<u64>, board: &str) -> String {
    match fits {
        Some(memory) => format!("use --memory {} or less", show_size(memory)),
        None => format!("no memory size makes board '{board}' fit"),
    }
}

/// Completes an error about the width by the largest memory that fits.
fn with_advice<A: Arch>(
    error: PlanError,
    board: &Board,
    request: &Request<A>,
    host: &A::Host,
) -> PlanError {
    let bits = match &error {
        PlanError::TooWide { limit, .. } => *limit,
        PlanError::TooNarrow { asked, .. } => *asked,
        _ => return error,
    };
    let fits = most_memory::<A>(board, request, host, bits);
    let smaller = advice_on_memory(fits, &board.name);
    match error {
        PlanError::TooWide {
            name,
            last,
            need,
            limit,
            fixed,
            ..
        } => PlanError::TooWide {
            name,
            last,
            need,
            limit,
            fixed,
            advice: match fits {
                Some(_) => smaller,
                None if need <= MAX_BITS => {
                    format!("{smaller}: use a host with {need} bits or another board")
                }
                None => format!("{smaller}: use another board"),
            },
        },
        PlanError::TooNarrow {
            asked,
            name,
            last,
            need,
            ..
        } => PlanError::TooNarrow {
            asked,
            name,
            last,
            need,
            advice: format!("use --ipa-bits fit, or {smaller}"),
        },
        other => other,
    }
}

/// Corrects an error about too little memory where the board's banks make its advice worthless.
fn with_bank_limit<A: Arch>(
    error: PlanError,
    board: &Board,
    request: &Request<A>,
    host: &A::Host,
) -> PlanError {
    let PlanError::TooSmall {
        memory,
        needs,
        advice,
    } = error
    else {
        return error;
    };
    let more = |size| {
        let ram = place_ram(board, size)?;
        A::payload(&ram, request, host).map(|_| ())
    };
    // Banks may fill so that no memory size does, and hold less than was advised.
    match parse_size(&advice).map(more) {
        Ok(Err(PlanError::TooSmall { .. } | PlanError::BanksFull { .. })) => {
            PlanError::BankTooSmall {
                board: board.name.clone(),
                memory,
                needs,
            }
        }
        _ => PlanError::TooSmall {
            memory,
            needs,
            advice,
        },
    }
}

/// The most memory in bytes, at most what was asked for, with which the machine fits `bits` address
/// bits; `None` if none does.
#[must_use]
pub fn most_memory<A: Arch>(
    board: &Board,
    request: &Request<A>,
    host: &A::Host,
    bits: u8,
) -> Option<u64> {
    let fits = |units: u64| {
        map::<A>(board, request, host, units * MEMORY_UNIT)
            .and_then(|map| check_overlaps::<A>(board, &map))
            .is_ok_and(|highest| highest.range.bits() <= bits)
    };
    let fixed: u64 = board
        .memory
        .iter()
        .map(|bank| match bank.share {
            Share::Exactly(size) => size / MEMORY_UNIT,
            _ => 0,
        })
        .sum();
    // More memory never lowers the highest address, so the sizes that fit come first.
    let (mut low, mut high) = (fixed.max(1), request.memory / MEMORY_UNIT);
    if !fits(low) {
        return None;
    }
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if fits(middle) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    Some(low * MEMORY_UNIT)
}

#[cfg(test)]
mod tests;
