//! Guests that Firecracker's API configures and starts.

use crate::guest::Armlet;
use armlet_system::deadline::Deadline;
use serde_json::Value;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::Duration;
use tempfile::TempDir;

/// How long what must come may take.
const LONG: Duration = Duration::from_secs(60);

/// `armlet api` in a folder of its own, which it has as its working folder.
pub(crate) struct Api {
    pub(crate) child: Child,
    folder: TempDir,
    ended: Option<ExitStatus>,
}

impl Api {
    /// Starts it with a socket.
    pub(crate) fn start(options: &[&str]) -> Api {
        let api = Api::start_in(
            tempfile::tempdir().expect("a folder"),
            &["--api-sock", "s"],
            options,
        );
        let deadline = Deadline::after(LONG);
        while UnixStream::connect(api.path("s")).is_err() {
            assert!(!deadline.left().is_zero(), "no socket: {}", api.said());
            sleep(Duration::from_millis(5));
        }
        api
    }

    pub(crate) fn start_in(folder: TempDir, first: &[&str], options: &[&str]) -> Api {
        let file = |name: &str| File::create(folder.path().join(name)).expect("a file");
        let child = Command::new(env!("CARGO_BIN_EXE_armlet"))
            .arg("api")
            .args(first)
            .args(options)
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(file("stdout"))
            .stderr(file("stderr"))
            .spawn()
            .expect("armlet");
        Api {
            child,
            folder,
            ended: None,
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).expect("written");
    }

    /// What it wrote to standard output.
    pub(crate) fn printed(&self) -> String {
        text(&self.path("stdout"))
    }

    pub(crate) fn said(&self) -> String {
        text(&self.path("stderr"))
    }

    /// The status and body of the answer to a request.
    pub(crate) fn ask(&self, method: &str, path: &str, body: Option<&str>) -> (u16, String) {
        let mut stream = UnixStream::connect(self.path("s")).expect("it listens");
        stream.set_read_timeout(Some(LONG)).expect("a limit");
        ask(&mut stream, method, path, body)
    }

    /// Has something done.
    pub(crate) fn put(&self, path: &str, body: &str) {
        let answer = self.ask("PUT", path, Some(body));
        assert_eq!(
            answer,
            (204, String::new()),
            "{path} {body} {}",
            self.said()
        );
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        let (status, body) = self.ask("GET", path, None);
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).expect("JSON")
    }

    /// Waits until it has printed `what`.
    pub(crate) fn expect(&self, what: &str) {
        let deadline = Deadline::after(LONG);
        while !self.printed().contains(what) {
            let (printed, said) = (self.printed(), self.said());
            assert!(!deadline.left().is_zero(), "no {what:?}: {printed} {said}");
            sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end.
    pub(crate) fn end(&mut self) -> ExitStatus {
        let deadline = Deadline::after(LONG);
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                self.ended = Some(status);
                return status;
            }
            assert!(
                !deadline.left().is_zero(),
                "it does not end: {}",
                self.said()
            );
            sleep(Duration::from_millis(5));
        }
    }

    fn threads(&self) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("threads");
        let name = |task: fs::DirEntry| text(&task.path().join("comm")).trim().to_owned();
        tasks.flatten().map(name).collect()
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn text(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Sends a request, and reads the answer's status and body.
pub(crate) fn ask(
    stream: &mut UnixStream,
    method: &str,
    path: &str,
    body: Option<&str>,
) -> (u16, String) {
    let length = body.map_or(String::new(), |body| {
        format!("Content-Length: {}\r\n", body.len())
    });
    let body = body.unwrap_or_default();
    let request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n{body}");
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = Vec::new();
    let mut bytes = [0; 4096];
    loop {
        let count = stream.read(&mut bytes).expect("an answer");
        answer.extend_from_slice(&bytes[..count]);
        let text = String::from_utf8_lossy(&answer).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            assert!(count > 0, "the connection ended: {text}");
            continue;
        };
        let mut lines = head.lines();
        let length = lines
            .clone()
            .find_map(|line| line.strip_prefix("Content-Length: "));
        let length: usize = length.map_or(0, |length| length.parse().expect("a number"));
        if body.len() >= length {
            let status = lines.next().and_then(|line| line.split(' ').nth(1));
            let status = status.and_then(|status| status.parse().ok());
            return (status.expect("a status"), body.to_owned());
        }
        assert!(count > 0, "the connection ended: {text}");
    }
}

/// `kernel` prints `up` and stays, with what starts it.
pub(crate) fn a_guest_is_driven_by_requests(kernel: &[u8], options: &[&str]) {
    let mut api = Api::start(options);
    api.write("kernel", kernel);
    api.write("disk", &[0; 1 << 20]);
    api.put(
        "/logger",
        r#"{"log_path": "log", "level": "Info", "show_level": true}"#,
    );
    api.put(
        "/metrics",
        r#"{"metrics_path": "metrics", "emit_id": true}"#,
    );
    api.put(
        "/machine-config",
        r#"{"vcpu_count": 2, "mem_size_mib": 64}"#,
    );
    api.put(
        "/boot-source",
        r#"{"kernel_image_path": "kernel", "boot_args": "console=ttyS0"}"#,
    );
    api.put(
        "/drives/rootfs",
        r#"{"drive_id": "rootfs", "path_on_host": "disk", "is_root_device": true}"#,
    );
    api.write("empty", b"");
    api.write("other", &[0; 1 << 20]);
    api.put(
        "/drives/late",
        r#"{"drive_id": "late", "path_on_host": "empty", "is_root_device": false}"#,
    );
    api.put("/vsock", r#"{"guest_cid": 3, "uds_path": "v.sock"}"#);
    api.put(
        "/balloon",
        r#"{"amount_mib": 1, "deflate_on_oom": true, "stats_polling_interval_s": 1}"#,
    );
    api.put("/entropy", "{}");
    assert_eq!(api.get("/")["state"], "Not started");
    api.put("/actions", r#"{"action_type": "InstanceStart"}"#);
    api.expect("up\n");
    assert_eq!(api.get("/")["state"], "Running");
    // A thread names itself.
    let deadline = Deadline::after(LONG);
    for name in ["fc_api", "fc_vcpu 0", "fc_vcpu 1"] {
        while !api.threads().iter().any(|thread| thread == name) {
            assert!(!deadline.left().is_zero(), "{name}: {:?}", api.threads());
            sleep(Duration::from_millis(5));
        }
    }
    let again = api.ask(
        "PUT",
        "/actions",
        Some(r#"{"action_type": "InstanceStart"}"#),
    );
    assert!(
        again.1.contains("not supported after starting the microVM"),
        "{again:?}"
    );
    let patch = |state: &str| api.ask("PATCH", "/vm", Some(&format!(r#"{{"state": "{state}"}}"#)));
    for state in ["Resumed", "Paused", "Paused"] {
        assert_eq!(patch(state).0, 204, "{state}");
    }
    assert_eq!(api.get("/")["state"], "Paused");
    assert_eq!(patch("Resumed").0, 204);
    assert_eq!(api.get("/")["state"], "Running");
    for (body, status) in [
        (r#"{"drive_id": "late", "path_on_host": "other"}"#, 204),
        (r#"{"drive_id": "late", "path_on_host": "none"}"#, 400),
        (r#"{"drive_id": "late", "path_on_host": "disk"}"#, 400),
        (
            r#"{"drive_id": "late", "rate_limiter": {"ops": {"size": 9, "refill_time": 9}}}"#,
            204,
        ),
    ] {
        let answer = api.ask("PATCH", "/drives/late", Some(body));
        assert_eq!(answer.0, status, "{body}: {answer:?}");
    }
    let drive = &api.get("/vm/config")["drives"][1];
    assert_eq!(drive["path_on_host"], "other", "{drive}");
    let statistics = api.get("/balloon/statistics");
    assert_eq!(statistics["target_mib"], 1, "{statistics}");
    let patch = api.ask("PATCH", "/balloon", Some(r#"{"amount_mib": 2}"#));
    assert!(patch.1.contains("Device not activated yet"), "{patch:?}");
    api.put("/actions", r#"{"action_type": "FlushMetrics"}"#);
    let metrics = text(&api.path("metrics"));
    let mut lines = metrics
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let first = lines.next().expect("a line at the start");
    assert_eq!(first["id"], "anonymous-instance");
    assert_eq!(first["put_api_requests"]["drive_count"], 2, "{first}");
    let second = lines.next().expect("one that was asked for");
    assert_eq!(second["block_rootfs"]["read_count"], 0, "{second}");
    assert!(first["vcpu"].is_object(), "{first}");
    // SAFETY of names: the child is ours, and runs.
    let pid = rustix::process::Pid::from_child(&api.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it runs");
    assert_eq!(api.end().signal(), Some(15), "{}", api.said());
    assert!(api.path("s").exists(), "the socket stays");
    let log = text(&api.path("log"));
    assert!(
        log.contains("[anonymous-instance:") && log.contains(":INFO] "),
        "{log}"
    );
}

/// A start that fails, and one that does not; `end` prints `end` and powers off or resets.
pub(crate) fn a_start_that_fails_can_be_mended(end: &[u8], options: &[&str]) {
    let mut api = Api::start(options);
    api.write("none", b"none");
    api.write("kernel", end);
    let start = r#"{"action_type": "InstanceStart"}"#;
    let none = api.ask("PUT", "/actions", Some(start));
    assert!(none.1.contains("without kernel configuration"), "{none:?}");
    api.put("/boot-source", r#"{"kernel_image_path": "none"}"#);
    let wrong = api.ask("PUT", "/actions", Some(start));
    assert_eq!(wrong.0, 400);
    assert!(wrong.1.contains("Start microvm error"), "{wrong:?}");
    api.put("/boot-source", r#"{"kernel_image_path": "kernel"}"#);
    api.put("/vsock", r#"{"guest_cid": 2, "uds_path": "v.sock"}"#);
    let wrong = api.ask("PUT", "/actions", Some(start));
    assert!(wrong.1.contains("cid=2"), "{wrong:?}");
    api.put("/vsock", r#"{"guest_cid": 3, "uds_path": "v.sock"}"#);
    api.put("/serial", r#"{"serial_out_path": "serial"}"#);
    assert_eq!(api.get("/")["state"], "Not started");
    api.put("/pmem/p", r#"{"id": "p", "path_on_host": "late"}"#);
    let wrong = api.ask("PUT", "/actions", Some(start));
    assert!(wrong.1.contains("late"), "{wrong:?}");
    api.write("late", &[0; 2 << 20]);
    // A machine that did not start keeps nothing.
    api.put("/vsock", r#"{"guest_cid": 3, "uds_path": "v.sock"}"#);
    api.put("/actions", start);
    assert_eq!(api.end().code(), Some(0), "{}", api.said());
    let printed = api.printed();
    assert!(
        text(&api.path("serial")).contains(
            "end
"
        ),
        "{printed}"
    );
    assert!(
        !printed.contains(
            "end
"
        ),
        "{printed}"
    );
    // Clients remove it themselves.
    assert!(api.path("v.sock").exists());
}

/// Guests that a file describes; `end` as in [`a_start_that_fails_can_be_mended`].
pub(crate) fn a_file_describes_a_guest(end: &[u8], options: &[&str]) {
    let folder = tempfile::tempdir().expect("a folder");
    let kernel = folder.path().join("kernel");
    fs::write(&kernel, end).expect("written");
    let config = folder.path().join("c.json");
    let text = format!(
        r#"{{"boot-source": {{"kernel_image_path": {kernel:?}}}, "drives": [],
            "machine-config": {{"vcpu_count": 1, "mem_size_mib": 64}}}}"#
    );
    fs::write(&config, text).expect("written");
    let config = config.to_str().expect("UTF-8");
    let first = [
        "--no-api",
        "--config-file",
        config,
        "--boot-timer",
        "--enable-pci",
    ];
    let here = || tempfile::tempdir().expect("a folder");
    let mut api = Api::start_in(here(), &first, options);
    assert_eq!(api.end().code(), Some(0), "{}", api.said());
    // Clients look for these words on standard output.
    let printed = api.printed();
    for words in [
        "Running Firecracker v1.",
        "end\n",
        "Vmm is stopping.",
        "Firecracker exiting successfully. exit_code=0",
    ] {
        assert!(printed.contains(words), "no {words:?}: {printed}");
    }
    assert_eq!(api.said(), "");
    // What is wrong has a status, and a line.
    for (first, status, why) in [
        (&["--no-api"][..], 153, "--config-file"),
        (&["--id", "a b"], 153, "--id"),
        (&["--level", "loud"], 153, "--level"),
        (&["--frobnicate"], 153, "--frobnicate"),
        (&["--config-file", "/none"], 153, "/none"),
        (&["--api-sock", "/no/such/folder/s"], 1, "/no/such/folder/s"),
        (&["--api-sock", "/"], 1, "something is at /"),
    ] {
        let mut api = Api::start_in(here(), first, &[]);
        assert_eq!(api.end().code(), Some(status), "{first:?}");
        let said = api.said();
        assert!(said.contains(why) && said.lines().count() == 1, "{said}");
    }
}

/// The status of `armlet api` with these options, and what it says.
fn tells(options: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_armlet"));
    let output = command.arg("api").args(options).output().expect("armlet");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    (output.status.code().unwrap_or(-1), said)
}

/// `kernel` prints `first` and then `ticks` for ever: it is saved, and goes on in other processes.
pub(crate) fn a_guest_is_saved_and_loaded(kernel: &[u8], first: &str, ticks: &str) {
    let mut api = Api::start(&[]);
    api.write("kernel", kernel);
    api.write("disk", &[0; 1 << 20]);
    api.put(
        "/machine-config",
        r#"{"vcpu_count": 2, "mem_size_mib": 64, "track_dirty_pages": true}"#,
    );
    api.put("/boot-source", r#"{"kernel_image_path": "kernel"}"#);
    api.put(
        "/drives/rootfs",
        r#"{"drive_id": "rootfs", "path_on_host": "disk", "is_root_device": true}"#,
    );
    api.put("/vsock", r#"{"guest_cid": 3, "uds_path": "v.sock"}"#);
    api.put("/actions", r#"{"action_type": "InstanceStart"}"#);
    api.expect(first);
    let create = |kind: &str, name: &str| {
        let body = format!(
            r#"{{"snapshot_type": "{kind}", "snapshot_path": "{name}", "mem_file_path": "{name}.memory"}}"#
        );
        api.ask("PUT", "/snapshot/create", Some(&body))
    };
    let running = create("Full", "snap");
    assert_eq!(running.0, 400);
    assert!(
        running.1.contains("unavailable while running"),
        "{running:?}"
    );
    let paused = api.ask("PATCH", "/vm", Some(r#"{"state": "Paused"}"#));
    assert_eq!(paused.0, 204);
    for (kind, name) in [("Full", "snap"), ("Diff", "changes")] {
        assert_eq!(create(kind, name), (204, String::new()), "{}", api.said());
    }
    assert_eq!(create("Full", "no/folder").0, 400);
    let version = tells(&["--snapshot-version"]);
    assert_eq!(version, (0, "v1.0.0\n".to_owned()));
    for name in ["snap", "changes"] {
        let path = api.path(name).display().to_string();
        assert_eq!(tells(&["--describe-snapshot", &path]), version, "{name}");
    }
    let path = api.path("kernel").display().to_string();
    let (status, said) = tells(&["--describe-snapshot", &path]);
    assert_eq!((status, said.lines().count()), (1, 1), "{said}");
    assert!(said.contains("not the state of a snapshot"), "{said}");
    assert_eq!(api.get("/")["state"], "Paused");
    let pid = rustix::process::Pid::from_child(&api.child);
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it runs");
    api.end();
    for overridden in [false, true] {
        let mut again = Api::start(&[]);
        let from = |name: &str| api.path(name).display().to_string();
        let load = |more: &str| {
            format!(
                r#"{{"snapshot_path": "{}", "mem_backend": {{"backend_type": "File", "backend_path": "{}"}}{more}}}"#,
                from("snap"),
                from("snap.memory"),
            )
        };
        again.write("disk", &[0; 1 << 20]);
        match overridden {
            // The path is relative, and the folder another one.
            false => again.put("/snapshot/load", &load("")),
            true => again.put(
                "/snapshot/load",
                &load(r#", "vsock_override": {"uds_path": "w.sock"}, "resume_vm": true"#),
            ),
        }
        if !overridden {
            assert_eq!(again.get("/")["state"], "Paused");
            assert!(!again.printed().contains(ticks), "{}", again.printed());
            let resumed = again.ask("PATCH", "/vm", Some(r#"{"state": "Resumed"}"#));
            assert_eq!(resumed.0, 204);
        }
        assert_eq!(again.get("/")["state"], "Running");
        again.expect(ticks);
        assert!(!again.printed().contains(first), "{}", again.printed());
        let socket = if overridden { "w.sock" } else { "v.sock" };
        assert!(again.path(socket).exists());
        let config = again.get("/vm/config");
        assert_eq!(config["machine-config"]["vcpu_count"], 2, "{config}");
        assert_eq!(config["drives"][0]["path_on_host"], "disk", "{config}");
        let pid = rustix::process::Pid::from_child(&again.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it runs");
        assert_eq!(again.end().signal(), Some(15), "{}", again.said());
    }
    // `armlet run` goes on from it, too, where both files have the names that it knows.
    let folder = tempfile::tempdir().expect("a folder");
    for (name, known) in [("snap", "state"), ("snap.memory", "memory")] {
        std::fs::copy(api.path(name), folder.path().join(known)).expect("a copy");
    }
    let socket = folder.path().join("v.sock").display().to_string();
    let run = Armlet::new()
        .option("--disk", api.path("disk"))
        .option("--vsock", format!("cid=3,uds={socket}"));
    let mut run = run.restore(folder.path());
    run.expect(ticks);
    assert!(!run.said().contains(first), "{}", run.said());
    run.signal(rustix::process::Signal::KILL);
    run.end().assert_signal(rustix::process::Signal::KILL);
    // What cannot be loaded is told, and ends it.
    let mut none = Api::start(&[]);
    let body = r#"{"snapshot_path": "none", "mem_file_path": "none"}"#;
    let (status, why) = none.ask("PUT", "/snapshot/load", Some(body));
    assert_eq!(status, 400, "{why}");
    assert!(why.contains("Load snapshot error"), "{why}");
    assert_eq!(none.end().code(), Some(1));
}
