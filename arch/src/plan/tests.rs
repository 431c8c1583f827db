//! Tests of planning; `tests/plan.rs` of the root package holds those of whole machines.

use super::map::place_ram;
use super::*;
use crate::Seeds;
use crate::aarch64::{Aarch64, Host};
use crate::irq::Spi;

const VIRT: &str = include_str!("../../../boards/virt.toml");
const MIB: u64 = 1 << 20;

fn request() -> Request<Aarch64> {
    Request::new(1, 512 * MIB)
}

fn board(text: &str) -> Board {
    Board::parse(text).expect("a valid board")
}

/// virt with these banks in place of its own.
fn banks(tables: &[&str]) -> Board {
    let bank = "[[memory]]\nbase = 0x4000_0000\n";
    assert!(VIRT.contains(bank), "the test replaces what is not there");
    let tables: Vec<_> = tables
        .iter()
        .map(|table| format!("[[memory]]\n{table}\n"))
        .collect();
    board(&VIRT.replace(bank, &tables.concat()))
}

fn with(
    board: &Board,
    set: impl FnOnce(&mut Request<Aarch64>),
) -> Result<Plan<Aarch64>, PlanError> {
    let mut request = request();
    set(&mut request);
    plan(board, &request, &Aarch64::assumed_host(board))
}

fn ram(board: &Board, memory: u64) -> Result<Vec<(u64, u64)>, PlanError> {
    Ok(place_ram(board, memory)?
        .iter()
        .map(|bank| (bank.start(), bank.size()))
        .collect())
}

#[test]
fn banks_are_filled_in_the_files_order_and_listed_by_address() {
    let board = banks(&[
        "base = 0x1_0000_0000\nsize = \"64M\"",
        "base = 0x4000_0000\nup-to = \"128M\"",
        "base = 0x2_0000_0000",
    ]);
    let (low, mid, high) = (0x4000_0000, 0x1_0000_0000, 0x2_0000_0000);
    assert_eq!(ram(&board, 64 * MIB), Ok(vec![(mid, 64 * MIB)]));
    assert_eq!(
        ram(&board, 96 * MIB),
        Ok(vec![(low, 32 * MIB), (mid, 64 * MIB)])
    );
    assert_eq!(
        ram(&board, 256 * MIB),
        Ok(vec![(low, 128 * MIB), (mid, 64 * MIB), (high, 64 * MIB)])
    );
    assert!(matches!(
        ram(&board, 63 * MIB),
        Err(PlanError::BanksNotFilled { .. })
    ));
}

#[test]
fn more_memory_than_the_banks_hold_is_refused_with_what_they_hold() {
    let board = banks(&["base = 0x4000_0000\nup-to = \"128M\""]);
    let error = ram(&board, 129 * MIB).expect_err("129M");
    assert!(
        error.to_string().contains("use --memory 128M or less"),
        "{error}"
    );
}

#[test]
fn an_unaligned_bank_is_named() {
    for bank in ["base = 0x4000_1000", "base = 0x4000_0000\nsize = \"100K\""] {
        assert!(matches!(
            with(&banks(&[bank]), |request| request.memory = MIB),
            Err(PlanError::UnalignedBank { bank: 0, .. })
        ));
    }
}

#[test]
fn overlaps_are_refused_by_both_names() {
    let device = board(&VIRT.replace("0x0901_0000", "0x0900_0000"));
    let PlanError::Overlap { a, b, .. } = with(&device, |_| ()).expect_err("one place") else {
        panic!("another error");
    };
    let names = [&*a.name, &*b.name];
    assert!(names.contains(&"PL011 serial console") && names.contains(&"PL031 real-time clock"));
    let error = with(&board(&VIRT.replace("0x0901_0000", "0x5000_0000")), |_| ())
        .expect_err("a device in RAM");
    assert!(error.to_string().contains("holds 256M at most"), "{error}");
    let ram = banks(&["base = 0x4000_0000\nsize = \"256M\"", "base = 0x4800_0000"]);
    let error = with(&ram, |_| ()).expect_err("RAM in RAM");
    assert!(error.to_string().contains("RAM bank 0"), "{error}");
    let redistributors =
        board(&VIRT.replace("redistributor-frames = 123", "redistributor-frames = 124"));
    assert!(with(&redistributors, |request| request.cpus = 123).is_ok());
    assert!(matches!(
        with(&redistributors, |request| request.cpus = 124),
        Err(PlanError::Overlap { .. })
    ));
}

#[test]
fn each_device_has_its_own_interrupt_and_one_that_exists() {
    let shared = board(&VIRT.replace("spi = 2", "spi = 1"));
    assert!(matches!(
        with(&shared, |_| ()),
        Err(PlanError::SharedInterrupt { spi: 1, .. })
    ));
    let last = board(&VIRT.replace("spi = 16", "spi = 958"));
    assert!(with(&last, |request| request.virtio = names(2)).is_ok());
    assert!(matches!(
        with(&last, |request| request.virtio = names(3)),
        Err(PlanError::NoSuchInterrupt { spi: 960, .. })
    ));
    let shared = board(&VIRT.replace("spi = 8", "spi = 7"));
    assert!(with(&shared, |_| ()).is_ok());
    let error = with(&shared, |request| request.vmgenid = true).expect_err("shared");
    assert_eq!(
        error.to_string(),
        "PL061 GPIO, power key and VMGenID and VMClock share SPI 7 on board 'virt'; give each its own"
    );
}

#[test]
fn a_board_without_an_interrupt_for_vmgenid_has_none() {
    let without = board(&VIRT.replace("[vmgenid]\nspi = 8", ""));
    assert!(with(&without, |_| ()).is_ok());
    let error = with(&without, |request| request.vmgenid = true).expect_err("no interrupt");
    assert_eq!(
        error.to_string(),
        "board 'virt' has no interrupt for VMGenID and VMClock ([vmgenid]); add it to the board's file"
    );
}

#[test]
fn vmgenid_costs_no_address_bit() {
    let width = |vmgenid| {
        let plan = with(&board(VIRT), |request| {
            (request.memory, request.vmgenid) = (3 << 30, vmgenid);
        });
        plan.expect("fits").width
    };
    assert_eq!(width(true), width(false));
}

fn names(count: u32) -> Vec<String> {
    (0..count).map(|index| format!("disk{index}")).collect()
}

#[test]
fn persistent_memory_lies_above_everything_else() {
    let plan = with(&board(VIRT), |request| {
        request.memory = 511 * MIB;
        request.pmem = vec![2 * MIB, 64 * MIB];
    });
    let layout = plan.expect("two of them").layout;
    let starts: Vec<u64> = layout.pmem.iter().map(|range| range.start()).collect();
    assert_eq!(starts, [0x6000_0000, 0x6020_0000]);
    let last = layout.regions().pop().expect("a region");
    assert_eq!(last.name, "persistent memory 1");
    let wide = with(&board(VIRT), |request| request.pmem = vec![1 << 34]);
    assert_eq!(wide.expect("a wider machine").width.bits, 35);
}

#[test]
fn persistent_memory_of_an_odd_size_is_refused() {
    for size in [0, 1, MIB, u64::MAX] {
        assert!(matches!(
            with(&board(VIRT), |request| request.pmem = vec![size]),
            Err(PlanError::UnalignedPmem { .. })
        ));
    }
    let huge = with(&board(VIRT), |request| {
        request.pmem = vec![1 << 63, 1 << 63]
    });
    assert!(matches!(huge, Err(PlanError::Wraps { .. })), "{huge:?}");
}

#[test]
fn virtio_devices_take_the_slots_from_the_first() {
    let plan = with(&board(VIRT), |request| request.virtio = names(32)).expect("32 slots");
    let last = plan.layout.devices.last().expect("a device");
    assert_eq!((last.window.start(), last.spi), (0x0a00_3e00, Spi(47)));
    assert_eq!(last.to_string(), "virtio-mmio slot 31: disk31");
    assert!(matches!(
        with(&board(VIRT), |request| request.virtio = names(33)),
        Err(PlanError::NoVirtioSlot {
            asked: 33,
            slots: 32,
            ..
        })
    ));
}

#[test]
fn a_board_of_another_architecture_is_refused() {
    let pc = board(include_str!("../../../boards/pc.toml"));
    assert!(matches!(
        with(&pc, |_| ()),
        Err(PlanError::WrongArchitecture { .. })
    ));
}

#[test]
fn memory_past_2_to_the_64_is_refused_with_the_largest_that_fits() {
    let most = with(&board(VIRT), |request| request.memory = !0xffff).expect_err("16 EiB");
    assert!(
        matches!(most, PlanError::MemoryWraps { limit: 48, .. }),
        "{most}"
    );
    // 2^48 less the 1 GiB below RAM.
    assert!(
        most.to_string().ends_with("use --memory 262143G or less"),
        "{most}"
    );
    assert!(with(&board(VIRT), |request| request.memory = 262_143 << 30).is_ok());
}

#[test]
fn advice_on_memory_is_given_only_where_memory_helps() {
    let too_small = |board: &Board, memory| {
        with(board, |request| {
            request.memory = memory;
            request.initrd = Some(100 * MIB);
        })
        .expect_err("no room for the initrd")
    };
    let error = too_small(&board(VIRT), 64 * MIB);
    assert!(
        error.to_string().ends_with("use --memory 101M or more"),
        "{error}"
    );
    let bounded = banks(&["base = 0x4000_0000\nup-to = \"64M\"", "base = 0x8000_0000"]);
    let error = too_small(&bounded, 512 * MIB);
    assert!(matches!(error, PlanError::BankTooSmall { .. }), "{error}");
    assert!(error.to_string().contains("(64M)"), "{error}");
}

#[test]
fn a_second_bank_counts_in_the_advice() {
    let board = banks(&["base = 0x1_0000_0000\nsize = \"1G\"", "base = 0x4000_0000"]);
    let ask = |memory| {
        with(&board, |request| {
            request.memory = memory;
            request.initrd = Some(100 * MIB);
        })
    };
    let error = ask(1088 * MIB).expect_err("64M in the first bank");
    assert!(
        error.to_string().ends_with("use --memory 1125M or more"),
        "{error}"
    );
    assert!(ask(1125 * MIB).is_ok());
}

#[test]
fn the_highest_region_decides_the_width() {
    let host = |limit| Host {
        ipa_limit: Some(limit),
        ..Aarch64::assumed_host(&board(VIRT))
    };
    let far = board(&VIRT.replace("0x0901_0000", "0x100_0000_0000"));
    let fits = plan(&far, &request(), &host(41)).expect("41 bits");
    assert_eq!(fits.width.highest.name, "PL031 real-time clock");
    assert_eq!(fits.width.bits, 41);
    let error = plan(&far, &request(), &host(40)).expect_err("40 bits");
    assert!(
        error.to_string().ends_with(
            "no memory size makes board 'virt' fit: use a host with 41 bits or another board"
        ),
        "{error}"
    );
}

#[test]
fn seeds_are_not_printed() {
    let seeds = Seeds {
        kaslr: 0x1234,
        rng: [0x56; 64],
    };
    assert_eq!(format!("{seeds:?}"), "Seeds(hidden)");
}
