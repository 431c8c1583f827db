//! The kernel's tracefs, as far as `xtask measure` needs it.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};

const ROOT: &str = "/sys/kernel/tracing";

/// What shall be traced. Everything is switched off again when this is dropped.
#[derive(Debug)]
pub(crate) struct Trace {
    /// The files written to and what switches that off, in the order in which they were written.
    undo: Vec<(String, String)>,
}

impl Trace {
    /// Creates an empty trace that is not running, with a buffer of this size.
    pub(crate) fn new(buffer_kib: u32) -> Result<Self> {
        let trace = Self { undo: Vec::new() };
        write("tracing_on", "0")?;
        write("trace", "")?;
        write("trace_clock", "mono")?;
        write("buffer_size_kb", &buffer_kib.to_string())?;
        Ok(trace)
    }

    /// Records every event called `name`.
    pub(crate) fn event(&mut self, name: &str) -> Result<()> {
        self.write(format!("events/{name}/enable"), "1", "0")
    }

    /// Records those events called `name` that pass `filter`.
    pub(crate) fn filtered(&mut self, name: &str, filter: &str) -> Result<()> {
        self.write(format!("events/{name}/filter"), filter, "0")?;
        self.event(name)
    }

    /// Records entries into a guest until the first exit.
    pub(crate) fn first_entry(&mut self) -> Result<()> {
        self.trigger("kvm/kvm_exit", "disable_event:kvm:kvm_entry:1")?;
        self.event("kvm/kvm_entry")
    }

    /// Counts events called `name` by `key`, without recording any.
    pub(crate) fn histogram(&mut self, name: &str, key: &str) -> Result<()> {
        self.trigger(name, &format!("hist:keys={key}"))
    }

    fn trigger(&mut self, name: &str, trigger: &str) -> Result<()> {
        let file = format!("events/{name}/trigger");
        self.write(file, trigger, &format!("!{trigger}"))
    }

    /// Returns what a histogram has counted.
    pub(crate) fn counts(&self, name: &str) -> Result<BTreeMap<u64, u64>> {
        Ok(parse_histogram(&read(&format!("events/{name}/hist"))?))
    }

    /// Starts to record.
    pub(crate) fn start(&self) -> Result<()> {
        write("tracing_on", "1")
    }

    /// Records no more.
    pub(crate) fn stop(&self) -> Result<()> {
        write("tracing_on", "0")
    }

    /// Returns all that was recorded.
    pub(crate) fn text(&self) -> Result<String> {
        self.stop()?;
        read("trace")
    }

    fn write(&mut self, file: String, value: &str, undo: &str) -> Result<()> {
        write(&file, value)?;
        self.undo.push((file, undo.to_owned()));
        Ok(())
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // What fails here makes the next trace fail, and that says so.
        for (file, value) in self.undo.iter().rev() {
            let _ = write(file, value);
        }
    }
}

fn write(file: &str, value: &str) -> Result<()> {
    fs::write(format!("{ROOT}/{file}"), value)
        .with_context(|| format!("cannot write {value:?} to {ROOT}/{file}"))
}

fn read(file: &str) -> Result<String> {
    // Names of programs need not be text.
    let bytes = fs::read(format!("{ROOT}/{file}"));
    let bytes = bytes.with_context(|| format!("cannot read {ROOT}/{file}"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A line of the trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event<'a> {
    /// The thread.
    pub(crate) pid: u32,
    /// Microseconds on the monotonic clock.
    pub(crate) micros: u64,
    /// The event's name and what it tells.
    pub(crate) body: &'a str,
}

/// Returns the events in a trace's text.
pub(crate) fn events(text: &str) -> impl Iterator<Item = Event<'_>> {
    text.lines().filter_map(event)
}

/// Reads `  vcpu0-130     [000] d....     0.702199: kvm_entry: PC: 0x0000000040000000`.
fn event(line: &str) -> Option<Event<'_>> {
    let (head, body) = line.split_once(": ")?;
    let (thread, rest) = head.split_once(" [")?;
    let (_, pid) = thread.trim_end().rsplit_once('-')?;
    let (seconds, fraction) = rest.rsplit(' ').next()?.split_once('.')?;
    let micros = seconds.parse::<u64>().ok()? * 1_000_000 + fraction.parse::<u64>().ok()?;
    Some(Event {
        pid: pid.parse().ok()?,
        micros,
        body,
    })
}

/// Reads `{ reason:          6 } hitcount:         92`.
fn parse_histogram(text: &str) -> BTreeMap<u64, u64> {
    let count = |line: &str| {
        let (key, count) = line.strip_prefix('{')?.split_once('}')?;
        let (_, key) = key.split_once(':')?;
        let (_, count) = count.split_once("hitcount:")?;
        Some((key.trim().parse().ok()?, count.trim().parse().ok()?))
    };
    text.lines().filter_map(count).collect()
}

/// A system call that read a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileRead {
    /// The file.
    pub(crate) fd: u64,
    /// How much it gave.
    pub(crate) bytes: u64,
    start: u64,
    end: u64,
}

/// Returns the reads in `events` that gave at least `least` bytes.
pub(crate) fn reads(events: &[Event<'_>], least: u64) -> Vec<FileRead> {
    let hexadecimal = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    let mut open = BTreeMap::new();
    let mut reads = Vec::new();
    for event in events {
        let Some(call) = event.body.strip_prefix("sys_") else {
            continue;
        };
        if let Some((_, rest)) = call.split_once("(fd: ") {
            let fd = rest.split([',', ')']).next().and_then(hexadecimal);
            open.insert(event.pid, (fd.unwrap_or(u64::MAX), event.micros));
        } else if let Some((_, result)) = call.split_once(" -> ") {
            let started = open.remove(&event.pid);
            let bytes = hexadecimal(result).filter(|bytes| *bytes >> 63 == 0);
            if let (Some((fd, start)), Some(bytes)) = (started, bytes) {
                let end = event.micros;
                reads.push(FileRead {
                    fd,
                    bytes,
                    start,
                    end,
                });
            }
        }
    }
    reads.retain(|read| read.bytes >= least);
    reads
}

/// Microseconds during which at least one of `reads` was under way.
pub(crate) fn covered(reads: &[FileRead]) -> u64 {
    let mut spans = reads
        .iter()
        .map(|read| (read.start, read.end))
        .collect::<Vec<_>>();
    spans.sort_unstable();
    let (mut total, mut until) = (0, 0);
    for (start, end) in spans {
        total += end.saturating_sub(start.max(until));
        until = until.max(end);
    }
    total
}

/// Returns the bytes that were read from each file.
pub(crate) fn bytes_by_fd(reads: &[FileRead]) -> BTreeMap<u64, u64> {
    let mut bytes = BTreeMap::new();
    for read in reads {
        *bytes.entry(read.fd).or_default() += read.bytes;
    }
    bytes
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_trace_are_read() {
        let text = "# tracer: nop\n#\n\
            \x20         a-b c-129     [000] .....     0.683111: sched_process_exec: filename=/x pid=129\n\
            \x20          vcpu0-130     [001] d....    12.702199: kvm_entry: PC: 0x0000000040000000\n";
        let events = events(text).collect::<Vec<_>>();
        assert_eq!(events.len(), 2);
        assert_eq!((events[0].pid, events[0].micros), (129, 683_111));
        assert_eq!((events[1].pid, events[1].micros), (130, 12_702_199));
        assert_eq!(events[1].body, "kvm_entry: PC: 0x0000000040000000");
    }

    #[test]
    fn histograms_are_read() {
        let text = "# event histogram\n\n{ reason:         24 } hitcount:          1\n\
            { reason:          6 } hitcount:         92\n\nTotals:\n    Hits: 93\n";
        let counts = parse_histogram(text);
        assert_eq!(counts, BTreeMap::from([(6, 92), (24, 1)]));
    }

    #[test]
    fn reads_that_overlap_count_once() {
        let line = |pid: u32, micros: u64, body| Event { pid, micros, body };
        let events = [
            line(
                7,
                10,
                "sys_pread64(fd: 3, buf: ffff, count: 100000, pos: 0)",
            ),
            line(
                8,
                12,
                "sys_pread64(fd: 3, buf: ffff, count: 100000, pos: 100000)",
            ),
            line(7, 20, "sys_pread64 -> 0x100000"),
            line(8, 25, "sys_pread64 -> 0x100000"),
            line(7, 26, "sys_read(fd: 4, buf: ffff, count: 40)"),
            line(7, 27, "sys_read -> 0x40"),
            line(7, 28, "sys_read(fd: a, buf: ffff, count: 20000)"),
            line(7, 30, "sys_read -> 0x20000"),
            line(7, 31, "sys_read(fd: a, buf: ffff, count: 20000)"),
            line(7, 32, "sys_read -> 0xfffffffffffffffc"),
        ];
        let reads = reads(&events, 0x10000);
        assert_eq!(covered(&reads), 17);
        let bytes = BTreeMap::from([(3, 0x20_0000), (10, 0x2_0000)]);
        assert_eq!(bytes_by_fd(&reads), bytes);
    }
}
