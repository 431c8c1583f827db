//! The folder in which results and notes about failures are kept.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::progress::say;

/// How long a failure is believed to last.
pub(super) const NOTE_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// The folder in which results and notes are kept.
#[derive(Debug)]
pub(super) struct Cache {
    pub(super) root: PathBuf,
}

impl Cache {
    /// Opens `$XDG_CACHE_HOME/armlet`, or `~/.cache/armlet`.
    pub(super) fn open() -> Result<Self> {
        let base = match std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from) {
            Some(folder) if folder.is_absolute() => folder,
            _ => {
                let home = std::env::var_os("HOME");
                let home = home.context("neither HOME nor XDG_CACHE_HOME is set")?;
                PathBuf::from(home).join(".cache")
            }
        };
        Self::at(base.join("armlet"))
    }

    pub(super) fn at(root: PathBuf) -> Result<Self> {
        let folder = root.join("sysroot");
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {folder:?}"))?;
        Ok(Self { root })
    }

    pub(super) fn sysroot(&self, name: &str) -> PathBuf {
        self.root.join("sysroot").join(name)
    }

    /// Holds this part of the cache for this process until the returned file is closed.
    pub(super) fn lock(&self) -> Result<File> {
        let path = self.sysroot("lock");
        let file = File::create(&path).with_context(|| format!("cannot create {path:?}"))?;
        if file.try_lock().is_err() {
            say("waiting for another xtask that prepares the compiler");
            file.lock()
                .with_context(|| format!("cannot lock {path:?}"))?;
        }
        Ok(file)
    }

    /// Tries `what` unless it failed lately, and notes when it fails.
    pub(super) fn remember<T>(&self, what: &str, attempt: impl FnOnce() -> Result<T>) -> Result<T> {
        let note = self.sysroot(&format!("failed-{what}"));
        if let Some(reason) = recent(&note, NOTE_AGE) {
            bail!("{reason} (noted in {})", note.display());
        }
        let result = attempt();
        if let Err(error) = &result {
            fs::write(&note, format!("{error:#}"))
                .with_context(|| format!("cannot write {note:?}"))?;
        }
        result
    }
}

/// Returns the note's text, unless it is older than `age`.
pub(super) fn recent(note: &Path, age: Duration) -> Option<String> {
    let written = fs::metadata(note).and_then(|about| about.modified()).ok()?;
    let recent = written.elapsed().is_ok_and(|passed| passed < age);
    let text = fs::read_to_string(note).ok()?;
    recent.then(|| text.trim().to_owned())
}
