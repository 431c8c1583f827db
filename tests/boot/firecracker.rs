//! The board `firecracker`: the machine that Firecracker's guests expect.

use crate::console::both_ways;
use crate::guest::{Armlet, section};
use crate::software::Program;
use crate::{lives, rig};

/// Where its 16550A lies.
const UART: u64 = 0x4000_2000;
const LSR: u64 = UART + 5;

/// A guest with its console where Firecracker's have it.
fn on_board(armlet: Armlet) -> Armlet {
    armlet.option("--board", "firecracker").console("ttyS0")
}

#[test]
fn linux_has_its_console_on_ttys0_from_the_first_line_on() {
    let Some(rig) = rig::any() else { return };
    let script = "
echo '== dmesg'; dmesg -r
echo '== interrupts'; cat /proc/interrupts
echo '== clock'; cat /sys/class/rtc/rtc0/name
echo '== end'
";
    let earlycon = format!("earlycon=uart,mmio,{UART:#x} keep_bootcon loglevel=8");
    let armlet = Armlet::script(rig, "Image", script).cmdline(&earlycon);
    let outcome = on_board(armlet).run();
    outcome.assert_status(0);
    let script = outcome.script();
    let log = section(&script, "dmesg");
    for line in [
        "earlycon: uart0 at MMIO 0x0000000040002000",
        "40002000.serial: ttyS0 at MMIO 0x40002000",
        "is a 16550A",
        "printk: legacy console [ttyS0] enabled",
        "[mem 0x0000000080000000-0x000000008fffffff]",
        "Machine model: armlet,firecracker",
    ] {
        assert!(log.contains(line), "no {line:?} in\n{log}");
    }
    // What the early console printed is what was logged first.
    assert!(outcome.text().contains("Booting Linux on physical CPU"));
    assert!(section(&script, "clock").contains("rtc-pl031"));
    let interrupts = section(&script, "interrupts");
    let serial = interrupts.lines().find(|line| line.contains("ttyS0"));
    let serial = serial.unwrap_or_else(|| panic!("no ttyS0 in\n{interrupts}"));
    assert!(serial.contains("Edge"), "{serial}");
}

#[test]
fn every_byte_arrives_in_order_both_ways_on_ttys0() {
    let Some(rig) = rig::any() else { return };
    both_ways(rig, on_board);
}

#[test]
fn sigterm_presses_the_power_key_of_a_guest_of_firecracker() {
    let Some(rig) = rig::main() else { return };
    lives::powers_off_by_sigterm(on_board(Armlet::power_key(rig, crate::life::LISTEN)).start());
}

/// What prints without a driver: it waits for an empty transmitter before each character.
#[test]
fn a_small_guest_prints_on_the_16550() {
    if !rig::small() {
        return;
    }
    let mut program = Program::default();
    for byte in *b"hello\n" {
        program = program.read(LSR).write_byte(UART, byte);
    }
    let outcome = on_board(Armlet::program(&program.power_off())).run();
    outcome.assert_status(0);
    assert_eq!(outcome.text(), "hello\n");
}
