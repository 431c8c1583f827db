//! `docs/options.md` says what `--help` says, word for word, and `docs/boards.md` has the table that
//! `armlet boards --table` prints. `UPDATE_GOLDEN=1` rewrites both.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// A document where cargo runs this, not where it was compiled: a checkout may be copied with its
/// build.
fn document(name: &str) -> PathBuf {
    let said = std::env::var_os("CARGO_MANIFEST_DIR");
    let root = said.map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    root.join("docs").join(name)
}

/// A block begins with `<!-- help: armlet run -->` and ends with `<!-- end -->`.
const BEGIN: &str = "<!-- help: ";
const END: &str = "<!-- end -->\n";

#[test]
fn the_options_are_those_of_help() {
    let written = fs::read_to_string(document("options.md")).expect("docs/options.md");
    let current = with_help(&written);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(document("options.md"), current).expect("docs/options.md can be written");
        return;
    }
    let lines = written.lines().zip(current.lines()).enumerate();
    for (index, (written, current)) in lines {
        let line = index + 1;
        assert_eq!(written, current, "docs/options.md:{line}: {REWRITE}");
    }
    assert!(written == current, "docs/options.md: {REWRITE}");
}

const REWRITE: &str =
    "--help says something else; UPDATE_GOLDEN=1 cargo test --test docs rewrites it";

#[test]
fn what_is_printed_has_no_control_characters_of_others() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let board = folder.path().join("board.toml");
    let text = "name = \"m\u{202e}ine\"\ninherits = \"virt\"\n";
    fs::write(&board, text).expect("a board");
    let board = board.to_str().expect("UTF-8");
    let machine = ["--board", board];
    for more in [&[][..], &["--json"], &["--dts"]] {
        let printed = stdout(&[&["plan"], &machine[..], more].concat());
        let is_shown = |c: char| matches!(c, '\n' | '\t' | ' '..='~');
        let hidden: String = printed.chars().filter(|c| !is_shown(*c)).collect();
        assert!(hidden.is_empty(), "{more:?}: {hidden:?} in\n{printed}");
        if more == ["--json"] {
            let value: serde_json::Value = serde_json::from_str(&printed).expect("JSON");
            assert_eq!(value["board"], "m\u{202e}ine");
        }
        if more.is_empty() {
            assert!(printed.starts_with("Board m\\u{202e}ine ("));
        }
    }
}

#[test]
fn the_table_of_boards_is_that_of_the_tool() {
    let path = document("boards.md");
    const MARK: &str = "<!-- armlet boards --table -->\n";
    let written = fs::read_to_string(&path).expect("docs/boards.md");
    let (before, rest) = written.split_once(MARK).expect("a mark for the table");
    let (_, after) = rest.split_once(END).expect("its end");
    let table = stdout(&["boards", "--table"]);
    let current = format!("{before}{MARK}{table}{END}{after}");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(path, current).expect("docs/boards.md can be written");
        return;
    }
    assert!(
        written == current,
        "docs/boards.md: the table is now\n{table}UPDATE_GOLDEN=1 cargo test --test docs rewrites it"
    );
}

#[test]
fn every_command_is_documented() {
    let written = fs::read_to_string(document("options.md")).expect("docs/options.md");
    let help = help("armlet");
    let commands: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        // A command's name stands after two spaces, its description goes on further in.
        .filter_map(|line| {
            line.strip_prefix("  ")
                .filter(|line| !line.starts_with(' '))
        })
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(commands.contains(&"run"), "{help}");
    for command in commands {
        assert!(
            written.contains(&format!("{BEGIN}armlet {command} -->")),
            "docs/options.md has no block for 'armlet {command}'"
        );
    }
}

#[test]
fn every_exit_status_is_documented() {
    let written = fs::read_to_string(document("options.md")).expect("docs/options.md");
    for status in help("armlet")
        .lines()
        .skip_while(|line| *line != "Error codes:")
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
    {
        assert!(
            written.contains(&format!("\n| {status} |")),
            "docs/options.md has no row for exit status {status}"
        );
    }
}

/// The document with each block's text replaced by what the program says now.
fn with_help(text: &str) -> String {
    let mut current = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(BEGIN) {
        let (before, block) = rest.split_at(at);
        let (first, body) = block.split_once('\n').expect("a line for the mark");
        let command = first
            .strip_prefix(BEGIN)
            .and_then(|mark| mark.strip_suffix(" -->"))
            .unwrap_or_else(|| panic!("docs/options.md: {first}: ends in no ' -->'"));
        let (_, after) = body
            .split_once(END)
            .unwrap_or_else(|| panic!("docs/options.md: no {END} after {first}"));
        current += before;
        current += &format!("{first}\n```text\n{}```\n{END}", help(command));
        rest = after;
    }
    current + rest
}

/// What `command --help` prints, without spaces at the ends of lines.
fn help(command: &str) -> String {
    let arguments = command
        .strip_prefix("armlet")
        .unwrap_or_else(|| panic!("'{command}' is no command of armlet"));
    let words: Vec<&str> = arguments.split_whitespace().chain(["--help"]).collect();
    stdout(&words)
        .lines()
        .map(|line| format!("{}\n", line.trim_end()))
        .collect()
}

/// What armlet prints.
fn stdout(words: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_armlet"))
        .args(words)
        .output()
        .expect("armlet runs");
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// How many statements with MUST, MUST NOT, SHOULD or SHOULD NOT the requirements of devices have, by
/// section of virtio 1.2 (committee specification 01): sections 2, 3, 4.2 and 6, and those of the
/// devices that there are.
const STATEMENTS: [(&str, u32); 47] = [
    ("2.1.2", 3),
    ("2.2.2", 3),
    ("2.4.1", 2),
    ("2.5.2", 1),
    ("2.6.1.1.1", 2),
    ("2.6.1.2.1", 1),
    ("2.7.4.1", 1),
    ("2.7.5.1", 2),
    ("2.7.5.3.2", 2),
    ("2.7.7.2", 6),
    ("2.7.8.2", 2),
    ("2.7.10.2", 3),
    ("2.8.12", 2),
    ("2.8.15", 3),
    ("2.8.18", 1),
    ("2.10.2", 1),
    ("4.2.2.1", 12),
    ("5.1.4.1", 11),
    ("5.1.6.2.2", 4),
    ("5.1.6.3.2", 2),
    ("5.1.6.4.1", 18),
    ("5.1.6.5.1.1", 13),
    ("5.1.6.5.2.1", 4),
    ("5.1.6.5.4.2", 1),
    ("5.1.6.5.6.2", 2),
    ("5.1.6.5.7.3", 1),
    ("5.2.5.2", 3),
    ("5.2.6.2", 10),
    ("5.3.5.1", 2),
    ("5.3.6.2.1", 2),
    ("5.4.6.2", 1),
    ("5.5.3.2", 0),
    ("5.5.6.2", 0),
    ("5.5.6.3.2", 2),
    ("5.5.6.5.2", 5),
    ("5.5.6.6.2", 0),
    ("5.5.6.7.2", 1),
    ("5.10.6.1.2", 1),
    ("5.10.6.3.2", 2),
    ("5.10.6.4.2", 2),
    ("5.11.4.2", 2),
    ("5.11.6.2.1", 1),
    ("5.11.6.4.1", 4),
    ("5.19.5.1", 5),
    ("5.19.7.1", 1),
    ("5.19.7.3", 1),
    ("6.2", 5),
];

/// The rows of docs/virtio-conformance.md, and its text.
fn conformance() -> (Vec<String>, String) {
    let text = fs::read_to_string(document("virtio-conformance.md"));
    let text = text.expect("docs/virtio-conformance.md");
    let is_row = |line: &&str| line.starts_with("| ") && !line.starts_with("| clause");
    let rows = text.lines().filter(is_row).map(str::to_owned).collect();
    (rows, text)
}

#[test]
fn each_clause_of_virtio_has_a_row_or_is_said_not_to_apply() {
    let (rows, text) = conformance();
    let (_, others) = text
        .split_once("## Not applicable")
        .expect("what does not apply");
    let mut named: Vec<&str> = Vec::new();
    for row in &rows {
        let clauses = row.split('|').nth(1).expect("a first column");
        named.extend(clauses.split(',').map(str::trim));
    }
    named.extend(
        others
            .split([' ', ',', ';', ':', '\n'])
            .map(|word| word.trim_end_matches('.')),
    );
    let mut wanted = Vec::new();
    for (section, count) in STATEMENTS {
        wanted.extend((1..=count).map(|number| format!("{section}/{number}")));
    }
    for clause in &wanted {
        let count = named.iter().filter(|name| *name == clause).count();
        assert_eq!(count, 1, "docs/virtio-conformance.md: {clause}");
    }
    let is_clause = |name: &&&str| {
        let digits = |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_digit());
        name.split_once('/')
            .is_some_and(|(section, number)| digits(number) && section.split('.').all(digits))
    };
    for name in named.iter().filter(is_clause) {
        let is_known = wanted.iter().any(|clause| clause == name);
        assert!(is_known, "docs/virtio-conformance.md: there is no {name}");
    }
}

#[test]
fn each_clause_of_virtio_names_tests_that_there_are() {
    const ROOT: &str = env!("CARGO_MANIFEST_DIR");
    let mut known = String::new();
    for folder in ["devices/src/virtio", "backends/src", "tests/boot"] {
        read_all(format!("{ROOT}/{folder}").as_ref(), &mut known);
    }
    let (rows, text) = conformance();
    for row in &rows {
        let is_named = row.split('`').nth(1).is_some();
        assert!(is_named, "docs/virtio-conformance.md names no test: {row}");
    }
    assert!(rows.len() > 60, "{} rows", rows.len());
    let names = text.split('`').skip(1).step_by(2);
    // Files have names with a point or a slash.
    for name in names.filter(|name| !name.contains(['.', '/'])) {
        let is_there = known.contains(&format!("fn {name}("));
        assert!(
            is_there,
            "docs/virtio-conformance.md: there is no test {name}"
        );
    }
}

/// Adds the text of all files of Rust in a folder and below it.
fn read_all(folder: &std::path::Path, text: &mut String) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            read_all(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text.push_str(&fs::read_to_string(path).expect("a source file"));
        }
    }
}
