//! Debian packages by name, kept in the user's cache folder.
//!
//! A private apt fetches them: its sources, lists and archives lie in the cache folder, so the
//! machine's own configuration stays as it is. The archive's address, its keyring and any proxy
//! are read from that configuration; this repository names no server. What has been fetched once
//! is found again by a stamp, without asking the network.

mod apt;
mod bindings;
mod files;
mod kernel;
mod kernels;
mod release;
mod systems;
mod trees;

use std::cell::OnceCell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::isa::Isa;
use crate::progress::say;

use apt::{Apt, Package, configuration, field, simulated_installs};
use files::{empty_folder, find, output_of, read, run_silently, unpack};
use release::{Distribution, Release};

pub(crate) use kernel::Kernel;
pub(crate) use kernels::Module;
pub(crate) use systems::{System, can_make_systems, digest, uncompressed};

/// The oldest QEMU on the machine's `PATH` that is used as it is: 9 has the boards we emulate.
const QEMU_MAJOR: u32 = 9;

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

    /// Returns the folder in which derived files are kept.
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

    /// Returns a statically linked busybox.
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

    /// Returns the emulator of machines: the machine's own when it is new enough, else a private
    /// one.
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

    /// Returns the folder of a program of this machine's own architecture, unpacked with the
    /// libraries that the machine lacks.
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

    /// Returns the folder of `item`, fetched when no stamp says that it is there already.
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

/// Returns the name of a stamp: without the architecture for ARM64, which came first.
fn item(name: &str, isa: Isa) -> String {
    match isa {
        Isa::Arm64 => name.to_owned(),
        Isa::X86 => format!("{name}-{}", isa.name()),
    }
}

/// Returns the program that emulates such a machine, and its package.
fn emulator(isa: Isa) -> (&'static str, &'static str) {
    match isa {
        Isa::Arm64 => ("qemu-system-aarch64", "qemu-system-arm"),
        Isa::X86 => ("qemu-system-x86_64", "qemu-system-x86"),
    }
}

impl Qemu {
    /// Returns the command that starts it, to which a machine's options are added.
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

/// Returns the folders below `root` in which multi-arch Debian keeps libraries.
fn private_libraries(root: &Path) -> Vec<PathBuf> {
    let triple = format!("{}-linux-gnu", std::env::consts::ARCH);
    ["usr/lib", "lib"]
        .map(|folder| root.join(folder).join(&triple))
        .into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests;
