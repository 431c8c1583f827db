//! Whatever is asked for on whatever board: a sound plan, or an error in one line whose advice
//! works.

use super::{GIB, KIB, MIB, VIRT, board, host, redistributors};
use armlet_arch::aarch64::{self, Aarch64};
use armlet_arch::image::{Arm64Image, Placement};
use armlet_arch::irq::GicChoice;
use armlet_arch::plan::MEMORY_UNIT;
use armlet_arch::size::parse_size;
use armlet_arch::{Arch, Board, Plan, PlanError, Range, Request, Seeds, WidthPolicy, plan};
use armlet_fdt::{Node, Value};
use proptest::prelude::*;
use std::collections::BTreeSet;

/// Addresses where something happens, and any others.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => prop::sample::select(vec![
            0, GIB, 2 * GIB, 4 * GIB, 0x0900_0000, 0x080a_0000, 1 << 34, 1 << 40, 1 << 48,
            1 << 51, (1 << 52) - 0x1_0000, (1 << 63) - 0x1_0000,
        ]),
        3 => (0_u64..1 << 24).prop_map(|number| number << 16),
        1 => 0_u64..1 << 63,
    ]
}

fn size() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (1_u64..1 << 14).prop_map(|units| units << 20),
        2 => (0_u64..1 << 20).prop_map(|units| units << 16),
        2 => (15_u32..64).prop_map(|bits| 1 << bits),
        1 => any::<u64>(),
    ]
}

/// The text of a board file with anything in it, mostly sense.
fn board_text() -> impl Strategy<Value = String> {
    let bank = (address(), 0..6, size()).prop_map(|(base, kind, size)| {
        let share = match kind {
            0 => format!("size = \"{size}\"\n"),
            1 => format!("up-to = \"{size}\"\n"),
            _ => String::new(),
        };
        format!("[[memory]]\nbase = {base:#x}\n{share}")
    });
    let device = ("pl0[136]1", address(), 0_u32..1000).prop_map(|(kind, base, spi)| {
        let base = base & !0xfff;
        format!("[[device]]\nkind = \"{kind}\"\nbase = {base:#x}\nspi = {spi}\n")
    });
    let device = prop_oneof![
        3 => prop::sample::select(vec![
            "[[device]]\nkind = \"pl011\"\nbase = 0x0900_0000\nspi = 1\n".to_owned(),
            "[[device]]\nkind = \"pl031\"\nbase = 0x0901_0000\nspi = 2\n".to_owned(),
            "[[device]]\nkind = \"pl061\"\nbase = 0x0903_0000\nspi = 7\n".to_owned(),
            "[[device]]\nkind = \"pl061\"\nbase = 0x0904_0000\nspi = 8\n".to_owned(),
        ]),
        1 => device,
    ];
    let banks = prop_oneof![
        2 => Just(vec!["[[memory]]\nbase = 0x4000_0000\n".to_owned()]),
        2 => Just(vec![
            "[[memory]]\nbase = 0x4000_0000\nup-to = \"1G\"\n".to_owned(),
            "[[memory]]\nbase = 0x1_0000_0000\n".to_owned(),
        ]),
        3 => prop::collection::vec(bank, 1..4),
    ];
    let gic = prop_oneof![
        3 => Just((0x0800_0000, 0x0801_0000, 0x080a_0000, 123)),
        1 => (address(), address(), address(), 0_u32..600),
    ];
    let virtio = prop_oneof![
        2 => Just("[virtio-mmio]\nbase = 0x0a00_0000\nslots = 32\nspi = 16\n".to_owned()),
        1 => Just(String::new()),
        1 => (address(), 0..600, 0..1000).prop_map(|(base, slots, spi)| {
            let base = base & !0x1ff;
            format!("[virtio-mmio]\nbase = {base:#x}\nslots = {slots}\nspi = {spi}\n")
        }),
    ];
    let vmgenid = prop_oneof![
        3 => Just("[vmgenid]\nspi = 9\n".to_owned()),
        1 => Just(String::new()),
        1 => (0..960).prop_map(|spi| format!("[vmgenid]\nspi = {spi}\n")),
    ];
    let virtio = (virtio, vmgenid).prop_map(|(virtio, vmgenid)| virtio + &vmgenid);
    let pages = prop::sample::subsequence(vec!["\"4K\"", "\"16K\"", "\"64K\""], 1..=3);
    let gics = prop_oneof![
        4 => Just(vec!["2", "3"]),
        1 => prop::sample::subsequence(vec!["2", "3"], 0..=2),
    ];
    let devices = prop::collection::vec(device, 0..4);
    (32..=52, pages, gics, banks, gic, devices, virtio).prop_map(
        |(limit, pages, gics, banks, gic, devices, virtio)| {
            format!(
                "name = \"random\"\narch = \"aarch64\"\n\
                 [host]\nipa-limit = {limit}\npage-size = {}\ngic = [{}]\nguest-pages = [{}]\n\
                 [guest]\ncpus = 1\nmemory = \"512M\"\n\
                 [gic]\ndistributor = {:#x}\ncpu-interface = {:#x}\nredistributors = {:#x}\n\
                 redistributor-frames = {}\n{}{}{virtio}",
                pages[0],
                gics.join(", "),
                pages.join(", "),
                gic.0 & !0xffff,
                gic.1 & !0xffff,
                gic.2 & !0xffff,
                gic.3,
                banks.concat(),
                devices.concat(),
            )
        },
    )
}

fn kernel() -> impl Strategy<Value = Arm64Image> {
    let numbers = prop_oneof![
        4 => (prop::sample::select(vec![0, 0x8_0000]), 1_u64..1 << 28),
        1 => (size(), size()),
    ];
    let page_size = prop::sample::select(vec![None, Some(4 * KIB), Some(16 * KIB), Some(64 * KIB)]);
    (numbers, page_size, any::<bool>(), any::<bool>()).prop_map(
        |((text_offset, image_size), page_size, anywhere, big_endian)| Arm64Image {
            text_offset,
            image_size,
            page_size,
            placement: match anywhere {
                true => Placement::Anywhere,
                false => Placement::NearRamBase,
            },
            big_endian,
        },
    )
}

fn any_request() -> impl Strategy<Value = Request<Aarch64>> {
    let cpus = prop_oneof![8 => 1_u32..9, 4 => 0_u32..500, 1 => any::<u32>()];
    let gic = prop::sample::select(vec![
        GicChoice::Auto,
        GicChoice::Auto,
        GicChoice::V2,
        GicChoice::V3,
    ]);
    let width = prop_oneof![
        3 => Just(WidthPolicy::Fit),
        1 => Just(WidthPolicy::Max),
        1 => any::<u8>().prop_map(WidthPolicy::Exact),
    ];
    let initrd = prop_oneof![4 => Just(None), 4 => (0_u64..1 << 28).prop_map(Some), 1 => size().prop_map(Some)];
    let seeds = prop::option::of(any::<u64>().prop_map(|kaslr| Seeds {
        kaslr,
        rng: [kaslr as u8; 64],
    }));
    let virtio = prop_oneof![10 => Just(0_usize), 3 => 0_usize..5, 1 => 0_usize..40];
    let pmem = prop_oneof![
        9 => Just(Vec::new()),
        3 => prop::collection::vec((1_u64..1 << 20).prop_map(|units| units << 21), 1..4),
        1 => prop::collection::vec(any::<u64>(), 1..3),
    ];
    (
        cpus,
        size(),
        width,
        gic,
        prop::option::of(kernel()),
        initrd,
        "[ -~]{0,40}",
        seeds,
        (virtio, pmem, any::<bool>()),
    )
        .prop_map(
            |(
                cpus,
                memory,
                width,
                gic,
                kernel,
                initrd,
                cmdline,
                seeds,
                (virtio, pmem, vmgenid),
            )| Request {
                cpus,
                memory,
                width,
                gic,
                kernel,
                initrd,
                cmdline,
                seeds,
                virtio: (0..virtio).map(|index| format!("device{index}")).collect(),
                pci: Vec::new(),
                pmem,
                goes_on: false,
                features: Default::default(),
                topology: Default::default(),
                vmgenid,
            },
        )
}

fn check_error(board: &Board, request: &Request<Aarch64>, host: &aarch64::Host, error: &PlanError) {
    let line = error.to_string();
    assert!(!line.contains('\n'), "{line}");
    let has_number = line.contains(|c: char| c.is_ascii_digit());
    // What is missing there has no number.
    let is_without = matches!(
        error,
        PlanError::IrqchipNotOffered { .. } | PlanError::BoardLacks { .. }
    );
    assert!(has_number || is_without, "{line}");
    let (advice, marker) = match error {
        PlanError::TooWide { advice, .. }
        | PlanError::TooNarrow { advice, .. }
        | PlanError::MemoryWraps { advice, .. } => (advice.as_str(), "--memory "),
        PlanError::TooSmall { advice, .. } => (advice.as_str(), ""),
        _ => return,
    };
    let Some((_, size)) = advice.split_once(marker) else {
        return;
    };
    let size = size.split(' ').next().unwrap_or(size);
    let followed = Request {
        memory: parse_size(size).expect("a size"),
        ..request.clone()
    };
    if !followed.memory.is_multiple_of(MEMORY_UNIT) {
        // More than 64 bits hold.
        assert_eq!(followed.memory, u64::MAX);
        return;
    }
    let again = plan(board, &followed, host).err();
    let is_the_same = again
        .as_ref()
        .is_some_and(|again| std::mem::discriminant(again) == std::mem::discriminant(error));
    assert!(!is_the_same, "{line}\nthat advice followed: {again:?}");
}

fn check_plan(
    board: &Board,
    request: &Request<Aarch64>,
    host: &aarch64::Host,
    plan: &Plan<Aarch64>,
) {
    let disjoint = |ranges: &[(String, Range)]| {
        for (index, (name, a)) in ranges.iter().enumerate() {
            for (other, b) in &ranges[..index] {
                assert!(!a.overlaps(*b), "{name} {a} and {other} {b} overlap");
            }
        }
    };
    let regions: Vec<_> = plan
        .layout
        .regions()
        .into_iter()
        .map(|region| (region.name.into_owned(), region.range))
        .collect();
    disjoint(&regions);
    for (name, range) in &regions {
        assert_eq!(range.last() >> plan.width.bits, 0, "{name} {range}");
    }
    assert!(plan.width.bits <= host.ipa_limit.unwrap_or(40));

    let payload = &plan.layout.payload;
    let mut parts = Vec::new();
    parts.extend(payload.kernel.map(|range| ("kernel".to_owned(), range)));
    parts.extend(payload.initrd.map(|range| ("initrd".to_owned(), range)));
    for blob in &plan.blobs {
        assert!(blob.bytes.len() as u64 <= 2 * MIB);
        assert_eq!(blob.address % 8, 0);
        let range = Range::new(blob.address, blob.bytes.len() as u64).expect("a blob");
        parts.push((blob.name.to_owned(), range));
    }
    let page = request.kernel.as_ref().and_then(|kernel| kernel.page_size);
    let page = page.unwrap_or(64 * KIB);
    let clocks = || {
        Some((
            plan.vcpus.first()?.stolen_time?,
            plan.vcpus.last()?.stolen_time?,
        ))
    };
    if let Some((first, last)) = clocks() {
        let size = (last + 64 - first).next_multiple_of(page);
        let range = Range::new(first, size).expect("clocks");
        parts.push(("stolen time".to_owned(), range));
    }
    if let Some(placed) = &plan.layout.generation {
        parts.push(("VMGenID".to_owned(), placed.id));
        parts.push(("VMClock".to_owned(), placed.clock));
    }
    disjoint(&parts);
    for (name, range) in &parts {
        assert!(plan.layout.ram[0].contains(*range), "{name} {range}");
        assert!(
            name == "kernel" || range.start().is_multiple_of(page),
            "{name} {range}: a guest of {page} bytes a page shares one with another"
        );
    }
    if let (Some(kernel), Some(range)) = (&request.kernel, payload.kernel) {
        assert_eq!(range.size(), kernel.image_size);
        assert_eq!((range.start() - kernel.text_offset) % (2 * MIB), 0);
        assert_eq!(payload.entry, range.start());
    }

    let redistributors = redistributors(plan);
    if plan.layout.irqchip.version() == 3 {
        let frames: u32 = redistributors.iter().map(|(_, frames)| frames).sum();
        assert_eq!(frames, request.cpus);
    }
    let affinities: BTreeSet<_> = plan.vcpus.iter().map(|vcpu| vcpu.mpidr).collect();
    assert_eq!(affinities.len(), request.cpus as usize);

    let tree = aarch64::device_tree(board, plan, request);
    assert_eq!(tree.to_dtb().as_ref(), Ok(&plan.blobs[0].bytes));
    check_tree(&tree, request, plan);
}

fn check_tree(tree: &Node, request: &Request<Aarch64>, plan: &Plan<Aarch64>) {
    let nodes = |parent: &Node, prefix: &str| -> Vec<Node> {
        let children = parent.children().iter();
        children
            .filter(|node| node.name().starts_with(prefix))
            .cloned()
            .collect()
    };
    let memory = nodes(tree, "memory@")
        .iter()
        .fold(0, |sum, node| match node.get("reg") {
            Some(Value::U64s(reg)) if reg.len() == 2 => sum + u128::from(reg[1]),
            other => panic!("reg of memory is {other:?}"),
        });
    assert_eq!(memory, u128::from(request.memory));
    let cpus = nodes(tree.at(&["cpus"]).expect("/cpus"), "cpu@");
    assert_eq!(cpus.len(), request.cpus as usize);
    for (node, vcpu) in cpus.iter().zip(&plan.vcpus) {
        assert_eq!(node.get("reg"), Some(&Value::from(vcpu.mpidr as u32)));
    }
    let interrupts = plan.layout.irqchip.interrupts();
    let devices = plan.layout.devices.iter();
    assert!(
        devices
            .clone()
            .all(|device| device.spi.intid() < interrupts)
    );
    let lines: BTreeSet<_> = devices.clone().map(|device| device.spi).collect();
    assert_eq!(lines.len(), devices.len());
}

proptest! {
    #![proptest_config(ProptestConfig {
        // 1024, or four times what PROPTEST_CASES says.
        cases: 4 * ProptestConfig::default().cases,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_plan_is_sound_or_an_error_in_one_line(
        text in board_text(),
        request in any_request(),
        legacy in prop::bool::weighted(0.1),
    ) {
        let board = match Board::parse(&text) {
            Ok(board) => board,
            Err(error) => {
                prop_assert!(!error.to_string().contains('\n'), "{error}");
                return Ok(());
            }
        };
        let mut host = Aarch64::assumed_host(&board);
        if legacy {
            host.ipa_limit = None;
        }
        match plan(&board, &request, &host) {
            Ok(plan) => check_plan(&board, &request, &host, &plan),
            Err(error) => check_error(&board, &request, &host, &error),
        }
    }

    #[test]
    fn a_plan_on_virt_is_sound_or_an_error_in_one_line(request in any_request(), limit in 32_u8..=52) {
        let (board, host) = (board(VIRT), host(limit));
        match plan(&board, &request, &host) {
            Ok(plan) => check_plan(&board, &request, &host, &plan),
            Err(error) => check_error(&board, &request, &host, &error),
        }
    }
}
