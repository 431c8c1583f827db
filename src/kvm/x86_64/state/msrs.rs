//! Model-specific registers: those that KVM lists, and MTRRs, which it keeps but does not list
//! (arch/x86/kvm/x86.c: msrs_to_save; mtrr.c).

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

/// IA32_TIME_STAMP_COUNTER and IA32_TSC_DEADLINE, which are saved with the clocks.
pub(super) const TSC: u32 = 0x10;
pub(super) const TSC_DEADLINE: u32 = 0x6e0;

/// IA32_ARCH_CAPABILITIES: what the CPU is not affected by, but for RSBA (bit 2), which says that it is.
const ARCH_CAPABILITIES: u32 = 0x10a;
const RSBA: u64 = 1 << 2;

/// MTRRs: IA32_MTRR_PHYSBASE0 to PHYSMASK7, those of fixed ranges, IA32_MTRR_DEF_TYPE.
const MTRRS: [(u32, u32); 5] = [
    (0x200, 0x20f),
    (0x250, 0x250),
    (0x258, 0x259),
    (0x268, 0x26f),
    (0x2ff, 0x2ff),
];

/// What is listed and not saved. KVM writes the wall clock to guest memory whenever its MSR is written (11,
/// 4b564d00): the guest asks whenever it wants to know, and may have other use for that memory since.
/// MSR_KVM_SYSTEM_TIME (12) is MSR_KVM_SYSTEM_TIME_NEW by its first number. Guests do not see Hyper-V.
const UNSAVED: [(u32, u32); 6] = [
    (TSC, TSC),
    (0x11, 0x12),
    (TSC_DEADLINE, TSC_DEADLINE),
    (0x4000_0000, 0x4000_01ff),
    (0x4b56_4d00, 0x4b56_4d00),
    // MSR_KVM_ASYNC_PF_ACK: reads as 0.
    (0x4b56_4d07, 0x4b56_4d07),
];

/// IA32_FEATURE_CONTROL and the capabilities of VMX, on which nested states depend.
const NESTED: [(u32, u32); 2] = [(0x3a, 0x3a), (0x480, 0x491)];

/// How many are read and written at once: KVM's interface has fewer than 256.
const AT_ONCE: usize = 128;

/// A number and a value.
pub(super) type Msr = (u32, u64);

fn is_in(index: u32, ranges: &[(u32, u32)]) -> bool {
    ranges
        .iter()
        .any(|(first, last)| (*first..=*last).contains(&index))
}

/// Returns the numbers of those that are saved on this host, in an order in which they can be written.
pub(super) fn saved(kvm: &Kvm) -> Result<Vec<u32>> {
    let listed = kvm
        .get_msr_index_list()
        .context("cannot ask KVM for its list of MSRs")?;
    let (first, others): (Vec<u32>, Vec<u32>) = listed
        .as_slice()
        .iter()
        .copied()
        .filter(|index| !is_in(*index, &UNSAVED) && !is_in(*index, &MTRRS))
        .partition(|index| is_in(*index, &NESTED));
    let mtrrs = MTRRS.into_iter().flat_map(|(first, last)| first..=last);
    Ok(first.into_iter().chain(mtrrs).chain(others).collect())
}

/// Reads MSRs, without those that KVM refuses to read.
pub(super) fn read(vcpu: &VcpuFd, numbers: &[u32]) -> Result<Vec<Msr>> {
    let mut all = Vec::with_capacity(numbers.len());
    let mut rest = numbers;
    while !rest.is_empty() {
        let asked = &rest[..rest.len().min(AT_ONCE)];
        let entries: Vec<_> = asked.iter().map(|index| entry((*index, 0))).collect();
        let mut msrs = Msrs::from_entries(&entries).context("too many MSRs")?;
        let count = vcpu.get_msrs(&mut msrs).context("cannot read MSRs")?;
        let values = msrs.as_slice().iter().take(count);
        all.extend(values.map(|entry| (entry.index, entry.data)));
        // KVM stops at the first that it refuses.
        let next = if count < asked.len() {
            count + 1
        } else {
            count
        };
        rest = &rest[next..];
    }
    Ok(all)
}

/// Reads one MSR; 0 where KVM refuses to read it.
pub(super) fn read_one(vcpu: &VcpuFd, index: u32) -> Result<u64> {
    Ok(read(vcpu, &[index])?.first().map_or(0, |(_, value)| *value))
}

/// Writes MSRs in this order.
///
/// # Errors
/// The first that KVM refuses.
pub(super) fn write(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<()> {
    for some in msrs.chunks(AT_ONCE) {
        let entries: Vec<_> = some.iter().copied().map(entry).collect();
        let written = vcpu
            .set_msrs(&Msrs::from_entries(&entries).context("too many MSRs")?)
            .context("cannot write MSRs")?;
        if let Some((index, value)) = some.get(written) {
            bail!("KVM refuses the value {value:#x} of its MSR {index:#x}");
        }
    }
    Ok(())
}

fn entry((index, data): Msr) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

/// What is to be written to MSRs: before nested state, and after it.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Changes {
    pub(super) before: Vec<Msr>,
    pub(super) after: Vec<Msr>,
}

/// Returns what is to be written where MSRs have the values `now` and are to have those of `wanted`, in the
/// order of `known`, the numbers of this host's. What has its value already is not written: some of these
/// cannot be written at all.
///
/// # Errors
/// One that this host does not have; what the CPU is affected by and the guest was told that it is not.
pub(super) fn changes(wanted: &[Msr], now: &[Msr], known: &[u32]) -> Result<Changes> {
    ensure!(
        wanted.len() <= known.len(),
        "it has {} MSRs, and KVM on this host saves at most {}",
        wanted.len(),
        known.len()
    );
    // Unused where they are zero.
    let unknown = |(index, value): &&Msr| *value != 0 && !known.contains(index);
    if let Some((index, value)) = wanted.iter().find(unknown) {
        bail!("its MSR {index:#x} is {value:#x}, and KVM on this host saves no MSR of this number");
    }
    let mut changes = Changes::default();
    for index in known {
        let of = |msrs: &[Msr]| msrs.iter().find(|(own, _)| own == index).copied();
        let Some((_, value)) = of(wanted) else {
            continue;
        };
        let current = of(now).map(|(_, value)| value);
        if current == Some(value) || (current, value) == (None, 0) {
            continue;
        }
        if *index == ARCH_CAPABILITIES {
            let lacking = value & !current.unwrap_or(0) & !RSBA;
            ensure!(
                lacking == 0,
                "this host's CPU lacks immunities that the guest was told of (bits {lacking:#x} of IA32_ARCH_CAPABILITIES)"
            );
        }
        match is_in(*index, &NESTED) {
            true => changes.before.push((*index, value)),
            false => changes.after.push((*index, value)),
        }
    }
    Ok(changes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: [u32; 4] = [0x3a, 0x10a, 0x174, 0x175];

    #[test]
    fn only_what_differs_is_written_and_what_nested_states_need_first() {
        let now = [(0x3a, 0), (0x10a, 3), (0x174, 0), (0x175, 7)];
        let wanted = [(0x175, 7), (0x174, 9), (0x3a, 5), (0x10a, 3)];
        let found = changes(&wanted, &now, &KNOWN).expect("valid");
        assert_eq!(found.before, [(0x3a, 5)]);
        assert_eq!(found.after, [(0x174, 9)]);
    }

    #[test]
    fn what_this_host_does_not_have_is_refused_by_its_number_if_it_was_used() {
        let now = [(0x174, 0)];
        let error = changes(&[(0x9999, 1)], &now, &KNOWN).expect_err("unknown");
        let error = error.to_string();
        assert!(error.contains("its MSR 0x9999 is 0x1"), "{error}");
        let unused = changes(&[(0x9999, 0), (0x175, 0)], &now, &KNOWN);
        assert_eq!(unused.expect("unused"), Changes::default());
        let many = [(0x174, 0); 5];
        let error = changes(&many, &now, &KNOWN).expect_err("too many");
        assert!(error.to_string().contains("it has 5 MSRs"), "{error}");
    }

    #[test]
    fn a_cpu_with_more_faults_than_the_guest_was_told_of_is_refused() {
        let now = [(0x10a, 0b1001)];
        let fewer = changes(&[(0x10a, 0b0101)], &now, &KNOWN).expect("RSBA is no immunity");
        assert_eq!(fewer.after, [(0x10a, 0b0101)]);
        let error = changes(&[(0x10a, 0b10_1001)], &now, &KNOWN).expect_err("not immune");
        assert!(error.to_string().contains("bits 0x20"), "{error}");
    }
}
