//! `xtask measure`: starts a VMM again and again and measures it, for `cargo xtask bench`.
//!
//! This is the part of the bench that runs inside the emulated host, built for ARM64. It prints a
//! line of JSON for every VM that counts; the first VM of each pass warms the host up and does
//! not. Everything comes from the kernel's own tracefs, debugfs and procfs, so that any VMM can be
//! measured in the same way.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use argh::FromArgs;
use serde_json::{Map, Value, json};

use crate::measure_restore::restore;
use crate::procfs::{self, Mappings};
use crate::trace::{self, Trace};
use crate::vm::Vm;

/// How long a guest is left alone before it counts as idle, and how long it is then watched.
const SETTLE: Duration = Duration::from_secs(2);
const WATCH: Duration = Duration::from_secs(5);

/// Reads shorter than this are of headers, not of the kernel or the initramfs.
const BULK: u64 = 64 << 10;

const DEBUGFS: &str = "/sys/kernel/debug/kvm";
const THP: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// Start a VMM several times and print what it takes, as lines of JSON.
#[derive(Debug, FromArgs)]
pub(crate) struct Measure {
    /// what to measure, separated by commas
    #[argh(option)]
    passes: String,

    /// how many VMs count in each pass
    #[argh(option)]
    runs: u32,

    /// the guest's kernel
    #[argh(option)]
    kernel: PathBuf,

    /// the guest's initramfs
    #[argh(option)]
    initrd: PathBuf,

    /// the VMM and its arguments, with {kernel}, {initrd} and {cmdline} in the places of these
    #[argh(positional, greedy)]
    command: Vec<String>,
}

/// One kind of measurement. Each looks at one thing, so that the looking disturbs no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Time from exec to the first entry into the guest, to the marker and to the end.
    Timing,
    /// Exits, memory and threads when the marker comes.
    Marker,
    /// The most memory of the VMM, by looking every millisecond.
    Peak,
    /// How long the kernel and the initramfs are read, and the IPA bits asked of KVM.
    Reading,
    /// System calls before the first entry.
    Calls,
    /// Time, bytes and exits with every line of the kernel's log on the console.
    Verbose,
    /// Time in the host between exits and entries, for a quiet boot.
    HostQuiet,
    /// The same for a verbose one.
    HostVerbose,
    /// CPU time and exits of an idle guest.
    Idle,
    /// A guest that goes on from a snapshot.
    Restore,
    /// What becomes of huge pages under a policy of the host.
    ThpAlways,
    /// As above.
    ThpMadvise,
    /// As above.
    ThpNever,
}

impl Pass {
    /// All of them, in the order in which they are run.
    pub(crate) const ALL: [(&str, Self); 13] = [
        ("timing", Self::Timing),
        ("marker", Self::Marker),
        ("peak", Self::Peak),
        ("reading", Self::Reading),
        ("calls", Self::Calls),
        ("verbose", Self::Verbose),
        ("host-quiet", Self::HostQuiet),
        ("host-verbose", Self::HostVerbose),
        ("idle", Self::Idle),
        ("restore", Self::Restore),
        ("thp-always", Self::ThpAlways),
        ("thp-madvise", Self::ThpMadvise),
        ("thp-never", Self::ThpNever),
    ];

    fn from_name(name: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|pass| pass.0 == name);
        Ok(found
            .with_context(|| format!("there is no pass {name:?}"))?
            .1)
    }

    /// Returns the guest's command line, apart from its console.
    pub(crate) fn cmdline(self) -> &'static str {
        match self {
            Self::Verbose | Self::HostVerbose => "loglevel=8 cryptomgr.notests armlet.run=poweroff",
            Self::Idle | Self::Restore => "quiet cryptomgr.notests armlet.run=hold",
            _ => "quiet cryptomgr.notests armlet.run=poweroff",
        }
    }
}

impl Measure {
    /// Measures, and prints a line for the host and one for each VM.
    pub(crate) fn run(&self) -> Result<i32> {
        let release = rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned();
        print(&json!({"page_size": rustix::param::page_size(), "release": release}))?;
        let command = self.command.iter().skip_while(|word| *word == "--");
        ensure!(command.count() > 0, "no VMM was given");
        for name in self.passes.split(',') {
            let pass = Pass::from_name(name)?;
            for run in 0..=self.runs {
                match self.measure(pass) {
                    Ok(values) if run > 0 => {
                        print(&json!({"pass": name, "run": run, "values": values.0}))?;
                    }
                    Ok(_) => {}
                    // The other passes may still tell something.
                    Err(error) => {
                        print(&json!({"pass": name, "error": format!("{error:#}")}))?;
                        break;
                    }
                }
            }
        }
        Ok(0)
    }

    fn measure(&self, pass: Pass) -> Result<Values> {
        let command = self.command(pass.cmdline());
        match pass {
            Pass::Timing => timing(&command),
            Pass::Marker => marker(&command),
            Pass::Peak => peak(&command),
            Pass::Reading => self.reading(&command),
            Pass::Calls => calls(&command),
            Pass::Verbose => verbose(&command),
            Pass::HostQuiet | Pass::HostVerbose => host_time(&command),
            Pass::Idle => idle(&command),
            Pass::Restore => {
                let mut values = Values::default();
                for (name, value) in restore(&command, entry)? {
                    values.add(name, value);
                }
                Ok(values)
            }
            Pass::ThpAlways => huge_pages(&command, "always"),
            Pass::ThpMadvise => huge_pages(&command, "madvise"),
            Pass::ThpNever => huge_pages(&command, "never"),
        }
    }

    fn command(&self, cmdline: &str) -> Vec<String> {
        let kernel = self.kernel.to_string_lossy();
        let initrd = self.initrd.to_string_lossy();
        let words = self.command.iter().skip_while(|word| *word == "--");
        words
            .map(|word| fill(word, &kernel, &initrd, cmdline))
            .collect()
    }

    /// Reads that the VMM does before it enters the guest. One that reads with several threads
    /// has their times counted once; one that maps its files has none.
    fn reading(&self, command: &[String]) -> Result<Values> {
        let calls = ["read", "pread64", "readv", "preadv", "preadv2"];
        let mut trace = Trace::new(4096)?;
        for call in calls {
            for edge in ["enter", "exit"] {
                trace.event(&format!("syscalls/sys_{edge}_{call}"))?;
            }
        }
        trace.filtered("syscalls/sys_enter_ioctl", "cmd == 0xae01")?;
        trace.event("sched/sched_process_exec")?;
        trace.first_entry()?;
        trace.start()?;
        let mut vm = Vm::start(command)?;
        let pid = vm.child.id();
        vm.until_marker(None, &mut |_| {})?;
        vm.until_end()?;
        let text = trace.text()?;

        let before = before_entry(trace::events(&text).filter(|event| event.pid >= pid));
        let reads = trace::reads(&before, BULK);
        let bits = before.iter().rev().find_map(|event| {
            let (_, kind) = event.body.strip_prefix("sys_ioctl(")?.split_once("arg: ")?;
            let kind = kind.trim_end_matches(')').trim_start_matches("0x");
            u64::from_str_radix(kind, 16).ok()
        });
        let length = |path: &Path| fs::metadata(path).map(|about| about.len());
        let mut values = Values::default();
        values.add("reading_ms", millis(trace::covered(&reads)));
        values.add(
            "reading_bytes",
            reads.iter().map(|read| read.bytes).sum::<u64>(),
        );
        // Which of the files was read is known by the number of bytes only.
        for (name, path) in [("kernel", &self.kernel), ("initrd", &self.initrd)] {
            let length = length(path).with_context(|| format!("cannot examine {path:?}"))?;
            let mut part = reads.clone();
            let fds = trace::bytes_by_fd(&reads);
            part.retain(|read| fds[&read.fd].abs_diff(length) < BULK);
            if !part.is_empty() {
                values.add(&format!("reading_{name}_ms"), millis(trace::covered(&part)));
            }
        }
        // On x86 it says nothing of the address bits.
        if let Some(bits) = bits.filter(|_| std::env::consts::ARCH != "x86_64") {
            values.add("vm_type", bits);
        }
        Ok(values)
    }
}

/// Returns a word of a VMM's command with what belongs in its places.
pub(crate) fn fill(word: &str, kernel: &str, initrd: &str, cmdline: &str) -> String {
    word.replace("{kernel}", kernel)
        .replace("{initrd}", initrd)
        .replace("{cmdline}", cmdline)
}

/// What a VM gave, by name.
#[derive(Debug, Default)]
struct Values(Map<String, Value>);

impl Values {
    fn add(&mut self, name: &str, value: impl Into<Value>) {
        self.0.insert(name.to_owned(), value.into());
    }
}

fn timing(command: &[String]) -> Result<Values> {
    let mut trace = Trace::new(4096)?;
    trace.event("sched/sched_process_exec")?;
    trace.first_entry()?;
    trace.start()?;
    let mut vm = Vm::start(command)?;
    let marker = vm.until_marker(None, &mut |_| {})?;
    let bytes = vm.output.len();
    let end = vm.until_end()?;
    let text = trace.text()?;

    let entry = entry(&text)?;
    let mut values = Values::default();
    values.add("exec_to_entry_ms", entry);
    values.add("exec_to_marker_ms", marker.as_secs_f64() * 1e3);
    values.add("exec_to_exit_ms", end.as_secs_f64() * 1e3);
    values.add("console_bytes", bytes);
    Ok(values)
}

/// Returns the milliseconds from the exec to the first entry into the guest, by the text of a trace
/// of both.
pub(crate) fn entry(text: &str) -> Result<f64> {
    let mut events = trace::events(text);
    let exec = events.find(|event| event.body.starts_with("sched_process_exec"));
    let entry = events.find(|event| event.body.starts_with("kvm_entry"));
    match (exec, entry) {
        (Some(exec), Some(entry)) => Ok(millis(entry.micros - exec.micros)),
        _ => bail!("the trace lacks the exec or the first entry:\n{text}"),
    }
}

/// Counts the exits that user space answers, by their reasons.
pub(crate) struct UserExits(Trace);

impl UserExits {
    /// From now on.
    pub(crate) fn start() -> Result<Self> {
        let mut trace = Trace::new(1024)?;
        trace.histogram(USER_EXIT, "reason")?;
        trace.start()?;
        Ok(UserExits(trace))
    }

    fn by_reason(&self) -> Result<BTreeMap<u64, u64>> {
        self.0.counts(USER_EXIT)
    }

    /// Returns how many there were.
    pub(crate) fn count(&self) -> Result<u64> {
        Ok(self.by_reason()?.values().sum())
    }
}

fn marker(command: &[String]) -> Result<Values> {
    let user_exits = UserExits::start()?;
    let mut vm = Vm::start(command)?;
    vm.until_marker(None, &mut |_| {})?;
    let statistics = statistics();
    let exits = user_exits.by_reason()?;
    let mappings = Mappings::of(vm.child.id())?;
    let threads = procfs::threads(vm.child.id())?;
    vm.until_end()?;

    let mut values = Values::default();
    values.add("user_exits", exits.values().sum::<u64>());
    for (reason, count) in exits {
        values.add(&format!("user_exits_reason_{reason}"), count);
    }
    for (name, count) in statistics {
        values.add(&format!("kvm_{name}"), count);
    }
    values.add("vmm_rss_kib", mappings.vmm.resident);
    values.add("vmm_anon_kib", mappings.vmm.anonymous);
    values.add("guest_rss_kib", mappings.guest.resident);
    values.add("threads", threads.len());
    let mut names = threads
        .into_iter()
        .map(|thread| thread.name)
        .collect::<Vec<_>>();
    names.sort();
    values.add("thread_names", names.join(" "));
    Ok(values)
}

fn peak(command: &[String]) -> Result<Values> {
    let mut most = 0;
    let mut looks = 0;
    let mut vm = Vm::start(command)?;
    vm.until_marker(Some(Duration::from_millis(1)), &mut |pid| {
        // There is nothing to see in a process that is just ending.
        if let Ok(mappings) = Mappings::of(pid) {
            most = most.max(mappings.vmm.resident);
            looks += 1;
        }
    })?;
    vm.until_end()?;
    let mut values = Values::default();
    values.add("vmm_peak_kib", most);
    values.add("looks", looks);
    Ok(values)
}

fn calls(command: &[String]) -> Result<Values> {
    let mut trace = Trace::new(4096)?;
    trace.event("raw_syscalls/sys_enter")?;
    trace.event("sched/sched_process_exec")?;
    trace.first_entry()?;
    trace.start()?;
    let mut vm = Vm::start(command)?;
    let pid = vm.child.id();
    vm.until_marker(None, &mut |_| {})?;
    vm.until_end()?;
    let text = trace.text()?;
    let before = before_entry(trace::events(&text).filter(|event| event.pid >= pid));
    let calls = before
        .iter()
        .filter(|event| event.body.starts_with("sys_enter:"))
        .count();
    let mut values = Values::default();
    values.add("calls_before_entry", calls);
    Ok(values)
}

fn verbose(command: &[String]) -> Result<Values> {
    let user_exits = UserExits::start()?;
    let mut vm = Vm::start(command)?;
    let marker = vm.until_marker(None, &mut |_| {})?;
    let (exits, answered) = (exits(), user_exits.count()?);
    let bytes = vm.output.len();
    vm.until_end()?;
    let mut values = Values::default();
    values.add("verbose_marker_ms", marker.as_secs_f64() * 1e3);
    values.add("verbose_bytes", bytes);
    values.add("verbose_exits", exits);
    values.add("verbose_user_exits", answered);
    Ok(values)
}

/// Returns the time from each exit to the next entry, but for those in which the guest slept.
fn host_time(command: &[String]) -> Result<Values> {
    let mut trace = Trace::new(32 << 10)?;
    trace.event("kvm/kvm_exit")?;
    trace.event("kvm/kvm_entry")?;
    trace.start()?;
    let mut vm = Vm::start(command)?;
    let marker = vm.until_marker(None, &mut |_| {})?;
    trace.stop()?;
    let bytes = vm.output.len();
    vm.until_end()?;
    let text = trace.text()?;

    let (mut micros, mut events) = (0, 0_u64);
    let mut left = BTreeMap::new();
    for event in trace::events(&text) {
        events += 1;
        if event.body.starts_with("kvm_entry") {
            micros += left
                .remove(&event.pid)
                .map_or(0, |exit| event.micros - exit);
        } else if !event.body.contains("(WFx)") {
            left.insert(event.pid, event.micros);
        }
    }
    let mut values = Values::default();
    values.add("host_ms", millis(micros));
    values.add("traced_events", events);
    values.add("traced_marker_ms", marker.as_secs_f64() * 1e3);
    values.add("traced_bytes", bytes);
    Ok(values)
}

fn idle(command: &[String]) -> Result<Values> {
    let user_exits = UserExits::start()?;
    let look = |vm: &Vm| -> Result<_> {
        let threads = procfs::threads(vm.child.id())?;
        Ok((threads, exits(), user_exits.count()?))
    };
    let mut vm = Vm::start(command)?;
    vm.until_marker(None, &mut |_| {})?;
    sleep(SETTLE);
    let (threads, exits_before, answered_before) = look(&vm)?;
    sleep(WATCH);
    let (later, exits, answered) = look(&vm)?;

    let mut values = Values::default();
    let (mut vcpus, mut others) = (0, 0);
    for thread in &later {
        let before = threads.iter().find(|before| before.id == thread.id);
        let nanos = thread.nanos - before.map_or(0, |before| before.nanos);
        let switches = thread.switches - before.map_or(0, |before| before.switches);
        values.add(&format!("idle_ms_{}", thread.name), nanos as f64 / 1e6);
        values.add(&format!("idle_switches_{}", thread.name), switches);
        if thread.name.contains("vcpu") {
            vcpus += nanos;
        } else {
            others += nanos;
        }
    }
    values.add("idle_vcpus_ms", vcpus as f64 / 1e6);
    values.add("idle_others_ms", others as f64 / 1e6);
    values.add("idle_exits", exits - exits_before);
    values.add("idle_user_exits", answered - answered_before);
    Ok(values)
}

fn huge_pages(command: &[String], policy: &str) -> Result<Values> {
    let before = fs::read_to_string(THP).context("the host has no transparent huge pages")?;
    let before = before.split(['[', ']']).nth(1).unwrap_or("always");
    fs::write(THP, policy).with_context(|| format!("cannot write {THP}"))?;
    let measured = (|| {
        let mut trace = Trace::new(4096)?;
        trace.histogram(FAULT, "common_pid")?;
        trace.start()?;
        let mut vm = Vm::start(command)?;
        let marker = vm.until_marker(None, &mut |_| {})?;
        let statistics = statistics();
        let faults = trace.counts(FAULT)?;
        let mappings = Mappings::of(vm.child.id())?;
        vm.until_end()?;
        let mut values = Values::default();
        values.add("marker_ms", marker.as_secs_f64() * 1e3);
        values.add("exits", statistics.get("exits").copied().unwrap_or(0));
        values.add("guest_faults", faults.values().sum::<u64>());
        values.add("guest_rss_kib", mappings.guest.resident);
        values.add("guest_huge_kib", mappings.guest.huge);
        let share = 100.0 * mappings.guest.huge as f64 / mappings.guest.resident.max(1) as f64;
        values.add("huge_percent", share);
        Ok(values)
    })();
    fs::write(THP, before).with_context(|| format!("cannot write {THP}"))?;
    measured
}

/// Returns the events from the exec to the first entry.
fn before_entry<'a>(events: impl Iterator<Item = trace::Event<'a>>) -> Vec<trace::Event<'a>> {
    events
        .skip_while(|event| !event.body.starts_with("sched_process_exec"))
        .take_while(|event| !event.body.starts_with("kvm_entry"))
        .collect()
}

/// KVM's counters over all VMs, of which there is one.
fn statistics() -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for entry in fs::read_dir(DEBUGFS).into_iter().flatten().flatten() {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        if let Ok(count @ 1..) = text.trim().parse() {
            counts.insert(entry.file_name().to_string_lossy().into_owned(), count);
        }
    }
    counts
}

/// Returns all exits of guests so far.
pub(crate) fn exits() -> u64 {
    statistics().get("exits").copied().unwrap_or(0)
}

/// The trace event of an exit that user space answers.
const USER_EXIT: &str = "kvm/kvm_userspace_exit";

/// The trace event of a page that the guest touches first.
const FAULT: &str = match std::env::consts::ARCH.as_bytes() {
    b"x86_64" => "kvm/kvm_page_fault",
    _ => "kvm/kvm_guest_fault",
};

fn millis(micros: u64) -> f64 {
    micros as f64 / 1e3
}

/// Prints a line of JSON for the bench.
pub(crate) fn print(line: &Value) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .context("cannot write standard output")
}
