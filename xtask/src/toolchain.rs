//! The compiler for ARM64: which one is taken, and what is fetched for it.
//!
//! In the order of choice:
//!
//! 1. the active compiler with its own `aarch64-unknown-linux-musl`, which rustup adds if it can;
//! 2. on an ARM64 machine, the active compiler with glibc;
//! 3. Debian's compiler with a musl target that is made here from Debian packages alone;
//! 4. Debian's compiler and Debian's glibc target.
//!
//! Static glibc alone is over half a megabyte, so the last is for need only. What is made lies in
//! the user's cache folder, and so do the notes about what failed: delete a note to try again.

mod apt;
mod cache;
mod compiler;
mod sysroot;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::progress::say;
use apt::{install, package_of};
use cache::Cache;
use compiler::version;
use sysroot::{MUSL, RECIPE, make_sysroot};

use crate::command::{output_of, run_watched};
pub(crate) use compiler::Compiler;

const GNU: &str = "aarch64-unknown-linux-gnu";

/// How long rustup may do nothing before we take the network for unreachable.
const RUSTUP_SILENCE: Duration = Duration::from_secs(30);

/// The compiler of Debian that is installed when `/usr/bin/rustc` is missing or too old.
const DEBIAN_RUSTC: &str = "rustc-web";

/// What to add to `cargo build --target <target>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Toolchain {
    /// The target's triple.
    pub(crate) target: String,
    /// Variables to set for cargo.
    pub(crate) env: Vec<(String, String)>,
    /// Arguments to add.
    pub(crate) args: Vec<String>,
}

/// Returns the compiler for x86_64, on such a machine: its own, with what is linked statically.
pub(crate) fn x86_64() -> Result<Toolchain> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let active = Compiler::ask(Path::new(&rustc))?;
    let musl = "x86_64-unknown-linux-musl";
    match active.has_std(musl) {
        true => Ok(Toolchain::new(musl, &active.linker())),
        false => Ok(Toolchain::new("x86_64-unknown-linux-gnu", "cc").static_glibc()),
    }
}

/// Returns the compiler for ARM64, installed when it is missing.
pub(crate) fn arm64() -> Result<Toolchain> {
    let cache = Cache::open()?;
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let active = Compiler::ask(Path::new(&rustc))?;
    let reason = match active_musl(&cache, &active) {
        Ok(toolchain) => return Ok(toolchain),
        Err(reason) => reason,
    };
    if active.host == GNU {
        return Ok(Toolchain::new(GNU, "cc").static_glibc());
    }
    debian(&cache, &active).with_context(|| format!("{reason:#}, and Debian's did not do either"))
}

impl Toolchain {
    fn new(target: &str, linker: &str) -> Self {
        let toolchain = Self {
            target: target.to_owned(),
            env: Vec::new(),
            args: Vec::new(),
        };
        let name = toolchain.variable("LINKER");
        toolchain.with(&name, linker)
    }

    fn with(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Returns whether it is the active compiler that compiles, for musl.
    pub(crate) fn is_active(&self) -> bool {
        self.target.ends_with("musl") && self.env.iter().all(|(name, _)| name != "RUSTC")
    }

    fn static_glibc(self) -> Self {
        let name = self.variable("RUSTFLAGS");
        self.with(&name, "-Ctarget-feature=+crt-static")
    }

    /// Returns the variable by which cargo takes `setting` for this target.
    pub(crate) fn variable(&self, setting: &str) -> String {
        let target = self.target.replace('-', "_").to_uppercase();
        format!("CARGO_TARGET_{target}_{setting}")
    }
}

/// Returns the active compiler, with the musl target that was made for it.
fn active_musl(cache: &Cache, active: &Compiler) -> Result<Toolchain> {
    have_target(cache, active, MUSL)?;
    Ok(Toolchain::new(MUSL, &active.linker()))
}

/// Sees to it that the active compiler has a standard library for `target`, by rustup if need be.
pub(crate) fn ensure_target(target: &str) -> Result<()> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    have_target(&Cache::open()?, &Compiler::ask(Path::new(&rustc))?, target)
}

fn have_target(cache: &Cache, active: &Compiler, target: &str) -> Result<()> {
    if active.has_std(target) {
        return Ok(());
    }
    let rustup = output_of(Command::new("rustup").args(["which", "rustc"]));
    let rustup = rustup.with_context(|| format!("rustc has no {target}"))?;
    let theirs = fs::canonicalize(rustup.trim()).unwrap_or_default();
    let ours = fs::canonicalize(&active.sysroot).unwrap_or_default();
    ensure!(
        theirs.starts_with(&ours),
        "rustc has no {target}, and is not rustup's"
    );
    let _lock = cache.lock()?;
    // The name of the first target's note is older than the others'.
    let what = match target {
        MUSL => format!("rustup-{}", active.key()),
        other => format!("rustup-{other}-{}", active.key()),
    };
    cache.remember(&what, || add_target(cache, active, target))
}

/// Lets rustup add a target, as long as it gets on with it.
fn add_target(cache: &Cache, active: &Compiler, target: &str) -> Result<()> {
    say(&format!("running: rustup target add {target}"));
    let home = match std::env::var_os("RUSTUP_HOME") {
        Some(home) => PathBuf::from(home),
        None => PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".rustup"),
    };
    // Without a terminal rustup says little, but what it downloads and unpacks can be seen.
    let watched = ["downloads", "tmp"].map(|folder| home.join(folder));
    let log = cache.sysroot("rustup.log");
    let mut rustup = Command::new("rustup");
    rustup.args(["target", "add", target]);
    let added = run_watched(&mut rustup, &log, &watched, RUSTUP_SILENCE)
        .and_then(|()| {
            ensure!(active.has_std(target), "it is not there afterwards");
            Ok(())
        })
        .with_context(|| format!("rustup could not add {target}"));
    if let Err(error) = &added {
        say(&format!("{error:#}"));
    }
    added
}

/// Debian's compiler: with musl if that can be made, else with glibc.
fn debian(cache: &Cache, active: &Compiler) -> Result<Toolchain> {
    let compiler = debian_compiler()?;
    match debian_musl(cache, &compiler, &active.linker()) {
        Ok(toolchain) => Ok(toolchain),
        Err(error) => {
            say(&format!(
                "taking {GNU}, as {MUSL} could not be made: {error:#}"
            ));
            debian_gnu(&compiler)
        }
    }
}

/// `/usr/bin/rustc` of a sufficient version, installed if need be.
fn debian_compiler() -> Result<Compiler> {
    let usable = || {
        let compiler = Compiler::ask(Path::new("/usr/bin/rustc"))?;
        let wanted = env!("CARGO_PKG_RUST_VERSION");
        ensure!(
            version(&compiler.release) >= version(wanted),
            "Debian's rustc is {}, and {wanted} is needed",
            compiler.release
        );
        Ok(compiler)
    };
    usable().or_else(|_| {
        install(&[DEBIAN_RUSTC])?;
        usable()
    })
}

/// Debian's glibc target, linked statically.
fn debian_gnu(compiler: &Compiler) -> Result<Toolchain> {
    let mut missing = Vec::new();
    if !compiler.has_std(GNU) {
        let (package, _) = package_of(compiler)?;
        let std = format!("libstd-{}-dev:arm64", package.replacen("rustc", "rust", 1));
        missing.push(std);
    }
    if !Path::new("/usr/bin/aarch64-linux-gnu-gcc").exists() {
        missing.push("gcc-aarch64-linux-gnu".to_owned());
    }
    if !Path::new("/usr/aarch64-linux-gnu/lib/libc.a").exists() {
        missing.push("libc6-dev-arm64-cross".to_owned());
    }
    if !missing.is_empty() {
        install(&missing.iter().map(String::as_str).collect::<Vec<_>>())?;
    }
    Ok(Toolchain::new(GNU, "aarch64-linux-gnu-gcc")
        .with("RUSTC", &compiler.program.display().to_string())
        .with("RUSTDOC", "/usr/bin/rustdoc")
        .static_glibc())
}

/// Debian's compiler with a musl target of our own.
fn debian_musl(cache: &Cache, compiler: &Compiler, linker: &str) -> Result<Toolchain> {
    let name = format!("{}-r{RECIPE}", compiler.key());
    let folder = cache.sysroot(&name);
    if !folder.is_dir() {
        let _lock = cache.lock()?;
        if !folder.is_dir() {
            cache.remember(&name, || make_sysroot(cache, compiler, linker, &folder))?;
        }
    }
    let program = |name: &str| folder.join("bin").join(name).display().to_string();
    Ok(Toolchain::new(MUSL, linker)
        .with("RUSTC", &program("rustc"))
        .with("RUSTDOC", &program("rustdoc")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::cache::recent;
    use super::sysroot::{std_manifest, wrapper};
    use super::*;
    use anyhow::bail;

    fn compiler(sysroot: &Path) -> Compiler {
        Compiler {
            program: "/usr/bin/rustc".into(),
            sysroot: sysroot.to_owned(),
            release: "1.96.0".to_owned(),
            commit: "ac68faa20c58cbccd01e".to_owned(),
            host: "x86_64-unknown-linux-gnu".to_owned(),
        }
    }

    #[test]
    fn cargo_is_told_by_variables_of_the_target() {
        let toolchain = Toolchain::new(GNU, "cc").static_glibc();
        assert_eq!(
            toolchain.env,
            [
                ("LINKER", "cc"),
                ("RUSTFLAGS", "-Ctarget-feature=+crt-static")
            ]
            .map(|(name, value)| (
                format!("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_{name}"),
                value.to_owned()
            ))
        );
    }

    #[test]
    fn versions_compare_as_numbers() {
        assert!(version("1.96.0") >= version("1.95"));
        assert!(version("1.100.0-nightly") > version("1.95"));
        assert!(version("1.63.0") < version("1.95"));
        assert!(version("unknown") < version("1.95"));
    }

    #[test]
    fn a_target_is_there_when_its_std_is() {
        let folder = tempfile::tempdir().unwrap();
        let compiler = compiler(folder.path());
        assert!(!compiler.has_std(MUSL));
        let library = folder.path().join("lib/rustlib").join(MUSL).join("lib");
        fs::create_dir_all(&library).unwrap();
        fs::write(library.join("libstd_detect-1.rlib"), "").unwrap();
        assert!(!compiler.has_std(MUSL));
        fs::write(library.join("libstd-2.rlib"), "").unwrap();
        assert!(compiler.has_std(MUSL));
        assert!(!compiler.has_std(GNU));
    }

    #[test]
    fn rust_lld_is_preferred_and_binutils_serve_without_it() {
        let folder = tempfile::tempdir().unwrap();
        let compiler = compiler(folder.path());
        assert_eq!(compiler.linker(), "aarch64-linux-gnu-ld");
        let bin = folder.path().join("lib/rustlib").join(&compiler.host);
        let bin = bin.join("bin");
        fs::create_dir_all(&bin).unwrap();
        fs::write(bin.join("rust-lld"), "").unwrap();
        assert_eq!(
            compiler.linker(),
            bin.join("rust-lld").display().to_string()
        );
    }

    #[test]
    fn the_active_compiler_is_understood() {
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let compiler = Compiler::ask(Path::new(&rustc)).unwrap();
        assert!(version(&compiler.release) >= (1, 95));
        assert!(compiler.has_std(&compiler.host));
    }

    #[test]
    fn a_failure_is_remembered_and_success_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("armlet")).unwrap();
        assert_eq!(cache.remember("x", || Ok(1)).unwrap(), 1);
        let error = cache.remember::<()>("x", || bail!("no network"));
        assert_eq!(error.unwrap_err().to_string(), "no network");

        let error = cache.remember("x", || Ok(1)).unwrap_err().to_string();
        assert!(error.starts_with("no network (noted in "), "{error}");
        let note = cache.sysroot("failed-x");
        assert_eq!(recent(&note, Duration::ZERO), None);
        fs::remove_file(note).unwrap();
        assert_eq!(cache.remember("x", || Ok(1)).unwrap(), 1);
    }

    #[test]
    fn the_wrapper_finds_its_sysroot() {
        let folder = tempfile::tempdir().unwrap();
        let bin = folder.path().join("a b/bin");
        fs::create_dir_all(&bin).unwrap();
        let script = bin.join("rustc");
        fs::write(&script, wrapper(Path::new("/bin/echo"))).unwrap();
        let output = output_of(Command::new("sh").arg(&script).args(["-vV", "c d"])).unwrap();
        let expected = format!(
            "--sysroot {} -vV c d\n",
            folder.path().join("a b").display()
        );
        assert_eq!(output, expected);
    }

    #[test]
    fn the_manifest_quotes_paths() {
        let text = std_manifest(Path::new("/a b/\"library"));
        assert!(
            text.contains(r#"test = { path = "/a b/\"library/test" }"#),
            "{text}"
        );
    }

    #[test]
    #[ignore = "needs Debian's archive and two minutes"]
    fn debian_makes_a_musl_target() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("armlet")).unwrap();
        let compiler = debian_compiler().unwrap();
        for linker in ["aarch64-linux-gnu-ld".to_owned(), debian_linker()] {
            let toolchain = debian_musl(&cache, &compiler, &linker).unwrap();
            assert_eq!(toolchain.target, MUSL);
            let rustc = &toolchain.env.iter().find(|(name, _)| name == "RUSTC");
            assert!(Path::new(&rustc.unwrap().1).is_file());
        }
    }

    fn debian_linker() -> String {
        Compiler::ask(Path::new("rustc")).unwrap().linker()
    }
}
