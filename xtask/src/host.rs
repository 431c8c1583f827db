//! The rig: a machine with KVM, ARM64 or x86_64, emulated where the computer at hand is none.
//!
//! QEMU emulates EL2, and on x86_64 SVM, as well, so the Linux in it is a real KVM host, only slower. It boots from an
//! initramfs that holds everything a job needs, runs the job's program, and says its exit status
//! on the console in a mark that programs do not print.

mod disk;
mod emulator;
mod initramfs;
mod job;
mod machine;
mod nameless;
mod spec;

pub(crate) use disk::{Access, Disk};
pub(crate) use initramfs::quoted;
pub(crate) use job::{Ended, HostFile, Job};
pub(crate) use machine::TRACED;
pub(crate) use nameless::NamelessFile;
pub(crate) use spec::{HostSpec, Machine, X86_CPU, mebibytes};

use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::isa::Isa;
use crate::marker::Filter;
use crate::packages::Store;
use crate::progress::say;
use crate::terminal::RawTerminal;
use emulator::{Emulator, Event};
use initramfs::write_initramfs;
use machine::{raspberry_pi_4, virt};

/// Longer than the slowest CPU takes to boot on a busy machine.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// A kernel that boots says something more often than this.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);

/// How much of a console is shown when its host does not come up.
const LAST_LINES: usize = 25;

/// Boots a host with `disks` and those of the job, runs `job` in it and gives what it prints to `print` as it comes.
///
/// With a `terminal`, what the user types goes to the job, which has the console as its terminal.
pub(crate) fn run(
    store: &Store,
    spec: &HostSpec,
    job: &Job,
    disks: Vec<Disk>,
    terminal: Option<&RawTerminal>,
    print: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<Ended> {
    let kernel = store.kernel(spec.kernel)?;
    let busybox = store.busybox(spec.isa)?;
    let qemu = store.qemu(spec.isa)?;

    let mut disks = disks;
    disks.extend(job.disks.iter().map(|(image, serial)| Disk {
        image: image.clone(),
        serial: serial.clone(),
        access: Access::Kept,
    }));
    // KVM is built into ARM64 kernels.
    let mut modules = match spec.isa {
        Isa::Arm64 => Vec::new(),
        Isa::X86 => vec!["kvm_amd"],
    };
    if !disks.is_empty() {
        modules.extend(["virtio_pci", "virtio_blk", "ext4"]);
    }
    if spec.tools {
        modules.extend(["loop", "tun", "vhost_net", "vhost_vsock"]);
    }
    let modules = kernel.modules(&modules)?;

    let initramfs = NamelessFile::new()?;
    write_initramfs(
        initramfs.file(),
        &busybox,
        &modules,
        job,
        terminal.is_some(),
    )
    .context("cannot write the emulated host's initramfs")?;

    let mut command = qemu.command();
    match spec.machine {
        Machine::Virt => virt(&mut command, spec, &kernel.image, &initramfs.path()),
        Machine::RaspberryPi4 => {
            ensure!(
                disks.is_empty(),
                "QEMU's Raspberry Pi 4 takes no disks of ours"
            );
            let tree = store.device_tree(spec.kernel, "bcm2711-rpi-4-b.dtb")?;
            raspberry_pi_4(&mut command, spec, &kernel.image, &initramfs.path(), &tree);
        }
    }
    for (index, disk) in disks.iter().enumerate() {
        disk.attach(&mut command, index);
    }
    let started = Instant::now();
    let mut emulator = Emulator::start(command)?;
    let (events, _watch) = emulator.events(terminal, spec.isa)?;
    say(&format!(
        "booting an emulated {} host ({})",
        spec.isa.name(),
        spec.summary()
    ));

    let mut filter = Filter::new("RIG");
    if terminal.is_some() {
        filter = filter.raw();
    }
    let mut deadline = Some(started + BOOT_LIMIT);
    let silence = match spec.machine {
        Machine::Virt => SILENCE_LIMIT,
        // Until Linux starts them the Pi's other cores spin, and the first one gets little of a
        // machine with fewer than four CPUs.
        Machine::RaspberryPi4 => BOOT_LIMIT,
    };
    let mut heard = Instant::now();
    loop {
        if !filter.started() {
            deadline = Some((started + BOOT_LIMIT).min(heard + silence));
        }
        let event = match deadline {
            Some(deadline) => {
                events.recv_timeout(deadline.saturating_duration_since(Instant::now()))
            }
            None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match event {
            Ok(Event::Output(bytes)) => {
                heard = Instant::now();
                let was_started = filter.started();
                let output = filter.feed(&bytes);
                if filter.started() && !was_started {
                    say_raw(
                        terminal,
                        &format!("host up after {:.1} s", started.elapsed().as_secs_f32()),
                    );
                    deadline = job.limit.map(|limit| Instant::now() + limit);
                }
                print(&output)?;
                if let Some(status) = filter.status() {
                    return Ok(Ended::Exit(status));
                }
            }
            Ok(Event::Leave) => return Ok(Ended::Left),
            Ok(Event::Signal(signal)) => return Ok(Ended::Signal(signal)),
            Ok(Event::Closed) | Err(RecvTimeoutError::Disconnected) => {
                let status = emulator.child.wait().context("cannot wait for QEMU")?;
                bail!(
                    "the emulated host ended ({status}) without saying how the program did{}",
                    last_lines(&filter.before())
                );
            }
            Err(RecvTimeoutError::Timeout) if filter.started() => {
                bail!("stopped after {:.0} s", started.elapsed().as_secs_f32())
            }
            Err(RecvTimeoutError::Timeout) => {
                bail!(
                    "the emulated host did not come up within {:.0} s, and said nothing for the \
                     last {:.0} s{}",
                    started.elapsed().as_secs_f32(),
                    heard.elapsed().as_secs_f32(),
                    last_lines(&filter.before())
                )
            }
        }
    }
}

/// Returns the end of what a console said before the job, for an error's text.
fn last_lines(console: &str) -> String {
    let lines = console
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty());
    let lines = lines.collect::<Vec<_>>();
    let from = lines.len().saturating_sub(LAST_LINES);
    let mut text = String::new();
    for line in &lines[from..] {
        text.push_str("\n  | ");
        text.push_str(line);
    }
    text
}

/// Says `line`, also where a terminal in raw mode does not return the carriage.
fn say_raw(terminal: Option<&RawTerminal>, line: &str) {
    match terminal {
        Some(_) => say(&format!("{line}\r")),
        None => say(line),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_console_is_shown() {
        assert_eq!(last_lines(""), "");
        assert_eq!(last_lines("a\r\n\r\nb"), "\n  | a\n  | b");
        let long = (0..100).map(|n| format!("{n}\n")).collect::<String>();
        let shown = last_lines(&long);
        assert!(
            shown.starts_with("\n  | 75\n") && shown.ends_with(" 99"),
            "{shown}"
        );
    }
}
