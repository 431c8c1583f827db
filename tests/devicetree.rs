//! The device trees under dt-schema, with the bindings of Linux.
//!
//! `cargo xtask test --only bindings` fetches both and says where they are: `ARMLET_DT_VALIDATE` is the
//! program, `ARMLET_DT_SCHEMA` the bindings as `dt-mk-schema` has processed them. Without them this is
//! skipped.

use std::process::Command;

/// What is not in the bindings, and why the trees have it all the same.
const KNOWN: &[(&str, &str, &str)] = &[
    (
        "(arm,pl031)",
        "'arm,primecell-periphid' does not match",
        "arm/primecell.yaml has it for each PrimeCell; given, it spares the guest eight exits",
    ),
    (
        "(arm,pl061)",
        "'arm,primecell-periphid' does not match",
        "arm/primecell.yaml has it for each PrimeCell; given, it spares the guest eight exits",
    ),
];

/// What older bindings want (Linux 6.12), and those of 7.3 do not.
const ONCE: &[(&str, &str, &str)] = &[
    (
        "(arm,pl061)",
        "'interrupt-controller' is a required property",
        "no device has its interrupts there; dtc warns of it without #address-cells, which no binding has",
    ),
    (
        "(arm,pl061)",
        "'#interrupt-cells' is a required property",
        "as above",
    ),
];

/// Machines beside the default ones: what is in a tree only then.
const MACHINES: &[&[&str]] = &[
    &["--board", "virt", "--cpus", "4", "--gic", "3"],
    &["--board", "virt", "--cpus", "130", "--gic", "3"],
    &[
        "--board", "virt", "--cpus", "8", "--gic", "2", "--host", "rpi4",
    ],
    &["--board", "virt", "--pv", "steal-time=on", "--pmu", "on"],
    &["--board", "virt", "--memory", "8G", "--cmdline", "a b"],
    &["--board", "virt", "--vmgenid", "on"],
];

#[test]
fn device_trees_follow_their_bindings() {
    let variable = |name: &str| std::env::var(name).ok();
    let found = (variable("ARMLET_DT_VALIDATE"), variable("ARMLET_DT_SCHEMA"));
    let (Some(program), Some(schema)) = found else {
        println!(
            "skipped: needs dt-schema and Linux's bindings; `cargo xtask test --only bindings` \
             fetches them"
        );
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    let boards = armlet(&["boards"]);
    let boards = boards
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    let boards: Vec<[&str; 4]> = boards
        .map(|name| ["--board", name, "--host", name])
        .collect();
    let machines = MACHINES
        .iter()
        .copied()
        .chain(boards.iter().map(|words| &words[..]));
    let mut trees = Vec::new();
    for (number, machine) in machines.enumerate() {
        let path = folder.path().join(format!("{number}.dtb"));
        let mut words = vec!["plan", "--dtb", path.to_str().expect("a path")];
        words.extend(machine);
        let status = Command::new(env!("CARGO_BIN_EXE_armlet"))
            .args(&words)
            .output();
        // Boards whose host runs no guests have no tree, and those of x86 neither.
        if status.is_ok_and(|output| output.status.success()) && path.exists() {
            trees.push((path, machine.join(" ")));
        }
    }
    assert!(trees.len() > MACHINES.len() + 10, "{} trees", trees.len());
    let output = Command::new(&program)
        .arg("-s")
        .arg(&schema)
        .args(trees.iter().map(|(path, _)| path))
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program}: {error}"));
    assert!(
        output.status.success(),
        "{program} ended with {}",
        output.status
    );
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let findings: Vec<&str> = said
        .lines()
        .filter(|line| line.contains(".dtb: "))
        .collect();
    let is_known = |line: &&str, (node, what, _): &(&str, &str, &str)| {
        line.contains(node) && line.contains(what)
    };
    let new: Vec<&&str> = findings
        .iter()
        .filter(|line| !KNOWN.iter().chain(ONCE).any(|known| is_known(line, known)))
        .collect();
    assert!(new.is_empty(), "the bindings do not have it so: {new:#?}");
    for known in KNOWN {
        let still = findings.iter().any(|line| is_known(line, known));
        assert!(
            still,
            "the bindings have it now, or the trees do not: {known:?}"
        );
    }
}

fn armlet(words: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_armlet"))
        .args(words)
        .output();
    String::from_utf8(output.expect("armlet can be run").stdout).expect("text")
}
