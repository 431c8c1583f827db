//! Tests that change what all of a process shares, each in a process of its own.

use rustix::process::{Pid, Signal, kill_process};
use std::env;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Names the test that a process is for.
const VARIABLE: &str = "ARMLET_TEST_ALONE";

/// Whether this process is one for the test `name` (with its modules) alone. If not, the test was
/// run in such a process, and succeeded.
pub(crate) fn in_own_process(name: &str) -> bool {
    if is_alone(name) {
        return true;
    }
    let output = command(name).output().expect("this program");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("1 passed"), "{name} is no test: {said}");
    false
}

/// Whether this process is one for the test `name` alone.
pub(crate) fn is_alone(name: &str) -> bool {
    env::var_os(VARIABLE).is_some_and(|alone| alone == name)
}

/// What runs the test `name` in a process where [`in_own_process`] says so.
pub(crate) fn command(name: &str) -> Command {
    let mut command = Command::new(env::current_exe().expect("a program"));
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]);
    command.env(VARIABLE, name);
    command
}

/// Runs the test `name` in a process of its own until it says [`hold`], kills it by SIGKILL, and
/// returns when all that it started, directly or not, is gone. That are `least` processes or more.
pub(crate) fn assert_none_is_left(name: &str, least: usize) {
    let mut child = command(name)
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program");
    let mut output = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let ready = output.any(|line| line.is_ok_and(|line| line == READY));
    // What was started may still be about to start others.
    let limit = Instant::now() + Duration::from_secs(20);
    let mut started = descendants(child.id());
    while ready && started.len() < least && Instant::now() < limit {
        sleep(Duration::from_millis(20));
        started = descendants(child.id());
    }
    let killed = child.kill();
    child.wait().expect("a process of ours");
    assert!(ready, "it ended too soon");
    killed.expect("it ran");
    assert!(started.len() >= least, "{started:?}");
    let limit = Instant::now() + Duration::from_secs(20);
    let mut left = started.clone();
    loop {
        left.retain(|pid| !is_gone(*pid));
        if left.is_empty() {
            return;
        }
        if Instant::now() > limit {
            let seen: Vec<_> = left.iter().map(|pid| stat(*pid)).collect();
            for pid in &left {
                kill(*pid);
            }
            panic!("of {started:?} there are still {seen:?}");
        }
        sleep(Duration::from_millis(5));
    }
}

const READY: &str = "all of it runs";

/// Says that all runs that [`assert_none_is_left`] waits for, and stays.
pub(crate) fn hold() -> ! {
    println!("\n{READY}");
    loop {
        sleep(Duration::from_secs(1));
    }
}

/// A process's line in /proc; empty if there is none.
fn stat(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default()
}

/// Whether a process has ended. Nobody may have asked yet how.
pub(crate) fn is_gone(pid: u32) -> bool {
    let stat = stat(pid);
    stat.is_empty() || stat.contains(") Z ")
}

/// All that a process started, and what those did.
pub(crate) fn descendants(parent: u32) -> Vec<u32> {
    let mut found = vec![parent];
    let mut processes: Vec<(u32, u32)> = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        // proc(5): the name is in parentheses; behind it state and parent.
        let parent = pid.and_then(|pid| {
            let stat = stat(pid);
            stat.rsplit_once(')')?
                .1
                .split_whitespace()
                .nth(1)?
                .parse()
                .ok()
        });
        processes.extend(pid.zip(parent));
    }
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        let of_it = processes.iter().filter(|process| process.1 == parent);
        found.extend(of_it.map(|process| process.0));
        next += 1;
    }
    found.remove(0);
    found
}

/// Kills a process, if it is there.
pub(crate) fn kill(pid: u32) {
    if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
        let _ = kill_process(pid, Signal::KILL);
    }
}
