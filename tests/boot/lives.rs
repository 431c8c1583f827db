use crate::guest::{Armlet, GLANCE, Guest, Input, MARKER};
use armlet_system::deadline::Deadline;
use rustix::pipe::PipeFlags;
use rustix::process::Signal;
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// What armlet says when it was asked to end.
pub(crate) const PRESSED: &str =
    "armlet: pressed the guest's power key; a second signal stops it at once\n";

/// Descriptors and threads of armlet's process.
fn holdings(guest: &Guest) -> (usize, usize) {
    let count = |what: &str| {
        let folder = format!("/proc/{}/{what}", guest.pid());
        fs::read_dir(folder).expect("a running process").count()
    };
    (count("fd"), count("task"))
}

/// A guest with a shell, which reboots three times and powers off.
pub(crate) fn reboots_three_times(armlet: Armlet) {
    let mut guest = armlet.input(Input::Pipe).start();
    let mut held = Vec::new();
    for _ in 0..3 {
        guest.expect(MARKER);
        guest.expect("guest# ");
        held.push(holdings(&guest));
        guest.send(b"reboot -f\n");
    }
    guest.expect(MARKER);
    guest.expect("guest# ");
    held.push(holdings(&guest));
    guest.send(b"poweroff -f\n");
    let outcome = guest.end();
    outcome.assert_status(0);
    assert_eq!(outcome.text().matches(MARKER).count(), 4);
    assert_eq!(outcome.errors, "");
    held.dedup();
    assert_eq!(
        held.len(),
        1,
        "descriptors and threads of each life: {held:?}"
    );
}

/// A guest that prints "again" and resets itself, for ever.
pub(crate) fn resets_without_a_leak(armlet: Armlet) {
    let mut guest = armlet.start();
    let after_30_lives = |guest: &mut Guest| {
        for _ in 0..30 {
            guest.expect("again\n");
        }
        holdings(guest)
    };
    let first = after_30_lives(&mut guest);
    let second = after_30_lives(&mut guest);
    println!("{first:?}, then {second:?}");
    // What a life holds comes and goes: a leak of one a life would be 30 more.
    assert!(
        second.0 < first.0 + 15 && second.1 < first.1 + 15,
        "descriptors and threads: {first:?} after 30 lives, {second:?} after 60"
    );
    guest.signal(Signal::INT);
    guest.end().assert_status(6);
}

/// A guest that prints "up" and hears nothing, nor the first `signal`.
pub(crate) fn is_stopped_by_a_second_signal(armlet: Armlet, signal: Signal) {
    let mut guest = armlet.start();
    guest.expect("up\n");
    guest.signal(signal);
    guest.expect_error("pressed the guest's power key");
    // Longer than the key is held.
    sleep(Duration::from_millis(300));
    assert!(guest.runs(), "one {signal:?} ended it");
    guest.signal(Signal::TERM);
    let outcome = guest.end();
    outcome.assert_status(6);
    assert!(
        outcome.errors.ends_with("armlet: stopped by a signal\n"),
        "{}",
        outcome.errors
    );
}

/// A guest that prints "up" and hears nothing, nor the first signal, which is all that there is.
pub(crate) fn is_given_up(armlet: Armlet) {
    let mut guest = armlet.option("--stop-timeout", "1").start();
    guest.expect("up\n");
    guest.signal(Signal::TERM);
    let outcome = guest.end();
    outcome.assert_status(6);
    let end = "armlet: stopped: the guest did not power off within 1 s (--stop-timeout)\n";
    assert!(outcome.errors.ends_with(end), "{}", outcome.errors);
}

/// A guest that prints "up" and hears nothing, on a terminal.
pub(crate) fn is_left_by_ctrl_a_x(armlet: Armlet) {
    let mut guest = armlet.input(Input::Terminal).start();
    let before = guest.modes();
    guest.expect("up\n");
    let during = guest.modes();
    assert_ne!(before, during, "the terminal was not raw");
    guest.send(b"\x01h");
    guest.expect_error("Ctrl-A x: stop the guest and leave;");
    guest.send(b"\x01");
    sleep(Duration::from_millis(100));
    assert!(guest.runs(), "Ctrl-A alone ended it");
    guest.send(b"x");
    let outcome = guest.end();
    outcome.assert_status(6);
    assert_eq!(outcome.modes, Some(before));
}

/// A guest whose kernel panics as soon as it may, with the position that begins like this.
pub(crate) fn panics(guest: impl Fn() -> Armlet, status: i32, position: &str) {
    let start = format!("armlet: the guest's kernel panicked on vCPU 0 at {position}");
    // Where a host with much to do keeps the vCPU from its console for long, the event loop prints
    // what is there, and knows no position.
    for _ in 0..3 {
        let outcome = guest().cmdline("panic=-1").run();
        outcome.assert_status(status);
        println!("{}", outcome.errors);
        let (text, errors) = (outcome.text(), &outcome.errors);
        let reason = "sysrq triggered crash";
        let console = format!("Kernel panic - not syncing: {reason}");
        assert!(text.contains(&console), "{text}");
        assert!(errors.contains(reason), "{errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
        if errors.starts_with(&start) {
            return;
        }
        let without = "armlet: the guest's kernel panicked: ";
        assert!(errors.starts_with(without), "{errors}");
    }
    panic!("no panic was reported with its position");
}

/// A guest of Linux that says when it listens to the power key, and powers off when it is pressed.
pub(crate) fn powers_off_by_sigterm(mut guest: Guest) {
    guest.expect("POWERKEY-READY");
    guest.signal(Signal::TERM);
    guest.expect("POWERKEY-PRESSED");
    let outcome = guest.end();
    outcome.assert_status(0);
    assert_eq!(outcome.errors, PRESSED);
}

/// Lines that look like those of a kernel that panics, with what would clear a terminal.
pub(crate) fn panics_20_times() -> String {
    "Kernel panic - not syncing: x\x1b[2J\n".repeat(20)
}

/// A guest that prints [`panics_20_times`] and powers off.
pub(crate) fn panics_once(armlet: Armlet) {
    let outcome = armlet.run();
    outcome.assert_status(0);
    let errors = &outcome.errors;
    assert_eq!(errors.lines().count(), 1, "{errors}");
    assert!(errors.ends_with("x\\x1b[2J\n"), "{errors}");
}

/// Enough for a burst of output, and the last words of a kernel in it.
pub(crate) fn burst_of_last_words() -> String {
    format!("{}\nKernel panic - not syncing: at last\n", "x".repeat(96))
}

/// A guest that prints [`burst_of_last_words`], which are collected, and asks for a reset at once.
pub(crate) fn panics_just_before_a_reset(armlet: Armlet) {
    let armlet = armlet.option("--on-reset", "exit");
    let outcome = armlet.option("--on-panic", "exit").run();
    let errors = &outcome.errors;
    assert!(errors.contains("kernel panicked"), "{errors}");
    outcome.assert_status(4);
}

/// A guest that prints [`panics_20_times`] and "up", and hears nothing.
pub(crate) fn heeds_signals_though_nobody_reads(armlet: Armlet) {
    // A full pipe: nothing more goes in before somebody reads.
    let (_reader, writer) = rustix::pipe::pipe_with(PipeFlags::NONBLOCK).expect("a pipe");
    while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
    let (here, number) = (std::process::id(), writer.as_raw_fd());
    let script = format!("exec \"$@\" 2>/proc/{here}/fd/{number}");
    let words = ["sh", "-c", &script, "sh"].map(OsStr::new);
    let mut guest = armlet.through(&words).start();
    guest.expect("up\n");
    // The power key, which it does not hear, and the end.
    guest.signal(Signal::TERM);
    guest.signal(Signal::HUP);
    guest.end().assert_status(6);
}

/// A guest that prints "up" and hears nothing: armlet is stopped, and goes on.
pub(crate) fn is_raw_again_after_a_stop(armlet: Armlet) {
    let mut guest = armlet.input(Input::Terminal).start();
    let before = guest.all_modes();
    guest.expect("up\n");
    let raw = guest.modes();
    guest.signal(Signal::STOP);
    guest.set_modes(&before);
    assert_ne!(guest.modes(), raw);
    guest.signal(Signal::CONT);
    let deadline = Instant::now() + Duration::from_secs(60);
    while guest.modes() != raw {
        assert!(Instant::now() < deadline, "it stays as the shell had it");
        sleep(GLANCE);
    }
    guest.send(b"\x01x");
    let outcome = guest.end();
    outcome.assert_status(6);
    assert_eq!(outcome.modes, Some(format!("{before:?}")));
}

/// Any guest, whose passt says nothing for ever.
pub(crate) fn heeds_signals_at_the_start(armlet: Armlet) {
    let passt = armlet.file(
        "passt",
        b"#!/bin/sh\necho here >\"$0.runs\"\nexec sleep 60\n",
    );
    fs::set_permissions(&passt, Permissions::from_mode(0o755)).expect("a file of ours");
    let folder = passt.parent().expect("a folder").display();
    let path = format!(
        "PATH={folder}:{}",
        std::env::var("PATH").unwrap_or_default()
    );
    let words = ["env", &path].map(OsStr::new);
    let guest = armlet.option("--net", "user").through(&words).start();
    let runs = guest.path("passt.runs");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !runs.exists() {
        assert!(Instant::now() < deadline, "passt was not started");
        sleep(GLANCE);
    }
    guest.signal(Signal::TERM);
    let outcome = guest.end();
    outcome.assert_status(6);
    assert_eq!(outcome.errors, "armlet: stopped by a signal\n");
}

/// A guest that prints "up" and hears nothing: nothing of armlet has rights, may make any call, or
/// holds what it inherited.
pub(crate) fn is_confined(armlet: Armlet) {
    let words = ["sh", "-c", "exec \"$@\" 7</etc/passwd 9</dev/zero", "sh"].map(OsStr::new);
    let mut guest = armlet.through(&words).start();
    guest.expect("up\n");
    let pid = guest.pid();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a running process");
    for task in tasks {
        let path = task.expect("a thread").path();
        let status = fs::read_to_string(path.join("status")).expect("its status");
        let value = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.expect("a line").trim().to_owned()
        };
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(value(set), "0000000000000000", "{set} {status}");
        }
        // Only root may change what programs could get, and nobody executes one.
        if value("Uid:").starts_with("0\t") {
            assert_eq!(value("CapBnd:"), "0000000000000000", "{status}");
        }
        assert_eq!(value("NoNewPrivs:"), "1", "{status}");
        assert_eq!(value("Seccomp:"), "2", "{status}");
    }
    for number in [7, 9] {
        let link = fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap_or_default();
        for inherited in ["/etc/passwd", "/dev/zero"] {
            assert_ne!(link.to_string_lossy(), inherited, "descriptor {number}");
        }
    }
    guest.signal(Signal::INT);
    guest.end().assert_status(6);
}

/// `guest` says `up`; its exits to armlet are mostly for `reason`. It writes once to a register of its
/// device for entropy that is not writable.
pub(crate) fn has_metrics(guest: impl Fn() -> Armlet, reason: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let (socket, file) = (folder.path().join("s"), folder.path().join("m"));
    let mut started = guest()
        .option("--metrics", format!("unix:{}", socket.display()))
        .start();
    started.expect("up");
    for request in [&b"GET /metrics HTTP/1.1\r\n\r\n"[..], b""] {
        let mut stream = UnixStream::connect(&socket).expect("it listens");
        stream.write_all(request).expect("sent");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("text");
        let exits = format!("armlet_exits_total{{reason=\"{reason}\"}} ");
        let exits = text.lines().find_map(|line| line.strip_prefix(&exits));
        let exits: u64 = exits.and_then(|count| count.parse().ok()).expect("a count");
        assert!(exits > 0 && text.ends_with("# EOF\n"), "{text}");
        let fault = "armlet_device_faults_total{device=\"rng\"} 1\n";
        assert!(text.contains(fault), "{text}");
        let resident = text
            .lines()
            .find_map(|line| line.strip_prefix("armlet_resident_bytes "));
        let resident: u64 = resident
            .and_then(|bytes| bytes.parse().ok())
            .expect("bytes");
        assert!(resident > 100_000, "{text}");
    }
    started.signal(Signal::KILL);
    drop(started);
    let mut started = guest().option("--metrics", &file).start();
    started.expect("up");
    let deadline = Deadline::after(Duration::from_secs(60));
    while !fs::read_to_string(&file).is_ok_and(|text| text.ends_with("# EOF\n")) {
        assert!(!deadline.left().is_zero(), "no metrics in the file");
        std::thread::sleep(Duration::from_millis(10));
    }
    started.signal(Signal::KILL);
}
