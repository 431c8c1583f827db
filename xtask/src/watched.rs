//! A command that is waited for as long as it gets on.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::toolchain::complaint;

/// Runs a command with its output in `log`, and ends it after `silence` without any progress:
/// a longer log, or more in the `watched` folders.
pub(crate) fn run_watched(
    command: &mut Command,
    log: &Path,
    watched: &[PathBuf],
    silence: Duration,
) -> Result<()> {
    let output = File::create(log).with_context(|| format!("cannot create {log:?}"))?;
    let errors = output
        .try_clone()
        .context("cannot share the log with a command")?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    let sizes = || folder_size(log) + watched.iter().map(|path| folder_size(path)).sum::<u64>();
    let mut seen = sizes();
    let mut since = Instant::now();
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for a command")? {
            let text = fs::read_to_string(log).unwrap_or_default();
            ensure!(status.success(), "{}", complaint(&text));
            return Ok(());
        }
        let now = sizes();
        if now != seen {
            seen = now;
            since = Instant::now();
        } else if since.elapsed() > silence {
            child.kill().context("cannot end a command")?;
            child.wait().context("cannot wait for a command")?;
            bail!("nothing came for {} s", silence.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The bytes in a file or below a folder, as far as they can be seen.
fn folder_size(path: &Path) -> u64 {
    let Ok(about) = fs::symlink_metadata(path) else {
        return 0;
    };
    if !about.is_dir() {
        return about.len();
    }
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| folder_size(&entry.path())).sum()
}
