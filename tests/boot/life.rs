use crate::guest::{Armlet, Guest, Input, MARKER};
use crate::rig;
use crate::software::{Program, archive};
use rustix::process::Signal;
use std::fs;
use std::thread::sleep;
use std::time::Duration;

/// A guest that says that it runs, and hears nothing.
fn deaf() -> Program {
    Program::default().print("up\n").stay()
}

/// Descriptors and threads of armlet's process.
fn holdings(guest: &Guest) -> (usize, usize) {
    let count = |what: &str| {
        let folder = format!("/proc/{}/{what}", guest.pid());
        fs::read_dir(folder).expect("a running process").count()
    };
    (count("fd"), count("task"))
}

#[test]
fn linux_reboots_in_place_three_times_and_powers_off() {
    let Some(rig) = rig::any() else { return };
    let mut guest = Armlet::debian(rig, "Image", "shell")
        .input(Input::Pipe)
        .start();
    let mut held = Vec::new();
    for _ in 0..3 {
        guest.expect(MARKER);
        guest.expect("guest# ");
        held.push(holdings(&guest));
        guest.send(b"reboot -f\n");
    }
    guest.expect(MARKER);
    guest.expect("guest# ");
    held.push(holdings(&guest));
    guest.send(b"poweroff -f\n");
    let outcome = guest.end();
    outcome.assert_status(0);
    assert_eq!(outcome.text().matches(MARKER).count(), 4);
    held.dedup();
    assert_eq!(
        held.len(),
        1,
        "descriptors and threads of each life: {held:?}"
    );
}

#[test]
fn a_reset_is_no_leak() {
    let Some(_) = rig::any() else { return };
    let again = Program::default().print("again\n").reset();
    let mut guest = Armlet::program(&again).start();
    let after_30_lives = |guest: &mut Guest| {
        for _ in 0..30 {
            guest.expect("again\n");
        }
        holdings(guest)
    };
    let first = after_30_lives(&mut guest);
    let second = after_30_lives(&mut guest);
    println!("{first:?}, then {second:?}");
    // What a life holds comes and goes: a leak of one a life would be 30 more.
    assert!(
        second.0 < first.0 + 15 && second.1 < first.1 + 15,
        "descriptors and threads: {first:?} after 30 lives, {second:?} after 60"
    );
    guest.signal(Signal::INT);
    guest.end().assert_status(6);
}

#[test]
fn a_reset_ends_armlet_if_it_was_told_so() {
    let Some(_) = rig::any() else { return };
    let program = Program::default().print("once\n").reset();
    let outcome = Armlet::program(&program).option("--on-reset", "exit").run();
    outcome.assert_status(5);
    assert_eq!(outcome.text(), "once\n");
    assert_eq!(outcome.errors, "");
}

#[test]
fn power_off_ends_armlet() {
    let Some(_) = rig::any() else { return };
    let program = Program::default().print("bye\n").power_off();
    let outcome = Armlet::program(&program).run();
    outcome.assert_status(0);
    assert_eq!(outcome.text(), "bye\n");
    assert_eq!(outcome.errors, "");
}

#[test]
fn a_panic_is_reported_and_may_end_armlet() {
    let Some(rig) = rig::main() else { return };
    for (options, status) in [
        ([("--on-reset", "exit"), ("--on-panic", "report")], 5),
        ([("--on-reset", "restart"), ("--on-panic", "exit")], 4),
    ] {
        let mut armlet = Armlet::debian(rig, "Image", "crash").cmdline("panic=-1");
        for (option, value) in options {
            armlet = armlet.option(option, value);
        }
        let outcome = armlet.run();
        outcome.assert_status(status);
        println!("{}", outcome.errors);
        let (text, errors) = (outcome.text(), &outcome.errors);
        let reason = "sysrq triggered crash";
        let console = format!("Kernel panic - not syncing: {reason}");
        assert!(text.contains(&console), "{text}");
        assert!(errors.contains(reason), "{errors}");
        let start = "armlet: the guest's kernel panicked on vCPU 0 at PC 0x";
        assert!(errors.starts_with(start), "{errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
    }
}

/// Waits for the power key as a distribution's logind does. It says so when it listens: Linux throws
/// away what a key does while nobody has its device open.
const LISTEN: &str = "insmod /modules/evdev.ko
insmod /modules/gpio_keys.ko
until [ -e /dev/input/event0 ]; do sleep 0.1; done
exec 3</dev/input/event0
echo POWERKEY-READY
head -c 24 <&3 >/dev/null
echo POWERKEY-PRESSED
";

#[test]
fn sigterm_presses_the_power_key_and_linux_powers_off() {
    let Some(rig) = rig::main() else { return };
    let mut initrd = fs::read(rig.asset("initrd")).expect("the initramfs");
    initrd.extend(fs::read(rig.asset("powerkey.cpio")).expect("the modules"));
    initrd.extend(archive("powerkey.sh", LISTEN.as_bytes()));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("initrd");
    fs::write(&path, initrd).expect("an initramfs");
    let mut guest = Armlet::linux(&rig.asset("Image-generic"), &path, "powerkey").start();
    guest.expect("POWERKEY-READY");
    guest.signal(Signal::TERM);
    guest.expect("POWERKEY-PRESSED");
    let outcome = guest.end();
    outcome.assert_status(0);
    assert_eq!(
        outcome.errors,
        "armlet: pressed the guest's power key; a second signal stops it at once\n"
    );
}

#[test]
fn a_second_sigterm_stops_a_guest_that_does_not_listen() {
    let Some(_) = rig::any() else { return };
    for signal in [Signal::TERM, Signal::HUP] {
        let mut guest = Armlet::program(&deaf()).start();
        guest.expect("up\n");
        guest.signal(signal);
        guest.expect_error("pressed the guest's power key");
        // Longer than the key is held.
        sleep(Duration::from_millis(300));
        assert!(guest.runs(), "one {signal:?} ended it");
        guest.signal(Signal::TERM);
        let outcome = guest.end();
        outcome.assert_status(6);
        assert!(
            outcome.errors.ends_with("armlet: stopped by a signal\n"),
            "{}",
            outcome.errors
        );
    }
}

#[test]
fn sigint_stops_a_guest_at_once() {
    let Some(_) = rig::any() else { return };
    let mut guest = Armlet::program(&deaf()).start();
    guest.expect("up\n");
    guest.signal(Signal::INT);
    let outcome = guest.end();
    outcome.assert_status(6);
    assert_eq!(outcome.errors, "armlet: stopped by a signal\n");
}

#[test]
fn a_guest_gone_wild_can_be_stopped() {
    let Some(_) = rig::any() else { return };
    // No code is there, and none is where the exception is taken.
    let wild = Program::default().print("up\n").jump(0x0b00_0000);
    let mut guest = Armlet::program(&wild).start();
    guest.expect("up\n");
    sleep(Duration::from_millis(300));
    guest.signal(Signal::INT);
    guest.end().assert_status(6);
}

#[test]
fn ctrl_a_x_leaves_and_the_terminal_is_as_before() {
    let Some(_) = rig::any() else { return };
    let mut guest = Armlet::program(&deaf()).input(Input::Terminal).start();
    let before = guest.modes();
    guest.expect("up\n");
    let during = guest.modes();
    assert_ne!(before, during, "the terminal was not raw");
    guest.send(b"\x01h");
    guest.expect_error("Ctrl-A x: stop the guest and leave;");
    guest.send(b"\x01");
    sleep(Duration::from_millis(100));
    assert!(guest.runs(), "Ctrl-A alone ended it");
    guest.send(b"x");
    let outcome = guest.end();
    outcome.assert_status(6);
    assert_eq!(outcome.modes, Some(before));
}

#[test]
fn a_crash_of_armlet_leaves_the_terminal_as_before() {
    let Some(_) = rig::any() else { return };
    for signal in [
        Signal::SEGV,
        Signal::ABORT,
        Signal::BUS,
        Signal::ILL,
        Signal::FPE,
    ] {
        let mut guest = Armlet::program(&deaf()).input(Input::Terminal).start();
        let before = guest.modes();
        guest.expect("up\n");
        assert_ne!(before, guest.modes(), "the terminal was not raw");
        guest.signal(signal);
        let outcome = guest.end();
        outcome.assert_signal(signal);
        assert_eq!(outcome.modes, Some(before), "after {signal:?}");
    }
}

#[test]
fn signals_leave_the_terminal_as_before() {
    let Some(_) = rig::any() else { return };
    let mut guest = Armlet::program(&deaf()).input(Input::Terminal).start();
    let before = guest.modes();
    guest.expect("up\n");
    guest.signal(Signal::INT);
    let outcome = guest.end();
    outcome.assert_status(6);
    assert_eq!(outcome.modes, Some(before));
}

#[test]
fn a_shell_on_a_terminal_gets_every_key() {
    let Some(rig) = rig::main() else { return };
    let mut guest = Armlet::debian(rig, "Image", "shell")
        .input(Input::Terminal)
        .start();
    let before = guest.modes();
    guest.expect("guest# ");
    guest.send(b"echo sum $((6 * 7))\r");
    guest.expect("sum 42\r\n");
    // Ctrl-C is the guest's, not ours.
    guest.expect("guest# ");
    guest.send(b"echo waiting; sleep 1000\r");
    guest.expect("waiting\r\n");
    guest.send(b"\x03");
    guest.expect("guest# ");
    // Ctrl-A twice is one for the guest: in the shell it goes to the start of the line.
    guest.send(b" there\x01\x01echo here\r");
    guest.expect("here there\r\n");
    guest.expect("guest# ");
    guest.send(b"poweroff -f\r");
    let outcome = guest.end();
    outcome.assert_status(0);
    assert_eq!(outcome.modes, Some(before));
}

#[test]
fn an_access_that_cannot_be_emulated_aborts_in_the_guest() {
    let Some(_) = rig::any() else { return };
    let handler = Program::default().print("abort\n").power_off();
    for (address, what) in [(0x0b00_0000, "nothing"), (0x0900_0000, "the UART")] {
        let program = Program::default()
            .print("up\n")
            .read_pair(address)
            .print("not reached\n")
            .power_off()
            .on_exception(handler.clone());
        let outcome = Armlet::program(&program).run();
        outcome.assert_status(0);
        assert_eq!(
            outcome.text(),
            "up\nabort\n",
            "a read of two words from {what}"
        );
        let wanted = format!("got an abort for an access at {address:#x} that cannot be emulated");
        assert!(outcome.errors.contains(&wanted), "{}", outcome.errors);
        assert!(
            outcome.errors.starts_with("armlet: vCPU 0 at PC 0x"),
            "{}",
            outcome.errors
        );
    }
}

#[test]
fn accesses_to_nowhere_do_not_fill_a_log() {
    let Some(_) = rig::any() else { return };
    let mut program = Program::default();
    for word in 0..40 {
        program = program
            .read(0x0b00_0000 + 4 * word)
            .write(0x0c00_0000 + 4 * word, 0);
    }
    let outcome = Armlet::program(&program.print("on\n").power_off()).run();
    outcome.assert_status(0);
    assert_eq!(outcome.text(), "on\n");
    let reports = outcome.errors.lines().count();
    assert!(
        (4..=10).contains(&reports),
        "80 accesses: {}",
        outcome.errors
    );
    assert!(
        outcome.errors.contains("(fault 64 of this vCPU)"),
        "{}",
        outcome.errors
    );
}
