//! Metrics in Firecracker's format: an object a line, of what was counted since the last one.

use armlet_api::http::{Method, Request};
use armlet_api::model::Metrics;
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
}

impl MetricsFile {
    pub(super) fn new(id: &str) -> MetricsFile {
        MetricsFile(Arc::new(Mutex::new(Inner {
            id: id.to_owned(),
            target: None,
            next: None,
            requests: BTreeMap::new(),
            missed: 0,
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

    /// Begins to write.
    pub(super) fn begin(&self) {
        self.flush();
    }

    /// When to write again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        lock(&self.0).next
    }

    /// Writes a line, if there is a file for it. A FIFO that is full loses it.
    pub(super) fn flush(&self) {
        lock(&self.0).flush();
    }

    /// Writes the last line.
    pub(super) fn end(&self) {
        self.flush();
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
}
