//! ARM64 guests.

pub mod boot;
pub mod features;
pub mod gic;
pub mod ipa;
mod tree;

use crate::image::{Arm64Image, Header, ImageError};
use crate::plan::{Blob, Layout, Payload, PlanError, Request};
use crate::width::{Region, Width, WidthPolicy};
use crate::{Arch, Architecture, Board, FeatureWords, Range};
use features::{Features, Offered, Wishes};
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
    /// What it offers beside the base architecture.
    pub offered: Offered,
}

/// A vCPU before its first instruction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Vcpu {
    /// Affinity fields as KVM numbers them: Aff3 in bits 39:32, Aff2.Aff1.Aff0 in bits 23:0.
    pub mpidr: u64,
    /// Where the boot CPU begins; the others wait for PSCI CPU_ON.
    pub boot: Option<Boot>,
    /// Where KVM tells the guest how long the vCPU did not run, if it does.
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
    type Wishes = Wishes;
    type Features = Features;
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
            offered: host.offered,
        }
    }

    fn differences(board: &Board, host: &Host) -> Vec<String> {
        let expected = Self::assumed_host(board);
        if board.host.clusters.is_empty() {
            return Vec::new();
        }
        let mut differences = Vec::new();
        let gics = |host: &Host| match (host.gic_v2, host.gic_v3) {
            (false, false) => "no GIC",
            (true, false) => "GICv2",
            (false, true) => "GICv3",
            (true, true) => "GICv2 and GICv3",
        };
        // A quick look at a host does not see a GICv2 beside a GICv3.
        if expected.gic_v3 != host.gic_v3 || (!host.gic_v3 && expected.gic_v2 != host.gic_v2) {
            let (has, wants) = (gics(host), gics(&expected));
            differences.push(format!("its KVM has {has}, the board's {wants}"));
        }
        let (has, wants) = (host.ipa_limit, board.host.ipa_limit);
        if has.unwrap_or(ipa::LEGACY_BITS) < wants {
            let has = has.unwrap_or(ipa::LEGACY_BITS);
            differences.push(format!("it has {has} IPA bits, the board's {wants}"));
        }
        if !expected.guest_pages.contains(&host.page_size) {
            let pages = crate::size::show_size(host.page_size);
            differences.push(format!(
                "it has {pages} pages, which the board's cores lack"
            ));
        }
        differences
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

    fn wishes(words: &FeatureWords<'_>) -> Result<Wishes, String> {
        if words.exits.is_some() {
            return Err("--exits is for x86_64 guests; leave it out".to_owned());
        }
        Ok(Wishes {
            pmu: words.pmu,
            sve: words.sve,
            pauth: words.pauth,
            steal_time: features::steal_time(words.paravirtual)?,
        })
    }

    fn features(request: &Request<Self>, host: &Host) -> Result<Features, PlanError> {
        features::decide(request, host)
    }

    fn private_interrupts(features: &Features) -> Vec<(u32, &'static str)> {
        let pmu = features.pmu.iter();
        pmu.map(|pmu| (pmu.intid, "performance counters")).collect()
    }

    fn vcpu(index: u32, payload: &Payload, features: &Features, request: &Request<Self>) -> Vcpu {
        let clocks = boot::stolen_time(payload, request).filter(|_| features.steal_time);
        let clock = |clocks: Range| clocks.start() + u64::from(index) * boot::STOLEN_TIME_SIZE;
        Vcpu {
            stolen_time: clocks.map(clock),
            mpidr: mpidr(index),
            boot: (index == 0).then_some(Boot {
                pc: payload.entry,
                x0: payload.info,
            }),
        }
    }

    fn reserved(vcpus: &[Vcpu]) -> Option<Region> {
        let start = vcpus.first()?.stolen_time?;
        let range = Range::new(start, boot::STOLEN_TIME_SIZE * vcpus.len() as u64)?;
        Some(Region {
            name: "stolen time".into(),
            range,
        })
    }

    fn blobs(
        board: &Board,
        layout: &Layout<Self>,
        vcpus: &[Vcpu],
        features: &Features,
        request: &Request<Self>,
    ) -> Result<Vec<Blob>, PlanError> {
        let bytes = tree::build(board, layout, vcpus, features, request).to_dtb()?;
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
    tree::build(board, &plan.layout, &plan.vcpus, &plan.features, request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_compared_with_a_board_that_knows_it_and_with_no_other() {
        let virt = Board::parse(include_str!("../../../boards/virt.toml")).expect("valid");
        let host = Host {
            gic_v2: true,
            gic_v3: false,
            ipa_limit: Some(40),
            page_size: 0x4000,
            ..Aarch64::assumed_host(&virt)
        };
        assert_eq!(Aarch64::differences(&virt, &host), Vec::<String>::new());
        let mut known = virt;
        known.host.clusters = vec![crate::board::Cluster {
            core: "Cortex-A72".to_owned(),
            midr: None,
            cpus: 4,
            capacity: 1024,
        }];
        known.host.guest_pages = vec![0x1000];
        let differences = Aarch64::differences(&known, &host);
        assert_eq!(differences.len(), 3, "{differences:?}");
        assert!(differences[0].contains("GICv2, the board's GICv3"));
        assert_eq!(
            Aarch64::differences(&known, &Aarch64::assumed_host(&known)),
            Vec::<String>::new()
        );
    }

    #[test]
    fn sixteen_vcpus_share_an_affinity_level() {
        assert_eq!(mpidr(0), 0);
        assert_eq!(mpidr(15), 0xf);
        assert_eq!(mpidr(16), 0x100);
        assert_eq!(mpidr(511), 0x1f0f);
        assert_eq!(mpidr(4096), 0x1_0000);
    }
}
