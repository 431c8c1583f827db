use crate::commanded;
use crate::control::done;
use crate::guest::{Armlet, Guest, Input, section};
use crate::lives;
use crate::rig::{self, Rig};
use crate::software::archive;
use crate::{saved, snapshot};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// What the guest says of its machine.
const LOOK: &str = "
echo '== release'; uname -r
echo '== cpus'; nproc; cat /sys/devices/system/cpu/online
echo '== dmesg'; dmesg -r
echo '== clock'; cat /sys/devices/system/clocksource/clocksource0/current_clocksource
echo '== end'
";

/// Lines of the kernel that a guest in an emulated host always gets; none is about what we tell it.
const USUAL: &[&str] = &[
    // What the emulated CPU lacks.
    "Speculative Return Stack Overflow",
    "hrtimer: interrupt took",
    "Unstable clock detected",
    // There is none.
    "PCI: Fatal: No config space access function found",
    "PCI: System does not support PCI",
    // Eight vCPUs on one CPU that is emulated.
    "clocksource: timekeeping watchdog",
    "clocksource: Long readout interval",
    "TSC synchronization",
    "TSC warp",
];

/// Fails for each line of `dmesg -r` that is a warning or worse.
fn assert_no_warnings(dmesg: &str) {
    let level = |line: &str| {
        let level = line.strip_prefix('<')?.split_once('>')?.0;
        // The levels are the lower three bits (Linux, include/linux/kern_levels.h).
        Some(level.parse::<u32>().ok()? & 7)
    };
    let bad: Vec<&str> = dmesg
        .lines()
        .filter(|line| level(line).is_some_and(|level| level <= 4) || line.contains("ACPI Error"))
        .filter(|line| !USUAL.iter().any(|usual| line.contains(usual)))
        .collect();
    assert!(bad.is_empty(), "the kernel complains:\n{}", bad.join("\n"));
}

/// Boots `kernel` with so many vCPUs, and checks what it says.
fn boots(kernel: &str, release: &str, cpus: usize) {
    let Some(rig) = rig::linux() else { return };
    let outcome = Armlet::script(rig, kernel, LOOK).cpus(cpus).run();
    let script = outcome.script();
    let found = section(&script, "release");
    assert!(found.starts_with(release), "{found}");
    let online = match cpus {
        1 => "1\n0".to_owned(),
        _ => format!("{cpus}\n0-{}", cpus - 1),
    };
    assert_eq!(
        section(&script, "cpus"),
        online,
        "nproc and the CPUs online"
    );
    let dmesg = section(&script, "dmesg");
    for line in [
        "Hypervisor detected: KVM",
        "kvm-clock: Using msrs",
        "ARMLETPC",
    ] {
        assert!(dmesg.contains(line), "no {line:?} in\n{dmesg}");
    }
    assert_eq!(section(&script, "clock"), "kvm-clock");
    assert_no_warnings(dmesg);
    assert_eq!(outcome.complaints(), "");
}

#[test]
fn debians_6_12_boots_from_a_bzimage() {
    for cpus in [1, 2, 8] {
        boots("bzImage", "6.12.", cpus);
    }
}

#[test]
fn debians_6_12_boots_from_elf() {
    for cpus in [1, 2, 8] {
        boots("vmlinux", "6.12.", cpus);
    }
}

#[test]
fn debians_6_1_boots_from_a_bzimage() {
    for cpus in [1, 2, 8] {
        boots("bzImage-6.1", "6.1.", cpus);
    }
}

#[test]
fn debians_6_1_boots_from_elf() {
    for cpus in [1, 2, 8] {
        boots("vmlinux-6.1", "6.1.", cpus);
    }
}

/// Tells the time on each CPU for a while, by what it has slept and by CLOCK_BOOTTIME.
const TELL_THE_TIME: &str = "
count=0
while [ $count -lt 120 ]; do
    count=$((count + 1))
    for cpu in 1 2; do taskset $cpu cat /proc/uptime; done
    sleep 0.05
done
echo '== dmesg'; dmesg -r
echo '== clock'; cat /sys/devices/system/clocksource/clocksource0/current_clocksource
echo '== end'
";

#[test]
fn linux_goes_on_from_a_snapshot_and_its_clock_never_steps_back() {
    /// How long nobody runs the guest.
    const BETWEEN: Duration = Duration::from_secs(20);
    let Some(rig) = rig::linux() else { return };
    let armlet = Armlet::script(rig, "vmlinux-6.1", TELL_THE_TIME).cpus(2);
    let control = armlet.file("control", b"");
    fs::remove_file(&control).expect("a file of ours");
    let mut guest = armlet.option("--control", &control).start();
    guest.expect("ARMLET-SCRIPT-START");
    guest.expect(".");
    let folder = guest.path("saved");
    done(&control, &["pause"]);
    done(
        &control,
        &["snapshot", folder.to_str().expect("a path of ours")],
    );
    let saved = tempfile::tempdir().expect("a folder");
    let kept = saved.path().join("kept");
    fs::rename(&folder, &kept).expect("on one disk");
    let before = guest.said();
    drop(guest);
    std::thread::sleep(BETWEEN);
    let outcome = Armlet::new().restore(&kept).end();
    outcome.assert_status(0);
    let (before, after) = (before.replace('\r', ""), outcome.text());
    let times = |text: &str| -> Vec<f64> {
        let ups = text.lines().filter_map(|line| line.split_once(' '));
        ups.filter_map(|(up, _)| up.parse().ok()).collect()
    };
    let told = [times(&before), times(&after)].concat();
    println!(
        "{} and {} times: {told:?}",
        times(&before).len(),
        times(&after).len()
    );
    assert!(times(&after).len() > 100, "{after}");
    assert!(told.is_sorted(), "{told:?}");
    // It did not pass while nobody ran the guest.
    let longest = told
        .windows(2)
        .map(|two| two[1] - two[0])
        .fold(0.0, f64::max);
    assert!(longest < BETWEEN.as_secs_f64() / 2.0, "{longest}: {told:?}");
    assert_no_warnings(section(&after, "dmesg"));
    assert_eq!(section(&after, "clock"), "kvm-clock");
    assert_eq!(outcome.complaints(), "");
}

/// Keeps two vCPUs busy, and tells how many ticks of theirs others had.
const SHARE_A_CPU: &str = "dmesg
burn() { count=0; while [ $count -lt 100000 ]; do count=$((count + 1)); done; }
burn & burn & wait
echo '== stolen'
while read -r name user nice system idle iowait irq softirq steal rest; do
    [ $name = cpu ] && echo $steal
done </proc/stat
echo '== end'
";

#[test]
fn what_kvm_offers_beside_a_cpu_is_switched_by_options() {
    let Some(rig) = rig::linux() else { return };
    let look = |options: &[(&str, &str)]| {
        let mut armlet = Armlet::script(rig, "vmlinux-6.1", SHARE_A_CPU).cpus(2);
        for (option, value) in options {
            armlet = armlet.option(option, value);
        }
        armlet.run().script()
    };
    let as_offered = look(&[]);
    const LINES: [&str; 4] = [
        "setup PV IPIs",
        "PV spinlocks enabled",
        "KVM setup pv remote TLB flush",
        "setup PV sched yield",
    ];
    for line in LINES {
        assert!(as_offered.contains(line), "no {line:?} in\n{as_offered}");
    }
    // Two vCPUs want the CPU of the emulated host.
    assert_ne!(section(&as_offered, "stolen"), "0");
    let without = look(&[(
        "--pv",
        "send-ipi=off,unhalt=off,steal-time=off,tlb-flush=off,sched-yield=off,tsc-deadline=off",
    )]);
    for line in LINES.into_iter().chain(["TSC deadline timer available"]) {
        assert!(!without.contains(line), "{line:?} in\n{without}");
    }
    assert_eq!(section(&without, "stolen"), "0");
    assert!(
        without.contains("PV spinlocks disabled, no host support"),
        "{without}"
    );
    let pinned = look(&[("--pv", "realtime=on"), ("--exits", "hlt=off")]);
    assert!(pinned.contains("PV spinlocks disabled"), "{pinned}");
    // Vcpus that always run need no help of the host.
    assert!(!pinned.contains("pv remote TLB flush"), "{pinned}");
}

/// Brings one CPU beyond 255 online, and gives it the console's interrupt.
const FAR_CPU: &str = "
echo 1 >/sys/devices/system/cpu/cpu257/online
irq=$(awk -F: '/ttyS0/ { print $1 + 0 }' /proc/interrupts)
echo 257 >/proc/irq/$irq/smp_affinity_list
# The first of these moves it, the others come to its new place.
for line in 1 2 3 4 5 6 7 8; do echo $line; sleep 0.1; done
echo '== present'; cat /sys/devices/system/cpu/present
echo '== online'; cat /sys/devices/system/cpu/online
echo '== affinity'; cat /proc/irq/$irq/effective_affinity_list
echo '== count'; awk '/ttyS0/ { print $3 }' /proc/interrupts
echo '== end'
";

#[test]
fn a_cpu_beyond_255_comes_online_and_takes_a_devices_interrupt() {
    let Some(rig) = rig::linux() else { return };
    // All 260 would take an emulated CPU minutes to start.
    let armlet = Armlet::script(rig, "vmlinux-6.1", FAR_CPU)
        .cpus(260)
        .memory("512M");
    let script = armlet.cmdline("maxcpus=1").run().script();
    assert_eq!(section(&script, "present"), "0-259");
    assert_eq!(section(&script, "online"), "0,257");
    assert_eq!(section(&script, "affinity"), "257");
    assert_ne!(section(&script, "count"), "0", "interrupts at CPU 257");
}

#[test]
fn memory_lies_on_both_sides_of_the_hole() {
    let Some(rig) = rig::linux() else { return };
    let script = "grep MemTotal /proc/meminfo; grep 'System RAM' /proc/iomem";
    let outcome = Armlet::script(rig, "vmlinux-6.1", script)
        .memory("4G")
        .run();
    let script = outcome.script();
    for bank in [
        "00100000-bfffffff : System RAM",
        "100000000-13fffffff : System RAM",
    ] {
        assert!(script.contains(bank), "no {bank} in\n{script}");
    }
    let total = script.split_whitespace().nth(1);
    let total = total.and_then(|kib| kib.parse::<u64>().ok());
    assert!(total.is_some_and(|kib| kib > 3 << 20), "{script}");
}

#[test]
fn linux_reboots_in_place_three_times_and_powers_off() {
    let Some(rig) = rig::linux() else { return };
    lives::reboots_three_times(Armlet::debian(rig, "vmlinux-6.1", "shell"));
}

/// Waits for the power key as a distribution's logind does. It says so when it listens: Linux throws
/// away what a key does while nobody has its device open.
const LISTEN: &str = "for module in /modules/*; do insmod $module; done
until [ -e /dev/input/event0 ]; do sleep 0.1; done
exec 3</dev/input/event0
echo POWERKEY-READY
head -c 24 <&3 >/dev/null
echo POWERKEY-PRESSED
";

/// A guest of 6.1 whose initramfs holds more archives.
fn with_archives(rig: &Rig, archives: &[Vec<u8>], what: &str) -> Armlet {
    let mut initrd = fs::read(rig.asset("initrd")).expect("the initramfs");
    initrd.extend(archives.concat());
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path: PathBuf = folder.path().join("initrd");
    fs::write(&path, initrd).expect("an initramfs");
    // Armlet opens it when it starts.
    let _kept = folder.keep();
    Armlet::linux(&rig.asset("bzImage-6.1"), &path, what)
}

#[test]
fn sigterm_presses_the_power_button_and_linux_powers_off() {
    let Some(rig) = rig::linux() else { return };
    let modules = fs::read(rig.asset("powerkey.cpio")).expect("the modules");
    let archives = [modules, archive("powerkey.sh", LISTEN.as_bytes())];
    lives::powers_off_by_sigterm(with_archives(rig, &archives, "powerkey").start());
}

/// Copies the first half of a disk to its second, and the start of persistent memory to the disk's
/// end.
const COPY: &str = "
echo '== devices'; ls /sys/bus/acpi/devices | grep -c LNRO0005
cat /sys/class/misc/hw_random/rng_current; head -c 64 /dev/hwrng | wc -c
echo '== interrupts'; grep virtio /proc/interrupts
dd if=/dev/vda of=/dev/vda bs=64k count=16 seek=16
dd if=/dev/pmem0 of=/dev/vda bs=64k count=1 seek=32
sync
echo '== end'
";

#[test]
fn virtio_devices_are_found_by_acpi_and_work() {
    let Some(rig) = rig::linux() else { return };
    for (kernel, drivers) in [
        ("vmlinux", "devices.cpio"),
        ("bzImage-6.1", "devices-6.1.cpio"),
    ] {
        let armlet = Armlet::devices_on(rig, kernel, drivers, COPY);
        let noise: Vec<u8> = (0..1 << 20).map(|at| (at * 31 + at / 997) as u8).collect();
        let mut disk = noise.clone();
        disk.resize((2 << 20) + (64 << 10), 0);
        let memory: Vec<u8> = (0..2 << 20).map(|at| (at * 17 + at / 251) as u8).collect();
        let disk = armlet.file("disk", &disk);
        let pmem = armlet.file("pmem", &memory);
        let path = |path: &PathBuf| path.to_string_lossy().into_owned();
        let armlet = armlet.option("--disk", path(&disk));
        let guest = armlet
            .option("--pmem", format!("path={}", path(&pmem)))
            .option("--balloon", "on")
            .start();
        let kept = tempfile::NamedTempFile::new().expect("a file");
        // The guest's folder is gone with it; the link stays.
        fs::remove_file(kept.path()).expect("a file of ours");
        fs::hard_link(&disk, kept.path()).expect("a link");
        let outcome = guest.end();
        let script = outcome.script();
        println!("{script}");
        assert_eq!(section(&script, "devices"), "4\nvirtio_rng.0\n64");
        let lines = section(&script, "interrupts").lines().count();
        assert!(lines >= 3, "{script}");
        let disk = fs::read(kept.path()).expect("the disk");
        assert!(disk[..1 << 20] == noise[..], "the first half changed");
        assert!(
            disk[1 << 20..2 << 20] == noise[..],
            "the second half is no copy"
        );
        assert!(disk[2 << 20..] == memory[..64 << 10], "persistent memory");
    }
}

#[test]
fn a_panic_is_reported_and_may_end_armlet() {
    let Some(rig) = rig::linux() else { return };
    let guest = || {
        let armlet = Armlet::debian(rig, "vmlinux-6.1", "crash");
        armlet.option("--on-panic", "exit")
    };
    lives::panics(guest, 4, "RIP 0x");
}

#[test]
fn every_byte_arrives_in_order_both_ways() {
    const BYTES: usize = 4 << 10;
    let Some(rig) = rig::linux() else { return };
    let sent: Vec<u8> = (0..BYTES).map(|at| (at * 7 + at / 256) as u8).collect();
    let script = format!(
        "exec </dev/console
stty raw -echo
echo READY
head -c {BYTES} >/tmp/in
printf BEGIN; cat /tmp/in; printf END"
    );
    let mut guest: Guest = Armlet::script(rig, "vmlinux-6.1", &script)
        .input(Input::Pipe)
        .start();
    guest.expect("READY\n");
    guest.send(&sent);
    guest.expect("END");
    let outcome = guest.end();
    outcome.assert_status(0);
    let start = outcome.bytes.windows(5).position(|part| part == b"BEGIN");
    let start = start.expect("output") + 5;
    let returned = &outcome.bytes[start..start + BYTES];
    let wrong = returned.iter().zip(&sent).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "the first byte that differs");
}

#[test]
fn linux_reseeds_its_random_numbers_when_it_was_cloned() {
    let Some(rig) = rig::linux() else { return };
    // 6.1 of Debian's cloud kernels has no driver for VMGenID, and 6.12 none for VMClock.
    let script = commanded::linux_is_told_that_it_was_cloned(|script| {
        Armlet::script(rig, "bzImage", script).cpus(2)
    });
    assert!(
        section(&script, "driver").contains("VMGENCTR:00"),
        "{script}"
    );
    let interrupts = section(&script, "interrupts");
    // Pin 5, once, and not that of the power button.
    let is_ours = |line: &&str| line.contains("5-edge");
    let ours = interrupts.lines().find(is_ours).unwrap_or_default();
    let words: Vec<&str> = ours.split_whitespace().collect();
    let count = |word: &&str| word.parse::<u32>().expect("a count");
    assert_eq!(
        words[1..3].iter().map(count).sum::<u32>(),
        1,
        "{interrupts}"
    );
}

#[test]
fn two_guests_from_one_snapshot_share_no_random_numbers() {
    let Some(rig) = rig::linux() else { return };
    snapshot::clones_draw_numbers_of_their_own(|script| Armlet::script(rig, "bzImage", script));
}

#[test]
fn a_guest_at_work_is_saved_and_goes_on() {
    let Some(rig) = rig::main() else { return };
    saved::a_guest_at_work_goes_on(Armlet::devices(rig, &saved::work()).cpus(2));
}

#[test]
fn a_pause_is_no_time_for_a_guest() {
    let Some(rig) = rig::linux() else { return };
    saved::a_pause_is_no_time(Armlet::script(rig, "bzImage", saved::CLOCK).cpus(2));
}

/// What it says of its PCI bus, and work for each device: the first half of the disk is copied to the
/// second.
const LOOK_AT_PCI: &str = "
echo '== functions'
for device in /sys/bus/pci/devices/*; do
    echo \"${device##*/} $(cat $device/vendor) $(cat $device/device) $(cat $device/class)\"
done
echo '== copy'
dd if=/dev/vda of=/dev/vda bs=64k count=16 seek=16 2>/dev/null
sync
echo 3 > /proc/sys/vm/drop_caches
dd if=/dev/vda bs=64k count=16 2>/dev/null | md5sum
dd if=/dev/vda bs=64k count=16 skip=16 2>/dev/null | md5sum
head -c 64 /dev/hwrng | wc -c
echo '== interrupts'; grep -E 'virtio[0-9]' /proc/interrupts
echo '== dmesg'; dmesg -r
echo '== end'
";

#[test]
fn virtio_devices_work_over_pci_and_interrupt_by_msi() {
    let Some(rig) = rig::linux() else { return };
    for (kernel, drivers) in [
        ("vmlinux", "devices.cpio"),
        ("bzImage-6.1", "devices-6.1.cpio"),
    ] {
        let armlet = Armlet::devices_on(rig, kernel, drivers, LOOK_AT_PCI);
        let mut disk: Vec<u8> = (0..1 << 20).map(|at| (at * 31 + at / 997) as u8).collect();
        disk.resize(2 << 20, 0);
        let disk = armlet.file("disk", &disk);
        let armlet = armlet.option("--disk", disk.to_string_lossy().into_owned());
        let outcome = armlet.option("--transport", "pci").run();
        let script = outcome.script();
        println!("{script}");
        let functions = section(&script, "functions");
        let bridge = "0000:00:00.0 0x1b36 0x0008 0x060000";
        assert!(functions.starts_with(bridge), "{functions}");
        for function in ["0x1af4 0x1042 0x010000", "0x1af4 0x1044 0xff0000"] {
            assert!(functions.contains(function), "{function}:\n{functions}");
        }
        let copy: Vec<&str> = section(&script, "copy").lines().collect();
        assert_eq!((copy[0], copy[2]), (copy[1], "64"), "{copy:?}");
        // The disk's queue and the random number generator's: by MSI, and counting.
        for queue in ["-req.0", "-input"] {
            let mut lines = section(&script, "interrupts").lines();
            let line = lines.find(|line| line.contains(queue));
            let line = line.unwrap_or_else(|| panic!("no {queue}:\n{script}"));
            let count = line.split_whitespace().nth(1).expect("a count");
            assert!(line.contains("PCI-MSI") && count != "0", "{line}");
        }
        assert_no_warnings(section(&script, "dmesg"));
        assert_eq!(outcome.complaints(), "");
    }
}
