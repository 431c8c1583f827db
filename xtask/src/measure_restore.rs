//! A guest that goes on from a snapshot, for `cargo xtask bench`: how long its first instruction takes, and
//! what it costs until it has settled.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::procfs::Mappings;
use crate::trace::Trace;
use crate::vm::Vm;

/// How long a guest is left alone before it is saved, and watched after it was restored.
const SETTLE: Duration = Duration::from_secs(2);

const FOLDER: &str = "/tmp/saved";
const CONTROL: &str = "/tmp/control";

/// What a restored guest took, by name.
pub(crate) type Values = Vec<(&'static str, f64)>;

/// Saves the guest that `command` starts, restores it once, so that its first pages are known, and
/// measures the next time. `entry` reads the milliseconds to the first entry out of a trace.
pub(crate) fn restore(command: &[String], entry: impl Fn(&str) -> Result<f64>) -> Result<Values> {
    let (program, rest) = command.split_first().context("no VMM was given")?;
    ensure!(
        rest.first().is_some_and(|word| word == "run"),
        "only armlet's own guests are saved and restored here"
    );
    if !Path::new(FOLDER).join("prefetch").exists() {
        save(program, command)?;
        let first = restored(program)?;
        sleep(SETTLE);
        first.kill()?;
    }
    let mut trace = Trace::new(4096)?;
    trace.event("sched/sched_process_exec")?;
    trace.first_entry()?;
    trace.start()?;
    let vm = restored(program)?;
    sleep(SETTLE);
    let memory = Mappings::of(vm.child.id())?.vmm.resident;
    vm.kill()?;
    let text = trace.text()?;
    drop(trace);
    let mut faults = Trace::new(1024)?;
    faults.histogram(FAULT, "hsr")?;
    faults.start()?;
    let vm = restored(program)?;
    sleep(SETTLE);
    vm.kill()?;
    let faults: u64 = faults.counts(FAULT)?.values().sum();
    let clone = clones(program)?;
    Ok(vec![
        ("restore_to_entry_ms", entry(&text)?),
        ("restore_clone_kib", clone),
        ("restore_vmm_kib", memory as f64),
        ("restore_faults", faults as f64),
    ])
}

/// How many guests from one snapshot run beside each other. The first ones are there before it is measured: the
/// memory of guests that have just ended is free by then, and pages that all share are there.
const CLONES: usize = 20;
const FIRST: usize = 5;

/// Returns what each of many guests from one snapshot takes of the host's memory, in KiB, beside the pages that it
/// has of its own: armlet, its threads, page tables, and what the kernel has for it.
fn clones(program: &str) -> Result<f64> {
    let mut guests = Vec::new();
    let mut free_and_own = |count: usize| -> Result<(f64, f64)> {
        while guests.len() < count {
            guests.push(restored(program)?);
        }
        sleep(SETTLE);
        let mut own = 0;
        for guest in &guests {
            own += Mappings::of(guest.child.id())?.guest.anonymous;
        }
        Ok((free()? as f64, own as f64))
    };
    let (before, first) = free_and_own(FIRST)?;
    let (after, all) = free_and_own(CLONES)?;
    for guest in guests {
        guest.kill()?;
    }
    ensure!(all > first, "the guests have written nothing");
    Ok((before - after - (all - first)) / (CLONES - FIRST) as f64)
}

/// Returns the host's free memory in KiB.
fn free() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let free = text
        .lines()
        .find_map(|line| line.strip_prefix("MemFree:")?.split_whitespace().next());
    let free = free.context("/proc/meminfo does not tell what is free")?;
    Ok(free.parse()?)
}

/// A guest's access to a page that stage 2 does not map.
const FAULT: &str = "kvm/kvm_guest_fault";

fn save(program: &str, command: &[String]) -> Result<()> {
    // Left by a run that failed.
    let _ = fs::remove_file(CONTROL);
    let mut command = command.to_vec();
    command.extend(["--control".to_owned(), CONTROL.to_owned()]);
    let mut vm = Vm::start(&command)?;
    vm.until_marker(None, &mut |_| {})?;
    sleep(SETTLE);
    let saved = Command::new(program)
        .args(["ctl", CONTROL, "snapshot", FOLDER])
        .output();
    let saved = saved.context("cannot start armlet ctl")?;
    let said = String::from_utf8_lossy(&saved.stderr).into_owned();
    ensure!(saved.status.success(), "no snapshot: {said}");
    vm.kill()
}

fn restored(program: &str) -> Result<Vm> {
    let words = [program, "run", "--restore", FOLDER];
    Vm::start(&words.map(str::to_owned))
}
