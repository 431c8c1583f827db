//! The state of a guest's vCPUs and of what KVM emulates beside them, as plain data.

mod gic;
mod vcpu;

use super::access::{read_register, write_register};
use super::gic::Chip;
use anyhow::{Context, Result, anyhow, bail, ensure};
use armlet_arch::aarch64::chip::{GicState, ItsState};
use armlet_arch::aarch64::registers::{MPIDR, PHYSICAL_COUNTER, VIRTUAL_COUNTER};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

/// The state of what KVM emulates beside vCPUs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChipState {
    /// CNTFRQ_EL0: the ticks per second of the guest's counters.
    pub frequency: u64,
    /// The GIC.
    pub gic: GicState,
    /// The ITS, where there is one. Its tables, and pending LPIs, are in guest memory.
    pub its: Option<ItsState>,
}

pub(in crate::kvm) use vcpu::VcpuState;

/// The virtual counter, and the physical one where KVM shows it (since Linux 6.4).
#[derive(Clone, Copy, Debug)]
pub struct Time([Option<u64>; 2]);

const COUNTERS: [u64; 2] = [VIRTUAL_COUNTER, PHYSICAL_COUNTER];

impl Time {
    pub(super) fn read(vcpu: &VcpuFd) -> Result<Time> {
        let [first, second] = COUNTERS;
        let time = read_register(vcpu, first)?;
        Ok(Time([Some(time), read_register(vcpu, second).ok()]))
    }

    /// Sets the counters of a VM.
    ///
    /// Not KVM_ARM_SET_COUNTER_OFFSET: it gives both counters one offset, and a guest that was started without
    /// has two.
    pub(super) fn set(&self, vcpu: &VcpuFd) -> Result<()> {
        for (counter, value) in COUNTERS.into_iter().zip(self.0) {
            if let Some(value) = value {
                write_register(vcpu, counter, value)?;
            }
        }
        Ok(())
    }

    /// Puts it in states that were read later.
    pub(super) fn put(&self, vcpus: &mut [VcpuState]) {
        for (counter, value) in COUNTERS.into_iter().zip(self.0) {
            for state in &mut *vcpus {
                if let (Some(word), Some(value)) = (state.registers.word_mut(counter), value) {
                    *word = value;
                }
            }
        }
    }

    /// Returns the latest that stands in these states, of those that KVM lists.
    fn of(states: &[VcpuState], listed: &[u64]) -> Time {
        Time(COUNTERS.map(|counter| {
            listed.binary_search(&counter).ok()?;
            let values = states.iter();
            values
                .filter_map(|state| state.registers.word(counter))
                .max()
        }))
    }
}
pub(super) use vcpu::{prepare, set_vector_lengths};

pub(super) fn save_vcpu(vcpu: &VcpuFd) -> Result<VcpuState> {
    vcpu::save(vcpu)
}

pub(super) fn save_chip(chip: &Chip, vcpus: &[VcpuState]) -> Result<ChipState> {
    Ok(ChipState {
        frequency: counter_frequency(),
        gic: gic::save(chip, &affinities(vcpus)?)?,
        its: chip.its.as_ref().map(gic::save_its).transpose()?,
    })
}

pub(super) fn restore(
    chip: &Chip,
    vcpus: &[VcpuFd],
    (states, saved): (&[VcpuState], &ChipState),
) -> Result<()> {
    ensure!(
        states.len() == vcpus.len(),
        "the snapshot has {} vCPUs, and the machine {}",
        states.len(),
        vcpus.len()
    );
    let frequency = counter_frequency();
    ensure!(
        saved.frequency == frequency,
        "the guest's clock counts {} Hz, and this host's {frequency} Hz",
        saved.frequency
    );
    for (index, state) in states.iter().enumerate() {
        let checked = state.registers.check();
        checked.map_err(|why| anyhow!("vCPU {index} of the snapshot: {why}"))?;
    }
    let Some((first, first_state)) = vcpus.first().zip(states.first()) else {
        return Ok(());
    };
    let listed = vcpu::list(first)?;
    let features = first_state.registers.ids();
    vcpu::restore_features(first, &listed, &features)?;
    for (index, (vcpu, state)) in vcpus.iter().zip(states).enumerate() {
        ensure!(
            state.registers.ids() == features,
            "vCPU {index} of the snapshot has other features than vCPU 0"
        );
        vcpu::restore(vcpu, &listed, state).with_context(|| format!("vCPU {index}"))?;
    }
    gic::restore(chip, &affinities(states)?, &saved.gic)?;
    // After redistributors, which say where pending LPIs are, and guest memory.
    match (&chip.its, &saved.its) {
        (Some(its), Some(saved)) => gic::restore_its(its, saved)?,
        (None, None) => {}
        _ => bail!("the snapshot has no state of the ITS, or the machine no ITS"),
    }
    // Last, so that no time passes for the guest. No vCPU may see a counter step back.
    Time::of(states, &listed).set(first)
}

fn affinities(vcpus: &[VcpuState]) -> Result<Vec<u64>> {
    let affinity = |state: &VcpuState| state.registers.word(MPIDR);
    let all = vcpus.iter().map(affinity).collect::<Option<_>>();
    all.context("a vCPU of the snapshot has no MPIDR_EL1")
}

/// CNTFRQ_EL0, which guests see as it is.
fn counter_frequency() -> u64 {
    let frequency: u64;
    // SAFETY: the register can be read in user space (arch/arm64/kernel/traps.c: cntfrq_read_handler, where
    // the hardware does not let it), and reading changes nothing.
    unsafe {
        std::arch::asm!("mrs {0}, cntfrq_el0", out(reg) frequency, options(nomem, nostack, preserves_flags));
    }
    frequency
}
