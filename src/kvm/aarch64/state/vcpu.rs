//! Reads and writes the registers of vCPUs.

use crate::kvm::aarch64::access::read_register;
use anyhow::{Context, Result, anyhow, bail, ensure};
use armlet_arch::aarch64::id::{SystemRegister, differing, lacking};
use armlet_arch::aarch64::registers::{
    Kind, MOST, MPIDR, Registers, VECTOR_LENGTHS, begins_with_zero, clearing, kind, name, size,
    system,
};
use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_STOPPED, KVMIO, kvm_enable_cap, kvm_mp_state,
    kvm_vcpu_events,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use std::io::Error;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ptr};

/// The state of a vCPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// All that KVM lists.
    pub registers: Registers,
    /// Whether it is off, until another one turns it on.
    pub is_off: bool,
    /// A pending SError, with its syndrome where the CPU has FEAT_RAS.
    pub serror: Option<Option<u64>>,
}

/// `_IOWR(KVMIO, 0xb0, struct kvm_reg_list)`. The type of kvm-bindings ends with 500 registers.
const KVM_GET_REG_LIST: libc::c_ulong = ioctl_expr(_IOC_READ | _IOC_WRITE, KVMIO, 0xb0, 8);
/// KVM_CAP_ARM_WRITABLE_IMP_ID_REGS, since Linux 6.15: MIDR_EL1, REVIDR_EL1 and AIDR_EL1 can be written.
const WRITABLE_IDENTITY: u32 = 239;
/// Reasons that an error lists.
const MOST_REASONS: usize = 8;

/// Prepares a VM without vCPUs for the state of other ones.
pub(in crate::kvm::aarch64) fn prepare(vm: &VmFd) {
    let cap = kvm_enable_cap {
        cap: WRITABLE_IDENTITY,
        ..Default::default()
    };
    // Without it only the same kind of CPU will do.
    let _ = vm.enable_cap(&cap);
}

/// Gives a vCPU, before it is finalised, the lengths of vectors that a guest knows.
pub(in crate::kvm::aarch64) fn set_vector_lengths(vcpu: &VcpuFd, saved: &Registers) -> Result<()> {
    let Some(wanted) = saved.get(VECTOR_LENGTHS) else {
        return Ok(());
    };
    let mut bytes = [0; 64];
    vcpu.get_one_reg(VECTOR_LENGTHS, &mut bytes)
        .context("cannot read the lengths of SVE's vectors")?;
    let has: Vec<u64> = words(&bytes).collect();
    if has == wanted {
        return Ok(());
    }
    let bytes: Vec<u8> = wanted.iter().flat_map(|word| word.to_le_bytes()).collect();
    vcpu.set_one_reg(VECTOR_LENGTHS, &bytes).map_err(|error| {
        anyhow!(
            "FEAT_SVE: the guest knows vectors of {} bits, and this host's CPU has those of {} ({error})",
            lengths(wanted),
            lengths(&has)
        )
    })?;
    Ok(())
}

/// The lengths of a set in bits, as text.
fn lengths(set: &[u64]) -> String {
    let bit = |length: &usize| {
        set.get(length / 64)
            .is_some_and(|word| word >> (length % 64) & 1 != 0)
    };
    // The architecture ends with 2048 bits.
    let all: Vec<_> = (0..16)
        .filter(bit)
        .map(|length| ((length + 1) * 128).to_string())
        .collect();
    match all.is_empty() {
        true => "no".to_owned(),
        false => all.join(", "),
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks(8).map(|part| {
        let mut word = [0; 8];
        word[..part.len()].copy_from_slice(part);
        u64::from_le_bytes(word)
    })
}

/// Returns the numbers of all registers, ascending.
pub(super) fn list(vcpu: &VcpuFd) -> Result<Vec<u64>> {
    // struct kvm_reg_list: how many, then their numbers.
    let mut list = vec![0; 1 + MOST];
    list[0] = MOST as u64;
    // SAFETY: KVM writes as many numbers as the first word says there is room for, and how many they are there.
    let result = unsafe { ioctl_with_mut_ptr(vcpu, KVM_GET_REG_LIST, list.as_mut_ptr()) };
    if result < 0 {
        return Err(Error::last_os_error()).context("KVM_GET_REG_LIST");
    }
    let count = usize::try_from(list[0]).unwrap_or(0).min(MOST);
    list.truncate(1 + count);
    list.remove(0);
    list.sort_unstable();
    Ok(list)
}

pub(super) fn save(vcpu: &VcpuFd) -> Result<VcpuState> {
    let mut registers = Registers::default();
    let mut bytes = [0; 256];
    for id in list(vcpu)? {
        let bytes = bytes
            .get_mut(..size(id))
            .with_context(|| format!("KVM has a register of unknown size ({id:#x})"))?;
        match vcpu.get_one_reg(id, bytes) {
            Ok(_) => registers.push(id, bytes),
            Err(error) => bail!("cannot read {}: {error}", name(id)),
        }
    }
    let state = vcpu.get_mp_state().context("KVM_GET_MP_STATE")?.mp_state;
    ensure!(
        matches!(state, KVM_MP_STATE_RUNNABLE | KVM_MP_STATE_STOPPED),
        "KVM has it in an unknown state ({state})"
    );
    let pending = vcpu
        .get_vcpu_events()
        .context("KVM_GET_VCPU_EVENTS")?
        .exception;
    Ok(VcpuState {
        registers,
        is_off: state == KVM_MP_STATE_STOPPED,
        serror: (pending.serror_pending != 0)
            .then(|| (pending.serror_has_esr != 0).then_some(pending.serror_esr)),
    })
}

/// Gives the VM the features that the guest knows, through its first vCPU; `listed` are that one's registers.
/// Features that it does not know are taken from it, as far as KVM lets us (since Linux 6.7).
pub(super) fn restore_features(
    vcpu: &VcpuFd,
    listed: &[u64],
    saved: &[(SystemRegister, u64)],
) -> Result<()> {
    let mut host = Vec::new();
    for &(register, value) in saved {
        let number = system(register);
        if listed.binary_search(&number).is_ok() {
            host.push((register, become_like(vcpu, number, value)?));
        }
    }
    let mut reasons = lacking(saved, &host);
    let ids = listed.iter().filter(|id| matches!(kind(**id), Kind::Id(_)));
    for id in ids {
        let is_known = |(register, _): &(SystemRegister, u64)| system(*register) == *id;
        if !saved.iter().any(is_known) {
            // One that came after the guest's kernel: it has not asked.
            let _ = vcpu.set_one_reg(*id, &[0; 8]);
        }
    }
    if reasons.is_empty() {
        return Ok(());
    }
    let more = reasons.len().saturating_sub(MOST_REASONS);
    reasons.truncate(MOST_REASONS);
    let rest = match more {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    bail!(
        "this host lacks what the guest's CPU has: {}{rest}",
        reasons.join("; ")
    );
}

/// Writes an ID register; where KVM refuses the value, each of its fields. Returns what it is then.
fn become_like(vcpu: &VcpuFd, number: u64, wanted: u64) -> Result<u64> {
    let set = |value: u64| vcpu.set_one_reg(number, &value.to_le_bytes()).is_ok();
    if set(wanted) {
        return Ok(wanted);
    }
    let mut is = read_register(vcpu, number)?;
    for shift in differing(wanted, is) {
        let field = 0xf << shift;
        let next = is & !field | wanted & field;
        if set(next) {
            is = next;
        }
    }
    Ok(is)
}

/// Gives a vCPU the state of another one, but for what all vCPUs share: counters and features.
pub(super) fn restore(vcpu: &VcpuFd, listed: &[u64], state: &VcpuState) -> Result<()> {
    let saved = &state.registers;
    // Its place in the GIC and in the device tree.
    let affinity = read_register(vcpu, MPIDR)?;
    ensure!(
        saved.word(MPIDR) == Some(affinity),
        "its MPIDR_EL1 is {affinity:#x}, and {:#x} in the snapshot",
        saved.word(MPIDR).unwrap_or(0)
    );
    for (id, value) in saved.iter() {
        let kind = kind(id);
        match kind {
            Kind::Id(_) | Kind::Counter | Kind::Clearing => continue,
            Kind::Other if begins_with_zero(id) && value.iter().all(|word| *word == 0) => continue,
            _ => {}
        }
        if listed.binary_search(&id).is_err() {
            if saved.is_dispensable(id, value) {
                continue;
            }
            bail!(
                "this host's KVM has no {}, which is {} for the guest",
                name(id),
                text(value)
            );
        }
        if let (Some(clearing), [value, ..]) = (clearing(id), value) {
            // Whether bits are cleared by it or it becomes the value: what follows sets the others.
            let clear = u64::from(!*value as u32);
            let _ = vcpu.set_one_reg(clearing, &clear.to_le_bytes());
        }
        let mut bytes = [0; 256];
        for (part, word) in bytes.chunks_mut(8).zip(value) {
            part.copy_from_slice(&word.to_le_bytes());
        }
        let bytes = bytes.get(..size(id)).unwrap_or(&[]);
        match (vcpu.set_one_reg(id, bytes), kind) {
            (Ok(_), _) | (Err(_), Kind::Caches) => {}
            (Err(error), kind) => refused(vcpu, id, kind, value, &error)?,
        }
    }
    if let Some(syndrome) = state.serror {
        let mut events = kvm_vcpu_events::default();
        events.exception.serror_pending = 1;
        events.exception.serror_has_esr = u8::from(syndrome.is_some());
        events.exception.serror_esr = syndrome.unwrap_or(0);
        vcpu.set_vcpu_events(&events)
            .context("KVM does not take the SError that is pending")?;
    }
    let mp_state = match state.is_off {
        true => KVM_MP_STATE_STOPPED,
        false => KVM_MP_STATE_RUNNABLE,
    };
    vcpu.set_mp_state(kvm_mp_state { mp_state })
        .context("KVM_SET_MP_STATE")
}

/// Accepts what KVM refuses if it is the same anyway.
fn refused(
    vcpu: &VcpuFd,
    id: u64,
    kind: Kind,
    value: &[u64],
    error: &dyn std::fmt::Display,
) -> Result<()> {
    let mut bytes = [0; 256];
    let bytes = bytes.get_mut(..size(id)).unwrap_or(&mut []);
    let is = match vcpu.get_one_reg(id, bytes) {
        Ok(_) => words(bytes).collect(),
        Err(_) => Vec::new(),
    };
    if is == value {
        return Ok(());
    }
    let (is, value, name) = (text(&is), text(value), name(id));
    match kind {
        Kind::Cpu(_) => {
            bail!("this host has another CPU: {name} is {is}, and {value} for the guest")
        }
        Kind::VectorLengths => {
            bail!("FEAT_SVE: {name} is {is} on this host, and {value} for the guest")
        }
        _ => bail!("KVM does not take {value} for {name}, which is {is} ({error})"),
    }
}

/// A value as text: 32 digits of it at most.
fn text(value: &[u64]) -> String {
    match value {
        [] => "nothing".to_owned(),
        [word] => format!("{word:#x}"),
        [low, high] => format!("{:#x}", u128::from(*high) << 64 | u128::from(*low)),
        [low, ..] => format!("{low:#x} and {} more words", value.len() - 1),
    }
}
