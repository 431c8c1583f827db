//! `armlet snapshot`: shows what is in a snapshot, and merges a diff into its base.

use crate::cli::SnapshotArgs;
use anyhow::{Context, Result, anyhow, bail};
use armlet_snapshot::merge::Pair;
use armlet_snapshot::prefetch::Prefetch;
use armlet_snapshot::{PAGE, Paths, Snapshot, State};
use armlet_system::status::{Fault, Status};
use armlet_system::{files, signals};
use serde_json::{Value, json};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Does what the arguments ask for, and returns it as text for people and as a value for programs.
///
/// # Errors
/// Snapshots that are damaged or do not belong together, with [`Status::Usage`]; what the system says.
pub fn inspect(args: &SnapshotArgs) -> Result<(String, Value)> {
    match checked(args).fault(Status::Usage)? {
        Asked::Show(shown) => Ok(shown),
        Asked::Merge(base, diff) => {
            let pair = Pair::open(&base, &diff).fault(Status::Usage)?;
            signals::survive_file_size_limit();
            let merged = pair.apply()?;
            let (id, pages) = (merged.id, merged.pages);
            let done = match pages {
                0 => "nothing had to be changed".to_owned(),
                _ => format!("{pages} pages of 4 KiB were changed"),
            };
            let text = format!("{} is now snapshot {id}; {done}\n", base.state.display());
            Ok((
                text,
                json!({ "id": id.to_string(), "changed_pages": pages }),
            ))
        }
    }
}

/// Returns the version of the format of a snapshot's state.
///
/// # Errors
/// Another file, and what the system says.
pub fn version(path: &Path) -> Result<u32> {
    let shown = || path.display().to_string();
    let (mut file, _) = files::open_regular(path).with_context(shown)?;
    State::read_version(&mut file).with_context(shown)
}

/// What is asked for.
enum Asked {
    /// This was to be shown.
    Show((String, Value)),
    /// Base and diff are to be merged.
    Merge(Paths, Paths),
}

fn checked(args: &SnapshotArgs) -> Result<Asked> {
    let snapshots: Vec<&str> = args.snapshots.iter().map(String::as_str).collect();
    match (args.action.as_str(), snapshots.as_slice()) {
        ("show", [one]) => Ok(Asked::Show(show(&paths(one))?)),
        ("merge", [base, diff]) => Ok(Asked::Merge(paths(base), paths(diff))),
        ("show", _) => bail!("show takes one snapshot: armlet snapshot show DIR"),
        ("merge", _) => {
            bail!("merge takes a snapshot and a diff of it: armlet snapshot merge BASE DIFF")
        }
        (other, _) => bail!("'{other}' is not known; use show DIR or merge BASE DIFF"),
    }
}

/// Returns the files that an argument names: those in a folder, or a pair.
fn paths(text: &str) -> Paths {
    match text.split_once(',') {
        Some((state, memory)) if !Path::new(text).exists() => {
            Paths::pair(Path::new(state), Path::new(memory))
        }
        _ => Paths::folder(Path::new(text)),
    }
}

fn show(paths: &Paths) -> Result<(String, Value)> {
    let Snapshot { state, memory } = Snapshot::open(paths)?;
    let shown = || paths.state.display().to_string();
    let head: Value = serde_json::from_slice(&state.head)
        .map_err(|error| anyhow!("its head is no JSON: {error}"))
        .with_context(shown)?;
    let size = state.memory_size();
    let taken = memory.metadata().map_or(0, |memory| memory.blocks() * 512);
    let changed = state.changed.pages();
    let prefetch = Prefetch::read(paths, state.id, size);
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let mut lines = vec![match state.base {
        None => format!("snapshot   {}", state.id),
        Some(base) => format!(
            "snapshot   {}, a diff of {base}: {changed} pages of 4 KiB changed",
            state.id
        ),
    }];
    lines.push(format!("memory     {}, {} on disk", mib(size), mib(taken)));
    for bank in &state.banks {
        let last = bank.start + (bank.size - 1);
        lines.push(format!("  {:#x}-{last:#x}  {}", bank.start, mib(bank.size)));
    }
    if let Some(list) = &prefetch {
        let (read, written) = (list.read.pages() * PAGE, list.written.pages() * PAGE);
        lines.push(format!(
            "prefetch   {} that a guest reads first, {} that it writes",
            mib(read),
            mib(written)
        ));
    }
    lines.push(format!("devices    {} bytes", state.body.len()));
    lines.extend(describe(&head));
    let banks: Vec<_> = state
        .banks
        .iter()
        .map(|bank| json!({ "start": bank.start, "size": bank.size }))
        .collect();
    let value = json!({
        "id": state.id.to_string(),
        "base": state.base.map(|base| base.to_string()),
        "memory": { "size": size, "on_disk": taken, "banks": banks },
        "changed_pages": state.base.map(|_| changed),
        "prefetch_pages": prefetch.map(|list| json!({
            "read": list.read.pages(),
            "written": list.written.pages(),
        })),
        "body_size": state.body.len(),
        "head": head,
    });
    Ok((lines.join("\n") + "\n", value))
}

/// Says what a head knows of the machine, for people. What it does not have is left out.
fn describe(head: &Value) -> Vec<String> {
    let text = |value: &Value| match value.as_str() {
        Some(text) => text.to_owned(),
        None => value.to_string(),
    };
    let mut lines = Vec::new();
    let mut line = |name: &str, value: &Value| {
        if !value.is_null() {
            lines.push(format!("{name:<10} {}", text(value)));
        }
    };
    line("armlet", &head["armlet"]);
    line("guest", &head["architecture"]);
    line("board", &head["board"]["name"]);
    let asked = &head["asked"];
    line("kernel", &asked["kernel"]);
    line("initrd", &asked["initrd"]);
    for options in [&asked["options"], &asked["devices"]] {
        let options = options.as_array().into_iter().flatten();
        lines.extend(options.map(|it| format!("  --{} {}", text(&it[0]), text(&it[1]))));
    }
    if let Some(facts) = head["host"].as_object() {
        lines.push("host".to_owned());
        lines.extend(
            facts
                .iter()
                .map(|(name, it)| format!("  {name}: {}", text(it))),
        );
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use armlet_snapshot::{Bank, Draft};
    use std::fs;
    use std::os::unix::fs::FileExt;

    /// A snapshot of four pages; of a diff, these are in it.
    fn make(paths: &Paths, base: Option<&State>, pages: &[u64], byte: u8) -> State {
        let draft = Draft::create(paths).expect("a draft");
        draft.memory().set_len(4 * PAGE).expect("room");
        let mut changed = armlet_snapshot::Runs::default();
        for page in pages {
            let bytes = [byte; PAGE as usize];
            draft
                .memory()
                .write_all_at(&bytes, page * PAGE)
                .expect("room");
            changed.push(*page..page + 1);
        }
        let state = State {
            id: draft.id(),
            base: base.map(|base| base.id),
            banks: vec![Bank {
                start: 0x4000_0000,
                size: 4 * PAGE,
            }],
            changed: if base.is_some() {
                changed
            } else {
                Default::default()
            },
            head: br#"{"armlet": "0.1.0", "board": {"name": "virt"}, "host": {"page_size": 4096},
                "asked": {"options": [["cpus", "2"]], "devices": [], "kernel": null}}"#
                .to_vec(),
            body: vec![7; 1000],
        };
        state.write(draft.state()).expect("room");
        draft.commit().expect("a snapshot");
        state
    }

    fn run(action: &str, snapshots: &[&Path]) -> Result<(String, Value)> {
        let snapshots = snapshots.iter().map(|path| path.display().to_string());
        inspect(&SnapshotArgs {
            json: false,
            action: action.to_owned(),
            snapshots: snapshots.collect(),
        })
    }

    #[test]
    fn a_snapshot_is_shown_and_merged() {
        let folder = tempfile::tempdir().expect("a folder");
        let [base, diff] = ["base", "diff"].map(|name| folder.path().join(name));
        let of = |path: &Path| Paths::folder(path);
        let first = make(&of(&base), None, &[0, 1], 1);
        let second = make(&of(&diff), Some(&first), &[1, 3], 2);
        let (text, value) = run("show", &[&diff]).expect("a diff");
        let told = format!("a diff of {}: 2 pages", first.id);
        let words = [
            told.as_str(),
            "0x40000000-0x40003fff",
            "armlet     0.1.0",
            "board      virt",
            "  --cpus 2",
            "  page_size: 4096",
        ];
        for words in words {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert_eq!(value["changed_pages"], 2);
        assert_eq!(value["memory"]["size"], 4 * PAGE);
        assert_eq!(value["head"]["host"]["page_size"], 4096);
        let (text, _) = run("merge", &[&base, &diff]).expect("merged");
        assert!(text.contains(&second.id.to_string()), "{text}");
        let memory = fs::read(base.join("memory")).expect("memory");
        let bytes: Vec<u8> = memory.chunks(PAGE as usize).map(|page| page[0]).collect();
        assert_eq!(bytes, [1, 2, 0, 2]);
        let (text, value) = run("show", &[&base]).expect("whole");
        assert!(!text.contains("a diff of"), "{text}");
        assert!(value["base"].is_null() && value["changed_pages"].is_null());
        // As Firecracker's API names them.
        let pair = format!("{0}/state,{0}/memory", base.display());
        run("show", &[Path::new(&pair)]).expect("a pair");
    }

    #[test]
    fn what_is_wrong_is_said_in_a_line_with_status_2() {
        let folder = tempfile::tempdir().expect("a folder");
        let [base, diff, none] = ["base", "diff", "none"].map(|name| folder.path().join(name));
        let first = make(&Paths::folder(&base), None, &[0, 1], 1);
        make(&Paths::folder(&diff), Some(&first), &[1, 3], 2);
        make(&Paths::folder(&base), None, &[0, 1], 1);
        let cases: [(&str, &[&Path], &str); 6] = [
            ("show", &[&none], "none/state"),
            ("show", &[&base, &diff], "show takes one snapshot"),
            ("merge", &[&base], "merge takes a snapshot and a diff"),
            ("merge", &[&base, &diff], "merge diffs in the order"),
            ("merge", &[&diff, &base], "is a whole snapshot"),
            ("open", &[&base], "use show DIR or merge BASE DIFF"),
        ];
        for (action, snapshots, words) in cases {
            let error = run(action, snapshots).expect_err(words);
            let text = format!("{error:#}");
            assert!(text.contains(words) && !text.contains('\n'), "{text}");
            let status = armlet_system::status::status_of(&error);
            assert_eq!(status, Status::Usage, "{text}");
        }
        fs::write(base.join("state"), "text").expect("a file");
        let error = run("show", &[&base]).expect_err("no state");
        assert!(format!("{error:#}").contains("not the state of a snapshot"));
    }
}
