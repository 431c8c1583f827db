//! Placement of kernel, initrd and device tree (Documentation/arch/arm64/booting.rst).

use super::{Aarch64, Host};
use crate::arch::{Layout, Request};
use crate::error::PlanError;
use crate::machine::Payload;
use crate::range::{Range, align_up};
use crate::size::show_size;
use crate::switch::Switch;

/// Kernels lie at a multiple of 2 MiB, plus their text offset (booting.rst, section 3).
const KERNEL_ALIGN: u64 = 2 << 20;
/// The largest page of a guest.
const LARGEST_PAGE: u64 = 0x1_0000;
/// The maximum size of a device tree (booting.rst, section 2).
pub const TREE_MAX: u64 = 2 << 20;
/// Kernel and initrd must lie within one window of this size, aligned to 1 GiB (booting.rst,
/// section 3).
const INITRD_WINDOW: u64 = 32 << 30;
const GIB: u64 = 1 << 30;
/// The size of a vCPU's stolen time structure in bytes (Documentation/virt/kvm/arm/pvtime.rst).
pub(super) const STOLEN_TIME_SIZE: u64 = 64;

/// Places the kernel at the start of the first bank, and initrd and device tree directly after it:
/// close together they share huge pages, each of which has to be cleared, and low addresses leave
/// the rest of RAM contiguous. The tree comes last, because it takes much less than its room.
pub(super) fn place(
    ram: &[Range],
    request: &Request<Aarch64>,
    host: &Host,
) -> Result<Payload, PlanError> {
    let bank = first_bank(ram)?;
    let mut next = bank.start();
    let mut entry = next;
    let mut kernel = None;
    if let Some(image) = &request.kernel {
        if let Some(page) = image.page_size
            && !host.guest_pages.contains(&page)
        {
            let offered: Vec<_> = host
                .guest_pages
                .iter()
                .map(|page| show_size(*page))
                .collect();
            return Err(PlanError::PageSize {
                kernel: show_size(page),
                offered: offered.join(", "),
            });
        }
        let base = align_up(bank.start(), KERNEL_ALIGN).unwrap_or(u64::MAX);
        let range = base
            .checked_add(image.text_offset)
            .and_then(|load| Range::new(load, image.image_size))
            .ok_or_else(|| too_small(bank, request, 0))?;
        entry = range.start();
        next = range.end();
        kernel = Some(range);
    }
    let page = page_size(request);
    let mut initrd = None;
    if let Some(size) = request.initrd.filter(|size| *size > 0) {
        let start = align_up(next, page).unwrap_or(u64::MAX);
        let range = Range::new(start, size).ok_or_else(|| too_small(bank, request, 0))?;
        next = range.end();
        initrd = Some(range);
    }
    let info = align_up(next, page).unwrap_or(u64::MAX);
    next = info
        .saturating_add(tree_room(request))
        .saturating_add(stolen_time_room(request))
        .saturating_add(generation_room(request));
    let payload = Payload {
        kernel,
        entry,
        initrd,
        info,
    };
    if next > bank.end()
        || [kernel, initrd]
            .iter()
            .flatten()
            .any(|range| !bank.contains(*range))
    {
        return Err(too_small(bank, request, 0));
    }
    check_window(&payload)?;
    Ok(payload)
}

/// Checks a finished device tree of `size` bytes against the room that was left for it.
pub(super) fn check_tree(
    layout: &Layout<Aarch64>,
    request: &Request<Aarch64>,
    size: u64,
) -> Result<(), PlanError> {
    if size > TREE_MAX {
        return Err(PlanError::BootProtocol(format!(
            "the device tree of {size} bytes is larger than the 2 MiB of the arm64 boot protocol; use fewer vCPUs"
        )));
    }
    match size <= tree_room(request) {
        true => Ok(()),
        false => Err(too_small(first_bank(&layout.ram)?, request, size)),
    }
}

fn first_bank(ram: &[Range]) -> Result<Range, PlanError> {
    ram.first().copied().ok_or(PlanError::NoMemory)
}

fn check_window(payload: &Payload) -> Result<(), PlanError> {
    let (Some(kernel), Some(initrd)) = (payload.kernel, payload.initrd) else {
        return Ok(());
    };
    let window = kernel.start() / GIB * GIB;
    if initrd.last() - window >= INITRD_WINDOW {
        return Err(PlanError::BootProtocol(format!(
            "the initrd of {} ends {} above the kernel's 1 GiB boundary, but the arm64 boot protocol wants both within 32G; use a smaller initrd",
            show_size(initrd.size()),
            show_size(initrd.last() - window + 1),
        )));
    }
    Ok(())
}

/// Bytes of the guest's page, of which initrd, device tree and stolen time lie at multiples, so
/// that it can reserve and free them without touching a neighbour. The largest there is, where the
/// kernel does not say.
fn page_size(request: &Request<Aarch64>) -> u64 {
    let said = request.kernel.as_ref().and_then(|image| image.page_size);
    said.unwrap_or(LARGEST_PAGE)
}

/// Returns an upper bound on the size of the device tree before it is built.
fn tree_room(request: &Request<Aarch64>) -> u64 {
    // A cpu node and its entry in cpu-map take 160 bytes, with six numbers of its caches and a node
    // for each of up to two more it takes 700; all else without the command line takes 4 KiB.
    let cpu = match request.topology.caches.is_empty() {
        true => 256,
        false => 1024,
    };
    let bytes = 0x4000 + cpu * u64::from(request.cpus) + request.cmdline.len() as u64;
    bytes.next_multiple_of(page_size(request))
}

/// Returns the size of the area after the device tree in which KVM reports stolen time: 0 without
/// that feature.
fn stolen_time_room(request: &Request<Aarch64>) -> u64 {
    match request.features.steal_time {
        Switch::Off => 0,
        // Whole pages, because the guest reserves them.
        _ => (STOLEN_TIME_SIZE * u64::from(request.cpus)).next_multiple_of(page_size(request)),
    }
}

/// Returns the area in which KVM reports stolen time, with one structure for each vCPU.
pub(super) fn stolen_time(payload: &Payload, request: &Request<Aarch64>) -> Option<Range> {
    Range::new(payload.info + tree_room(request), stolen_time_room(request))
}

/// Returns the size of the area after that for VMGenID and VMClock, whole pages because the guest maps
/// one of them uncached: 0 without them.
fn generation_room(request: &Request<Aarch64>) -> u64 {
    match request.vmgenid {
        true => 2 * page_size(request),
        false => 0,
    }
}

/// Returns the pages of VMGenID and VMClock.
pub(super) fn generation(payload: &Payload, request: &Request<Aarch64>) -> Option<[Range; 2]> {
    let start = payload.info + tree_room(request) + stolen_time_room(request);
    let page = page_size(request);
    Some([Range::new(start, page)?, Range::new(start + page, page)?])
}

fn too_small(bank: Range, request: &Request<Aarch64>, tree: u64) -> PlanError {
    let mut parts = Vec::new();
    // The arithmetic saturates: an initrd may claim any size.
    let mut need = bank.start().wrapping_neg() & (KERNEL_ALIGN - 1);
    if let Some(image) = &request.kernel {
        parts.push(format!("the kernel takes {} bytes", image.image_size));
        need = need
            .saturating_add(image.text_offset)
            .saturating_add(image.image_size);
    }
    if let Some(size) = request.initrd {
        parts.push(format!("the initrd {size}"));
        need = align_up(need, page_size(request))
            .unwrap_or(u64::MAX)
            .saturating_add(size);
    }
    let tree = tree.max(tree_room(request));
    parts.push(format!("the device tree {tree}"));
    need = align_up(need, page_size(request))
        .unwrap_or(u64::MAX)
        .saturating_add(tree)
        .saturating_add(stolen_time_room(request))
        .saturating_add(generation_room(request));
    let unit = 1 << 20;
    let other_banks = request.memory.saturating_sub(bank.size());
    PlanError::TooSmall {
        memory: show_size(bank.size()),
        needs: parts.join(", "),
        advice: show_size(
            align_up(need, unit)
                .unwrap_or(u64::MAX)
                .saturating_add(other_banks),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Arm64Image, Placement};

    const MIB: u64 = 1 << 20;

    fn host() -> Host {
        Host {
            ipa_limit: Some(48),
            page_size: 4096,
            gic_v2: false,
            gic_v3: true,
            max_vcpus: 512,
            guest_pages: vec![0x1000, 0x1_0000],
            offered: Default::default(),
        }
    }

    /// Returns the header of Debian's 6.12.
    fn image() -> Arm64Image {
        Arm64Image {
            text_offset: 0,
            image_size: 0x2b2_0000,
            page_size: Some(4096),
            placement: Placement::Anywhere,
            big_endian: false,
        }
    }

    fn request(kernel: Option<Arm64Image>, initrd: Option<u64>) -> Request<Aarch64> {
        Request {
            kernel,
            initrd,
            ..Request::new(1, 512 * MIB)
        }
    }

    fn bank(start: u64, size: u64) -> [Range; 1] {
        [Range::new(start, size).expect("a bank")]
    }

    fn placed(start: u64, kernel: Arm64Image, initrd: Option<u64>) -> Payload {
        let ram = bank(start, 512 * MIB);
        place(&ram, &request(Some(kernel), initrd), &host()).expect("room")
    }

    #[test]
    fn the_kernel_lies_at_a_2_mib_boundary_plus_its_text_offset() {
        for (start, text_offset, load) in [
            (0x4000_0000, 0, 0x4000_0000),
            (0x4000_0000, 0x8_0000, 0x4008_0000),
            (0x4001_0000, 0, 0x4020_0000),
            (0x401f_0000, 0x8_0000, 0x4028_0000),
        ] {
            let kernel = Arm64Image {
                text_offset,
                ..image()
            };
            let payload = placed(start, kernel, None);
            assert_eq!(payload.entry, load);
            assert_eq!(payload.kernel, Range::new(load, 0x2b2_0000));
        }
    }

    #[test]
    fn a_kernel_that_wants_to_be_near_the_start_of_ram_is_there() {
        for (placement, big_endian) in [
            (Placement::NearRamBase, false),
            (Placement::NearRamBase, true),
            (Placement::Anywhere, true),
        ] {
            let kernel = Arm64Image {
                placement,
                big_endian,
                ..image()
            };
            assert_eq!(placed(0x4000_0000, kernel, None).entry, 0x4000_0000);
        }
    }

    #[test]
    fn initrd_and_tree_follow_what_the_kernel_takes_with_its_bss() {
        let payload = placed(0x4000_0000, image(), Some(0x12_3456));
        assert_eq!(payload.initrd, Range::new(0x42b2_0000, 0x12_3456));
        assert_eq!(payload.info, 0x42c4_4000);
        let odd = Arm64Image {
            image_size: 0x2b2_0001,
            ..image()
        };
        assert_eq!(placed(0x4000_0000, odd.clone(), Some(1)).info, 0x42b2_2000);
        let large_pages = Arm64Image {
            page_size: Some(0x1_0000),
            ..odd
        };
        assert_eq!(placed(0x4000_0000, large_pages, Some(1)).info, 0x42b4_0000);
    }

    #[test]
    fn a_machine_of_just_the_memory_that_the_plan_names_is_enough() {
        for (page_size, steal_time, vmgenid) in [
            (0x1000, Switch::On, false),
            (0x1000, Switch::On, true),
            (0x1_0000, Switch::Off, true),
            (0x1_0000, Switch::Off, false),
        ] {
            let kernel = Arm64Image {
                page_size: Some(page_size),
                ..image()
            };
            let mut request = request(Some(kernel), Some(0x12_3456));
            request.features.steal_time = steal_time;
            request.vmgenid = vmgenid;
            let ram = |size| bank(0x4000_0000, size);
            let payload = place(&ram(512 * MIB), &request, &host()).expect("room");
            let clocks = stolen_time_room(&request) + generation_room(&request);
            let end = payload.info + tree_room(&request) + clocks - 0x4000_0000;
            let pages = generation(&payload, &request).expect("pages");
            assert_eq!(pages.map(Range::size), [page_size; 2]);
            assert!(
                pages
                    .iter()
                    .all(|page| page.start().is_multiple_of(page_size))
            );
            assert_eq!(vmgenid, pages[1].end() == end + 0x4000_0000);
            assert!(place(&ram(end), &request, &host()).is_ok());
            assert!(place(&ram(end - page_size), &request, &host()).is_err());
        }
    }

    #[test]
    fn without_a_kernel_the_tree_lies_at_the_start() {
        let ram = bank(0x4000_0000, MIB);
        let payload = place(&ram, &request(None, Some(0)), &host()).expect("room");
        assert_eq!((payload.kernel, payload.initrd), (None, None));
        assert_eq!((payload.entry, payload.info), (0x4000_0000, 0x4000_0000));
    }

    #[test]
    fn a_kernel_of_other_pages_is_refused_with_those_there_are() {
        let kernel = Arm64Image {
            page_size: Some(0x4000),
            ..image()
        };
        let ram = bank(0x4000_0000, 512 * MIB);
        let error = place(&ram, &request(Some(kernel), None), &host()).expect_err("no 16K pages");
        assert_eq!(
            error,
            PlanError::PageSize {
                kernel: "16K".to_owned(),
                offered: "4K, 64K".to_owned(),
            }
        );
    }

    #[test]
    fn a_kernel_that_does_not_say_its_page_size_is_believed() {
        let kernel = Arm64Image {
            page_size: None,
            ..image()
        };
        assert_eq!(placed(0x4000_0000, kernel, None).entry, 0x4000_0000);
    }

    #[test]
    fn memory_too_small_is_refused_with_what_would_do() {
        let request = request(Some(image()), Some(16 * MIB));
        let PlanError::TooSmall {
            memory,
            needs,
            advice,
        } = place(&bank(0x4000_0000, 32 * MIB), &request, &host()).expect_err("32M")
        else {
            panic!("another error");
        };
        assert_eq!(memory, "32M");
        assert_eq!(
            needs,
            "the kernel takes 45219840 bytes, the initrd 16777216, the device tree 20480"
        );
        let enough = crate::size::parse_size(&advice).expect("a size");
        assert!(place(&bank(0x4000_0000, enough), &request, &host()).is_ok());
    }

    #[test]
    fn what_cannot_be_anywhere_is_an_error_and_no_overflow() {
        for size in [1 << 40, u64::MAX] {
            let request = request(Some(image()), Some(size));
            let ram = bank(0x4000_0000, 512 * MIB);
            let error = place(&ram, &request, &host()).expect_err("too large");
            assert!(matches!(error, PlanError::TooSmall { .. }), "{error}");
        }
        let top = bank((2 * MIB).wrapping_neg() + 0x1_0000, MIB);
        assert!(place(&top, &request(Some(image()), None), &host()).is_err());
    }

    #[test]
    fn an_initrd_that_leaves_the_kernels_32_gib_is_refused() {
        let request = request(Some(image()), Some(32 << 30));
        let error = place(&bank(0x4000_0000, 64 << 30), &request, &host()).expect_err("32G");
        assert!(matches!(error, PlanError::BootProtocol(_)), "{error}");
        assert!(error.to_string().contains("32G"), "{error}");
    }

    #[test]
    fn a_tree_is_checked_against_the_protocol_and_its_room() {
        let ram = bank(0x4000_0000, 512 * MIB);
        let layout = |info| Layout {
            generation: None,
            ram: ram.to_vec(),
            devices: Vec::new(),
            ports: Vec::new(),
            pmem: Vec::new(),
            pci: None,
            irqchip: super::super::gic::Gic::V2 {
                distributor: ram[0],
                cpu_interface: ram[0],
                interrupts: 64,
            },
            payload: Payload {
                kernel: None,
                entry: info,
                initrd: None,
                info,
            },
        };
        let check = |size| check_tree(&layout(0x4000_0000), &request(None, None), size);
        assert!(matches!(
            check(TREE_MAX + 1),
            Err(PlanError::BootProtocol(_))
        ));
        assert_eq!(check(0x1_0000), Ok(()));
        assert!(matches!(check(0x1_0001), Err(PlanError::TooSmall { .. })));
    }
}
