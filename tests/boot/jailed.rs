use crate::guest::{Armlet, Guest, Input};
use crate::net::{Tap, runs};
use crate::rig::{self, Rig, WITH_DEVICES};
use std::ffi::OsStr;
use std::fs;
use std::path::Path;

/// The user and group of jailed guests.
const OWNER: u32 = 12345;

/// A guest in a jail in `base`, that runs `script`. Its kernel and initrd are put there first, as
/// users do it.
fn jailed(rig: &Rig, base: &Path, options: &str, script: &str) -> Armlet {
    let root = base.join("armlet/one/root");
    fs::create_dir_all(&root).expect("a folder");
    let donor = Armlet::devices(rig, script);
    fs::copy(donor.initrd(), root.join("initrd")).expect("a copy");
    fs::copy(rig.asset(WITH_DEVICES[0]), root.join("Image")).expect("a copy");
    let line = format!(
        "exec \"$0\" jail --id one --uid {OWNER} --gid {OWNER} --chroot-base-dir {} {options} -- \"$@\" \
         7</dev/null 9>/dev/null",
        base.display()
    );
    let words: [&OsStr; 3] = ["sh".as_ref(), "-c".as_ref(), line.as_ref()];
    Armlet::linux(Path::new("/Image"), Path::new("/initrd"), "script").through(&words)
}

fn of(guest: &Guest, name: &str) -> String {
    fs::read_to_string(format!("/proc/{}/{name}", guest.pid())).expect("a process")
}

#[test]
fn a_jailed_guest_talks_over_tap_and_reboots() {
    let Some(rig) = rig::main() else { return };
    let groups = tempfile::tempdir().expect("a temporary folder");
    let folder = groups.path().display().to_string();
    assert!(runs(&format!("mount -t cgroup2 none {folder}")));
    for (name, subnet, vhost) in [("armtap20", 30, "on"), ("armtap21", 31, "off")] {
        let Some(tap) = Tap::new(name, subnet, 1) else {
            return;
        };
        let base = tempfile::tempdir().expect("a temporary folder");
        let script = tap.ping_and_reboot();
        let options = "--cgroup-version 2 --cgroup pids.max=100 --parent-cgroup armlet-jails";
        let mut guest = jailed(rig, base.path(), options, &script)
            .input(Input::Pipe)
            .option("--net", format!("tap={name},vhost={vhost}"))
            .start();
        guest.expect("PINGED");
        let status = of(&guest, "status");
        let owner = OWNER.to_string();
        for (line, value) in [
            ("Uid", [&*owner; 4].join("\t")),
            ("Gid", [&*owner; 4].join("\t")),
            ("Groups", String::new()),
            ("CapEff", "0".repeat(16)),
            ("CapPrm", "0".repeat(16)),
            ("CapBnd", "0".repeat(16)),
            ("NoNewPrivs", "1".to_owned()),
        ] {
            let mut lines = status.lines();
            let found = lines.find_map(|text| text.strip_prefix(line)?.strip_prefix(':'));
            assert_eq!(found.map(str::trim), Some(&*value), "{line} in {status}");
        }
        // Nothing is mounted there but the jail.
        assert_eq!(of(&guest, "mounts").lines().count(), 1);
        let inside = format!("/proc/{}/root/Image", guest.pid());
        assert!(fs::metadata(inside).is_ok(), "its root is another folder");
        let ours = fs::read_link("/proc/self/ns/mnt").expect("a namespace");
        let theirs = fs::read_link(format!("/proc/{}/ns/mnt", guest.pid()));
        assert_ne!(theirs.expect("a namespace"), ours);
        assert!(of(&guest, "cgroup").contains("/armlet-jails/one"));
        for descriptor in [7, 9] {
            let path = format!("/proc/{}/fd/{descriptor}", guest.pid());
            let leads = fs::read_link(path).unwrap_or_default();
            assert_ne!(leads, Path::new("/dev/null"), "{descriptor} was inherited");
        }
        for word in ["again\n", "enough\n"] {
            guest.send(word.as_bytes());
            if word == "again\n" {
                guest.expect("PINGED");
            }
        }
        let outcome = guest.end();
        outcome.assert_status(0);
        assert_eq!(outcome.complaints(), "");
    }
    for name in ["armlet-jails/one", "armlet-jails"] {
        fs::remove_dir(groups.path().join(name)).expect("an empty control group");
    }
    assert!(runs(&format!("umount {folder}")));
}

#[test]
fn a_jailed_guest_may_be_the_first_process_of_a_namespace() {
    let Some(rig) = rig::main() else { return };
    let base = tempfile::tempdir().expect("a temporary folder");
    // The jailer ends when armlet has begun, which has its output still.
    let outcome = jailed(rig, base.path(), "--new-pid-ns", "echo BOOTED").run();
    assert!(
        outcome.script().contains("BOOTED"),
        "{}",
        outcome.complaints()
    );
}
