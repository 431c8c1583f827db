//! KVM on ARM64. The order of the calls follows the kernel's requirements
//! (Documentation/virt/kvm/api.rst, devices/arm-vgic-v3.rst, devices/vcpu.rst).

mod access;
#[cfg(feature = "gdb")]
pub(super) mod debug;
mod gic;
pub(super) mod state;

use super::arch::{Depth, Hypercall, KvmArch, OtherCalls, RawExit};
use super::facts::{ArmFacts, Virtualization};
use super::interrupts::Pins;
use super::offers::Offers;
use access::{read_register, write_register};
use anyhow::{Context, Result, bail, ensure};
use armlet_arch::aarch64::Offered;
use armlet_arch::aarch64::features::{Features, Pmu};
use armlet_arch::aarch64::ipa::{narrowed, pa_range_bits};
use armlet_arch::aarch64::{Aarch64, Host};
use armlet_arch::irq::{GicChoice, Spi};
use armlet_arch::width::MIN_BITS;
use armlet_arch::{Plan, Request, Width};
use armlet_system::eintr::uninterrupted;
use armlet_system::page_size::page_size;
use armlet_system::seccomp::Native;
use kvm_bindings::{
    KVM_ARM_VCPU_PMU_V3, KVM_ARM_VCPU_PMU_V3_CTRL, KVM_ARM_VCPU_PMU_V3_INIT,
    KVM_ARM_VCPU_PMU_V3_IRQ, KVM_ARM_VCPU_PMU_V3_SET_PMU, KVM_ARM_VCPU_POWER_OFF,
    KVM_ARM_VCPU_PSCI_0_2, KVM_ARM_VCPU_PTRAUTH_ADDRESS, KVM_ARM_VCPU_PTRAUTH_GENERIC,
    KVM_ARM_VCPU_PVTIME_CTRL, KVM_ARM_VCPU_PVTIME_IPA, KVM_ARM_VCPU_SVE, KVM_ARM_VM_SMCCC_CTRL,
    KVM_ARM_VM_SMCCC_FILTER, KVM_CAP_ARM_NISV_TO_USER, KVM_CREATE_DEVICE_TEST, KVM_EXIT_ARM_NISV,
    KVM_MP_STATE_STOPPED, kvm_create_device, kvm_device_attr, kvm_device_type,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, kvm_enable_cap, kvm_mp_state, kvm_smccc_filter,
    kvm_smccc_filter_action_KVM_SMCCC_FILTER_FWD_TO_USER, kvm_vcpu_events, kvm_vcpu_init,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use std::ffi::c_void;
use std::sync::Once;

/// The vCPU limit that a host with only GICv2 reports (KVM_CAP_MAX_VCPUS).
const GIC_V2_VCPUS: u32 = 8;

/// ONE_REG ids (Documentation/virt/kvm/api.rst, 4.68): core registers are numbered by their
/// offset in `struct kvm_regs`, system registers by op0, op1, CRn, CRm, op2.
const X0: u64 = 0x6030_0000_0010_0000;
const PC: u64 = 0x6030_0000_0010_0040;
const MPIDR_EL1: u64 = sysreg(3, 0, 0, 0, 5);
const ID_AA64MMFR0_EL1: u64 = sysreg(3, 0, 0, 7, 0);

const fn sysreg(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    0x6030_0000_0013_0000 | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
}

/// PSCI's function CPU_OFF (Arm DEN 0022, section 5.1).
const CPU_OFF: u32 = 0x8400_0002;

/// MPIDR_EL1's affinity fields: Aff3 in bits 39:32, Aff2 to Aff0 in bits 23:0.
const AFFINITY: u64 = 0xff_00ff_ffff;

impl KvmArch for Aarch64 {
    type Chip = gic::Chip;
    type VcpuState = state::VcpuState;
    type ChipState = state::ChipState;
    type Time = state::Time;

    const OTHER_CALLS: OtherCalls = OtherCalls {
        native: Native {
            architecture: 0xc000_00b7, // AUDIT_ARCH_AARCH64
            calls: &[],
            files: &[],
        },
        vcpu: &[
            ("KVM_GET_MP_STATE", 0xae98),
            ("KVM_SET_MP_STATE", 0xae99),
            ("KVM_SET_VCPU_EVENTS", 0xaea0),
            ("KVM_GET_ONE_REG", 0xaeab),
        ],
        debug: &[("KVM_SET_GUEST_DEBUG", 0xae9b), ("KVM_SET_ONE_REG", 0xaeac)],
        machine: &[
            ("KVM_SET_ONE_REG", 0xaeac),
            ("KVM_ARM_VCPU_INIT", 0xaeae),
            ("KVM_ARM_PREFERRED_TARGET", 0xaeaf),
            ("KVM_ARM_VCPU_FINALIZE", 0xaec2),
        ],
        save: &[
            ("KVM_GET_VCPU_EVENTS", 0xae9f),
            ("KVM_SET_ONE_REG", 0xaeac),
            ("KVM_GET_REG_LIST", 0xaeb0),
        ],
        restore: &[("KVM_GET_DEVICE_ATTR", 0xaee2)],
        // MSRs; aliases and shadow pages; PCs' interrupt chips and timers; devices that were assigned
        // before VFIO; Xen and PCs' clock; then those of vCPUs that PCs and POWER have.
        unknown: &[
            (0xae02, 0xae02),
            (0xae43, 0xae45),
            (0xae62, 0xae66),
            (0xae69, 0xae69),
            (0xae70, 0xae75),
            (0xae77, 0xae78),
            (0xae9a, 0xae9a),
            (0xae9c, 0xae9e),
            (0xaea1, 0xaea2),
            (0xaead, 0xaead),
        ],
        known: &[],
    };

    unsafe fn call_argument(context: *const c_void, index: usize) -> u64 {
        // SAFETY: the caller's promise: it is a ucontext_t, which need not be aligned as Rust has it.
        let registers =
            unsafe { &raw const (*context.cast::<libc::ucontext_t>()).uc_mcontext.regs };
        // SAFETY: as above; there are 31, and at most 6 arguments.
        unsafe { registers.cast::<u64>().add(index.min(5)).read_unaligned() }
    }

    fn before_confinement(plan: &Plan<Self>) {
        if plan.features.pmu.is_some() {
            wake_perf();
        }
    }

    fn depth(request: &Request<Self>) -> Depth {
        let kernel_page = request.kernel.as_ref().and_then(|image| image.page_size);
        let other_page = kernel_page.is_some_and(|page| page != host_page());
        match other_page || request.gic == GicChoice::V2 {
            true => Depth::Full,
            false => Depth::Quick,
        }
    }

    fn probe(kvm: &Kvm, depth: Depth) -> Result<Host> {
        let mut host = quick_facts(kvm);
        if depth == Depth::Full {
            let (vm, vcpu) = scratch_vm(kvm, &host)?;
            host.gic_v2 = offers(&vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2);
            host.gic_v3 = offers(&vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3);
            host.guest_pages = guest_pages(read_register(&vcpu, ID_AA64MMFR0_EL1)?);
        }
        Ok(host)
    }

    fn facts(kvm: &Kvm) -> Result<Virtualization> {
        let mut host = quick_facts(kvm);
        let (vm, vcpu) = scratch_vm(kvm, &host)?;
        host.gic_v2 = offers(&vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2);
        host.gic_v3 = offers(&vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3);
        let mmfr0 = read_register(&vcpu, ID_AA64MMFR0_EL1)?;
        host.guest_pages = guest_pages(mmfr0);
        // KVM_CAP_ARM_SUPPORTED_REG_MASK_RANGES: bit 0 means the feature ID registers.
        let masks = kvm.check_extension_raw(230);
        Ok(Virtualization::Arm(ArmFacts {
            its: offers(&vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS),
            pa_range: pa_range_bits(mmfr0 & 0xf),
            mte: kvm.check_extension_raw(205) > 0,
            nested: kvm.check_extension_raw(240) > 0,
            writable_id_registers: masks & 1 != 0,
            pa_range_writable: lower_pa_range(&vcpu, mmfr0, 32),
            offers: Offers::ask(|cap| vm.check_extension_raw(cap.into())),
            host,
        }))
    }

    fn create_vm(kvm: &Kvm, width: &Width) -> Result<VmFd> {
        // A KVM without the capability accepts only 0, which means 40 bits.
        let kind = if width.fixed {
            0
        } else {
            u64::from(width.bits)
        };
        uninterrupted(|| kvm.create_vm_with_type(kind))
            .with_context(|| format!("cannot create a VM with {} IPA bits", width.bits))
    }

    fn populate(
        _: &Kvm,
        vm: &VmFd,
        plan: &Plan<Self>,
        saved: &[state::VcpuState],
    ) -> Result<(Vec<VcpuFd>, gic::Chip)> {
        enable_syndrome_exits(vm);
        forward_cpu_off(vm);
        if !saved.is_empty() {
            state::prepare(vm);
        }
        let chip = gic::create(vm, &plan.layout.irqchip)?;
        let vcpus = create_vcpus(vm, plan, saved)?;
        if let Some(first) = vcpus.first() {
            let mmfr0 = read_register(first, ID_AA64MMFR0_EL1)?;
            if !lower_pa_range(first, mmfr0, plan.width.bits) {
                log::info!("the guest sees the host's physical address range: KVM keeps it");
            }
        }
        gic::init(&chip, &plan.layout.irqchip)?;
        let its = gic::create_its(vm, plan.layout.pci.as_ref().map(|pci| pci.msi))?;
        let chip = gic::Chip { gic: chip, its };
        if let Some(pmu) = &plan.features.pmu {
            init_counters(&vcpus, pmu)?;
        }
        for (vcpu, planned) in vcpus.iter().zip(&plan.vcpus) {
            if let Some(address) = &planned.stolen_time {
                tell_stolen_time(vcpu, address)?;
            }
            if let Some(boot) = planned.boot {
                write_register(vcpu, PC, boot.pc)?;
                write_register(vcpu, X0, boot.x0)?;
            }
        }
        Ok((vcpus, chip))
    }

    fn pins(plan: &Plan<Self>) -> Pins {
        // The first SPI's INTID is the number of INTIDs that are not SPIs.
        let others = Spi(0).intid();
        Pins::Spis(plan.layout.irqchip.interrupts().saturating_sub(others))
    }

    fn irq_number(spi: Spi) -> u32 {
        // Type 1 is an SPI, in bits 27:24 (api.rst, KVM_IRQ_LINE).
        1 << 24 | spi.intid()
    }

    fn gsi(spi: Spi) -> u32 {
        // By default KVM routes GSI n to SPI n (arch/arm64/kvm/vgic/vgic-irqfd.c:
        // kvm_vgic_setup_default_irq_routing).
        spi.0
    }

    fn answer_raw(vcpu: &mut VcpuFd, reason: u32) -> Result<RawExit> {
        if reason != KVM_EXIT_ARM_NISV {
            bail!("KVM stopped it with an unknown exit reason ({reason})");
        }
        // SAFETY: the exit reason says that this member of the union is the valid one.
        let address = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.arm_nisv.fault_ipa };
        let mut events = kvm_vcpu_events::default();
        events.exception.ext_dabt_pending = 1;
        vcpu.set_vcpu_events(&events)
            .context("cannot inject an abort into the guest")?;
        Ok(RawExit::Aborted { address })
    }

    fn answer_hypercall(vcpu: &VcpuFd, function: u64) -> Result<Hypercall> {
        ensure!(
            function == u64::from(CPU_OFF),
            "KVM forwarded an unknown hypercall ({function:#x})"
        );
        // As KVM itself does (arch/arm64/kvm/psci.c: kvm_psci_vcpu_off): other vCPUs' CPU_ON and
        // AFFINITY_INFO see it off from here on.
        vcpu.set_mp_state(kvm_mp_state {
            mp_state: KVM_MP_STATE_STOPPED,
        })
        .context("cannot turn it off")?;
        Ok(Hypercall::WentOff)
    }

    fn is_off(vcpu: &VcpuFd) -> bool {
        vcpu.get_mp_state()
            .is_ok_and(|state| state.mp_state == KVM_MP_STATE_STOPPED)
    }

    fn time(_: &VmFd, first: &VcpuFd) -> Result<state::Time> {
        state::Time::read(first)
    }

    fn set_time(
        _: &VmFd,
        vcpu: &VcpuFd,
        (index, _): (usize, usize),
        _: &state::Time,
        to: &state::Time,
    ) -> Result<()> {
        match index {
            // The counters are those of the whole VM.
            0 => to.set(vcpu),
            _ => Ok(()),
        }
    }

    fn stop_time(to: &state::Time, vcpus: &mut [state::VcpuState], _: &mut state::ChipState) {
        to.put(vcpus);
    }

    fn save_vcpu(vcpu: &VcpuFd, _: &gic::Chip) -> Result<state::VcpuState> {
        state::save_vcpu(vcpu)
    }

    fn save_chip(
        _: &VmFd,
        chip: &gic::Chip,
        vcpus: &[state::VcpuState],
    ) -> Result<state::ChipState> {
        state::save_chip(chip, vcpus)
    }

    fn restore(
        _: &VmFd,
        chip: &gic::Chip,
        vcpus: &[VcpuFd],
        states: (&[state::VcpuState], &state::ChipState),
    ) -> Result<()> {
        state::restore(chip, vcpus, states)
    }

    fn position(vcpu: &VcpuFd) -> String {
        match read_register(vcpu, PC) {
            Ok(pc) => format!("PC {pc:#x}"),
            Err(_) => "PC unknown".to_owned(),
        }
    }
}

/// Cleans the cache line of `address` to the point of coherency, where reads of device memory find
/// it. Linux allows this in user space (arch/arm64/kernel/cpufeature.c: SCTLR_EL1.UCI is set).
///
/// # Safety
/// `address` must be mapped.
pub(super) unsafe fn clean_to_memory(address: *const u8) {
    // SAFETY: the instruction changes no data, and the caller promises a mapping.
    unsafe {
        std::arch::asm!("dc cvac, {0}", "dsb sy", in(reg) address, options(nostack, preserves_flags));
    }
}

fn host_page() -> u64 {
    page_size() as u64
}

/// Returns what can be told from capabilities alone. A host with GICv3 reports more than 8 vCPUs;
/// finding out whether it also emulates GICv2 takes a VM.
fn quick_facts(kvm: &Kvm) -> Host {
    let limit = kvm.get_host_ipa_limit();
    let max_vcpus = kvm.get_max_vcpus() as u32;
    let vgic = kvm.check_extension(Cap::Irqchip);
    Host {
        ipa_limit: u8::try_from(limit).ok().filter(|limit| *limit > 0),
        page_size: host_page(),
        gic_v2: vgic && max_vcpus <= GIC_V2_VCPUS,
        gic_v3: vgic && max_vcpus > GIC_V2_VCPUS,
        max_vcpus,
        // KVM itself uses the host's page size at stage 2, so every guest can use it too.
        guest_pages: vec![host_page()],
        offered: Offered {
            pmu: kvm.check_extension(Cap::ArmPmuV3),
            sve: kvm.check_extension(Cap::ArmSve),
            pauth: kvm.check_extension(Cap::ArmPtrAuthAddress)
                && kvm.check_extension(Cap::ArmPtrAuthGeneric),
            // KVM_CAP_STEAL_TIME, which kvm-ioctls has no name for.
            steal_time: kvm.check_extension_raw(187) > 0,
        },
    }
}

/// Creates a VM with one vCPU for probing.
fn scratch_vm(kvm: &Kvm, host: &Host) -> Result<(VmFd, VcpuFd)> {
    // KVM allocates and walks stage-2 tables for the whole width: with 16 KiB pages 40 bits take 2
    // million instructions.
    let bits = host.ipa_limit.map_or(0, |_| MIN_BITS);
    let vm =
        uninterrupted(|| kvm.create_vm_with_type(u64::from(bits))).context("cannot create a VM")?;
    let vcpu = vm.create_vcpu(0).context("cannot create a vCPU")?;
    let init = preferred_target(&vm)?;
    vcpu.vcpu_init(&init).context("cannot initialise a vCPU")?;
    Ok((vm, vcpu))
}

fn offers(vm: &VmFd, kind: kvm_device_type) -> bool {
    let asked = vm.create_device(&mut kvm_create_device {
        type_: kind,
        fd: 0,
        flags: KVM_CREATE_DEVICE_TEST,
    });
    // A test creates no device: kvm-ioctls takes the 0 that was passed in, our standard input, for
    // a descriptor that it would close.
    asked.map(std::mem::forget).is_ok()
}

/// Returns the page sizes that guests may use, from ID_AA64MMFR0_EL1: TGRAN4 in bits 31:28 and
/// TGRAN64 in bits 27:24 count from 0, 0xf is none; TGRAN16 in bits 23:20 counts from 1
/// (arch/arm64/tools/sysreg).
fn guest_pages(mmfr0: u64) -> Vec<u64> {
    let field = |shift: u32| mmfr0 >> shift & 0xf;
    let mut pages = Vec::new();
    if field(28) != 0xf {
        pages.push(0x1000);
    }
    if field(20) != 0 {
        pages.push(0x4000);
    }
    if field(24) != 0xf {
        pages.push(0x1_0000);
    }
    pages
}

/// Lowers what the guest sees of address bits to what it needs ([`narrowed`]), at least PARange; returns false
/// where KVM does not allow that (before Linux 6.7: arch/arm64/kvm/sys_regs.c, set_id_reg).
fn lower_pa_range(vcpu: &VcpuFd, mmfr0: u64, bits: u8) -> bool {
    let set = |value: u64| {
        let written = vcpu.set_one_reg(ID_AA64MMFR0_EL1, &value.to_le_bytes());
        written.is_ok()
    };
    let narrow = narrowed(mmfr0, bits);
    let range_alone = mmfr0 & !0xf | narrow & 0xf;
    narrow == mmfr0 || set(narrow) || range_alone == mmfr0 || set(range_alone)
}

/// Has KVM report accesses to device memory by instructions without a syndrome (LDP, writeback,
/// SIMD) as exits. On older kernels, which lack this, KVM_RUN fails with ENOSYS.
fn enable_syndrome_exits(vm: &VmFd) {
    let cap = kvm_enable_cap {
        cap: KVM_CAP_ARM_NISV_TO_USER,
        ..Default::default()
    };
    if let Err(error) = vm.enable_cap(&cap) {
        log::info!("KVM does not report accesses without a syndrome ({error})");
    }
}

/// Has KVM forward PSCI's CPU_OFF, and only that, to detect when the last vCPU goes off
/// (Documentation/virt/kvm/devices/vm.rst, section 6.1). Before Linux 6.4 KVM cannot, and a vCPU
/// goes off unnoticed.
fn forward_cpu_off(vm: &VmFd) {
    let filter = kvm_smccc_filter {
        base: CPU_OFF,
        nr_functions: 1,
        action: kvm_smccc_filter_action_KVM_SMCCC_FILTER_FWD_TO_USER as u8,
        ..Default::default()
    };
    let attribute = kvm_device_attr {
        flags: 0,
        group: KVM_ARM_VM_SMCCC_CTRL,
        attr: u64::from(KVM_ARM_VM_SMCCC_FILTER),
        addr: std::ptr::from_ref(&filter) as u64,
    };
    if let Err(error) = vm.set_device_attr(&attribute) {
        log::info!("KVM does not report that a vCPU goes off ({error})");
    }
}

fn preferred_target(vm: &VmFd) -> Result<kvm_vcpu_init> {
    let mut init = kvm_vcpu_init::default();
    vm.get_preferred_target(&mut init)
        .context("cannot query KVM's preferred vCPU target")?;
    init.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
    Ok(init)
}

/// Creates all vCPUs before the first one is initialised (api.rst, KVM_ARM_VCPU_INIT), and checks
/// that their affinities are those in the device tree.
fn create_vcpus(
    vm: &VmFd,
    plan: &Plan<Aarch64>,
    saved: &[state::VcpuState],
) -> Result<Vec<VcpuFd>> {
    let vcpus = (0..plan.vcpus.len() as u64)
        .map(|id| {
            vm.create_vcpu(id)
                .with_context(|| format!("cannot create vCPU {id} of {}", plan.vcpus.len()))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut target = preferred_target(vm)?;
    let features = &plan.features;
    target.features[0] |= feature_bits(features);
    for (index, (vcpu, planned)) in vcpus.iter().zip(&plan.vcpus).enumerate() {
        let mut init = target;
        if planned.boot.is_none() {
            init.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
        }
        vcpu.vcpu_init(&init)
            .with_context(|| format!("cannot initialise vCPU {index}"))?;
        if features.sve {
            if let Some(saved) = saved.get(index) {
                state::set_vector_lengths(vcpu, &saved.registers)?;
            }
            vcpu.vcpu_finalize(&(KVM_ARM_VCPU_SVE as i32))
                .with_context(|| format!("cannot enable SVE on vCPU {index}"))?;
        }
        let mpidr = read_register(vcpu, MPIDR_EL1)? & AFFINITY;
        ensure!(
            mpidr == planned.mpidr,
            "KVM gave vCPU {index} the affinity {mpidr:#x}, the device tree says {:#x}; please report this kernel",
            planned.mpidr
        );
    }
    Ok(vcpus)
}

fn feature_bits(features: &Features) -> u32 {
    let bit = |has: bool, number: u32| u32::from(has) << number;
    bit(features.pmu.is_some(), KVM_ARM_VCPU_PMU_V3)
        | bit(features.sve, KVM_ARM_VCPU_SVE)
        | bit(features.pauth, KVM_ARM_VCPU_PTRAUTH_ADDRESS)
        | bit(features.pauth, KVM_ARM_VCPU_PTRAUTH_GENERIC)
}

/// Initialises each vCPU's PMU, once there is a GIC for its interrupt.
fn init_counters(vcpus: &[VcpuFd], pmu: &Pmu) -> Result<()> {
    let attribute = |attr: u32, addr: u64| kvm_device_attr {
        flags: 0,
        group: KVM_ARM_VCPU_PMU_V3_CTRL,
        attr: u64::from(attr),
        addr,
    };
    if let (Some(number), Some(first)) = (pmu.perf_type, vcpus.first()) {
        // The PMU is chosen for the whole VM, through any vCPU (arch/arm64/kvm/pmu-emul.c:
        // kvm_arm_pmu_v3_set_pmu).
        let address = std::ptr::from_ref(&number) as u64;
        first
            .set_device_attr(&attribute(KVM_ARM_VCPU_PMU_V3_SET_PMU, address))
            .with_context(|| {
                format!("cannot take the performance counters of perf type {number}; --pmu off does without")
            })?;
    }
    for (index, vcpu) in vcpus.iter().enumerate() {
        let interrupt = std::ptr::from_ref(&pmu.intid) as u64;
        vcpu.set_device_attr(&attribute(KVM_ARM_VCPU_PMU_V3_IRQ, interrupt))
            .and_then(|()| vcpu.set_device_attr(&attribute(KVM_ARM_VCPU_PMU_V3_INIT, 0)))
            .with_context(|| {
                format!("cannot give vCPU {index} performance counters; --pmu off does without")
            })?;
    }
    Ok(())
}

/// Enables the host's perf while the kernel is being loaded. KVM backs guests' counters with perf
/// events, and the first event on a host waits until all CPUs have passed through the scheduler, 10
/// ms and more (kernel/events/core.c: account_event), during which a vCPU would stall. A dummy
/// event takes that wait on another thread, and stays open so that it does not recur. Where users
/// may not use perf (`kernel.perf_event_paranoid`) the guest waits.
fn wake_perf() {
    /// `PERF_TYPE_SOFTWARE`, `PERF_ATTR_SIZE_VER0` in the upper half (include/uapi/linux/perf_event.h).
    const TYPE_AND_SIZE: u64 = 1 | 64 << 32;
    /// `PERF_COUNT_SW_DUMMY`.
    const DUMMY: u64 = 9;
    /// `disabled`, `exclude_kernel` and `exclude_hv`.
    const FLAGS: u64 = 1 | 1 << 5 | 1 << 6;
    /// `PERF_FLAG_FD_CLOEXEC`.
    const CLOEXEC: u64 = 8;
    /// Enough for a thread that makes one system call.
    const STACK_BYTES: usize = 16 << 10;
    static AWAKE: Once = Once::new();
    AWAKE.call_once(|| {
        let wait = || {
            let attributes = [TYPE_AND_SIZE, DUMMY, 0, 0, 0, FLAGS, 0, 0];
            // SAFETY: the kernel reads 64 bytes of attributes, which exist, and creates a
            // descriptor that nothing else owns.
            unsafe {
                libc::syscall(libc::SYS_perf_event_open, &attributes, 0, -1, -1, CLOEXEC);
            }
        };
        let _ = std::thread::Builder::new()
            .name("perf".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(wait);
    });
}

/// Has KVM report the vCPU's stolen time to the guest at this address in RAM.
fn tell_stolen_time(vcpu: &VcpuFd, address: &u64) -> Result<()> {
    let attribute = kvm_device_attr {
        flags: 0,
        group: KVM_ARM_VCPU_PVTIME_CTRL,
        attr: u64::from(KVM_ARM_VCPU_PVTIME_IPA),
        addr: std::ptr::from_ref(address) as u64,
    };
    vcpu.set_device_attr(&attribute).with_context(|| {
        format!("cannot report stolen time at {address:#x}; --pv steal-time=off does without")
    })
}
