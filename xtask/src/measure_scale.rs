//! `xtask measure-scale`: starts VMMs with many vCPUs, many disks or many at a time, for
//! `cargo xtask bench scale`.
//!
//! This is the part of the bench that runs inside the emulated host, built for ARM64. It prints one
//! line of JSON.

use std::collections::BTreeMap;
use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use argh::FromArgs;
use serde_json::{Map, Value, json};

use crate::measure::{self, print};
use crate::perf::Started;
use crate::procfs::{self, Mappings};
use crate::trace::Trace;
use crate::vm::Vm;

/// How long guests are left alone before they count as idle, and how long they are then watched.
const SETTLE: Duration = Duration::from_secs(2);
const WATCH: Duration = Duration::from_secs(5);

/// The host kernel's stack for a thread, KiB.
const STACK_KIB: u64 = 16;

/// What each disk holds.
const DISK_BYTES: u64 = 1 << 20;

/// Start a VMM and print what it takes, as a line of JSON.
#[derive(Debug, FromArgs)]
pub(crate) struct MeasureScale {
    /// what the VMM is called in the line
    #[argh(option)]
    name: String,

    /// what the row is called
    #[argh(option)]
    row: String,

    /// how many guests run at a time; with 0 one is started and ends
    #[argh(option)]
    guests: u32,

    /// a disk to be made before; may be repeated
    #[argh(option)]
    disk: Vec<String>,

    /// what the guest's command line has beside the usual
    #[argh(option)]
    cmdline: Option<String>,

    /// the guest's kernel
    #[argh(option)]
    kernel: String,

    /// the guest's initramfs
    #[argh(option)]
    initrd: String,

    /// the VMM and its arguments, with {kernel}, {initrd} and {cmdline} in the places of these
    #[argh(positional, greedy)]
    command: Vec<String>,
}

impl MeasureScale {
    /// Measures; what fails is told as a line as well, so that others are measured still.
    pub(crate) fn run(&self) -> Result<i32> {
        for disk in &self.disk {
            let file = fs::File::create(disk).with_context(|| format!("cannot create {disk}"))?;
            file.set_len(DISK_BYTES).context("cannot make a disk")?;
        }
        let measured = match self.guests {
            0 => self.start(),
            guests => self.guests(guests),
        };
        let mut line = json!({"vmm": self.name, "row": self.row});
        match measured {
            Ok(values) => line["values"] = Value::Object(values),
            Err(error) => line["error"] = json!(format!("{error:#}")),
        }
        print(&line)?;
        Ok(0)
    }

    fn command(&self, run: &str) -> Vec<String> {
        let more = self.cmdline.as_deref().unwrap_or_default();
        let cmdline = format!("quiet cryptomgr.notests armlet.run={run} {more}");
        let words = self.command.iter().skip_while(|word| *word == "--");
        let fill = |word: &String| measure::fill(word, &self.kernel, &self.initrd, &cmdline);
        words.map(fill).collect()
    }

    /// One guest from its start to its end.
    fn start(&self) -> Result<Map<String, Value>> {
        let mut trace = Trace::new(4096)?;
        trace.event("sched/sched_process_exec")?;
        trace.first_entry()?;
        trace.start()?;
        let mut vm = Vm::start(&self.command("poweroff"))?;
        let marker = vm.until_marker(None, &mut |_| {})?;
        let threads = procfs::threads(vm.child.id())?.len() as u64;
        vm.until_end()?;
        let text = trace.text()?;

        let mut values = Map::new();
        values.insert("entry_ms".to_owned(), json!(measure::entry(&text)?));
        let marker = marker.as_secs_f64() * 1e3;
        values.insert("marker_ms".to_owned(), json!(marker));
        values.insert("threads".to_owned(), json!(threads));
        values.insert("stacks_kib".to_owned(), json!(threads * STACK_KIB));
        values.insert(
            "user_k".to_owned(),
            json!(self.instructions()? as f64 / 1e3),
        );
        Ok(values)
    }

    /// What the VMM executes in user space until the guest's init runs. It is counted apart from the
    /// times, which counting makes longer.
    fn instructions(&self) -> Result<u64> {
        let mut started = Started::count()?;
        let mut vm = Vm::start(&self.command("poweroff"))?;
        vm.until_marker(None, &mut |_| {})?;
        let instructions = started.read()?;
        vm.until_end()?;
        Ok(instructions)
    }

    /// Many guests, each with what it takes of the host while all are idle.
    fn guests(&self, count: u32) -> Result<Map<String, Value>> {
        // What the host keeps once it ran a guest is none of theirs.
        let mut first = Vm::start(&self.command("poweroff"))?;
        first.until_marker(None, &mut |_| {})?;
        first.until_end()?;

        sleep(SETTLE);
        let slab_before = slab()?;
        let mut vms = Vec::new();
        for _ in 0..count {
            let mut vm = Vm::start(&self.command("hold"))?;
            vm.until_marker(None, &mut |_| {})?;
            vms.push(vm);
        }
        sleep(SETTLE);
        let each = f64::from(count);
        let slab = slab()?.saturating_sub(slab_before) as f64 / each;
        let mut resident = 0;
        for vm in &vms {
            resident += Mappings::of(vm.child.id())?.vmm.anonymous;
        }
        let before = nanos(&vms)?;
        sleep(WATCH);
        let after = nanos(&vms)?;
        let idle = after.iter().map(|(thread, nanos)| {
            nanos.saturating_sub(before.get(thread).copied().unwrap_or_default())
        });
        let idle = idle.sum::<u64>() as f64 / 1e3 / WATCH.as_secs_f64() / each;
        let mut values = Map::new();
        let resident = resident as f64 / each;
        values.insert("memory_kib".to_owned(), json!(resident));
        values.insert("slab_kib".to_owned(), json!(slab));
        values.insert("idle_us".to_owned(), json!(idle));
        Ok(values)
    }
}

/// Returns the time on a CPU of each thread of all.
fn nanos(vms: &[Vm]) -> Result<BTreeMap<u32, u64>> {
    let mut nanos = BTreeMap::new();
    for vm in vms {
        let threads = procfs::threads(vm.child.id())?;
        nanos.extend(threads.iter().map(|thread| (thread.id, thread.nanos)));
    }
    Ok(nanos)
}

/// Returns what the kernel takes for its own objects, KiB, without what it only keeps: file systems'
/// caches, and free objects of guests that are gone, which those after them would seem to do without.
fn slab() -> Result<u64> {
    fs::write("/proc/sys/vm/drop_caches", "3").context("cannot empty the host's caches")?;
    let caches = fs::read_dir("/sys/kernel/slab").context("the host has no /sys/kernel/slab")?;
    for cache in caches.flatten() {
        // Some are other names of the same, and may be gone.
        let _ = fs::write(cache.path().join("shrink"), "1");
    }
    let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("Slab:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.context("/proc/meminfo says nothing of slabs")
}

impl Drop for MeasureScale {
    fn drop(&mut self) {
        for disk in &self.disk {
            let _ = fs::remove_file(disk);
        }
    }
}
