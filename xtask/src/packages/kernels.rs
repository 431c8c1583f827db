//! What is used of a kernel package: the boot executable, its configuration, and the drivers for
//! virtual machines, with what they depend on.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::{Kernel, Store, find};
use crate::elf;

/// The drivers that are kept, as patterns below `kernel/`: those for guests and for hosts, and
/// all that they depend on in any of our kernels.
const DRIVERS: [&str; 27] = [
    "arch/arm64/crypto/crc*",
    "arch/x86/crypto/crc*",
    "arch/x86/kvm/*",
    "crypto/crc*",
    "drivers/acpi/button*",
    "drivers/block/loop*",
    "drivers/block/virtio_blk*",
    "drivers/char/hw_random/*",
    "drivers/char/virtio_console*",
    "drivers/dax/*",
    "drivers/input/evdev*",
    "drivers/input/keyboard/gpio_keys*",
    "drivers/net/*failover*",
    "drivers/net/tap*",
    "drivers/net/tun*",
    "drivers/net/virtio_net*",
    "drivers/nvdimm/*",
    "drivers/vhost/*",
    "drivers/virtio/*",
    "fs/ext4/*",
    "fs/fuse/*",
    "fs/jbd2/*",
    "fs/mbcache*",
    "lib/*",
    "net/core/failover*",
    "net/vmw_vsock/*",
    "virt/lib/irqbypass*",
];

/// The files of an unpacked kernel package.
#[derive(Debug)]
pub(crate) struct KernelFiles {
    /// The boot executable.
    pub(crate) image: PathBuf,
    folder: PathBuf,
}

/// A kernel module, uncompressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Module {
    /// As in `virtio_blk`.
    pub(crate) name: String,
    /// The contents of its file.
    pub(crate) data: Vec<u8>,
}

impl Store {
    /// Returns a kernel.
    pub(crate) fn kernel(&self, kernel: Kernel) -> Result<KernelFiles> {
        // The items called "kernel-..." of older caches lack most drivers.
        let item = format!("linux-{}", kernel.name());
        let folder = self.stored(&item, |apt, into| {
            let (meta, suite) = kernel.package(apt.distribution)?;
            let architecture = kernel.isa().debian();
            let package = apt.dependency(meta, architecture, suite.as_deref())?;
            for archive in apt.download(&apt.kernel_parts(&package, suite.as_deref())?)? {
                unpack_kernel(&archive, into)?;
            }
            executable(into)?;
            Ok(package)
        })?;
        let image = executable(&folder)?;
        Ok(KernelFiles { image, folder })
    }
}

impl KernelFiles {
    /// Returns the kernel's version: the end of its executable's name or, from 7.0 on, that of its
    /// folder.
    pub(crate) fn version(&self) -> String {
        let part = |path: &Path| {
            let name = path.file_name().unwrap_or_default();
            name.to_string_lossy().into_owned()
        };
        let name = part(&self.image);
        match name.strip_prefix("vmlinuz-") {
            Some(version) => version.to_owned(),
            None => self.image.parent().map(part).unwrap_or_default(),
        }
    }

    /// Returns the modules called `names` and those that they need, each after what it needs. What
    /// is built into the kernel is left out.
    pub(crate) fn modules(&self, names: &[&str]) -> Result<Vec<Module>> {
        let mut modules = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            self.add_module(name, &mut seen, &mut modules)?;
        }
        Ok(modules)
    }

    fn add_module(
        &self,
        name: &str,
        seen: &mut BTreeSet<String>,
        modules: &mut Vec<Module>,
    ) -> Result<()> {
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(data) = self.module(name)? else {
            // An algorithm is known by an alias (include/linux/crypto.h: `MODULE_ALIAS_CRYPTO`).
            if let Some(algorithm) = name.strip_prefix("crypto_") {
                return self.add_module(&format!("{algorithm}_generic"), seen, modules);
            }
            // Names of what is built in are not told from misspelt ones here: the test of all names
            // that are asked for is a guest that uses the device.
            return Ok(());
        };
        for needed in needs(&data).with_context(|| format!("cannot read the module {name}"))? {
            self.add_module(&needed, seen, modules)?;
        }
        modules.push(Module {
            name: name.to_owned(),
            data,
        });
        Ok(())
    }

    /// Returns the module called `name`, if it is one.
    fn module(&self, name: &str) -> Result<Option<Vec<u8>>> {
        // A file may have hyphens where the module's name has underscores.
        let wanted = format!("{name}.ko");
        let fits = |file: &str| file.replace('-', "_").starts_with(&wanted);
        let Some(path) = find(&self.folder, &fits)? else {
            return Ok(None);
        };
        if path.extension() == Some(OsStr::new("ko")) {
            let data = fs::read(&path).with_context(|| format!("cannot read {path:?}"))?;
            return Ok(Some(data));
        }
        let mut xz = Command::new("xz");
        xz.arg("-dc").arg(&path);
        let output = xz.output().context("cannot run xz (package xz-utils)")?;
        ensure!(output.status.success(), "xz cannot unpack {path:?}");
        Ok(Some(output.stdout))
    }
}

/// Returns the boot executable below `folder`: `boot/vmlinuz-VERSION` or, from 7.0 on,
/// `usr/lib/modules/VERSION/vmlinuz`.
fn executable(folder: &Path) -> Result<PathBuf> {
    let fits = |name: &str| name == "vmlinuz" || name.starts_with("vmlinuz-");
    find(folder, &fits)?.with_context(|| format!("no kernel in {folder:?}"))
}

/// Returns the names of the modules that the module `data` needs, from its section `.modinfo`
/// (Linux, include/linux/module.h: `MODULE_INFO`, `MODULE_SOFTDEP`).
fn needs(data: &[u8]) -> Result<Vec<String>> {
    let info = elf::section(data, ".modinfo")?.context("no .modinfo")?;
    Ok(needs_in(info))
}

fn needs_in(info: &[u8]) -> Vec<String> {
    let mut names = Vec::new();
    for line in info.split(|byte| *byte == 0) {
        let line = String::from_utf8_lossy(line);
        if let Some(depends) = line.strip_prefix("depends=") {
            names.extend(depends.split(',').map(str::to_owned));
        } else if let Some((_, pre)) = line.split_once("softdep=pre:") {
            let pre = pre.split("post:").next().unwrap_or_default();
            names.extend(pre.split_whitespace().map(str::to_owned));
        }
    }
    names.retain(|name| !name.is_empty());
    names.iter().map(|name| name.replace('-', "_")).collect()
}

/// Unpacks what we use of a kernel package, which is a tenth of its size.
fn unpack_kernel(archive: &Path, into: &Path) -> Result<()> {
    let mut data = Command::new("dpkg")
        .arg("--fsys-tarfile")
        .arg(archive)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run dpkg")?;
    let pipe = data.stdout.take().context("dpkg has no output")?;
    // Not every kernel has every file: tar's complaints about the missing ones are not ours.
    let mut tar = Command::new("tar");
    tar.arg("-x").arg("-C").arg(into).arg("--wildcards");
    tar.args(["./boot/vmlinuz-*", "./boot/config-*"]);
    tar.arg("./usr/lib/modules/*/vmlinuz");
    tar.args(DRIVERS.map(|pattern| format!("*/kernel/{pattern}")));
    tar.stdin(pipe)
        .stderr(Stdio::null())
        .status()
        .context("cannot run tar")?;
    let status = data.wait().context("cannot wait for dpkg")?;
    ensure!(status.success(), "dpkg cannot read {archive:?}");
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_found_where_their_packages_have_them() {
        for (path, version) in [
            ("boot/vmlinuz-6.1.0-50-arm64", "6.1.0-50-arm64"),
            (
                "usr/lib/modules/7.3.4+deb13-arm64/vmlinuz",
                "7.3.4+deb13-arm64",
            ),
        ] {
            let folder = tempfile::tempdir().unwrap();
            assert!(executable(folder.path()).is_err());
            let image = folder.path().join(path);
            fs::create_dir_all(image.parent().unwrap()).unwrap();
            fs::write(&image, "").unwrap();
            assert_eq!(executable(folder.path()).unwrap(), image);
            let folder = folder.path().to_owned();
            assert_eq!(KernelFiles { image, folder }.version(), version);
        }
    }

    #[test]
    fn what_a_module_needs_is_read() {
        let info =
            b"license=GPL\0softdep=pre: crc32c post: more\0depends=jbd2,mb-cache\0name=ext4\0";
        assert_eq!(needs_in(info), ["crc32c", "jbd2", "mb_cache"]);
        assert_eq!(needs_in(b"depends=\0name=crc16\0"), [""; 0]);
    }
}
