//! The standard library, compiled anew and for size, for releases.
//!
//! The one that comes with the compiler brings what shows a backtrace: readers of debug information,
//! which a stripped program has not, and an unwinder, which one that aborts does not need. They are
//! 150 KiB that cannot be left out otherwise. Cargo compiles the library from its sources
//! (`-Zbuild-std`), which the stable compiler does when it is told that it may (`RUSTC_BOOTSTRAP`).

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::command::output_of;
use crate::progress::say;
use crate::toolchain::Compiler;

/// What cargo is told in addition.
const ARGUMENTS: [&str; 2] = [
    "-Zbuild-std=std,panic_abort",
    "-Zbuild-std-features=optimize_for_size",
];

/// What the compiler is told in addition. What aborts where it panics needs no tables, and no
/// library, to unwind by. Functions that are the same are made one by the linker (`build.rs`), which
/// leaves each in its section, and not by the compiler: `packaging/order.ld` names sections. What
/// several functions have in common is sought once more in what the first search has left. What panics
/// names its file without the line: each line would be a value of 24 bytes and an address that is filled in
/// at each start, for a thousand places. SHA-256, which
/// few .xz files have for a check, is a loop for CPUs without an instruction for it.
const FLAGS: [&str; 5] = [
    "-Cforce-unwind-tables=no",
    "-Zlocation-detail=file",
    "-Zmerge-functions=disabled",
    "-Cllvm-args=-machine-outliner-reruns=1",
    "--cfg=sha2_backend_soft=\"compact\"",
];

/// Makes `cargo`, which builds a release of `sources` in `target` with the active compiler, build the
/// standard library too, with `more` flags for the compiler. What is built names no path of this
/// computer.
///
/// # Errors
/// No sources of the library, and no rustup that adds them.
pub(crate) fn add(
    cargo: &mut Command,
    sources: &Path,
    target: &Path,
    more: &[String],
) -> Result<()> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let compiler = Compiler::ask(Path::new(&rustc))?;
    let library = compiler.sysroot.join("lib/rustlib/src/rust/library");
    let std = library.join("std");
    if !std.is_dir() {
        say("running: rustup component add rust-src");
        output_of(
            Command::new("rustup")
                .args(["component", "add", "rust-src"])
                .stdin(Stdio::null()),
        )?;
        ensure!(std.is_dir(), "rustup added no {std:?}");
    }
    let home = match std::env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cargo"),
    };
    // Panics name the file that they come from, and some files are made in the target folder. The
    // compiler goes by the last that fits.
    let mut remapped = vec![
        (target.to_owned(), "/target"),
        (sources.to_owned(), "/armlet"),
        (home.clone(), "/cargo"),
        (compiler.sysroot, "/rust"),
        (library, "/rust"),
    ];
    remapped.extend(registries(&home).map(|folder| (folder, "/cargo")));
    let flags = remapped
        .iter()
        .map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()))
        .chain(FLAGS.map(str::to_owned))
        .chain(more.iter().cloned());
    let flags = flags.collect::<Vec<_>>().join("\x1f");
    cargo
        .args(ARGUMENTS)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags);
    Ok(())
}

/// Returns the folders into which cargo unpacks crates: each is named after a registry's address,
/// which is another one where a mirror is used.
fn registries(home: &Path) -> impl Iterator<Item = PathBuf> {
    let folders = std::fs::read_dir(home.join("registry/src"));
    folders
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
}
