use crate::guest::{Armlet, Guest, Input, MARKER};
use rustix::process::Signal;
use std::fs;
use std::thread::sleep;
use std::time::Duration;

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
pub(crate) fn panics(armlet: Armlet, status: i32, position: &str) {
    let outcome = armlet.cmdline("panic=-1").run();
    outcome.assert_status(status);
    println!("{}", outcome.errors);
    let (text, errors) = (outcome.text(), &outcome.errors);
    let reason = "sysrq triggered crash";
    let console = format!("Kernel panic - not syncing: {reason}");
    assert!(text.contains(&console), "{text}");
    assert!(errors.contains(reason), "{errors}");
    let start = format!("armlet: the guest's kernel panicked on vCPU 0 at {position}");
    assert!(errors.starts_with(&start), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
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
