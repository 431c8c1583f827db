//! Guests that `armlet ctl` controls.

use crate::commanded::{FIRST, TICKS};
use crate::guest::{Armlet, Guest};
use armlet_system::deadline::Deadline;
use rustix::process::Signal;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

/// How long what must come may take.
const LONG: Duration = Duration::from_secs(60);

/// Starts a guest that prints [`FIRST`] and then [`TICKS`] for ever. Returns the path of its control
/// socket, too.
pub(crate) fn controlled(mut armlet: Armlet, flags: &[&str]) -> (Guest, PathBuf) {
    let path = armlet.file("control", b"");
    fs::remove_file(&path).expect("a file of ours");
    for flag in flags {
        armlet = armlet.flag(flag);
    }
    let mut guest = armlet.option("--control", &path).start();
    guest.expect(FIRST);
    (guest, path)
}

/// What `armlet ctl` says, and its status.
pub(crate) fn ctl(path: &Path, words: &[&str]) -> (String, i32) {
    let output = Command::new(env!("CARGO_BIN_EXE_armlet"))
        .arg("ctl")
        .arg(path)
        .args(words)
        .output()
        .expect("armlet");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    (said, output.status.code().unwrap_or(-1))
}

pub(crate) fn done(path: &Path, words: &[&str]) -> String {
    let (said, status) = ctl(path, words);
    assert_eq!(status, 0, "{words:?}: {said}");
    said
}

fn is_gone(path: &Path) -> bool {
    let deadline = Deadline::after(LONG);
    while path.exists() && !deadline.left().is_zero() {
        sleep(Duration::from_millis(10));
    }
    !path.exists()
}

pub(crate) fn a_guest_is_paused_resumed_reset_and_stopped(armlet: Armlet) {
    let (mut guest, path) = controlled(armlet, &["--stats"]);
    let status = done(&path, &["status"]);
    for line in ["state: running", "restarts: 0", "vcpus: 1"] {
        assert!(status.lines().any(|said| said == line), "{line}: {status}");
    }
    assert_eq!(done(&path, &["pause"]), "");
    assert!(done(&path, &["status"]).contains("state: paused"));
    sleep(Duration::from_millis(300));
    let held = guest.said();
    sleep(Duration::from_millis(300));
    assert_eq!(guest.said(), held, "it does not stand still");
    done(&path, &["resume"]);
    guest.expect(TICKS);
    assert!(done(&path, &["stats"]).contains("vCPU 0 left KVM for armlet"));
    let json = done(&path, &["--json", "status"]);
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json["ok"]["pid"], guest.pid());
    // Paused or not.
    for times in 1..=2 {
        done(&path, &["reset"]);
        guest.expect(FIRST);
        let status = done(&path, &["status"]);
        assert!(status.contains(&format!("restarts: {times}\n")), "{status}");
        assert!(status.contains("state: running"), "{status}");
        done(&path, &["pause"]);
    }
    done(&path, &["stop"]);
    guest.end().assert_status(6);
    assert!(is_gone(&path));
    let (said, status) = ctl(&path, &["status"]);
    assert_eq!(status, 1);
    assert!(said.contains("nobody listens"), "{said}");
}

pub(crate) fn what_a_guest_has_not_is_refused_and_a_killed_armlet_leaves_no_socket(armlet: Armlet) {
    let (guest, path) = controlled(armlet, &[]);
    for (words, status, why) in [
        (&["balloon", "1M"][..], 1, "the guest has no balloon"),
        (&["disk", "resize", "disk0"], 1, "no disk called disk0"),
        (&["fly"], 2, "'fly' is no request"),
        (&["balloon", "much"], 2, "balloon much"),
    ] {
        let (said, code) = ctl(&path, words);
        assert_eq!(code, status, "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains(why), "{said}");
    }
    guest.signal(Signal::KILL);
    guest.end().assert_signal(Signal::KILL);
    assert!(is_gone(&path));
}
