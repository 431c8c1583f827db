//! QEMU's options for each machine.

use std::path::Path;
use std::process::Command;

use super::spec::HostSpec;
use crate::isa::Isa;

/// Addresses at which no program is that is not put there on purpose.
pub(crate) const TRACED: std::ops::Range<u64> = 0x1000_0000..0x2000_0000;

/// Adds the options that make QEMU's own machine.
pub(super) fn virt(command: &mut Command, spec: &HostSpec, image: &Path, initramfs: &Path) {
    let machine = match spec.isa {
        Isa::Arm64 => format!("virt,virtualization=on,gic-version={}", spec.gic),
        Isa::X86 => "q35".to_owned(),
    };
    command
        .args(["-machine", &machine])
        .args(["-cpu", &spec.cpu])
        .args(["-smp", &spec.smp.to_string()])
        .args(["-m", &spec.memory_mib.to_string()])
        .args(["-nodefaults", "-no-user-config"])
        .args(["-serial", "chardev:console"]);
    let console = match spec.isa {
        Isa::Arm64 => "console=ttyAMA0",
        Isa::X86 => "console=ttyS0",
    };
    software(command, spec, image, initramfs, console);
}

/// Adds the options that make a Raspberry Pi 4, whose cores, GIC and memory are given.
pub(super) fn raspberry_pi_4(
    command: &mut Command,
    spec: &HostSpec,
    image: &Path,
    initramfs: &Path,
    tree: &Path,
) {
    command
        .args(["-machine", "raspi4b", "-smp", "4", "-m", "2048"])
        .arg("-dtb")
        .arg(tree)
        // The second port is the mini UART, Linux's console here.
        .args(["-serial", "null", "-serial", "chardev:console"]);
    // QEMU has no second interrupt controller and no I2C of the Pi's, and its clocks and power
    // domains are not to be switched off.
    let append = "console=ttyS1 initcall_blacklist=brcmstb_l2_driver_init,brcmstb_i2c_driver_init \
                  clk_ignore_unused pd_ignore_unused";
    software(command, spec, image, initramfs, append);
}

/// Adds what every machine has.
fn software(command: &mut Command, spec: &HostSpec, image: &Path, initramfs: &Path, append: &str) {
    command
        .args(["-display", "none", "-no-reboot"])
        .args(["-chardev", "stdio,id=console,signal=off"])
        // The seeds in the device tree stay, or a CPU without FEAT_RNG would wait for entropy.
        .args(["-seed", "1"]);
    if spec.icount {
        command.args(["-icount", "shift=0,sleep=off"]);
    }
    if let Some(log) = &spec.executed {
        let range = format!("{:#x}+{:#x}", TRACED.start, TRACED.end - TRACED.start);
        command.args(["-d", "in_asm", "-dfilter", &range, "-D"]);
        command.arg(log);
    }
    // The kernel's log shows that it gets on, and what the matter is when it does not. Its
    // self-tests of ciphers would be half of its boot.
    let usual = match spec.isa {
        Isa::Arm64 => "loglevel=7",
        // Each byte of the log takes long here.
        Isa::X86 => "quiet loglevel=1 mitigations=off nokaslr",
    };
    let append = format!(
        "{append} {usual} rdinit=/init panic=-1 cryptomgr.notests {}",
        spec.append
    );
    command
        .arg("-kernel")
        .arg(image)
        .arg("-initrd")
        .arg(initramfs);
    command.args(["-append", append.trim_end()]);
}
