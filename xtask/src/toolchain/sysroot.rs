//! A musl target for Debian's compiler, made from Debian packages alone.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::apt::{install, package_of};
use super::cache::Cache;
use super::compiler::Compiler;
use crate::command::{output_of, run_watched};
use crate::progress::say;

/// The target that is made.
pub(super) const MUSL: &str = "aarch64-unknown-linux-musl";

/// To be raised when the way in which the sysroot is made changes (then also `cargo clean`: cargo
/// tells standard libraries apart by the compiler's version only).
pub(super) const RECIPE: u32 = 1;

/// Packages that hold LLVM's static unwinder, of which the first that the archive has is taken.
const UNWINDERS: [&str; 2] = ["libunwind-14-dev:arm64", "libunwind-19-dev:arm64"];

/// Makes the sysroot `folder`, of which nothing is to be seen before it is complete and tried.
pub(super) fn make_sysroot(
    cache: &Cache,
    compiler: &Compiler,
    linker: &str,
    folder: &Path,
) -> Result<()> {
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

/// Returns a crate that depends on the standard library as the compiler's own build does.
///
/// The library's own workspace would not do: Debian leaves out what its tests depend on. Without
/// the feature `backtrace` a program is 170 KiB smaller; a stripped one has no names to show.
pub(super) fn std_manifest(source: &Path) -> String {
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

/// Returns a script that starts `program` with the sysroot in whose `bin` the script lies.
pub(super) fn wrapper(program: &Path) -> String {
    let program = program.display();
    format!("#!/bin/sh\nexec {program} --sysroot \"${{0%/bin/*}}\" \"$@\"\n")
}

/// Returns the static unwinder below `root`.
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

/// Returns the files in `folder` whose names end so, in the order of names.
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
