//! Clients from the package indexes of Python and Rust, with pinned versions.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::command::{output_of, run_watched};
use crate::progress::say;
use crate::repository::{cargo, repository};

/// How long a package manager may do nothing.
const SILENCE: Duration = Duration::from_secs(120);

/// Why clients are not driven, though nothing is wrong with them.
#[derive(Debug)]
pub(crate) struct Unreachable(String);

impl std::fmt::Display for Unreachable {
    fn fmt(&self, form: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(form, "the package index cannot be reached: {}", self.0)
    }
}

impl std::error::Error for Unreachable {}

/// What package managers say when they do not reach their index.
const SIGNS: [&str; 6] = [
    "NewConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "name resolution",
    "failed to download",
    "failed to get",
];

/// Runs a package manager, with its output in `log`.
fn fetch(command: &mut Command, log: &Path, watched: &[PathBuf]) -> Result<()> {
    let Err(error) = run_watched(command, log, watched, SILENCE) else {
        return Ok(());
    };
    let said = fs::read_to_string(log).unwrap_or_default();
    match SIGNS.iter().find(|sign| said.contains(*sign)) {
        Some(_) => Err(error).context(Unreachable(log.display().to_string())),
        None => Err(error).with_context(|| format!("see {log:?}")),
    }
}

/// Says what was done, if that took long.
fn took(what: &str, started: Instant) {
    if started.elapsed() > Duration::from_secs(2) {
        say(&format!(
            "{what} after {:.0} s",
            started.elapsed().as_secs_f32()
        ));
    }
}

/// Installs the Python clients; returns the interpreter that has them.
pub(super) fn python(folder: &Path) -> Result<PathBuf> {
    let list = repository().join("tests/clients/python/requirements.txt");
    let wanted = fs::read(&list).with_context(|| format!("cannot read {list:?}"))?;
    let venv = folder.join("python");
    let (stamp, python) = (venv.join("installed"), venv.join("bin/python"));
    if fs::read(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(python);
    }
    say("installing the Python clients");
    let started = Instant::now();
    drop(fs::remove_dir_all(&venv));
    output_of(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--no-deps", "--requirement"]);
    fetch(
        pip.arg(&list),
        &folder.join("logs/pip"),
        std::slice::from_ref(&venv),
    )?;
    fs::write(&stamp, wanted).with_context(|| format!("cannot write {stamp:?}"))?;
    took("installed", started);
    Ok(python)
}

/// Returns where the package of clients in Rust is described.
fn manifest() -> PathBuf {
    repository().join("tests/clients/rust/Cargo.toml")
}

/// Builds the program that drives the Rust clients; returns where it lies.
pub(super) fn rust(folder: &Path) -> Result<PathBuf> {
    let started = Instant::now();
    let log = folder.join("logs/cargo");
    let mut command = cargo();
    command
        .args(["fetch", "--locked", "--manifest-path"])
        .arg(manifest());
    fetch(&mut command, &log, &[])?;
    let build = build_folder(folder);
    if !build.exists() {
        say("building the Rust clients");
    }
    let mut command = cargo();
    command
        .args(["build", "--locked", "--offline", "--manifest-path"])
        .arg(manifest());
    command.arg("--target-dir").arg(&build);
    run_watched(&mut command, &log, std::slice::from_ref(&build), SILENCE)
        .with_context(|| format!("see {log:?}"))?;
    took("built", started);
    Ok(build.join("debug/armlet-clients"))
}

/// Where the Rust clients are built.
pub(super) fn build_folder(folder: &Path) -> PathBuf {
    folder.join("build")
}

/// Copies the sources of a crate that the Rust clients use to `folder`, as they are published, but for
/// the mark that they belong to no other workspace; returns the copy.
pub(super) fn sources(name: &str, folder: &Path) -> Result<PathBuf> {
    let mut command = cargo();
    command.args([
        "metadata",
        "--format-version",
        "1",
        "--locked",
        "--offline",
        "--manifest-path",
    ]);
    let said = output_of(command.arg(manifest()))?;
    let end = "/Cargo.toml\"";
    let crates = said.split("\"manifest_path\":\"").skip(1);
    let mut crates = crates.filter_map(|rest| rest.split_once(end).map(|(path, _)| path));
    let start = format!("{name}-");
    let is_it = |path: &&str| {
        path.rsplit('/')
            .next()
            .is_some_and(|last| last.starts_with(&start))
    };
    let original = crates
        .find(is_it)
        .with_context(|| format!("no crate {name}"))?;
    let copy = folder.join(name);
    drop(fs::remove_dir_all(&copy));
    let status = Command::new("cp")
        .arg("-rp")
        .arg(original)
        .arg(&copy)
        .status();
    ensure!(
        status.is_ok_and(|status| status.success()),
        "cannot copy {original}"
    );
    let manifest = copy.join("Cargo.toml");
    let mut text =
        fs::read_to_string(&manifest).with_context(|| format!("cannot read {manifest:?}"))?;
    text.push_str("\n[workspace]\n");
    fs::write(&manifest, text).with_context(|| format!("cannot write {manifest:?}"))?;
    // It has the tests run by sudo.
    drop(fs::remove_dir_all(copy.join(".cargo")));
    Ok(copy)
}
