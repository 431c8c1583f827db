//! What this host says of itself in /proc and /sys, as plain data.

use armlet_arch::board::{Identity, Midr};
use std::collections::BTreeSet;
use std::path::PathBuf;

/// The folder that /proc and /sys lie in.
#[derive(Clone, Debug)]
pub struct HostFiles {
    root: PathBuf,
}

/// This host's files.
#[must_use]
pub fn this() -> HostFiles {
    HostFiles { root: "/".into() }
}

impl HostFiles {
    /// What the host is, as far as it says so.
    #[must_use]
    pub fn identity(&self) -> Identity {
        let kinds: BTreeSet<Midr> = allowed_cpus()
            .into_iter()
            .filter_map(|cpu| self.midr(cpu))
            .collect();
        Identity {
            compatible: self.compatible(),
            vendor: self.text("sys/class/dmi/id/sys_vendor").unwrap_or_default(),
            product: self
                .text("sys/class/dmi/id/product_name")
                .unwrap_or_default(),
            cores: kinds.into_iter().collect(),
        }
    }

    /// The board as its firmware names it: the device tree's model (Devicetree specification v0.4,
    /// section 2.3.2), else what DMI says.
    #[must_use]
    pub fn name(&self) -> Option<String> {
        self.text("proc/device-tree/model").or_else(|| {
            let vendor = self.text("sys/class/dmi/id/sys_vendor")?;
            let product = self.text("sys/class/dmi/id/product_name")?;
            Some(format!("{vendor} {product}"))
        })
    }

    fn compatible(&self) -> Vec<String> {
        let names = self.text("proc/device-tree/compatible");
        let names = names.iter().flat_map(|names| names.split('\0'));
        names.map(str::to_owned).collect()
    }

    /// What kind of core a CPU is (Documentation/arch/arm64/cpu-feature-registers.rst).
    fn midr(&self, cpu: u32) -> Option<Midr> {
        let path = format!("sys/devices/system/cpu/cpu{cpu}/regs/identification/midr_el1");
        let text = self.text(&path)?;
        let register = u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()?;
        Some(Midr::kind(register))
    }

    fn text(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.root.join(path))
            .ok()
            .map(|text| text.trim_matches(['\0', '\n', ' ']).to_owned())
            .filter(|text| !text.is_empty())
    }
}

/// The CPUs that this process may run on.
#[must_use]
pub fn allowed_cpus() -> Vec<u32> {
    let Ok(set) = rustix::thread::sched_getaffinity(None) else {
        return Vec::new();
    };
    let most = rustix::thread::CpuSet::MAX_CPU;
    (0..most)
        .filter(|cpu| set.is_set(*cpu))
        .map(|cpu| cpu as u32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_read_from_its_files() {
        let folder = tempfile::tempdir().expect("a folder");
        let files = HostFiles {
            root: folder.path().to_owned(),
        };
        assert_eq!(files.identity(), Identity::default());
        assert_eq!(files.name(), None);
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            std::fs::write(path, text).expect("a file");
        };
        let cpu = allowed_cpus()[0];
        write(
            &format!("sys/devices/system/cpu/cpu{cpu}/regs/identification/midr_el1"),
            "0x00000000414fd0b1\n",
        );
        write("sys/class/dmi/id/sys_vendor", "Maker\n");
        write("sys/class/dmi/id/product_name", "One\n");
        assert_eq!(files.name().as_deref(), Some("Maker One"));
        write("proc/device-tree/compatible", "maker,board\0maker,soc\0");
        write("proc/device-tree/model", "The Board\0");
        assert_eq!(files.name().as_deref(), Some("The Board"));
        let identity = files.identity();
        assert_eq!(identity.compatible, ["maker,board", "maker,soc"]);
        assert_eq!(identity.cores, [Midr::kind(0x410f_d0b0)]);
        assert_eq!(identity.vendor, "Maker");
    }
}
