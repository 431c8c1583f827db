use std::fs::{self, File};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

pub(crate) fn armlet(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_armlet"));
    let output = command.args(arguments).stdin(Stdio::null()).output();
    output.expect("armlet can be run")
}

/// The line on standard error with which armlet ends with `status`, if it is one line that has all
/// `words`; else what is wrong.
pub(crate) fn refusal(arguments: &[&str], status: i32, words: &[&str]) -> Result<String, String> {
    let output = armlet(arguments);
    let line = String::from_utf8_lossy(&output.stderr).into_owned();
    print!("{line}");
    let mut wrong = Vec::new();
    if output.status.code() != Some(status) {
        wrong.push(format!(
            "it ended with {}, not with {status}",
            output.status
        ));
    }
    if !line.starts_with("armlet: ") || line.lines().count() != 1 {
        wrong.push("this is not one line of armlet's".to_owned());
    }
    if !output.stdout.is_empty() {
        wrong.push("there was output".to_owned());
    }
    let missing = words.iter().filter(|word| !line.contains(**word));
    wrong.extend(missing.map(|word| format!("no {word:?}")));
    match wrong.is_empty() {
        true => Ok(line),
        false => Err(format!(
            "armlet {arguments:?} said\n{line}{}\n",
            wrong.join("; ")
        )),
    }
}

/// Fails unless armlet ends with `status` and one line on standard error that has all `words`.
/// Gives the line.
pub(crate) fn assert_refused(arguments: &[&str], status: i32, words: &[&str]) -> String {
    refusal(arguments, status, words).unwrap_or_else(|wrong| panic!("{wrong}"))
}

/// What is wrong with a command line, for `plan` on any computer and for `run` with KVM.
pub(crate) struct Case {
    arguments: Vec<String>,
    status: i32,
    words: Vec<&'static str>,
}

/// Files that are no good, and the cases about them.
pub(crate) struct Bad {
    pub(crate) folder: TempDir,
    cases: Vec<Case>,
}

impl Bad {
    pub(crate) fn new() -> Bad {
        Bad {
            folder: tempfile::tempdir().expect("a temporary folder"),
            cases: Vec::new(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        let path = self.folder.path().join(name);
        path.into_os_string()
            .into_string()
            .expect("a path in UTF-8")
    }

    pub(crate) fn file(&self, name: &str, data: &[u8]) -> String {
        let path = self.path(name);
        fs::write(&path, data).expect("a file");
        path
    }

    /// A file of `size` bytes that takes no room.
    pub(crate) fn sparse(&self, name: &str, start: &[u8], size: u64) -> String {
        let path = self.file(name, start);
        let file = File::options().write(true).open(&path);
        file.and_then(|file| file.set_len(size))
            .expect("a large file");
        path
    }

    pub(crate) fn case(&mut self, arguments: &[&str], status: i32, words: &[&'static str]) {
        self.cases.push(Case {
            arguments: arguments.iter().map(|word| (*word).to_owned()).collect(),
            status,
            words: words.to_vec(),
        });
    }

    /// Kernels and initrds that are no good anywhere, beside `image`, which is.
    pub(crate) fn kernels(image: &[u8]) -> Bad {
        let mut bad = Bad::new();
        let good = bad.file("good", image);

        bad.case(
            &["--kernel", "/nonexistent/Image"],
            2,
            &["kernel /nonexistent/Image: No such file"],
        );
        let folder = bad.path("");
        bad.case(&["--kernel", &folder], 2, &["it is a directory"]);
        let empty = bad.file("empty", b"");
        bad.case(&["--kernel", &empty], 2, &["it is empty"]);
        let text = bad.file("text", b"This is a text, and no kernel at all.\n");
        bad.case(
            &["--kernel", &text],
            2,
            &["no known kernel format", "arm64 Image"],
        );
        let short = bad.file("short", &image[..48]);
        bad.case(&["--kernel", &short], 2, &[]);
        let cut = bad.file("cut", &image[..image.len() - 4]);
        bad.case(&["--kernel", &cut], 2, &["truncated: there are", "need"]);
        let huge = bad.sparse("huge", image, (1 << 30) + 1);
        bad.case(
            &["--kernel", &huge],
            2,
            &["it has 1073741825 bytes", "at most 1073741824"],
        );

        bad.case(
            &["--kernel", &good, "--initrd", "/nonexistent/initrd"],
            2,
            &["/nonexistent/initrd"],
        );
        bad.case(
            &["--kernel", &good, "--initrd", &empty],
            2,
            &["initrd", "it is empty"],
        );
        let initrd = bad.sparse("initrd", b"", 1 << 30);
        bad.case(
            &["--kernel", &good, "--initrd", &initrd, "--memory", "512M"],
            2,
            &[
                "guest memory of 512M is too small",
                "the initrd 1073741824",
                "use --memory ",
            ],
        );
        bad
    }

    /// Boards that are nowhere, with a kernel that is good.
    pub(crate) fn unknown_boards(image: &[u8]) -> Bad {
        let mut bad = Bad::new();
        let good = bad.file("good", image);
        for (board, words) in [
            (
                "pi9",
                &["board 'pi9' is not known; built in: virt"] as &[&'static str],
            ),
            ("/nonexistent.toml", &["/nonexistent.toml", "No such file"]),
        ] {
            bad.case(&["--kernel", &good, "--board", board], 2, words);
        }
        bad
    }

    /// Options that are no good anywhere, with a kernel that is.
    pub(crate) fn options(image: &[u8]) -> Bad {
        let mut bad = Bad::new();
        let good = bad.file("good", image);
        let mut case = |arguments: &[&str], status, words: &[&'static str]| {
            let all = [&["--kernel", &good], arguments].concat();
            bad.case(&all, status, words);
        };
        case(&["--memory", "0"], 2, &["0 bytes of memory"]);
        case(
            &["--memory", "1K"],
            2,
            &[
                "memory of 1024 bytes is not a multiple of 64 KiB",
                "--memory 64K",
            ],
        );
        case(
            &["--memory", "1536"],
            2,
            &["1536 bytes is too little", "1536M"],
        );
        case(
            &["--memory", "1000000001"],
            2,
            &["1000000001", "--memory 976576K"],
        );
        case(&["--memory", "512X"], 2, &["--memory", "'512X'", "512M"]);
        case(&["--memory", "-1"], 2, &[]);
        case(&["--memory", ""], 2, &["--memory"]);
        case(
            &["--memory", "99999999999999999999"],
            2,
            &["more than 64 bits hold"],
        );
        case(
            &["--memory", "16777215T"],
            3,
            &["needs 64 address bits", "use --memory "],
        );
        case(
            &["--memory", "64K"],
            2,
            &["guest memory of 64K is too small", "use --memory "],
        );
        case(&["--cpus", "0"], 2, &["0 vCPUs", "--cpus 1 or more"]);
        case(&["--cpus", "two"], 2, &["--cpus 'two'"]);
        case(&["--cpus", "-1"], 2, &["--cpus"]);
        case(&["--ipa-bits", "31"], 2, &["--ipa-bits", "32 to 52"]);
        case(&["--ipa-bits", "53"], 2, &["--ipa-bits", "32 to 52"]);
        case(&["--ipa-bits", "wide"], 2, &["--ipa-bits", "'wide'"]);
        case(
            &["--ipa-bits", "32", "--memory", "4G"],
            2,
            &["--ipa-bits 32 is too few", "needs 33 bits"],
        );
        case(&["--gic", "4"], 2, &["--gic"]);
        case(&["--cmdline", "a\nb"], 2, &["--cmdline", "printable"]);
        case(&["--kernle", "x"], 2, &["--kernle", "--kernel"]);
        case(&["--memory"], 2, &["--memory"]);
        case(&["--memory", "1G", "--memory", "2G"], 2, &["--memory"]);
        case(&["stray"], 2, &["stray"]);
        // What only opening a device or mapping memory would stumble over.
        case(
            &["--balloon", "size=9G", "--memory", "512M"],
            2,
            &["--balloon", "leaves nothing of the guest's 512M"],
        );
        case(&["--balloon", "big"], 2, &["--balloon", "use on, size"]);
        case(
            &["--hugepages", "128K"],
            2,
            &["--hugepages 128K", "no huge pages of that size; use "],
        );
        case(
            &["--hugepages", "2M", "--memory", "257M"],
            2,
            &["--hugepages 2M", "use --memory 258M"],
        );
        case(
            &["--mergeable", "--share", "tag=a,path=/"],
            2,
            &["--mergeable", "another process"],
        );
        case(
            &["--net", "tap=a-name-of-16-bytes"],
            2,
            &["--net", "1 to 15 characters"],
        );
        let uds = format!("cid=3,uds=/{}", "v".repeat(100));
        case(&["--vsock", &uds], 2, &["--vsock", "use up to 96"]);
        case(
            &["--disk", "a.img,id=x", "--disk", "b.img,id=x"],
            2,
            &["--disk", "have one id=x"],
        );
        case(&["--disk", "file=a.img"], 2, &["use --disk path=a.img"]);
        bad
    }

    /// Fails for each case that `armlet COMMAND` does not refuse as it should.
    pub(crate) fn assert_refused_by(&self, command: &[&str]) {
        let refusals = self.cases.iter().map(|case| {
            let mut arguments = command.to_vec();
            arguments.extend(case.arguments.iter().map(String::as_str));
            refusal(&arguments, case.status, &case.words)
        });
        let wrong: Vec<String> = refusals.filter_map(Result::err).collect();
        assert!(
            wrong.is_empty(),
            "{} cases:\n{}",
            wrong.len(),
            wrong.join("\n")
        );
    }
}
