//! Metrics in Firecracker's format: an object a line, of what was counted since the last one.

use crate::run::Done;
use armlet_api::http::{Method, Request};
use armlet_api::model::Metrics;
use armlet_devices::counts::Tally;
use armlet_devices::sync::lock;
use armlet_system::files;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How often a line is written.
const EVERY: Duration = Duration::from_secs(60);

/// The file of metrics, and what was counted for it.
#[derive(Clone)]
pub(super) struct MetricsFile(Arc<Mutex<Inner>>);

struct Inner {
    id: String,
    target: Option<(File, Metrics)>,
    next: Option<Instant>,
    /// Requests by group and name: `get_api_requests`, `machine_cfg_count`.
    requests: BTreeMap<(&'static str, String), u64>,
    missed: u64,
    /// The IDs of drives and interfaces, in the order of the machine's.
    names: [Vec<String>; 2],
    /// What was done by now, and when the last line was written.
    now: Done,
    before: Done,
}

impl MetricsFile {
    pub(super) fn new(id: &str) -> MetricsFile {
        MetricsFile(Arc::new(Mutex::new(Inner {
            id: id.to_owned(),
            target: None,
            next: None,
            requests: BTreeMap::new(),
            missed: 0,
            names: Default::default(),
            now: Done::default(),
            before: Done::default(),
        })))
    }

    /// Opens the file that they go to.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn open(&self, metrics: &Metrics) -> io::Result<()> {
        let file = files::append(&metrics.metrics_path)?;
        lock(&self.0).target = Some((file, metrics.clone()));
        Ok(())
    }

    /// Counts a request.
    pub(super) fn count(&self, request: &Request) {
        let group = match request.method {
            Method::Get => "get_api_requests",
            Method::Put => "put_api_requests",
            Method::Patch => "patch_api_requests",
            Method::Delete => return,
        };
        let path = request.path.trim_start_matches('/');
        let name = match path.split('/').next().unwrap_or_default() {
            "" => "instance_info_count",
            "version" => "vmm_version_count",
            "machine-config" => "machine_cfg_count",
            "mmds" => "mmds_count",
            "balloon" => "balloon_count",
            "actions" => "actions_count",
            "boot-source" => "boot_source_count",
            "drives" => "drive_count",
            "logger" => "logger_count",
            "metrics" => "metrics_count",
            "network-interfaces" => "network_count",
            "vsock" => "vsock_count",
            "pmem" => "pmem_count",
            "serial" => "serial_count",
            "cpu-config" => "cpu_cfg_count",
            // What clients make up is not kept.
            _ => return,
        };
        let mut inner = lock(&self.0);
        *inner.requests.entry((group, name.to_owned())).or_default() += 1;
    }

    /// Whether there is a file for them.
    pub(super) fn is_wanted(&self) -> bool {
        lock(&self.0).target.is_some()
    }

    /// When to write again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        lock(&self.0).next
    }

    /// Writes a line, if there is a file for it, of what was done now. A FIFO that is full loses it.
    pub(super) fn flush(&self, done: Option<Done>, drives: &[String], interfaces: &[String]) {
        let mut inner = lock(&self.0);
        if let Some(done) = done {
            inner.names = [drives.to_vec(), interfaces.to_vec()];
            inner.now = done;
        }
        inner.flush();
    }

    /// Writes the last line.
    pub(super) fn end(&self) {
        lock(&self.0).flush();
    }
}

impl Inner {
    fn flush(&mut self) {
        let Some((mut file, metrics)) = self.target.take() else {
            return;
        };
        let line = format!("{}\n", self.line(&metrics));
        match file.write_all(line.as_bytes()) {
            Ok(()) => {
                self.requests.clear();
                self.missed = 0;
                self.before = self.now.clone();
            }
            Err(_) => self.missed += 1,
        }
        self.target = Some((file, metrics));
        self.next = Some(Instant::now() + EVERY);
    }

    fn line(&self, metrics: &Metrics) -> Value {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let millis = now.map_or(0, |now| now.as_millis());
        let mut line = Map::new();
        line.insert("utc_timestamp_ms".to_owned(), json!(millis as u64));
        for group in ["get_api_requests", "patch_api_requests", "put_api_requests"] {
            let of = self.requests.iter().filter(|((of, _), _)| *of == group);
            let counts: Map<String, Value> = of
                .map(|((_, name), count)| (name.clone(), json!(count)))
                .collect();
            line.insert(group.to_owned(), counts.into());
        }
        self.add_machine(&mut line);
        line.insert(
            "logger".to_owned(),
            json!({ "missed_metrics_count": self.missed }),
        );
        if metrics.emit_id {
            line.insert("id".to_owned(), json!(self.id));
        }
        if !metrics.properties.is_empty() {
            line.insert("properties".to_owned(), json!(metrics.properties));
        }
        line.into()
    }

    /// What vCPUs, drives and interfaces have done since the last line.
    fn add_machine(&self, line: &mut Map<String, Value>) {
        let mut vcpu = Map::new();
        for (reason, count) in &self.now.exits {
            let mut before = self.before.exits.iter();
            let before = before.find(|(other, _)| other == reason);
            let name = match *reason {
                "register reads" => "exit_mmio_read",
                "register writes" => "exit_mmio_write",
                "port accesses" => "exit_io",
                _ => continue,
            };
            let more = count.saturating_sub(before.map_or(0, |(_, count)| *count));
            vcpu.insert(name.to_owned(), json!(more));
        }
        line.insert("vcpu".to_owned(), vcpu.into());
        let [drives, interfaces] = &self.names;
        for (kind, group, names) in [("disk", "block", drives), ("net", "net", interfaces)] {
            let mut all = Tally::default();
            for (index, id) in names.iter().enumerate() {
                let name = format!("{kind}{index}");
                let more = since(&self.now, &self.before, &name);
                all = all.with(&more);
                line.insert(format!("{group}_{id}"), shown(kind, &more));
            }
            line.insert(group.to_owned(), shown(kind, &all));
        }
    }
}

/// What a device has done between two moments.
fn since(now: &Done, before: &Done, name: &str) -> Tally {
    let of = |done: &Done| {
        let mut devices = done.devices.iter();
        let found = devices.find(|(device, _)| device == name);
        found.map_or_else(Tally::default, |(_, tally)| *tally)
    };
    of(now).since(&of(before))
}

/// A device's counts under the names of the interface.
fn shown(kind: &str, tally: &Tally) -> Value {
    match kind {
        "disk" => json!({
            "read_count": tally.to_guest,
            "read_bytes": tally.bytes_to_guest,
            "write_count": tally.from_guest,
            "write_bytes": tally.bytes_from_guest,
            "flush_count": tally.flushes,
            "execute_fails": tally.failed,
        }),
        _ => json!({
            "rx_packets_count": tally.to_guest,
            "rx_bytes_count": tally.bytes_to_guest,
            "tx_packets_count": tally.from_guest,
            "tx_bytes_count": tally.bytes_from_guest,
            "tx_fails": tally.failed,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(read: u64, reads: u64) -> Done {
        let tally = Tally {
            to_guest: read / 512,
            bytes_to_guest: read,
            ..Tally::default()
        };
        Done {
            exits: vec![("register reads", reads), ("other", 5)],
            devices: vec![("disk0".to_owned(), tally), ("disk1".to_owned(), tally)],
            faults: Vec::new(),
            restarts: 0,
        }
    }

    #[test]
    fn a_line_has_what_was_added_since_the_last() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics");
        let file = MetricsFile::new("id");
        assert!(!file.is_wanted());
        let text = format!(r#"{{"metrics_path": {path:?}, "properties": {{"a": "b"}}}}"#);
        let metrics = serde_json::from_str(&text).expect("metrics");
        file.open(&metrics).expect("a file");
        let (drives, nets) = (["a".to_owned(), "b".to_owned()], ["eth0".to_owned()]);
        file.flush(Some(done(1024, 3)), &drives, &nets);
        file.flush(Some(done(2048, 10)), &drives, &nets);
        file.end();
        let text = std::fs::read_to_string(&path).expect("lines");
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect();
        for (line, bytes, reads) in [(0, 1024, 3), (1, 1024, 7), (2, 0, 0)] {
            let line = &lines[line];
            assert_eq!(line["block_a"]["read_bytes"], bytes, "{line}");
            assert_eq!(line["block"]["read_bytes"], 2 * bytes, "{line}");
            assert_eq!(line["vcpu"]["exit_mmio_read"], reads, "{line}");
            assert_eq!(line["net_eth0"]["rx_bytes_count"], 0, "{line}");
            assert_eq!(line["properties"]["a"], "b");
        }
        assert!(file.deadline().is_some());
    }
}
