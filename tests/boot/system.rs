use crate::guest::{Armlet, GLANCE, Guest, Input};
use crate::rig::{self, program};
use rustix::process::Signal;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread::sleep;

/// The folder of the system that `cargo xtask image` makes. `None` where there is none; this was
/// said then.
fn system() -> Option<PathBuf> {
    let folder = PathBuf::from("/data");
    if folder.join("root.img").is_file() {
        return Some(folder);
    }
    println!("skipped: needs a Debian system; `cargo xtask test --system` gives it to the rig");
    None
}

/// A user's way into a running system.
struct Login<'a> {
    folder: &'a Path,
    port: u16,
}

impl Login<'_> {
    /// Runs `command` over ssh.
    fn ssh(&self, command: &str) -> Output {
        let ssh = program("ssh").expect("ssh");
        let known = self.folder.join("known_hosts");
        Command::new(ssh)
            .args([
                "-q",
                "-o",
                "BatchMode=yes",
                "-o",
                "ConnectTimeout=120",
                "-i",
            ])
            .arg(self.folder.join("id_ed25519"))
            .arg("-o")
            .arg(format!("UserKnownHostsFile={}", known.display()))
            .args(["-p", &self.port.to_string(), "armlet@127.0.0.1", command])
            .output()
            .expect("ssh can be run")
    }

    /// As [`Self::ssh`]; fails unless the command succeeds.
    fn says(&self, command: &str) -> String {
        let output = self.ssh(command);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {errors}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Waits until somebody can log in.
    fn wait(&self, guest: &mut Guest) {
        while !self.ssh("true").status.success() {
            assert!(guest.runs(), "armlet is gone");
            sleep(50 * GLANCE);
        }
    }
}

/// Boots the system on `disk` to a login, works there, and ends it by SIGTERM.
fn boots(name: &str, options: &str, port: u16) {
    let Some(_) = rig::main() else { return };
    let Some(folder) = system() else { return };
    if ["ssh", "passt"].iter().any(|name| program(name).is_none()) {
        return;
    }
    crate::net::outside();
    let disk = folder.join(name);
    let login = Login {
        folder: &folder,
        port,
    };
    let mut guest = Armlet::system(&folder.join("vmlinuz"), &folder.join("initrd.img"))
        .memory("1G")
        .cpus(2)
        .input(Input::Pipe)
        .option("--disk", format!("path={}{options}", disk.display()))
        .option("--net", format!("user,hostfwd=tcp:127.0.0.1:{port}-:22"))
        .start();
    guest.expect("armlet login:");
    login.wait(&mut guest);
    assert_eq!(login.says("id -un"), "armlet");
    assert_eq!(login.says("systemctl is-system-running --wait"), "running");
    // What apt-get does to a disk, without a network.
    login.says(
        "set -e; cd; for n in 1 2 3; do cp -a /usr/share/bash-completion copy$n; sync; done; \
         diff -r /usr/share/bash-completion copy3; rm -r copy1 copy2; \
         sudo dpkg-reconfigure -f noninteractive openssh-server; sudo dpkg --verify; sync",
    );
    assert_eq!(login.says("findmnt -no OPTIONS / | cut -d, -f1"), "rw");
    guest.signal(Signal::TERM);
    guest.expect("Power down");
    let outcome = guest.end();
    outcome.assert_status(0);
    if options.is_empty() {
        let e2fsck = program("e2fsck").expect("e2fsck");
        let output = Command::new(e2fsck).args(["-n", "-f"]).arg(&disk).output();
        let output = output.expect("e2fsck can be run");
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{said}");
        assert!(!said.contains("recovering journal"), "{said}");
    }
}

#[test]
fn debian_boots_from_a_raw_image_to_ssh_and_ends_by_sigterm() {
    boots("root.img", "", 2222);
}

#[test]
fn debian_boots_from_a_qcow2_image_to_ssh_and_ends_by_sigterm() {
    boots("root.qcow2", ",format=qcow2", 2223);
}
