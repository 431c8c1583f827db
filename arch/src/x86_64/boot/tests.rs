//! What lies where, and what the kernel reads of it.

use super::*;
use crate::size::parse_size;
use crate::x86_64::low_memory::ACPI_TABLES;
use crate::{Arch, Board, Plan};
use proptest::prelude::*;

const PC: &str = include_str!("../../../../boards/pc.toml");
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Returns the start of a bzImage with the figures of a Debian kernel: 16 MiB preferred, 2 MiB
/// aligned, 32 MiB taken, initrd below 2 GiB.
fn bz_head() -> Vec<u8> {
    let mut head = vec![0; 0x400];
    let mut put = |at: usize, value: &[u8]| head[at..at + value.len()].copy_from_slice(value);
    put(0x1ef, &[0xff]); // The sentinel, which must not reach the zero page.
    put(0x1f1, &[39]);
    put(0x1f4, &0x8_0000_u32.to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x230, &0x20_0000_u32.to_le_bytes());
    put(0x234, &[1, 21, 0x7f]);
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &0x100_0000_u64.to_le_bytes());
    put(0x260, &0x200_0000_u32.to_le_bytes());
    head
}

fn kernel() -> X86BzImage {
    X86BzImage::parse(&bz_head()).expect("a bzImage")
}

fn request(memory: u64, initrd: Option<u64>) -> Request<X86_64> {
    Request {
        kernel: Some(X86Kernel::Bz(kernel())),
        initrd,
        ..crate::x86_64::plan::tests::request(memory)
    }
}

fn pc() -> Board {
    Board::parse(PC).expect("valid")
}

fn plan_on(board: &Board, request: &Request<X86_64>) -> Result<Plan<X86_64>, PlanError> {
    crate::plan(board, request, &X86_64::assumed_host(board))
}

fn plan(request: &Request<X86_64>) -> Result<Plan<X86_64>, PlanError> {
    plan_on(&pc(), request)
}

fn range(start: u64, end: u64) -> Range {
    Range::new(start, end - start).expect("not empty")
}

/// Returns the memory map as the guest reads it.
fn read_e820(page: &[u8]) -> Vec<Range> {
    let number = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("8 bytes"));
    (0..usize::from(page[0x1e8]))
        .map(|index| 0x2d0 + 20 * index)
        .map(|at| {
            assert_eq!(page[at + 16..at + 20], [1, 0, 0, 0], "usable RAM");
            Range::new(number(at), number(at + 8)).expect("not empty")
        })
        .collect()
}

#[test]
fn the_zero_page_byte_by_byte() {
    let plan = plan(&request(4 * GIB, Some(0x1234))).expect("fits");
    let head = bz_head();
    let mut page = vec![0; 4096];
    let mut put = |at: usize, value: &[u8]| page[at..at + value.len()].copy_from_slice(value);
    put(0x1f1, &head[0x1f1..0x26c]);
    put(0x210, &[0xff]);
    put(0x218, &[0x00, 0xe0, 0xff, 0x7f]);
    put(0x21c, &[0x34, 0x12]);
    put(0x228, &[0x00, 0x00, 0x01, 0x00]);
    put(0x1e8, &[3]);
    put(0x70, &0xe_0000_u64.to_le_bytes());
    for (index, (start, end)) in [(0, 0xa_0000), (MIB, 3 * GIB), (4 * GIB, 5 * GIB)]
        .into_iter()
        .enumerate()
    {
        let at = 0x2d0 + 20 * index;
        put(at, &u64::to_le_bytes(start));
        put(at + 8, &u64::to_le_bytes(end - start));
        put(at + 16, &[1, 0, 0, 0]);
    }
    let blob = &plan.blobs[0];
    assert_eq!(
        (blob.name, blob.address),
        ("zero page", plan.layout.payload.info)
    );
    assert_eq!(blob.bytes, page);
}

#[test]
fn the_other_blobs() {
    let plan = plan(&request(64 * MIB, None)).expect("fits");
    let [_, gdt, tables, cmdline, _, reset] = plan.blobs.as_slice() else {
        panic!("six blobs")
    };
    assert_eq!(
        (reset.address, reset.bytes.as_slice()),
        (0xf_fff0, b"\xba\xf9\x0c\xb0\x06\xee\xf4\xeb\xfd".as_slice())
    );
    assert_eq!(
        (cmdline.address, cmdline.bytes.as_slice()),
        (0x1_0000, &b"console=ttyS0\0"[..])
    );
    assert_eq!(gdt.address, 0x2000);
    assert_eq!(gdt.bytes[..16], [0; 16]);
    assert_eq!(gdt.bytes[16..24], [0xff, 0xff, 0, 0, 0, 0x9b, 0xaf, 0]);
    assert_eq!(gdt.bytes[24..], [0xff, 0xff, 0, 0, 0, 0x93, 0xcf, 0]);
    assert_eq!(tables.address, 0x3000);
    assert_eq!(tables.bytes.len(), 6 * 4096);
    // Every 2 MiB page of the first 4 GiB, walked as the CPU does.
    let entry = |table: u64, index: u64| {
        let at = (table - 0x3000 + 8 * index) as usize;
        u64::from_le_bytes(tables.bytes[at..at + 8].try_into().expect("8 bytes"))
    };
    for address in (0..4 * GIB).step_by(2 << 20) {
        let mut table = 0x3000;
        for shift in [39, 30] {
            let found = entry(table, address >> shift & 511);
            assert_eq!(found & 0xfff, 3);
            table = found & !0xfff;
        }
        assert_eq!(entry(table, address >> 21 & 511), address | 0x83);
    }
    assert_eq!(entry(0x3000, 1), 0);
    assert_eq!(entry(0x4000, 4), 0);
}

#[test]
fn the_kernel_lies_where_it_prefers() {
    let placed = plan(&request(512 * MIB, None))
        .expect("fits")
        .layout
        .payload;
    assert_eq!(placed.kernel, Some(range(16 * MIB, 48 * MIB)));
    assert_eq!((placed.entry, placed.info), (16 * MIB + 0x200, 0x1000));
    let mut low = request(512 * MIB, None);
    low.kernel = Some(X86Kernel::Bz(X86BzImage {
        pref_address: 0,
        ..kernel()
    }));
    let placed = plan(&low).expect("fits").layout.payload;
    assert_eq!(
        placed.kernel,
        Some(range(2 * MIB, 34 * MIB)),
        "aligned above 1 MiB"
    );
}

#[test]
fn a_kernel_that_must_lie_elsewhere_is_refused() {
    for (pref_address, relocatable) in [(0x8_0000, false), (4 * GIB, false), (u64::MAX, true)] {
        let mut request = request(512 * MIB, None);
        request.kernel = Some(X86Kernel::Bz(X86BzImage {
            pref_address,
            relocatable,
            ..kernel()
        }));
        let error = plan(&request).expect_err("no place").to_string();
        assert!(
            error.contains(&format!("33554432 bytes from {pref_address:#x}")),
            "{error}"
        );
        assert!(error.contains("use another kernel"), "{error}");
    }
}

#[test]
fn the_initrd_ends_with_the_bank_or_at_the_kernels_limit() {
    let initrd = |memory, size| {
        plan(&request(memory, Some(size)))
            .expect("fits")
            .layout
            .payload
            .initrd
    };
    assert_eq!(initrd(512 * MIB, MIB), Some(range(511 * MIB, 512 * MIB)));
    assert_eq!(initrd(3 * GIB, MIB), Some(range(2 * GIB - MIB, 2 * GIB)));
    assert_eq!(initrd(8 * GIB, MIB), Some(range(2 * GIB - MIB, 2 * GIB)));
    let start = 512 * MIB - 0x1000;
    assert_eq!(
        initrd(512 * MIB, 1),
        Some(range(start, start + 1)),
        "starts on a page"
    );
    assert_eq!(
        plan(&request(512 * MIB, Some(0)))
            .expect("fits")
            .layout
            .payload
            .initrd,
        None
    );
    // It may touch the kernel's end.
    assert_eq!(initrd(64 * MIB, 16 * MIB), Some(range(48 * MIB, 64 * MIB)));
}

#[test]
fn memory_too_small_is_refused_with_what_would_do() {
    let error = |memory, initrd| {
        plan(&request(memory, initrd))
            .expect_err("small")
            .to_string()
    };
    assert_eq!(
        error(32 * MIB, None),
        "guest memory of 32M is too small: the boot data take 1048576 bytes, the kernel takes 33554432 bytes from 0x1000000; use --memory 48M or more"
    );
    assert_eq!(
        error(64 * MIB, Some(16 * MIB + 1)),
        "guest memory of 64M is too small: the boot data take 1048576 bytes, the kernel takes 33554432 bytes from 0x1000000, the initrd 16777217; use --memory 65M or more"
    );
    assert!(plan(&request(48 * MIB, None)).is_ok());
    assert!(plan(&request(65 * MIB, Some(16 * MIB + 1))).is_ok());
}

#[test]
fn an_initrd_that_no_memory_holds_is_refused_as_such() {
    for (memory, size) in [
        (512 * MIB, 2 * GIB),
        (8 * GIB, 2 * GIB),
        (512 * MIB, u64::MAX),
    ] {
        let error = plan(&request(memory, Some(size)))
            .expect_err("large")
            .to_string();
        let expected = format!(
            "the boot data take 1048576 bytes, the kernel takes 33554432 bytes from 0x1000000, the initrd {size}, but the x86 boot protocol wants all below 0x80000000 here; use a smaller initrd"
        );
        assert_eq!(error, expected);
    }
}

#[test]
fn a_board_without_ram_at_0_is_refused() {
    let board = Board::parse(&PC.replacen("base = 0\n", "base = 0x10_0000\n", 1)).expect("valid");
    let error = plan_on(&board, &request(512 * MIB, None)).expect_err("no RAM at 0");
    assert!(
        error.to_string().contains("guest RAM begins at 0x100000"),
        "{error}"
    );
}

#[test]
fn the_command_line_is_held_to_the_kernels_limit() {
    let with = |length, kernel| {
        plan(&Request {
            cmdline: "x".repeat(length),
            kernel,
            ..request(512 * MIB, None)
        })
    };
    let kernel = || Some(X86Kernel::Bz(kernel()));
    assert!(with(2047, kernel()).is_ok());
    let error = with(2048, kernel()).expect_err("long").to_string();
    assert_eq!(
        error,
        "the command line of 2048 bytes is longer than the 2047 that this kernel takes; use a shorter one"
    );
    assert!(with(0x7_ffff, None).is_ok());
    let error = with(0x8_0000, None).expect_err("long").to_string();
    assert!(
        error.contains("524288 bytes is longer than the 524287"),
        "{error}"
    );
}

#[test]
fn more_banks_than_the_map_holds_are_refused() {
    let mut text = PC.to_owned();
    for bank in 0..127 {
        let base = (64_u64 << 30) + bank * (2 << 20);
        text += &format!("\n[[memory]]\nbase = {base}\nsize = \"1M\"\n");
    }
    let board = Board::parse(&text).expect("valid");
    let error = plan_on(&board, &request(512 * MIB, None)).expect_err("too many");
    assert!(
        error
            .to_string()
            .contains("holds 128 entries, this machine has 129"),
        "{error}"
    );
}

/// Numbers of any magnitude.
fn scaled() -> impl Strategy<Value = u64> {
    (any::<u64>(), 0_u32..64).prop_map(|(number, shift)| number >> shift)
}

prop_compose! {
    fn kernels()(
        pref_address in prop_oneof![Just(16 * MIB), scaled()],
        align in 0_u32..32,
        init_size in 1_u64..=GIB,
        file in scaled(),
        initrd_max in prop_oneof![Just(0x7fff_ffff_u32), any::<u32>()],
        relocatable: bool,
    ) -> X86BzImage {
        let mut image = kernel();
        image.setup_header[0x22c - 0x1f1..][..4].copy_from_slice(&initrd_max.to_le_bytes());
        X86BzImage {
            pref_address,
            kernel_alignment: 1 << align,
            init_size,
            payload: 0..file,
            relocatable,
            ..image
        }
    }
}

proptest! {
    #[test]
    fn the_memory_map_is_ram_without_the_hole(units in 16_u64..1_073_700_000) {
        let memory = units << 16;
        let plan = plan(&Request { kernel: None, ..request(memory, None) }).expect("fits");
        let map = read_e820(&plan.blobs[0].bytes);
        let hole = range(0xa_0000, 0x10_0000);
        prop_assert_eq!(map.iter().map(|range| range.size()).sum::<u64>(), memory - hole.size());
        for pair in map.windows(2) {
            prop_assert!(pair[0].last() < pair[1].start());
        }
        for range in map {
            prop_assert!(!range.overlaps(hole));
            prop_assert!(plan.layout.ram.iter().any(|bank| bank.contains(range)));
        }
    }

    #[test]
    fn nothing_overlaps_and_all_lies_in_ram(
        memory in scaled(),
        aligned in prop::bool::weighted(0.9),
        cpus in 0_u32..300,
        initrd in prop::option::of(scaled()),
        kernel in prop::option::weighted(0.9, kernels()),
        cmdline in "[ -~]{0,40}",
    ) {
        let memory = if aligned { memory & !0xffff } else { memory };
        let kernel = kernel.map(X86Kernel::Bz);
        let request = Request { cpus, kernel, cmdline, ..request(memory, initrd) };
        let plan = match plan(&request) {
            Ok(plan) => plan,
            Err(PlanError::TooSmall { advice, .. }) => {
                // The advice works, unless the board's bank ends before.
                let memory = parse_size(&advice).expect("a size");
                let again = super::tests::plan(&Request { memory, ..request });
                prop_assert!(again.is_ok() || memory > 3 * GIB, "{advice}: {again:?}");
                return Ok(());
            }
            Err(error) => {
                prop_assert!(!error.to_string().is_empty());
                return Ok(());
            }
        };
        let payload = &plan.layout.payload;
        let mut ranges: Vec<Range> = plan
            .blobs
            .iter()
            .map(|blob| Range::new(blob.address, blob.bytes.len() as u64).expect("not empty"))
            .collect();
        for blob in &ranges {
            let tables = range(ACPI_TABLES, HIGH_RAM);
            prop_assert!(blob.last() < CMDLINE + CMDLINE_ROOM || tables.contains(*blob));
        }
        ranges.extend(payload.kernel);
        ranges.extend(payload.initrd);
        ranges.sort();
        for pair in ranges.windows(2) {
            prop_assert!(!pair[0].overlaps(pair[1]), "{} {}", pair[0], pair[1]);
        }
        let usable = read_e820(&plan.blobs[0].bytes);
        for range in ranges {
            // The ROM of a PC, where the tables lie, is no usable RAM, but there is memory.
            let rom = range.start() >= ACPI_TABLES && range.last() < HIGH_RAM;
            prop_assert!(rom || usable.iter().any(|ram| ram.contains(range)), "{range}");
            prop_assert!(range.last() < MAPPED);
        }
        if let (Some(initrd), Some(X86Kernel::Bz(image))) = (payload.initrd, &request.kernel) {
            prop_assert_eq!(Some(initrd.size()), request.initrd);
            prop_assert!(initrd.last() < initrd_limit(image));
        }
    }
}
