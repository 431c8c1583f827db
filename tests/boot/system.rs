use crate::guest::{Armlet, GLANCE, Guest, Input};
use crate::rig::{self, program};
use rustix::process::Signal;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
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
        self.ssh_with(Stdio::null(), command)
    }

    /// Runs `command` over ssh with this input.
    fn ssh_with(&self, input: impl Into<Stdio>, command: &str) -> Output {
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
            .stdin(input)
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

/// Installs the package of a release, uses what is in it, and removes it.
fn installs(login: &Login<'_>, package: &Path) {
    let file = File::open(package).expect("a package");
    let copied = login.ssh_with(file, "cat >armlet.deb");
    assert!(copied.status.success(), "{copied:?}");
    println!(
        "{}",
        login.says("dpkg-deb --info armlet.deb; sudo dpkg -i armlet.deb")
    );
    // Nothing that it holds differs from what its list says; all that it needs is there.
    assert_eq!(login.says("dpkg --verify armlet; sudo dpkg --audit"), "");
    assert!(login.says("armlet --version").starts_with("armlet "));
    // Guests have no KVM.
    let probe = login.ssh("armlet probe");
    let said = String::from_utf8_lossy(&probe.stdout).into_owned();
    println!("{said}");
    assert_eq!(probe.status.code(), Some(3), "{said}");
    assert!(said.contains("no /dev/kvm"), "{said}");
    login.says("armlet plan --board rpi5 --dtb /tmp/tree.dtb && test -s /tmp/tree.dtb");
    let unit = "armlet@web.service";
    // It says nothing of a unit with which all is well.
    assert_eq!(
        login.says(&format!("systemd-analyze verify --man=no {unit} 2>&1")),
        ""
    );
    assert!(
        login
            .says(&format!("systemctl cat {unit}"))
            .contains("ExecStart=/usr/bin/armlet run")
    );
    // A unit without its file, and one whose guest cannot run, fail and say why.
    login.says("echo OPTIONS=--kernel /boot/vmlinuz | sudo tee /etc/armlet/web.conf");
    login.says(&format!(
        "sudo systemctl start {unit}; sleep 1; sudo systemctl stop {unit}"
    ));
    let journal = login.says(&format!("sudo journalctl --no-pager -u {unit}"));
    assert!(journal.contains("armlet: "), "{journal}");
    // A host without KVM is not tried again.
    let show = format!("systemctl show {unit} -p ExecMainStatus -p NRestarts");
    let shown = login.says(&show);
    assert!(shown.contains("ExecMainStatus=3"), "{shown}");
    assert!(shown.contains("NRestarts=0"), "{shown}");
    is_confined(login);
    login.says("sudo rm /etc/armlet/web.conf; sudo dpkg --purge armlet; test ! -e /etc/armlet; sudo systemctl reset-failed");
    let left = login.ssh("command -v armlet || ls /usr/share/doc/armlet");
    assert!(!left.status.success(), "{left:?}");
}

/// Looks at what the unit leaves to its program, which is another one for once.
fn is_confined(login: &Login<'_>) {
    const LOOK: &str = "[Service]
Type=oneshot
Restart=no
ExecStart=
ExecStart=-/bin/sh -c 'cat /proc/self/status; touch /etc/x; ls /home; touch here && echo WRITTEN; \\
unshare -U true; chown 1 here; head -c 1 /dev/vda; true'
";
    let folder = "/etc/systemd/system/armlet@look.service.d";
    login.says(&format!(
        "set -e; sudo mkdir {folder}; echo \"{LOOK}\" | sudo tee {folder}/look.conf; \
         sudo touch /etc/armlet/look.conf; sudo systemctl daemon-reload; \
         sudo systemctl start armlet@look"
    ));
    let seen = login.says("sudo journalctl --no-pager -o cat -u armlet@look");
    for line in [
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        "cannot touch '/etc/x': Read-only file system",
        "cannot open directory '/home': Permission denied",
        "WRITTEN",
        "unshare failed: Operation not permitted",
        "changing ownership of 'here': Operation not permitted",
        "cannot open '/dev/vda' for reading: Permission denied",
    ] {
        assert!(seen.contains(line), "{line}: {seen}");
    }
    // systemd's range of users that exist while a service runs (systemd.exec(5): DynamicUser=).
    let user = seen.lines().find_map(|line| line.strip_prefix("Uid:\t"));
    let user = user.and_then(|users| users.split('\t').next()?.parse().ok());
    let user: u32 = user.unwrap_or_else(|| panic!("no user in {seen}"));
    assert!((61184..=65519).contains(&user), "{user}");
    login.says(&format!(
        "sudo rm -r {folder} /etc/armlet/look.conf /var/lib/private/armlet /var/lib/armlet; \
         sudo systemctl daemon-reload"
    ));
}

/// Boots the system on `disk` to a login, works there, and ends it by SIGTERM.
fn boots(name: &str, options: &str, port: u16) {
    let Some(rig) = rig::main() else { return };
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
    let package = rig.asset("armlet.deb");
    match package.is_file() {
        true => installs(&login, &package),
        false => println!("no package is installed: `cargo xtask dist` makes it"),
    }
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
fn debians_dpkg_installs_the_package_and_its_armlet_finds_kvm() {
    let Some(rig) = rig::any() else { return };
    let package = rig.asset("armlet.deb");
    if !package.is_file() {
        println!("skipped: needs the package that `cargo xtask dist` makes");
        return;
    }
    let Some(dpkg) = program("dpkg") else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let root = folder.path();
    let lists = root.join("var/lib/dpkg");
    for name in ["info", "updates", "triggers"] {
        fs::create_dir_all(lists.join(name)).expect("a folder");
    }
    File::create(lists.join("status")).expect("a file");
    // Its other programs, not busybox's of the same names.
    let mut folders = vec![dpkg.parent().expect("a folder").to_owned()];
    let path = std::env::var_os("PATH").unwrap_or_default();
    folders.extend(std::env::split_paths(&path));
    let path = std::env::join_paths(folders).expect("a path");
    // It has no scripts, so nothing of the new root is run.
    let dpkg = |words: &[&OsStr]| {
        let output = Command::new(&dpkg)
            .arg(format!("--root={}", root.display()))
            .arg("--force-bad-path")
            .env("PATH", &path)
            .args(words)
            .output()
            .expect("dpkg can be run");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(output.status.success(), "dpkg {words:?}: {said}");
        said
    };
    println!("{}", dpkg(&["--install".as_ref(), package.as_ref()]));
    let status = dpkg(&["--status".as_ref(), "armlet".as_ref()]);
    assert!(status.contains("Status: install ok installed"), "{status}");
    assert_eq!(dpkg(&["--verify".as_ref(), "armlet".as_ref()]), "");
    assert_eq!(dpkg(&["--audit".as_ref()]), "");
    for file in [
        "usr/lib/systemd/system/armlet@.service",
        "usr/share/man/man1/armlet.1.gz",
        "usr/share/bash-completion/completions/armlet",
        "usr/share/doc/armlet/copyright",
    ] {
        assert!(root.join(file).is_file(), "{file}");
    }
    let armlet = root.join("usr/bin/armlet");
    let probe = Command::new(&armlet).arg("probe").output();
    let probe = probe.expect("the package's armlet");
    let said = String::from_utf8_lossy(&probe.stdout);
    println!("{said}");
    assert_eq!(probe.status.code(), Some(0), "{said}");
    assert!(said.contains("KVM                          yes"), "{said}");
    dpkg(&["--purge".as_ref(), "armlet".as_ref()]);
    assert!(!armlet.exists() && !root.join("usr/share/doc/armlet").exists());
}

#[test]
fn debian_boots_from_a_raw_image_to_ssh_and_ends_by_sigterm() {
    boots("root.img", "", 2222);
}

#[test]
fn debian_boots_from_a_qcow2_image_to_ssh_and_ends_by_sigterm() {
    boots("root.qcow2", ",format=qcow2", 2223);
}
