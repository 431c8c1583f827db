//! A Rust compiler: which one it is, and what comes with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::output_of;

/// A Rust compiler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Compiler {
    pub(super) program: PathBuf,
    pub(crate) sysroot: PathBuf,
    pub(super) release: String,
    pub(super) commit: String,
    pub(super) host: String,
}

impl Compiler {
    pub(crate) fn ask(program: &Path) -> Result<Self> {
        let about = output_of(Command::new(program).arg("-vV"))?;
        let sysroot = output_of(Command::new(program).args(["--print", "sysroot"]))?;
        let value = |key: &str| {
            let mut lines = about.lines().filter_map(|line| line.split_once(": "));
            let found = lines.find(|(name, _)| *name == key);
            found
                .map(|(_, value)| value.to_owned())
                .with_context(|| format!("{program:?} -vV does not tell its {key}"))
        };
        Ok(Self {
            program: program.to_owned(),
            sysroot: PathBuf::from(sysroot.trim()),
            release: value("release")?,
            commit: value("commit-hash")?,
            host: value("host")?,
        })
    }

    pub(super) fn has_std(&self, target: &str) -> bool {
        let folder = self.sysroot.join("lib/rustlib").join(target).join("lib");
        let is_std = |name: &str| {
            (name.starts_with("libstd-") || name == "libstd.rlib") && name.ends_with(".rlib")
        };
        fs::read_dir(folder).is_ok_and(|mut entries| {
            entries.any(|entry| {
                entry.is_ok_and(|entry| entry.file_name().to_str().is_some_and(is_std))
            })
        })
    }

    /// Returns the linker that comes with rustup's compilers.
    pub(super) fn rust_lld(&self) -> Option<PathBuf> {
        let tools = self.sysroot.join("lib/rustlib").join(&self.host);
        let linker = tools.join("bin/rust-lld");
        linker.is_file().then_some(linker)
    }

    /// Returns the linker for a self-contained target.
    pub(super) fn linker(&self) -> String {
        match self.rust_lld() {
            Some(path) => path.display().to_string(),
            // Binutils link musl programs just as well, only the file is padded more.
            None if self.host.starts_with("aarch64") => "ld".to_owned(),
            None => "aarch64-linux-gnu-ld".to_owned(),
        }
    }

    /// Returns the version and build, as part of a file's name.
    pub(super) fn key(&self) -> String {
        let commit = self.commit.get(..9).unwrap_or(&self.commit);
        format!("{}-{commit}", self.release)
    }
}

/// Major and minor number.
pub(super) fn version(text: &str) -> (u32, u32) {
    let mut numbers = text
        .split('.')
        .map(|number| number.parse().unwrap_or_default());
    (
        numbers.next().unwrap_or_default(),
        numbers.next().unwrap_or_default(),
    )
}
