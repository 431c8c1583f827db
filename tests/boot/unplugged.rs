use crate::disk::noise;
use crate::guest::{Armlet, Input};
use crate::rig;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: usize = 1 << 20;

/// A file system of the host in memory, with room for so many MiB. It is unmounted with this.
struct Small {
    folder: tempfile::TempDir,
}

impl Small {
    /// `None` where this user may not mount; this was said then.
    fn new(mib: usize) -> Option<Small> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"])
            .arg(folder.path())
            .status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Small { folder });
        }
        println!("skipped: this user may not mount a file system");
        None
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file without blocks.
    fn sparse(&self, name: &str, size: usize) -> PathBuf {
        let path = self.path(name);
        let file = File::create(&path).expect("an image");
        file.set_len(size as u64).expect("an image");
        path
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.folder.path())
            .status();
    }
}

/// Writes more than the host has room for, and then what it has room for.
fn fills(options: &str, make: impl Fn(&Path)) {
    let Some(rig) = rig::main() else { return };
    let Some(small) = Small::new(8) else { return };
    let image = small.path("disk");
    make(&image);
    let other = small.sparse("other", MIB);
    let script = "
# Its own complaints would be in between.
echo 1 >/proc/sys/kernel/printk
dd if=/dev/zero of=/tmp/data bs=1M count=1 status=none
tr '\\0' x </tmp/data >/tmp/more
# Linux gives the error of writes behind the caller's back to whoever syncs.
for n in $(seq 0 15); do
    dd if=/tmp/more of=/dev/vda bs=1M seek=$n conv=notrunc,fsync status=none || echo FULL
done 2>&1 | sed -n 's,.*\\(I/O\\|Input/output\\) error.*,I/O error,p; /^FULL/p' | sort | uniq
dd if=/dev/vda bs=1M count=1 status=none | tr -d x | wc -c
dd if=/tmp/more of=/dev/vda bs=1M conv=notrunc,fsync status=none && echo OVERWRITTEN
dd if=/dev/vdb of=/dev/null bs=64k status=none && echo OTHER DISK";
    let outcome = Armlet::devices(rig, script)
        .option("--disk", format!("path={}{options}", image.display()))
        .option("--disk", format!("path={},readonly", other.display()))
        .run();
    let script = outcome.script();
    let lines: Vec<&str> = script.lines().collect();
    assert_eq!(lines[..2], ["FULL", "I/O error"], "{script}");
    let rest: Vec<&str> = lines.iter().rev().take(3).rev().copied().collect();
    assert_eq!(rest, ["0", "OVERWRITTEN", "OTHER DISK"], "{script}");
    let errors = &outcome.errors;
    assert!(
        errors.contains("disk0") && errors.contains("No space left"),
        "{errors}"
    );
}

#[test]
fn a_full_host_disk_beneath_a_raw_image_is_an_error_in_the_guest() {
    for engine in ["auto", "io_uring", "sync"] {
        fills(&format!(",engine={engine}"), |image| {
            let file = File::create(image).expect("an image");
            file.set_len(16 * MIB as u64).expect("an image");
        });
    }
}

#[test]
fn a_full_host_disk_beneath_a_qcow2_image_is_an_error_in_the_guest() {
    let Some(_) = rig::main() else { return };
    let Some(qemu_img) = rig::program("qemu-img") else {
        return;
    };
    fills(",format=qcow2", |image| {
        let made = Command::new(&qemu_img)
            .args(["create", "-q", "-f", "qcow2"])
            .arg(image)
            .arg("16M")
            .status();
        assert!(made.expect("qemu-img can be run").success());
    });
}

#[test]
fn persistent_memory_that_was_cut_is_an_io_error_for_the_guest() {
    let Some(rig) = rig::main() else { return };
    let script = "
echo 1 >/proc/sys/kernel/printk
echo READY
read -r line </dev/console
dd if=/dev/pmem0 bs=1M skip=1 count=1 status=none | tr -d '\\0' | wc -c
dd if=/dev/pmem0 bs=1M skip=8 count=8 status=none | tr -d '\\0' | wc -c
dd if=/dev/zero of=/dev/pmem0 bs=64k seek=200 count=1 conv=notrunc,fsync 2>&1 |
    sed -n 's,.*\\(I/O\\|Input/output\\) error.*,I/O error,p'
echo ALIVE";
    let armlet = Armlet::devices(rig, script).input(Input::Pipe).cpus(2);
    let image = armlet.file("pmem.img", &vec![7; 16 * MIB]);
    let mut guest = armlet
        .option("--pmem", format!("path={}", image.display()))
        .start();
    guest.expect("READY");
    let file = File::options().write(true).open(&image).expect("an image");
    file.set_len(8 * MIB as u64).expect("a cut image");
    guest.send(b"\n");
    guest.expect("ALIVE");
    let outcome = guest.end();
    outcome.assert_status(0);
    let said = outcome.script();
    // What is typed at a terminal comes back.
    let said: Vec<&str> = said.lines().filter(|line| !line.is_empty()).collect();
    let wanted = ["READY", "1048576", "0", "I/O error", "ALIVE"];
    assert_eq!(said, wanted, "{}", outcome.errors);
    let errors = &outcome.errors;
    let told = errors
        .lines()
        .filter(|line| line.contains("was cut to 8388608"));
    assert_eq!(told.count(), 1, "{errors}");
}

#[test]
fn a_full_host_disk_beneath_persistent_memory_is_an_io_error_for_the_guest() {
    let Some(rig) = rig::main() else { return };
    let Some(small) = Small::new(8) else { return };
    let image = small.sparse("pmem.img", 16 * MIB);
    let data = noise(4, MIB);
    let file = File::options().write(true).open(&image).expect("an image");
    file.write_all_at(&data, 0).expect("room");
    let script = "
echo 1 >/proc/sys/kernel/printk
tr '\\0' x </dev/zero | dd of=/dev/pmem0 bs=64k seek=16 count=224 iflag=fullblock conv=notrunc,fsync 2>&1 |
    sed -n 's,.*\\(I/O\\|Input/output\\) error.*,I/O error,p'
dd if=/dev/pmem0 bs=1M skip=1 count=14 status=none | tr -d x | wc -c
dd if=/dev/pmem0 bs=1M count=1 status=none | sha256sum | cut -c1-16
echo ALIVE";
    let outcome = Armlet::devices(rig, script)
        .option("--pmem", format!("path={}", image.display()))
        .run();
    let said = outcome.script();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[..2], ["I/O error", "0"], "{said}\n{}", outcome.errors);
    assert_eq!(lines.last(), Some(&"ALIVE"), "{said}");
    let errors = &outcome.errors;
    assert!(errors.contains("finds no room on the host"), "{errors}");
    assert!(fs::read(&image).expect("an image")[..MIB] == data);
}

/// Runs armlet with these devices, which it cannot have; it says so in one line that has all
/// `words`, and ends with `status`.
fn refused(before: &[&str], devices: &[&str], status: i32, words: &[&str]) {
    let rig = rig::main().expect("looked at before");
    let armlet = env!("CARGO_BIN_EXE_armlet");
    let program = [before, &[armlet]].concat();
    let output = Command::new(program[0])
        .args(&program[1..])
        .args(["run", "--memory", "128M", "--kernel"])
        .arg(rig.asset("Image"))
        .args(devices)
        .output()
        .expect("armlet can be run");
    let line = String::from_utf8_lossy(&output.stderr);
    print!("{line}");
    assert_eq!(output.status.code(), Some(status), "{devices:?}: {line}");
    assert_eq!(line.lines().count(), 1, "{devices:?}: {line}");
    for word in words {
        assert!(line.contains(word), "{devices:?}: no {word:?} in {line}");
    }
}

#[test]
fn devices_that_cannot_be_had_are_refused_in_one_line() {
    let Some(_) = rig::main() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    fs::write(path("one"), vec![0; MIB]).expect("an image");
    fs::write(path("two"), vec![0; MIB]).expect("an image");
    let image = |name: &str, more: &str| format!("path={}{more}", path(name));
    let (missing, directory) = (image("missing", ""), image("", ""));
    let (one, two) = (image("one", ",id=same"), image("two", ",id=same"));
    let qcow2 = image("one", ",format=qcow2");
    refused(&[], &["--disk", &missing], 2, &["missing", "No such file"]);
    refused(&[], &["--disk", &directory], 2, &["is a directory"]);
    refused(&[], &["--disk", &one, "--disk", &two], 2, &["id=same"]);
    let one = image("one", "");
    refused(&[], &["--disk", &one, "--disk", &one], 2, &["in use"]);
    refused(&[], &["--disk", &qcow2], 2, &["no qcow2 image"]);
    refused(&[], &["--pmem", &missing], 2, &["No such file"]);
    let share = image("missing", ",tag=t");
    refused(&[], &["--share", &share], 2, &["No such file"]);
    for mac in ["52:54:00:12:34", "51:54:00:12:34:56", "hello"] {
        let card = format!("tap=armtap9,mac={mac}");
        refused(&[], &["--net", &card], 2, &[mac]);
    }
    refused(&[], &["--net", "tap=armtap9"], 2, &["no interface armtap9"]);
}

#[test]
fn a_qcow2_image_with_a_backing_file_is_refused_unless_that_is_named() {
    let Some(_) = rig::main() else { return };
    let Some(qemu_img) = rig::program("qemu-img") else {
        return;
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    fs::write(path("base"), vec![0; MIB]).expect("an image");
    let made = Command::new(qemu_img)
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([path("base"), path("top")])
        .status();
    assert!(made.expect("qemu-img can be run").success());
    let disk = format!("path={},format=qcow2", path("top").display());
    refused(&[], &["--disk", &disk], 2, &["backing=PATH", "base"]);
}

#[test]
fn a_tap_of_another_user_is_refused_in_one_line() {
    let Some(_) = rig::main() else { return };
    let Some(ip) = rig::program("ip") else { return };
    let run = |words: &str| {
        let status = Command::new(&ip).args(words.split(' ')).status();
        status.is_ok_and(|status| status.success())
    };
    if !run("tuntap add dev armtap8 mode tap user 12345") {
        println!("skipped: this user may not make network interfaces");
        return;
    }
    // In a user namespace of its own, root is still who owns its files and nobody beyond that.
    refused(
        &["unshare", "-U"],
        &["--net", "tap=armtap8"],
        2,
        &["armtap8 belongs to another user", "ip link del armtap8"],
    );
    run("link del armtap8");
}
