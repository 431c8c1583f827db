//! `armlet snapshot`, as a program: its output, its exit statuses, and what it leaves.

use armlet_snapshot::{Bank, Draft, PAGE, Paths, Runs, State};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const ARMLET: &str = env!("CARGO_BIN_EXE_armlet");
/// Pages of memory in these snapshots.
const PAGES: u64 = 64;

/// A snapshot whose pages are full of this byte; a diff has all of them.
fn make(folder: &Path, base: Option<&State>, byte: u8) -> State {
    let draft = Draft::create(&Paths::folder(folder)).expect("a draft");
    let bytes = vec![byte; (PAGES * PAGE) as usize];
    draft.memory().write_all_at(&bytes, 0).expect("room");
    let mut changed = Runs::default();
    if base.is_some() {
        changed.push(0..PAGES);
    }
    let state = State {
        id: draft.id(),
        base: base.map(|base| base.id),
        banks: vec![Bank {
            start: 0x4000_0000,
            size: PAGES * PAGE,
        }],
        changed,
        head: b"{}".to_vec(),
        body: vec![7; 1000],
    };
    state.write(draft.state()).expect("room");
    draft.commit().expect("a snapshot");
    state
}

fn pair(folder: &Path) -> [PathBuf; 2] {
    let [base, diff] = ["base", "diff"].map(|name| folder.join(name));
    let first = make(&base, None, 1);
    make(&diff, Some(&first), 2);
    [base, diff]
}

fn armlet(words: &[&str]) -> Output {
    let output = Command::new(ARMLET).arg("snapshot").args(words).output();
    output.expect("armlet runs")
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

#[test]
fn a_damaged_snapshot_has_status_2_and_a_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let [base, diff] = pair(folder.path());
    let [base, diff] = [&base, &diff].map(|path| path.to_str().expect("UTF-8"));
    let shown = armlet(&["show", diff, "--json"]);
    assert!(shown.status.success(), "{shown:?}");
    let value: serde_json::Value = serde_json::from_slice(&shown.stdout).expect("JSON");
    assert_eq!(value["changed_pages"], PAGES);
    let state = Path::new(base).join("state");
    let mut bytes = fs::read(&state).expect("a state");
    bytes[100] ^= 1;
    fs::write(&state, bytes).expect("a state");
    for words in [
        &["show", base][..],
        &["merge", base, diff],
        &["merge", base],
        &[],
    ] {
        let output = armlet(words);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {output:?}");
        assert_eq!(said(&output).lines().count(), 1, "{words:?}: {output:?}");
    }
    assert!(said(&armlet(&["show", base])).contains("it is damaged: its checksum"));
}

#[test]
fn a_merge_that_has_no_room_says_so_and_leaves_the_base() {
    let folder = tempfile::tempdir().expect("a folder");
    let [base, diff] = pair(folder.path());
    // 64 KiB of 256, in units of 512 bytes.
    let limited = "ulimit -f 128; exec \"$0\" snapshot merge \"$1\" \"$2\"";
    let output = Command::new("sh")
        .args(["-c", limited, ARMLET])
        .args([&base, &diff])
        .output();
    let output = output.expect("a shell");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(said(&output).contains("ulimit -f"), "{output:?}");
    let first = |folder: &Path| fs::read(folder.join("memory")).expect("memory")[0];
    let files = |folder: &Path| fs::read_dir(folder).expect("a folder").count();
    assert_eq!((first(&base), files(&base)), (1, 2));
    let [base_name, diff_name] = [&base, &diff].map(|path| path.to_str().expect("UTF-8"));
    let merged = armlet(&["merge", base_name, diff_name]);
    assert!(merged.status.success(), "{merged:?}");
    assert_eq!((first(&base), files(&base)), (2, 2));
    let again = armlet(&["merge", base_name, diff_name]);
    let text = String::from_utf8_lossy(&again.stdout);
    assert!(text.contains("nothing had to be changed"), "{again:?}");
}
