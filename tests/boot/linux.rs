use crate::commanded;
use crate::guest::{Armlet, MARKER, Outcome, section};
use crate::rig::{self, Rig};
use crate::{saved, snapshot};
use std::fs;
use std::sync::OnceLock;

/// What the standard guest does: it says what it sees of its machine, and touches an address where
/// nothing is.
const LOOK: &str = "
echo '== release'; uname -r
echo '== cpus'; nproc; cat /sys/devices/system/cpu/online
echo '== pages'; grep -m 1 KernelPageSize /proc/self/smaps
echo '== dmesg'; dmesg -r
echo '== iomem'; cat /proc/iomem
echo '== interrupts'; cat /proc/interrupts
echo '== tree'; base64 /sys/firmware/fdt
echo '== clock'; cat /sys/class/rtc/rtc0/since_epoch
echo '== nowhere'; devmem 0x0b000000 32; devmem 0x0b000004 16 5; devmem 0x0b000008 32
echo '== end'
";

/// What one guest with one vCPU and 256 MiB shows, for all tests that look at it.
struct Standard {
    outcome: Outcome,
    script: String,
    /// The device tree that armlet wrote to a file.
    dumped: Vec<u8>,
    /// Seconds since 1970, when it had ended.
    ended: u64,
}

fn standard(rig: &Rig) -> &'static Standard {
    static STANDARD: OnceLock<Standard> = OnceLock::new();
    STANDARD.get_or_init(|| {
        let armlet = Armlet::script(rig, "Image", LOOK).verbose();
        let dump = armlet.file("dump.dtb", b"");
        let guest = armlet.option("--dump-dtb", &dump).start();
        let dump = guest.path("dump.dtb");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let kept = folder.path().join("dump.dtb");
        // The guest's folder is gone with it.
        let mut guest = guest;
        guest.expect(MARKER);
        fs::copy(dump, &kept).expect("a dumped tree");
        let outcome = guest.end();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Standard {
            script: outcome.script(),
            outcome,
            dumped: fs::read(kept).expect("a dumped tree"),
            ended: now.expect("a time after 1970").as_secs(),
        }
    })
}

#[test]
fn debian_boots_to_user_space_and_powers_off() {
    let Some(rig) = rig::any() else { return };
    let standard = standard(rig);
    standard.outcome.assert_status(0);
    assert!(section(&standard.script, "release").starts_with("6.12."));
    assert_eq!(section(&standard.script, "cpus"), "1\n0");
    // Whatever the host's are.
    let pages: Vec<&str> = section(&standard.script, "pages")
        .split_whitespace()
        .collect();
    assert_eq!(pages[1..], ["4", "kB"], "the guest's pages");
}

#[test]
fn the_kernel_finds_the_machine_that_the_tree_describes() {
    let Some(rig) = rig::any() else { return };
    let dmesg = section(&standard(rig).script, "dmesg");
    let profile = rig.facts.all["profile"].as_str().expect("a name");
    let model = format!("Machine model: armlet,{profile}");
    for (part, line) in [
        ("the board", model.as_str()),
        ("PSCI", "psci: PSCIv1."),
        (
            "PSCI's conduit",
            "psci: probing for conduit method from DT.",
        ),
        ("the timer", "arch_timer: cp15 timer(s) running at"),
        ("memory", "[mem 0x0000000040000000-0x000000004fffffff]"),
        ("the random seed", "random: crng init done"),
        ("the KASLR seed", "KASLR enabled"),
        ("the console", "9000000.serial: ttyAMA0 at MMIO 0x9000000"),
        ("the clock", "rtc-pl031 9010000.rtc: registered as rtc0"),
        (
            "the power key's GPIO",
            "pl061_gpio 9030000.gpio: PL061 GPIO chip registered",
        ),
    ] {
        assert!(dmesg.contains(line), "{part}: no {line:?} in\n{dmesg}");
    }
    let total = dmesg
        .lines()
        .find_map(|line| {
            line.split_once("Memory: ")?
                .1
                .split_once("K/")?
                .1
                .split_once('K')
        })
        .map(|(total, _)| total);
    assert_eq!(total, Some("262144"), "KiB of memory in\n{dmesg}");
    let interrupts = section(&standard(rig).script, "interrupts");
    println!("{interrupts}");
    let (gic, found) = match rig.has_gic_v3() {
        true => (
            " GICv3 ",
            "GICv3: CPU0: found redistributor 0 region 0:0x00000000080a0000",
        ),
        // A GICv2 says nothing of itself.
        false => (" GIC-0 ", "Root IRQ handler: gic_handle_irq"),
    };
    assert!(interrupts.contains(gic), "{interrupts}");
    assert!(dmesg.contains(found), "no {found:?} in\n{dmesg}");
}

/// Lines of the kernel that a guest without much of hardware always gets; none is about what our
/// tree says.
const USUAL: &[&str] = &[
    // The tree does not describe caches, as QEMU's does not.
    "cacheinfo: Unable to detect cache hierarchy for CPU",
    // An emulated host is slow.
    "hrtimer: interrupt took",
];

/// Fails for each line of `dmesg -r` that is a warning or worse, or that complains of the tree.
fn assert_no_warnings(dmesg: &str) {
    let bad: Vec<&str> = dmesg
        .lines()
        .filter(|line| is_warning(line))
        .filter(|line| !USUAL.iter().any(|usual| line.contains(usual)))
        .collect();
    assert!(bad.is_empty(), "the kernel complains:\n{}", bad.join("\n"));
}

/// Whether a line of `dmesg -r` has a level of 4 (warning) or below, or words that tell of trouble
/// with a machine's description at any level.
fn is_warning(line: &str) -> bool {
    let level = line.strip_prefix('<').and_then(|rest| rest.split_once('>'));
    let Some((level, text)) = level else {
        return false;
    };
    // The levels are the lower three bits (Linux, include/linux/kern_levels.h).
    let severe = level.parse::<u32>().is_ok_and(|level| level & 7 <= 4);
    // Whether there is any or not, the kernel tells of memory that it must leave alone.
    let about_tree = text.contains("OF: ")
        && !text.contains("No reserved-memory node in the DT")
        && !text.contains("OF: reserved mem: 0x");
    let words = [
        "Firmware Bug",
        "Firmware Warn",
        "invalid interrupt",
        "not found in DT",
    ];
    severe || about_tree || words.iter().any(|word| text.contains(word))
}

#[test]
fn dmesg_has_no_warning() {
    let Some(rig) = rig::any() else { return };
    assert_no_warnings(section(&standard(rig).script, "dmesg"));
}

#[test]
fn the_guest_sees_the_tree_that_was_dumped() {
    let Some(rig) = rig::any() else { return };
    let standard = standard(rig);
    let text: String = section(&standard.script, "tree")
        .split_whitespace()
        .collect();
    let seen = from_base64(&text);
    assert_eq!(
        &seen[..4],
        [0xd0, 0x0d, 0xfe, 0xed],
        "the tree's magic number"
    );
    let seeds = |tree: &[u8]| {
        let mut tree = tree.to_vec();
        let seeds = take_seeds(&mut tree);
        (tree, seeds)
    };
    let ((seen, left), (dumped, dumped_seeds)) = (seeds(&seen), seeds(&standard.dumped));
    assert!(
        dumped_seeds.len() == 2 && dumped_seeds.iter().all(|seed| seed.iter().any(|b| *b != 0)),
        "the dumped tree's seeds: {dumped_seeds:?}"
    );
    // Linux wipes both once it has used them.
    assert!(
        left.iter().all(|seed| seed.iter().all(|byte| *byte == 0)),
        "seeds that the guest left in its tree: {left:?}"
    );
    assert!(seen == dumped, "the trees differ in more than the seeds");
}

/// Wipes kaslr-seed and rng-seed as Linux does, the first with zeros and the second with FDT_NOP,
/// and gives what they held.
fn take_seeds(tree: &mut [u8]) -> Vec<Vec<u8>> {
    // Devicetree specification v0.4, section 5: the header's fields off_dt_struct and
    // off_dt_strings; tokens of the structure block.
    const BEGIN_NODE: usize = 1;
    const PROP: usize = 3;
    const NOP: u32 = 4;
    const END: usize = 9;
    let mut seeds = Vec::new();
    let mut at = cell(tree, 8);
    let strings = cell(tree, 12);
    loop {
        let token = cell(tree, at);
        match token {
            BEGIN_NODE => {
                at += 4 + text_at(tree, at + 4).len() + 1;
            }
            PROP => {
                let (size, name) = (cell(tree, at + 4), cell(tree, at + 8));
                let name = text_at(tree, strings + name).to_owned();
                let value = at + 12..at + 12 + size;
                if name == "kaslr-seed" || name == "rng-seed" {
                    seeds.push(tree[value.clone()].to_vec());
                }
                if name == "kaslr-seed" {
                    tree[value.clone()].fill(0);
                }
                if name == "rng-seed" {
                    for word in tree[at..value.end].chunks_exact_mut(4) {
                        word.copy_from_slice(&NOP.to_be_bytes());
                    }
                }
                at = value.end;
            }
            END => return seeds,
            _ => at += 4,
        }
        at = at.next_multiple_of(4);
    }
}

fn cell(tree: &[u8], at: usize) -> usize {
    let bytes = tree[at..at + 4].try_into().expect("four bytes");
    u32::from_be_bytes(bytes) as usize
}

fn text_at(tree: &[u8], at: usize) -> &str {
    let text = tree[at..].split(|byte| *byte == 0).next();
    std::str::from_utf8(text.unwrap_or_default()).expect("a name in ASCII")
}

fn from_base64(text: &str) -> Vec<u8> {
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0_u32, 0);
    for digit in text.bytes().take_while(|digit| *digit != b'=') {
        let value = digits.iter().position(|known| *known == digit);
        bits = bits << 6 | value.expect("base64") as u32;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    bytes
}

#[test]
fn the_clock_tells_the_hosts_time() {
    let Some(rig) = rig::any() else { return };
    let standard = standard(rig);
    let told: u64 = section(&standard.script, "clock")
        .trim()
        .parse()
        .expect("seconds");
    let age = standard.outcome.age.as_secs() + 2;
    let range = standard.ended - age..=standard.ended;
    assert!(range.contains(&told), "{told} is not in {range:?}");
}

#[test]
fn an_access_to_nowhere_is_reported_and_the_guest_runs_on() {
    let Some(rig) = rig::any() else { return };
    let standard = standard(rig);
    let errors = &standard.outcome.errors;
    println!("{errors}");
    assert_eq!(
        section(&standard.script, "nowhere"),
        "0x00000000\n0x00000000"
    );
    let reports: Vec<&str> = errors
        .lines()
        .filter(|line| line.contains("where there is no device"))
        .collect();
    assert_eq!(reports.len(), 3, "{errors}");
    for (report, what) in reports.iter().zip([
        "read 4 bytes at 0xb000000,",
        "wrote 2 bytes at 0xb000004,",
        "read 4 bytes at 0xb000008,",
    ]) {
        assert!(report.starts_with("armlet: vCPU 0 at PC 0x"), "{report}");
        assert!(report.contains(what), "{report}");
    }
}

/// Boots `cpus` vCPUs and checks that all of them are online.
fn all_online(rig: &Rig, cpus: usize, memory: &'static str) {
    // Each of the kernel's first steps waits for all CPUs that are online. Where the host has few
    // for many, that takes minutes, so the others are started from user space.
    let few = std::thread::available_parallelism().map_or(1, usize::from);
    let late = cpus > 32 * few;
    let start = "for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
    [ $(cat $cpu/online) = 1 ] || echo 1 >$cpu/online
done";
    let script = format!(
        "{}
echo '== cpus'; nproc; cat /sys/devices/system/cpu/online
echo '== dmesg'; dmesg -r
echo '== interrupts'; grep arch_timer /proc/interrupts
echo '== end'",
        if late { start } else { "" }
    );
    let outcome = Armlet::script(rig, "Image", &script)
        .cmdline(if late { "maxcpus=1" } else { "" })
        .cpus(cpus)
        .memory(memory)
        .run();
    let script = outcome.script();
    let wanted = format!("{cpus}\n0-{}", cpus - 1);
    let online = section(&script, "cpus");
    assert_eq!(online, wanted, "nproc and the CPUs online");
    assert_no_warnings(section(&script, "dmesg"));
    // Each CPU takes its own timer's interrupts.
    let counts: Vec<&str> = section(&script, "interrupts").split_whitespace().collect();
    let silent = counts[1..=cpus]
        .iter()
        .filter(|count| **count == "0")
        .count();
    assert_eq!(silent, 0, "CPUs without a timer interrupt: {counts:?}");
}

#[test]
fn linux_turns_a_cpu_off_and_on_again() {
    let Some(rig) = rig::any() else { return };
    let script = "cpu=/sys/devices/system/cpu
for turn in 1 2 3; do
    echo 0 >$cpu/cpu1/online || exit
    cat $cpu/online
    echo 1 >$cpu/cpu1/online || exit
    cat $cpu/online
done";
    let outcome = Armlet::script(rig, "Image", script).cpus(2).run();
    assert_eq!(outcome.script(), "0\n0-1\n".repeat(3));
    assert_eq!(outcome.complaints(), "");
}

#[test]
fn two_vcpus_are_online() {
    let Some(rig) = rig::any() else { return };
    all_online(rig, 2, "256M");
}

#[test]
fn eight_vcpus_are_online() {
    let Some(rig) = rig::any() else { return };
    all_online(rig, 8, "256M");
}

#[test]
fn a_hundred_and_thirty_vcpus_are_online() {
    let Some(rig) = rig::main() else { return };
    if rig.facts.max_vcpus < 130 {
        println!(
            "skipped: this host has {} vCPUs at most",
            rig.facts.max_vcpus
        );
        return;
    }
    all_online(rig, 130, "512M");
}

/// Boots one of Debian's kernels, which is of this version and has nothing to complain of.
fn boots_without_warnings(kernel: &str, version: &str) {
    let Some(rig) = rig::any() else { return };
    let script = "
echo '== release'; uname -r
echo '== dmesg'; dmesg -r
echo '== end'";
    let outcome = Armlet::script(rig, kernel, script)
        .cpus(2)
        .memory("512M")
        .run();
    let script = outcome.script();
    let release = section(&script, "release");
    assert!(release.starts_with(version), "{script}");
    assert_no_warnings(section(&script, "dmesg"));
}

#[test]
fn debians_6_1_boots() {
    boots_without_warnings("Image-6.1", "6.1.");
}

#[test]
fn debians_7_3_boots() {
    boots_without_warnings("Image-7.3.gz", "7.3.");
}

#[test]
fn a_kernel_with_16_kib_pages_boots_or_is_refused() {
    let Some(rig) = rig::any() else { return };
    if rig.facts.guest_pages.contains(&0x4000) {
        let script = "echo '== page'; zcat /proc/config.gz | grep PAGE_SIZE_16KB; dmesg -r >/tmp/d
echo '== smaps'; grep -m 1 KernelPageSize /proc/self/smaps
echo '== dmesg'; cat /tmp/d
echo '== end'";
        let outcome = Armlet::script(rig, "Image-16k", script)
            .cpus(2)
            .memory("512M")
            .run();
        let script = outcome.script();
        let page: Vec<&str> = section(&script, "smaps").split_whitespace().collect();
        assert_eq!(page[1..], ["16", "kB"], "the guest's pages");
        assert_no_warnings(section(&script, "dmesg"));
        return;
    }
    let outcome = Armlet::debian(rig, "Image-16k", "poweroff")
        .memory("512M")
        .run();
    outcome.assert_status(3);
    println!("{}", outcome.errors);
    let wanted = "the kernel uses 16K pages, which this host's CPUs cannot translate for a guest (they offer 4K, 64K)";
    assert!(outcome.errors.contains(wanted), "{}", outcome.errors);
    assert_eq!(outcome.errors.lines().count(), 1, "{}", outcome.errors);
}

/// The interrupt is raised once: SPI 8, by its INTID.
fn is_told_that_it_was_cloned(rig: &Rig, kernel: &str) -> String {
    let script = commanded::linux_is_told_that_it_was_cloned(|script| {
        Armlet::script(rig, kernel, script).cpus(2)
    });
    assert!(section(&script, "driver").contains(".rng"), "{script}");
    let interrupts = section(&script, "interrupts");
    let words: Vec<&str> = interrupts.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "Edge");
    let at = at.unwrap_or_else(|| panic!("no edge in {interrupts}"));
    assert_eq!(words[at - 1], "40", "{interrupts}");
    let count = |word: &&str| word.parse::<u32>().expect("a count");
    assert_eq!(
        words[1..3].iter().map(count).sum::<u32>(),
        1,
        "{interrupts}"
    );
    script
}

#[test]
fn linux_6_12_reseeds_its_random_numbers_when_it_was_cloned() {
    let Some(rig) = rig::any() else { return };
    let script = is_told_that_it_was_cloned(rig, "Image");
    // It has no driver for VMClock.
    assert!(!script.contains("56 43 4c 4b"), "{script}");
}

/// Checks what two readings of VMClock, in hexadecimal, say of one clone.
fn assert_vmclock_changed(before: &str, after: &str) {
    let bytes = |text: &str| -> Vec<u8> {
        let words = text.split_whitespace();
        let byte = |word| u8::from_str_radix(word, 16).expect("hexadecimal");
        words.map(byte).collect()
    };
    let (before, after) = (bytes(before), bytes(after));
    assert_eq!((before.len(), after.len()), (112, 112));
    assert_eq!(&before[..4], b"VCLK");
    // Sequence, disruption marker and generation; nothing else.
    assert_eq!(
        (&before[12..16], &after[12..16]),
        (&[0; 4][..], &[2, 0, 0, 0][..])
    );
    for changed in [16..24, 104..112] {
        assert_ne!(before[changed.clone()], after[changed]);
    }
    for same in [0..12, 24..104] {
        assert_eq!(before[same.clone()], after[same]);
    }
}

#[test]
fn linux_7_3_sees_by_vmclock_too_that_it_was_cloned() {
    let Some(rig) = rig::any() else { return };
    let script = is_told_that_it_was_cloned(rig, "Image-7.3.gz");
    assert!(section(&script, "dmesg").contains("vmclock0: registered miscdev"));
    let [before, after] = ["clock", "cloned clock"].map(|name| section(&script, name));
    assert_vmclock_changed(before, after);
}

#[test]
fn a_guest_of_6_1_takes_no_notice_of_vmgenid() {
    let Some(rig) = rig::any() else { return };
    let look =
        "echo '== dmesg'; dmesg -r | grep -i -E 'vmgenid|vmclock|reserved mem'; echo '== end'";
    let armlet = Armlet::script(rig, "Image-6.1", look).option("--vmgenid", "on");
    let script = armlet.run().assert_status(0).script();
    assert!(!section(&script, "dmesg").contains("rror"), "{script}");
}

#[test]
fn two_guests_from_one_snapshot_share_no_random_numbers() {
    let Some(rig) = rig::any() else { return };
    snapshot::clones_draw_numbers_of_their_own(|script| Armlet::script(rig, "Image", script));
}

#[test]
fn a_guest_at_work_is_saved_and_goes_on() {
    let Some(rig) = rig::any() else { return };
    saved::a_guest_at_work_goes_on(Armlet::devices(rig, &saved::work()).cpus(2));
}

#[test]
fn a_pause_is_no_time_for_a_guest() {
    let Some(rig) = rig::any() else { return };
    saved::a_pause_is_no_time(Armlet::script(rig, "Image", saved::CLOCK).cpus(2));
}
