//! Device trees of boards that QEMU emulates: they come with the kernel.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::{Kernel, Package, Store, find};

impl Store {
    /// Returns the device tree called `name`, such as `bcm2711-rpi-4-b.dtb`, of a kernel's package.
    pub(crate) fn device_tree(&self, kernel: Kernel, name: &str) -> Result<PathBuf> {
        let item = format!("tree-{}-{name}", kernel.name());
        let folder = self.stored(&item, |apt, into| {
            let (meta, suite) = kernel.package(apt.distribution)?;
            let package = apt.dependency(meta, "arm64", suite.as_deref())?;
            for archive in apt.download(std::slice::from_ref(&package))? {
                unpack_tree(&archive, name, into)?;
            }
            // A folder beside that of the kernel, which has the package's own name.
            Ok(Package {
                name: format!("{name}-of-{}", package.name),
                ..package
            })
        })?;
        find(&folder, &|file| file == name)?.with_context(|| format!("no {name} in {folder:?}"))
    }
}

fn unpack_tree(archive: &Path, name: &str, into: &Path) -> Result<()> {
    let mut data = Command::new("dpkg")
        .arg("--fsys-tarfile")
        .arg(archive)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run dpkg")?;
    let pipe = data.stdout.take().context("dpkg has no output")?;
    let status = Command::new("tar")
        .args(["-x", "--wildcards", "-C"])
        .arg(into)
        .arg(format!("*/{name}"))
        .stdin(pipe)
        .status()
        .context("cannot run tar")?;
    ensure!(status.success(), "{archive:?} holds no {name}");
    let status = data.wait().context("cannot wait for dpkg")?;
    ensure!(status.success(), "dpkg cannot read {archive:?}");
    Ok(())
}
