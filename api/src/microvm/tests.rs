//! The recorded answers of the original, and ours.

use super::*;
use crate::http::Method;
use crate::model::{
    BalloonHint, DrivePatch, Logger, Metrics, NetPatch, PmemPatch, SnapshotCreate, SnapshotLoad,
};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

/// What a host does for requests that need no machine: files are real, TAPs and sockets are names.
#[derive(Default)]
struct Files {
    /// Where paths begin.
    folder: PathBuf,
    taps: BTreeMap<String, String>,
    socket: Option<String>,
    is_paused: bool,
}

fn opened(file: std::io::Result<File>) -> Result<File, String> {
    file.map_err(|error| error.to_string())
}

impl Resources for Files {
    fn check_boot_source(&mut self, source: &BootSource) -> Result<(), String> {
        let file = opened(File::open(&source.kernel_image_path));
        file.map_err(|why| format!("The kernel file cannot be opened: {why}"))?;
        if let Some(path) = &source.initrd_path {
            let what =
                "The initrd file cannot be opened due to invalid path or invalid permissions.";
            opened(File::open(path)).map_err(|why| format!("{what} {why}"))?;
        }
        Ok(())
    }

    fn check_drive(&mut self, drive: &Drive) -> Result<(), String> {
        let Some(path) = &drive.path_on_host else {
            return Err("Vhost user backend error".to_owned());
        };
        let mut options = OpenOptions::new();
        let file = options.read(true).write(!drive.is_read_only).open(path);
        let what = "Virtio backend error: Error manipulating the backing file";
        opened(file).map_err(|why| format!("{what}: {why} {path}"))?;
        Ok(())
    }

    fn open_tap(&mut self, interface: &NetworkInterface) -> Result<(), String> {
        let name = &interface.host_dev_name;
        if name.len() > 15 {
            return Err("Open tap device failed: Invalid interface name".to_owned());
        }
        let owner = self.taps.get(name);
        if owner.is_some_and(|owner| *owner != interface.iface_id) {
            return Err("Resource busy (os error 16).".to_owned());
        }
        self.taps.insert(name.clone(), interface.iface_id.clone());
        Ok(())
    }

    fn bind_vsock(&mut self, vsock: &Vsock) -> Result<(), String> {
        let what = "Error binding to the host-side Unix socket";
        let path = &vsock.uds_path;
        let is_there = Path::new(path).is_absolute() && Path::new(path).exists();
        let folder = Path::new(path).parent().is_some_and(Path::exists);
        if path.len() >= 108 {
            return Err(format!("{what}: path must be shorter than SUN_LEN"));
        }
        if is_there {
            return Err(format!("{what}: Address in use (os error 98)"));
        }
        if Path::new(path).is_absolute() && !folder {
            return Err(format!("{what}: No such file or directory (os error 2)"));
        }
        self.socket = Some(path.clone());
        Ok(())
    }

    fn configure_logger(&mut self, logger: &Logger) -> Result<(), String> {
        if let Some(path) = &logger.log_path {
            let path = self.folder.join(path);
            let file = opened(File::create(path));
            file.map_err(|why| format!("Failed to open target file: {why}"))?;
        }
        Ok(())
    }

    fn configure_metrics(&mut self, metrics: &Metrics) -> Result<(), String> {
        opened(File::create(&metrics.metrics_path)).map(drop)
    }

    fn open_snapshot(&mut self, load: &SnapshotLoad) -> Result<String, String> {
        let what = "Failed to restore from snapshot: Failed to get snapshot state from file: Failed to open snapshot file";
        let read = std::fs::read_to_string(&load.snapshot_path);
        read.map_err(|error| format!("{what}: {error}"))
    }
}

impl Machine for Files {
    fn is_paused(&mut self) -> Result<bool, String> {
        Ok(self.is_paused)
    }

    fn set_paused(&mut self, paused: bool) -> Result<(), String> {
        self.is_paused = paused;
        Ok(())
    }

    fn press_power_key(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn flush_metrics(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn change_drive(&mut self, _: usize, patch: &DrivePatch) -> Result<(), String> {
        match &patch.path_on_host {
            Some(path) => opened(File::open(path)).map(drop),
            None => Ok(()),
        }
    }

    fn change_interface(&mut self, _: usize, _: &NetPatch) -> Result<(), String> {
        Ok(())
    }

    fn change_pmem(&mut self, _: usize, _: &PmemPatch) -> Result<(), String> {
        Ok(())
    }

    fn set_balloon(&mut self, _: u32) -> Result<(), String> {
        Err("Balloon: Device not activated yet.".to_owned())
    }

    fn set_balloon_interval(&mut self, _: u16) -> Result<(), String> {
        Ok(())
    }

    fn balloon_statistics(&mut self) -> Result<Value, String> {
        Ok(json!({"target_pages": 2560, "actual_pages": 0, "target_mib": 10, "actual_mib": 0}))
    }

    fn hint(&mut self, _: BalloonHint) -> Result<(), String> {
        Err("Balloon: Device not activated yet.".to_owned())
    }

    fn hinting_status(&mut self) -> Result<Value, String> {
        Ok(json!({"host_cmd": 0, "guest_cmd": null}))
    }

    fn snapshot(&mut self, create: &SnapshotCreate, config: Value) -> Result<(), String> {
        let what = "Cannot perform open on the snapshot backing file";
        std::fs::write(&create.snapshot_path, config.to_string())
            .map_err(|error| format!("{what}: {error}"))
    }

    fn publish_mmds(&mut self, _: &Value) {}
}

fn fresh() -> Microvm {
    let identity = Identity {
        id: "anonymous-instance".to_owned(),
        version: "1.17.0-dev",
        is_x86: true,
    };
    Microvm::new(identity, 51200)
}

/// A recorded request: where ours differs, and why, stands in `DIFFERENCES`.
struct Recorded {
    group: String,
    method: String,
    path: String,
    body: Option<String>,
    status: u64,
    answer: String,
}

/// Requests that are answered otherwise: a part of group, method, path and body, our status, and why.
const DIFFERENCES: &[(&str, u16, &str)] = &[
    (
        "\"cpu_template\": \"T2\"",
        400,
        "no templates: vCPUs have what the host's KVM has",
    ),
    (
        "PUT /hotplug/memory {\"total_size_mib\": 1024}",
        400,
        "no memory hotplug yet",
    ),
    (
        "PUT /hotplug/memory {\"total_size_mib\": 256}",
        400,
        "no memory hotplug yet",
    ),
    (
        "GET /hotplug/memory after start",
        400,
        "no memory hotplug yet",
    ),
];

fn recorded() -> Vec<Recorded> {
    let path = "../tests/recorded/firecracker-answers.jsonl";
    let text = std::fs::read_to_string(path).expect("the recorded answers");
    let read = |line: &str| {
        let value: Value = serde_json::from_str(line).expect("JSON");
        let word = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
        Recorded {
            group: word("group"),
            method: word("method"),
            path: word("path"),
            body: value["body"]
                .as_str()
                .map(|body| match value["body_note"].as_str() {
                    // Long bodies were cut where they were written down.
                    Some(_) => json!({"x": "y".repeat(51000)}).to_string(),
                    None => body.to_owned(),
                }),
            status: value["status"].as_u64().unwrap_or_default(),
            answer: word("answer"),
        }
    };
    text.lines().map(read).collect()
}

/// Whether two values have the same keys in the same order, all the way down.
fn same_shape(ours: &Value, theirs: &Value) -> bool {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            ours.keys().eq(theirs.keys())
                && ours
                    .values()
                    .zip(theirs.values())
                    .all(|(a, b)| same_shape(a, b))
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            ours.len() == theirs.len() && ours.iter().zip(theirs).all(|(a, b)| same_shape(a, b))
        }
        _ => std::mem::discriminant(ours) == std::mem::discriminant(theirs),
    }
}

#[test]
fn recorded_requests_get_the_recorded_answers() {
    let folder = tempfile::tempdir().expect("a folder");
    let files = folder.path().to_str().expect("UTF-8");
    for (name, bytes) in [
        ("k", 4),
        ("idle", 64),
        ("empty", 0),
        ("disk", 1 << 20),
        ("odd", 1000),
    ] {
        std::fs::write(folder.path().join(name), vec![0; bytes]).expect("written");
    }
    let mut group = String::new();
    let (mut microvm, mut host) = (fresh(), Files::default());
    let mut is_started = false;
    let (mut compared, mut differed, mut words) = (0, 0, 0);
    let mut wrong = Vec::new();
    for recorded in recorded() {
        if recorded.group != group {
            group.clone_from(&recorded.group);
            microvm = fresh();
            is_started = false;
            host = Files {
                folder: folder.path().to_owned(),
                ..Files::default()
            };
        }
        let method = match recorded.method.as_str() {
            "GET" => Method::Get,
            "PUT" => Method::Put,
            "PATCH" => Method::Patch,
            "DELETE" => Method::Delete,
            // `http::tests` has these.
            _ => continue,
        };
        // What the original says after its end is nothing.
        if recorded.answer.is_empty() && recorded.status == 0 {
            continue;
        }
        let with_files = |text: &str| text.replace("{FILES}", files).replace("{DIR}", files);
        let request = Request {
            method,
            path: recorded.path.clone(),
            body: recorded
                .body
                .as_deref()
                .map(|body| with_files(body).into_bytes()),
        };
        let request = Request {
            body: request.body.filter(|body| !body.is_empty()),
            ..request
        };
        let answer = if is_started {
            microvm.handle_running(&request, &mut host)
        } else {
            match microvm.handle(&request, &mut host) {
                Step::Answer(answer) | Step::End(answer) => answer,
                // What becomes of a start only a machine tells; the one here starts in the last group.
                Step::Start if group == "after start" => {
                    is_started = true;
                    Answer::done()
                }
                Step::Start => continue,
            }
        };
        let body = recorded.body.as_deref().unwrap_or_default();
        let line = format!("{} {} {body}", recorded.method, recorded.path);
        let named = format!("{line} {group}");
        let difference = DIFFERENCES.iter().find(|(part, ..)| {
            let mut words = part.splitn(2, " after start");
            let first = words.next().unwrap_or_default();
            named.contains(first) && (words.next().is_none() || group == "after start")
        });
        if let Some((_, status, _)) = difference
            && u64::from(*status) != recorded.status
        {
            differed += 1;
            if answer.status != *status {
                wrong.push(format!("{line}: {} in place of {status}", answer.status));
            }
            continue;
        }
        compared += 1;
        if u64::from(answer.status) != recorded.status {
            let (status, theirs) = (recorded.status, &recorded.answer);
            wrong.push(format!("{line}: {answer:?} in place of {status} {theirs}"));
            continue;
        }
        if answer.body.is_empty() && recorded.answer.is_empty() {
            words += 1;
            continue;
        }
        let expected = with_files(&recorded.answer);
        let mut ours: Value = serde_json::from_str(&answer.body).expect("JSON");
        let mut theirs: Value = serde_json::from_str(&expected).expect("JSON");
        if recorded.method == "GET" {
            // What `DIFFERENCES` had refused is not there.
            for value in [&mut ours, &mut theirs]
                .into_iter()
                .filter_map(Value::as_object_mut)
            {
                value.remove("memory-hotplug");
                if value.remove("cpu_template").is_some() {
                    value.insert("mem_size_mib".to_owned(), json!(1));
                }
            }
        }
        if ours == theirs {
            words += 1;
        } else if !same_shape(&ours, &theirs) {
            wrong.push(format!("{line}:\n   {ours}\n   {theirs}"));
        } else if std::env::var_os("SHOW").is_some() {
            println!("{line}:\n   {ours}\n   {theirs}");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("{compared} compared, {words} alike in each word, {differed} differ for a reason");
    assert!(compared > 350 && words > 330, "{compared} {words}");
}
