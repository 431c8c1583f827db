//! The standard library, compiled anew and for size, for releases.
//!
//! The one that comes with the compiler brings what shows a backtrace: readers of debug information,
//! which a stripped program has not, and an unwinder, which one that aborts does not need. They are
//! 150 KiB that cannot be left out otherwise. Cargo compiles the library from its sources
//! (`-Zbuild-std`), which the stable compiler does when it is told that it may (`RUSTC_BOOTSTRAP`).

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};

use crate::command::output_of;
use crate::progress::say;
use crate::toolchain::Compiler;

/// What cargo is told in addition.
const ARGUMENTS: [&str; 2] = [
    "-Zbuild-std=std,panic_abort",
    "-Zbuild-std-features=optimize_for_size",
];

/// What the compiler is told in addition. What aborts where it panics needs no tables, and no
/// library, to unwind by. Functions that are the same are not made one: that would tie code that is
/// seldom run (`packaging/release.ld`) to code that always is.
pub(crate) const FLAGS: [&str; 2] = ["-Cforce-unwind-tables=no", "-Zmerge-functions=disabled"];

/// Makes `cargo`, which builds a release with the active compiler, build the standard library too.
/// [`FLAGS`] are the caller's to add.
///
/// # Errors
/// No sources of the library, and no rustup that adds them.
pub(crate) fn add(cargo: &mut Command) -> Result<()> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let compiler = Compiler::ask(Path::new(&rustc))?;
    let sources = compiler.sysroot.join("lib/rustlib/src/rust/library/std");
    if !sources.is_dir() {
        say("running: rustup component add rust-src");
        output_of(
            Command::new("rustup")
                .args(["component", "add", "rust-src"])
                .stdin(Stdio::null()),
        )?;
        ensure!(sources.is_dir(), "rustup added no {sources:?}");
    }
    cargo.args(ARGUMENTS).env("RUSTC_BOOTSTRAP", "1");
    Ok(())
}
