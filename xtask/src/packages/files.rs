//! Archives and folders of packages, and the programs that read them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

pub(super) fn unpack(archive: &Path, into: &Path) -> Result<()> {
    run_silently(Command::new("dpkg").arg("-x").arg(archive).arg(into))
}

/// Returns the first file below `folder` whose name fits, in the order of names.
pub(super) fn find(folder: &Path, fits: &dyn Fn(&str) -> bool) -> Result<Option<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {folder:?}"))? {
        paths.push(entry?.path());
    }
    paths.sort();
    for path in paths {
        if path.is_dir() && !path.is_symlink() {
            if let Some(found) = find(&path, fits)? {
                return Ok(Some(found));
            }
        } else if path
            .file_name()
            .is_some_and(|name| fits(&name.to_string_lossy()))
        {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

pub(super) fn empty_folder(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove {folder:?}"))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot create {folder:?}"))
}

pub(super) fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {path:?}"))
}

pub(super) fn output_of(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{command:?} failed: {}",
        complaint.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub(super) fn run_silently(command: &mut Command) -> Result<()> {
    output_of(command).map(drop)
}
