//! ARM64 guests.

pub mod boot;
pub mod gic;
pub mod ipa;
mod tree;

use crate::image::{Arm64Image, Header, ImageError};
use crate::plan::{Blob, Layout, Payload, PlanError, Request};
use crate::width::{Region, Width, WidthPolicy};
use crate::{Arch, Architecture, Board, Range};
use gic::Gic;
use serde::Serialize;

/// ARM64 as an [`Arch`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Aarch64;

/// What KVM/arm64 said of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Host {
    /// Most IPA bits (KVM_CAP_ARM_VM_IPA_SIZE); `None` for a KVM without that capability (before
    /// Linux 4.20), which gives 40 bits and only 40.
    pub ipa_limit: Option<u8>,
    /// Page size in bytes, stage 2's granule.
    pub page_size: u64,
    /// Whether KVM emulates GICv2.
    pub gic_v2: bool,
    /// Whether KVM emulates GICv3.
    pub gic_v3: bool,
    /// Most vCPUs in one VM (KVM_CAP_MAX_VCPUS).
    pub max_vcpus: u32,
    /// Page sizes in bytes that the CPUs translate for guests
    /// (ID_AA64MMFR0_EL1.TGRAN4, TGRAN16, TGRAN64).
    pub guest_pages: Vec<u64>,
}

/// A vCPU before its first instruction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Vcpu {
    /// Affinity fields as KVM numbers them: Aff3 in bits 39:32, Aff2.Aff1.Aff0 in bits 23:0.
    pub mpidr: u64,
    /// Where the boot CPU begins; the others wait for PSCI CPU_ON.
    pub boot: Option<Boot>,
}

/// Registers of the boot CPU (Documentation/arch/arm64/booting.rst, section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Boot {
    /// Program counter: the kernel's first byte.
    pub pc: u64,
    /// X0: the device tree's address.
    pub x0: u64,
}

/// The MPIDR affinity that KVM gives vCPU `index`: 16 to an Aff0, because GICv3's SGI target
/// lists hold 16 (arch/arm64/kvm/sys_regs.c: reset_mpidr).
#[must_use]
pub const fn mpidr(index: u32) -> u64 {
    let index = index as u64;
    (index & 0xf) | (index >> 4 & 0xff) << 8 | (index >> 12 & 0xff) << 16
}

impl Arch for Aarch64 {
    const ARCHITECTURE: Architecture = Architecture::Aarch64;
    type Host = Host;
    type Kernel = Arm64Image;
    type Irqchip = Gic;
    type Vcpu = Vcpu;

    fn kernel(header: &Header) -> Result<Arm64Image, ImageError> {
        header.arm64().cloned()
    }

    fn assumed_host(board: &Board) -> Host {
        let host = &board.host;
        let v3 = host.gic.contains(&3);
        Host {
            ipa_limit: Some(host.ipa_limit),
            page_size: host.page_size,
            gic_v2: host.gic.contains(&2),
            gic_v3: v3,
            max_vcpus: if v3 {
                gic::V3_MAX_VCPUS
            } else {
                gic::V2_MAX_VCPUS
            },
            guest_pages: host.guest_pages.clone(),
        }
    }

    fn irqchip(
        board: &Board,
        request: &Request<Self>,
        host: &Host,
        ram: &[Range],
    ) -> Result<Gic, PlanError> {
        gic::place(board, request, host, ram)
    }

    fn irqchip_regions(gic: &Gic) -> Vec<Region> {
        gic.regions()
    }

    fn width(highest: &Region, policy: WidthPolicy, host: &Host) -> Result<Width, PlanError> {
        ipa::width(highest, policy, host)
    }

    fn payload(ram: &[Range], request: &Request<Self>, host: &Host) -> Result<Payload, PlanError> {
        boot::place(ram, request, host)
    }

    fn vcpu(index: u32, payload: &Payload) -> Vcpu {
        Vcpu {
            mpidr: mpidr(index),
            boot: (index == 0).then_some(Boot {
                pc: payload.entry,
                x0: payload.info,
            }),
        }
    }

    fn blobs(
        board: &Board,
        layout: &Layout<Self>,
        vcpus: &[Vcpu],
        request: &Request<Self>,
    ) -> Result<Vec<Blob>, PlanError> {
        let bytes = tree::build(board, layout, vcpus, request).to_dtb()?;
        boot::check_tree(layout, request, bytes.len() as u64)?;
        Ok(vec![Blob {
            name: DEVICE_TREE,
            address: layout.payload.info,
            bytes,
        }])
    }
}

/// The name of the blob that holds the device tree.
pub const DEVICE_TREE: &str = "device tree";

/// The device tree of a planned machine as a value, for printing.
#[must_use]
pub fn device_tree(
    board: &Board,
    plan: &crate::Plan<Aarch64>,
    request: &Request<Aarch64>,
) -> armlet_fdt::Node {
    tree::build(board, &plan.layout, &plan.vcpus, request)
}

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
