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

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::progress::say;
use crate::watched::run_watched;

const MUSL: &str = "aarch64-unknown-linux-musl";
const GNU: &str = "aarch64-unknown-linux-gnu";

/// To be raised when the way in which the sysroot is made changes (then also `cargo clean`: cargo
/// tells standard libraries apart by the compiler's version only).
const RECIPE: u32 = 1;

/// How long rustup may do nothing before we take the network for unreachable.
const RUSTUP_SILENCE: Duration = Duration::from_secs(30);

/// How long a failure is believed to last.
const NOTE_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// The compiler of Debian that is installed when `/usr/bin/rustc` is missing or too old.
const DEBIAN_RUSTC: &str = "rustc-web";

/// Packages that hold LLVM's static unwinder, of which the first that the archive has is taken.
const UNWINDERS: [&str; 2] = ["libunwind-14-dev:arm64", "libunwind-19-dev:arm64"];

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

/// The compiler for x86_64, on such a machine: its own, with what is linked statically.
pub(crate) fn x86_64() -> Result<Toolchain> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let active = Compiler::ask(Path::new(&rustc))?;
    let musl = "x86_64-unknown-linux-musl";
    match active.has_std(musl) {
        true => Ok(Toolchain::new(musl, &active.linker())),
        false => Ok(Toolchain::new("x86_64-unknown-linux-gnu", "cc").static_glibc()),
    }
}

/// The compiler for ARM64, installed when it is missing.
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

    /// Whether it is the active compiler that compiles, for musl.
    pub(crate) fn is_active(&self) -> bool {
        self.target.ends_with("musl") && self.env.iter().all(|(name, _)| name != "RUSTC")
    }

    fn static_glibc(self) -> Self {
        let name = self.variable("RUSTFLAGS");
        self.with(&name, "-Ctarget-feature=+crt-static")
    }

    /// The variable by which cargo takes `setting` for this target.
    pub(crate) fn variable(&self, setting: &str) -> String {
        let target = self.target.replace('-', "_").to_uppercase();
        format!("CARGO_TARGET_{target}_{setting}")
    }
}

/// A Rust compiler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Compiler {
    program: PathBuf,
    pub(crate) sysroot: PathBuf,
    release: String,
    commit: String,
    host: String,
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

    fn has_std(&self, target: &str) -> bool {
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

    /// The linker that comes with rustup's compilers.
    fn rust_lld(&self) -> Option<PathBuf> {
        let tools = self.sysroot.join("lib/rustlib").join(&self.host);
        let linker = tools.join("bin/rust-lld");
        linker.is_file().then_some(linker)
    }

    /// The linker for a self-contained target.
    fn linker(&self) -> String {
        match self.rust_lld() {
            Some(path) => path.display().to_string(),
            // Binutils link musl programs just as well, only the file is padded more.
            None if self.host.starts_with("aarch64") => "ld".to_owned(),
            None => "aarch64-linux-gnu-ld".to_owned(),
        }
    }

    /// The version and build, as part of a file's name.
    fn key(&self) -> String {
        let commit = self.commit.get(..9).unwrap_or(&self.commit);
        format!("{}-{commit}", self.release)
    }
}

/// The folder in which results and notes are kept.
#[derive(Debug)]
struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens `$XDG_CACHE_HOME/armlet`, or `~/.cache/armlet`.
    fn open() -> Result<Self> {
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

    fn at(root: PathBuf) -> Result<Self> {
        let folder = root.join("sysroot");
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {folder:?}"))?;
        Ok(Self { root })
    }

    fn sysroot(&self, name: &str) -> PathBuf {
        self.root.join("sysroot").join(name)
    }

    /// Holds this part of the cache for this process until the returned file is closed.
    fn lock(&self) -> Result<File> {
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
    fn remember<T>(&self, what: &str, attempt: impl FnOnce() -> Result<T>) -> Result<T> {
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

/// The note's text, unless it is older than `age`.
fn recent(note: &Path, age: Duration) -> Option<String> {
    let written = fs::metadata(note).and_then(|about| about.modified()).ok()?;
    let recent = written.elapsed().is_ok_and(|passed| passed < age);
    let text = fs::read_to_string(note).ok()?;
    recent.then(|| text.trim().to_owned())
}

/// The active compiler, with the musl target that was made for it.
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

/// Major and minor number.
fn version(text: &str) -> (u32, u32) {
    let mut numbers = text
        .split('.')
        .map(|number| number.parse().unwrap_or_default());
    (
        numbers.next().unwrap_or_default(),
        numbers.next().unwrap_or_default(),
    )
}

/// The package that `/usr/bin/rustc` belongs to, and its version.
fn package_of(compiler: &Compiler) -> Result<(String, String)> {
    let owner = output_of(Command::new("dpkg-query").arg("-S").arg(&compiler.program))?;
    let (package, _) = owner
        .split_once(':')
        .with_context(|| format!("no package owns {:?}", compiler.program))?;
    let version = output_of(Command::new("dpkg-query").args(["-W", "-f", "${Version}", package]))?;
    Ok((package.to_owned(), version))
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

/// Installs packages on this machine, and says so.
fn install(packages: &[&str]) -> Result<()> {
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

/// Makes the sysroot `folder`, of which nothing is to be seen before it is complete and tried.
fn make_sysroot(cache: &Cache, compiler: &Compiler, linker: &str, folder: &Path) -> Result<()> {
    say("making a musl target from Debian's packages (once, in 1 to 2 minutes)");
    if !Path::new("/usr/bin/aarch64-linux-gnu-gcc").exists() {
        install(&["gcc-aarch64-linux-gnu"])?;
    }
    // Always the same path: it goes into the hashes by which crates know the standard library.
    let work = cache.sysroot("work");
    remove_folder(&work)?;
    let log = cache.sysroot("std.log");
    let made = make_in(&work, compiler, linker, &log).and_then(|sysroot| {
        fs::rename(&sysroot, folder).with_context(|| format!("cannot make {folder:?}"))
    });
    remove_folder(&work)?;
    made
}

fn make_in(work: &Path, compiler: &Compiler, linker: &str, log: &Path) -> Result<PathBuf> {
    let root = work.join("root");
    fs::create_dir_all(&root).with_context(|| format!("cannot create {root:?}"))?;
    fetch(work, compiler, &root)?;

    let source = format!("usr/src/rustc-{}/library", compiler.release);
    let rlibs = build_std(work, compiler, &root.join(source), log)?;

    let sysroot = work.join("sysroot");
    assemble(&sysroot, compiler, &rlibs, &root)?;
    try_out(&sysroot, compiler, linker, work)?;
    Ok(sysroot)
}

/// Unpacks the packages that are needed into `root`.
///
/// None is installed: a private set of package lists finds those for ARM64 on a machine that does
/// not have that architecture, and nobody has to be root.
fn fetch(work: &Path, compiler: &Compiler, root: &Path) -> Result<()> {
    let (package, version) = package_of(compiler)?;
    let source = format!("{}-src={version}", package.replacen("rustc", "rust", 1));
    let apt = Apt::open(work.join("apt"))?;
    let mut archives = apt.download(&[&source, "musl-dev:arm64"])?;
    let unwinder = UNWINDERS.iter().find_map(|one| apt.download(&[one]).ok());
    archives.extend(unwinder.with_context(|| format!("there is none of {UNWINDERS:?}"))?);
    for archive in archives {
        unpack(&archive, root)?;
    }
    Ok(())
}

/// Unpacks a package, but of the compiler's source only the library, which is a sixth of it.
fn unpack(archive: &Path, root: &Path) -> Result<()> {
    let mut dpkg = Command::new("dpkg")
        .arg("--fsys-tarfile")
        .arg(archive)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run dpkg")?;
    let data = dpkg.stdout.take().context("dpkg has no output")?;
    let unpacked = Command::new("tar")
        .arg("-xC")
        .arg(root)
        .arg("--no-wildcards-match-slash")
        .args(["compiler", "src"].map(|part| format!("--exclude=./usr/src/rustc-*/{part}")))
        .stdin(data)
        .status()
        .context("cannot run tar")?;
    let read = dpkg.wait().context("cannot wait for dpkg")?;
    ensure!(
        unpacked.success() && read.success(),
        "cannot unpack {archive:?}"
    );
    Ok(())
}

/// An apt with its own lists of packages.
#[derive(Debug)]
struct Apt {
    folder: PathBuf,
    native: String,
}

impl Apt {
    fn open(folder: PathBuf) -> Result<Self> {
        for part in ["lists/partial", "cache/archives/partial"] {
            let part = folder.join(part);
            fs::create_dir_all(&part).with_context(|| format!("cannot create {part:?}"))?;
        }
        let native = output_of(Command::new("dpkg").arg("--print-architecture"))?;
        let native = native.trim().to_owned();
        let apt = Self { folder, native };
        // A single list that fails is of no interest if the packages are found all the same.
        if let Err(error) = output_of(apt.command().arg("update")) {
            say(&format!("{error:#}"));
        }
        Ok(apt)
    }

    fn command(&self) -> Command {
        let folder = self.folder.display();
        let mut command = Command::new("apt-get");
        command.current_dir(&self.folder).arg("-q");
        for option in [
            format!("APT::Architectures::={}", self.native),
            "APT::Architectures::=arm64".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            format!("Dir::State::Lists={folder}/lists"),
            format!("Dir::Cache={folder}/cache"),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }

    /// Downloads packages and gives the files that were not there before.
    fn download(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        let before = files(&self.folder, ".deb")?;
        output_of(self.command().arg("download").args(packages))?;
        let mut archives = files(&self.folder, ".deb")?;
        archives.retain(|path| !before.contains(path));
        Ok(archives)
    }
}

/// Builds the standard library, and gives the folder of its crates.
///
/// What it depends on lies beside it in the source package, so no crate is downloaded.
fn build_std(work: &Path, compiler: &Compiler, source: &Path, log: &Path) -> Result<PathBuf> {
    let build = work.join("build");
    let stub = build.join("src");
    fs::create_dir_all(&stub).with_context(|| format!("cannot create {stub:?}"))?;
    write(&stub.join("lib.rs"), "")?;
    write(&build.join("Cargo.toml"), &std_manifest(source))?;
    let lock = source.join("Cargo.lock");
    fs::copy(&lock, build.join("Cargo.lock")).with_context(|| format!("cannot copy {lock:?}"))?;

    let remap = format!(
        "--remap-path-prefix={}=/rustc/{}/library",
        source.display(),
        compiler.commit
    );
    // Bitcode lets the final program be optimised together with the standard library.
    let flags = [
        "-Zforce-unstable-if-unmarked",
        "-Cembed-bitcode=yes",
        &remap,
    ];
    let vendored = format!("source.vendored.directory={:?}", source.join("vendor"));
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(&build)
        .args(["build", "--release", "--offline", "--target", MUSL])
        .args(["--config", "source.crates-io.replace-with=\"vendored\""])
        .args(["--config", &vendored])
        // The standard library may use what is unstable.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTC", &compiler.program)
        .env("RUSTC_WRAPPER", "")
        .env("RUSTC_WORKSPACE_WRAPPER", "")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env("CARGO_TARGET_DIR", build.join("target"))
        .env("CARGO_INCREMENTAL", "0")
        .env("__CARGO_DEFAULT_LIB_METADATA", "armlet");
    // A crate may take long to compile without a word.
    let silence = Duration::from_secs(600);
    run_watched(&mut cargo, log, &[build.join("target")], silence)
        .with_context(|| format!("std does not build (see {})", log.display()))?;
    Ok(build.join("target").join(MUSL).join("release/deps"))
}

/// A crate that depends on the standard library as the compiler's own build does.
///
/// The library's own workspace would not do: Debian leaves out what its tests depend on. Without
/// the feature `backtrace` a program is 170 KiB smaller; a stripped one has no names to show.
fn std_manifest(source: &Path) -> String {
    let path = |name: &str| format!("{{ path = {:?} }}", source.join(name));
    let library = source.join("std");
    let features = r#"["panic-unwind", "optimize_for_size"]"#;
    format!(
        r#"cargo-features = ["profile-rustflags"]

[package]
name = "sysroot"
version = "0.0.0"
edition = "2024"

[workspace]

[dependencies]
std = {{ path = {library:?}, features = {features} }}
proc_macro = {proc_macro}
test = {test}

[patch.crates-io]
rustc-std-workspace-core = {core}
rustc-std-workspace-alloc = {alloc}
rustc-std-workspace-std = {std}

[profile.release]
opt-level = "s"
codegen-units = 1

[profile.release.package.compiler_builtins]
codegen-units = 10000

[profile.release.package.panic_abort]
rustflags = ["-Cpanic=abort"]
"#,
        proc_macro = path("proc_macro"),
        test = path("test"),
        core = path("rustc-std-workspace-core"),
        alloc = path("rustc-std-workspace-alloc"),
        std = path("rustc-std-workspace-std"),
    )
}

/// Puts together what the compiler looks for in a sysroot.
fn assemble(sysroot: &Path, compiler: &Compiler, rlibs: &Path, root: &Path) -> Result<()> {
    let rustlib = sysroot.join("lib/rustlib");
    let library = rustlib.join(MUSL).join("lib");
    let contained = library.join("self-contained");
    let bin = sysroot.join("bin");
    for folder in [&contained, &bin] {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {folder:?}"))?;
    }

    // Build scripts and procedural macros are for this machine.
    let host = compiler.sysroot.join("lib/rustlib").join(&compiler.host);
    symlink(&host, rustlib.join(&compiler.host))
        .with_context(|| format!("cannot link {host:?} into the sysroot"))?;
    for file in files(rlibs, ".rlib")? {
        if !name_of(&file).starts_with("libsysroot-") {
            copy_into(&file, &library)?;
        }
    }

    let musl = root.join("usr/lib/aarch64-linux-musl");
    for file in files(&musl, ".o")?.into_iter().chain(files(&musl, ".a")?) {
        copy_into(&file, &contained)?;
    }
    for name in ["crtbegin.o", "crtbeginS.o", "crtend.o", "crtendS.o"] {
        let mut gcc = Command::new("aarch64-linux-gnu-gcc");
        let path = output_of(gcc.arg(format!("-print-file-name={name}")))?;
        copy_into(Path::new(path.trim()), &contained)?;
    }
    // This unwinder was compiled for glibc, whose checking fprintf is the one function that musl
    // lacks. It is called only to complain before aborting.
    let unwinder = unwinder(root)?;
    let mut objcopy = Command::new("aarch64-linux-gnu-objcopy");
    objcopy.args(["--redefine-sym", "__fprintf_chk=abort"]);
    output_of(objcopy.arg(&unwinder).arg(contained.join("libunwind.a")))?;

    for name in ["rustc", "rustdoc"] {
        let script = bin.join(name);
        let program = compiler.program.with_file_name(name);
        write(&script, &wrapper(&program))?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("cannot make {script:?} executable"))?;
    }
    Ok(())
}

/// A script that starts `program` with the sysroot in whose `bin` the script lies.
fn wrapper(program: &Path) -> String {
    let program = program.display();
    format!("#!/bin/sh\nexec {program} --sysroot \"${{0%/bin/*}}\" \"$@\"\n")
}

/// The static unwinder below `root`.
fn unwinder(root: &Path) -> Result<PathBuf> {
    let library = root.join("usr/lib");
    let entries = fs::read_dir(&library).with_context(|| format!("cannot list {library:?}"))?;
    let mut folders = entries.flatten().map(|entry| entry.path());
    folders
        .find(|folder| name_of(folder).starts_with("llvm-"))
        .map(|folder| folder.join("lib/libunwind.a"))
        .filter(|file| file.is_file())
        .context("the unwinder's package has no libunwind.a")
}

/// Links a program against the new sysroot, as tests and as releases are.
fn try_out(sysroot: &Path, compiler: &Compiler, linker: &str, work: &Path) -> Result<()> {
    let source = work.join("try.rs");
    write(
        &source,
        "fn main() {\n\
         let caught = std::panic::catch_unwind(|| panic!(\"{:?}\", std::time::Instant::now()));\n\
         let joined = std::thread::spawn(|| std::fs::read(\"/proc/self/stat\")).join();\n\
         println!(\"{:?} {:.1}\", joined.is_ok(), f64::from(u8::from(caught.is_err())));\n\
         }\n",
    )?;
    for flags in [
        ["-Cpanic=unwind", "-Clto=off"],
        ["-Cpanic=abort", "-Clto=fat"],
    ] {
        let mut rustc = Command::new(&compiler.program);
        rustc
            .arg("--sysroot")
            .arg(sysroot)
            .args(["--edition=2024", "--target", MUSL])
            .arg(format!("-Clinker={linker}"))
            .args(flags)
            .arg("-o")
            .arg(work.join("try"))
            .arg(&source);
        output_of(&mut rustc).context("the new target links no program")?;
    }
    Ok(())
}

/// The files in `folder` whose names end so, in the order of names.
fn files(folder: &Path, end: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {folder:?}"))?;
    let paths = entries.flatten().map(|entry| entry.path());
    let mut paths = paths
        .filter(|path| name_of(path).ends_with(end))
        .collect::<Vec<_>>();
    paths.sort();
    Ok(paths)
}

fn name_of(path: &Path) -> &str {
    path.file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default()
}

fn copy_into(file: &Path, folder: &Path) -> Result<()> {
    fs::copy(file, folder.join(name_of(file))).with_context(|| format!("cannot copy {file:?}"))?;
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {path:?}"))
}

fn remove_folder(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove {folder:?}"))?;
    }
    Ok(())
}

/// The line of a command's output that says what is wrong.
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
