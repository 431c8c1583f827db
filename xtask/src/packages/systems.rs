//! Sets of packages with everything that they need, for systems that are not this machine.
//!
//! A second private apt resolves them: it knows one architecture alone, believes that nothing is installed,
//! and looks into one release, so that the set is the same whatever the machine runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use super::{
    Apt, Distribution, Package, Store, configuration, empty_folder, output_of, run_silently,
    simulated_installs, unpack,
};
use crate::isa::Isa;
use crate::progress::say;

/// The Debian release of whole systems: of the root disk and of the programs in the rig's host.
pub(crate) const SYSTEM_RELEASE: &str = "trixie";

/// The packages of a system, as archives.
#[derive(Debug)]
pub(crate) struct System {
    /// The folder of the archives. Its name is made from the packages and their versions.
    pub(crate) folder: PathBuf,
    /// The archives of the essential packages and of what these need.
    pub(crate) base: Vec<PathBuf>,
    /// The archives of all others.
    pub(crate) rest: Vec<PathBuf>,
}

/// Returns whether this machine's apt knows the archive that systems are made from.
pub(crate) fn can_make_systems() -> bool {
    let release = super::read(Path::new("/etc/os-release"));
    let release = release.and_then(|text| super::Release::parse(&text));
    release.is_ok_and(|release| release.distribution == Distribution::Debian)
}

impl Store {
    /// `names` and all that they need, with the packages that every Debian system has.
    ///
    /// `item` is what the set is called; it is fetched again where `names` has changed.
    pub(crate) fn system(&self, item: &str, names: &[&str]) -> Result<System> {
        let item = format!("{item}-{:08x}", digest(names));
        let folder = self.stored(&item, |_, into| {
            let apt = self.system_apt(Isa::Arm64)?;
            let base = apt.resolve(&["?essential", "?priority(required)"])?;
            let mut all = vec!["?essential", "?priority(required)"];
            all.extend(names);
            let every = apt.resolve(&all)?;
            apt.archives(&all, into)?;
            let list = base.iter().map(|package| format!("{}\n", package.name));
            let path = into.join("base");
            fs::write(&path, list.collect::<String>())
                .with_context(|| format!("cannot write {path:?}"))?;
            let versions = every.iter().map(Package::argument).collect::<Vec<_>>();
            let versions = versions.iter().map(String::as_str).collect::<Vec<_>>();
            Ok(Package {
                name: item.clone(),
                version: format!("{:08x}", digest(&versions)),
            })
        })?;
        let base = folder.join("base");
        let base = fs::read_to_string(&base).with_context(|| format!("cannot read {base:?}"))?;
        let is_base = |archive: &PathBuf| {
            let name = archive.file_name().unwrap_or_default().to_string_lossy();
            let name = name.split('_').next().unwrap_or_default().to_owned();
            base.lines().any(|line| line == name)
        };
        let (base, rest) = archives_in(&folder)?.into_iter().partition(is_base);
        Ok(System { folder, base, rest })
    }

    /// Returns the folder into which `names` and all that they need are unpacked, without being
    /// installed: programs and their libraries, not a system.
    pub(crate) fn programs(&self, isa: Isa, item: &str, names: &[&str]) -> Result<PathBuf> {
        let item = format!("{item}-{:08x}", digest(names));
        self.stored(&item, |_, into| {
            let apt = self.system_apt(isa)?;
            // Essential packages are needed without anybody saying so.
            let mut all = vec!["libc6", "base-files"];
            all.extend(names);
            let every = apt.resolve(&all)?;
            let archives = into.join("archives");
            apt.archives(&all, &archives)?;
            for archive in archives_in(&archives)? {
                unpack(&archive, into)?;
            }
            fs::remove_dir_all(&archives).with_context(|| format!("cannot remove {archives:?}"))?;
            // Documents would be half of the files.
            for folder in ["usr/share/doc", "usr/share/man", "usr/share/locale"] {
                let folder = into.join(folder);
                if folder.is_dir() {
                    fs::remove_dir_all(&folder)
                        .with_context(|| format!("cannot remove {folder:?}"))?;
                }
            }
            let versions = every.iter().map(Package::argument).collect::<Vec<_>>();
            let versions = versions.iter().map(String::as_str).collect::<Vec<_>>();
            Ok(Package {
                name: item.clone(),
                version: format!("{:08x}", digest(&versions)),
            })
        })
    }

    fn system_apt(&self, isa: Isa) -> Result<SystemApt> {
        let folder = match isa {
            Isa::Arm64 => "apt-system",
            Isa::X86 => "apt-system-x86_64",
        };
        SystemApt::prepare(self.apt()?, isa, &self.root.join(folder))
    }
}

/// apt for a machine on which nothing is installed.
struct SystemApt {
    folder: PathBuf,
    /// As Debian calls it.
    architecture: &'static str,
}

impl SystemApt {
    /// Writes the configuration beside that of `machine`, and fetches the lists of packages.
    fn prepare(machine: &Apt, isa: Isa, folder: &Path) -> Result<Self> {
        let architecture = isa.debian();
        if machine.distribution != Distribution::Debian {
            bail!(
                "whole systems are made of Debian's packages, and this machine's apt knows \
                 Ubuntu's archive only; use a Debian machine"
            );
        }
        for needed in ["lists/partial", "archives/partial"] {
            let needed = folder.join(needed);
            fs::create_dir_all(&needed).with_context(|| format!("cannot create {needed:?}"))?;
        }
        let read = |path: PathBuf| {
            fs::read_to_string(&path).with_context(|| format!("cannot read {path:?}"))
        };
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {path:?}"))
        };
        let sources = read(machine.folder.join("private.sources"))?;
        write(
            "private.sources",
            &system_sources(&sources, &machine.release.codename, architecture),
        )?;
        write("status", "")?;
        let dump = output_of(Command::new("apt-config").arg("dump"))?;
        let mut text = configuration(folder, architecture, &dump);
        text.push_str(&format!(
            "Dir::State::status \"{}\";\n\
             APT::Architecture \"{architecture}\";\n\
             APT::Install-Recommends \"false\";\n\
             Debug::NoLocking \"true\";\n",
            folder.join("status").display()
        ));
        write("apt.conf", &text)?;
        let apt = Self {
            folder: folder.to_owned(),
            architecture,
        };
        say(&format!("fetching the lists of Debian {SYSTEM_RELEASE}"));
        run_silently(apt.command().args(["update", "-q"]))?;
        Ok(apt)
    }

    fn command(&self) -> Command {
        let mut command = Command::new("apt-get");
        command
            .env("APT_CONFIG", self.folder.join("apt.conf"))
            .env("LC_ALL", "C.UTF-8");
        command
    }

    /// Returns the packages that apt would install for `names`, in its order.
    fn resolve(&self, names: &[&str]) -> Result<Vec<Package>> {
        let mut command = self.command();
        command.args(["install", "--simulate", "-qq"]).args(names);
        let text = output_of(&mut command)
            .with_context(|| format!("cannot resolve {}", names.join(" ")))?;
        let mut packages = simulated_installs(&text);
        ensure!(!packages.is_empty(), "apt would install nothing");
        let ending = format!(":{}", self.architecture);
        for package in &mut packages {
            package.name = package.name.trim_end_matches(&ending).to_owned();
        }
        packages.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(packages)
    }

    /// Fetches `names` and all that they need into `folder`.
    fn archives(&self, names: &[&str], folder: &Path) -> Result<()> {
        empty_folder(&folder.join("partial"))?;
        let started = Instant::now();
        let mut command = self.command();
        command.args(["install", "--download-only", "-y", "-qq"]);
        command.args(["-o", &format!("Dir::Cache::archives={}", folder.display())]);
        run_silently(command.args(names))?;
        let mut bytes = 0;
        let archives = archives_in(folder)?;
        for archive in &archives {
            bytes += fs::metadata(archive)?.len();
        }
        for leftover in ["partial", "lock"] {
            let leftover = folder.join(leftover);
            let _ = fs::remove_dir(&leftover).or_else(|_| fs::remove_file(&leftover));
        }
        say(&format!(
            "fetched {} packages, {:.1} MB, in {:.1} s",
            archives.len(),
            bytes as f32 / 1e6,
            started.elapsed().as_secs_f32()
        ));
        Ok(())
    }
}

/// Returns the machine's private sources, turned to [`SYSTEM_RELEASE`] and one architecture.
fn system_sources(machine: &str, codename: &str, architecture: &str) -> String {
    let turn = |line: &str| {
        if let Some(suites) = line.strip_prefix("Suites: ") {
            let security = suites.contains("-security");
            let suites = match security {
                true => format!("{SYSTEM_RELEASE}-security"),
                false => format!("{SYSTEM_RELEASE} {SYSTEM_RELEASE}-updates"),
            };
            return format!("Suites: {suites}");
        }
        match line.starts_with("Architectures: ") {
            true => format!("Architectures: {architecture}"),
            false => line.to_owned(),
        }
    };
    debug_assert!(machine.contains(codename), "sources of another release");
    machine
        .lines()
        .map(|line| turn(line) + "\n")
        .collect::<String>()
}

/// Returns the archives in `folder`, in the order of names.
fn archives_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut archives = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {folder:?}"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            archives.push(path);
        }
    }
    archives.sort();
    Ok(archives)
}

/// Returns a number that tells lists of words apart: FNV-1a.
pub(crate) fn digest(words: &[&str]) -> u32 {
    let mut digest = 0x811c_9dc5_u32;
    for byte in words.iter().flat_map(|word| word.bytes().chain([0])) {
        digest = (digest ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    }
    digest
}

/// Returns the archive `from` with its parts uncompressed, and the time at which it was built, in
/// seconds since 1970. An emulated machine would spend minutes on unpacking them.
pub(crate) fn uncompressed(from: &Path) -> Result<(Vec<u8>, u64)> {
    let tar = |option: &str| {
        let output = Command::new("dpkg-deb")
            .arg(option)
            .arg(from)
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run dpkg-deb")?;
        ensure!(output.status.success(), "dpkg-deb cannot read {from:?}");
        Ok::<_, anyhow::Error>(output.stdout)
    };
    let bytes = fs::read(from).with_context(|| format!("cannot read {from:?}"))?;
    // ar(5): a magic number of 8 bytes, then for each member name (16 bytes), time (12) and more.
    let time = bytes.get(24..36).map(String::from_utf8_lossy);
    let time = time.and_then(|time| time.trim().parse().ok());
    let time = time.with_context(|| format!("no time in {from:?}"))?;

    let mut archive = b"!<arch>\n".to_vec();
    let parts = [
        ("debian-binary", b"2.0\n".to_vec()),
        ("control.tar", tar("--ctrl-tarfile")?),
        ("data.tar", tar("--fsys-tarfile")?),
    ];
    for (name, data) in parts {
        let size = data.len();
        archive.extend(format!("{name:<16}{time:<12}0     0     100644  {size:<10}`\n").bytes());
        archive.extend(data);
        if size % 2 == 1 {
            archive.push(b'\n');
        }
    }
    Ok((archive, time))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn sources_turn_to_the_release_of_systems() {
        let machine = "Types: deb\nURIs: http://a.example/\nSuites: bookworm bookworm-updates \
            bookworm-backports\nComponents: main\nArchitectures: amd64 arm64\nSigned-By: /k\n\n\
            Types: deb\nURIs: http://s.example/\nSuites: bookworm-security\nComponents: main\n\
            Architectures: amd64 arm64\n\n";
        assert_eq!(
            system_sources(machine, "bookworm", "arm64"),
            "Types: deb\nURIs: http://a.example/\nSuites: trixie trixie-updates\n\
             Components: main\nArchitectures: arm64\nSigned-By: /k\n\nTypes: deb\n\
             URIs: http://s.example/\nSuites: trixie-security\nComponents: main\n\
             Architectures: arm64\n\n"
        );
    }

    #[test]
    fn lists_of_words_are_told_apart() {
        assert_ne!(digest(&["ab", "c"]), digest(&["a", "bc"]));
        assert_eq!(digest(&["fio"]), digest(&["fio"]));
    }

    #[test]
    fn an_archive_comes_uncompressed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("package");
        fs::create_dir_all(path.join("DEBIAN")).unwrap();
        let control = "Package: p\nVersion: 1\nArchitecture: all\nMaintainer: m\nDescription: d\n";
        fs::write(path.join("DEBIAN/control"), control).unwrap();
        fs::write(path.join("file"), "contents").unwrap();
        let archive = folder.path().join("p.deb");
        let build = |from: &Path| {
            let mut dpkg = Command::new("dpkg-deb");
            dpkg.env("SOURCE_DATE_EPOCH", "1700000000");
            run_silently(dpkg.arg("-b").arg(from).arg(&archive)).unwrap();
        };
        build(&path);
        let (plain, time) = uncompressed(&archive).unwrap();
        assert_eq!(time, 1_700_000_000);
        let uncompressed = folder.path().join("u.deb");
        fs::write(&uncompressed, plain).unwrap();
        let into = folder.path().join("into");
        unpack(&uncompressed, &into).unwrap();
        assert_eq!(fs::read_to_string(into.join("file")).unwrap(), "contents");
        let field = Command::new("dpkg-deb")
            .arg("-f")
            .arg(&uncompressed)
            .arg("Version")
            .output();
        assert_eq!(field.unwrap().stdout, b"1\n");
    }
}
