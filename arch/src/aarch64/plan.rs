//! ARM64 as an [`Arch`]: delegates to the sibling modules.

use super::features::{self, FeatureRequest, Features};
use super::gic::{self, Gic};
use super::{Aarch64, Boot, DEVICE_TREE, Host, Vcpu, boot, ipa, mpidr, tree};
use crate::arch::{Arch, FeatureOptions, Layout, Plan, Request};
use crate::architecture::Architecture;
use crate::board::Board;
use crate::error::PlanError;
use crate::image::{Arm64Image, Header, ImageError};
use crate::machine::{Blob, Payload};
use crate::pci::Msi;
use crate::range::{Range, Region};
use crate::switch::Switch;
use crate::width::{Width, WidthPolicy};

impl Arch for Aarch64 {
    const ARCHITECTURE: Architecture = Architecture::Aarch64;
    type Host = Host;
    type Kernel = Arm64Image;
    type Irqchip = Gic;
    type FeatureRequest = FeatureRequest;
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
        // A quick probe does not detect GICv2 emulation on a GICv3.
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

    fn msi(
        board: &Board,
        request: &Request<Self>,
        gic: &Gic,
        room: Range,
    ) -> Result<Msi, PlanError> {
        gic::msi(board, request, gic, room)
    }

    fn width(highest: &Region, policy: WidthPolicy, host: &Host) -> Result<Width, PlanError> {
        ipa::width(highest, policy, host)
    }

    fn payload(ram: &[Range], request: &Request<Self>, host: &Host) -> Result<Payload, PlanError> {
        boot::place(ram, request, host)
    }

    fn feature_request(options: &FeatureOptions<'_>) -> Result<FeatureRequest, String> {
        if options.exits.is_some() {
            return Err("--exits is for x86_64 guests; leave it out".to_owned());
        }
        Ok(FeatureRequest {
            pmu: options.pmu,
            sve: options.sve,
            pauth: options.pauth,
            steal_time: features::steal_time(options.paravirtual)?,
        })
    }

    fn pinned(plan: &Plan<Self>) -> Vec<(&'static str, String)> {
        let switch = |is_on| if is_on { Switch::On } else { Switch::Off }.to_string();
        let features = &plan.features;
        vec![
            ("gic", plan.layout.irqchip.version().to_string()),
            ("pmu", switch(features.pmu.is_some())),
            ("sve", switch(features.sve)),
            ("pauth", switch(features.pauth)),
            (
                "pv",
                format!("{}={}", features::STEAL_TIME, switch(features.steal_time)),
            ),
        ]
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

    fn generation(payload: &Payload, request: &Request<Self>) -> Option<[Range; 2]> {
        boot::generation(payload, request)
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
}
