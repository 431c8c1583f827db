//! The address map: places RAM, devices, interrupt controller and persistent memory, and checks for
//! overlaps.

use crate::arch::{Arch, Request, regions};
use crate::board::{Board, BoardDeviceKind, Share};
use crate::error::PlanError;
use crate::irq::Spi;
use crate::machine::{
    DEVICE_SIZE, DeviceKind, Placed, PlacedGeneration, PlacedPorts, VIRTIO_MMIO_SIZE,
};
use crate::pci::{self, PlacedPci};
use crate::range::{Range, Region};
use crate::size::show_size;
use std::fmt::Display;

/// Guest memory and its banks are multiples of this many bytes: the largest host page, so that a
/// plan holds on every host.
pub const MEMORY_UNIT: u64 = 0x1_0000;

/// The size unit and alignment of persistent memory in bytes: guests add it to their memory map in
/// such pieces (Linux, include/linux/mmzone.h: SUBSECTION_SHIFT).
pub const PMEM_UNIT: u64 = 2 << 20;

/// The address map without the guest's software.
pub(super) struct Map<A: Arch> {
    pub(super) ram: Vec<Range>,
    pub(super) devices: Vec<Placed>,
    pub(super) ports: Vec<PlacedPorts>,
    pub(super) irqchip: A::Irqchip,
    pub(super) pmem: Vec<Range>,
    pub(super) pci: Option<PlacedPci>,
    /// The interrupt of VMGenID and VMClock, if the guest has them.
    pub(super) generation_irq: Option<Spi>,
}

/// Returns the address map with `memory` bytes of RAM.
pub(super) fn map<A: Arch>(
    board: &Board,
    request: &Request<A>,
    host: &A::Host,
    memory: u64,
) -> Result<Map<A>, PlanError> {
    let ram = place_ram(board, memory)?;
    let devices = place_devices(board, &request.virtio)?;
    let irqchip = A::irqchip(board, request, host, &ram)?;
    let pci = place_pci(board, request, &ram, &devices, &irqchip)?;
    let below = regions::<A>(&ram, &devices, &irqchip, &[], pci.as_ref());
    let end = below.iter().map(|region| region.range.last()).max();
    let pmem = place_pmem(&request.pmem, end.unwrap_or(0))?;
    Ok(Map {
        ram,
        devices,
        ports: place_ports(board)?,
        irqchip,
        pmem,
        pci,
        generation_irq: generation_irq(board, request.vmgenid)?,
    })
}

fn place_pci<A: Arch>(
    board: &Board,
    request: &Request<A>,
    ram: &[Range],
    devices: &[Placed],
    irqchip: &A::Irqchip,
) -> Result<Option<PlacedPci>, PlanError> {
    if request.pci.is_empty() {
        return Ok(None);
    }
    let taken: Vec<Range> = regions::<A>(ram, devices, irqchip, &[], None)
        .iter()
        .map(|region| region.range)
        .collect();
    let block = pci::place_block(board, request.pci.len(), ram, &taken)?;
    let highest = taken.iter().max_by_key(|range| range.last());
    Ok(Some(PlacedPci {
        ecam: block.ecam,
        low: block.low,
        high: highest.and_then(|range| pci::place_high(*range)),
        msi: A::msi(board, request, irqchip, block.msi)?,
        functions: pci::place_functions(block.low, &request.pci),
    }))
}

fn generation_irq(board: &Board, is_asked_for: bool) -> Result<Option<Spi>, PlanError> {
    match (is_asked_for, board.vmgenid) {
        (false, _) => Ok(None),
        (true, Some(irq)) => Ok(Some(Spi(irq))),
        (true, None) => Err(PlanError::BoardLacks {
            board: board.name.clone(),
            what: "interrupt for VMGenID and VMClock ([vmgenid])",
        }),
    }
}

pub(super) fn place_ram(board: &Board, memory: u64) -> Result<Vec<Range>, PlanError> {
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
            BoardDeviceKind::Uart16550 => DeviceKind::Uart16550,
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

/// Places devices at I/O ports, which are a separate address space.
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

/// Places persistent memory above everything else, whose last address is `below`.
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

/// Refuses overlaps and shared interrupts; returns the region with the highest address.
pub(super) fn check_overlaps<A: Arch>(board: &Board, map: &Map<A>) -> Result<Region, PlanError> {
    let Map { ram, devices, .. } = map;
    let mut regions = regions::<A>(ram, devices, &map.irqchip, &map.pmem, map.pci.as_ref());
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
    // A name is made only of what shares a line.
    type Line<'a> = (u32, &'a dyn Display);
    let mut lines: Vec<Line<'_>> = Vec::new();
    lines.extend(devices.iter().map(|device| (device.spi.0, device as _)));
    let ports = map.ports.iter();
    lines.extend(ports.filter_map(|device| Some((device.irq?.0, &device.kind as _))));
    let generation = map.generation_irq;
    lines.extend(generation.map(|irq| (irq.0, &PlacedGeneration::NAME as _)));
    lines.sort_by_key(|line| line.0);
    for pair in lines.windows(2) {
        if pair[0].0 == pair[1].0 {
            let mut names = [pair[0].1.to_string(), pair[1].1.to_string()];
            names.sort();
            let [a, b] = names;
            return Err(PlanError::SharedInterrupt {
                board: board.name.clone(),
                line: board.arch.interrupts().0,
                a,
                b,
                spi: pair[0].0,
            });
        }
    }
    regions.pop().ok_or(PlanError::NoMemory)
}
