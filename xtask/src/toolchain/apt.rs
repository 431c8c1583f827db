//! Packages of Debian's that the compiler comes in.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::compiler::Compiler;
use crate::command::output_of;
use crate::progress::say;

/// Returns the package that `/usr/bin/rustc` belongs to, and its version.
pub(super) fn package_of(compiler: &Compiler) -> Result<(String, String)> {
    let owner = output_of(Command::new("dpkg-query").arg("-S").arg(&compiler.program))?;
    let (package, _) = owner
        .split_once(':')
        .with_context(|| format!("no package owns {:?}", compiler.program))?;
    let version = output_of(Command::new("dpkg-query").args(["-W", "-f", "${Version}", package]))?;
    Ok((package.to_owned(), version))
}

/// Installs packages on this machine, and says so.
pub(super) fn install(packages: &[&str]) -> Result<()> {
    ensure!(
        Path::new("/usr/bin/apt-get").exists(),
        "there is no apt-get to install {} with",
        packages.join(" ")
    );
    let foreign = output_of(Command::new("dpkg").arg("--print-foreign-architectures"))?;
    if packages.iter().any(|name| name.ends_with(":arm64"))
        && !foreign.lines().any(|line| line == "arm64")
    {
        say("adding the architecture arm64 to dpkg");
        as_root(&["dpkg", "--add-architecture", "arm64"])?;
    }
    say(&format!("installing with apt-get: {}", packages.join(" ")));
    as_root(&["apt-get", "-q", "update"])?;
    let install = [
        "apt-get",
        "-q",
        "install",
        "--yes",
        "--no-install-recommends",
    ];
    as_root(&[&install, packages].concat())
}

fn as_root(command: &[&str]) -> Result<()> {
    let root = fs::metadata("/proc/self").is_ok_and(|about| about.uid() == 0);
    let prefix: &[&str] = if root { &[] } else { &["sudo"] };
    let words = [prefix, &["env", "DEBIAN_FRONTEND=noninteractive"], command].concat();
    // Sudo may ask for a password, so it keeps the terminal.
    let status = Command::new(words[0])
        .args(&words[1..])
        .stdout(Stdio::null())
        .status();
    let words = words.join(" ");
    let status = status.with_context(|| format!("cannot run {words}"))?;
    ensure!(status.success(), "{words} failed");
    Ok(())
}
