//! `cargo xtask dist`: what a release is made of, the same bytes wherever it is made.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use argh::FromArgs;

use crate::help::Program;
use crate::progress::say;
use crate::small_std;

/// Make static binaries for ARM64 and x86_64, Debian packages, completions and a man page in
/// target/dist.
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "dist")]
pub(crate) struct Dist {
    /// build each binary once more, from a copy of the sources in another folder, and fail if the
    /// bytes differ
    #[argh(switch)]
    twice: bool,
}

/// A computer that a binary is for: Rust's name of it and Debian's.
struct Architecture {
    target: &'static str,
    name: &'static str,
    debian: &'static str,
}

const ARCHITECTURES: [Architecture; 2] = [
    Architecture {
        target: "aarch64-unknown-linux-musl",
        name: "aarch64",
        debian: "arm64",
    },
    Architecture {
        target: "x86_64-unknown-linux-musl",
        name: "x86_64",
        debian: "amd64",
    },
];

const UNIT: &str = "packaging/armlet@.service";
/// The folder of guests that run as services, below the root.
const GUESTS: &str = "etc/armlet";

impl Dist {
    /// Makes the release and gives the exit status.
    pub(crate) fn run(&self) -> Result<i32> {
        let sources = crate::repository::repository();
        let out = crate::repository::target_folder()?.join("dist");
        if out.exists() {
            fs::remove_dir_all(&out).with_context(|| format!("cannot empty {out:?}"))?;
        }
        let completions = out.join("completions");
        fs::create_dir_all(&completions).with_context(|| format!("cannot make {out:?}"))?;
        let version = env!("CARGO_PKG_VERSION");
        let time = source_time(&sources)?;
        let work = out.join(".work");

        let mut binaries = Vec::new();
        for architecture in &ARCHITECTURES {
            let built = build(&sources, &work.join("first"), architecture)?;
            let binary = out.join(format!("armlet-{version}-{}", architecture.name));
            fs::copy(&built, &binary).with_context(|| format!("cannot copy {built:?}"))?;
            ensure_static(&binary)?;
            binaries.push(binary);
        }
        if self.twice {
            let copy = std::env::temp_dir().join(format!("armlet-dist-{}", std::process::id()));
            let same = build_again(&sources, &copy, &binaries);
            let removed = fs::remove_dir_all(&copy);
            same?;
            removed.with_context(|| format!("cannot remove {copy:?}"))?;
        }

        let program = Program::ask(native(&binaries)?)?;
        let write = |path: &Path, text: &str| {
            fs::write(path, text).with_context(|| format!("cannot write {path:?}"))
        };
        let man = out.join("armlet.1");
        write(&man, &program.man_page(version, time)?)?;
        write(&completions.join("armlet.bash"), &program.bash())?;
        write(&completions.join("_armlet"), &program.zsh())?;
        write(&completions.join("armlet.fish"), &program.fish())?;
        let unit = out.join("armlet@.service");
        fs::copy(sources.join(UNIT), &unit).context("cannot copy the unit")?;
        for (architecture, binary) in ARCHITECTURES.iter().zip(&binaries) {
            let tree = work.join(architecture.debian);
            let package = Package {
                sources: &sources,
                out: &out,
                tree: &tree,
                version,
                time,
            };
            package.make(architecture, binary)?;
        }
        fs::remove_dir_all(&work).with_context(|| format!("cannot remove {work:?}"))?;
        checksums(&out)?;
        say(&format!("all there, in {}", out.display()));
        Ok(0)
    }
}

/// Builds the binary for one computer, with no path of this one in it.
fn build(sources: &Path, target: &Path, architecture: &Architecture) -> Result<PathBuf> {
    say(&format!("building armlet for {}", architecture.name));
    crate::toolchain::ensure_target(architecture.target)?;
    let mut cargo = crate::repository::cargo();
    small_std::add(&mut cargo, sources, target, &[])?;
    let status = cargo
        .current_dir(sources)
        .args(["build", "--release", "--locked", "--package", "armlet"])
        .args(["--target", architecture.target, "--target-dir"])
        .arg(target)
        // The linker comes with the compiler: no C compiler has a say in the bytes.
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER", "rust-lld")
        .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_MUSL_LINKER", "rust-lld")
        .env_remove("RUSTFLAGS")
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "cargo cannot build armlet ({status})");
    Ok(target.join(architecture.target).join("release/armlet"))
}

/// Builds every binary once more from a copy of the sources in `copy`.
fn build_again(sources: &Path, copy: &Path, binaries: &[PathBuf]) -> Result<()> {
    let folder = copy.join("a folder of another name");
    for file in files_of(sources)? {
        let to = folder.join(&file);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).with_context(|| format!("cannot make {parent:?}"))?;
        }
        fs::copy(sources.join(&file), &to).with_context(|| format!("cannot copy {file:?}"))?;
    }
    for (architecture, first) in ARCHITECTURES.iter().zip(binaries) {
        let second = build(&folder, &copy.join("built"), architecture)?;
        let (a, b) = (read(first)?, read(&second)?);
        if let Some(at) = a.iter().zip(&b).position(|(a, b)| a != b) {
            bail!(
                "two builds for {} differ, at byte {at} first",
                architecture.name
            );
        }
        ensure!(
            a.len() == b.len(),
            "two builds for {} differ in size",
            architecture.name
        );
        say(&format!(
            "two builds for {} are the same {} bytes",
            architecture.name,
            a.len()
        ));
    }
    Ok(())
}

/// Returns the files under version control, below `sources`.
fn files_of(sources: &Path) -> Result<Vec<PathBuf>> {
    let text = output_of(
        Command::new("git")
            .args(["ls-files", "-z"])
            .current_dir(sources),
    )?;
    let names = text.split('\0').filter(|name| !name.is_empty());
    Ok(names
        .map(PathBuf::from)
        .filter(|path| sources.join(path).is_file())
        .collect())
}

/// When the sources were last changed, in seconds since 1970
/// (<https://reproducible-builds.org/docs/source-date-epoch/>).
fn source_time(sources: &Path) -> Result<u64> {
    if let Ok(time) = std::env::var("SOURCE_DATE_EPOCH") {
        return time.parse().context("SOURCE_DATE_EPOCH is no number");
    }
    let text = output_of(
        Command::new("git")
            .args(["log", "-1", "--format=%ct"])
            .current_dir(sources),
    )?;
    text.trim().parse().context("git says no time")
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {path:?}"))
}

/// Refuses a binary that needs anything of the system but its kernel.
fn ensure_static(binary: &Path) -> Result<()> {
    let data = read(binary)?;
    let interpreter = crate::elf::section(&data, ".interp")?;
    ensure!(interpreter.is_none(), "{binary:?} is not static");
    ensure!(
        crate::elf::section(&data, ".symtab")?.is_none(),
        "{binary:?} is not stripped"
    );
    Ok(())
}

/// Returns the binary that runs here.
fn native(binaries: &[PathBuf]) -> Result<&Path> {
    let all = ARCHITECTURES.iter().zip(binaries);
    let mut all = all.filter(|(architecture, _)| architecture.name == std::env::consts::ARCH);
    let found = all.next().map(|(_, binary)| binary.as_path());
    found.context("no binary is for this computer")
}

fn checksums(out: &Path) -> Result<()> {
    let mut names = Vec::new();
    collect(out, out, &mut names)?;
    names.sort();
    let sums = output_of(Command::new("sha256sum").args(&names).current_dir(out))?;
    fs::write(out.join("SHA256SUMS"), sums).context("cannot write the checksums")
}

/// Returns the files below `folder`, as paths below `root`.
fn collect(root: &Path, folder: &Path, names: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {folder:?}"))? {
        let path = entry?.path();
        if path.is_dir() {
            collect(root, &path, names)?;
        } else if let Ok(name) = path.strip_prefix(root) {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    Ok(())
}

fn output_of(command: &mut Command) -> Result<String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    let mut text = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout
            .read_to_string(&mut text)
            .with_context(|| format!("cannot read what {command:?} says"))?;
    }
    let status = child.wait()?;
    ensure!(status.success(), "{command:?} failed ({status})");
    Ok(text)
}

/// A Debian package in the making (Debian Policy 4.7).
struct Package<'a> {
    sources: &'a Path,
    out: &'a Path,
    /// The folder that becomes the package.
    tree: &'a Path,
    version: &'a str,
    time: u64,
}

impl Package<'_> {
    fn make(&self, architecture: &Architecture, binary: &Path) -> Result<()> {
        let completions = self.out.join("completions");
        self.put(binary, "usr/bin/armlet", 0o755)?;
        self.put(
            &self.out.join("armlet@.service"),
            "usr/lib/systemd/system/armlet@.service",
            0o644,
        )?;
        for (from, to) in [
            ("armlet.bash", "bash-completion/completions/armlet"),
            ("_armlet", "zsh/vendor-completions/_armlet"),
            ("armlet.fish", "fish/vendor_completions.d/armlet.fish"),
        ] {
            self.put(&completions.join(from), &format!("usr/share/{to}"), 0o644)?;
        }
        let man = "usr/share/man/man1/armlet.1";
        self.put(&self.out.join("armlet.1"), man, 0o644)?;
        // Without a name and a time in it.
        output_of(
            Command::new("gzip")
                .args(["-9", "-n"])
                .arg(self.tree.join(man)),
        )?;
        for (from, to) in [("LICENSE", "copyright"), ("CHANGELOG.md", "CHANGELOG.md")] {
            let to = format!("usr/share/doc/armlet/{to}");
            self.put(&self.sources.join(from), &to, 0o644)?;
        }
        // Where guests are described. It holds nothing of the package's, so that it stays as long as
        // an administrator has files in it, and is empty at first.
        let guests = self.tree.join(GUESTS);
        fs::create_dir_all(&guests).with_context(|| format!("cannot make {guests:?}"))?;
        let control = format!(
            "Package: armlet\n\
             Version: {}\n\
             Architecture: {}\n\
             Maintainer: Armlet contributors <armlet@packages.invalid>\n\
             Section: admin\n\
             Priority: optional\n\
             Description: small virtual machine monitor for KVM on ARM64\n \
             Armlet runs virtual machines on ARM64 Linux hosts, from a Raspberry Pi 4 to a\n \
             server, and plans them on any computer. It is one static program.\n",
            self.version, architecture.debian
        );
        let folder = self.tree.join("DEBIAN");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {folder:?}"))?;
        fs::write(folder.join("control"), control).context("cannot write control")?;
        folders_for_all(self.tree)?;
        let name = format!("armlet_{}_{}.deb", self.version, architecture.debian);
        output_of(
            Command::new("dpkg-deb")
                .args(["--root-owner-group", "-Zxz", "--build"])
                .arg(self.tree)
                .arg(self.out.join(name))
                .env("SOURCE_DATE_EPOCH", self.time.to_string()),
        )
        .context("cannot make a Debian package (package dpkg)")?;
        Ok(())
    }

    fn put(&self, from: &Path, to: &str, mode: u32) -> Result<()> {
        let to = self.tree.join(to);
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder).with_context(|| format!("cannot make {folder:?}"))?;
        }
        fs::copy(from, &to).with_context(|| format!("cannot copy {from:?}"))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(mode))
            .with_context(|| format!("cannot set the mode of {to:?}"))
    }
}

/// Folders that all may enter, whatever this user's mask is.
fn folders_for_all(folder: &Path) -> Result<()> {
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot set the mode of {folder:?}"))?;
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {folder:?}"))? {
        let path = entry?.path();
        if path.is_dir() {
            folders_for_all(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_package_has_the_folder_that_its_unit_reads() {
        let unit = fs::read_to_string(crate::repository::repository().join(UNIT)).unwrap();
        assert!(unit.contains(&format!("EnvironmentFile=/{GUESTS}/%i.conf")));
        let folder = tempfile::tempdir().unwrap();
        let (out, tree) = (folder.path().join("out"), folder.path().join("tree"));
        fs::create_dir_all(out.join("completions")).unwrap();
        for file in [
            "armlet@.service",
            "armlet.1",
            "completions/armlet.bash",
            "completions/_armlet",
            "completions/armlet.fish",
        ] {
            fs::write(out.join(file), "").unwrap();
        }
        let sources = crate::repository::repository();
        let package = Package {
            sources: &sources,
            out: &out,
            tree: &tree,
            version: "0.0.0",
            time: 0,
        };
        if Command::new("dpkg-deb").arg("--version").output().is_err() {
            println!("skipped: there is no dpkg-deb here");
            return;
        }
        let binary = out.join("armlet.1");
        package.make(&ARCHITECTURES[0], &binary).unwrap();
        let listed = output_of(
            Command::new("dpkg-deb")
                .arg("-c")
                .arg(out.join("armlet_0.0.0_arm64.deb")),
        );
        let listed = listed.unwrap();
        let line = listed.lines().find(|line| line.ends_with(" ./etc/armlet/"));
        let line = line.unwrap_or_else(|| panic!("{listed}"));
        assert!(line.starts_with("drwxr-xr-x root/root"), "{line}");
    }

    #[test]
    fn a_stop_by_the_unit_is_armlets_own() {
        let unit = fs::read_to_string(crate::repository::repository().join(UNIT)).unwrap();
        let value = |key: &str| {
            let line = unit.lines().find_map(|line| line.strip_prefix(key));
            line.unwrap_or_else(|| panic!("no {key}")).to_owned()
        };
        // Later than armlet's own 90 s (src/shutdown.rs), which end with status 6.
        let seconds: u64 = value("TimeoutStopSec=").parse().unwrap();
        assert!(seconds >= 90 + 10, "{seconds}");
        assert_eq!(value("SuccessExitStatus="), "6");
    }

    #[test]
    fn systemd_finds_no_fault_in_the_unit() {
        let unit = fs::read_to_string(crate::repository::repository().join(UNIT)).unwrap();
        let program = "/usr/bin/armlet";
        assert!(unit.contains(&format!("ExecStart={program} run ")));
        let folder = std::env::temp_dir().join(format!("armlet-unit-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("armlet@web.service");
        // One that is there: that is looked at as well.
        fs::write(&path, unit.replace(program, "/bin/sh")).unwrap();
        let checked = Command::new("systemd-analyze")
            .args(["verify", "--man=no"])
            .arg(&path)
            .output();
        fs::remove_dir_all(&folder).unwrap();
        let Ok(checked) = checked else {
            println!("skipped: there is no systemd-analyze here");
            return;
        };
        let said = String::from_utf8_lossy(&checked.stderr);
        assert!(checked.status.success() && said.is_empty(), "{said}");
    }

    #[test]
    fn systemd_sees_the_unit_confined() {
        // Of 10 points, by `systemd-analyze security`; the unit had 9.6 when it ran as root.
        const MOST_TENTHS: &str = "15";
        let path = crate::repository::repository().join(UNIT);
        let threshold = format!("--threshold={MOST_TENTHS}");
        let checked = Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--no-pager", &threshold])
            .arg(path)
            .output();
        let Ok(checked) = checked else {
            println!("skipped: there is no systemd-analyze here");
            return;
        };
        let errors = String::from_utf8_lossy(&checked.stderr).into_owned();
        if errors.contains("unrecognized option") {
            println!("skipped: systemd-analyze is from before version 250");
            return;
        }
        let said = String::from_utf8_lossy(&checked.stdout);
        assert!(checked.status.success(), "{said}{errors}");
    }
}
