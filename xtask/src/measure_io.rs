//! `xtask measure-io`: starts a VMM with devices and measures what their work takes, for
//! `cargo xtask bench io`.
//!
//! This is the part of the bench that runs inside the emulated host, built for ARM64. The guest
//! says when its work begins and ends (see [`crate::load`]); at these lines the instructions and
//! exits are read. A line of JSON is printed for each piece of work.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use argh::FromArgs;
use serde_json::{Value, json};

use crate::load::{self, END, START};
use crate::measure::{self, UserExits, exits, print};
use crate::perf::Counters;
use crate::procfs::{self, Mappings};
use crate::vm::Vm;

/// What the guest prints when all of its work is done, before it powers off.
pub(crate) const READY: &str = "IO-READY";

/// Returns the host's address on the network with the guest, and the guest's.
pub(crate) const HOST_ADDRESS: &str = "192.168.77.1";
pub(crate) const GUEST_ADDRESS: &str = "192.168.77.2";

/// Where there are several networks, each has a third byte of its own, from the one after this.
pub(crate) const NETWORK_OF_MANY: &str = "192.168.";
pub(crate) const FIRST_OF_MANY: usize = 80;

/// Where the bench's server listens.
pub(crate) const PORT: u16 = 5001;

/// The guest's disk, in the host's memory; where there are several, their names end with a number.
const DISK: &str = "/tmp/bench.disk";
const DISK_MIB: usize = 128;

/// The size of one of several.
const DISK_OF_MANY_MIB: usize = 8;

/// The network interface; where there are several, they have other numbers, from 1.
const TAP: &str = "tap0";

/// Start a VMM with devices and print what they take, as lines of JSON.
#[derive(Debug, FromArgs)]
pub(crate) struct MeasureIo {
    /// what the VMM is called in the lines
    #[argh(option)]
    name: String,

    /// what the guest does: disk, net, console, memory, crowd or nothing
    #[argh(option)]
    work: String,

    /// how many disks there are besides {disk}: {disk1} and so on
    #[argh(option, default = "0")]
    disks: usize,

    /// how many network interfaces there are besides {tap}: {tap1} and so on
    #[argh(option, default = "0")]
    taps: usize,

    /// how many VMs are measured
    #[argh(option)]
    runs: u32,

    /// the guest's kernel
    #[argh(option)]
    kernel: String,

    /// the guest's initramfs
    #[argh(option)]
    initrd: String,

    /// the VMM and its arguments, with {kernel}, {initrd}, {cmdline}, {disk} and {tap} in
    /// the places of these
    #[argh(positional, greedy)]
    command: Vec<String>,
}

impl MeasureIo {
    /// Measures; what fails is told as a line as well, so that others are measured still.
    pub(crate) fn run(&self) -> Result<i32> {
        let uses = |what: &str| self.command.iter().any(|word| word.contains(what));
        if uses("{disk}") && !Path::new(DISK).exists() {
            make_disk(DISK, DISK_MIB)?;
        }
        for number in 1..=self.disks {
            make_disk(&format!("{DISK}{number}"), DISK_OF_MANY_MIB)?;
        }
        if uses("{tap}") {
            make_tap(TAP, HOST_ADDRESS)?;
            load::serve(&format!("{HOST_ADDRESS}:{PORT}"))?;
        }
        for number in 1..=self.taps {
            let address = host_address(number);
            make_tap(&format!("tap{number}"), &address)?;
            load::serve(&format!("{address}:{PORT}"))?;
        }
        for run in 1..=self.runs {
            if let Err(error) = self.measure(run) {
                let error = format!("{error:#}");
                print(&json!({"vmm": self.name, "work": self.work, "error": error}))?;
                break;
            }
        }
        Ok(0)
    }

    fn measure(&self, run: u32) -> Result<()> {
        let cmdline = format!(
            "quiet cryptomgr.notests armlet.run=script armlet.io={}",
            self.work
        );
        let fill = |word: &String| {
            let mut word = measure::fill(word, &self.kernel, &self.initrd, &cmdline)
                .replace("{disk}", DISK)
                .replace("{tap}", TAP);
            for number in 1..=self.disks.max(self.taps) {
                let disk = format!("{DISK}{number}");
                word = word
                    .replace(&format!("{{disk{number}}}"), &disk)
                    .replace(&format!("{{tap{number}}}"), &format!("tap{number}"));
            }
            word
        };
        let words = self.command.iter().skip_while(|word| *word == "--");
        let command = words.map(fill).collect::<Vec<_>>();

        let user_exits = UserExits::start()?;
        let mut vm = Vm::start(&command)?;
        let mut counters = None;
        loop {
            let line = vm.line("IO-")?;
            if line.starts_with(READY) {
                break;
            }
            let name = line.strip_prefix(START).map(str::trim);
            let name = name
                .with_context(|| format!("{line:?} comes out of order"))?
                .to_owned();
            let counters = match &mut counters {
                Some(counters) => counters,
                // All threads are there once the guest's drivers are.
                none => none.insert(Counters::start(vm.child.id())?),
            };
            let (before, user_before, all_before) =
                (counters.read()?, user_exits.count()?, exits());
            let line = vm.line(END)?;
            let counts = counters.read()?.since(&before);
            let (answered, exits) = (user_exits.count()? - user_before, exits() - all_before);
            let mut numbers = line.split_whitespace().skip(2);
            let mut number = || numbers.next().and_then(|number| number.parse::<u64>().ok());
            let (operations, nanos) = number()
                .zip(number())
                .context("the guest's line is short")?;
            let latencies = std::iter::from_fn(number).collect::<Vec<_>>();
            print(&json!({
                "vmm": self.name, "work": self.work, "run": run, "name": name,
                "operations": operations, "nanos": nanos, "latencies": latencies,
                "user": counts.user, "kernel": counts.kernel,
                "kernel_all": counts.kernel_all, "guest": counts.guest,
                "user_exits": answered, "exits": exits,
            }))?;
        }
        print(&self.memory(run, &vm)?)?;
        vm.until_end()?;
        Ok(())
    }

    /// Returns the VMM's memory and threads, when the guest has done its work.
    fn memory(&self, run: u32, vm: &Vm) -> Result<Value> {
        let mappings = Mappings::of(vm.child.id())?;
        let threads = procfs::threads(vm.child.id())?;
        let names = threads
            .into_iter()
            .map(|thread| thread.name)
            .collect::<Vec<_>>();
        Ok(json!({
            "vmm": self.name, "work": self.work, "run": run, "name": "memory",
            "vmm_rss_kib": mappings.vmm.resident, "vmm_anon_kib": mappings.vmm.anonymous,
            "threads": names,
        }))
    }
}

/// Creates a disk whose every block is there: reading what was never written would cost less.
fn make_disk(path: &str, mib: usize) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("cannot create {path}"))?;
    let part = (0..1 << 20)
        .map(|byte| (byte % 251) as u8)
        .collect::<Vec<_>>();
    for _ in 0..mib {
        file.write_all(&part).context("cannot write the disk")?;
    }
    Ok(())
}

/// Returns the host's address on network `number` of several.
fn host_address(number: usize) -> String {
    format!("{NETWORK_OF_MANY}{}.1", FIRST_OF_MANY + number)
}

/// Creates a TAP between host and guest, unless it is there already.
fn make_tap(tap: &str, address: &str) -> Result<()> {
    if fs::metadata(format!("/sys/class/net/{tap}")).is_ok() {
        return Ok(());
    }
    for words in [
        format!("tunctl -t {tap}"),
        format!("ip addr add {address}/24 dev {tap}"),
        format!("ip link set {tap} up"),
    ] {
        let mut words = words.split(' ');
        let status = Command::new(words.next().unwrap_or_default())
            .args(words)
            .stdout(std::process::Stdio::null())
            .status()
            .context("cannot run busybox")?;
        ensure!(status.success(), "cannot make the network");
    }
    Ok(())
}
