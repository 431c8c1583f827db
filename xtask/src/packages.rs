//! Debian packages by name, kept in the user's cache folder.
//!
//! A private apt fetches them: its sources, lists and archives lie in the cache folder, so the
//! machine's own configuration stays as it is. The archive's address, its keyring and any proxy
//! are read from that configuration; this repository names no server. What has been fetched once
//! is found again by a stamp, without asking the network.

mod bindings;
mod kernels;
mod systems;
mod trees;

use std::cell::OnceCell;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::isa::Isa;
use crate::progress::say;

pub(crate) use kernels::Module;
pub(crate) use systems::{System, can_make_systems, digest, uncompressed};

/// The Debian release that kernels and busybox come from, on every machine.
const GUEST_RELEASE: &str = "bookworm";

/// The one whose backports have the newest kernel.
const NEWEST_RELEASE: &str = "trixie";

/// The oldest QEMU on the machine's `PATH` that is used as it is: 9 has the boards we emulate.
const QEMU_MAJOR: u32 = 9;

/// A distribution kernel, for ARM64 where its name says nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// 6.12 with 4 KiB pages and every driver: the usual host.
    V6_12,
    /// 6.12 with 16 KiB pages.
    V6_12Pages16K,
    /// 6.12 for clouds, the smallest: the usual guest.
    V6_12Cloud,
    /// 6.1 with 4 KiB pages.
    V6_1,
    /// 7.3 with 4 KiB pages and every driver.
    V7_3,
    /// 6.1 for clouds on x86_64: the host there, as it is the fastest where it is emulated.
    V6_1X86,
    /// 6.12 for clouds on x86_64.
    V6_12X86,
}

impl Kernel {
    /// Every kernel.
    pub(crate) const ALL: [Self; 7] = [
        Self::V6_12,
        Self::V6_12Pages16K,
        Self::V6_12Cloud,
        Self::V6_1,
        Self::V7_3,
        Self::V6_1X86,
        Self::V6_12X86,
    ];

    /// The name by which options and stamps know it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V6_12 => "6.12",
            Self::V6_12Pages16K => "6.12-16k",
            Self::V6_12Cloud => "6.12-cloud",
            Self::V6_1 => "6.1",
            Self::V7_3 => "7.3",
            Self::V6_1X86 => "6.1-x86",
            Self::V6_12X86 => "6.12-x86",
        }
    }

    /// The machine that it is for.
    pub(crate) fn isa(self) -> Isa {
        match self {
            Self::V6_1X86 | Self::V6_12X86 => Isa::X86,
            _ => Isa::Arm64,
        }
    }

    /// The kernel that `name` means, or an error that lists the names.
    pub(crate) fn from_name(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|kernel| kernel.name() == name);
        let names = Self::ALL.map(Self::name).join(", ");
        found.with_context(|| format!("no kernel is called {name:?}; there are {names}"))
    }

    /// The package that depends on the kernel, and the suite to take it from.
    fn package(self, distribution: Distribution) -> Result<(&'static str, Option<String>)> {
        let backports = || Some(backports_of(GUEST_RELEASE));
        match (distribution, self) {
            (Distribution::Debian, Self::V6_12) => Ok(("linux-image-arm64", backports())),
            (Distribution::Debian, Self::V6_12Pages16K) => {
                Ok(("linux-image-arm64-16k", backports()))
            }
            (Distribution::Debian, Self::V6_12Cloud) => {
                Ok(("linux-image-cloud-arm64", backports()))
            }
            (Distribution::Debian, Self::V6_1) => {
                Ok(("linux-image-arm64", Some(GUEST_RELEASE.to_owned())))
            }
            (Distribution::Debian, Self::V7_3) => {
                Ok(("linux-image-arm64", Some(backports_of(NEWEST_RELEASE))))
            }
            (Distribution::Debian, Self::V6_1X86) => {
                Ok(("linux-image-cloud-amd64", Some(GUEST_RELEASE.to_owned())))
            }
            (Distribution::Debian, Self::V6_12X86) => Ok(("linux-image-cloud-amd64", backports())),
            // Ubuntu has one kernel a release; it stands in for both 4 KiB variants of 6.12.
            (Distribution::Ubuntu, Self::V6_12 | Self::V6_12Cloud) => {
                Ok(("linux-image-virtual", None))
            }
            (Distribution::Ubuntu, _) => {
                bail!(
                    "Ubuntu has no package for the kernel {}; use a Debian machine",
                    self.name()
                )
            }
        }
    }
}

/// The folder that keeps what has been fetched, and the private apt that fills it.
#[derive(Debug)]
pub(crate) struct Store {
    root: PathBuf,
    apt: OnceCell<Apt>,
}

/// An emulator that can be started.
#[derive(Debug)]
pub(crate) struct Qemu {
    program: PathBuf,
    /// Where a privately unpacked QEMU has its libraries, modules and firmware.
    private_root: Option<PathBuf>,
}

impl Store {
    /// Opens the store in `$XDG_CACHE_HOME/armlet`, or `~/.cache/armlet`.
    pub(crate) fn open() -> Result<Self> {
        let cache = match std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from) {
            Some(folder) if folder.is_absolute() => folder,
            _ => {
                let home =
                    std::env::var_os("HOME").context("neither HOME nor XDG_CACHE_HOME is set")?;
                PathBuf::from(home).join(".cache")
            }
        };
        let root = cache.join("armlet");
        for folder in ["packages", "stamps", "apt", "assets"] {
            let folder = root.join(folder);
            fs::create_dir_all(&folder).with_context(|| format!("cannot create {folder:?}"))?;
        }
        Ok(Self {
            root,
            apt: OnceCell::new(),
        })
    }

    /// The folder in which derived files are kept.
    pub(crate) fn assets(&self) -> PathBuf {
        self.root.join("assets")
    }

    /// Holds the store for this process until the returned file is closed.
    pub(crate) fn lock(&self) -> Result<File> {
        self.lock_for("lock", "fetches packages")
    }

    /// Holds what the file `name` stands for, until the returned file is closed; who has to wait
    /// is told what another xtask `does`.
    pub(crate) fn lock_for(&self, name: &str, does: &str) -> Result<File> {
        let path = self.root.join(name);
        let file = File::create(&path).with_context(|| format!("cannot create {path:?}"))?;
        if file.try_lock().is_err() {
            say(&format!("waiting for another xtask that {does}"));
            file.lock()
                .with_context(|| format!("cannot lock {path:?}"))?;
        }
        Ok(file)
    }

    /// Forgets which versions were chosen, so that the newest are fetched next time.
    pub(crate) fn forget(&self) -> Result<()> {
        let stamps = self.root.join("stamps");
        fs::remove_dir_all(&stamps).with_context(|| format!("cannot remove {stamps:?}"))?;
        fs::create_dir_all(&stamps).with_context(|| format!("cannot create {stamps:?}"))
    }

    /// Forgets which versions of packages for whole systems were chosen.
    pub(crate) fn forget_systems(&self) -> Result<()> {
        let stamps = self.root.join("stamps");
        for entry in fs::read_dir(&stamps).with_context(|| format!("cannot list {stamps:?}"))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with("system-") {
                fs::remove_file(&path).with_context(|| format!("cannot remove {path:?}"))?;
            }
        }
        Ok(())
    }

    /// A statically linked busybox.
    pub(crate) fn busybox(&self, isa: Isa) -> Result<PathBuf> {
        let folder = self.stored(&item("busybox", isa), |apt, into| {
            let suite = apt.guest_suite();
            let name = format!("busybox-static:{}", isa.debian());
            let package = apt.candidate(&name, suite.as_deref())?;
            for archive in apt.download(std::slice::from_ref(&package))? {
                unpack(&archive, into)?;
            }
            Ok(package)
        })?;
        find(&folder, &|name| name == "busybox")?.context("no busybox in busybox-static")
    }

    /// The emulator of machines: the machine's own when it is new enough, else a private one.
    pub(crate) fn qemu(&self, isa: Isa) -> Result<Qemu> {
        let installed = Qemu {
            program: emulator(isa).0.into(),
            private_root: None,
        };
        if installed.major().is_ok_and(|major| major >= QEMU_MAJOR) {
            return Ok(installed);
        }
        let private = self.private_qemu(isa)?;
        if private.major().is_ok() {
            return Ok(private);
        }
        // It was unpacked with the libraries that the machine lacked then; it may lack more now.
        say("the private QEMU does not start any more: fetching it again");
        let stamp = self.stamp(&item("qemu", isa));
        let folder = self.root.join("packages").join(read(&stamp)?.trim());
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {folder:?}"))?;
        let private = self.private_qemu(isa)?;
        private.major().context("the private QEMU does not start")?;
        Ok(private)
    }

    fn private_qemu(&self, isa: Isa) -> Result<Qemu> {
        let (program, package) = emulator(isa);
        let root = self.private_program(&item("qemu", isa), package)?;
        Ok(Qemu {
            program: root.join("usr/bin").join(program),
            private_root: Some(root),
        })
    }

    /// Converts the raw disk image `from` to a compressed qcow2 image at `to`.
    pub(crate) fn convert_to_qcow2(&self, from: &Path, to: &Path) -> Result<()> {
        let mut command = Command::new("qemu-img");
        if Command::new("qemu-img").arg("--version").output().is_err() {
            let root = self.private_program("qemu-img", "qemu-utils")?;
            command = Command::new(root.join("usr/bin/qemu-img"));
            let libraries = private_libraries(&root);
            command.env("LD_LIBRARY_PATH", std::env::join_paths(libraries)?);
        }
        command.args(["convert", "-f", "raw", "-O", "qcow2", "-c"]);
        run_silently(command.arg(from).arg(to))
    }

    /// The folder of a program of this machine's own architecture, unpacked with the libraries that
    /// the machine lacks.
    fn private_program(&self, item: &str, name: &str) -> Result<PathBuf> {
        self.stored(item, |apt, into| {
            let suite = apt.backports();
            let package = apt.candidate(name, suite.as_deref())?;
            say(&format!(
                "{name} is fetched with the libraries that this machine lacks; nothing is installed"
            ));
            let closure = apt.closure(name, suite.as_deref())?;
            for archive in apt.download(&closure)? {
                unpack(&archive, into)?;
            }
            Ok(package)
        })
    }

    /// The folder of `item`, fetched when no stamp says that it is there already.
    ///
    /// `fetch` unpacks into the folder it is given and names the package.
    fn stored(
        &self,
        item: &str,
        fetch: impl FnOnce(&Apt, &Path) -> Result<Package>,
    ) -> Result<PathBuf> {
        if let Some(folder) = self.present(item) {
            return Ok(folder);
        }
        let _lock = self.lock()?;
        if let Some(folder) = self.present(item) {
            return Ok(folder);
        }
        let unfinished = self.root.join("packages").join(format!(".{item}"));
        empty_folder(&unfinished)?;
        let package = fetch(self.apt()?, &unfinished)
            .with_context(|| format!("cannot fetch {item} from the Debian archive"))?;

        let name = package.folder();
        let folder = self.root.join("packages").join(&name);
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("cannot replace {folder:?}"))?;
        }
        fs::rename(&unfinished, &folder).with_context(|| format!("cannot make {folder:?}"))?;
        let stamp = self.stamp(item);
        fs::write(&stamp, name).with_context(|| format!("cannot write {stamp:?}"))?;
        Ok(folder)
    }

    fn present(&self, item: &str) -> Option<PathBuf> {
        let name = fs::read_to_string(self.stamp(item)).ok()?;
        let folder = self.root.join("packages").join(name.trim());
        folder.is_dir().then_some(folder)
    }

    fn stamp(&self, item: &str) -> PathBuf {
        self.root.join("stamps").join(item)
    }

    fn apt(&self) -> Result<&Apt> {
        if let Some(apt) = self.apt.get() {
            return Ok(apt);
        }
        let apt = Apt::prepare(&self.root.join("apt"))?;
        Ok(self.apt.get_or_init(|| apt))
    }
}

/// The suite of what was made for a Debian release after it came out.
fn backports_of(release: &str) -> String {
    format!("{release}-backports")
}

/// The name of a stamp: without the architecture for ARM64, which came first.
fn item(name: &str, isa: Isa) -> String {
    match isa {
        Isa::Arm64 => name.to_owned(),
        Isa::X86 => format!("{name}-{}", isa.name()),
    }
}

/// The program that emulates such a machine, and its package.
fn emulator(isa: Isa) -> (&'static str, &'static str) {
    match isa {
        Isa::Arm64 => ("qemu-system-aarch64", "qemu-system-arm"),
        Isa::X86 => ("qemu-system-x86_64", "qemu-system-x86"),
    }
}

impl Qemu {
    /// The command that starts it, to which a machine's options are added.
    ///
    /// The emulator dies with the thread that started it: nothing is left when xtask is killed.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(&self.program);
        if let Some(root) = &self.private_root {
            let libraries = private_libraries(root);
            let modules = libraries.iter().map(|folder| folder.join("qemu"));
            if let Some(modules) = modules.into_iter().find(|folder| folder.is_dir()) {
                command.env("QEMU_MODULE_DIR", modules);
            }
            if let Ok(path) = std::env::join_paths(libraries) {
                command.env("LD_LIBRARY_PATH", path);
            }
            // Debian links firmware of other packages into QEMU's folder by absolute paths.
            for folder in ["usr/share/qemu", "usr/share/seabios"] {
                command.arg("-L").arg(root.join(folder));
            }
        }
        command
    }

    fn major(&self) -> Result<u32> {
        let output = self
            .command()
            .arg("--version")
            .stderr(Stdio::null())
            .output();
        let output = output.context("cannot run setpriv (package util-linux)")?;
        ensure!(output.status.success(), "{:?} does not start", self.program);
        let text = String::from_utf8_lossy(&output.stdout);
        qemu_major(&text).with_context(|| format!("no version in {text:?}"))
    }
}

fn qemu_major(version: &str) -> Option<u32> {
    let (_, number) = version.split_once("version ")?;
    number.split('.').next()?.parse().ok()
}

/// The folders below `root` in which multi-arch Debian keeps libraries.
fn private_libraries(root: &Path) -> Vec<PathBuf> {
    let triple = format!("{}-linux-gnu", std::env::consts::ARCH);
    ["usr/lib", "lib"]
        .map(|folder| root.join(folder).join(&triple))
        .into()
}

/// A package of one version.
#[derive(Clone, Debug, PartialEq)]
struct Package {
    /// With the architecture, as in `busybox-static:arm64`, where it is not the machine's.
    name: String,
    version: String,
}

impl Package {
    /// A folder name, the same for the same package and version.
    fn folder(&self) -> String {
        format!("{}_{}", self.name, self.version).replace([':', '/'], ".")
    }

    fn argument(&self) -> String {
        format!("{}={}", self.name, self.version)
    }
}

/// The distributions whose archives we know our way in.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Distribution {
    Debian,
    Ubuntu,
}

/// What the machine's os-release file says.
#[derive(Clone, Debug, PartialEq)]
struct Release {
    distribution: Distribution,
    codename: String,
    /// Whether it has been released; only then has Debian backports for it.
    stable: bool,
}

/// apt with a configuration of its own.
#[derive(Debug)]
struct Apt {
    folder: PathBuf,
    distribution: Distribution,
    release: Release,
}

impl Apt {
    /// Writes the private configuration and fetches the lists of packages.
    fn prepare(folder: &Path) -> Result<Self> {
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

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("APT_CONFIG", self.folder.join("apt.conf"))
            .env("LC_ALL", "C.UTF-8");
        command
    }

    fn backports(&self) -> Option<String> {
        let debian = self.distribution == Distribution::Debian && self.release.stable;
        debian.then(|| backports_of(&self.release.codename))
    }

    fn guest_suite(&self) -> Option<String> {
        (self.distribution == Distribution::Debian).then(|| GUEST_RELEASE.to_owned())
    }

    /// The record of the package that apt would choose from `suite`.
    fn record(&self, name: &str, suite: Option<&str>) -> Result<String> {
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

    fn candidate(&self, name: &str, suite: Option<&str>) -> Result<Package> {
        let record = self.record(name, suite)?;
        let version =
            field(&record, "Version").with_context(|| format!("{name} has no version"))?;
        Ok(Package {
            name: name.to_owned(),
            version: version.to_owned(),
        })
    }

    /// The kernel package that the package `meta` stands for.
    fn dependency(&self, meta: &str, architecture: &str, suite: Option<&str>) -> Result<Package> {
        let record = self.record(&format!("{meta}:{architecture}"), suite)?;
        let names = dependencies(&record, &["linux-image-"]);
        let kernel = names
            .first()
            .with_context(|| format!("{meta} depends on no kernel: {record}"))?;
        self.candidate(&format!("{kernel}:{architecture}"), suite)
    }

    /// The packages that hold the files of the kernel package `kernel`: itself, and from 7.0 on,
    /// where Debian has it empty, those of the executable and of the modules.
    fn kernel_parts(&self, kernel: &Package, suite: Option<&str>) -> Result<Vec<Package>> {
        let architecture = kernel.name.split_once(':').map_or("", |(_, name)| name);
        let record = self.record(&kernel.name, suite)?;
        let mut parts = vec![kernel.clone()];
        for name in dependencies(&record, &["linux-binary-", "linux-modules-"]) {
            parts.push(self.candidate(&format!("{name}:{architecture}"), suite)?);
        }
        Ok(parts)
    }

    /// `name` and everything it needs that the machine does not have.
    fn closure(&self, name: &str, suite: Option<&str>) -> Result<Vec<Package>> {
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
    fn download(&self, packages: &[Package]) -> Result<Vec<PathBuf>> {
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

impl Release {
    fn parse(os_release: &str) -> Result<Self> {
        let value = |key: &str| {
            let mut lines = os_release.lines().filter_map(|line| line.split_once('='));
            lines
                .find(|(found, _)| *found == key)
                .map(|(_, value)| value.trim_matches('"'))
        };
        let distribution = match value("ID") {
            Some("debian") => Distribution::Debian,
            Some("ubuntu") => Distribution::Ubuntu,
            other => bail!(
                "the rig takes its kernels from Debian's or Ubuntu's archive; this machine runs {}",
                other.unwrap_or("an unknown distribution")
            ),
        };
        let codename = value("VERSION_CODENAME").context("os-release has no VERSION_CODENAME")?;
        let stable = value("VERSION_ID").is_some();
        Ok(Self {
            distribution,
            codename: codename.to_owned(),
            stable,
        })
    }
}

/// What apt knows of the machine's sources; from lists of our own when the machine has none.
fn machine_targets(folder: &Path) -> Result<String> {
    let format = "$(CREATED_BY)|$(REPO_URI)|$(RELEASE)|$(CODENAME)|$(COMPONENT)|$(ARCHITECTURE)|\
                  $(ORIGIN)|$(SOURCESENTRY)";
    let targets = output_of(Command::new("apt-get").args(["indextargets", "--format", format]))?;
    if !targets.trim().is_empty() {
        return Ok(targets);
    }
    let lists = folder.join("machine-lists");
    let partial = lists.join("partial");
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {partial:?}"))?;
    let option = format!("Dir::State::Lists={}", lists.display());
    say("this machine has no lists of packages yet: fetching them into the cache folder");
    run_silently(Command::new("apt-get").args(["update", "-q", "-o", &option]))?;
    output_of(Command::new("apt-get").args(["indextargets", "-o", &option, "--format", format]))
}

/// One archive as the machine's sources name it.
#[derive(Clone, Debug, PartialEq)]
struct Target<'a> {
    uri: &'a str,
    release: &'a str,
    codename: &'a str,
    component: &'a str,
    architecture: &'a str,
    origin: &'a str,
    entry: &'a str,
}

fn parse_target(line: &str) -> Option<Target<'_>> {
    let parts = line.split('|').collect::<Vec<_>>();
    let &[
        "Packages",
        uri,
        release,
        codename,
        component,
        architecture,
        origin,
        entry,
    ] = &parts[..]
    else {
        return None;
    };
    Some(Target {
        uri,
        release,
        codename,
        component,
        architecture,
        origin,
        entry,
    })
}

/// The private sources, in apt's deb822 format, from what the machine's apt knows.
///
/// `signature` gives the `Signed-By` value of a sources entry, if it has one.
fn sources(
    targets: &str,
    release: &Release,
    native: &str,
    signature: &dyn Fn(&str) -> Option<String>,
) -> Result<String> {
    let targets = targets.lines().filter_map(parse_target).collect::<Vec<_>>();
    let origin = match release.distribution {
        Distribution::Debian => "Debian",
        Distribution::Ubuntu => "Ubuntu",
    };
    let base = |suite: &str, architecture: &str| {
        let fits = |target: &&Target<'_>| {
            (target.release == suite || target.codename == suite)
                && target.component == "main"
                && target.architecture == architecture
        };
        let mut fitting = targets.iter().filter(fits);
        fitting
            .clone()
            .find(|target| target.origin == origin)
            .or_else(|| fitting.next())
    };
    let codename = &release.codename;
    let main = base(codename, native).with_context(|| {
        format!("this machine's apt has no source for {codename}, so the archive is unknown")
    })?;

    let stanza = |target: &Target<'_>, suites: &[String], architectures: &str| {
        let components = match release.distribution {
            Distribution::Debian => "main",
            Distribution::Ubuntu => "main universe",
        };
        let signed = signature(target.entry).map(|key| format!("Signed-By:{key}\n"));
        format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: {components}\nArchitectures: \
             {architectures}\n{}\n",
            target.uri,
            suites.join(" "),
            signed.unwrap_or_default()
        )
    };
    match release.distribution {
        Distribution::Debian => {
            let both = if native == "arm64" {
                "arm64".to_owned()
            } else {
                format!("{native} arm64")
            };
            let mut suites = vec![codename.clone()];
            if release.stable {
                suites.extend([format!("{codename}-updates"), backports_of(codename)]);
            }
            for guest in [
                GUEST_RELEASE.to_owned(),
                backports_of(GUEST_RELEASE),
                backports_of(NEWEST_RELEASE),
            ] {
                if !suites.contains(&guest) {
                    suites.push(guest);
                }
            }
            let mut text = stanza(main, &suites, &both);
            let security = format!("{codename}-security");
            if let Some(target) = base(&security, native) {
                text.push_str(&stanza(target, &[security], &both));
            }
            Ok(text)
        }
        Distribution::Ubuntu => {
            let suites = ["", "-updates", "-security"].map(|end| format!("{codename}{end}"));
            let mut text = stanza(main, &suites, native);
            // Where this is missing, asking for an arm64 package says what to add.
            if let Some(ports) = base(codename, "arm64").filter(|_| native != "arm64") {
                text.push_str(&stanza(ports, &suites, "arm64"));
            }
            Ok(text)
        }
    }
}

/// The text of the file that an entry such as `/etc/apt/sources.list:3` lies in.
fn read_source(entry: &str) -> String {
    let file = entry.rsplit_once(':').map_or(entry, |(file, _)| file);
    fs::read_to_string(file).unwrap_or_default()
}

/// The `Signed-By` value of `entry` in the sources file `text`, as it would stand after the colon.
///
/// An entry is numbered by stanza in a deb822 file and by line in a one-line-style file.
fn source_signature(entry: &str, text: &str) -> Option<String> {
    let (file, number) = entry.rsplit_once(':')?;
    let index = number.parse::<usize>().ok()?.checked_sub(1)?;
    if file.ends_with(".list") {
        let line = text.lines().nth(index)?;
        let (options, _) = line.split_once('[')?.1.split_once(']')?;
        let mut options = options.split_whitespace();
        return options
            .find_map(|one| one.strip_prefix("signed-by="))
            .map(|key| format!(" {key}"));
    }
    let stanzas = text
        .split("\n\n")
        .filter(|stanza| stanza.lines().any(|line| line.contains(':')));
    let stanza = stanzas.into_iter().nth(index)?;
    let mut lines = stanza
        .lines()
        .skip_while(|line| !line.to_lowercase().starts_with("signed-by:"));
    let mut value = lines.next()?.split_once(':')?.1.to_owned();
    // A key written into the sources file goes on in indented lines.
    for line in lines.take_while(|line| line.starts_with([' ', '\t'])) {
        value.push('\n');
        value.push_str(line);
    }
    Some(value)
}

/// The private configuration: our folders, and of the machine's what reaches the archive.
fn configuration(folder: &Path, native: &str, machine: &str) -> String {
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

/// The packages that `apt-get install --simulate` would install.
///
/// A line is `Inst NAME[:ARCH] [OLD-VERSION] (VERSION ARCHIVE [ARCH])`.
fn simulated_installs(text: &str) -> Vec<Package> {
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

/// The packages that a package's record names as needed and whose names begin like one of `starts`.
fn dependencies<'a>(record: &'a str, starts: &[&str]) -> Vec<&'a str> {
    let depends = field(record, "Depends").unwrap_or_default();
    depends
        .split([',', '|'])
        .filter_map(|one| one.split_whitespace().next())
        .filter(|name| starts.iter().any(|start| name.starts_with(start)))
        .collect()
}

/// The value of `key` in a package's record.
fn field<'a>(record: &'a str, key: &str) -> Option<&'a str> {
    let mut lines = record.lines().filter_map(|line| line.split_once(": "));
    lines
        .find(|(found, _)| *found == key)
        .map(|(_, value)| value)
}

fn unpack(archive: &Path, into: &Path) -> Result<()> {
    run_silently(Command::new("dpkg").arg("-x").arg(archive).arg(into))
}

/// The first file below `folder` whose name fits, in the order of names.
fn find(folder: &Path, fits: &dyn Fn(&str) -> bool) -> Result<Option<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {folder:?}"))? {
        paths.push(entry?.path());
    }
    paths.sort();
    for path in paths {
        if path.is_dir() && !path.is_symlink() {
            if let Some(found) = find(&path, fits)? {
                return Ok(Some(found));
            }
        } else if path
            .file_name()
            .is_some_and(|name| fits(&name.to_string_lossy()))
        {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

fn empty_folder(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove {folder:?}"))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot create {folder:?}"))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {path:?}"))
}

fn output_of(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{command:?} failed: {}",
        complaint.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn run_silently(command: &mut Command) -> Result<()> {
    output_of(command).map(drop)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests;
