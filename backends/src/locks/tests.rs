use super::*;
use crate::disk::{Disk, DiskOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use tempfile::TempDir;

const SIZE: u64 = 1 << 20;

/// What armlet does with the image that both use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ours {
    Reads,
    Writes,
    /// Writes to an overlay of it.
    Base,
    /// Reads an overlay of it.
    BaseOfReader,
}

/// What QEMU's programs do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Theirs {
    Reads,
    Writes,
    /// Writes to an overlay of it.
    Base,
}

use Theirs::{Base, Reads, Writes};

/// Which of their uses go with ours, of an image in this format. QEMU's programs share all that
/// their format allows, where a guest's disk shares less: a raw image can be copied while a guest
/// writes to it.
fn table(format: &str) -> [(Ours, &'static [Theirs]); 4] {
    let written: &[Theirs] = match format {
        "raw" => &[Reads, Base],
        _ => &[],
    };
    [
        (Ours::Reads, &[Reads, Base]),
        (Ours::Writes, written),
        (Ours::Base, &[Reads, Base]),
        (Ours::BaseOfReader, &[Reads, Base]),
    ]
}

/// An image in one of the formats, and two overlays of it.
struct Images {
    folder: TempDir,
    format: &'static str,
}

impl Images {
    fn new(format: &'static str) -> Images {
        let images = Images {
            folder: TempDir::new().expect("a folder"),
            format,
        };
        let (size, base) = (SIZE.to_string(), images.path("base"));
        qemu_img(&["create", "-q", "-f", format, &base, &size]);
        for overlay in ["ours", "theirs"] {
            let path = images.path(overlay);
            qemu_img(&[
                "create", "-q", "-f", "qcow2", "-b", &base, "-F", format, &path,
            ]);
        }
        images
    }

    fn path(&self, name: &str) -> String {
        let path = self.folder.path().join(name);
        path.to_str().expect("UTF-8").to_owned()
    }

    fn ours(&self, ours: Ours) -> anyhow::Result<Disk> {
        let (base, overlay) = (self.path("base"), self.path("ours"));
        let text = match ours {
            Ours::Reads => format!("path={base},format={},readonly", self.format),
            Ours::Writes => format!("path={base},format={}", self.format),
            Ours::Base => format!("path={overlay},format=qcow2,backing={base}"),
            Ours::BaseOfReader => format!("path={overlay},format=qcow2,backing={base},readonly"),
        };
        DiskOptions::parse(&text)?.open(0)
    }

    /// Has qemu-io use the image until it is dropped; what it says where it cannot.
    fn theirs(&self, theirs: Theirs) -> Result<QemuIo, String> {
        let (base, overlay) = (self.path("base"), self.path("theirs"));
        match theirs {
            Reads => QemuIo::start(&["-r", "-f", self.format, &base]),
            Writes => QemuIo::start(&["-f", self.format, &base]),
            Base => QemuIo::start(&["-f", "qcow2", &overlay]),
        }
    }
}

fn qemu_img(words: &[&str]) -> String {
    let output = Command::new("qemu-img").args(words).output();
    let output = output.expect("qemu-img can be run");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "qemu-img {words:?}: {said}");
    said
}

/// qemu-io, with an image open.
struct QemuIo {
    child: Child,
    input: Option<ChildStdin>,
}

impl QemuIo {
    fn start(words: &[&str]) -> Result<QemuIo, String> {
        let mut child = Command::new("qemu-io")
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("qemu-io can be run");
        let mut input = child.stdin.take().expect("a pipe");
        // It answers this once the image is open; without one it ends or says so.
        let _ = writeln!(input, "length");
        let mut answer = String::new();
        let output = child.stdout.take().expect("a pipe");
        let mut output = BufReader::new(output);
        while output.read_line(&mut answer).expect("text") > 0 && !answer.ends_with(" MiB\n") {}
        if answer.contains("1 MiB") {
            return Ok(QemuIo {
                child,
                input: Some(input),
            });
        }
        drop(input);
        let output = child.wait_with_output().expect("qemu-io ends");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            said.contains("Is another process using the image"),
            "{said}"
        );
        Err(said)
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        // At the end of its input it closes the image and ends.
        self.input = None;
        let _ = self.child.wait();
    }
}

fn has_qemu() -> bool {
    let found = ["qemu-img", "qemu-io"].map(|program| {
        let output = Command::new(program).arg("--version").output();
        output.is_ok_and(|output| output.status.success())
    });
    if found != [true; 2] {
        println!("skipped: qemu-img and qemu-io (Debian: qemu-utils) are not here");
    }
    found == [true; 2]
}

/// The formats that armlet and QEMU can both be tried with here.
fn formats() -> &'static [&'static str] {
    match (has_qemu(), cfg!(feature = "qcow2")) {
        (false, _) => &[],
        (true, false) => &["raw"],
        (true, true) => &["raw", "qcow2"],
    }
}

#[test]
fn images_are_shared_with_qemu_where_that_is_safe() {
    for format in formats() {
        let images = Images::new(format);
        for (ours, together) in table(format) {
            for theirs in [Reads, Writes, Base] {
                let expected = together.contains(&theirs);
                let case = format!("{format}: armlet {ours:?}, then QEMU {theirs:?}");
                let disk = images.ours(ours).expect(&case);
                let second = images.theirs(theirs).map(drop);
                assert_eq!(second.is_ok(), expected, "{case}: {second:?}");
                drop(disk);

                let case = format!("{format}: QEMU {theirs:?}, then armlet {ours:?}");
                let other = images.theirs(theirs).expect(&case);
                let second = images.ours(ours).map(drop);
                assert_eq!(second.is_ok(), expected, "{case}: {second:?}");
                if let Err(error) = second {
                    assert!(error.to_string().contains("is in use"), "{case}: {error}");
                }
                drop(other);
            }
        }
    }
}

#[test]
fn qemu_img_copies_what_a_guest_does_not_write() {
    for format in formats() {
        let images = Images::new(format);
        let (base, copy) = (images.path("base"), images.path("copy"));
        for ours in [Ours::Reads, Ours::Writes, Ours::Base, Ours::BaseOfReader] {
            let disk = images.ours(ours).expect("opens");
            let run = |words: &[&str]| {
                let output = Command::new("qemu-img").args(words).output();
                output.expect("qemu-img can be run").status.success()
            };
            let copies = run(&["convert", "-f", format, "-O", "raw", &base, &copy]);
            assert_eq!(copies, ours != Ours::Writes, "{format}, {ours:?}");
            let resizes = run(&["resize", "-q", "-f", format, &base, "2M"]);
            assert!(!resizes, "{format}, {ours:?}");
            drop(disk);
        }
        let size = std::fs::metadata(&base).expect("a file").len();
        assert!(size <= SIZE);
    }
}

/// The table of what goes with what, among guests of armlet.
#[test]
fn uses_go_together_or_do_not() {
    let all = [
        Use::ReadRaw,
        Use::WriteRaw,
        Use::ReadFormat,
        Use::WriteFormat,
    ];
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("image");
    std::fs::write(&path, "x").expect("a file");
    let open = |path: &Path| {
        let file = File::options().read(true).write(true).open(path);
        file.expect("a file")
    };
    for first in all {
        for second in all {
            let (one, other) = (open(&path), open(&path));
            assert_eq!(lock(&one, first).expect("locks"), Ok(()));
            let readers = [Use::ReadRaw, Use::ReadFormat];
            let expected = readers.contains(&first) && readers.contains(&second);
            let result = try_lock(&other, second).expect("locks");
            assert_eq!(
                result.is_ok(),
                expected,
                "{first:?}, {second:?}: {result:?}"
            );
            drop(one);
            // What was refused has left nothing behind.
            let third = open(&path);
            if !expected {
                assert_eq!(try_lock(&third, first).expect("locks"), Ok(()));
            }
        }
    }
}

#[test]
fn a_lock_on_the_whole_file_is_respected() {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("image");
    std::fs::write(&path, "x").expect("a file");
    let file = File::options().read(true).write(true).open(&path);
    let file = file.expect("a file");
    // Of this process: they do not go with those of an open file description.
    let whole = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    rustix::fs::fcntl_lock(&file, whole).expect("locks");
    let other = File::open(&path).expect("a file");
    let result = try_lock(&other, Use::ReadRaw).expect("locks");
    assert_eq!(result, Err(Conflict::Kept));
}
