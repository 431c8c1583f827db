//! Guests that are saved, and go on elsewhere.

use crate::commanded::{FIRST, TICKS};
use crate::control::{controlled, ctl, done};
use crate::guest::{Armlet, section};
use rustix::process::Signal;
use std::fs;
use std::path::Path;
use std::process::Command;

/// What `armlet` says to these words, and its status.
fn armlet(words: &[&str]) -> (String, i32) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_armlet"));
    let output = command.args(words).output().expect("armlet");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    (said, output.status.code().unwrap_or(-1))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of ours")
}

pub(crate) fn a_guest_goes_on_from_its_snapshot(first: Armlet) {
    let saved = tempfile::tempdir().expect("a folder");
    let (folder, next) = (saved.path().join("first"), saved.path().join("next"));
    let (mut guest, path) = controlled(first, &[]);
    // The next life of the guest begins with it.
    let kernel = saved.path().join("kernel");
    fs::copy(guest.path("kernel"), &kernel).expect("a copy");
    let said = done(&path, &["snapshot", text(&folder)]);
    assert!(said.contains("memory bytes: "), "{said}");
    // It runs on as if nothing had been.
    guest.expect(TICKS);
    assert!(done(&path, &["status"]).contains("state: running"));
    // A second one takes the first one's place; a machine that is paused stays so.
    done(&path, &["pause"]);
    done(&path, &["snapshot", text(&folder)]);
    assert!(done(&path, &["status"]).contains("state: paused"));
    let mut names: Vec<_> = fs::read_dir(&folder)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["memory", "state"]);
    guest.signal(Signal::KILL);
    let kernel_of_guest = guest.path("kernel");
    let home = kernel_of_guest.parent().expect("a folder").to_owned();
    guest.end().assert_signal(Signal::KILL);
    // Twice, as a snapshot is not used up; the kernel is where it was the second time only.
    for has_kernel in [false, true] {
        if has_kernel {
            fs::create_dir(&home).expect("a folder");
            fs::copy(&kernel, &kernel_of_guest).expect("a copy");
        }
        let again = Armlet::new();
        let control = again.file("control", b"");
        fs::remove_file(&control).expect("a file of ours");
        let again = again.option("--control", &control).flag("--paused");
        let mut again = again.restore(&folder);
        while !control.exists() && again.runs() {
            std::thread::sleep(crate::guest::GLANCE);
        }
        assert!(done(&control, &["status"]).contains("state: paused"));
        assert_eq!(again.said(), "");
        done(&control, &["resume"]);
        again.expect(TICKS);
        again.expect(TICKS);
        // It did not begin anew.
        assert!(!again.said().contains(FIRST), "{}", again.said());
        // The first one records which pages it needed.
        let needed = folder.join("prefetch");
        while fs::metadata(&needed).map_or(0, |file| file.len()) == 0 {
            assert!(again.runs());
            std::thread::sleep(crate::guest::GLANCE);
        }
        // What was restored can be saved.
        done(&control, &["snapshot", text(&next)]);
        done(&control, &["reset"]);
        if has_kernel {
            again.expect(FIRST);
            again.expect(TICKS);
            again.signal(Signal::KILL);
            again.end().assert_signal(Signal::KILL);
        } else {
            again.expect_error("cannot be started again: cannot open kernel");
            again.end().assert_status(6);
        }
        let third = Armlet::new().option("--memory-from", "copy");
        let mut third = third.restore(&next);
        third.expect(TICKS);
        assert!(!third.said().contains(FIRST), "{}", third.said());
    }
    fs::remove_dir_all(&home).expect("a folder of ours");
    let (said, status) = armlet(&["plan", "--restore", text(&folder), "--host", "this"]);
    assert_eq!(status, 0, "{said}");
}

pub(crate) fn a_guest_goes_on_from_changes_on_a_snapshot(first: Armlet) {
    let (mut guest, path) = controlled(first, &[]);
    let saved = tempfile::tempdir().expect("a folder");
    let (base, changes) = (saved.path().join("base"), saved.path().join("changes"));
    let (said, status) = ctl(&path, &["snapshot", "--diff", text(&changes)]);
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("no earlier snapshot"), "{said}");
    done(&path, &["snapshot", text(&base)]);
    guest.expect(TICKS);
    done(&path, &["snapshot", text(&changes), "--diff"]);
    guest.signal(Signal::KILL);
    guest.end().assert_signal(Signal::KILL);
    let (said, status) = armlet(&["run", "--restore", text(&changes)]);
    assert_eq!(status, 2, "{said}");
    assert!(said.contains("armlet snapshot merge"), "{said}");
    let (said, status) = armlet(&["snapshot", "merge", text(&base), text(&changes)]);
    assert_eq!(status, 0, "{said}");
    let mut again = Armlet::new().restore(&base);
    again.expect(TICKS);
    assert!(!again.said().contains(FIRST), "{}", again.said());
}

pub(crate) fn one_that_is_none_is_refused(first: Armlet) {
    let (guest, path) = controlled(first, &[]);
    let folder = guest.path("saved");
    done(&path, &["snapshot", text(&folder)]);
    // A place where none can be.
    let (said, status) = ctl(&path, &["snapshot", "/dev/null/x"]);
    assert_eq!((status, said.lines().count()), (1, 1), "{said}");
    assert!(done(&path, &["status"]).contains("state: running"));
    guest.signal(Signal::KILL);
    let refused = |words: &[&str], status: i32, why: &str| {
        let (said, code) = armlet(&[&["run", "--restore", text(&folder)], words].concat());
        assert_eq!(code, status, "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains(why), "{why}: {said}");
    };
    refused(
        &["--cpus", "2"],
        2,
        "--cpus: a machine that is restored has",
    );
    refused(&["--disk", "/dev/null"], 2, "the machine would differ");
    refused(&["--memory-from", "net"], 2, "private, copy or uffd=SOCKET");
    let state = fs::read(folder.join("state")).expect("a state");
    let memory = fs::File::options()
        .write(true)
        .open(folder.join("memory"))
        .expect("memory");
    let size = memory.metadata().expect("a size").len();
    memory.set_len(size - (1 << 20)).expect("shorter");
    refused(&[], 2, "memory");
    memory.set_len(size).expect("as long as before");
    fs::write(folder.join("state"), &state[..state.len() / 2]).expect("half");
    refused(&[], 2, "state");
    let mut damaged = state.clone();
    damaged[state.len() / 2] ^= 1;
    fs::write(folder.join("state"), &damaged).expect("damaged");
    refused(&[], 2, "state");
    fs::remove_file(folder.join("state")).expect("a file");
    refused(&[], 2, "state");
}

/// What a guest of Linux does once it was saved: it draws random numbers when it hears that it is another.
const DRAWS: &str = "
mount -t devtmpfs none /dev 2>/dev/null
echo ticks:
told='crng reseeded due to virtual machine fork'
for second in $(seq 60); do dmesg | grep -q \"$told\" && break; sleep 1; done
echo '== told'; dmesg | grep \"$told\"
echo '== drawn'; od -A n -t x1 -N 16 /dev/urandom
echo '== end'
";

/// Two guests that go on from one snapshot hear that they do, and draw different numbers.
pub(crate) fn clones_draw_numbers_of_their_own(start: impl FnOnce(&str) -> Armlet) {
    let (guest, path) = controlled(start(DRAWS), &[]);
    let folder = guest.path("saved");
    done(&path, &["snapshot", text(&folder)]);
    guest.signal(Signal::KILL);
    let draw = || {
        let outcome = Armlet::new().restore(&folder).end();
        let said = outcome.assert_status(0).text();
        assert_eq!(section(&said, "told").lines().count(), 1, "{said}");
        let drawn = section(&said, "drawn").to_owned();
        assert_eq!(drawn.split_whitespace().count(), 16, "{said}");
        drawn
    };
    assert_ne!(draw(), draw());
}

/// A guest that sees that it is another says all of `then` and powers off; so do others from that snapshot.
pub(crate) fn clones_see_that_they_are_others(first: Armlet, then: &str) {
    let (guest, path) = controlled(first, &[]);
    let folder = guest.path("saved");
    done(&path, &["snapshot", text(&folder)]);
    guest.signal(Signal::KILL);
    for _ in 0..2 {
        let outcome = Armlet::new().restore(&folder).end();
        assert_eq!(outcome.assert_status(0).text(), then);
    }
}
