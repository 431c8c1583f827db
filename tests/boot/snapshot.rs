//! Guests that are saved, and go on elsewhere.

use crate::commanded::{FIRST, TICKS};
use crate::control::{controlled, ctl, done};
use crate::guest::{Armlet, section};
use armlet_snapshot::State;
use armlet_system::deadline::Deadline;
use rustix::process::Signal;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

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
    guest.expect(TICKS);
    // The next one has what changed since that one.
    let more = saved.path().join("more");
    done(&path, &["snapshot", text(&more), "--diff"]);
    guest.signal(Signal::KILL);
    guest.end().assert_signal(Signal::KILL);
    let (said, status) = armlet(&["run", "--restore", text(&changes)]);
    assert_eq!(status, 2, "{said}");
    assert!(said.contains("armlet snapshot merge"), "{said}");
    let (said, status) = armlet(&["snapshot", "merge", text(&base), text(&more)]);
    assert_eq!(status, 2, "{said}");
    assert!(
        said.contains("in the order in which they were made"),
        "{said}"
    );
    for diff in [&changes, &more] {
        let (said, status) = armlet(&["snapshot", "merge", text(&base), text(diff)]);
        assert_eq!(status, 0, "{said}");
    }
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
    refused(
        &["--memory-from", "net"],
        2,
        "private, shared, copy or uffd=SOCKET",
    );
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
    let saved = tempfile::tempdir().expect("a folder");
    let folder = saved.path().join("saved");
    done(&path, &["snapshot", text(&folder)]);
    guest.signal(Signal::KILL);
    // The next one waits for its turn.
    guest.end().assert_signal(Signal::KILL);
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
    let saved = tempfile::tempdir().expect("a folder");
    let folder = saved.path().join("saved");
    done(&path, &["snapshot", text(&folder)]);
    guest.signal(Signal::KILL);
    // Its next life begins with it.
    let kernel = guest.path("kernel");
    let bytes = fs::read(&kernel).expect("a kernel");
    // The next one waits for its turn.
    guest.end().assert_signal(Signal::KILL);
    let home = kernel.parent().expect("a folder");
    fs::create_dir(home).expect("a folder");
    fs::write(&kernel, bytes).expect("written");
    for _ in 0..2 {
        let outcome = Armlet::new().restore(&folder).end();
        assert_eq!(outcome.assert_status(0).text(), then);
    }
    fs::remove_dir_all(home).expect("a folder of ours");
}

/// Snapshots that somebody changed, so that their checksums are right: each is refused in a line, or runs
/// as the guest that it is.
pub(crate) fn whatever_stands_in_one_is_refused_or_runs(first: Armlet, tries: u64) {
    const GLANCE: Duration = Duration::from_millis(150);
    let saved = tempfile::tempdir().expect("a folder");
    let folder = saved.path().join("saved");
    let (guest, path) = controlled(first, &[]);
    done(&path, &["snapshot", text(&folder)]);
    guest.signal(Signal::KILL);
    let file = folder.join("state");
    let whole = fs::read(&file).expect("a state");
    let whole = State::read(&mut &*whole).expect("a state");
    let (mut refused, mut ran) = (0, 0);
    let mut random = Random(0x5eed);
    for number in 0..tries {
        let mut state = whole.clone();
        let part = match number % 4 {
            0 => &mut state.head,
            _ => &mut state.body,
        };
        for _ in 0..1 + random.below(3) {
            let at = random.below(part.len() as u64) as usize;
            match random.below(4) {
                0 => part.truncate(at.max(1)),
                1 => part[at] = 0xff,
                2 => part[at] ^= 1 << random.below(8),
                _ => {
                    let value = random.below(1 << 32).to_le_bytes();
                    let end = part.len().min(at + 4);
                    part[at..end].copy_from_slice(&value[..end - at]);
                }
            }
        }
        let bytes = state.to_bytes().expect("a state");
        fs::write(&file, &bytes).expect("written");
        let mut child = Command::new(env!("CARGO_BIN_EXE_armlet"))
            .args(["run", "--on-panic", "exit", "--restore", text(&folder)])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("armlet");
        let deadline = Deadline::after(GLANCE);
        let mut status = None;
        while status.is_none() && !deadline.left().is_zero() {
            std::thread::sleep(Duration::from_millis(2));
            status = child.try_wait().expect("a child");
        }
        let _ = child.kill();
        let ended = child.wait_with_output().expect("a child");
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(!said.contains("panicked"), "{number}: {said}");
        let Some(status) = status else {
            ran += 1;
            continue;
        };
        let code = status.code();
        let code = code.unwrap_or_else(|| panic!("{number}: {status}: {said}"));
        assert!((0..=6).contains(&code), "{number}: {status}: {said}");
        if matches!(code, 1..=3) {
            assert_eq!(said.lines().count(), 1, "{number}: {said}");
            refused += 1;
        }
    }
    println!("{refused} of {tries} were refused, {ran} ran");
    assert!(refused > tries / 8, "{refused} {ran}");
}

/// Numbers that are the same each time (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end.max(1)
    }
}
