//! PCI of a planned machine: one bus, its windows, its functions and what takes their MSIs.

use crate::board::Board;
use crate::error::PlanError;
use crate::irq::Spi;
use crate::machine::VIRTIO_MMIO_SIZE;
use crate::range::{Range, Region, align_up};
use serde::Serialize;

/// Functions that a bus holds beside its host bridge.
pub const MOST_FUNCTIONS: usize = 31;
/// Bytes of the configuration space of one bus (PCI Express Base 5.0, section 7.2.2).
pub const ECAM_SIZE: u64 = 1 << 20;
/// Bytes of a function's memory BAR.
pub const BAR_SIZE: u64 = 0x4000;
/// Bytes of an ITS: its registers and the doorbell's frame (Arm IHI 0069, section 12.18).
pub const ITS_SIZE: u64 = 0x2_0000;
/// Bytes of a GICv2m frame (arm,gic.yaml).
pub const V2M_SIZE: u64 = 0x1000;

/// Bytes of the window below 4 GiB: all functions' BARs, and the space that a guest may waste between them.
const LOW_SIZE: u64 = 2 << 20;
/// Bytes of all that lies below 4 GiB, to which it is aligned: the window, ECAM, and what takes MSIs.
const BLOCK: u64 = 4 << 20;
/// Bytes of the window above RAM.
const HIGH_SIZE: u64 = 1 << 20;

/// The PCI bus of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlacedPci {
    /// The functions' configuration spaces.
    pub ecam: Range,
    /// The window for BARs below 4 GiB.
    pub low: Range,
    /// The window for 64-bit BARs above RAM; `None` where it would cost an address bit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub high: Option<Range>,
    /// What takes MSIs.
    pub msi: Msi,
    /// The functions.
    pub functions: Vec<Function>,
}

/// A function of the bus: function 0 of its device number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Function {
    /// Its device number, from 1 on.
    pub number: u32,
    /// The name of the user's device ("disk0").
    pub name: String,
    /// Where its BAR is at first. The guest may move it.
    pub bar: Range,
}

impl Function {
    /// Returns its requester ID, which is an ITS's DeviceID: bus 0, device, function 0.
    #[must_use]
    pub const fn requester(&self) -> u32 {
        self.number << 3
    }
}

/// What takes the MSIs of PCI functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Msi {
    /// The ITS of a GICv3.
    Its {
        /// Its registers.
        window: Range,
    },
    /// A GICv2m frame: each message is an SPI.
    V2m {
        /// Its registers.
        window: Range,
        /// Its first SPI.
        first: Spi,
        /// How many it has.
        count: u32,
    },
    /// The local APICs of a PC.
    LocalApics,
}

impl Msi {
    fn region(self) -> Option<Region> {
        let (name, range) = match self {
            Msi::Its { window } => ("GICv3 ITS", window),
            Msi::V2m { window, .. } => ("GICv2m frame", window),
            Msi::LocalApics => return None,
        };
        Some(Region {
            name: name.into(),
            range,
        })
    }
}

impl PlacedPci {
    pub(crate) fn regions(&self) -> Vec<Region> {
        let named = |name: &'static str, range| Region {
            name: name.into(),
            range,
        };
        let mut regions = vec![
            named("PCI configuration space (ECAM)", self.ecam),
            named("PCI memory window", self.low),
        ];
        regions.extend(
            self.high
                .map(|high| named("PCI memory window, 64-bit", high)),
        );
        regions.extend(self.msi.region());
        regions
    }

    /// Returns the windows that BARs may lie in.
    pub fn windows(&self) -> impl Iterator<Item = Range> + use<> {
        [Some(self.low), self.high].into_iter().flatten()
    }
}

/// The windows of a bus before its MSIs are known: ECAM, the low window, and room for what takes MSIs.
pub(crate) struct Block {
    pub(crate) ecam: Range,
    pub(crate) low: Range,
    pub(crate) msi: Range,
}

/// Finds the place of a block free of `taken`: directly below the lowest RAM, where its place does not depend
/// on how much RAM there is, else the highest below 4 GiB.
///
/// # Errors
/// More functions than a bus holds; no room below 4 GiB.
pub(crate) fn place_block(
    board: &Board,
    functions: usize,
    ram: &[Range],
    taken: &[Range],
) -> Result<Block, PlanError> {
    if functions > MOST_FUNCTIONS {
        return Err(PlanError::NoPciSlot {
            asked: functions as u32,
            most: MOST_FUNCTIONS as u32,
        });
    }
    let mut taken = taken.to_vec();
    // All slots, so that another device moves nothing.
    taken.extend(
        board
            .virtio_mmio
            .and_then(|slots| Range::new(slots.base, u64::from(slots.slots) * VIRTIO_MMIO_SIZE)),
    );
    let mut tops: Vec<u64> = taken.iter().map(|range| range.start()).collect();
    tops.push(1 << 32);
    tops.sort_unstable_by(|a, b| b.cmp(a));
    let below_ram = ram.first().map(|bank| bank.start());
    let block = below_ram
        .into_iter()
        .chain(tops)
        .filter(|top| *top <= 1 << 32)
        .filter_map(|top| (top - top % BLOCK).checked_sub(BLOCK))
        .filter_map(|start| Range::new(start, BLOCK))
        .find(|block| !taken.iter().any(|range| range.overlaps(*block)));
    let part = |offset, size| block.and_then(|block| Range::new(block.start() + offset, size));
    let parts = (
        part(0, LOW_SIZE),
        part(LOW_SIZE, ECAM_SIZE),
        part(LOW_SIZE + ECAM_SIZE, BLOCK - LOW_SIZE - ECAM_SIZE),
    );
    let (Some(low), Some(ecam), Some(msi)) = parts else {
        return Err(PlanError::NoRoomForPci {
            board: board.name.clone(),
            size: BLOCK,
        });
    };
    Ok(Block { ecam, low, msi })
}

/// Returns the window above everything else, whose last address is `below`, if it costs no address bit.
pub(crate) fn place_high(below: Range) -> Option<Range> {
    let high = Range::new(
        align_up(below.last().checked_add(1)?, HIGH_SIZE)?,
        HIGH_SIZE,
    )?;
    let least = crate::width::MIN_BITS;
    (high.bits().max(least) == below.bits().max(least)).then_some(high)
}

/// Places the functions' BARs at the start of the low window.
pub(crate) fn place_functions(low: Range, names: &[String]) -> Vec<Function> {
    let place = |(index, name): (u32, &String)| {
        let start = low.start() + u64::from(index) * BAR_SIZE;
        Some(Function {
            number: index + 1,
            name: name.clone(),
            bar: Range::new(start, BAR_SIZE)?,
        })
    };
    (0..).zip(names).filter_map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aarch64::Aarch64;
    use crate::irq::GicChoice;
    use crate::{Arch, Plan, Request, plan};

    const MIB: u64 = 1 << 20;

    fn board(text: &str) -> Board {
        Board::parse(text).expect("valid")
    }

    fn planned(board: &Board, change: impl FnOnce(&mut Request<Aarch64>)) -> Plan<Aarch64> {
        let mut request = Request {
            pci: vec!["disk0".to_owned(), "net0".to_owned()],
            ..Request::new(1, 512 * MIB)
        };
        change(&mut request);
        let host = crate::aarch64::Host {
            gic_v2: true,
            ..Aarch64::assumed_host(board)
        };
        plan(board, &request, &host).expect("a plan")
    }

    fn pci(plan: &Plan<Aarch64>) -> &PlacedPci {
        plan.layout.pci.as_ref().expect("PCI")
    }

    const VIRT: &str = include_str!("../../boards/virt.toml");

    #[test]
    fn the_bus_lies_below_ram_and_does_not_move_with_it() {
        let virt = board(VIRT);
        let small = planned(&virt, |_| ());
        let large = planned(&virt, |request| request.memory = 8 << 30);
        let bus = pci(&small);
        assert_eq!(bus.low.start(), 0x3fc0_0000);
        assert_eq!(bus.ecam.start(), 0x3fe0_0000);
        assert_eq!((bus.ecam, bus.low), (pci(&large).ecam, pci(&large).low));
        assert_eq!(bus.msi, pci(&large).msi);
        let functions: Vec<_> = bus.functions.iter().map(|f| (f.number, &*f.name)).collect();
        assert_eq!(functions, [(1, "disk0"), (2, "net0")]);
        assert!(bus.functions.iter().all(|f| bus.low.contains(f.bar)));
        assert!(!bus.functions[0].bar.overlaps(bus.functions[1].bar));
        let none = planned(&virt, |request| request.pci.clear());
        assert_eq!(none.layout.pci, None);
    }

    #[test]
    fn the_high_window_costs_no_address_bit() {
        let virt = board(VIRT);
        let with = |memory| {
            let plan = planned(&virt, |request| request.memory = memory);
            (pci(&plan).high.map(Range::start), plan.width.bits)
        };
        assert_eq!(with(512 * MIB), (Some((1 << 30) + 512 * MIB), 32));
        assert_eq!(with(8 << 30), (Some(9 << 30), 34));
        // RAM ends at 16 GiB: a window above it would make 35 bits of 34, and 3 levels of 2.
        assert_eq!(with(15 << 30), (None, 34));
        // Persistent memory lies above the window.
        let plan = planned(&virt, |request| request.pmem = vec![2 * MIB]);
        let high = pci(&plan).high.expect("a window");
        assert!(plan.layout.pmem[0].start() > high.last());
    }

    #[test]
    fn a_board_whose_ram_begins_at_0_has_its_bus_below_4_gib() {
        let bank = VIRT.find("[[memory]]").expect("memory");
        let at_0 =
            VIRT[..bank].to_owned() + &VIRT[bank..].replacen("0x4000_0000", "0x1_0000_0000", 1);
        let plan = planned(&board(&at_0), |_| ());
        assert_eq!(pci(&plan).low.start(), (4 << 30) - BLOCK);
    }

    #[test]
    fn a_gic_v2m_frame_has_spis_above_those_of_the_board() {
        let virt = board(VIRT);
        let plan = planned(&virt, |request| request.gic = GicChoice::V2);
        let Msi::V2m { first, count, .. } = pci(&plan).msi else {
            panic!("a GICv2m frame was wanted");
        };
        // Slots of virtio end at SPI 47.
        assert_eq!((first.0, count), (48, 16));
        assert!(plan.layout.irqchip.interrupts() >= 32 + 48 + 16);
        let none = planned(&virt, |request| {
            request.gic = GicChoice::V2;
            request.pci.clear();
        });
        assert_eq!(none.layout.irqchip.interrupts(), 96);
    }

    #[test]
    fn more_functions_than_a_bus_holds_are_refused() {
        let virt = board(VIRT);
        let mut request: Request<Aarch64> = Request::new(1, 512 * MIB);
        request.pci = (0..32).map(|n| format!("disk{n}")).collect();
        let host = Aarch64::assumed_host(&virt);
        let error = plan(&virt, &request, &host).expect_err("32").to_string();
        assert!(error.contains("32") && error.contains("31"), "{error}");
    }
}
