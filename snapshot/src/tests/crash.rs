//! What is left after a kill or without room: the earlier snapshot or the new one.

use super::{Kind, bytes, content, merged, names, pagemap, region, take};
use crate::draft::STEPS;
use crate::pages::{Piece, write};
use crate::{Draft, Paths, Snapshot};
use rustix::process::{Resource, Rlimit, setrlimit};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

/// Asserts that a folder has the snapshot of this byte or that one, whole, and says which.
fn either(paths: &Paths, one: u8, other: u8) -> u8 {
    let there = Snapshot::open(paths).expect("a snapshot");
    let byte = there.state.head[0];
    assert!([one, other].contains(&byte), "{byte}");
    let memory = bytes(&there.memory);
    assert!(memory.iter().all(|it| *it == byte), "memory of another");
    byte
}

#[test]
fn a_cut_at_any_step_leaves_one_snapshot_or_the_other() {
    let folder = tempfile::tempdir().expect("a folder");
    for paths in [
        Paths::folder(&folder.path().join("snapshot")),
        Paths::pair(
            &folder.path().join("vm.snap"),
            &folder.path().join("vm.mem"),
        ),
    ] {
        let [old, new] = [1, 2].map(|byte| region(Kind::Private, &content(&[byte; 40])));
        take(&old, &paths, None, &[1]).expect("the first");
        let mut seen = Vec::new();
        for step in 0.. {
            STEPS.set(Some(step));
            let taken = take(&new, &paths, None, &[2]);
            STEPS.set(None);
            seen.push(either(&paths, 1, 2));
            if taken.is_ok() {
                break;
            }
            // The next one finds what the last one left.
            take(&old, &paths, None, &[1]).expect("the next");
            assert_eq!(either(&paths, 1, 1), 1);
            let folder = paths.state.parent().expect("a folder");
            assert!(names(folder).iter().all(|name| !name.ends_with(".tmp")));
        }
        assert!(seen.is_sorted() && seen.contains(&1), "{seen:?}");
        assert!(seen.len() >= 6, "{seen:?}");
    }
}

#[test]
fn a_cut_merge_is_done_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let [base, diff] = ["base", "diff"].map(|name| Paths::folder(&folder.path().join(name)));
    for step in 0.. {
        let old = region(Kind::Private, &content(&[1; 40]));
        take(&old, &base, None, &[1]).expect("a base");
        let from = Snapshot::open(&base).expect("a base");
        let new = region(Kind::Private, &content(&[2; 40]));
        take(&new, &diff, Some(&from), &[2]).expect("a diff");
        STEPS.set(Some(step));
        let outcome = merged(&base, &diff);
        STEPS.set(None);
        either(&base, 1, 2);
        merged(&base, &diff).expect("merged");
        assert_eq!(either(&base, 2, 2), 2);
        if outcome.is_ok() {
            break;
        }
    }
}

/// The folder in which the killed process works.
const FOLDER: &str = "ARMLET_TEST_SNAPSHOT";

#[test]
#[ignore = "is the process that another test kills"]
fn write_one_after_another() {
    let folder = std::env::var_os(FOLDER).expect("a folder");
    let paths = Paths::folder(Path::new(&folder));
    let regions = [3, 4].map(|byte| (byte, region(Kind::Private, &content(&[byte; 300]))));
    println!("begins");
    for (byte, region) in regions.iter().cycle() {
        take(region, &paths, None, &[*byte]).expect("a snapshot");
    }
}

#[test]
fn a_kill_at_any_moment_leaves_a_whole_snapshot() {
    let folder = tempfile::tempdir().expect("a folder");
    let paths = Paths::folder(folder.path());
    let first = region(Kind::Private, &content(&[3; 300]));
    take(&first, &paths, None, &[3]).expect("the first");
    let mut leftovers = 0;
    for round in 0..100_u64 {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args([
                "--exact",
                "--ignored",
                "--nocapture",
                "tests::crash::write_one_after_another",
            ])
            .env(FOLDER, folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("a process");
        let said = BufReader::new(child.stdout.take().expect("its output"));
        let begins = said
            .lines()
            .any(|line| line.is_ok_and(|line| line.contains("begins")));
        assert!(begins);
        // Microseconds that spread over the steps of some snapshots.
        sleep(Duration::from_micros(round * 7919 % 20000));
        child.kill().expect("alive");
        let status = child.wait().expect("its end");
        assert_eq!(
            status.signal(),
            Some(9),
            "round {round}: it ended by itself"
        );
        leftovers += usize::from(names(folder.path()) != ["memory", "state"]);
        either(&paths, 3, 4);
    }
    println!("{leftovers} of 100 kills left temporary files");
    assert!(leftovers > 0, "no kill came in between");
    take(&first, &paths, None, &[3]).expect("another one");
    assert_eq!(names(folder.path()), ["memory", "state"]);
}

#[test]
fn one_writer_at_a_time() {
    let folder = tempfile::tempdir().expect("a folder");
    let paths = Paths::folder(folder.path());
    let draft = Draft::create(&paths).expect("a draft");
    let error = format!("{:#}", Draft::create(&paths).expect_err("a second one"));
    assert!(
        error.contains("another snapshot is being written"),
        "{error}"
    );
    assert_eq!(names(folder.path()).len(), 2);
    drop(draft);
    assert_eq!(names(folder.path()), [""; 0]);
    drop(Draft::create(&paths).expect("a draft"));
    fs::create_dir(folder.path().join("state")).expect("a folder");
    let error = format!("{:#}", Draft::create(&paths).expect_err("no file"));
    assert!(error.contains("is there, and is no file"), "{error}");
}

#[test]
#[ignore = "is the process with a limit"]
fn write_beyond_a_limit() {
    let region = region(Kind::Private, &content(&[1; 40]));
    armlet_system::signals::survive_file_size_limit();
    let limit = Rlimit {
        current: Some(100 << 10),
        maximum: Some(100 << 10),
    };
    setrlimit(Resource::Fsize, limit).expect("a limit");
    let piece = Piece::of(&region).expect("mapped");
    let file = tempfile::tempfile().expect("a file");
    let error = write(&[piece], Some(&pagemap()), &file, &mut |_| Ok(()));
    println!("said: {:#}", error.expect_err("too large"));
}

#[test]
fn a_limit_and_a_full_disk_are_said_with_what_would_work() {
    let child = Command::new(std::env::current_exe().expect("this test"))
        .args([
            "--exact",
            "--ignored",
            "--nocapture",
            "tests::crash::write_beyond_a_limit",
        ])
        .output()
        .expect("a process");
    let text = String::from_utf8_lossy(&child.stdout);
    assert!(
        text.contains("said: cannot write the guest's memory"),
        "{text}"
    );
    assert!(
        text.contains("163840 bytes") && text.contains("ulimit -f"),
        "{text}"
    );
    // A filesystem of its own, in a mount namespace of its own.
    let folder = tempfile::tempdir().expect("a folder");
    let mounted = Command::new("unshare")
        .args(["--mount", "--map-root-user", "sh", "-c"])
        .arg("mount -t tmpfs -o size=1m none \"$1\" && exec \"$2\" --exact --ignored --nocapture tests::crash::fill_a_disk")
        .arg("sh")
        .arg(folder.path())
        .arg(std::env::current_exe().expect("this test"))
        .env(FOLDER, folder.path())
        .output();
    let text = match &mounted {
        Ok(output) => String::from_utf8_lossy(&output.stdout),
        Err(error) => format!("{error}").into(),
    };
    if !text.contains("running 1 test") {
        println!("skipped: no mount namespace: {mounted:?}");
        return;
    }
    assert!(text.contains("1 passed"), "{mounted:?}");
}

#[test]
#[ignore = "is the process on a small filesystem"]
fn fill_a_disk() {
    let folder = std::env::var_os(FOLDER).expect("a folder");
    let paths = Paths::folder(Path::new(&folder));
    let small = region(Kind::Private, &content(&[1; 100]));
    take(&small, &paths, None, &[1]).expect("it fits");
    let large = region(Kind::Private, &content(&[2; 200]));
    for _ in 0..3 {
        let error = take(&large, &paths, None, &[2]).expect_err("it does not fit");
        let text = format!("{error:#}");
        assert!(
            text.contains("819200 bytes") && text.contains("make room"),
            "{text}"
        );
        assert_eq!(either(&paths, 1, 1), 1);
        assert_eq!(names(Path::new(&folder)), ["memory", "state"]);
    }
    // Room for what fits is there again.
    drop(File::open(&paths.state).expect("a file"));
    take(&small, &paths, None, &[1]).expect("it fits");
}
