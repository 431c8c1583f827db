//! Which machine is emulated.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use crate::isa::Isa;
use crate::packages::Kernel;

/// The model on whose emulated SVM Linux and its guests run without fail, less what QEMU cannot
/// emulate of it and would say so.
pub(crate) const X86_CPU: &str =
    "EPYC,+svm,+npt,-fxsr-opt,-misalignsse,-osvw,-topoext,-nrip-save,-xsavec";

/// The machines that are emulated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Machine {
    /// QEMU's own, with any CPU and GIC, and with disks.
    #[default]
    Virt,
    /// A Raspberry Pi 4, as far as QEMU knows it: no disks, and just under 1 GiB that Linux finds.
    RaspberryPi4,
}

/// A machine to emulate.
#[derive(Clone, Debug)]
pub(crate) struct HostSpec {
    /// Its instruction set.
    pub(crate) isa: Isa,
    /// What it is, for ARM64. CPU, GIC and memory are those of [`Machine::Virt`].
    pub(crate) machine: Machine,
    /// The CPU as QEMU calls it, such as `max` or `cortex-a53`.
    pub(crate) cpu: String,
    /// The version of an ARM64 machine's interrupt controller, 2 or 3.
    pub(crate) gic: u8,
    /// The kernel that is KVM's host.
    pub(crate) kernel: Kernel,
    /// How many CPUs.
    pub(crate) smp: u32,
    /// Memory in MiB. Twice the size of the files put in is taken before the job starts.
    pub(crate) memory_mib: u32,
    /// Whether to count instructions: one virtual nanosecond is then one instruction.
    pub(crate) icount: bool,
    /// Where to write the instructions of programs at addresses in [`crate::host::TRACED`] that were executed, as
    /// they first were.
    pub(crate) executed: Option<PathBuf>,
    /// More for the kernel's command line.
    pub(crate) append: String,
    /// Whether it has Debian's programs for devices, such as passt, at `/tools`.
    pub(crate) tools: bool,
    /// Whether it has the Debian system that `cargo xtask image` makes, at `/data`.
    pub(crate) system: bool,
    /// The image of an ext4 file system to be mounted at `/data`; what the host writes is lost.
    pub(crate) data: Option<PathBuf>,
}

impl HostSpec {
    /// Creates the usual host.
    pub(crate) fn of(isa: Isa) -> Self {
        let (cpu, kernel, smp) = match isa {
            Isa::Arm64 => ("max", Kernel::V6_12, 2),
            // Other models, and more CPUs, hang now and then.
            Isa::X86 => (X86_CPU, Kernel::V6_1X86, 1),
        };
        Self {
            isa,
            machine: Machine::Virt,
            cpu: cpu.to_owned(),
            gic: 3,
            kernel,
            smp,
            memory_mib: 3072,
            icount: false,
            executed: None,
            append: String::new(),
            tools: false,
            system: false,
            data: None,
        }
    }

    /// Returns the host that the variables `ARMLET_RIG_*` describe.
    pub(crate) fn from_environment() -> Result<Self> {
        Self::from_variables(Isa::from_environment()?)
    }

    /// Returns the host of this architecture that the other variables describe.
    pub(crate) fn from_variables(isa: Isa) -> Result<Self> {
        let mut spec = Self::of(isa);
        let variable = |name: &str| std::env::var(format!("ARMLET_RIG_{name}")).ok();
        spec.machine = match variable("MACHINE").as_deref() {
            None | Some("virt") => Machine::Virt,
            Some("raspi4b") => Machine::RaspberryPi4,
            Some(other) => bail!("ARMLET_RIG_MACHINE is {other:?}; it may be virt or raspi4b"),
        };
        if let Some(cpu) = variable("CPU") {
            spec.cpu = cpu;
        }
        if let Some(gic) = variable("GIC").filter(|_| isa == Isa::Arm64) {
            spec.gic = gic
                .parse()
                .ok()
                .filter(|gic| [2, 3].contains(gic))
                .with_context(|| format!("ARMLET_RIG_GIC is {gic:?}; it may be 2 or 3"))?;
        }
        if let Some(kernel) = variable("KERNEL") {
            spec.kernel = Kernel::from_name(&kernel).context("ARMLET_RIG_KERNEL")?;
            ensure!(
                spec.kernel.isa() == isa,
                "ARMLET_RIG_KERNEL is {kernel:?}, which is no kernel for {}",
                isa.name()
            );
        }
        if let Some(smp) = variable("SMP") {
            spec.smp = smp.parse().context("ARMLET_RIG_SMP is no number of CPUs")?;
        }
        if let Some(memory) = variable("MEMORY") {
            spec.memory_mib = mebibytes(&memory).context("ARMLET_RIG_MEMORY")?;
        }
        spec.icount = variable("ICOUNT").is_some_and(|value| value == "1");
        spec.append = variable("APPEND").unwrap_or_default();
        spec.tools = variable("TOOLS").is_some_and(|value| value == "1");
        spec.system = variable("SYSTEM").is_some_and(|value| value == "1");
        spec.data = variable("DATA").map(PathBuf::from);
        Ok(spec)
    }

    /// Returns the machine in a few words.
    pub(crate) fn summary(&self) -> String {
        let counted = if self.icount {
            ", counting instructions"
        } else {
            ""
        };
        let gic = match self.isa {
            Isa::Arm64 => format!(", GICv{}", self.gic),
            Isa::X86 => String::new(),
        };
        let machine = match self.machine {
            Machine::Virt => format!("{}{gic}", self.cpu),
            Machine::RaspberryPi4 => "Raspberry Pi 4".to_owned(),
        };
        format!("{machine}, Linux {}{counted}", self.kernel.name())
    }
}

/// Returns a size such as `512M` or `4G` in MiB; a bare number is MiB.
pub(crate) fn mebibytes(size: &str) -> Result<u32> {
    let (number, factor) = match size.strip_suffix(['G', 'g']) {
        Some(number) => (number, 1024),
        None => (size.strip_suffix(['M', 'm']).unwrap_or(size), 1),
    };
    let parsed = number
        .parse::<u32>()
        .ok()
        .and_then(|number| number.checked_mul(factor));
    parsed
        .filter(|size| *size > 0)
        .with_context(|| format!("{size:?} is no size such as 512M or 4G"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(mebibytes("4G").unwrap(), 4096);
        assert_eq!(mebibytes("512M").unwrap(), 512);
        assert_eq!(mebibytes("768").unwrap(), 768);
        for bad in ["", "0", "G", "4T", "5000000G"] {
            assert!(mebibytes(bad).is_err(), "{bad}");
        }
    }
}
