//! The two kinds of machine whose guests are booted, tested and measured.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::toolchain::{self, Toolchain};

/// The variable that tells the runner for which machine a program was built.
pub(crate) const VARIABLE: &str = "ARMLET_RIG_ARCH";

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    /// ARM, 64 bits.
    Arm64,
    /// Intel and AMD, 64 bits.
    X86,
}

impl Isa {
    const ALL: [Self; 2] = [Self::Arm64, Self::X86];

    /// Returns the name by which options know it, as Rust has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Arm64 => "aarch64",
            Self::X86 => "x86_64",
        }
    }

    /// Returns what Debian calls it.
    pub(crate) fn debian(self) -> &'static str {
        match self {
            Self::Arm64 => "arm64",
            Self::X86 => "amd64",
        }
    }

    /// Returns the serial console of machines.
    pub(crate) fn console(self) -> &'static str {
        match self {
            Self::Arm64 => "ttyAMA0",
            Self::X86 => "ttyS0",
        }
    }

    /// Returns what `name` means, if programs for it can be built here.
    pub(crate) fn from_name(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|isa| isa.name() == name);
        let names = Self::ALL.map(Self::name).join(", ");
        let isa = found.with_context(|| format!("no architecture is called {name:?}: {names}"))?;
        ensure!(
            isa == Self::Arm64 || std::env::consts::ARCH == isa.name(),
            "x86_64 guests are tested on x86_64 machines; this one is {}",
            std::env::consts::ARCH
        );
        Ok(isa)
    }

    /// Returns what the environment says, ARM64 where it says nothing.
    pub(crate) fn from_environment() -> Result<Self> {
        match std::env::var(VARIABLE) {
            Ok(name) => Self::from_name(&name).context(VARIABLE),
            Err(_) => Ok(Self::Arm64),
        }
    }

    /// Returns whether this machine can run such guests itself.
    pub(crate) fn is_native(self) -> bool {
        let kvm = std::env::consts::ARCH == self.name() && Path::new("/dev/kvm").exists();
        // Some small cloud machines have a KVM without the CPU's help, which starts no kernel.
        kvm && (self == Self::Arm64 || cpu_virtualizes())
    }

    /// Returns the compiler for it.
    pub(crate) fn toolchain(self) -> Result<Toolchain> {
        match self {
            Self::Arm64 => toolchain::arm64(),
            Self::X86 => toolchain::x86_64(),
        }
    }
}

/// Returns whether the CPU has VMX or SVM.
fn cpu_virtualizes() -> bool {
    let about = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = about.lines().find(|line| line.starts_with("flags"));
    let mut flags = flags.unwrap_or_default().split_whitespace();
    flags.any(|flag| flag == "vmx" || flag == "svm")
}
