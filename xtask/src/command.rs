//! Other programs: what they print, what went wrong in them, and how long they may be silent.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

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

/// Returns the bytes in a file or below a folder, as far as they can be seen.
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

/// Returns the line of a command's output that says what is wrong.
pub(crate) fn complaint(text: &str) -> &str {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let error = lines
        .clone()
        .find(|line| line.starts_with("error") || line.starts_with("E:"));
    error.or_else(|| lines.next_back()).unwrap_or("it failed")
}

pub(crate) fn output_of(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(anyhow!("{name}: {}", complaint(&text)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_silent_command_is_ended_and_a_busy_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let watched = [folder.path().join("downloads")];
        fs::create_dir(&watched[0]).unwrap();
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]).current_dir(folder.path());
            run_watched(&mut command, &log, &watched, Duration::from_secs(1))
        };
        let started = std::time::Instant::now();
        let error = shell("echo start; exec sleep 60").unwrap_err();
        assert_eq!(error.to_string(), "nothing came for 1 s");
        assert!(started.elapsed() < Duration::from_secs(30));

        shell("for n in 1 2 3 4 5 6; do echo $n >> downloads/a; sleep 0.3; done").unwrap();
        let error = shell("echo 'error: no route'; echo done; exit 1").unwrap_err();
        assert_eq!(error.to_string(), "error: no route");
    }

    #[test]
    fn the_line_that_matters_is_quoted() {
        let cargo = "warning: x\nerror: no matching package\nsearched: rand\n";
        assert_eq!(complaint(cargo), "error: no matching package");
        assert_eq!(
            complaint("Get:1 x\nE: Unable to locate y\n"),
            "E: Unable to locate y"
        );
        assert_eq!(complaint("a\nlast\n\n"), "last");
        assert_eq!(complaint(""), "it failed");
    }
}
