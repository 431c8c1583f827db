//! x86_64 as an [`Arch`]: delegates to the sibling modules, and places the interrupt controllers.

use super::features::{EXITS, FeatureRequest, Features, PARAVIRTUAL};
use super::low_memory::{GENERATION_ID, PAGE, VM_CLOCK};
use super::{Host, Irqchip, Vcpu, X86_64, boot, cpu, phys};
use crate::arch::{Arch, FeatureOptions, Layout, Request};
use crate::architecture::Architecture;
use crate::board::Board;
use crate::error::PlanError;
use crate::image::{Header, ImageError, X86Kernel};
use crate::machine::{Blob, Payload};
use crate::pci::Msi;
use crate::range::{Range, Region};
use crate::switch::Switch;
use crate::width::{Width, WidthPolicy};

/// Most vCPUs with KVM's own I/O APIC, whose destination field has 8 bits, with 255 for broadcast
/// (82093AA datasheet, section 3.2.4, IOREDTBL bits 63:56).
pub const IOAPIC_VCPUS: u32 = 255;
/// Most vCPUs that KVM can be built for (arch/x86/kvm/Kconfig: KVM_MAX_NR_VCPUS).
pub const MAX_VCPUS: u32 = 4096;
/// Most vCPUs of KVM as it is usually built (arch/x86/include/asm/kvm_host.h: KVM_MAX_VCPUS).
const USUAL_VCPUS: u32 = 1024;
/// The I/O APIC's registers: where every PC has them (82093AA datasheet, section 3.0), and KVM's
/// default (arch/x86/kvm/ioapic.h: IOAPIC_DEFAULT_BASE_ADDRESS).
const IOAPIC: u64 = 0xfec0_0000;
/// The local APICs' registers after reset, the same for each vCPU (Intel SDM volume 3, section
/// 11.4.1; arch/x86/include/asm/apicdef.h: APIC_DEFAULT_PHYS_BASE).
const LAPIC: u64 = 0xfee0_0000;
/// Bytes of each of the two windows.
const APIC_SIZE: u64 = 0x1000;
/// What KVM reserves in the address space for Intel CPUs without unrestricted guest support: one
/// page for an identity page table (its default, arch/x86/include/asm/vmx.h:
/// VMX_EPT_IDENTITY_PAGETABLE_ADDR), followed by three pages of task state
/// (Documentation/virt/kvm/api.rst, KVM_SET_TSS_ADDR).
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TASK_STATE: u64 = IDENTITY_MAP + 0x1000;
const TASK_STATE_SIZE: u64 = 0x3000;
const KVM_TABLE: &str = "KVM's identity map";
const KVM_TASK: &str = "KVM's task state";

impl Arch for X86_64 {
    const ARCHITECTURE: Architecture = Architecture::X86_64;
    type Host = Host;
    type Kernel = X86Kernel;
    type Irqchip = Irqchip;
    type FeatureRequest = FeatureRequest;
    type Features = Features;
    type Vcpu = Vcpu;

    fn kernel(header: &Header) -> Result<X86Kernel, ImageError> {
        header.x86_64().cloned()
    }

    fn assumed_host(board: &Board) -> Host {
        Host {
            phys_bits: board.host.ipa_limit,
            max_vcpus: USUAL_VCPUS,
            // What Linux has offered since 5.10.
            paravirtual: PARAVIRTUAL
                .iter()
                .fold(0, |bits, feature| bits | feature.bits),
            tsc_deadline: true,
            wide_apic_ids: true,
            exits_off: EXITS.iter().fold(0, |bits, (_, bit)| bits | bit),
        }
    }

    fn feature_request(options: &FeatureOptions<'_>) -> Result<FeatureRequest, String> {
        let arm = [
            ("--pmu", options.pmu),
            ("--sve", options.sve),
            ("--pauth", options.pauth),
        ];
        match arm.iter().find(|(_, switch)| *switch != Switch::Auto) {
            None => FeatureRequest::parse(options.paravirtual, options.exits),
            Some((option, _)) => Err(format!("{option} is for aarch64 guests; leave it out")),
        }
    }

    fn features(request: &Request<Self>, host: &Host) -> Result<Features, PlanError> {
        request.features.decide(host)
    }

    fn differences(_: &Board, _: &Host) -> Vec<String> {
        // Boards for x86_64 are generic.
        Vec::new()
    }

    fn irqchip(
        _board: &Board,
        request: &Request<Self>,
        host: &Host,
        _ram: &[Range],
    ) -> Result<Irqchip, PlanError> {
        check_vcpus(request.cpus, host)?;
        let window = |name: &str, start, size| {
            Range::new(start, size).ok_or_else(|| PlanError::Wraps {
                name: name.to_owned(),
                start,
                size,
            })
        };
        Ok(Irqchip {
            ioapic: window("I/O APIC", IOAPIC, APIC_SIZE)?,
            lapic: window("local APICs", LAPIC, APIC_SIZE)?,
            messages: request.cpus > IOAPIC_VCPUS,
            identity_map: window(KVM_TABLE, IDENTITY_MAP, APIC_SIZE)?,
            task_state: window(KVM_TASK, TASK_STATE, TASK_STATE_SIZE)?,
        })
    }

    fn irqchip_regions(irqchip: &Irqchip) -> Vec<Region> {
        [
            ("I/O APIC", irqchip.ioapic),
            ("local APICs", irqchip.lapic),
            (KVM_TABLE, irqchip.identity_map),
            (KVM_TASK, irqchip.task_state),
        ]
        .map(|(name, range)| Region {
            name: name.into(),
            range,
        })
        .to_vec()
    }

    fn msi(_: &Board, _: &Request<Self>, _: &Irqchip, _: Range) -> Result<Msi, PlanError> {
        Ok(Msi::LocalApics)
    }

    fn width(highest: &Region, policy: WidthPolicy, host: &Host) -> Result<Width, PlanError> {
        phys::width(highest, policy, host)
    }

    fn payload(ram: &[Range], request: &Request<Self>, _host: &Host) -> Result<Payload, PlanError> {
        boot::place(ram, request)
    }

    fn vcpu(index: u32, payload: &Payload, _features: &Features, request: &Request<Self>) -> Vcpu {
        Vcpu {
            apic_id: index,
            boot: (index == 0).then(|| cpu::registers(payload, request.kernel.as_ref())),
        }
    }

    fn generation(_: &Payload, _: &Request<Self>) -> Option<[Range; 2]> {
        let page = |start| Range::new(start, PAGE);
        Some([page(GENERATION_ID)?, page(VM_CLOCK)?])
    }

    fn blobs(
        _board: &Board,
        layout: &Layout<Self>,
        vcpus: &[Vcpu],
        _features: &Features,
        request: &Request<Self>,
    ) -> Result<Vec<Blob>, PlanError> {
        boot::blobs(layout, vcpus, request)
    }
}

fn check_vcpus(asked: u32, host: &Host) -> Result<(), PlanError> {
    let (most, why) = match host.max_vcpus {
        most if most > IOAPIC_VCPUS && !host.wide_apic_ids => (
            IOAPIC_VCPUS,
            format!("the I/O APIC of this host's KVM serves {IOAPIC_VCPUS}"),
        ),
        most @ 0..MAX_VCPUS => (most, format!("this host's KVM offers {most}")),
        _ => (MAX_VCPUS, format!("KVM serves {MAX_VCPUS}")),
    };
    if asked > most {
        return Err(PlanError::TooManyCpus { asked, most, why });
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::x86_64::Boot;
    use crate::{Plan, plan};

    const PC: &str = include_str!("../../../boards/pc.toml");

    fn pc() -> Board {
        Board::parse(PC).expect("valid")
    }

    pub(in crate::x86_64) fn request(memory: u64) -> Request<X86_64> {
        Request {
            cmdline: "console=ttyS0".to_owned(),
            ..Request::new(1, memory)
        }
    }

    fn planned(board: &Board, request: &Request<X86_64>) -> Result<Plan<X86_64>, String> {
        plan(board, request, &X86_64::assumed_host(board)).map_err(|error| error.to_string())
    }

    #[test]
    fn the_pc_board_plans_what_it_says() {
        let board = pc();
        assert_eq!(board.name, "pc");
        assert_eq!(board.host.gic, []);
        let plan = planned(&board, &request(board.guest.memory)).expect("fits");
        assert_eq!(
            plan.layout.ram,
            [Range::new(0, 512 << 20).expect("not empty")]
        );
        assert_eq!(plan.width.bits, 32);
        assert_eq!(plan.width.highest.name, "KVM's task state");
        assert_eq!(plan.width.limit, 46);
    }

    #[test]
    fn memory_beyond_3_gib_lies_above_4_gib() {
        let ram = |memory| planned(&pc(), &request(memory)).expect("fits").layout.ram;
        let bank = |start, size| Range::new(start, size).expect("not empty");
        assert_eq!(ram(3 << 30), [bank(0, 3 << 30)]);
        let plan = planned(&pc(), &request(4 << 30)).expect("fits");
        assert_eq!(plan.layout.ram, [bank(0, 3 << 30), bank(4 << 30, 1 << 30)]);
        assert_eq!((plan.width.bits, plan.width.levels), (33, 4));
        let names: Vec<_> = plan.layout.regions().into_iter().map(|r| r.name).collect();
        assert_eq!(
            names,
            [
                "RAM bank 0",
                "I/O APIC",
                "local APICs",
                "KVM's identity map",
                "KVM's task state",
                "RAM bank 1"
            ]
        );
    }

    #[test]
    fn a_machine_wider_than_the_host_is_refused_with_what_fits() {
        let host = Host {
            phys_bits: 36,
            max_vcpus: 8,
            ..X86_64::assumed_host(&pc())
        };
        let error = plan(&pc(), &request(64 << 30), &host).expect_err("too wide");
        assert_eq!(
            error.to_string(),
            "RAM bank 1 ends at 0x103fffffff and needs 37 address bits; this host offers 36; use --memory 63G or less"
        );
        assert!(plan(&pc(), &request(63 << 30), &host).is_ok());
    }

    #[test]
    fn ram_over_the_interrupt_controllers_is_refused() {
        let board =
            Board::parse(&PC.replacen("up-to = \"3G\"", "up-to = \"4G\"", 1)).expect("valid");
        assert_eq!(
            planned(&board, &request(5 << 30)),
            Err("RAM bank 0 (0x0-0xffffffff) and I/O APIC (0xfec00000-0xfec00fff) overlap on board 'pc'; that bank holds 4076M at most".to_owned())
        );
    }

    #[test]
    fn vcpus_are_limited_by_the_host_and_by_kvms_io_apic() {
        let error = |cpus, max_vcpus, wide_apic_ids| {
            let request = Request {
                cpus,
                ..request(512 << 20)
            };
            let host = Host {
                max_vcpus,
                wide_apic_ids,
                ..X86_64::assumed_host(&pc())
            };
            plan(&pc(), &request, &host)
                .expect_err("too many")
                .to_string()
        };
        assert_eq!(
            error(9, 8, true),
            "9 vCPUs were asked for; this host's KVM offers 8; use --cpus 8 or fewer"
        );
        assert_eq!(
            error(256, 4096, false),
            "256 vCPUs were asked for; the I/O APIC of this host's KVM serves 255; use --cpus 255 or fewer"
        );
        assert_eq!(
            error(4097, 5000, true),
            "4097 vCPUs were asked for; KVM serves 4096; use --cpus 4096 or fewer"
        );
    }

    #[test]
    fn beyond_255_vcpus_the_io_apic_is_ours() {
        for (cpus, messages) in [(255, false), (256, true), (1024, true)] {
            let request = Request {
                cpus,
                ..request(512 << 20)
            };
            let plan = planned(&pc(), &request).expect("fits");
            assert_eq!(plan.layout.irqchip.messages, messages, "{cpus} vCPUs");
        }
    }

    #[test]
    fn one_vcpu_starts_and_the_others_wait() {
        let request = Request {
            cpus: 255,
            ..request(512 << 20)
        };
        let plan = planned(&pc(), &request).expect("fits");
        let ids: Vec<_> = plan.vcpus.iter().map(|vcpu| vcpu.apic_id).collect();
        assert_eq!(ids, (0..255).collect::<Vec<_>>());
        let boots = plan.vcpus.iter().filter(|vcpu| vcpu.boot.is_some());
        assert_eq!(boots.count(), 1);
        assert_eq!(
            plan.vcpus[0].boot,
            Some(Boot {
                rip: 0x10_0200,
                rsi: 0x1000,
                rbx: 0,
                rflags: 2,
                cr0: 0x8000_0011,
                cr3: 0x3000,
                cr4: 0x20,
                efer: 0x500,
                gdt_base: 0x2000,
                gdt_limit: 31,
                code: 0x00af_9b00_0000_ffff,
                data: 0x00cf_9300_0000_ffff,
            })
        );
    }
}
