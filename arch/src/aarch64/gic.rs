//! The GIC's frames: GICv2 or GICv3, and as many redistributors as there are vCPUs.

use super::{Aarch64, Host};
use crate::arch::Request;
use crate::board::{Board, GicWindows};
use crate::error::PlanError;
use crate::irq::{GicChoice, Spi};
use crate::machine::{DEVICE_SIZE, VIRTIO_MMIO_SIZE};
use crate::pci::{ITS_SIZE, Msi, V2M_SIZE};
use crate::range::{Range, Region, align_up};
use serde::Serialize;

/// Most vCPUs behind a GICv2 (VGIC_V2_MAX_CPUS, include/kvm/arm_vgic.h).
pub const V2_MAX_VCPUS: u32 = 8;
/// Most vCPUs behind a GICv3 (VGIC_V3_MAX_CPUS).
pub const V3_MAX_VCPUS: u32 = 512;
/// A vCPU's redistributor: RD_base and SGI_base, 64 KiB each (Arm IHI 0069, section 12.10).
pub const REDISTRIBUTOR_SIZE: u64 = 0x2_0000;

const FRAME: u64 = 0x1_0000;

/// A placed interrupt controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "version")]
pub enum Gic {
    /// GICv2: at most 8 vCPUs.
    #[serde(rename = "2")]
    V2 {
        /// GICD, 4 KiB.
        distributor: Range,
        /// GICC, 8 KiB.
        cpu_interface: Range,
        /// The number of interrupts, including the 32 private ones.
        interrupts: u32,
    },
    /// GICv3.
    #[serde(rename = "3")]
    V3 {
        /// GICD, 64 KiB.
        distributor: Range,
        /// GICR regions, filled in order by the vCPUs.
        redistributors: Vec<Redistributors>,
        /// The number of interrupts, including the 32 private ones.
        interrupts: u32,
    },
}

/// A run of redistributor frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Redistributors {
    /// Where they lie.
    pub range: Range,
    /// How many vCPUs they serve.
    pub frames: u32,
}

impl Gic {
    /// Returns the version, 2 or 3.
    #[must_use]
    pub const fn version(&self) -> u8 {
        match self {
            Gic::V2 { .. } => 2,
            Gic::V3 { .. } => 3,
        }
    }

    /// Returns the number of interrupts, including the 32 private ones: a multiple of 32, as for
    /// KVM_DEV_ARM_VGIC_GRP_NR_IRQS.
    #[must_use]
    pub const fn interrupts(&self) -> u32 {
        match self {
            Gic::V2 { interrupts, .. } | Gic::V3 { interrupts, .. } => *interrupts,
        }
    }

    pub(super) fn regions(&self) -> Vec<Region> {
        let region = |name: &'static str, range: &Range| Region {
            name: name.into(),
            range: *range,
        };
        match self {
            Gic::V2 {
                distributor,
                cpu_interface,
                ..
            } => vec![
                region("GICv2 distributor", distributor),
                region("GICv2 CPU interface", cpu_interface),
            ],
            Gic::V3 {
                distributor,
                redistributors,
                ..
            } => {
                let mut regions = vec![region("GICv3 distributor", distributor)];
                regions.extend(redistributors.iter().map(|run| Region {
                    name: match run.frames {
                        1 => "GICv3 redistributor (1 vCPU)".into(),
                        frames => format!("GICv3 redistributors ({frames} vCPUs)").into(),
                    },
                    range: run.range,
                }));
                regions
            }
        }
    }
}

pub(super) fn place(
    board: &Board,
    request: &Request<Aarch64>,
    host: &Host,
    ram: &[Range],
) -> Result<Gic, PlanError> {
    let windows = board.gic.ok_or_else(|| PlanError::BoardLacks {
        board: board.name.clone(),
        what: "[gic]",
    })?;
    let version = choose_version(request.gic, host)?;
    check_vcpus(version, request.cpus, host)?;
    let messages = match version {
        2 => messages(board, request)?,
        _ => 0,
    };
    let interrupts = interrupts(board, messages);
    let frame = |name: &str, start, size| {
        Range::new(start, size).ok_or_else(|| PlanError::Wraps {
            name: name.to_owned(),
            start,
            size,
        })
    };
    if version == 2 {
        return Ok(Gic::V2 {
            distributor: frame("GICv2 distributor", windows.distributor, 0x1000)?,
            cpu_interface: frame("GICv2 CPU interface", windows.cpu_interface, 0x2000)?,
            interrupts,
        });
    }
    Ok(Gic::V3 {
        distributor: frame("GICv3 distributor", windows.distributor, FRAME)?,
        redistributors: place_redistributors(board, &windows, request.cpus, ram)?,
        interrupts,
    })
}

fn choose_version(choice: GicChoice, host: &Host) -> Result<u8, PlanError> {
    let refuse = |asked: &str, offered: &str, advice: &str| PlanError::IrqchipNotOffered {
        asked: asked.to_owned(),
        offered: offered.to_owned(),
        advice: advice.to_owned(),
    };
    match (choice, host.gic_v3, host.gic_v2) {
        (GicChoice::Auto | GicChoice::V3, true, _) => Ok(3),
        (GicChoice::Auto | GicChoice::V2, _, true) => Ok(2),
        (GicChoice::V3, false, true) => {
            Err(refuse("a GICv3", "GICv2 only", "use --gic 2 or --gic auto"))
        }
        (GicChoice::V2, true, false) => {
            Err(refuse("a GICv2", "GICv3 only", "use --gic 3 or --gic auto"))
        }
        (_, false, false) => Err(refuse(
            "an interrupt controller in the kernel",
            "no virtual GIC",
            "'armlet probe' on that host says why",
        )),
    }
}

fn check_vcpus(version: u8, asked: u32, host: &Host) -> Result<(), PlanError> {
    let (most, why) = match version {
        2 => (V2_MAX_VCPUS, "a GICv2 serves 8".to_owned()),
        _ if host.max_vcpus < V3_MAX_VCPUS => (
            host.max_vcpus,
            format!("this host's KVM offers {}", host.max_vcpus),
        ),
        _ => (V3_MAX_VCPUS, "KVM's GICv3 serves 512".to_owned()),
    };
    if asked > most {
        return Err(PlanError::TooManyCpus { asked, most, why });
    }
    Ok(())
}

/// The SPIs that a GICv2m frame has for each PCI function: a queue's each, and one for changes. Drivers that
/// get fewer than they ask for have their queues share one.
const MESSAGES: u32 = 8;
/// The most SPIs that KVM gives a guest: 992 interrupts, of which 32 are private.
const MOST_SPIS: u32 = 960;

/// Returns how many SPIs the GICv2m frame has, if there is one.
fn messages(board: &Board, request: &Request<Aarch64>) -> Result<u32, PlanError> {
    let wanted = MESSAGES.saturating_mul(request.pci.len() as u32);
    match wanted.min(MOST_SPIS.saturating_sub(spis(board))) {
        0 if wanted > 0 => Err(PlanError::BoardLacks {
            board: board.name.clone(),
            what: "SPI left for a GICv2m frame",
        }),
        count => Ok(count),
    }
}

/// Returns what takes the MSIs of PCI functions, with its registers in `room`.
pub(super) fn msi(
    board: &Board,
    request: &Request<Aarch64>,
    gic: &Gic,
    room: Range,
) -> Result<Msi, PlanError> {
    let window = |name: &str, size| {
        Range::new(room.start(), size).ok_or_else(|| PlanError::Wraps {
            name: name.to_owned(),
            start: room.start(),
            size,
        })
    };
    Ok(match gic {
        Gic::V3 { .. } => Msi::Its {
            window: window("GICv3 ITS", ITS_SIZE)?,
        },
        Gic::V2 { .. } => Msi::V2m {
            window: window("GICv2m frame", V2M_SIZE)?,
            first: Spi(spis(board)),
            count: messages(board, request)?,
        },
    })
}

/// Returns the smallest number of interrupts that the board's devices need, with `messages` SPIs more: the
/// guest initialises them all at its start.
fn interrupts(board: &Board, messages: u32) -> u32 {
    let spis = spis(board) + messages;
    // 64 to 992 in steps of 32 (arch/arm64/kvm/vgic/vgic-kvm-device.c: vgic_set_common_attr).
    (32 + spis.next_multiple_of(32)).clamp(64, 992)
}

/// Returns the first SPI above those of the board's devices.
fn spis(board: &Board) -> u32 {
    let devices = board.devices.iter().map(|device| device.spi + 1);
    let virtio = board
        .virtio_mmio
        .iter()
        .map(|slots| slots.spi + slots.slots);
    let vmgenid = board.vmgenid.map(|spi| spi + 1);
    devices.chain(virtio).chain(vmgenid).max().unwrap_or(0)
}

/// Places redistributors in the board's window first, then in the first gap above RAM.
fn place_redistributors(
    board: &Board,
    windows: &GicWindows,
    vcpus: u32,
    ram: &[Range],
) -> Result<Vec<Redistributors>, PlanError> {
    let first = vcpus.min(windows.redistributor_frames);
    let mut runs = Vec::new();
    if first > 0 {
        runs.push(run(windows.redistributors, first)?);
    }
    if vcpus > first {
        let mut taken = device_windows(board);
        taken.extend(Range::new(windows.distributor, FRAME));
        taken.extend(runs.iter().map(|run| run.range));
        taken.extend(ram);
        runs.push(first_gap(ram, &taken, vcpus - first)?);
    }
    Ok(runs)
}

fn run(start: u64, frames: u32) -> Result<Redistributors, PlanError> {
    let size = u64::from(frames) * REDISTRIBUTOR_SIZE;
    let range = Range::new(start, size).ok_or_else(|| PlanError::Wraps {
        name: "GICv3 redistributors".to_owned(),
        start,
        size,
    })?;
    Ok(Redistributors { range, frames })
}

/// Returns the lowest run of frames directly above a bank of RAM, or above what lies there, that is
/// free of `taken`.
fn first_gap(ram: &[Range], taken: &[Range], frames: u32) -> Result<Redistributors, PlanError> {
    let lowest = ram.first().ok_or(PlanError::NoMemory)?;
    let mut starts: Vec<u64> = taken
        .iter()
        .filter(|range| range.start() >= lowest.start())
        .map(|range| align_up(range.end(), FRAME).unwrap_or(u64::MAX))
        .collect();
    starts.sort_unstable();
    let is_free = |run: &Redistributors| !taken.iter().any(|range| range.overlaps(run.range));
    starts
        .into_iter()
        .map(|start| run(start, frames))
        .find(|run| run.as_ref().map_or(true, is_free))
        .unwrap_or(Err(PlanError::NoMemory))
}

/// Returns the windows of the board's devices, including empty virtio slots, so that another device
/// moves nothing.
fn device_windows(board: &Board) -> Vec<Range> {
    let devices = board.devices.iter();
    let mut windows: Vec<Range> = devices
        .filter_map(|device| Range::new(device.base, DEVICE_SIZE))
        .collect();
    windows.extend(
        board
            .virtio_mmio
            .and_then(|slots| Range::new(slots.base, u64::from(slots.slots) * VIRTIO_MMIO_SIZE)),
    );
    windows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Arch;

    const VIRT: &str = include_str!("../../../boards/virt.toml");
    const GIB: u64 = 1 << 30;

    fn host(v2: bool, v3: bool) -> Host {
        Host {
            gic_v2: v2,
            gic_v3: v3,
            max_vcpus: 512,
            ..Aarch64::assumed_host(&board(VIRT))
        }
    }

    fn board(text: &str) -> Board {
        Board::parse(text).expect("a valid board")
    }

    fn request(cpus: u32, gic: GicChoice) -> Request<Aarch64> {
        Request {
            gic,
            ..Request::new(cpus, GIB)
        }
    }

    fn placed(board: &Board, cpus: u32, ram: &[(u64, u64)]) -> Result<Gic, PlanError> {
        let ram: Vec<_> = ram
            .iter()
            .map(|(start, size)| Range::new(*start, *size).expect("a range"))
            .collect();
        let request = request(cpus, GicChoice::Auto);
        place(board, &request, &host(false, true), &ram)
    }

    fn runs(gic: Result<Gic, PlanError>) -> Vec<(u64, u32)> {
        match gic.expect("a GIC") {
            Gic::V3 { redistributors, .. } => redistributors
                .iter()
                .map(|run| {
                    assert_eq!(run.range.size(), u64::from(run.frames) * REDISTRIBUTOR_SIZE);
                    (run.range.start(), run.frames)
                })
                .collect(),
            Gic::V2 { .. } => panic!("a GICv3 was wanted"),
        }
    }

    #[test]
    fn the_version_is_the_one_asked_for_or_the_newest_there_is() {
        let version = |choice, v2, v3| choose_version(choice, &host(v2, v3)).ok();
        for (choice, both, only_v2, only_v3) in [
            (GicChoice::Auto, Some(3), Some(2), Some(3)),
            (GicChoice::V2, Some(2), Some(2), None),
            (GicChoice::V3, Some(3), None, Some(3)),
        ] {
            assert_eq!(version(choice, true, true), both, "{choice}");
            assert_eq!(version(choice, true, false), only_v2, "{choice}");
            assert_eq!(version(choice, false, true), only_v3, "{choice}");
            assert_eq!(version(choice, false, false), None, "{choice}");
        }
        let error = choose_version(GicChoice::V3, &host(true, false)).expect_err("GICv2 only");
        assert_eq!(
            error.to_string(),
            "a GICv3 is not offered by this host's KVM, which has GICv2 only; use --gic 2 or --gic auto"
        );
    }

    #[test]
    fn redistributors_that_do_not_fit_the_window_go_above_ram() {
        let virt = board(VIRT);
        let ram = [(GIB, GIB)];
        assert_eq!(runs(placed(&virt, 123, &ram)), [(0x080a_0000, 123)]);
        let two = [(0x080a_0000, 123), (2 * GIB, 7)];
        assert_eq!(runs(placed(&virt, 130, &ram)), two);
    }

    #[test]
    fn the_second_region_takes_the_lowest_gap_that_is_free() {
        let virt = board(VIRT);
        let next = |ram: &[(u64, u64)]| runs(placed(&virt, 130, ram))[1].0;
        // Between two banks, where that keeps the machine narrow.
        assert_eq!(next(&[(GIB, GIB), (1 << 48, GIB)]), 2 * GIB);
        // 64 KiB cannot hold 7 frames of 128 KiB.
        assert_eq!(
            next(&[(GIB, GIB), (2 * GIB + 0x1_0000, GIB)]),
            3 * GIB + 0x1_0000
        );
        // A device directly above RAM is skipped.
        let above = board(&VIRT.replace("0x0901_0000", "0x8000_0000"));
        let gic = placed(&above, 130, &[(GIB, GIB)]);
        assert_eq!(runs(gic)[1].0, 2 * GIB + 0x1_0000);
    }

    #[test]
    fn no_room_above_ram_is_an_error() {
        let virt = board(VIRT);
        let top = 0x1_0000_u64.wrapping_neg();
        let error = placed(&virt, 130, &[(top, 0x1_0000)]).expect_err("nothing lies above");
        assert!(matches!(error, PlanError::Wraps { .. }), "{error}");
    }

    #[test]
    fn vcpus_are_bounded_by_the_version_and_the_host() {
        let most = |version, host: &Host| {
            (1..=600)
                .take_while(|vcpus| check_vcpus(version, *vcpus, host).is_ok())
                .count()
        };
        assert_eq!(most(2, &host(true, false)), 8);
        assert_eq!(most(3, &host(false, true)), 512);
        let small = Host {
            max_vcpus: 200,
            ..host(false, true)
        };
        assert_eq!(most(3, &small), 200);
    }

    #[test]
    fn the_distributor_counts_what_the_board_needs_in_steps_of_32() {
        // 32 private ones, and SPIs up to 47 for virtio.
        assert_eq!(interrupts(&board(VIRT), 0), 96);
        let without_virtio = VIRT.split("# Slots of").next().expect("a split");
        assert_eq!(interrupts(&board(without_virtio), 0), 64);
        for other in ["spi = 7", "spi = 8"] {
            let last = board(&VIRT.replace(other, "spi = 959"));
            assert_eq!(interrupts(&last, 0), 992, "{other}");
        }
    }

    #[test]
    fn a_gic_v2_has_the_frames_of_its_binding() {
        let request = request(8, GicChoice::V2);
        let gic = place(&board(VIRT), &request, &host(true, true), &[]).expect("a GICv2");
        let regions: Vec<_> = gic.regions().iter().map(|region| region.range).collect();
        assert_eq!(
            regions,
            [
                Range::new(0x0800_0000, 0x1000).expect("GICD"),
                Range::new(0x0801_0000, 0x2000).expect("GICC"),
            ]
        );
    }
}
