//! What clients are given: armlet under the names that they look for, a guest, and what stands for
//! programs that they call.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::guest;
use crate::command::run_watched;
use crate::isa::Isa;
use crate::progress::say;
use crate::repository::{cargo, target_folder};

/// How long a client may be silent.
const SILENCE: Duration = Duration::from_secs(60);
/// The size of the guest's disk in bytes.
const DISK: u64 = 1 << 20;

/// Programs that clients call and that are not for guests of a few instructions, or for a namespace
/// where everything is root's: what stands for each.
const STAND_INS: [(&str, &str); 3] = [
    (
        "ssh",
        "# Yes to everything, and a press of the power button for `reboot`.
for word; do :; done
test \"$word\" != reboot && exit 0
exec \"$ARMLET_CLIENT_PYTHON\" -c 'import os
from microheart import api
body = {\"action_type\": \"SendCtrlAltDel\"}
api.request(os.environ[\"ARMLET_API_SOCKET\"], \"PUT\", \"/actions\", body)'",
    ),
    (
        "sudo",
        "while [ \"$1\" = -u ]; do shift 2; done\nexec \"$@\"",
    ),
    ("iptables", "exit 0"),
];

/// What clients are given.
pub(super) struct Files {
    /// It has `firecracker`, `jailer`, `guest` and `disk`.
    pub(super) folder: PathBuf,
    /// What stands for programs that clients call.
    stand_ins: PathBuf,
    /// Where the output of programs goes.
    pub(super) logs: PathBuf,
}

impl Files {
    /// Builds armlet and makes the files.
    pub(super) fn make(folder: &Path) -> Result<Files> {
        let files = Files {
            folder: folder.join("files"),
            stand_ins: folder.join("stand-ins"),
            logs: folder.join("logs"),
        };
        for folder in [&files.folder, &files.stand_ins, &files.logs] {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {folder:?}"))?;
        }
        let armlet = build()?;
        for name in ["firecracker", "jailer"] {
            let path = files.folder.join(name);
            // A program that still runs cannot be written to.
            drop(fs::remove_file(&path));
            fs::copy(&armlet, &path).with_context(|| format!("cannot write {path:?}"))?;
        }
        let write = |path: PathBuf, bytes: &[u8], mode| {
            let written = fs::write(&path, bytes)
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)));
            written.with_context(|| format!("cannot write {path:?}"))
        };
        write(files.folder.join("guest"), &guest::elf(), 0o644)?;
        write(files.folder.join("disk"), &vec![0; DISK as usize], 0o644)?;
        for (name, text) in STAND_INS {
            let script = format!("#!/bin/sh\n{text}\n");
            write(files.stand_ins.join(name), script.as_bytes(), 0o755)?;
        }
        Ok(files)
    }

    /// Returns the start of a command that runs in namespaces of its own, where there is a default
    /// route, and a folder for jails. What it leaves running ends with it.
    pub(super) fn namespace(&self, python: &Path) -> Command {
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new("unshare");
        command
            .args(["--net", "--mount", "--pid", "--fork", "--mount-proc"])
            .args(["--kill-child=KILL", "sh", "-ec"])
            .arg("ip link set lo up; ip route add default dev lo; mount -t tmpfs none /srv; mkdir /srv/jailer; exec \"$@\"")
            .arg("sh")
            .env("PATH", format!("{}:{}:{path}", self.stand_ins.display(), self.folder.display()))
            .env("ARMLET_CLIENT_PYTHON", python)
            .env("USER", "root");
        command
    }

    /// Runs a client; returns the last line that it prints.
    pub(super) fn drive(&self, name: &str, command: &mut Command) -> Result<String> {
        let log = self.logs.join(name);
        run_watched(command, &log, &[], SILENCE).with_context(|| format!("see {log:?}"))?;
        let text = fs::read_to_string(&log).with_context(|| format!("cannot read {log:?}"))?;
        let done = text.lines().rfind(|line| !line.trim().is_empty());
        Ok(done.context("it said nothing")?.to_owned())
    }
}

/// Builds armlet as the rig does, linked statically: it runs in jails. Returns where it lies.
fn build() -> Result<PathBuf> {
    let toolchain = Isa::X86.toolchain()?;
    let mut command = cargo();
    command
        .args(["build", "--quiet", "--package", "armlet", "--bin", "armlet"])
        .args(["--profile", "rig", "--target", &toolchain.target])
        .args(&toolchain.args)
        .envs(toolchain.env.iter().map(|(name, value)| (name, value)));
    say("building armlet");
    let status = command.status().context("cannot run cargo")?;
    ensure!(status.success(), "armlet does not build");
    let target = target_folder()?.join(&toolchain.target);
    Ok(target.join("rig/armlet"))
}
