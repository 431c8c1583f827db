//! A private apt: it knows this machine's sources and another architecture, and installs nothing.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::files::{empty_folder, output_of, read, run_silently};
use super::release::{
    Distribution, GUEST_RELEASE, Release, backports_of, machine_targets, read_source,
    source_signature, sources,
};
use crate::progress::say;

/// A package of one version.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Package {
    /// With the architecture, as in `busybox-static:arm64`, where it is not the machine's.
    pub(super) name: String,
    pub(super) version: String,
}

impl Package {
    /// Returns a folder name, the same for the same package and version.
    pub(super) fn folder(&self) -> String {
        format!("{}_{}", self.name, self.version).replace([':', '/'], ".")
    }

    pub(super) fn argument(&self) -> String {
        format!("{}={}", self.name, self.version)
    }
}

/// apt with a configuration of its own.
#[derive(Debug)]
pub(super) struct Apt {
    pub(super) folder: PathBuf,
    pub(super) distribution: Distribution,
    pub(super) release: Release,
}

impl Apt {
    /// Writes the private configuration and fetches the lists of packages.
    pub(super) fn prepare(folder: &Path) -> Result<Self> {
        let release = Release::parse(&read(Path::new("/etc/os-release"))?)?;
        let native = output_of(Command::new("dpkg").arg("--print-architecture"))
            .context("packages are fetched with apt and dpkg, which this machine lacks")?;
        let targets = machine_targets(folder)?;
        let entry = |entry: &str| source_signature(entry, &read_source(entry));
        let sources = sources(&targets, &release, native.trim(), &entry)?;

        for needed in ["lists/partial", "archives/partial"] {
            let needed = folder.join(needed);
            fs::create_dir_all(&needed).with_context(|| format!("cannot create {needed:?}"))?;
        }
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {path:?}"))
        };
        write("private.sources", &sources)?;
        let machine = output_of(Command::new("apt-config").arg("dump"))?;
        write("apt.conf", &configuration(folder, native.trim(), &machine))?;

        let apt = Self {
            folder: folder.to_owned(),
            distribution: release.distribution,
            release,
        };
        say("fetching the lists of packages");
        let started = Instant::now();
        run_silently(apt.command("apt-get").args(["update", "-q"]))?;
        say(&format!(
            "lists of packages fetched in {:.1} s",
            started.elapsed().as_secs_f32()
        ));
        Ok(apt)
    }

    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("APT_CONFIG", self.folder.join("apt.conf"))
            .env("LC_ALL", "C.UTF-8");
        command
    }

    pub(super) fn backports(&self) -> Option<String> {
        let debian = self.distribution == Distribution::Debian && self.release.stable;
        debian.then(|| backports_of(&self.release.codename))
    }

    pub(super) fn guest_suite(&self) -> Option<String> {
        (self.distribution == Distribution::Debian).then(|| GUEST_RELEASE.to_owned())
    }

    /// Returns the record of the package that apt would choose from `suite`.
    pub(super) fn record(&self, name: &str, suite: Option<&str>) -> Result<String> {
        let mut command = self.command("apt-cache");
        command.args(["show", "--no-all-versions", name]);
        if let Some(suite) = suite {
            command.args(["-t", suite]);
        }
        output_of(&mut command).with_context(|| match name.split_once(':') {
            Some((_, "arm64")) if self.distribution == Distribution::Ubuntu => format!(
                "no package {name}: Ubuntu keeps arm64 in its ports archive; add that to this \
                 machine's apt sources with `Architectures: arm64`"
            ),
            _ => format!("no package {name}"),
        })
    }

    pub(super) fn candidate(&self, name: &str, suite: Option<&str>) -> Result<Package> {
        let record = self.record(name, suite)?;
        let version =
            field(&record, "Version").with_context(|| format!("{name} has no version"))?;
        Ok(Package {
            name: name.to_owned(),
            version: version.to_owned(),
        })
    }

    /// Returns the kernel package that the package `meta` stands for.
    pub(super) fn dependency(
        &self,
        meta: &str,
        architecture: &str,
        suite: Option<&str>,
    ) -> Result<Package> {
        let record = self.record(&format!("{meta}:{architecture}"), suite)?;
        let names = dependencies(&record, &["linux-image-"]);
        let kernel = names
            .first()
            .with_context(|| format!("{meta} depends on no kernel: {record}"))?;
        self.candidate(&format!("{kernel}:{architecture}"), suite)
    }

    /// Returns the packages that hold the files of the kernel package `kernel`: itself, and from
    /// 7.0 on, where Debian has it empty, those of the executable and of the modules.
    pub(super) fn kernel_parts(
        &self,
        kernel: &Package,
        suite: Option<&str>,
    ) -> Result<Vec<Package>> {
        let architecture = kernel.name.split_once(':').map_or("", |(_, name)| name);
        let record = self.record(&kernel.name, suite)?;
        let mut parts = vec![kernel.clone()];
        for name in dependencies(&record, &["linux-binary-", "linux-modules-"]) {
            parts.push(self.candidate(&format!("{name}:{architecture}"), suite)?);
        }
        Ok(parts)
    }

    /// `name` and everything it needs that the machine does not have.
    pub(super) fn closure(&self, name: &str, suite: Option<&str>) -> Result<Vec<Package>> {
        let mut command = self.command("apt-get");
        command.args([
            "install",
            "--simulate",
            "--no-install-recommends",
            "-qq",
            name,
        ]);
        command.args(["-o", "Debug::NoLocking=1"]);
        if let Some(suite) = suite {
            command.args(["-t", suite]);
        }
        let text = output_of(&mut command).with_context(|| format!("cannot resolve {name}"))?;
        let packages = simulated_installs(&text);
        ensure!(!packages.is_empty(), "apt would install nothing for {name}");
        Ok(packages)
    }

    /// Fetches `packages` and gives the archives' paths. They are gone at the next download.
    pub(super) fn download(&self, packages: &[Package]) -> Result<Vec<PathBuf>> {
        let folder = self.folder.join("archives");
        empty_folder(&folder)?;
        let names = packages
            .iter()
            .map(|package| package.name.as_str())
            .collect::<Vec<_>>();
        say(&format!("fetching {}", names.join(" ")));

        let started = Instant::now();
        let mut command = self.command("apt-get");
        command
            .args(["download", "-q"])
            .args(packages.iter().map(Package::argument));
        run_silently(command.current_dir(&folder))?;

        let mut archives = Vec::new();
        let mut bytes = 0;
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {folder:?}"))? {
            let path = entry?.path();
            if path.extension() == Some(OsStr::new("deb")) {
                bytes += fs::metadata(&path)?.len();
                archives.push(path);
            }
        }
        let seconds = started.elapsed().as_secs_f32();
        say(&format!(
            "fetched {:.1} MB in {seconds:.1} s",
            bytes as f32 / 1e6
        ));
        Ok(archives)
    }
}

/// Returns the private configuration: our folders, and of the machine's what reaches the archive.
pub(super) fn configuration(folder: &Path, native: &str, machine: &str) -> String {
    let folder = folder.display();
    let mut text = format!(
        "Dir::Etc::main \"/dev/null\";\n\
         Dir::Etc::parts \"/dev/null\";\n\
         Dir::Etc::sourcelist \"{folder}/private.sources\";\n\
         Dir::Etc::sourceparts \"/dev/null\";\n\
         Dir::Etc::preferences \"/dev/null\";\n\
         Dir::Etc::preferencesparts \"/dev/null\";\n\
         Dir::State::lists \"{folder}/lists\";\n\
         Dir::State::status \"/var/lib/dpkg/status\";\n\
         Dir::State::extended_states \"{folder}/extended_states\";\n\
         Dir::Cache \"{folder}\";\n\
         Dir::Cache::archives \"{folder}/archives\";\n\
         Dir::Log \"{folder}\";\n\
         APT::Architectures {{ \"{native}\"; \"arm64\"; }};\n\
         APT::Sandbox::User \"root\";\n\
         Acquire::Languages \"none\";\n"
    );
    let kept = [
        "Acquire::http",
        "Acquire::Check-",
        "Acquire::Retries",
        "Acquire::ForceIP",
    ];
    for line in machine
        .lines()
        .filter(|line| kept.iter().any(|start| line.starts_with(start)))
    {
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// Returns the packages that `apt-get install --simulate` would install.
///
/// A line is `Inst NAME[:ARCH] [OLD-VERSION] (VERSION ARCHIVE [ARCH])`.
pub(super) fn simulated_installs(text: &str) -> Vec<Package> {
    let install = |line: &str| {
        let rest = line.strip_prefix("Inst ")?;
        let name = rest.split_whitespace().next()?;
        let version = rest.split_once('(')?.1.split_whitespace().next()?;
        Some(Package {
            name: name.to_owned(),
            version: version.to_owned(),
        })
    };
    text.lines().filter_map(install).collect()
}

/// Returns the packages that a package's record names as needed and whose names begin like one of
/// `starts`.
pub(super) fn dependencies<'a>(record: &'a str, starts: &[&str]) -> Vec<&'a str> {
    let depends = field(record, "Depends").unwrap_or_default();
    depends
        .split([',', '|'])
        .filter_map(|one| one.split_whitespace().next())
        .filter(|name| starts.iter().any(|start| name.starts_with(start)))
        .collect()
}

/// Returns the value of `key` in a package's record.
pub(super) fn field<'a>(record: &'a str, key: &str) -> Option<&'a str> {
    let mut lines = record.lines().filter_map(|line| line.split_once(": "));
    lines
        .find(|(found, _)| *found == key)
        .map(|(_, value)| value)
}
