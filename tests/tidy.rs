//! The rules that keep the repository as it was laid out, each as a test over the source tree.
//! A failure names the file and the line.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// Which module uses which.
#[path = "tidy/modules.rs"]
mod modules;

// -------------------------------------------------------------------------------- the rules

#[test]
fn one_file_chooses_the_architecture() {
    let mut findings = Findings::new(
        "only src/kvm/mod.rs chooses the architecture; everything else compiles everywhere \
         (xtask asks std::env::consts::ARCH)",
    );
    for file in sources(ALL).iter().chain(&manifests()) {
        if file.path != "src/kvm/mod.rs" {
            findings.add_lines(file, |line| line.code.contains("target_arch"));
        }
    }
    findings.assert_none();
}

#[test]
fn pure_crates_name_nothing_of_the_world() {
    const WORLD: &[&str] = &[
        "kvm_ioctls",
        "kvm_bindings",
        "vm_memory",
        "libc",
        "rustix",
        "std::env",
        "std::fs",
        "std::io",
        "std::net",
        "std::process",
        "std::thread",
        "SystemTime",
        "Instant::now",
    ];
    let mut findings = Findings::new("arch and fdt decide without I/O, KVM, threads or the host");
    for file in &sources(&["arch", "fdt"]) {
        findings.add_words(file, WORLD);
    }
    findings.assert_none();
}

#[test]
fn devices_know_neither_kvm_nor_the_plan() {
    let mut findings = Findings::new("devices know offsets and wires, no KVM and no plan");
    for file in &sources(&["devices"]) {
        let words = [
            "kvm_ioctls",
            "kvm_bindings",
            "armlet_arch",
            "armlet_fdt",
            "std::fs",
        ];
        findings.add_words(file, &words);
    }
    findings.assert_none();
}

#[test]
fn backends_know_neither_kvm_nor_the_plan_nor_the_command_line() {
    let mut findings = Findings::new(
        "backends know files, sockets and other processes; system knows this process and its host",
    );
    for file in &sources(&["backends", "system"]) {
        let words = [
            "kvm_ioctls",
            "kvm_bindings",
            "armlet_arch",
            "armlet_fdt",
            "argh",
        ];
        findings.add_words(file, &words);
    }
    for file in &sources(&["system"]) {
        findings.add_words(file, &["armlet_backends", "vm_memory", "VirtioDevice"]);
    }
    findings.assert_none();
}

#[test]
fn files_of_snapshots_know_no_machines() {
    let mut findings =
        Findings::new("snapshot knows files and memory, and of a machine what its caller gives it");
    for file in &sources(&["snapshot"]) {
        let words = [
            "kvm_ioctls",
            "kvm_bindings",
            "armlet_arch",
            "armlet_backends",
            "armlet_devices",
            "armlet_fdt",
            "argh",
        ];
        findings.add_words(file, &words);
    }
    findings.assert_none();
}

#[test]
fn the_device_tree_crate_knows_no_machines() {
    let mut findings = Findings::new("fdt is about trees, not about virtual machines");
    for file in &sources(&["fdt"]) {
        findings.add_words(file, &["armlet_arch", "armlet_devices"]);
    }
    findings.assert_none();
}

#[test]
fn dependencies_point_one_way() {
    let mut findings = Findings::new(
        "src -> backends -> system -> devices, src -> snapshot -> system, src -> arch -> fdt, and no other way",
    );
    let plan = ["kvm-ioctls", "kvm-bindings", "armlet-arch", "armlet-fdt"];
    let kvm = ["kvm-ioctls", "kvm-bindings", "vm-memory", "rustix", "libc"];
    for (folder, forbidden) in [
        ("arch", [kvm.as_slice(), &["armlet-devices"]].concat()),
        (
            "fdt",
            [kvm.as_slice(), &["armlet-devices", "armlet-arch"]].concat(),
        ),
        (
            "devices",
            [
                &plan,
                [
                    "armlet-backends",
                    "armlet-snapshot",
                    "armlet-system",
                    "rustix",
                    "libc",
                ]
                .as_slice(),
            ]
            .concat(),
        ),
        (
            "system",
            [&plan, ["armlet-backends", "armlet-snapshot"].as_slice()].concat(),
        ),
        (
            "snapshot",
            [
                &plan,
                ["armlet-backends", "armlet-devices", "argh"].as_slice(),
            ]
            .concat(),
        ),
        (
            "api",
            [
                &plan,
                ["armlet-backends", "armlet-devices", "vm-memory"].as_slice(),
            ]
            .concat(),
        ),
        (
            "backends",
            [&plan, ["argh", "linux-loader"].as_slice()].concat(),
        ),
    ] {
        let manifest = Source::read(&format!("{folder}/Cargo.toml"));
        findings.add_words(&manifest, &forbidden);
    }
    findings.assert_none();
}

#[test]
fn modules_use_one_another_in_no_circle() {
    let crates = [
        "api/src/lib.rs",
        "arch/src/lib.rs",
        "backends/src/lib.rs",
        "devices/src/lib.rs",
        "fdt/src/lib.rs",
        "snapshot/src/lib.rs",
        "src/lib.rs",
        "system/src/lib.rs",
        "xtask/src/main.rs",
    ];
    let mut found = Vec::new();
    for root in crates {
        let (folder, _) = root.rsplit_once('/').expect("a folder");
        let files: Vec<_> = sources(&[folder])
            .into_iter()
            .map(|file| (file.path, file.text))
            .collect();
        found.extend(modules::circles(root, &files));
    }
    assert!(
        found.is_empty(),
        "modules that use each other in a circle cannot be understood one by one; move what both \
         need into a module below them (tests/tidy/modules.rs says what counts):\n  {}",
        found.join("\n  ")
    );
}

#[test]
fn unsafe_stands_where_it_must() {
    const ALLOWED: &[&str] = &[
        "src/memory.rs",
        "src/memory/image.rs",
        "src/memory/tests.rs",
        "src/heap.rs",
        "src/jail/sys.rs",
        "src/kernel/unpacker/sys.rs",
        "src/abort.rs",
        "src/descriptors.rs",
        "src/sandbox/tests.rs",
        "src/sandbox/trap.rs",
        "src/thread_name.rs",
        "src/machine.rs",
        "system/src/descriptors.rs",
        "system/src/landlock.rs",
        "system/src/page_size.rs",
        "system/src/raise.rs",
        "system/src/scheduling.rs",
        "system/src/seccomp.rs",
        "system/src/signals.rs",
        "system/src/terminal.rs",
        "backends/src/broker/keeper/confine.rs",
        "backends/src/broker/sys.rs",
        "backends/src/disk/qcow2/storage.rs",
        "backends/src/disk/qcow2/zstd.rs",
        "backends/src/disk/lent.rs",
        "backends/src/disk/sys.rs",
        "backends/src/net/sys.rs",
        "backends/src/pages.rs",
        "backends/src/vhost.rs",
        "snapshot/src/faults.rs",
        "snapshot/src/tests/faults.rs",
        "snapshot/src/prefetch.rs",
        // A guest's own drivers and memory.
        "tests/boot/drivers.rs",
        // Gives pages to another process.
        "tests/boot/handler.rs",
        // Asks KVM for a register of its interrupt controller.
        "tests/boot/interrupts.rs",
    ];
    let mut findings = Findings::new(
        "unsafe belongs to src/kvm/, to memory and to the few system calls that need it",
    );
    for file in sources(ALL) {
        if !ALLOWED.contains(&&*file.path) && !file.path.starts_with("src/kvm/") {
            // Not the word, which other programs have for other things.
            let uses = [
                "unsafe {",
                "unsafe fn",
                "unsafe impl",
                "unsafe extern",
                "unsafe trait",
            ];
            findings.add_lines(&file, |line| {
                uses.iter().any(|r#use| line.code.contains(r#use))
            });
        }
    }
    findings.assert_none();
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    let mut findings =
        Findings::new("a comment '// SAFETY: ...' goes directly before an unsafe block or impl");
    for file in sources(ALL) {
        for (index, line) in file.lines.iter().enumerate() {
            let opens = ["unsafe {", "unsafe impl", "unsafe extern"];
            if opens.iter().any(|open| line.code.contains(open)) && !file.is_justified(index) {
                findings.add(&file, line);
            }
        }
    }
    findings.assert_none();
}

#[test]
fn one_module_writes_to_standard_error() {
    let mut findings = Findings::new(
        "messages::say and the log macros are how something is said: they never wait, and make \
         control characters visible",
    );
    for file in sources(&[
        "src", "api", "backends", "system", "devices", "arch", "fdt", "snapshot",
    ]) {
        if file.path != "system/src/messages.rs" {
            let words = ["eprint!", "eprintln!", "stderr()", "io::stderr"];
            findings.add_lines(&file, |line| {
                !line.is_test && words.iter().any(|word| line.code.contains(word))
            });
        }
    }
    findings.assert_none();
}

#[test]
fn one_module_owns_the_interrupts_of_a_vm() {
    let calls = ["set_irq_line(", "register_irqfd", "set_gsi_routing("];
    let mut findings = Findings::new("src/kvm/interrupts.rs raises and routes interrupts");
    for file in sources(&["src", "backends"]) {
        if file.path != "src/kvm/interrupts.rs" {
            findings.add_lines(&file, |line| {
                calls.iter().any(|call| line.code.contains(call))
            });
        }
    }
    findings.assert_none();
}

#[test]
fn one_module_opens_the_files_that_users_name() {
    // The standard library's ways wait for a FIFO's other end and open devices. Devices of the host
    // are opened by rustix, by names that are written in the source.
    const WAYS: &[&str] = &[
        "File::open(",
        "File::options(",
        "OpenOptions",
        "File::create",
        "fs::write(",
    ];
    let mut findings = Findings::new("system/src/files.rs opens and makes files");
    for file in &sources(&["src", "api", "backends", "snapshot", "system"]) {
        findings.add_lines(file, |line| {
            !line.is_test && WAYS.iter().any(|way| line.code.contains(way))
        });
    }
    findings.assert_none();
}

#[test]
fn one_module_makes_interrupted_calls_again() {
    let mut findings = Findings::new(
        "eintr::uninterrupted makes a call again that says EINTR, and CallError tells whether it did",
    );
    for file in sources(&["src", "api", "backends", "devices", "snapshot", "system"]) {
        // It has no system calls but those of its streams.
        let of_vsock = "devices/src/virtio/vsock/connection.rs";
        if file.path != "system/src/eintr.rs" && file.path != of_vsock {
            let names = ["Errno::INTR", "EINTR", "ErrorKind::Interrupted"];
            findings.add_lines(&file, |line| {
                !line.is_test && names.iter().any(|name| line.code.contains(name))
            });
        }
        // These say it whatever the handlers of signals are (signal(7)).
        if !file.path.starts_with("devices/")
            && !["system/src/eintr.rs", "system/src/deadline.rs"].contains(&&*file.path)
        {
            let waits = ["epoll.wait(", "event::poll("];
            findings.add_lines(&file, |line| {
                !line.is_test && waits.iter().any(|wait| line.code.contains(wait))
            });
        }
    }
    findings.assert_none();
}

#[test]
fn one_module_takes_locks_and_rings() {
    let mut findings =
        Findings::new("sync::lock takes a lock, sync::bell makes an eventfd, sync::ring rings it");
    for file in sources(&["src", "api", "backends", "devices", "snapshot", "system"]) {
        if file.path != "devices/src/sync.rs" {
            let ways = [".lock().unwrap_or_else(", "EventFd::new(", ".write(1)"];
            findings.add_lines(&file, |line| {
                !line.is_test && ways.iter().any(|way| line.code.contains(way))
            });
        }
    }
    findings.assert_none();
}

#[test]
fn unwrap_stands_in_tests_only() {
    let mut findings =
        Findings::new("outside tests an error is returned, or expect says why there is none");
    for file in sources(ALL) {
        findings.add_lines(&file, |line| {
            !line.is_test && line.code.contains(".unwrap()")
        });
    }
    findings.assert_none();
}

#[test]
fn names_say_what_a_thing_is() {
    const EMPTY_WORDS: &[&str] = &["Manager", "Helper", "Util", "Common"];
    let mut findings = Findings::new("a name says what a thing is, not that it manages or helps");
    for file in sources(ALL) {
        findings.add_lines(&file, |line| {
            type_name(&line.code)
                .is_some_and(|name| EMPTY_WORDS.iter().any(|word| name.contains(word)))
        });
        let stem = file
            .path
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_lowercase();
        if EMPTY_WORDS
            .iter()
            .any(|word| stem.starts_with(&word.to_lowercase()))
        {
            findings.add(&file, &file.lines[0]);
        }
    }
    findings.assert_none();
}

#[test]
fn a_file_is_short_enough_to_read() {
    const MOST: usize = 1000;
    const MOST_WHERE_SPLIT: usize = 600;
    const SPLIT: &[&str] = &[
        "arch/",
        "devices/",
        "fdt/",
        "fuzz/",
        "snapshot/",
        "src/",
        "system/",
        "xtask/",
    ];
    let mut findings = Findings::new("a file is too long; split it by what it says");
    for file in sources(ALL) {
        // Tests of disks stand together.
        let is_product = file.path.starts_with("backends/") && !file.path.contains("/tests");
        let is_split = is_product || SPLIT.iter().any(|folder| file.path.starts_with(folder));
        let most = if is_split { MOST_WHERE_SPLIT } else { MOST };
        if let Some(line) = file.lines.get(most) {
            findings.add(&file, line);
        }
    }
    findings.assert_none();
}

#[test]
fn a_file_begins_by_saying_what_it_is() {
    let mut findings = Findings::new("a file begins with a //! comment");
    for file in sources(ALL) {
        let first = file.lines.first();
        if let Some(line) = first.filter(|line| !line.is_test && !line.text.starts_with("//!")) {
            findings.add(&file, line);
        }
    }
    findings.assert_none();
}

#[test]
fn every_board_is_built_in_and_has_golden_files() {
    let built_in = Source::read("src/boards.rs").text;
    for path in files(&root().join("boards"), "toml") {
        let name = path.file_stem().expect("a name").to_string_lossy();
        assert!(
            built_in.contains(&format!("    \"{name}\",\n")),
            "boards/{name}.toml: src/boards.rs: BUILT_IN lacks \"{name}\""
        );
        let board = fs::read_to_string(&path).expect("text");
        let has_tree = !board.contains("arch = \"x86_64\"");
        // A board on whose hosts no guest runs has the reason in place of a machine.
        let refused = board.contains("severity = \"stops\"");
        let wanted: &[&str] = match (refused, has_tree) {
            (true, _) => &["refusal"],
            (false, true) => &["map", "dts"],
            (false, false) => &["map"],
        };
        for kind in wanted {
            let golden = format!("tests/golden/{name}-default.{kind}");
            assert!(
                root().join(&golden).is_file(),
                "boards/{name}.toml: {golden} is missing; \
                 UPDATE_GOLDEN=1 cargo test --test plan writes it"
            );
        }
    }
}

/// By name: a function that shares its name with one that is called is not found.
#[test]
fn each_public_function_has_a_caller_beside_tests() {
    // What is to be asked of a balloon while a guest runs, which no option of armlet does; fuzzing
    // and tests ask it.
    const KEPT: &[&str] = &[
        "actual",
        "ask_for_statistics",
        "ask_for_hints",
        // Windows that move, as those of PCI will: tests move them.
        "insert_moving",
    ];
    let all = sources(&[
        "src", "api", "arch", "backends", "devices", "fdt", "snapshot", "system", "xtask",
    ]);
    let for_tests: Vec<&str> = all
        .iter()
        .flat_map(|file| file.lines.windows(2))
        .filter(|pair| pair[0].code.trim() == "#[cfg(test)]")
        .filter_map(|pair| pair[1].code.trim().strip_suffix(';')?.rsplit_once("mod "))
        .map(|(_, name)| name)
        .collect();
    let is_for_tests = |file: &Source| {
        let name = file.path.trim_end_matches(".rs").rsplit('/').next();
        name.is_some_and(|name| for_tests.contains(&name)) || file.path.contains("/tests/")
    };
    let (mut defined, mut words) = (Vec::new(), HashMap::new());
    for file in all.iter().filter(|file| !is_for_tests(file)) {
        let mut lines = file.lines.iter().peekable();
        while let Some(line) = lines.next() {
            if line.code.trim() == "#[cfg(test)]" {
                let next = lines.next().map(|next| next.code.trim());
                match next {
                    Some(next) if next.ends_with(';') => continue,
                    // Tests stand at the end of a file.
                    _ if !line.code.starts_with(' ')
                        && next.is_some_and(|next| next.starts_with("mod ")) =>
                    {
                        break;
                    }
                    _ => continue,
                }
            }
            let is_word = |c: char| c.is_alphanumeric() || c == '_';
            let found = line
                .code
                .split(|c| !is_word(c))
                .filter(|word| !word.is_empty());
            for word in found {
                *words.entry(word).or_insert(0) += 1;
            }
            let code = line.code.trim();
            if code.starts_with("pub")
                && file.path.split('/').next() != Some("xtask")
                && let Some((_, rest)) = code.split_once("fn ")
                && let Some(name) = rest.split(|c| !is_word(c)).next()
            {
                defined.push((file, line, name));
            }
        }
    }
    let mut findings = Findings::new("a public function is called by what is shipped, or goes");
    for (file, line, name) in &defined {
        let times = defined.iter().filter(|(.., other)| other == name).count();
        if words[name] <= times && !KEPT.contains(name) {
            findings.add(file, line);
        }
    }
    findings.assert_none();
}

#[test]
fn the_documents_exist() {
    for file in [
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "docs/ARCHITECTURE.md",
        "docs/how-a-guest-runs.md",
    ] {
        let text = fs::read_to_string(root().join(file)).unwrap_or_default();
        assert!(text.len() > 100, "{file} is missing or empty");
    }
    let decisions = files(&root().join("docs/adr"), "md");
    assert!(!decisions.is_empty(), "docs/adr/ has no decision");
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut documents = files(&root().join("docs"), "md");
    documents.extend(["README.md", "CHANGELOG.md"].map(|file| root().join(file)));
    let mut findings = Findings::new("a relative link names a file of the repository");
    for path in documents.iter().filter(|path| path.is_file()) {
        let file = Source::read(&relative(path));
        let folder = path.parent().expect("a folder");
        findings.add_lines(&file, |line| {
            line.text.split("](").skip(1).any(|rest| {
                let link = rest.split([')', '#', ' ']).next().unwrap_or_default();
                !link.is_empty() && !link.contains(':') && !folder.join(link).exists()
            })
        });
    }
    findings.assert_none();
}

// ----------------------------------------------------------------------------- the source tree

/// Folders with Rust in them.
const ALL: &[&str] = &[
    "src", "api", "arch", "backends", "devices", "fdt", "snapshot", "system", "tests", "xtask",
    "fuzz",
];

/// This file, which names all that it forbids.
const THIS: &str = "tests/tidy.rs";

/// A file with its lines.
struct Source {
    /// Below the repository, with slashes.
    path: String,
    text: String,
    lines: Vec<Line>,
}

struct Line {
    /// From 1.
    number: usize,
    text: String,
    /// The line without its comment.
    code: String,
    /// Whether it belongs to a test.
    is_test: bool,
}

impl Source {
    fn read(path: &str) -> Source {
        let text =
            fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
        let comment = if path.ends_with(".toml") { "#" } else { "//" };
        let mut is_test = path
            .split('/')
            .any(|part| part == "tests" || part == "tests.rs");
        let lines = text.lines().enumerate().map(|(index, line)| {
            // Tests stand at the end of a file.
            is_test |= line == "#[cfg(test)]";
            Line {
                number: index + 1,
                text: line.to_owned(),
                code: code_of(line, comment).to_owned(),
                is_test,
            }
        });
        Source {
            path: path.to_owned(),
            lines: lines.collect(),
            text,
        }
    }

    /// Whether the statement around line `index` or the comment before it has a SAFETY comment.
    fn is_justified(&self, index: usize) -> bool {
        let before = self.lines[..index].iter().rev();
        let statement = before.take_while(|line| {
            let code = line.code.trim();
            let is_comment = code.is_empty() && !line.text.trim().is_empty();
            is_comment || !(code.is_empty() || code.ends_with([';', '{', '}', ',']))
        });
        statement
            .chain([&self.lines[index]])
            .any(|line| line.text.contains("// SAFETY: "))
    }
}

/// `line` without the comment at its end.
fn code_of<'a>(line: &'a str, comment: &str) -> &'a str {
    let mut from = 0;
    while let Some(at) = line[from..].find(comment) {
        let before = &line[..from + at];
        // An even number of quotes: not within a string.
        if before.matches('"').count().is_multiple_of(2) {
            return before;
        }
        from += at + comment.len();
    }
    line
}

/// The name of the type that a line of code defines.
fn type_name(code: &str) -> Option<&str> {
    let mut words = code.split([' ', '<', '(', ';', ':', '{']);
    words.find(|word| ["struct", "enum", "trait", "union", "type"].contains(word))?;
    words.next()
}

fn sources(folders: &[&str]) -> Vec<Source> {
    let sources: Vec<_> = folders
        .iter()
        .flat_map(|folder| files(&root().join(folder), "rs"))
        .map(|path| relative(&path))
        .filter(|path| path != THIS)
        .map(|path| Source::read(&path))
        .collect();
    assert!(!sources.is_empty(), "no Rust below {folders:?}");
    sources
}

fn manifests() -> Vec<Source> {
    let members = [
        "",
        "api/",
        "arch/",
        "backends/",
        "devices/",
        "fdt/",
        "snapshot/",
        "system/",
        "xtask/",
    ];
    members
        .iter()
        .map(|folder| Source::read(&format!("{folder}Cargo.toml")))
        .collect()
}

fn root() -> PathBuf {
    // Where cargo runs it, not where it was compiled: a checkout may be copied with its build.
    std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

fn relative(path: &Path) -> String {
    let path = path.strip_prefix(root()).expect("a path of the repository");
    path.to_string_lossy().replace('\\', "/")
}

/// The files below `folder` whose names end in `extension`, in order.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(folder) else {
        return found;
    };
    for entry in entries {
        let path = entry.expect("an entry").path();
        if path.is_dir() && !path.ends_with("target") {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|known| known == extension) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Whether `code` has `word` as a word, not as part of a longer one.
fn has_word(code: &str, word: &str) -> bool {
    let is_part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    code.match_indices(word).any(|(at, _)| {
        let (before, after) = (&code[..at], &code[at + word.len()..]);
        !is_part(before.chars().next_back()) && !is_part(after.chars().next())
    })
}

/// Lines that break a rule.
struct Findings {
    rule: &'static str,
    lines: Vec<String>,
}

impl Findings {
    fn new(rule: &'static str) -> Findings {
        Findings {
            rule,
            lines: Vec::new(),
        }
    }

    fn add(&mut self, file: &Source, line: &Line) {
        let text = line.text.trim();
        self.lines
            .push(format!("{}:{}: {text}", file.path, line.number));
    }

    fn add_lines(&mut self, file: &Source, breaks: impl Fn(&Line) -> bool) {
        for line in file.lines.iter().filter(|line| breaks(line)) {
            self.add(file, line);
        }
    }

    fn add_words(&mut self, file: &Source, words: &[&str]) {
        self.add_lines(file, |line| {
            words.iter().any(|word| has_word(&line.code, word))
        });
    }

    fn assert_none(&self) {
        assert!(self.lines.is_empty(), "{self}");
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:\n  {}", self.rule, self.lines.join("\n  "))
    }
}

// ------------------------------------------------------------------ that the rules find something

#[test]
fn comments_are_no_code() {
    assert_eq!(code_of("let a; // unsafe", "//"), "let a; ");
    assert_eq!(code_of("let a = \"//\"; // b", "//"), "let a = \"//\"; ");
    assert_eq!(
        code_of("let a = \"http://b\";", "//"),
        "let a = \"http://b\";"
    );
}

#[test]
fn words_are_whole() {
    assert!(has_word("use std::fs;", "std::fs"));
    assert!(has_word("unsafe { f() }", "unsafe"));
    assert!(!has_word("#![deny(unsafe_code)]", "unsafe"));
    assert!(!has_word("use std::fss;", "std::fs"));
}

#[test]
fn names_of_types_are_found() {
    assert_eq!(
        type_name("pub(crate) struct IrqManager<T> {"),
        Some("IrqManager")
    );
    assert_eq!(type_name("    enum Util {"), Some("Util"));
    assert_eq!(type_name("let structure = 1;"), None);
}

#[test]
fn a_justification_stands_directly_before_its_block() {
    let source = |text: &str| Source {
        path: String::new(),
        text: String::new(),
        lines: text
            .lines()
            .enumerate()
            .map(|(number, line)| Line {
                number,
                text: line.to_owned(),
                code: code_of(line, "//").to_owned(),
                is_test: false,
            })
            .collect(),
    };
    let justified = |text: &str| {
        let source = source(text);
        source.is_justified(source.lines.len() - 1)
    };
    assert!(justified("// SAFETY: it is.\nunsafe { f() };"));
    assert!(justified(
        "// SAFETY: it is,\n// and more.\nlet a =\n    unsafe { f() };"
    ));
    assert!(!justified("// SAFETY: it is.\nf();\nunsafe { f() };"));
    assert!(!justified("// SAFETY: it is.\n\nunsafe { f() };"));
    assert!(!justified("unsafe { f() };"));
}
