use crate::bad::{Bad, armlet, assert_refused};
use crate::guest::Armlet;
use crate::kernels::gzip;
use crate::rig;
use crate::software::{Image, Program, bz_image};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const VIRT: &str = include_str!("../../boards/virt.toml");

fn assert_accepted(arguments: &[&str]) {
    let output = armlet(arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "armlet {arguments:?}: {errors}");
}

/// The value of the option that a message advises: what stands behind `--memory `, say.
fn advised<'a>(line: &'a str, option: &str) -> &'a str {
    let rest = line
        .rsplit_once(&format!("{option} "))
        .map(|(_, rest)| rest);
    let value = rest.and_then(|rest| rest.split_whitespace().next());
    value.unwrap_or_else(|| panic!("no advice about {option} in {line}"))
}

fn kernels() -> Bad {
    let image = Program::default().print("up\n").power_off().image();
    let mut bad = Bad::kernels(&image);
    let header = bad.file("header.gz", &gzip(&image)[..15]);
    bad.case(&["--kernel", &header], 2, &[]);
    let other = bad.file("bzImage", &bz_image());
    bad.case(
        &["--kernel", &other],
        2,
        &["this is an x86_64 bzImage", "arm64 Image"],
    );
    let elf = bad.file(
        "vmlinux",
        b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\0\0\0\0",
    );
    bad.case(&["--kernel", &elf], 2, &["this is an ELF file for x86_64"]);
    let damaged = Image {
        memory: 1 << 40,
        ..Image::default()
    };
    let damaged = bad.file("damaged", &damaged.holding(&Program::default()));
    bad.case(
        &["--kernel", &damaged],
        2,
        &["0x10000000000 bytes", "damaged header"],
    );
    bad
}

fn options() -> Bad {
    Bad::options(&Program::default().power_off().image())
}

fn unknown_boards() -> Bad {
    Bad::unknown_boards(&Program::default().power_off().image())
}

fn boards() -> Bad {
    let mut bad = Bad::new();
    let mut case = |name: &str, from: &str, to: &str, words: &[&'static str]| {
        let text = VIRT.replacen(from, to, 1);
        assert_ne!(text, VIRT, "{name}: {from:?} is not in boards/virt.toml");
        let path = bad.file(&format!("{name}.toml"), text.as_bytes());
        bad.case(&["--board", &path], 2, words);
    };
    case(
        "unknown-key",
        "[guest]",
        "[guest]\ncpu = 1",
        &["unknown key 'cpu' in", "did you mean 'cpus'"],
    );
    case(
        "unknown-table",
        "[gic]",
        "[gicc]",
        &["unknown key 'gicc'", "did you mean 'gic'"],
    );
    case("missing", "arch = \"aarch64\"", "", &["lacks 'arch'"]);
    case(
        "missing-in-table",
        "redistributors = 0x080a_0000",
        "",
        &["lacks 'redistributors'"],
    );
    case("type", "cpus = 1", "cpus = \"one\"", &["'cpus'"]);
    case(
        "syntax",
        "[guest]",
        "[guest",
        &["line 21: expected", "found"],
    );
    case(
        "unknown-device",
        "kind = \"pl031\"",
        "kind = \"pl030\"",
        &["pl030", "pl031"],
    );
    case(
        "overlap",
        "base = 0x0901_0000",
        "base = 0x0900_0000",
        &[
            "PL011 serial console (0x9000000",
            "PL031 real-time clock (0x9000000",
            "overlap",
        ],
    );
    case(
        "in-ram",
        "base = 0x0901_0000",
        "base = 0x4000_1000",
        &["guest RAM", "overlap"],
    );
    case("shared", "spi = 2", "spi = 1", &["share SPI 1"]);
    case(
        "no-such-interrupt",
        "spi = 2",
        "spi = 2000",
        &["SPI", "2000"],
    );
    bad
}

#[test]
fn plan_refuses_bad_kernels_and_initrds() {
    kernels().assert_refused_by(&["plan", "--host", "virt"]);
}

#[test]
fn plan_refuses_bad_options() {
    options().assert_refused_by(&["plan", "--host", "virt"]);
    unknown_boards().assert_refused_by(&["plan", "--host", "virt"]);
}

#[test]
fn plan_refuses_bad_boards() {
    boards().assert_refused_by(&["plan", "--host", "virt"]);
}

#[test]
fn run_refuses_what_plan_refuses() {
    let Some(_) = rig::any() else { return };
    kernels().assert_refused_by(&["run"]);
    options().assert_refused_by(&["run"]);
    unknown_boards().assert_refused_by(&["run"]);
    let bad = boards();
    let kernel = bad.file("kernel", &Program::default().power_off().image());
    bad.assert_refused_by(&["run", "--kernel", &kernel]);
}

#[test]
fn a_run_that_is_refused_changes_no_image() {
    let Some(_) = rig::any() else { return };
    let Some(qemu_img) = rig::program("qemu-img") else {
        return;
    };
    let bad = Bad::new();
    let kernel = bad.file("kernel", &Program::default().power_off().image());
    let truncated = bad.file(
        "truncated",
        &gzip(&Program::default().image_of(1 << 20))[..512],
    );
    let image = bad.folder.path().join("disk.qcow2");
    let image = image.to_str().expect("UTF-8");
    for words in [
        &["create", "-q", "-f", "qcow2", image, "1M"] as &[&str],
        &["bitmap", "--add", image, "b0"],
    ] {
        let output = Command::new(&qemu_img).args(words).output();
        let output = output.expect("qemu-img can be run");
        assert!(output.status.success(), "{words:?}: {output:?}");
    }
    let before = fs::read(image).expect("an image");
    let disk = format!("path={image},format=qcow2");
    for (arguments, words) in [
        (&["--cpus", "600"] as &[&str], "600 vCPUs"),
        (&["--memory", "64K"], "--memory"),
        (&["--disk", "/nonexistent"], "No such file"),
        (&["--net", "tap=armlet-none"], "armlet-none"),
        (&["--kernel", &truncated], "truncated"),
    ] {
        let mut all = vec!["run", "--disk", &disk];
        if !arguments.contains(&"--kernel") {
            all.extend(["--kernel", &kernel]);
        }
        all.extend(arguments);
        let output = armlet(&all);
        let line = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && line.contains(words), "{line}");
        let after = fs::read(image).expect("an image");
        assert!(after == before, "{arguments:?}: the image has changed");
    }
}

#[test]
fn contradictions_and_unknown_words_are_refused() {
    assert_refused(
        &["plan", "--json", "--dts"],
        2,
        &["--json and --dts exclude one another"],
    );
    assert_refused(&["run"], 2, &["run needs a kernel"]);
    assert_refused(
        &["plan", "--initrd", "/dev/null"],
        2,
        &["--initrd without --kernel"],
    );
    assert_refused(&["run", "--on-reset", "sometimes"], 2, &["restart or exit"]);
    assert_refused(
        &["plan", "--host", "moon"],
        2,
        &["board 'moon' is not known"],
    );
    assert_refused(&["start"], 2, &["run, plan, probe, boards"]);
    assert_refused(&[], 2, &["no command given"]);
    assert_refused(&["run", "-append", "quiet"], 2, &["use --cmdline"]);
    let line = assert_refused(&["plan", "-smp", "4"], 2, &["use --cpus"]);
    assert!(!line.contains("--hugepages"), "{line}");
    assert_refused(
        &["boards", "--show", "moon"],
        2,
        &["board 'moon' is not known"],
    );
    let output = armlet(&["plan", "--dtb", "/nonexistent/tree"]);
    let line = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{line}");
    assert!(
        line.contains("/nonexistent/tree") && line.lines().count() == 1,
        "{line}"
    );
}

#[test]
fn a_board_that_runs_no_guests_is_no_host_to_plan_for() {
    for arguments in [
        &["plan", "--host", "rpi3"] as &[&str],
        &["plan", "--host", "rpi3", "--board", "virt"],
    ] {
        let line = assert_refused(arguments, 3, &["Raspberry Pi 3 has no GIC"]);
        assert!(!line.contains("works here"), "{line}");
        let (_, advised) = line.split_once("'armlet ").expect("a command");
        let (command, _) = advised.split_once('\'').expect("its end");
        let words: Vec<&str> = command.split(' ').collect();
        assert_accepted(&words);
    }
}

#[test]
fn nobody_waits_for_a_fifo() {
    let bad = Bad::new();
    let path = bad.folder.path().join("fifo");
    let (mode, kind) = (
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        rustix::fs::FileType::Fifo,
    );
    rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, 0).expect("a FIFO");
    let path = path.to_str().expect("UTF-8");
    let pmem = format!("path={path}");
    for (arguments, status) in [
        (["--kernel", path], 2),
        (["--board", path], 2),
        (["--pmem", &pmem], 2),
        // A plan needs to know nothing of it but whether a guest can start from it.
        (["--disk", path], 0),
        (["--dtb", path], 1),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_armlet"));
        command.args(["plan", "--host", "virt"]).args(arguments);
        let stdio = (Stdio::null(), Stdio::piped());
        let child = command.stdout(stdio.0).stderr(stdio.1).spawn();
        let mut child = child.expect("armlet can be run");
        let begun = Instant::now();
        let ended = loop {
            match child.try_wait().expect("a process") {
                Some(ended) => break ended,
                None if begun.elapsed() > Duration::from_secs(60) => {
                    child.kill().expect("a process");
                    panic!("plan {arguments:?} waits");
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let output = child.wait_with_output().expect("a process");
        let line = String::from_utf8_lossy(&output.stderr);
        assert_eq!(ended.code(), Some(status), "{arguments:?}: {line}");
        assert_eq!(line.contains("FIFO"), status != 0, "{arguments:?}: {line}");
    }
}

#[test]
fn a_device_tree_is_for_its_owner_alone() {
    let bad = Bad::new();
    let path = bad.file("tree.dtb", b"others may read this");
    let open = fs::Permissions::from_mode(0o644);
    fs::set_permissions(&path, open).expect("a file");
    let new = bad.folder.path().join("new.dtb");
    for path in [&path, new.to_str().expect("UTF-8")] {
        let output = armlet(&["plan", "--host", "virt", "--dtb", path]);
        assert!(output.status.success(), "{output:?}");
        let mode = fs::metadata(path).expect("a file").mode() & 0o777;
        assert_eq!(mode, 0o600, "{path}");
        let tree = fs::read(path).expect("a file");
        assert!(tree.starts_with(&[0xd0, 0x0d, 0xfe, 0xed]));
    }
}

#[test]
fn a_host_that_runs_no_guests_says_so() {
    if std::env::consts::ARCH == "aarch64" {
        println!("skipped: this host's guests are those of the board");
        return;
    }
    let bad = Bad::new();
    let kernel = bad.file("kernel", &Program::default().power_off().image());
    let words = [
        "board 'virt' is for aarch64 guests",
        "'armlet plan --board virt' shows it",
    ];
    assert_refused(&["run", "--board", "virt", "--kernel", &kernel], 3, &words);
}

#[test]
fn a_host_without_kvm_is_told_what_to_do() {
    if Path::new("/dev/kvm").exists() {
        println!("skipped: this host has KVM");
        return;
    }
    let output = armlet(&["probe"]);
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}");
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("STOPS"), "{text}");
    let output = armlet(&["probe", "--json"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("\"runs_guests\": false"), "{text}");
}

#[test]
fn a_user_without_permission_is_told_what_gives_it() {
    let Some(_) = rig::any() else { return };
    let before = fs::metadata("/dev/kvm").expect("/dev/kvm").mode();
    if !rustix::process::geteuid().is_root() || before & 0o006 != 0 {
        println!("skipped: every user here may use /dev/kvm, or this one may not be another");
        return;
    }
    // A folder that others can enter.
    let bad = Bad::new();
    let open = fs::Permissions::from_mode(0o755);
    fs::set_permissions(bad.folder.path(), open).expect("a folder");
    let kernel = bad.file("kernel", &Program::default().power_off().image());
    let set_mode = |mode| {
        fs::set_permissions("/dev/kvm", fs::Permissions::from_mode(mode)).expect("/dev/kvm");
    };
    let say = |arguments: &[&str], status| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_armlet"));
        let output = command.args(arguments).uid(1000).gid(1000).output();
        let output = output.expect("armlet can be run");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        println!("{said}");
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {said}");
        said
    };
    set_mode(0o600);
    let run = ["run", "--kernel", &kernel];
    let said = say(&run, 3);
    assert!(
        said.contains("cannot open /dev/kvm: permission denied"),
        "{said}"
    );
    // To join a group would not help: none may open it.
    assert!(!said.contains("usermod"), "{said}");
    let probed = say(&["probe"], 3);
    assert!(probed.contains("/dev/kvm may not be opened"), "{probed}");
    let (_, command) = said.split_once('\'').expect("a command");
    let (command, _) = command.split_once('\'').expect("its end");
    let done = Command::new("sh").args(["-c", command]).status();
    assert!(done.expect("a shell").success(), "{command}");
    say(&run, 0);
    set_mode(before & 0o777);
}

/// Follows what is advised, option by option, until armlet takes the arguments.
fn follow(arguments: &[&str]) {
    let mut words: Vec<String> = arguments.iter().map(|word| (*word).to_owned()).collect();
    let mut said = Vec::new();
    for _ in 0..3 {
        let shown: Vec<&str> = words.iter().map(String::as_str).collect();
        let output = armlet(&shown);
        if output.status.success() {
            assert!(!said.is_empty(), "{arguments:?} is no bad example");
            return;
        }
        let line = String::from_utf8_lossy(&output.stderr).into_owned();
        let advised = |lead: &str| {
            let (_, rest) = line.rsplit_once(lead)?;
            let mut rest = rest.split([' ', ',', ')', '\n']);
            let option = format!("--{}", rest.next()?);
            Some((option, rest.next().unwrap_or_default().to_owned()))
        };
        let found = advised("use --").or_else(|| advised("the next that is: --"));
        let found = found.or_else(|| {
            // "; for 1536 MiB use 1536M".
            let (_, size) = line.trim_end().rsplit_once(" MiB use ")?;
            Some(("--memory".to_owned(), size.to_owned()))
        });
        let found = found.or_else(|| {
            // "--gic is for aarch64 guests; leave it out".
            let words = line.strip_prefix("armlet: ")?;
            line.contains("leave it out").then_some(())?;
            Some((words.split([' ', ':']).next()?.to_owned(), String::new()))
        });
        let (option, value) = found.unwrap_or_else(|| panic!("{arguments:?}: no advice: {line}"));
        let at = words.iter().position(|word| *word == option);
        match (at, value.is_empty()) {
            (Some(at), true) => drop(words.drain(at..at + 2)),
            (Some(at), false) => words[at + 1] = value,
            (None, _) => words.extend([option, value]),
        }
        said.push(line);
    }
    panic!("{arguments:?}: {said:?}");
}

#[test]
fn each_option_that_plan_advises_leads_to_a_plan() {
    let bad = Bad::new();
    let kernel = bad.file("kernel", &Program::default().power_off().image());
    let initrd = bad.sparse("initrd", b"", 300 << 20);
    for arguments in [
        &["--memory", "1536"] as &[&str],
        &["--memory", "1048577"],
        &["--memory", "0"],
        &["--memory", "300T"],
        &["--memory", "16777215T"],
        &["--memory", "64K", "--kernel", &kernel],
        &["--memory", "128M", "--kernel", &kernel, "--initrd", &initrd],
        &["--cpus", "0"],
        &["--cpus", "513"],
        &["--cpus", "600", "--gic", "2"],
        &["--gic", "2"],
        &["--gic", "3", "--host", "rpi4", "--cpus", "20"],
        &["--ipa-bits", "32", "--memory", "8G"],
        &["--ipa-bits", "49"],
        &["--hugepages", "1G", "--memory", "1536M"],
        &[
            "--hugepages",
            "16G",
            "--memory",
            "1536M",
            "--page-size",
            "64K",
            "--host",
            "grace",
        ],
        &["--hugepages", "1G", "--mergeable"],
        &["--exits", "mwait=off"],
        &["--board", "pc", "--gic", "3"],
        &["--board", "pc", "--cpus", "1025"],
        &["--board", "pc", "--hugepages", "1G", "--memory", "1536M"],
        &["--board", "pc", "--memory", "70000G"],
        &["--sve", "on", "--host", "rpi4"],
        &["--pmu", "on", "--host", "m1-asahi"],
    ] {
        let host: &[&str] = match arguments.contains(&"--host") || arguments.contains(&"--board") {
            true => &[],
            false => &["--host", "virt"],
        };
        follow(&[&["plan"], host, arguments].concat());
    }
}

#[test]
fn the_advice_about_memory_is_good() {
    let bad = Bad::new();
    let image = Image {
        memory: 100 << 20,
        ..Image::default()
    };
    let kernel = bad.file("kernel", &image.holding(&Program::default()));
    let line = assert_refused(
        &[
            "plan", "--host", "virt", "--kernel", &kernel, "--memory", "64M",
        ],
        2,
        &["64M", "104857600"],
    );
    assert_accepted(&[
        "plan",
        "--host",
        "virt",
        "--kernel",
        &kernel,
        "--memory",
        advised(&line, "--memory"),
    ]);

    // The board's assumed host has 48 bits, of which RAM begins at 1 GiB.
    let line = assert_refused(
        &["plan", "--host", "virt", "--memory", "300T"],
        3,
        &["offers 48", "needs 49"],
    );
    let most = advised(&line, "--memory");
    assert_eq!(most, "262143G");
    assert_accepted(&["plan", "--host", "virt", "--memory", most]);
    assert_refused(
        &["plan", "--host", "virt", "--memory", "268434433M"],
        3,
        &["use --memory 262143G or less"],
    );
}

#[test]
fn the_largest_memory_for_this_host_is_named() {
    let Some(rig) = rig::any() else { return };
    let bad = Bad::new();
    let kernel = bad.file("kernel", &Program::default().power_off().image());
    let limit = rig.facts.ipa_limit;
    let memory = format!("{}G", 1_u64 << (limit - 30));
    let line = assert_refused(
        &["run", "--kernel", &kernel, "--memory", &memory],
        3,
        &["guest RAM ends at 0x", "use --memory "],
    );
    let numbers = format!(
        "needs {} address bits; this host offers {limit};",
        limit + 1
    );
    assert!(line.contains(&numbers), "{line}");
    let most = advised(&line, "--memory");
    assert_eq!(most, format!("{}G", (1_u64 << (limit - 30)) - 1));
    assert_accepted(&["plan", "--host", "this", "--memory", most]);
}

#[test]
fn vcpus_beyond_the_interrupt_controller_are_refused() {
    assert_refused(
        &["plan", "--host", "virt", "--cpus", "513"],
        2,
        &["513 vCPUs", "--cpus 512 or fewer"],
    );
    let bad = Bad::new();
    let board = bad.file(
        "old.toml",
        VIRT.replace("gic = [3]", "gic = [2]").as_bytes(),
    );
    assert_refused(
        &["plan", "--board", &board, "--cpus", "9"],
        2,
        &["9 vCPUs", "--cpus 8 or fewer"],
    );
    assert_refused(
        &["plan", "--host", "virt", "--gic", "2"],
        3,
        &["GICv2", "GICv3"],
    );

    let Some(rig) = rig::any() else { return };
    let kernel = bad.file("kernel", &Program::default().power_off().image());
    let run = |arguments: &[&str], status, words: &[&str]| {
        assert_refused(
            &[&["run", "--kernel", &kernel], arguments].concat(),
            status,
            words,
        );
    };
    if rig.has_gic_v3() {
        run(&["--cpus", "513"], 2, &["513 vCPUs", "--cpus 512 or fewer"]);
        run(&["--gic", "2"], 3, &["GICv2 is not offered"]);
    } else {
        run(
            &["--cpus", "9"],
            2,
            &["9 vCPUs", "GICv2", "--cpus 8 or fewer"],
        );
        run(&["--gic", "3"], 3, &["GICv3 is not offered"]);
    }
}

#[test]
fn damage_that_only_unpacking_finds_ends_the_run() {
    let Some(_) = rig::any() else { return };
    let image = Program::default()
        .print("up\n")
        .power_off()
        .image_of(1 << 20);
    let packed = gzip(&image);
    let mut flipped = packed.clone();
    let middle = packed.len() - 6;
    flipped[middle] ^= 1;
    for (what, file) in [
        ("truncated", &packed[..packed.len() - 100]),
        ("damaged", &flipped),
    ] {
        let outcome = Armlet::image(file).run();
        outcome.assert_status(2);
        println!("{what}: {}", outcome.errors);
        assert_eq!(
            outcome.errors.lines().count(),
            1,
            "{what}: {}",
            outcome.errors
        );
        assert_eq!(outcome.text(), "", "{what}");
    }
}

#[test]
fn a_plan_that_nobody_reads_is_an_error_in_one_line() {
    for arguments in [
        &["plan", "--host", "virt"] as &[&str],
        &["plan", "--host", "virt", "--json"],
        &["plan", "--host", "virt", "--dts"],
        &["boards"],
        &["--help"],
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_armlet"));
        command
            .args(arguments)
            .stdout(writer)
            .stderr(Stdio::piped());
        let output = command.output().expect("armlet can be run");
        let line = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {line}");
        assert!(
            line.starts_with("armlet: cannot write to standard output: ")
                && line.lines().count() == 1,
            "{arguments:?}: {line}"
        );
    }
}
