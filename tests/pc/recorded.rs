//! The requests whose answers by Firecracker itself were recorded, to armlet.

use crate::api::{Api, ask};
use crate::rig;
use crate::software::Program;
use serde_json::{Value, json};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Requests that are answered otherwise: how what is asked for begins, our status, and why.
const DIFFERENCES: &[(&str, u64, &str)] = &[
    (
        "PUT /machine-config {\"vcpu_count\": 1, \"mem_size_mib\": 128, \"cpu_template\": \"T2\"}",
        400,
        "vCPUs have what the host's KVM has",
    ),
    (
        "PUT /boot-source {\"kernel_image_path\": \"{FILES}/\"}",
        400,
        "a folder is no kernel, which is said at once",
    ),
    (
        "PATCH /drives/d1 {\"drive_id\": \"d1\", \"path_on_host\": \"{FILES}/disk\"}",
        400,
        "an image that another disk writes to is not taken a second time",
    ),
    ("PUT /hotplug/memory", 400, "no memory hotplug"),
    ("GET /hotplug/memory", 400, "no memory hotplug"),
];

#[test]
fn firecrackers_recorded_requests_get_the_recorded_answers() {
    if !rig::small() {
        return;
    }
    let text = std::fs::read_to_string("tests/recorded/firecracker-answers.jsonl");
    let text = text.expect("the recorded answers");
    let has_taps = rustix::process::geteuid().is_root() && Path::new("/dev/net/tun").exists();
    if !has_taps {
        println!("without network interfaces: TAPs are made by root only");
    }
    let mut group = String::new();
    let mut now: Option<(Api, UnixStream)> = None;
    let (mut compared, mut alike, mut wrong) = (0, 0, Vec::new());
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let word = |name: &str| line[name].as_str().unwrap_or_default();
        let of = word("group");
        if (of == "net" || of == "mmds" || of == "after start") && !has_taps {
            continue;
        }
        if of != group {
            of.clone_into(&mut group);
            let api = started();
            let stream = UnixStream::connect(api.path("s")).expect("it listens");
            now = Some((api, stream));
        }
        let (api, stream) = now.as_mut().expect("a group");
        let folder = api.path("f");
        let folder = folder.to_str().expect("UTF-8");
        let with_files = |text: &str| text.replace("{FILES}", folder).replace("{DIR}", folder);
        let body = line["body"]
            .as_str()
            .map(|body| match line["body_note"].as_str() {
                // Long bodies were cut where they were written down.
                Some(_) => json!({"x": "y".repeat(51_000)}).to_string(),
                None => with_files(body),
            });
        let (method, path) = (word("method"), word("path"));
        let recorded = line["status"].as_u64().unwrap_or_default();
        // What the original says after its end is nothing.
        if recorded == 0 {
            continue;
        }
        let (status, answer) = ask(stream, method, path, body.as_deref());
        let asked = format!("{method} {path} {}", word("body"));
        let mut differences = DIFFERENCES.iter();
        let expected = differences
            .find(|(start, ..)| asked.starts_with(start))
            .map_or(recorded, |(_, status, _)| *status);
        compared += 1;
        if u64::from(status) != expected {
            wrong.push(format!(
                "{asked}: {status} {answer}, not {recorded} {}",
                word("answer")
            ));
        }
        alike += usize::from(answer == with_files(word("answer")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("{compared} compared, {alike} alike to the byte");
    assert!(compared > 250, "{compared}");
}

/// Armlet with the files that the requests name.
fn started() -> Api {
    let api = Api::start(&[]);
    std::fs::create_dir(api.path("f")).expect("a folder");
    let idle = Program::default().stay().image();
    for (name, bytes) in [
        ("k", vec![0; 4]),
        ("idle", idle),
        ("empty", Vec::new()),
        ("disk", vec![0; 1 << 20]),
        ("odd", vec![0; 1000]),
    ] {
        api.write(&format!("f/{name}"), &bytes);
    }
    api
}
