//! What container engines and SDKs send to Firecracker, word by word and in their order, as the sources
//! of their drivers have it: Kata Containers' two drivers (`virtcontainers/fc.go`, and runtime-rs's
//! `hypervisor/src/firecracker`), and firecracker-go-sdk. `kernel` prints `up` and stays.

use crate::api::ask;
use armlet_system::deadline::Deadline;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;
use std::fs::{self, File, Permissions};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;
use tempfile::TempDir;

/// How long what must come may take.
const LONG: Duration = Duration::from_secs(60);
/// How many drives Kata has in reserve.
const RESERVE: usize = 8;

/// The program under the names that engines start.
struct Engine {
    folder: TempDir,
}

impl Engine {
    fn new() -> Engine {
        let folder = tempfile::tempdir().expect("a folder");
        let mode = Permissions::from_mode(0o755);
        fs::set_permissions(folder.path(), mode).expect("its mode");
        for name in ["firecracker", "jailer"] {
            let armlet = env!("CARGO_BIN_EXE_armlet");
            fs::copy(armlet, folder.path().join(name)).expect("a copy");
        }
        Engine { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Returns the folder that will be the jail's root, with the libraries of a program that is not
    /// static.
    fn jail(&self, id: &str) -> PathBuf {
        let root = self.path("run").join("firecracker").join(id).join("root");
        fs::create_dir_all(&root).expect("a folder");
        // It fails for a static program.
        let said = Command::new("ldd").arg(self.path("firecracker")).output();
        let said = said.map_or_else(|_| Vec::new(), |output| output.stdout);
        let said = String::from_utf8_lossy(&said);
        for path in said.split_whitespace().filter(|word| word.starts_with('/')) {
            let copy = root.join(&path[1..]);
            fs::create_dir_all(copy.parent().expect("a folder")).expect("a folder");
            fs::copy(path, copy).expect("a copy");
        }
        root
    }

    /// Starts `jailer` with `options`, then `--`, then `arguments`.
    fn jailer(&self, options: &[&str], arguments: &[&str], errors: Stdio) -> Child {
        Command::new(self.path("jailer"))
            .args(options)
            .arg("--exec-file")
            .arg(self.path("firecracker"))
            .args(["--uid", "0", "--gid", "0", "--chroot-base-dir"])
            .arg(self.path("run"))
            .arg("--")
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(File::create(self.path("stdout")).expect("a file"))
            .stderr(errors)
            .spawn()
            .expect("jailer")
    }
}

/// What runs in the background is not to outlive its test.
impl Drop for Engine {
    fn drop(&mut self) {
        let jails = fs::read_dir(self.path("run/firecracker"))
            .into_iter()
            .flatten();
        for jail in jails.flatten() {
            let file = jail.path().join("root/firecracker.pid");
            let number = fs::read_to_string(file)
                .ok()
                .and_then(|text| text.trim().parse().ok());
            if let Some(pid) = number.and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// Waits until `done` has something.
fn wait<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Deadline::after(LONG);
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(!deadline.left().is_zero(), "{what}: not within {LONG:?}");
        sleep(Duration::from_millis(10));
    }
}

/// Sends a request on a connection of its own, as these clients do; `None` when nobody listens.
fn request(socket: &Path, method: &str, path: &str, body: Option<&str>) -> Option<(u16, String)> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(LONG)).expect("a limit");
    Some(ask(&mut stream, method, path, body))
}

fn put(socket: &Path, path: &str, body: &str) {
    let answer = request(socket, "PUT", path, Some(body));
    assert_eq!(answer, Some((204, String::new())), "{path} {body}");
}

fn state(socket: &Path) -> Option<String> {
    let (status, body) = request(socket, "GET", "/", None)?;
    assert_eq!(status, 200, "{body}");
    let value: Value = serde_json::from_str(&body).expect("JSON");
    Some(value["state"].as_str().expect("a state").to_owned())
}

/// A FIFO, open for reading, as drivers have them before they start anything.
fn fifo(path: &Path) -> File {
    rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).expect("a FIFO");
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .expect("a reader")
        .into()
}

/// Waits until `what` came through a FIFO; returns what came.
fn expect_from(fifo: &mut File, what: &str) -> String {
    let mut text = String::new();
    wait(what, || {
        let mut bytes = [0; 4096];
        if let Ok(count) = fifo.read(&mut bytes) {
            text.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
        text.contains(what).then(|| text.clone())
    })
}

fn process(text: &str) -> Pid {
    let number = text.trim().parse().expect("a number");
    Pid::from_raw(number).expect("a process")
}

/// Whether the process is there, and no zombie of a parent that does not wait for it.
fn lives(pid: Pid) -> bool {
    let path = format!("/proc/{}/stat", pid.as_raw_nonzero());
    let stat = fs::read_to_string(path).unwrap_or_default();
    let is_zombie = stat
        .rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('Z'));
    test_kill_process(pid).is_ok() && !is_zombie
}

/// What Kata parses of `--version`: the second word of the first line, a version from 0.21.1 on.
fn is_new_enough(program: &Path) {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let word = said.lines().next().and_then(|line| line.split(' ').nth(1));
    let parts = word.and_then(|word| word.strip_prefix('v')).map(|version| {
        let parts = version
            .split('.')
            .map(|part| part.parse::<u32>().expect("a number"));
        parts.collect::<Vec<_>>()
    });
    assert!(
        parts.is_some_and(|parts| parts.len() == 3 && parts >= vec![0, 21, 1]),
        "{said}"
    );
}

/// Kata's driver in Go: a jail in the background, a configuration file with empty drives in reserve,
/// `GET /` until the guest runs, the file with the process ID, the vsock's mode, an image for a drive,
/// SIGTERM.
pub(crate) fn kata_in_go(kernel: &[u8]) {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: jails are made by root only");
        return;
    }
    let engine = Engine::new();
    is_new_enough(&engine.path("firecracker"));
    let root = engine.jail("sandbox1");
    fs::write(root.join("vmlinux"), kernel).expect("written");
    fs::write(root.join("rootfs"), [0; 4096]).expect("written");
    let mut drives = vec![
        r#"{"drive_id": "rootfs", "is_read_only": true, "is_root_device": false, "path_on_host": "rootfs"}"#
            .to_owned(),
    ];
    for index in 0..RESERVE {
        let name = format!("drive_{index}");
        fs::write(root.join(&name), "").expect("written");
        drives.push(format!(
            r#"{{"drive_id": "{name}", "is_read_only": false, "is_root_device": false, "path_on_host": "{name}"}}"#
        ));
    }
    let mut log = fifo(&root.join("logs.fifo"));
    let mut metrics = fifo(&root.join("metrics.fifo"));
    let config = format!(
        r#"{{"boot-source": {{"kernel_image_path": "vmlinux", "boot_args": "pci=off reboot=k panic=1 iommu=off net.ifnames=0 random.trust_cpu=on console=ttyS0"}},
            "drives": [{}],
            "machine-config": {{"vcpu_count": 1, "mem_size_mib": 64, "smt": false, "track_dirty_pages": false}},
            "vsock": {{"guest_cid": 3, "uds_path": "kata.hvsock", "vsock_id": "root"}},
            "logger": {{"log_path": "logs.fifo", "level": "Error"}},
            "metrics": {{"metrics_path": "metrics.fifo"}}}}"#,
        drives.join(", ")
    );
    fs::write(root.join("fcConfig.json"), config).expect("written");
    let errors = File::create(engine.path("stderr")).expect("a file");
    let options = ["--id", "sandbox1", "--daemonize"];
    let mut jailer = engine.jailer(
        &options,
        &["--config-file", "/fcConfig.json"],
        errors.into(),
    );
    let socket = root.join("run/firecracker.socket");
    wait("the guest runs", || {
        (state(&socket)? == "Running").then_some(())
    });
    assert!(jailer.wait().expect("it ended").success());
    let pid = fs::read_to_string(root.join("firecracker.pid")).expect("a process ID");
    let pid = process(&pid);
    // A thread gives itself its name.
    wait("a vCPU's thread has the name that is looked for", || {
        let tasks = fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())).ok()?;
        let names = tasks
            .flatten()
            .map(|task| fs::read_to_string(task.path().join("comm")));
        let mut names = names.flatten();
        names
            .any(|name| name.starts_with("fc_vcpu 0"))
            .then_some(())
    });
    let vsock = root.join("kata.hvsock");
    fs::set_permissions(&vsock, Permissions::from_mode(0o640)).expect("its mode");
    let about = fs::metadata(&vsock).expect("a socket");
    assert!(about.file_type().is_socket() && about.mode() & 0o777 == 0o640);
    let line = expect_from(&mut metrics, "\n");
    let line = line.lines().next().expect("a line");
    let line: Value = serde_json::from_str(line).expect("JSON");
    assert!(line["utc_timestamp_ms"].is_u64(), "{line}");
    give_images(&socket, &root, pid);
    kill_process(pid, Signal::TERM).expect("it runs");
    wait("the end by SIGTERM", || (!lives(pid)).then_some(()));
    let mut said = String::new();
    let _ = log.read_to_string(&mut said);
    assert!(
        !said.contains("panic") && !said.contains("a fault of"),
        "{said}"
    );
}

/// An image for a drive in reserve, as it is for each volume of a container.
fn give_images(socket: &Path, root: &Path, pid: Pid) {
    fs::write(root.join("volume"), [1; 8192]).expect("written");
    let body = r#"{"drive_id": "drive_1", "path_on_host": "volume"}"#;
    let answer = request(socket, "PATCH", "/drives/drive_1", Some(body));
    assert_eq!(answer, Some((204, String::new())));
    has_open(pid, "volume");
    let body = r#"{"drive_id": "drive_1", "path_on_host": "none"}"#;
    let answer = request(socket, "PATCH", "/drives/drive_1", Some(body)).expect("an answer");
    assert!(answer.0 == 400 && answer.1.contains("none"), "{answer:?}");
}

/// Checks that the process has a file open, by its name.
fn has_open(pid: Pid, name: &str) {
    let folder = format!("/proc/{}/fd", pid.as_raw_nonzero());
    let files = fs::read_dir(folder).expect("descriptors").flatten();
    let paths: Vec<PathBuf> = files
        .filter_map(|file| fs::read_link(file.path()).ok())
        .collect();
    assert!(paths.iter().any(|path| path.ends_with(name)), "{paths:?}");
}

/// Kata's driver in Rust: a jail in the foreground, each request again until it is answered, drives of
/// no bytes, the vsock twice, the end seen by that of standard error.
pub(crate) fn kata_in_rust(kernel: &[u8]) {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: jails are made by root only");
        return;
    }
    let engine = Engine::new();
    let root = engine.jail("sandbox2");
    fs::write(root.join("vmlinux"), kernel).expect("written");
    fs::write(root.join("rootfs"), [0; 4096]).expect("written");
    let options = ["--id", "sandbox2"];
    let arguments = ["--api-sock", "/run//fc.sock", "--no-seccomp"];
    let mut jailer = engine.jailer(&options, &arguments, Stdio::piped());
    let socket = root.join("run/fc.sock");
    let send = |method: &str, path: &str, body: &str| {
        let what = format!("{method} {path}");
        let answer = wait(&what, || request(&socket, method, path, Some(body)));
        assert_eq!(answer, (204, String::new()), "{what} {body}");
    };
    send(
        "PUT",
        "/boot-source",
        r#"{"kernel_image_path": "vmlinux", "boot_args": "reboot=k panic=1 systemd.unit=kata-containers.target console=ttyS0"}"#,
    );
    send(
        "PUT",
        "/machine-config",
        r#"{"mem_size_mib": 64, "vcpu_count": 1}"#,
    );
    send(
        "PUT",
        "/drives/rootfs",
        r#"{"drive_id": "rootfs", "path_on_host": "rootfs", "is_root_device": false, "is_read_only": true}"#,
    );
    for index in 1..6 {
        let name = format!("drive{index}");
        fs::write(root.join(&name), "").expect("written");
        send(
            "PUT",
            &format!("/drives/{name}"),
            &format!(
                r#"{{"drive_id": "{name}", "path_on_host": "{name}", "is_root_device": false, "is_read_only": false}}"#
            ),
        );
    }
    let vsock = r#"{"vsock_id": "root", "guest_cid": 3, "uds_path": "kata.hvsock"}"#;
    for _ in 0..2 {
        send("PUT", "/vsock", vsock);
    }
    send("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    assert_eq!(state(&socket).as_deref(), Some("Running"));
    assert!(root.join("kata.hvsock").exists());
    fs::write(root.join("volume"), [1; 8192]).expect("written");
    send(
        "PATCH",
        "/drives/drive1",
        r#"{"drive_id": "drive1", "path_on_host": "volume", "rate_limiter": {"bandwidth": {"size": 1000000, "one_time_burst": 0, "refill_time": 1000}}}"#,
    );
    has_open(Pid::from_child(&jailer), "volume");
    jailer.kill().expect("it runs");
    let mut said = String::new();
    let mut errors = jailer.stderr.take().expect("a pipe");
    errors.read_to_string(&mut said).expect("its end");
    assert_eq!(jailer.wait().expect("it ended").signal(), Some(9), "{said}");
}

/// firecracker-go-sdk: FIFOs made before, the machine asked for until it answers, handlers in their
/// order, SIGTERM and a wait without a limit.
pub(crate) fn go_sdk(kernel: &[u8]) {
    let engine = Engine::new();
    fs::write(engine.path("vmlinux"), kernel).expect("written");
    fs::write(engine.path("disk"), [0; 4096]).expect("written");
    let mut log = fifo(&engine.path("log.fifo"));
    let mut metrics = fifo(&engine.path("metrics.fifo"));
    let socket = engine.path("api.sock");
    let mut child = Command::new(engine.path("firecracker"))
        .args([
            "--api-sock",
            "api.sock",
            "--id",
            "b0b9b5a4-one",
            "--no-seccomp",
        ])
        .current_dir(engine.folder.path())
        .stdin(Stdio::null())
        .stdout(File::create(engine.path("stdout")).expect("a file"))
        .stderr(File::create(engine.path("stderr")).expect("a file"))
        .spawn()
        .expect("firecracker");
    let machine = wait("the socket answers", || {
        request(&socket, "GET", "/machine-config", None)
    });
    assert_eq!(machine.0, 200, "{machine:?}");
    put(
        &socket,
        "/logger",
        r#"{"level": "Debug", "log_path": "log.fifo", "show_level": true, "show_log_origin": false}"#,
    );
    put(&socket, "/metrics", r#"{"metrics_path": "metrics.fifo"}"#);
    put(
        &socket,
        "/machine-config",
        r#"{"mem_size_mib": 64, "smt": false, "track_dirty_pages": false, "vcpu_count": 1}"#,
    );
    let (_, machine) = request(&socket, "GET", "/machine-config", None).expect("an answer");
    let machine: Value = serde_json::from_str(&machine).expect("JSON");
    assert_eq!(machine["mem_size_mib"], 64, "{machine}");
    put(
        &socket,
        "/boot-source",
        r#"{"boot_args": "ro console=ttyS0 noapic reboot=k panic=1 pci=off nomodules", "initrd_path": null, "kernel_image_path": "vmlinux"}"#,
    );
    put(
        &socket,
        "/drives/1",
        r#"{"cache_type": "Unsafe", "drive_id": "1", "io_engine": "Sync", "is_read_only": false, "is_root_device": true, "path_on_host": "disk"}"#,
    );
    put(
        &socket,
        "/vsock",
        r#"{"guest_cid": 3, "uds_path": "v.sock", "vsock_id": "agent"}"#,
    );
    put(
        &socket,
        "/balloon",
        r#"{"amount_mib": 1, "deflate_on_oom": true, "stats_polling_interval_s": 1}"#,
    );
    put(&socket, "/actions", r#"{"action_type": "InstanceStart"}"#);
    wait("the guest's console", || {
        let printed = fs::read_to_string(engine.path("stdout")).expect("a file");
        printed.contains("up\n").then_some(())
    });
    assert_eq!(state(&socket).as_deref(), Some("Running"));
    assert!(expect_from(&mut metrics, "\n").contains("utc_timestamp_ms"));
    assert!(expect_from(&mut log, "\n").contains("[b0b9b5a4-one:"));
    kill_process(Pid::from_child(&child), Signal::TERM).expect("it runs");
    let ended = wait("the end by SIGTERM", || child.try_wait().expect("a child"));
    assert_eq!(ended.signal(), Some(15));
    assert!(socket.exists(), "the SDK removes the socket itself");
}
