use crate::guest::{Armlet, Input};
use crate::interpreter::image;
use crate::software::{I8042_COMMAND, Program, RESET_CONTROL, UART};
use crate::steps::Steps;
use crate::{api, commanded, control, engines, handler, lives, rig, snapshot};
use rustix::process::Signal;
use std::fs::{self, File};
use std::process::{Command, Stdio};

/// A guest that says that it runs, and hears nothing.
fn deaf() -> Program {
    Program::default().print("up\n").stay()
}

/// Runs `program` to its end, which is to be a power-off without a word of armlet.
fn printed(program: &Program) -> String {
    let outcome = Armlet::program(program).run();
    outcome.assert_status(0);
    assert_eq!(outcome.errors, "");
    outcome.text()
}

#[test]
fn the_probe_names_the_board_and_what_kvm_offers() {
    if !rig::small() {
        return;
    }
    let mut probe = std::process::Command::new(env!("CARGO_BIN_EXE_armlet"));
    let output = probe.args(["probe", "--json"]).output();
    let text = output.expect("armlet can be run").stdout;
    let report: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    let facts = &report["facts"];
    assert_eq!(report["runs_guests"], true, "{report:#}");
    assert_eq!(facts["profile"], "pc");
    for switch in [
        "clock",
        "async-pf",
        "steal-time",
        "tlb-flush",
        "poll-control",
    ] {
        assert!(facts[switch].is_boolean(), "{switch}: {facts:#}");
    }
}

#[test]
fn a_bzimage_starts_in_long_mode() {
    if !rig::small() {
        return;
    }
    // In 32-bit mode 0x48 is DEC EAX, in 64-bit mode a prefix: MOV EAX, 1; a prefix; NOP.
    let yes = Program::default().print("64\n");
    let program = Program::default().bytes(&[0xb8, 1, 0, 0, 0, 0x48, 0x90]);
    let program = program.if_eax(1, &yes).print("end\n").power_off();
    assert_eq!(printed(&program), "64\nend\n");
}

#[test]
fn an_elf_kernel_starts_in_protected_mode() {
    if !rig::small() {
        return;
    }
    let yes = Program::default().print("32\n");
    let program = Program::default().bytes(&[0xb8, 1, 0, 0, 0, 0x48, 0x90]);
    let program = program.if_eax(0, &yes);
    // MOV EAX, [EBX]: the magic number of the start info.
    let magic = Program::default().print("info\n");
    let program = program.bytes(&[0x8b, 0x03]).if_eax(0x336e_c578, &magic);
    let outcome = Armlet::image(&program.power_off().elf()).run();
    outcome.assert_status(0);
    assert_eq!(outcome.text(), "32\ninfo\n");
}

#[test]
fn a_second_vcpu_starts_in_real_mode() {
    if !rig::small() {
        return;
    }
    let program = Program::default().start_second("second\n").sleep();
    let mut guest = Armlet::program(&program).cpus(2).start();
    guest.expect("second\n");
    guest.signal(Signal::INT);
    guest.end().assert_status(6);
}

#[test]
fn vcpus_beyond_255_start_and_take_interrupts() {
    if !rig::small() {
        return;
    }
    for id in [255, 256, 299] {
        let program = Program::default().route_to(4, id);
        let program = program.start_far(id, "far\n", "interrupted\n").sleep();
        let outcome = Armlet::program(&program).cpus(300).run();
        outcome.assert_status(0);
        assert_eq!(outcome.text(), "far\ninterrupted\n", "vCPU {id}");
    }
}

#[test]
fn with_300_vcpus_devices_interrupt_the_first() {
    if !rig::small() {
        return;
    }
    let handler = Program::default().print("sent\n").power_off();
    let program = Program::default().on_interrupt_by_x2apic(&handler).route(4);
    let program = program.print("up\n").out(UART + 1, 2).wait();
    let outcome = Armlet::program(&program).cpus(300).run();
    outcome.assert_status(0);
    assert_eq!(outcome.text(), "up\nsent\n");
}

#[test]
fn a_string_goes_to_one_port() {
    if !rig::small() {
        return;
    }
    let program = Program::default().print_string("0123456789abcdef\n");
    assert_eq!(printed(&program.power_off()), "0123456789abcdef\n");
}

/// How often vCPU 0 accessed a port that armlet answers, by what `--stats` said last.
fn port_accesses(errors: &str) -> usize {
    let line = errors
        .lines()
        .rfind(|line| line.contains("vCPU 0 left KVM"));
    let count = line.and_then(|line| line.split_once("port accesses "));
    let digits = count.expect("a line of statistics").1;
    let digits = digits.split(|c: char| !c.is_ascii_digit()).next();
    digits
        .and_then(|digits| digits.parse().ok())
        .expect("a number")
}

#[test]
fn output_of_those_who_look_before_they_send_is_collected() {
    if !rig::small() {
        return;
    }
    let text = |length: usize| -> String { ('a'..='z').cycle().take(length).collect() };
    let run = |program: Program| {
        let outcome = Armlet::program(&program.power_off()).flag("--stats").run();
        outcome.assert_status(0);
        let exits = port_accesses(&outcome.errors);
        println!("{} bytes of output: {exits} exits", outcome.bytes.len());
        (outcome.text(), exits)
    };
    // A look before each byte: the bytes are collected, the looks are not.
    let (output, exits) = run(Program::default().print_looking(&text(480), 1));
    assert_eq!(output, text(480));
    assert!((480..700).contains(&exits), "{exits} exits");
    // A look for each 16 bytes, as Linux does once the port is open.
    let (output, exits) = run(Program::default().print_looking(&text(1600), 16));
    assert_eq!(output, text(1600));
    assert!((100..500).contains(&exits), "{exits} exits");
    // KVM would drop what a string instruction writes beyond its room.
    let (output, _) = run(Program::default()
        .print_looking(&text(32), 64)
        .print_string(&text(1500)));
    assert_eq!(output, text(32) + &text(1500));
}

#[test]
fn ports_without_a_device_read_as_ones_and_are_no_fault() {
    if !rig::small() {
        return;
    }
    let yes = Program::default().print("ones\n");
    let program = Program::default().out(0x80, 1).input(0x2fd);
    assert_eq!(printed(&program.if_al(0xff, &yes).power_off()), "ones\n");
}

#[test]
fn what_old_software_asks_is_answered_as_by_hardware() {
    if !rig::small() {
        return;
    }
    let say = |text| Program::default().print(text);
    let program = Program::default()
        // The keyboard controller's input is empty and its self-test passes.
        .input(I8042_COMMAND)
        .if_al(0x14, &say("idle\n"))
        .out(I8042_COMMAND, 0xaa)
        .input(0x60)
        .if_al(0x55, &say("test\n"))
        // The clock is not in update.
        .out(0x70, 0x0a)
        .input(0x71)
        .if_al(0x26, &say("clock\n"))
        .power_off();
    assert_eq!(printed(&program), "idle\ntest\nclock\n");
}

#[test]
fn accesses_to_nowhere_are_reported_and_the_guest_runs_on() {
    if !rig::small() {
        return;
    }
    let zero = Program::default().print("zero\n");
    let program = Program::default()
        .read(0xd010_0000)
        .if_eax(0, &zero)
        .write(0xd020_0000, 1)
        .print("on\n")
        .power_off();
    let outcome = Armlet::program(&program).run();
    outcome.assert_status(0);
    assert_eq!(outcome.text(), "zero\non\n");
    let reports: Vec<&str> = outcome.errors.lines().collect();
    assert_eq!(reports.len(), 2, "{}", outcome.errors);
    for (report, what) in reports.iter().zip([
        "read 4 bytes at 0xd0100000, where there is no device",
        "wrote 4 bytes at 0xd0200000, where there is no device",
    ]) {
        assert!(report.starts_with("armlet: vCPU 0 at RIP 0x"), "{report}");
        assert!(report.contains(what), "{report}");
    }
}

#[test]
fn a_virtio_device_stands_in_its_slot() {
    if !rig::small() {
        return;
    }
    // Magic number and number of the device: entropy (virtio 1.2, section 4.2.2).
    let say = |text| Program::default().print(text);
    let program = Program::default()
        .read(0xd000_0000)
        .if_eax(0x7472_6976, &say("virt\n"))
        .read(0xd000_0008)
        .if_eax(4, &say("entropy\n"))
        .power_off();
    assert_eq!(printed(&program), "virt\nentropy\n");
}

#[test]
fn the_local_timers_interrupt_wakes_a_vcpu() {
    if !rig::small() {
        return;
    }
    let handler = Program::default().print("tick\n").power_off();
    let program = Program::default().on_interrupt(&handler);
    let program = program.print("up\n").start_timer().wait();
    assert_eq!(printed(&program), "up\ntick\n");
}

#[test]
fn the_serial_ports_interrupt_comes_through_the_io_apic() {
    if !rig::small() {
        return;
    }
    let handler = Program::default().print("sent\n").power_off();
    let program = Program::default().on_interrupt(&handler).route(4);
    // The transmitter is empty, so allowing its interrupt raises it.
    let program = program.print("up\n").out(UART + 1, 2).wait();
    assert_eq!(printed(&program), "up\nsent\n");
}

#[test]
fn sigterm_presses_the_power_button() {
    if !rig::small() {
        return;
    }
    let handler = Program::default().print("pressed\n").power_off();
    let program = Program::default().on_interrupt(&handler).route(9);
    let mut guest = Armlet::program(&program.print("up\n").wait()).start();
    guest.expect("up\n");
    guest.signal(Signal::TERM);
    guest.expect("pressed\n");
    let outcome = guest.end();
    outcome.assert_status(0);
    assert_eq!(outcome.errors, lives::PRESSED);
}

#[test]
fn a_second_sigterm_stops_a_guest_that_does_not_listen() {
    if !rig::small() {
        return;
    }
    lives::is_stopped_by_a_second_signal(Armlet::program(&deaf()), Signal::TERM);
    lives::is_given_up(Armlet::program(&deaf()));
}

#[test]
fn each_way_to_reset_is_a_reset() {
    if !rig::small() {
        return;
    }
    for (name, program) in [
        (
            "ACPI",
            Program::default().print("once\n").out(RESET_CONTROL, 6),
        ),
        (
            "i8042",
            Program::default().print("once\n").out(I8042_COMMAND, 0xfe),
        ),
    ] {
        let armlet = Armlet::program(&program.print("too late\n").stay());
        let outcome = armlet.option("--on-reset", "exit").run();
        println!("{name}");
        outcome.assert_status(5);
        assert_eq!(outcome.text(), "once\n");
        assert_eq!(outcome.errors, "");
    }
    // Linux goes to real mode and jumps to where firmware begins: JMP FFFF:0000.
    let jump = Program::default().bytes(&[0xea, 0, 0, 0xff, 0xff]);
    let program = Program::default().print("once\n").start_second_at(&jump);
    let armlet = Armlet::program(&program.sleep()).cpus(2);
    let outcome = armlet.option("--on-reset", "exit").run();
    outcome.assert_status(5);
    assert_eq!(outcome.text(), "once\n");
    let program = Program::default().print("once\n").triple_fault();
    let armlet = Armlet::program(&program).option("--on-reset", "exit");
    let outcome = armlet.run();
    outcome.assert_status(5);
    assert_eq!(outcome.text(), "once\n");
    let report = "faulted in the handler of a double fault: the machine resets";
    assert!(outcome.errors.contains(report), "{}", outcome.errors);
}

#[test]
fn exits_are_counted_and_told_at_the_end_and_when_asked() {
    if !rig::small() {
        return;
    }
    let program = Program::default().print("up\n").read(0xd000_0000).echo();
    let mut armlet = Armlet::program(&program.power_off());
    armlet = armlet.input(Input::Pipe).flag("--stats");
    let mut guest = armlet.start();
    guest.expect("up\n");
    guest.signal(Signal::USR1);
    guest.expect_error("vCPU 0 left KVM for armlet: register reads ");
    guest.send(b"q");
    let outcome = guest.end();
    outcome.assert_status(0);
    let lines: Vec<&str> = outcome.errors.lines().collect();
    let told = lines.iter().filter(|line| line.contains("left KVM"));
    assert_eq!(told.count(), 2, "{}", outcome.errors);
    let last = lines.iter().rfind(|line| line.contains("left KVM"));
    // The guest polls for the `q`, so nobody knows how often.
    let last = last.expect("a line").replace("register reads 0,", "");
    assert!(!last.contains("port accesses 0"), "{last}");
    assert!(outcome.errors.contains("KVM counted for all vCPUs: "));
}

#[test]
fn what_the_host_does_not_offer_is_refused_with_what_it_does() {
    if !rig::small() {
        return;
    }
    for (option, value, status, what) in [
        (
            "--pv",
            "spin=on",
            2,
            "--pv: 'spin' is not one of clock, async-pf,",
        ),
        (
            "--pv",
            "eoi=yes",
            2,
            "--pv: eoi: 'yes' is not known; use on, off or auto",
        ),
        (
            "--exits",
            "halt=off",
            2,
            "--exits: 'halt' is not one of mwait, hlt, pause, cstate",
        ),
    ] {
        let armlet = Armlet::program(&Program::default().power_off());
        let outcome = armlet.option(option, value).run();
        outcome.assert_status(status);
        assert!(outcome.errors.contains(what), "{}", outcome.errors);
        assert_eq!(outcome.errors.lines().count(), 1, "{}", outcome.errors);
    }
}

#[test]
fn cpuid_tells_of_what_was_asked_for() {
    if !rig::small() {
        return;
    }
    // MOV EAX, 0x40000001; CPUID; and the bits of stolen time and of KVM's clock.
    let look = |mask: u32, text: &str| {
        let say = Program::default().print(text);
        let leaf = Program::default().bytes(&[0xb8, 1, 0, 0, 0x40, 0x0f, 0xa2, 0x25]);
        leaf.bytes(&mask.to_le_bytes()).if_eax(mask, &say)
    };
    let program = |mask, text| look(mask, text).print("end\n").power_off();
    // Bits of CPUID 0x40000001, EAX (Linux, Documentation/virt/kvm/x86/cpuid.rst).
    for (name, bit) in [
        ("clock", 0),
        ("async-pf", 4),
        ("steal-time", 5),
        ("eoi", 6),
        ("unhalt", 7),
        ("tlb-flush", 9),
        ("send-ipi", 11),
        ("poll-control", 12),
        ("sched-yield", 13),
        // The interrupt of asynchronous page faults goes with these.
        ("async-pf", 14),
    ] {
        let program = program(1 << bit, "there\n");
        for (value, text) in [
            ("off", "end\n"),
            ("on", "there\nend\n"),
            ("auto", "there\nend\n"),
        ] {
            let armlet = Armlet::program(&program);
            let outcome = armlet.option("--pv", format!("{name}={value}")).run();
            if value == "on" && outcome.errors.contains("is not offered by this host's KVM") {
                println!("{name}: this host has it not");
                break;
            }
            outcome.assert_status(0);
            assert_eq!(outcome.text(), text, "{name}={value}");
        }
    }
}

#[test]
fn a_reset_is_no_leak() {
    if !rig::small() {
        return;
    }
    let again = Program::default().print("again\n").out(RESET_CONTROL, 6);
    lives::resets_without_a_leak(Armlet::program(&again.stay()));
}

#[test]
fn what_is_typed_reaches_a_guest_that_polls() {
    if !rig::small() {
        return;
    }
    let program = Program::default().print("type\n").echo().power_off();
    let mut guest = Armlet::program(&program).input(Input::Pipe).start();
    guest.expect("type\n");
    // More than its FIFO holds.
    let text: Vec<u8> = (0..300).map(|at| b'A' + at as u8 % 26).collect();
    guest.send(&text);
    guest.send(b"q");
    let outcome = guest.end();
    outcome.assert_status(0);
    let wanted = [b"type\n", text.as_slice(), b"q"].concat();
    assert_eq!(outcome.text().as_bytes(), wanted);
}

#[test]
fn a_receiver_is_emptied_while_the_divisor_is_shown() {
    if !rig::small() {
        return;
    }
    let program = Program::default().print("type\n").wait_for_input();
    // LCR: the divisor's turn, and back; FCR between: both FIFOs emptied.
    let program = program.out(UART + 3, 0x83).out(UART + 2, 0x07);
    let program = program.out(UART + 3, 0x03).print("empty\n").power_off();
    let mut guest = Armlet::program(&program).input(Input::Pipe).start();
    guest.expect("type\n");
    guest.send(b"x");
    guest.expect("empty\n");
    guest.end().assert_status(0);
}

#[test]
fn ctrl_a_x_leaves_and_the_terminal_is_as_before() {
    if !rig::small() {
        return;
    }
    lives::is_left_by_ctrl_a_x(Armlet::program(&deaf()));
}

#[test]
fn kernels_for_other_machines_are_refused_as_on_arm64() {
    if !rig::small() {
        return;
    }
    let mut arm = vec![0; 4096];
    arm[..4].copy_from_slice(b"MZ\x40\xfa");
    arm[0x10..0x18].copy_from_slice(&0x10_0000_u64.to_le_bytes());
    arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
    let mut arm_elf = Program::default().elf();
    arm_elf[18] = 183;
    let mut no_note = Program::default().elf();
    no_note[0x108] = 17;
    for (kernel, what) in [
        (
            arm,
            "this is an arm64 Image; an x86_64 guest takes a bzImage or an ELF vmlinux",
        ),
        (arm_elf, "this is an ELF file for arm64"),
        (
            no_note,
            "this is an ELF file for x86_64 that cannot be started: no note names the entry",
        ),
        (
            b"#!/bin/sh\n".to_vec(),
            "no known kernel format begins with the bytes",
        ),
    ] {
        let outcome = Armlet::image(&kernel).run();
        outcome.assert_status(2);
        assert!(outcome.errors.contains(what), "{}", outcome.errors);
        assert_eq!(outcome.errors.lines().count(), 1, "{}", outcome.errors);
    }
}

#[test]
fn a_guest_panics_once_in_a_life() {
    if !rig::small() {
        return;
    }
    let program = Program::default().print(&lives::panics_20_times());
    lives::panics_once(Armlet::program(&program.power_off()));
}

#[test]
fn a_panic_in_a_burst_just_before_a_reset_is_heard() {
    if !rig::small() {
        return;
    }
    let program = Program::default().print_looking(&lives::burst_of_last_words(), 16);
    lives::panics_just_before_a_reset(Armlet::program(&program.out(I8042_COMMAND, 0xfe)));
}

#[test]
fn signals_act_though_nobody_reads_standard_error() {
    if !rig::small() {
        return;
    }
    let program = Program::default().print(&lives::panics_20_times());
    lives::heeds_signals_though_nobody_reads(Armlet::program(&program.print("up\n").stay()));
}

#[test]
fn an_armlet_that_was_stopped_makes_the_terminal_raw_again() {
    if !rig::small() {
        return;
    }
    lives::is_raw_again_after_a_stop(Armlet::program(&deaf()));
}

#[test]
fn signals_act_while_a_program_is_waited_for() {
    if !rig::small() {
        return;
    }
    lives::heeds_signals_at_the_start(Armlet::program(&deaf()));
}

/// A file system of 64 KiB, while this lives. `None` where this user may not mount one.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<SmallDisk> {
        let folder = tempfile::tempdir().expect("a folder");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=64k", "none"]);
        let status = mount.arg(folder.path()).stderr(Stdio::null()).status();
        status
            .is_ok_and(|status| status.success())
            .then_some(SmallDisk(folder))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let mut unmount = Command::new("umount");
        // Whoever still has files there keeps it.
        let _ = unmount.arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_silences_the_console_only_while_it_is_full() {
    if !rig::small() {
        return;
    }
    let Some(disk) = SmallDisk::mount() else {
        println!("skipped: this user cannot mount a file system");
        return;
    };
    let (console, filler) = (disk.0.path().join("console"), disk.0.path().join("filler"));
    let output = File::create(&console).expect("a file");
    let full = fs::write(&filler, vec![0; 1 << 20]).expect_err("a small disk");
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    let armlet = Armlet::program(&Program::default().echo().power_off());
    let mut guest = armlet.input(Input::Pipe).start_with(Some(output.into()));
    guest.send(b"abc");
    guest.expect_error("cannot write to standard output (No space left on device");
    fs::remove_file(&filler).expect("a file of ours");
    guest.send(b"defq");
    let outcome = guest.end();
    outcome.assert_status(0);
    // How many of the first were lost before there was room depends on the guest's speed.
    let text = fs::read_to_string(&console).expect("text");
    assert!(
        "bcdefq".ends_with(&text) && text.ends_with("defq"),
        "{text}"
    );
    let lost = format!(
        "armlet: {} bytes of the console's output are lost\n",
        7 - text.len()
    );
    assert!(outcome.errors.ends_with(&lost), "{}", outcome.errors);
}

/// A guest that ticks, as machines that are held want it, with so many turns between.
fn ticking(turns: u32) -> Program {
    let ticks = Program::default().print_looking(commanded::TICKS, 10);
    let first = Program::default().print_looking(commanded::FIRST, 16);
    first.then(&ticks.wait_awake(turns).again())
}

#[test]
fn a_held_guest_stands_still_and_goes_on() {
    if rig::small() {
        commanded::is_held_and_goes_on(Armlet::program(&ticking(100_000)), 2, "RIP 0x");
    }
}

#[test]
fn a_guest_is_paused_resumed_reset_and_stopped_by_ctl() {
    if rig::small() {
        control::a_guest_is_paused_resumed_reset_and_stopped(Armlet::program(&ticking(100_000)));
    }
}

#[test]
fn what_a_guest_has_not_is_refused_to_ctl_and_a_killed_armlet_leaves_no_socket() {
    if rig::small() {
        let armlet = Armlet::program(&ticking(100_000));
        control::what_a_guest_has_not_is_refused_and_a_killed_armlet_leaves_no_socket(armlet);
    }
}

#[test]
fn a_guest_goes_on_from_its_snapshot() {
    if rig::small() {
        snapshot::a_guest_goes_on_from_its_snapshot(Armlet::program(&ticking(100_000)));
    }
}

#[test]
fn a_guest_goes_on_from_changes_on_a_snapshot() {
    if rig::small() {
        snapshot::a_guest_goes_on_from_changes_on_a_snapshot(Armlet::program(&ticking(100_000)));
    }
}

#[test]
fn whatever_stands_in_a_snapshot_is_refused_or_runs() {
    if rig::small() {
        let guest = Armlet::program(&ticking(100_000));
        snapshot::whatever_stands_in_one_is_refused_or_runs(guest, 60);
    }
}

#[test]
fn a_snapshot_that_is_none_is_refused() {
    if rig::small() {
        snapshot::one_that_is_none_is_refused(Armlet::program(&ticking(100_000)));
    }
}

#[test]
fn a_held_disk_stands_still_and_goes_on() {
    if rig::small() {
        commanded::a_busy_disk_is_held_and_goes_on();
    }
}

#[test]
fn a_disk_gets_another_image_while_the_guest_runs() {
    if rig::small() {
        commanded::a_disk_gets_another_image_while_the_guest_runs();
    }
}

#[test]
fn a_disk_and_a_balloon_are_changed_while_the_guest_runs() {
    if rig::small() {
        commanded::a_disk_and_a_balloon_are_changed_while_the_guest_runs();
    }
}

/// `pvclock_vcpu_time_info` and its flag PVCLOCK_GUEST_STOPPED (Documentation/virt/kvm/x86/msr.rst,
/// MSR_KVM_SYSTEM_TIME_NEW).
#[test]
fn a_guest_that_was_held_hears_of_it_by_its_clock() {
    const SYSTEM_TIME: u32 = 0x4b56_4d01;
    const CLOCK: u64 = 0x0810_0000;
    const STOPPED: u32 = 1 << 1 << 8;
    if !rig::small() {
        return;
    }
    let mut steps = Steps::default();
    steps.write_msr(SYSTEM_TIME, CLOCK | 1);
    // The last word has the flags in its second byte.
    steps.wait_up_to(1, CLOCK + 28, STOPPED, 0);
    steps.print("not yet\n");
    steps.wait(CLOCK + 28, STOPPED, STOPPED);
    steps.print("told\n");
    steps.power_off();
    commanded::is_held_until(Armlet::image(&image(&steps)), "not yet\n", "told\n");
}

#[test]
fn a_guest_whose_output_nobody_reads_is_not_held_and_that_is_said() {
    if rig::small() {
        commanded::is_not_held_while_nobody_reads(Armlet::program(&ticking(1)));
    }
}

/// Where VMGenID and VMClock lie on the board `pc`, and what this guest keeps through its resets.
const GENERATION_ID: u64 = 0xd_e000;
const VM_CLOCK: u64 = 0xd_f000;
const LIFE: u64 = 0x20_0000;
const KEPT: u64 = LIFE + 8;

/// A guest that says `first` in its first life, resets, says `second`, waits until its generation has
/// changed, says so, resets, and powers off if it is still of that one.
fn looks_at_its_generation(second: &str) -> Program {
    let look = || Program::default().read(GENERATION_ID).address(KEPT);
    let keep = |life| {
        let keep = look().bytes(&[0x41, 0x89, 0x00]);
        keep.write(LIFE, life)
    };
    let reset = Program::default().out(RESET_CONTROL, 6).stay();
    // CMP EAX, [R8]; JNE behind what is printed.
    let if_same = |text: &str| {
        let print = Program::default().print(text);
        let length = print.code_size() as u8;
        look().bytes(&[0x41, 0x3b, 0x00, 0x75, length]).then(&print)
    };
    let until_changed = look().bytes(&[0x41, 0x3b, 0x00]);
    // JE to its start.
    let back = (until_changed.code_size() as u8 + 2).wrapping_neg();
    let until_changed = until_changed.bytes(&[0x74, back]);
    let second = if_same("same\n")
        .print(second)
        .then(&until_changed)
        .then(&keep(2).print("changed\n"))
        .then(&reset);
    let third = if_same("still\n").power_off();
    let clock = Program::default().print("clock\n");
    Program::default()
        .read(LIFE)
        .if_eax(1, &second)
        .if_eax(2, &third)
        .read(VM_CLOCK)
        .if_eax(u32::from_le_bytes(*b"VCLK"), &clock)
        .then(&keep(1).print("first\n"))
        .then(&reset)
}

#[test]
fn a_generation_lasts_through_resets_and_ends_with_a_clone() {
    if !rig::small() {
        return;
    }
    let armlet = Armlet::program(&looks_at_its_generation("second\n"));
    let said = commanded::is_cloned_after(armlet.option("--vmgenid", "on"), "second\n");
    let wanted = "clock\nfirst\nsame\nsecond\nchanged\nstill\n";
    assert!(said.ends_with(wanted), "{said}");
}

#[test]
fn clones_of_a_snapshot_see_that_they_are_others_and_stay_so_through_resets() {
    if !rig::small() {
        return;
    }
    let armlet = Armlet::program(&looks_at_its_generation(commanded::FIRST));
    snapshot::clones_see_that_they_are_others(armlet, "changed\nstill\n");
}

#[test]
fn a_machine_without_vmgenid_is_not_told_that_it_was_cloned() {
    if rig::small() {
        commanded::a_machine_without_vmgenid_is_not_told(Armlet::program(&ticking(100_000)));
    }
}

#[test]
fn armlet_is_confined_and_has_nothing_that_it_inherited() {
    if !rig::small() {
        return;
    }
    lives::is_confined(Armlet::program(&deaf()));
}

#[test]
fn a_guest_is_driven_by_the_requests_of_firecrackers_clients() {
    if !rig::small() {
        return;
    }
    api::a_guest_is_driven_by_requests(&deaf().image(), &[]);
}

#[test]
fn a_start_by_request_that_fails_can_be_mended() {
    if !rig::small() {
        return;
    }
    let end = Program::default().print("end\n").power_off();
    api::a_start_that_fails_can_be_mended(&end.image(), &[]);
}

#[test]
fn a_file_describes_a_guest_as_for_firecracker() {
    if !rig::small() {
        return;
    }
    let end = Program::default().print("end\n").power_off();
    api::a_file_describes_a_guest(&end.image(), &[]);
}

#[test]
fn katas_driver_in_go_starts_a_guest_in_a_jail() {
    if rig::small() {
        engines::kata_in_go(&deaf().image());
    }
}

#[test]
fn katas_driver_in_rust_starts_a_guest_in_a_jail() {
    if rig::small() {
        engines::kata_in_rust(&deaf().image());
    }
}

#[test]
fn firecracker_go_sdk_starts_a_guest() {
    if rig::small() {
        engines::go_sdk(&deaf().image());
    }
}

#[test]
fn metrics_are_at_a_socket_and_in_a_file() {
    if rig::small() {
        // The first register of the first slot, which is not writable.
        let faulty = Program::default().write(0xd000_0000, 1).then(&deaf());
        lives::has_metrics(|| Armlet::program(&faulty), "port_accesses");
    }
}

#[test]
fn a_guest_of_the_api_is_saved_and_loaded() {
    if rig::small() {
        let kernel = ticking(100_000).image();
        api::a_guest_is_saved_and_loaded(&kernel, commanded::FIRST, commanded::TICKS);
    }
}

#[test]
fn a_guest_gets_its_memory_from_a_handler_of_page_faults() {
    if rig::small() {
        let guest = Armlet::program(&ticking(100_000));
        handler::a_guest_gets_its_memory_from_a_handler_of_page_faults(guest);
    }
}

#[test]
fn a_load_by_request_takes_memory_from_a_handler() {
    if rig::small() {
        let kernel = ticking(100_000).image();
        handler::a_load_takes_memory_from_a_handler(&kernel, commanded::FIRST, commanded::TICKS);
    }
}
