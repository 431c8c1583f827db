//! `cargo xtask clients`: Firecracker's clients, as they are published, drive guests of armlet.
//!
//! `files` makes what they are given, `packages` installs them, with pinned versions, below the target folder; `suite` runs the tests of
//! one that brings its own. Programs of ours drive the others (`tests/clients`), each in a network
//! namespace of its own, with a guest of a few instructions.

mod files;
mod guest;
mod packages;
mod suite;

use std::fs;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use argh::FromArgs;

use crate::isa::Isa;
use crate::progress::say;
use crate::repository::{repository, target_folder};

use files::Files;
pub(crate) use packages::Unreachable;

/// Have Firecracker's clients drive guests of armlet, on an x86_64 machine with /dev/kvm.
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "clients")]
pub(crate) struct Clients {
    /// drive only these: dud, smolvm, bandsox, firecracker-python, microheart, firepilot,
    /// firecracker-rs-sdk, firecracker-rs-sdk-jailed, fctools
    #[argh(positional)]
    names: Vec<String>,
}

/// How a client is driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Python,
    Rust,
    /// By its own tests.
    Suite,
}

/// The clients, and how each is driven.
const CLIENTS: [(&str, Kind); 9] = [
    ("dud", Kind::Python),
    ("smolvm", Kind::Python),
    ("bandsox", Kind::Python),
    ("firecracker-python", Kind::Python),
    ("microheart", Kind::Python),
    ("firepilot", Kind::Rust),
    ("firecracker-rs-sdk", Kind::Rust),
    ("firecracker-rs-sdk-jailed", Kind::Rust),
    ("fctools", Kind::Suite),
];

impl Clients {
    /// Drives them and gives the exit status: 0 when all of them did what they are to.
    pub(crate) fn run(&self) -> Result<i32> {
        if let Some(lack) = lack() {
            bail!("{lack}");
        }
        drive(&self.names)
    }
}

/// Drives the clients of these names, all where there are none, and gives the exit status: 0 when all
/// of them did what they are to.
///
/// # Errors
/// [`Unreachable`], when the clients cannot be had; and what else keeps all of them from being driven.
pub(crate) fn drive(names: &[String]) -> Result<i32> {
    for name in names {
        let known = CLIENTS.map(|(name, _)| name).join(", ");
        let is_known = CLIENTS.iter().any(|(known, _)| known == name);
        ensure!(is_known, "no client is called {name:?}: {known}");
    }
    let chosen = CLIENTS
        .into_iter()
        .filter(|(name, _)| names.is_empty() || names.iter().any(|chosen| chosen == name));
    let chosen: Vec<_> = chosen.collect();
    let has = |kind| chosen.iter().any(|(_, other)| *other == kind);
    let folder = target_folder()?.join("clients");
    let files = Files::make(&folder)?;
    let python = has(Kind::Python).then(|| packages::python(&folder));
    let python = python.transpose()?.unwrap_or_default();
    let rust = (has(Kind::Rust) || has(Kind::Suite)).then(|| packages::rust(&folder));
    let rust = rust.transpose()?.unwrap_or_default();
    let mut failed = Vec::new();
    for (name, kind) in chosen {
        let started = Instant::now();
        let mut command = files.namespace(&python);
        let outcome = match kind {
            Kind::Python => {
                let script = repository().join("tests/clients/python/drive.py");
                command.arg(&python).arg(script).arg(name);
                files.drive(name, command.arg(&files.folder))
            }
            Kind::Rust => {
                command.arg(&rust).arg(name);
                files.drive(name, command.arg(&files.folder))
            }
            Kind::Suite => suite::run(&folder, &files),
        };
        let time = started.elapsed().as_secs_f32();
        match outcome {
            Ok(done) => println!("{name}: {done} ({time:.1} s)"),
            Err(error) => {
                println!("{name}: FAILED after {time:.1} s: {error:#}");
                failed.push(name);
            }
        }
    }
    if !failed.is_empty() {
        say(&format!("failed: {}", failed.join(", ")));
    }
    Ok(i32::from(!failed.is_empty()))
}

/// Returns what this machine has not that clients need, if there is something.
pub(crate) fn lack() -> Option<String> {
    let arch = std::env::consts::ARCH;
    if arch != Isa::X86.name() {
        return Some(format!("the guests are for x86_64; this machine is {arch}"));
    }
    if fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        return Some("/dev/kvm cannot be opened".to_owned());
    }
    let script = "ip link set lo up && ip tuntap add dev armlet0 mode tap && \
        mount -t tmpfs none /srv && python3 -c 'import venv, ensurepip'";
    let mut command = Command::new("unshare");
    let command = command.args([
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
        "sh",
        "-c",
        script,
    ]);
    let output = command.stdin(Stdio::null()).output();
    let why = match output {
        Ok(output) if output.status.success() => return None,
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    Some(format!(
        "root's rights, unshare, ip and python3 with venv are needed: {why}"
    ))
}
