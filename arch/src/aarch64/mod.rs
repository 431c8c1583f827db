//! ARM64 guests.

pub mod boot;
pub mod chip;
pub mod debug;
pub mod features;
pub mod gic;
mod host;
pub mod id;
pub mod ipa;
mod plan;
pub mod registers;
mod tree;

pub use host::{Host, Offered};
pub use tree::device_tree;

use serde::Serialize;

/// ARM64 as an [`Arch`](crate::Arch).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Aarch64;

/// A vCPU before its first instruction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Vcpu {
    /// The affinity fields that KVM assigns: Aff3 in bits 39:32, Aff2.Aff1.Aff0 in bits 23:0.
    pub mpidr: u64,
    /// The boot CPU's initial registers; the others wait for PSCI CPU_ON.
    pub boot: Option<Boot>,
    /// Where KVM reports stolen time to the guest, if it does.
    pub stolen_time: Option<u64>,
}

/// Registers of the boot CPU (Documentation/arch/arm64/booting.rst, section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Boot {
    /// Program counter: the kernel's first byte.
    pub pc: u64,
    /// X0: the device tree's address.
    pub x0: u64,
}

/// Returns the MPIDR affinity that KVM gives vCPU `index`: 16 for each Aff1, because GICv3's SGI
/// target lists hold 16 (arch/arm64/kvm/sys_regs.c: reset_mpidr).
#[must_use]
pub const fn mpidr(index: u32) -> u64 {
    let index = index as u64;
    (index & 0xf) | (index >> 4 & 0xff) << 8 | (index >> 12 & 0xff) << 16
}

/// The name of the blob that holds the device tree.
pub const DEVICE_TREE: &str = "device tree";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_vcpus_share_an_affinity_level() {
        assert_eq!(mpidr(0), 0);
        assert_eq!(mpidr(15), 0xf);
        assert_eq!(mpidr(16), 0x100);
        assert_eq!(mpidr(511), 0x1f0f);
        assert_eq!(mpidr(4096), 0x1_0000);
    }
}
