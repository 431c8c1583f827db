//! The state of a guest's vCPUs and of what KVM emulates beside them, as plain data
//! (Documentation/virt/kvm/api.rst, section 4).
//!
//! KVM's order matters. KVM_GET_MP_STATE comes first, because it takes in what waits for the local APIC;
//! KVM_GET_VCPU_EVENTS last, because other requests may deliver what is pending. CPUID is set before what
//! is checked against it, system registers before the local APIC, whose form depends on IA32_APIC_BASE,
//! and that before IA32_TSC_DEADLINE, which is ignored in another mode of its timer. KVM_SET_REGS drops pending
//! exceptions, so events come after it.
//!
//! The guest's time stands still from when it was saved until it is restored: TSC, kvmclock and the local
//! APIC's timers go on from where they were, and CLOCK_MONOTONIC with them. KVM_CLOCK_REALTIME, which would
//! add the time between, is not used: the wall clock is told anew by other ways.

mod calls;
mod features;
mod msrs;
mod raw;

use anyhow::{Context, Result, ensure};
use features::Leaf;
use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, Xsave, kvm_clock_data, kvm_irqchip, kvm_nested_state, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, KvmNestedStateBuffer, VcpuFd, VmFd};
use msrs::{Msr, TSC, TSC_DEADLINE};
use raw::{Raw, check};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};

/// A vCPU's frequency may differ from the host's by so many millionths before KVM scales its TSC
/// (arch/x86/kvm/x86.c: tsc_tolerance_ppm).
const TOLERANCE: u64 = 250;

/// The interrupt controllers that KVM emulates where it emulates all.
const CONTROLLERS: [(u32, &str); 3] = [
    (KVM_IRQCHIP_PIC_MASTER, "first PIC"),
    (KVM_IRQCHIP_PIC_SLAVE, "second PIC"),
    (KVM_IRQCHIP_IOAPIC, "I/O APIC"),
];

/// What saving a machine takes beside its descriptors.
pub struct Chip {
    /// `/dev/kvm`, to ask what this host saves: only if that is wanted, and on whatever thread.
    kvm: Kvm,
    /// Whether KVM emulates PICs and I/O APIC.
    has_controllers: bool,
}

impl Chip {
    /// That of a machine.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub(super) fn new(kvm: &Kvm, has_controllers: bool) -> Result<Chip> {
        // SAFETY: the descriptor is that of `kvm`, which is borrowed for as long.
        let own = unsafe { BorrowedFd::borrow_raw(kvm.as_raw_fd()) };
        let own = own
            .try_clone_to_owned()
            .context("cannot duplicate the descriptor of /dev/kvm")?;
        // SAFETY: it is one of /dev/kvm, and nothing else owns it.
        let kvm = unsafe { Kvm::from_raw_fd(own.into_raw_fd()) };
        Ok(Chip {
            kvm,
            has_controllers,
        })
    }
}

/// The state of a vCPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// What the guest was told of its CPU.
    cpuid: Vec<Leaf>,
    /// The frequency of its TSC in kHz.
    tsc_khz: u32,
    /// Its TSC, read at some time, and what is the host's part in it at any: the other part.
    tsc: u64,
    tsc_offset: u64,
    /// IA32_TSC_DEADLINE, in ticks of its TSC; 0 for none.
    deadline: u64,
    mp_state: Raw,
    registers: Raw,
    system: Raw,
    xcrs: Raw,
    xsave: Raw,
    debug: Raw,
    lapic: Raw,
    msrs: Vec<Msr>,
    events: Raw,
    /// That of a hypervisor in the guest, where KVM lets there be one.
    nested: Option<Raw>,
}

/// The state of what KVM emulates beside vCPUs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChipState {
    /// kvmclock, in nanoseconds.
    clock: u64,
    /// PICs and I/O APIC, where KVM emulates them.
    controllers: Vec<Raw>,
}

/// Where the clocks of a guest stand.
#[derive(Clone, Copy, Debug)]
pub struct Time {
    /// The part of the host in each TSC.
    ticks: u64,
    /// kvmclock, in nanoseconds.
    clock: u64,
}

impl Time {
    pub(super) fn read(vm: &VmFd, first: &VcpuFd) -> Result<Time> {
        let ticks = ticks(first)?;
        let clock = vm.get_clock().context("cannot read kvmclock")?.clock;
        Ok(Time { ticks, clock })
    }

    /// Puts it in states that were read later.
    pub(super) fn put(&self, vcpus: &mut [VcpuState], chip: &mut ChipState) {
        for state in vcpus {
            state.tsc = state.tsc_offset.wrapping_add(self.ticks);
        }
        chip.clock = self.clock;
    }
}

/// Returns the part of the host in a TSC.
fn ticks(vcpu: &VcpuFd) -> Result<u64> {
    let offset = calls::tsc_offset(vcpu).context("cannot read the offset of a TSC")?;
    Ok(msrs::read_one(vcpu, TSC)?.wrapping_sub(offset))
}

/// Sets a vCPU's TSC back, and what waits for it.
pub(super) fn set_tsc(vcpu: &VcpuFd, from: &Time, to: &Time) -> Result<()> {
    let deadline = msrs::read_one(vcpu, TSC_DEADLINE)?;
    let offset = calls::tsc_offset(vcpu).context("cannot read the offset of a TSC")?;
    let offset = offset.wrapping_add(to.ticks).wrapping_sub(from.ticks);
    calls::set_tsc_offset(vcpu, offset).context("cannot set the offset of a TSC")?;
    match deadline {
        0 => Ok(()),
        _ => msrs::write(vcpu, &[(TSC_DEADLINE, deadline)]),
    }
}

/// Sets kvmclock.
pub(super) fn set_clock(vm: &VmFd, to: &Time) -> Result<()> {
    let clock = kvm_clock_data {
        clock: to.clock,
        ..Default::default()
    };
    vm.set_clock(&clock).context("cannot set kvmclock")
}

/// See [`super::super::KvmArch::save_vcpu`].
pub(super) fn save_vcpu(vcpu: &VcpuFd, chip: &Chip) -> Result<VcpuState> {
    let mp_state = vcpu.get_mp_state().context("cannot read its mode")?;
    let registers = vcpu.get_regs().context("cannot read its registers")?;
    let system = calls::system_registers(vcpu).context("cannot read its system registers")?;
    let xcrs = vcpu.get_xcrs().context("cannot read its XCR0")?;
    let xsave = read_xsave(vcpu, xsave_bytes(&chip.kvm)?)?;
    let debug = vcpu
        .get_debug_regs()
        .context("cannot read its debug registers")?;
    let lapic = vcpu.get_lapic().context("cannot read its local APIC")?;
    let msrs = msrs::read(vcpu, &msrs::saved(&chip.kvm)?)?;
    let nested = read_nested(vcpu, &chip.kvm)?;
    let tsc_khz = frequency(vcpu)?;
    let tsc_offset = calls::tsc_offset(vcpu).context("cannot read the offset of its TSC")?;
    let tsc = msrs::read_one(vcpu, TSC)?;
    let deadline = msrs::read_one(vcpu, TSC_DEADLINE)?;
    let events = vcpu
        .get_vcpu_events()
        .context("cannot read its pending events")?;
    Ok(VcpuState {
        cpuid: read_cpuid(vcpu)?,
        tsc_khz,
        tsc,
        tsc_offset,
        deadline,
        mp_state: Raw::of(&mp_state),
        registers: Raw::of(&registers),
        system: Raw::of(&system),
        xcrs: Raw::of(&xcrs),
        xsave,
        debug: Raw::of(&debug),
        lapic: Raw::of(&lapic),
        msrs,
        events: Raw::of(&events),
        nested,
    })
}

/// See [`super::super::KvmArch::save_chip`].
pub(super) fn save_chip(vm: &VmFd, chip: &Chip) -> Result<ChipState> {
    let clock = vm.get_clock().context("cannot read kvmclock")?.clock;
    let read = |(chip_id, what): (u32, &str)| {
        let mut controller = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut controller)
            .with_context(|| format!("cannot read the {what}"))?;
        Ok(Raw::of(&controller))
    };
    let controllers = match chip.has_controllers {
        true => CONTROLLERS.into_iter().map(read).collect::<Result<_>>()?,
        false => Vec::new(),
    };
    Ok(ChipState { clock, controllers })
}

/// See [`super::super::KvmArch::restore`].
pub(super) fn restore(
    vm: &VmFd,
    chip: &Chip,
    vcpus: &[VcpuFd],
    (states, state): (&[VcpuState], &ChipState),
) -> Result<()> {
    let (count, ours) = (states.len(), vcpus.len());
    check(count == ours, || {
        format!("it has the states of {count} vCPUs, and the machine has {ours}")
    })?;
    let wanted = match chip.has_controllers {
        true => CONTROLLERS.len(),
        false => 0,
    };
    let saved = state.controllers.len();
    check(saved == wanted, || {
        format!(
            "it has the states of {saved} interrupt controllers of KVM, and the machine has {wanted}"
        )
    })?;
    let host = Host {
        msrs: msrs::saved(&chip.kvm)?,
        xsave_bytes: xsave_bytes(&chip.kvm)?,
        has_nested: has_nested(&chip.kvm),
        scales_tsc: chip.kvm.check_extension(Cap::TscControl),
    };
    let all = || vcpus.iter().zip(states).enumerate();
    for (index, (vcpu, state)) in all() {
        restore_vcpu(vcpu, state, &host).with_context(|| format!("cannot restore vCPU {index}"))?;
    }
    // Into local APICs that are restored.
    for (raw, (chip_id, what)) in state.controllers.iter().zip(CONTROLLERS) {
        let mut controller: kvm_irqchip = raw.read(what)?;
        (controller.chip_id, controller.pad) = (chip_id, 0);
        vm.set_irqchip(&controller)
            .with_context(|| format!("KVM refuses the state of the {what}"))?;
    }
    restore_clocks(vm, vcpus, states, state.clock)
}

/// What this host saves and restores.
struct Host {
    msrs: Vec<u32>,
    xsave_bytes: usize,
    has_nested: bool,
    scales_tsc: bool,
}

/// Restores a vCPU but for its clocks.
fn restore_vcpu(vcpu: &VcpuFd, state: &VcpuState, host: &Host) -> Result<()> {
    restore_cpuid(vcpu, &state.cpuid)?;
    restore_frequency(vcpu, state.tsc_khz, host.scales_tsc)?;
    calls::set_system_registers(vcpu, &state.system.read("system registers")?)
        .context("KVM refuses its system registers")?;
    let now = msrs::read(vcpu, &host.msrs)?;
    let changes = msrs::changes(&state.msrs, &now, &host.msrs)?;
    msrs::write(vcpu, &changes.before)?;
    restore_nested(vcpu, state.nested.as_ref(), host.has_nested)?;
    vcpu.set_regs(&state.registers.read("registers")?)
        .context("KVM refuses its registers")?;
    vcpu.set_xcrs(&state.xcrs.read("XCR0")?)
        .context("KVM refuses its XCR0")?;
    restore_xsave(vcpu, &state.xsave, host.xsave_bytes)?;
    vcpu.set_debug_regs(&state.debug.read("debug registers")?)
        .context("KVM refuses its debug registers")?;
    vcpu.set_lapic(&state.lapic.read("local APIC")?)
        .context("KVM refuses the state of its local APIC")?;
    msrs::write(vcpu, &changes.after)?;
    vcpu.set_vcpu_events(&state.events.read("pending events")?)
        .context("KVM refuses its pending events")?;
    vcpu.set_mp_state(state.mp_state.read("mode")?)
        .context("KVM refuses its mode")
}

/// Has the guest's clocks go on from where they stood.
fn restore_clocks(vm: &VmFd, vcpus: &[VcpuFd], states: &[VcpuState], clock: u64) -> Result<()> {
    let (Some(first), Some(_)) = (vcpus.first(), states.first()) else {
        return Ok(());
    };
    // vCPUs were read one after another. The last reading counts, so that no TSC steps back.
    let read = states
        .iter()
        .map(|state| state.tsc.wrapping_sub(state.tsc_offset));
    let then = read.max().unwrap_or_default();
    let now = ticks(first)?;
    for (vcpu, state) in vcpus.iter().zip(states) {
        let offset = state.tsc_offset.wrapping_add(then).wrapping_sub(now);
        calls::set_tsc_offset(vcpu, offset).context("cannot set the offset of a TSC")?;
    }
    set_clock(vm, &Time { ticks: then, clock })?;
    for (vcpu, state) in vcpus.iter().zip(states) {
        if state.deadline != 0 {
            msrs::write(vcpu, &[(TSC_DEADLINE, state.deadline)])?;
        }
    }
    Ok(())
}

fn read_cpuid(vcpu: &VcpuFd) -> Result<Vec<Leaf>> {
    let cpuid = vcpu
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .context("cannot read its CPUID")?;
    Ok(cpuid.as_slice().iter().map(features::leaf).collect())
}

/// Has the guest find the CPU that it was told of, on this host.
fn restore_cpuid(vcpu: &VcpuFd, wanted: &[Leaf]) -> Result<()> {
    let host = read_cpuid(vcpu)?;
    if features::are_same(wanted, &host) {
        return Ok(());
    }
    let (leaves, most) = (wanted.len(), KVM_MAX_CPUID_ENTRIES);
    check(leaves <= most, || {
        format!("its CPUID has {leaves} leaves, more than {most}")
    })?;
    features::check(wanted, &host)?;
    let leaves: Vec<_> = wanted.iter().map(features::entry).collect();
    let cpuid = CpuId::from_entries(&leaves).context("its CPUID has too many leaves")?;
    vcpu.set_cpuid2(&cpuid).context("KVM refuses its CPUID")
}

fn frequency(vcpu: &VcpuFd) -> Result<u32> {
    vcpu.get_tsc_khz()
        .context("cannot read the frequency of its TSC")
}

fn restore_frequency(vcpu: &VcpuFd, wanted: u32, scales: bool) -> Result<()> {
    let own = frequency(vcpu)?;
    if wanted == own {
        return Ok(());
    }
    let difference = u64::from(own.abs_diff(wanted)) * 1_000_000;
    ensure!(
        scales || difference <= TOLERANCE * u64::from(own),
        "its TSC runs at {wanted} kHz, this host's at {own} kHz, and this host's CPU does not scale it"
    );
    vcpu.set_tsc_khz(wanted)
        .with_context(|| format!("KVM refuses a TSC of {wanted} kHz, where the host's has {own}"))
}

/// Returns the size of the area that KVM saves by XSAVE.
fn xsave_bytes(kvm: &Kvm) -> Result<usize> {
    let bytes = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    ensure!(
        bytes >= size_of::<kvm_xsave>(),
        "KVM on this host cannot save a guest's vector registers (KVM_CAP_XSAVE2, Linux 5.17)"
    );
    Ok(bytes)
}

/// Returns an area of so many bytes.
fn xsave_area(bytes: usize) -> Result<Xsave> {
    let extra = (bytes - size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
    Xsave::new(extra).context("no memory for its vector registers")
}

fn read_xsave(vcpu: &VcpuFd, bytes: usize) -> Result<Raw> {
    let mut area = xsave_area(bytes)?;
    // SAFETY: it is as large as KVM says, and nothing here has KVM allow guests more registers.
    unsafe { vcpu.get_xsave2(&mut area) }.context("cannot read its vector registers")?;
    let region = &area.as_fam_struct_ref().xsave.region;
    let words = region.iter().chain(area.as_slice());
    Ok(Raw(words.flat_map(|word| word.to_le_bytes()).collect()))
}

fn restore_xsave(vcpu: &VcpuFd, saved: &Raw, bytes: usize) -> Result<()> {
    let (least, count) = (size_of::<kvm_xsave>(), saved.0.len());
    // The CPU's features, by which this host may have less, were compared before.
    let is_valid = (least..=bytes).contains(&count) && count.is_multiple_of(size_of::<u32>());
    check(is_valid, || {
        format!(
            "the state of its vector registers has {count} bytes, and this host's has {least} to {bytes}"
        )
    })?;
    let mut area = xsave_area(bytes)?;
    let words = saved.0.chunks_exact(size_of::<u32>());
    let words: Vec<u32> = words
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        .collect();
    let (region, extra) = words.split_at(least / size_of::<u32>());
    area.as_mut_slice()[..extra.len()].copy_from_slice(extra);
    // SAFETY: the length of its end stays as it is.
    let whole = unsafe { area.as_mut_fam_struct() };
    whole.xsave.region.copy_from_slice(region);
    // SAFETY: it is as large as KVM says, and nothing here has KVM allow guests more registers.
    unsafe { vcpu.set_xsave2(&area) }.context("KVM refuses its vector registers")
}

fn has_nested(kvm: &Kvm) -> bool {
    kvm.check_extension(Cap::NestedState)
}

fn read_nested(vcpu: &VcpuFd, kvm: &Kvm) -> Result<Option<Raw>> {
    if !has_nested(kvm) {
        return Ok(None);
    }
    let mut state = KvmNestedStateBuffer::empty();
    vcpu.nested_state(&mut state)
        .context("cannot read the state of its hypervisor")?;
    let mut raw = Raw::of(&state);
    raw.0.truncate(state.size as usize);
    Ok(Some(raw))
}

fn restore_nested(vcpu: &VcpuFd, saved: Option<&Raw>, has_nested: bool) -> Result<()> {
    let (Some(saved), true) = (saved, has_nested) else {
        // Without it there is no VMX or SVM in CPUID, by which it was refused already.
        return Ok(());
    };
    let mut fresh = KvmNestedStateBuffer::empty();
    vcpu.nested_state(&mut fresh)
        .context("cannot read the state of its hypervisor")?;
    let (least, most) = (
        size_of::<kvm_nested_state>(),
        size_of::<KvmNestedStateBuffer>(),
    );
    let bytes = saved.0.len();
    check((least..=most).contains(&bytes), || {
        format!("the state of its hypervisor has {bytes} bytes, not {least} to {most}")
    })?;
    if saved.0 == Raw::of(&fresh).0[..bytes] {
        return Ok(());
    }
    let mut whole = saved.clone();
    whole.0.resize(most, 0);
    let mut state: KvmNestedStateBuffer = whole.read("hypervisor")?;
    state.size = bytes as u32;
    vcpu.set_nested_state(&state)
        .context("KVM refuses the state of its hypervisor")
}
