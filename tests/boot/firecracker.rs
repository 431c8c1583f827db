//! The board `firecracker`: the machine that Firecracker's guests expect.

use crate::api::Api;
use crate::archive::archive;
use crate::console::both_ways;
use crate::guest::{Armlet, section};
use crate::rig::WITH_DEVICES;
use crate::software::Program;
use crate::{api, engines, handler, lives, rig};
use std::fs;

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

/// A guest that prints on the 16550 without a driver: it waits for an empty transmitter before each
/// character.
fn printing(text: &str) -> Program {
    let mut program = Program::default();
    for byte in text.bytes() {
        program = program.read(LSR).write_byte(UART, byte);
    }
    program
}

#[test]
fn a_guest_is_driven_by_the_requests_of_firecrackers_clients() {
    if rig::any().is_some() {
        api::a_guest_is_driven_by_requests(&printing("up\n").stay().image(), &[]);
    }
}

#[test]
fn a_guest_of_firecrackers_clients_is_saved_and_loaded() {
    if rig::any().is_some() {
        let kernel = printing("first\n").then(&printing("tick\n").wait(100_000).again());
        api::a_guest_is_saved_and_loaded(&kernel.image(), "first\n", "tick\n");
    }
}

#[test]
fn a_load_by_request_takes_memory_from_a_handler() {
    if rig::any().is_some() {
        let kernel = printing("first\n").then(&printing("tick\n").wait(100_000).again());
        handler::a_load_takes_memory_from_a_handler(&kernel.image(), "first\n", "tick\n");
    }
}

#[test]
fn a_start_by_request_that_fails_can_be_mended() {
    if rig::main().is_some() {
        api::a_start_that_fails_can_be_mended(&printing("end\n").power_off().image(), &[]);
    }
}

#[test]
fn a_file_describes_a_guest_as_for_firecracker() {
    if rig::main().is_some() {
        api::a_file_describes_a_guest(&printing("end\n").power_off().image(), &[]);
    }
}

#[test]
fn engines_and_sdks_start_guests() {
    if rig::main().is_some() {
        let kernel = printing("up\n").stay().image();
        engines::go_sdk(&kernel);
        engines::kata_in_go(&kernel);
        engines::kata_in_rust(&kernel);
    }
}

#[test]
fn linux_is_started_by_requests_with_the_command_line_of_firecrackers_clients() {
    let Some(rig) = rig::any() else { return };
    let mut api = Api::start(&[]);
    let [kernel, drivers] = WITH_DEVICES;
    let read = |name: &str| fs::read(rig.asset(name)).expect("an asset");
    let script = "head -c 5 /dev/vda; echo; cat /proc/cmdline; sleep 5";
    let script = archive("script", script.as_bytes());
    api.write("initrd", &[read("initrd"), read(drivers), script].concat());
    api.write("disk", &[b"DISK!", &[0; 1 << 20][..]].concat());
    let kernel = rig.asset(kernel);
    api.put(
        "/machine-config",
        r#"{"vcpu_count": 1, "mem_size_mib": 256}"#,
    );
    api.put(
        "/boot-source",
        &format!(
            r#"{{"kernel_image_path": {kernel:?}, "initrd_path": "initrd",
                "boot_args": "console=ttyS0 reboot=k panic=1 pci=off armlet.run=script"}}"#
        ),
    );
    api.put(
        "/drives/rootfs",
        r#"{"drive_id": "rootfs", "path_on_host": "disk", "is_root_device": true, "is_read_only": true}"#,
    );
    api.put("/metrics", r#"{"metrics_path": "metrics"}"#);
    api.put("/actions", r#"{"action_type": "InstanceStart"}"#);
    api.expect("DISK!");
    api.put("/actions", r#"{"action_type": "FlushMetrics"}"#);
    let metrics = fs::read_to_string(api.path("metrics")).expect("metrics");
    let read = |line: &str| -> u64 {
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
        line["block_rootfs"]["read_bytes"]
            .as_u64()
            .expect("a number")
    };
    assert!(metrics.lines().map(read).sum::<u64>() >= 512, "{metrics}");
    api.expect("console=ttyS0 reboot=k panic=1 pci=off armlet.run=script root=/dev/vda ro");
    assert_eq!(api.end().code(), Some(0), "{}", api.said());
}

#[test]
fn a_small_guest_prints_on_the_16550() {
    if !rig::small() {
        return;
    }
    let program = printing("hello\n").power_off();
    let outcome = on_board(Armlet::program(&program)).run();
    outcome.assert_status(0);
    assert_eq!(outcome.text(), "hello\n");
}
