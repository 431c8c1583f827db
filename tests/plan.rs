//! Whole machines, planned without KVM: against golden files, against the numbers that Armlet
//! promises, against dtc, and at random.
//!
//! `UPDATE_GOLDEN=1 cargo test --test plan` writes the golden files anew; read their diff.

use armlet_arch::aarch64::gic::Gic;
use armlet_arch::aarch64::{self, Aarch64};
use armlet_arch::board::{Profile, Severity};
use armlet_arch::cores::{Cache, CacheKind, GuestCore};
use armlet_arch::image::{Arm64Image, Placement};
use armlet_arch::irq::GicChoice;
use armlet_arch::plan::MEMORY_UNIT;
use armlet_arch::size::{parse_size, show_size};
use armlet_arch::switch::Switch;
use armlet_arch::x86_64::X86_64;
use armlet_arch::{
    Arch, Architecture, Board, PlacedGeneration, Plan, PlanError, Range, Request, Seeds,
    WidthPolicy, plan,
};
use armlet_fdt::{Node, Value};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Boards, requests and hosts at random.
#[path = "plan/random.rs"]
mod random;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

const VIRT: &str = include_str!("../boards/virt.toml");
const HIGHBANK: &str = include_str!("boards/highbank.toml");

fn board(text: &str) -> Board {
    Board::parse(text).expect("a valid board")
}

/// What `armlet plan --deterministic --board NAME` asks for.
fn request<A: Arch>(board: &Board) -> Request<A> {
    Request {
        width: board.guest.width,
        gic: board.guest.gic,
        cmdline: board.guest.cmdline.clone(),
        vmgenid: board.guest.vmgenid == Switch::On,
        ..Request::new(board.guest.cpus, board.guest.memory)
    }
}

/// Debian 6.12's kernel for arm64.
fn debian() -> Arm64Image {
    Arm64Image {
        text_offset: 0,
        image_size: 0x2b2_0000,
        page_size: Some(4 * KIB),
        placement: Placement::Anywhere,
        big_endian: false,
    }
}

// ---------------------------------------------------------------------------- golden files

/// A machine with its own golden files.
struct Case {
    name: &'static str,
    board: &'static str,
    change: fn(&mut Request<Aarch64>, &mut aarch64::Host),
}

/// Machines beside the one that each board gives without a flag.
const CASES: &[Case] = &[
    Case {
        name: "virt-2g-2cpus",
        board: VIRT,
        change: |request, _| {
            request.memory = 2 * GIB;
            request.cpus = 2;
        },
    },
    Case {
        name: "virt-14g-4cpus",
        board: VIRT,
        change: |request, _| {
            request.memory = 14 * GIB;
            request.cpus = 4;
        },
    },
    Case {
        name: "virt-gicv2-8cpus",
        board: VIRT,
        change: |request, host| {
            host.gic_v2 = true;
            request.gic = GicChoice::V2;
            request.cpus = 8;
        },
    },
    Case {
        name: "virt-130cpus",
        board: VIRT,
        change: |request, _| request.cpus = 130,
    },
    Case {
        name: "virt-kernel",
        board: VIRT,
        change: |request, _| {
            request.kernel = Some(debian());
            request.initrd = Some(31_415_926);
            request.cmdline.push_str(" root=/dev/vda \"quoted\"");
            request.virtio = ["disk0", "net0", "pmem0"].map(str::to_owned).to_vec();
            request.pmem = vec![64 << 20];
        },
    },
    Case {
        name: "virt-two-kinds",
        board: VIRT,
        change: |request, _| {
            request.cpus = 3;
            let core = |kind, capacity| GuestCore { kind, capacity };
            request.topology.cores = vec![core(0, 530), core(1, 1024), core(1, 1024)];
        },
    },
    Case {
        name: "virt-caches",
        board: VIRT,
        change: |request, _| {
            request.cpus = 2;
            let cache = |level, kind, size, shared| Cache {
                level,
                kind,
                size,
                line: 64,
                sets: 256,
                shared,
            };
            // A Raspberry Pi 5's.
            request.topology.caches = vec![
                cache(1, CacheKind::Data, 64 << 10, false),
                cache(1, CacheKind::Instruction, 64 << 10, false),
                cache(2, CacheKind::Unified, 512 << 10, false),
                cache(3, CacheKind::Unified, 2 << 20, true),
            ];
        },
    },
    Case {
        name: "highbank-default",
        board: HIGHBANK,
        change: |_, _| (),
    },
];

/// A planned ARM64 machine with its tree as text and as a blob.
struct Machine {
    name: String,
    map: String,
    dts: String,
    dtb: Vec<u8>,
}

impl Machine {
    fn of(case: &Case) -> Machine {
        let board = board(case.board);
        let mut request = request(&board);
        let mut host = Aarch64::assumed_host(&board);
        (case.change)(&mut request, &mut host);
        Machine::planned(case.name, &board, &request, &host)
    }

    fn planned(
        name: &str,
        board: &Board,
        request: &Request<Aarch64>,
        host: &aarch64::Host,
    ) -> Machine {
        Machine::try_planned(name, board, request, host)
            .unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn try_planned(
        name: &str,
        board: &Board,
        request: &Request<Aarch64>,
        host: &aarch64::Host,
    ) -> Result<Machine, PlanError> {
        let plan = plan(board, request, host)?;
        Ok(Machine {
            name: name.to_owned(),
            map: map(&plan),
            dts: aarch64::device_tree(board, &plan, request).to_dts(),
            dtb: plan.blobs[0].bytes.clone(),
        })
    }
}

/// Whether no guest runs on the board's hosts.
fn is_refused(board: &Board) -> bool {
    let mut notes = board.host.notes.iter();
    notes.any(|note| note.severity == Severity::Stops)
}

fn machines() -> Vec<Machine> {
    let defaults = boards()
        .into_iter()
        .filter(|(_, board)| board.arch == Architecture::Aarch64 && !is_refused(board))
        .map(|(name, board)| {
            let host = Aarch64::assumed_host(&board);
            Machine::planned(&default_case(&name), &board, &request(&board), &host)
        });
    defaults.chain(CASES.iter().map(Machine::of)).collect()
}

/// The board files of the repository with their names.
fn boards() -> Vec<(String, Board)> {
    let folder = root().join("boards");
    let mut boards = Vec::new();
    for entry in fs::read_dir(&folder).expect("boards/") {
        let path = entry.expect("an entry").path();
        let text = fs::read_to_string(&path).expect("text");
        let name = path.file_stem().expect("a name").to_string_lossy();
        let parent = |_: &str, name: &str| {
            let path = folder.join(format!("{name}.toml"));
            let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
            Ok((name.to_owned(), text))
        };
        let profile = Profile::read(&name, &text, &parent);
        let board = profile
            .unwrap_or_else(|error| panic!("{name}: {error}"))
            .board;
        assert_eq!(board.name, name, "a board has the name of its file");
        boards.push((name.into_owned(), board));
    }
    boards.sort_by(|(a, _), (b, _)| a.cmp(b));
    boards
}

fn default_case(board: &str) -> String {
    format!("{board}-default")
}

/// The address map as text: what a reader of a diff wants to see.
fn map<A: Arch>(plan: &Plan<A>) -> String {
    let width = &plan.width;
    let mut text = format!(
        "{} bits: {} ends at {:#x}\nlimit {}; {} levels, {} at the limit, on {} pages\n\n",
        width.bits,
        width.highest.name,
        width.highest.range.last(),
        width.limit,
        width.levels,
        width.levels_at_limit,
        show_size(width.host_page),
    );
    let mut row = |range: Range, what: &str| {
        let (start, end, size) = (range.start(), range.last(), show_size(range.size()));
        let _ = writeln!(text, "{start:#016x} {end:#016x} {size:>10}  {what}");
    };
    for region in plan.layout.regions() {
        row(region.range, &region.name);
    }
    let payload = &plan.layout.payload;
    for (range, what) in [
        (payload.kernel, "in RAM: kernel"),
        (payload.initrd, "in RAM: initrd"),
    ] {
        if let Some(range) = range {
            row(range, what);
        }
    }
    for blob in &plan.blobs {
        let range = Range::new(blob.address, blob.bytes.len() as u64).expect("a blob's range");
        row(range, &format!("in RAM: {}", blob.name));
    }
    if let Some(reserved) = A::reserved(&plan.vcpus) {
        row(reserved.range, &format!("in RAM: {}", reserved.name));
    }
    if let Some(placed) = &plan.layout.generation {
        row(placed.id, "in RAM: VMGenID");
        row(placed.clock, "in RAM: VMClock");
    }
    let _ = writeln!(text, "\nentry {:#x}", payload.entry);
    for (intid, what) in A::private_interrupts(&plan.features) {
        let _ = writeln!(text, "PPI {:3} {what}", intid - 16);
    }
    let (line, _) = A::ARCHITECTURE.interrupts();
    for device in &plan.layout.devices {
        let _ = writeln!(text, "{line} {:3} {}", device.spi.0, device.kind);
    }
    for device in &plan.layout.ports {
        let (first, last) = (device.ports.start(), device.ports.last());
        let _ = writeln!(text, "ports {first:#06x}-{last:#06x} {}", device.kind);
        if let Some(irq) = device.irq {
            let _ = writeln!(text, "{line} {:3} {}", irq.0, device.kind);
        }
    }
    if let Some(placed) = &plan.layout.generation {
        let _ = writeln!(text, "{line} {:3} {}", placed.irq.0, PlacedGeneration::NAME);
    }
    text
}

/// Where cargo runs this, not where it was compiled: a checkout may be copied with its build.
fn root() -> PathBuf {
    let said = std::env::var_os("CARGO_MANIFEST_DIR");
    said.map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

fn golden(file: &str) -> PathBuf {
    let folder = root().join("tests/golden");
    folder.join(file)
}

fn compare_with_golden(file: &str, text: &str) {
    let path = golden(file);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, text).expect("to write a golden file");
        return;
    }
    let advice = "; UPDATE_GOLDEN=1 cargo test --test plan writes it, then read its diff";
    let known = fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("tests/golden/{file}: {error}{advice}"));
    let differs = known
        .lines()
        .zip(text.lines())
        .position(|(known, new)| known != new);
    let line = differs.unwrap_or_else(|| known.lines().count().min(text.lines().count()));
    let at = |text: &str| text.lines().nth(line).unwrap_or("(its end)").to_owned();
    assert!(
        known == text,
        "tests/golden/{file}:{}: was '{}', is now '{}'{advice}",
        line + 1,
        at(&known),
        at(text),
    );
}

#[test]
fn machines_are_those_of_the_golden_files() {
    for machine in machines() {
        compare_with_golden(&format!("{}.map", machine.name), &machine.map);
        compare_with_golden(&format!("{}.dts", machine.name), &machine.dts);
    }
    for (name, board) in boards() {
        if board.arch == Architecture::X86_64 {
            let plan = plan::<X86_64>(&board, &request(&board), &X86_64::assumed_host(&board))
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            compare_with_golden(&format!("{}.map", default_case(&name)), &map(&plan));
        }
        if is_refused(&board) {
            let host = Aarch64::assumed_host(&board);
            let error = Machine::try_planned(&name, &board, &request(&board), &host)
                .err()
                .unwrap_or_else(|| panic!("{name} is planned, though no guest runs there"));
            let text = format!("{error}\n");
            compare_with_golden(&format!("{}.refusal", default_case(&name)), &text);
        }
    }
}

#[test]
fn every_board_has_golden_files_and_every_golden_file_a_machine() {
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        return;
    }
    let mut wanted: BTreeSet<String> = CASES
        .iter()
        .flat_map(|case| ["map", "dts"].map(|kind| format!("{}.{kind}", case.name)))
        .collect();
    for (name, board) in boards() {
        let case = default_case(&name);
        if is_refused(&board) {
            wanted.insert(format!("{case}.refusal"));
            continue;
        }
        wanted.insert(format!("{case}.map"));
        if board.arch == Architecture::Aarch64 {
            wanted.insert(format!("{case}.dts"));
        }
    }
    let folder = golden("");
    let there: BTreeSet<String> = fs::read_dir(folder)
        .expect("tests/golden/")
        .map(|entry| entry.expect("an entry").file_name())
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    let missing: Vec<_> = wanted.difference(&there).collect();
    let stale: Vec<_> = there.difference(&wanted).collect();
    assert!(
        missing.is_empty() && stale.is_empty(),
        "tests/golden/ lacks {missing:?} and has {stale:?} of no machine; \
         UPDATE_GOLDEN=1 cargo test --test plan writes what is missing"
    );
}

// ------------------------------------------------------------------------------------- dtc

/// Checks that dtc leaves off unless asked. (`node_name_chars_strict` is not among them: it has a
/// word against `virtio_mmio@a000000`, the name that guests know from QEMU.)
const STRICT: &[&str] = &[
    "property_name_chars_strict",
    "unique_unit_address_if_enabled",
];

/// What dtc makes of `input`, sorted; any word of it on standard error is a failure.
fn dtc(machine: &str, from: &str, to: &str, input: &[u8]) -> Vec<u8> {
    let mut command = Command::new("dtc");
    command.args(["-s", "-I", from, "-O", to]);
    command.args(STRICT.iter().flat_map(|check| ["-W", check]));
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::io::Write::write_all(&mut file, input).expect("to write it");
    let output = command
        .arg(file.path())
        .stdin(Stdio::null())
        .output()
        .expect("dtc starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.is_empty(),
        "dtc on {machine}, {from} to {to}: {said}"
    );
    output.stdout
}

#[test]
fn dtc_reads_blob_and_text_without_a_warning_and_finds_the_same_tree() {
    if Command::new("dtc").arg("--version").output().is_err() {
        println!("skipped: dtc is not installed (Debian: device-tree-compiler)");
        return;
    }
    for machine in machines() {
        let of_blob = dtc(&machine.name, "dtb", "dts", &machine.dtb);
        let compiled = dtc(&machine.name, "dts", "dtb", machine.dts.as_bytes());
        let of_text = dtc(&machine.name, "dtb", "dts", &compiled);
        let show = |text: &[u8]| String::from_utf8_lossy(text).into_owned();
        assert!(!of_blob.is_empty());
        assert_eq!(show(&of_blob), show(&of_text), "{}", machine.name);
    }
}

// --------------------------------------------------------------------------------- numbers

fn host(limit: u8) -> aarch64::Host {
    aarch64::Host {
        ipa_limit: Some(limit),
        ..Aarch64::assumed_host(&board(VIRT))
    }
}

/// A plan of `text`'s board, of what its file says but for `change`.
fn ask(
    text: &str,
    host: &aarch64::Host,
    change: impl FnOnce(&mut Request<Aarch64>),
) -> Result<Plan<Aarch64>, PlanError> {
    let board = board(text);
    let mut request = request(&board);
    change(&mut request);
    plan(&board, &request, host)
}

fn memory(size: u64) -> impl Fn(&mut Request<Aarch64>) {
    move |request| request.memory = size
}

fn cpus(cpus: u32) -> impl Fn(&mut Request<Aarch64>) {
    move |request| request.cpus = cpus
}

/// The refusal's text, which is one line.
fn refusal(result: Result<Plan<Aarch64>, PlanError>) -> String {
    let line = result
        .map(|plan| plan.width)
        .expect_err("to be refused")
        .to_string();
    assert!(!line.contains('\n'), "{line}");
    line
}

#[track_caller]
fn assert_says(line: &str, words: &[&str]) {
    for word in words {
        assert!(line.contains(word), "'{line}' does not say '{word}'");
    }
}

#[test]
fn memory_decides_the_ipa_bits() {
    for (size, bits, levels) in [
        (512 * MIB, 32, 2),
        (2 * GIB, 32, 2),
        (3 * GIB, 32, 2),
        (3 * GIB + MEMORY_UNIT, 33, 2),
        (14 * GIB, 34, 2),
        (15 * GIB, 34, 2),
        (15 * GIB + MEMORY_UNIT, 35, 3),
        (16 * GIB, 35, 3),
        (511 * GIB, 39, 3),
        (8191 * GIB, 43, 3),
        (8192 * GIB, 44, 4),
    ] {
        let plan = ask(VIRT, &host(48), memory(size)).expect("48 bits are plenty");
        let (width, asked) = (plan.width, show_size(size));
        assert_eq!(
            (width.bits, width.levels),
            (bits, levels),
            "--memory {asked}"
        );
        assert_eq!((width.limit, width.levels_at_limit), (48, 4));
        let last = GIB + size - 1;
        assert_eq!(plan.layout.ram, [Range::new(GIB, size).expect("RAM")]);
        assert_eq!(width.highest.range.last(), last);
    }
}

#[test]
fn redistributors_above_ram_count_for_the_bits() {
    let with = |cpus| {
        ask(VIRT, &host(48), |request| {
            request.memory = 15 * GIB;
            request.cpus = cpus;
        })
        .expect("a plan")
        .width
    };
    assert_eq!(with(123).bits, 34);
    assert_eq!(with(124).bits, 35);
    assert_eq!(with(124).highest.name, "GICv3 redistributor (1 vCPU)");
}

#[test]
fn a_bank_at_2_to_the_48_gets_49_bits() {
    for (size, bits) in [
        (1536 * MIB, 49),
        (GIB + (1 << 48), 49),
        (GIB + (1 << 49), 50),
    ] {
        let plan = ask(HIGHBANK, &host(52), memory(size)).expect("52 bits");
        assert_eq!(plan.width.bits, bits);
        assert_eq!(plan.layout.ram[1].start(), 1 << 48);
    }
    let only_low = ask(HIGHBANK, &host(52), memory(GIB)).expect("the high bank is empty");
    assert_eq!(only_low.width.bits, 32);
}

#[test]
fn a_board_wider_than_the_host_is_refused_by_the_bank_and_both_numbers() {
    let line = refusal(ask(HIGHBANK, &host(40), |_| ()));
    assert_says(
        &line,
        &["RAM bank 1", "49", "40", "use --memory 1G or less"],
    );
    let fixed = HIGHBANK.replace("up-to = \"1G\"", "size = \"1G\"").replace(
        "base = 0x1_0000_0000_0000",
        "base = 0x1_0000_0000_0000\nsize = \"512M\"",
    );
    let line = refusal(ask(&fixed, &host(40), |_| ()));
    assert_says(
        &line,
        &["RAM bank 1", "49", "40", "no memory size", "'highbank'"],
    );
}

#[test]
fn memory_beyond_the_limit_is_refused_with_the_largest_that_fits() {
    for (limit, cpus, largest) in [
        (40, 1, 1023 * GIB),
        (36, 1, 63 * GIB),
        (48, 1, 262_143 * GIB),
        // 7 redistributors of 128 KiB lie above RAM.
        (40, 130, 1023 * GIB - 7 * 128 * KIB),
    ] {
        let with = |size| {
            ask(VIRT, &host(limit), |request| {
                request.memory = size;
                request.cpus = cpus;
            })
        };
        let advice = format!("use --memory {} or less", show_size(largest));
        for asked in [largest + MEMORY_UNIT, 1 << 50, 1 << 62] {
            let line = refusal(with(asked));
            let (needs, offers) = (format!("needs {} ", need(asked)), format!("offers {limit}"));
            assert_says(&line, &[&advice, &offers]);
            if cpus == 1 {
                assert_says(&line, &["guest RAM", &needs]);
            }
        }
        let plan = with(largest).expect("the largest that fits");
        assert_eq!(plan.width.bits, limit);
    }
}

/// Address bits of a machine of so much memory from 1 GiB on.
fn need(memory: u64) -> u32 {
    u64::BITS - (GIB + memory - 1).leading_zeros()
}

#[test]
fn ipa_bits_are_what_was_asked_for_or_an_error() {
    let with = |limit, policy| ask(VIRT, &host(limit), |request| request.width = policy);
    let bits = |limit, policy| with(limit, policy).expect("a plan").width.bits;
    assert_eq!(bits(52, WidthPolicy::Exact(52)), 52);
    assert_eq!(bits(52, WidthPolicy::Max), 52);
    assert_eq!(bits(44, WidthPolicy::Max), 44);
    assert_eq!(bits(44, WidthPolicy::Exact(32)), 32);
    let line = refusal(with(48, WidthPolicy::Exact(52)));
    assert_says(&line, &["--ipa-bits 52", "32 to 48"]);
    assert!("53".parse::<WidthPolicy>().is_err());
    assert!("0".parse::<WidthPolicy>().is_err());
}

#[test]
fn ipa_bits_that_do_not_hold_the_machine_are_refused_with_what_would() {
    let with = |size| {
        ask(VIRT, &host(48), |request| {
            request.memory = size;
            request.width = WidthPolicy::Exact(33);
        })
    };
    let line = refusal(with(8 * GIB));
    assert_says(
        &line,
        &[
            "--ipa-bits 33",
            "needs 34",
            "guest RAM",
            "use --memory 7G or less",
        ],
    );
    assert_eq!(with(7 * GIB).expect("7G").width.bits, 33);
    assert!(with(7 * GIB + MEMORY_UNIT).is_err());
}

#[test]
fn a_kvm_that_cannot_be_asked_gives_40_bits() {
    let legacy = aarch64::Host {
        ipa_limit: None,
        ..host(48)
    };
    let plan = ask(VIRT, &legacy, |_| ()).expect("a plan");
    assert_eq!(
        (plan.width.bits, plan.width.need, plan.width.fixed),
        (40, 32, true)
    );
    let line = refusal(ask(VIRT, &legacy, memory(1024 * GIB)));
    assert_says(&line, &["41", "40 and no other number", "1023G"]);
    let exact = ask(VIRT, &legacy, |request| {
        request.width = WidthPolicy::Exact(36)
    });
    assert_says(
        &refusal(exact),
        &["--ipa-bits 36", "40 bits and no other number"],
    );
}

#[test]
fn a_gic_v2_serves_8_vcpus() {
    let pi = aarch64::Host {
        gic_v2: true,
        gic_v3: false,
        max_vcpus: 8,
        ..host(44)
    };
    let plan = ask(VIRT, &pi, cpus(8)).expect("8");
    assert_eq!(plan.layout.irqchip.version(), 2);
    assert_says(&refusal(ask(VIRT, &pi, cpus(9))), &["9 vCPUs", "--cpus 8"]);
    let v3 = ask(VIRT, &pi, |request| request.gic = GicChoice::V3);
    assert_says(&refusal(v3), &["GICv3", "GICv2 only", "--gic 2"]);
}

#[test]
fn a_gic_v3_serves_512_vcpus_from_two_regions() {
    let frames = |count| {
        let plan = ask(VIRT, &host(48), cpus(count)).expect("a plan");
        redistributors(&plan)
    };
    assert_eq!(frames(1), [(0x080a_0000, 1)]);
    assert_eq!(frames(123), [(0x080a_0000, 123)]);
    assert_eq!(frames(124), [(0x080a_0000, 123), (0x6000_0000, 1)]);
    assert_eq!(frames(512), [(0x080a_0000, 123), (0x6000_0000, 389)]);
    for many in [513, u32::MAX] {
        assert_says(
            &refusal(ask(VIRT, &host(48), cpus(many))),
            &["512", &many.to_string()],
        );
    }
    assert_says(
        &refusal(ask(VIRT, &host(48), cpus(0))),
        &["0 vCPUs", "--cpus 1"],
    );
}

fn redistributors(plan: &Plan<Aarch64>) -> Vec<(u64, u32)> {
    match &plan.layout.irqchip {
        Gic::V2 { .. } => Vec::new(),
        Gic::V3 { redistributors, .. } => redistributors
            .iter()
            .map(|run| (run.range.start(), run.frames))
            .collect(),
    }
}

#[test]
fn memory_that_is_no_memory_is_refused() {
    let line = |size| refusal(ask(VIRT, &host(48), memory(size)));
    assert_says(&line(0), &["0 bytes", "--memory 512M"]);
    assert_says(&line(1), &["1 bytes", "64 KiB", "--memory 64K"]);
    assert_says(
        &line(512 * MIB + 1),
        &["536870913 bytes", "--memory 524352K"],
    );
    assert_says(&line(100 * KIB), &["--memory 128K"]);
    // The least there is holds a device tree and, where it is wanted, stolen time.
    assert!(ask(VIRT, &host(48), memory(128 * KIB)).is_ok());
    let without = ask(VIRT, &host(48), |request| {
        request.memory = 64 * KIB;
        request.features.steal_time = Switch::Off;
    });
    assert!(without.is_ok());
}

#[test]
fn each_vcpu_has_a_clock_of_stolen_time_of_its_own() {
    let mut host = host(48);
    host.offered.steal_time = true;
    let clocks = |host: &aarch64::Host| -> Vec<Option<u64>> {
        let plan = ask(VIRT, host, cpus(3)).expect("fits");
        plan.vcpus.iter().map(|vcpu| vcpu.stolen_time).collect()
    };
    let first = 0x4001_0000;
    assert_eq!(
        clocks(&host),
        [Some(first), Some(first + 64), Some(first + 128)]
    );
    host.offered.steal_time = false;
    assert_eq!(clocks(&host), [None; 3]);
}

#[test]
fn a_kernel_needs_its_page_size() {
    let with = |pages: &[u64], page_size| {
        let host = aarch64::Host {
            guest_pages: pages.to_vec(),
            ..host(48)
        };
        ask(VIRT, &host, |request| {
            request.kernel = Some(Arm64Image {
                page_size,
                ..debian()
            });
        })
    };
    assert!(with(&[4 * KIB], Some(4 * KIB)).is_ok());
    assert!(with(&[4 * KIB], None).is_ok());
    assert!(with(&[4 * KIB, 16 * KIB], Some(16 * KIB)).is_ok());
    let line = refusal(with(&[4 * KIB, 64 * KIB], Some(16 * KIB)));
    assert_says(&line, &["16K pages", "4K, 64K"]);
}

#[test]
fn what_does_not_fit_into_memory_is_refused_with_what_would() {
    for (size, initrd) in [
        (32 * MIB, None),
        (43 * MIB, None),
        (64 * MIB, Some(32 * MIB)),
        (512 * MIB, Some(600 * MIB)),
        (512 * MIB, Some(512 * MIB - 0x2b2_0000)),
    ] {
        let with = |size| {
            ask(VIRT, &host(48), |request| {
                request.memory = size;
                request.kernel = Some(debian());
                request.initrd = initrd;
            })
        };
        let error = with(size)
            .map(|plan| plan.layout.payload)
            .expect_err("too small");
        let PlanError::TooSmall { memory, advice, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(memory, &show_size(size));
        assert_says(&error.to_string(), &["the kernel takes 45219840 bytes"]);
        if let Some(initrd) = initrd {
            assert_says(&error.to_string(), &[&format!("the initrd {initrd}")]);
        }
        let enough = parse_size(advice).expect("a size");
        assert!(with(enough).is_ok(), "{error}");
        assert!(enough < size + 700 * MIB, "{error}");
    }
}

#[test]
fn the_boot_cpu_begins_at_the_kernel_with_the_tree_in_x0() {
    let plan = ask(VIRT, &host(48), |request| {
        request.cpus = 3;
        request.kernel = Some(debian());
    })
    .expect("a plan");
    let boot = plan.vcpus[0].boot.expect("the boot CPU");
    let kernel = plan.layout.payload.kernel.expect("a kernel");
    assert_eq!((boot.pc, boot.x0), (kernel.start(), plan.blobs[0].address));
    assert!(plan.vcpus[1..].iter().all(|vcpu| vcpu.boot.is_none()));
}

// ------------------------------------------------------------------------------ seeds, bytes

fn tree(text: &str, request: &Request<Aarch64>, plan: &Plan<Aarch64>) -> Node {
    aarch64::device_tree(&board(text), plan, request)
}

fn seeded(seed: u8) -> (Request<Aarch64>, Plan<Aarch64>) {
    let board = board(VIRT);
    let mut request = request(&board);
    request.kernel = Some(debian());
    if seed > 0 {
        request.seeds = Some(Seeds {
            kaslr: u64::from_be_bytes([seed; 8]),
            rng: [seed; 64],
        });
    }
    let plan = plan(&board, &request, &host(48)).expect("a plan");
    (request, plan)
}

#[test]
fn the_same_request_gives_the_same_bytes() {
    for machine in [0, 1] {
        let [(_, a), (_, b)] = [seeded(machine), seeded(machine)];
        assert_eq!(a, b);
        assert_eq!(a.blobs[0].bytes, b.blobs[0].bytes);
    }
    for (a, b) in machines().iter().zip(machines()) {
        assert_eq!((&a.dtb, &a.dts), (&b.dtb, &b.dts), "{}", a.name);
    }
}

#[test]
fn trees_of_different_seeds_differ_in_the_seeds_alone() {
    let [(first, a), (second, b)] = [seeded(0xa5), seeded(0x5a)];
    assert_eq!((&a.layout, &a.vcpus), (&b.layout, &b.vcpus));
    let [x, y] = [&a.blobs[0].bytes, &b.blobs[0].bytes];
    assert_eq!(x.len(), y.len());
    let differ: Vec<_> = (0..x.len()).filter(|at| x[*at] != y[*at]).collect();
    assert_eq!(differ.len(), 8 + 64, "{differ:?}");
    assert!(differ.iter().all(|at| (x[*at], y[*at]) == (0xa5, 0x5a)));
    let chosen = |request, plan| {
        let tree = tree(VIRT, request, plan);
        tree.at(&["chosen"]).cloned().expect("/chosen")
    };
    assert_ne!(chosen(&first, &a), chosen(&second, &b));
}

#[test]
fn without_seeds_the_tree_has_none() {
    let (request, plan) = seeded(0);
    let tree = tree(VIRT, &request, &plan);
    let chosen = tree.at(&["chosen"]).expect("/chosen");
    assert_eq!(
        (chosen.get("kaslr-seed"), chosen.get("rng-seed")),
        (None, None)
    );
    let bytes = &plan.blobs[0].bytes;
    assert!(!bytes.windows(4).any(|window| window == b"seed"));
}

#[test]
fn the_command_line_is_in_the_tree_as_it_is() {
    let cmdline = "console=ttyAMA0 quiet \"a b\" \\ ä";
    let board_ = board(VIRT);
    let mut request = request(&board_);
    request.cmdline = cmdline.to_owned();
    let plan = plan(&board_, &request, &host(48)).expect("a plan");
    let tree = tree(VIRT, &request, &plan);
    let bootargs = tree
        .at(&["chosen"])
        .and_then(|chosen| chosen.get("bootargs"));
    assert_eq!(bootargs, Some(&Value::from(cmdline)));
}
