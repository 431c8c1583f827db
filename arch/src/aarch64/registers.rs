//! The registers of a vCPU as KVM numbers them (Documentation/virt/kvm/api.rst, 4.68), as plain data.

use super::id::{self, SystemRegister};
use serde::{Deserialize, Serialize};

/// A bound on how many registers a vCPU has; KVM has some 400.
pub const MOST: usize = 4096;

/// The virtual counter. Its number and that of the timer's compare value are those of each other
/// (arch/arm64/include/uapi/asm/kvm.h: KVM_REG_ARM_TIMER_CNT).
pub const VIRTUAL_COUNTER: u64 = 0x6030_0000_0013_df1a;
/// The physical counter (KVM_REG_ARM_PTIMER_CNT, since Linux 6.4).
pub const PHYSICAL_COUNTER: u64 = 0x6030_0000_0013_df01;
/// The lengths of SVE's vectors (KVM_REG_ARM64_SVE_VLS): bit n stands for n + 1 times 128 bits.
pub const VECTOR_LENGTHS: u64 = 0x6060_0000_0015_ffff;
/// MPIDR_EL1.
pub const MPIDR: u64 = system(SystemRegister::new(3, 0, 0, 0, 5));

/// X0, PC and PSTATE.
const X0: u64 = 0x6030_0000_0010_0000;
const PC: u64 = 0x6030_0000_0010_0040;
const PSTATE: u64 = 0x6030_0000_0010_0042;
/// The physical timer's control and compare value.
const PHYSICAL_CONTROL: u64 = 0x6030_0000_0013_df11;
const PHYSICAL_VALUE: u64 = 0x6030_0000_0013_df12;
/// What KVM gives registers whose value after a reset is unknown (arch/arm64/kvm/sys_regs.h:
/// reset_unknown).
const UNKNOWN: u64 = 0x1de7_ec7e_dbad_c0de;

/// Returns KVM's number of a system register.
#[must_use]
pub const fn system(register: SystemRegister) -> u64 {
    0x6030_0000_0013_0000 | register.0 as u64
}

/// What is special about a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What the guest was told of its CPU's features.
    Id(SystemRegister),
    /// What CPU it is, and the geometry of the caches that instructions depend on.
    Cpu(SystemRegister),
    /// The geometry of caches, as far as it only informs.
    Caches,
    /// A counter, which all vCPUs share.
    Counter,
    /// The lengths of vectors, which were fixed when the vCPU was made.
    VectorLengths,
    /// One whose bits clear those of another, with that one's value.
    Clearing,
    /// Any other.
    Other,
}

/// Returns what is special about a register.
#[must_use]
pub const fn kind(register: u64) -> Kind {
    match (register, register >> 16 & 0xfff) {
        (VIRTUAL_COUNTER | PHYSICAL_COUNTER, _) => Kind::Counter,
        (VECTOR_LENGTHS, _) => Kind::VectorLengths,
        // KVM_REG_ARM_DEMUX: CCSIDR_EL1 by CSSELR_EL1.
        (_, 0x11) => Kind::Caches,
        (_, 0x13) if is_clearing(register) => Kind::Clearing,
        (_, 0x13) => match SystemRegister(register as u16) {
            id::CLIDR_EL1 => Kind::Caches,
            cpu @ (id::MIDR_EL1 | id::REVIDR_EL1 | id::AIDR_EL1 | id::CTR_EL0) => Kind::Cpu(cpu),
            register if register.is_id() => Kind::Id(register),
            _ => Kind::Other,
        },
        _ => Kind::Other,
    }
}

/// Registers of performance counters that set bits of each other's value, and those that clear them:
/// PMINTENSET_EL1, PMCNTENSET_EL0, PMOVSSET_EL0. From Linux 6.12 on KVM sets and clears bits where these are
/// written by KVM_SET_ONE_REG too (arch/arm64/kvm/sys_regs.c: set_pmreg), so that one after the other makes 0.
const SETTING: [(u64, u64); 3] = [
    (0x6030_0000_0013_c4f1, 0x6030_0000_0013_c4f2),
    (0x6030_0000_0013_dce1, 0x6030_0000_0013_dce2),
    (0x6030_0000_0013_dcf3, 0x6030_0000_0013_dce3),
];

const fn is_clearing(register: u64) -> bool {
    register == SETTING[0].1 || register == SETTING[1].1 || register == SETTING[2].1
}

/// Returns the register whose bits clear those of this one.
#[must_use]
pub fn clearing(register: u64) -> Option<u64> {
    let mut pairs = SETTING.iter();
    pairs.find_map(|(set, clear)| (*set == register).then_some(*clear))
}

/// Whether a register is 0 in a vCPU that was just initialised (arch/arm64/kvm/reset.c: kvm_reset_vcpu), and
/// nothing has written it since.
#[must_use]
pub const fn begins_with_zero(register: u64) -> bool {
    match (register, register >> 16 & 0xfff) {
        (X0 | PC | PSTATE, _) => false,
        // General and floating-point registers; SVE's.
        (_, 0x10 | 0x15) => true,
        // Breakpoints and watchpoints: op0 = 2, CRn = 0, op2 from 4 on.
        (_, 0x13) => register as u16 >> 14 == 2 && register & 0x3f84 == 4,
        _ => false,
    }
}

/// Returns a register's name for messages.
#[must_use]
pub fn name(register: u64) -> String {
    match register >> 16 & 0xfff {
        0x13 => SystemRegister(register as u16).name(),
        0x10 => format!("core register {:#x}", register & 0xffff),
        0x11 => format!("CCSIDR_EL1 {:#x}", register & 0xffff),
        0x14 | 0x16 => format!("firmware register {register:#x}"),
        0x15 => format!("SVE register {register:#x}"),
        _ => format!("register {register:#x}"),
    }
}

/// Returns the bytes of a register.
#[must_use]
pub const fn size(register: u64) -> usize {
    1 << (register >> 52 & 0xf)
}

/// Registers with their values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// Their numbers, ascending.
    ids: Vec<u64>,
    /// Their values, each a word or more.
    words: Vec<u64>,
}

impl Registers {
    /// Adds a register, which comes after all others.
    pub fn push(&mut self, register: u64, bytes: &[u8]) {
        self.ids.push(register);
        for part in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.words.push(u64::from_le_bytes(word));
        }
    }

    /// Checks what comes from a file.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), String> {
        if self.ids.len() > MOST {
            return Err(format!(
                "{} registers; a vCPU has at most {MOST}",
                self.ids.len()
            ));
        }
        if let Some(pair) = self.ids.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(format!("register {:#x} is not in order", pair[1]));
        }
        // KVM_REG_ARM64, and 32 to 2048 bits.
        let is_odd = |id: u64| id >> 56 != 0x60 || !matches!(id >> 52 & 0xf, 2..=8);
        if let Some(odd) = self.ids.iter().find(|id| is_odd(**id)) {
            return Err(format!("register {odd:#x} is none of ARM64"));
        }
        let words: usize = self.ids.iter().map(|id| words(*id)).sum();
        if words != self.words.len() {
            return Err(format!(
                "{} words of registers where {words} are needed",
                self.words.len()
            ));
        }
        let mut short = self.iter().filter(|(id, _)| size(*id) == 4);
        match short.find(|(_, value)| value[0] > u32::MAX.into()) {
            Some((id, value)) => Err(format!("{} is {:#x}, of 32 bits", name(id), value[0])),
            None => Ok(()),
        }
    }

    /// Returns the registers with their values.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &[u64])> {
        let mut at = 0;
        self.ids.iter().map_while(move |id| {
            let value = self.words.get(at..at + words(*id))?;
            at += words(*id);
            Some((*id, value))
        })
    }

    /// Returns the value of a register.
    #[must_use]
    pub fn get(&self, register: u64) -> Option<&[u64]> {
        self.iter()
            .find_map(|(id, value)| (id == register).then_some(value))
    }

    /// Returns the value of a register of 64 bits.
    #[must_use]
    pub fn word(&self, register: u64) -> Option<u64> {
        self.get(register)?.first().copied()
    }

    /// As [`Self::word`], to be changed.
    pub fn word_mut(&mut self, register: u64) -> Option<&mut u64> {
        let index = self.ids.iter().position(|id| *id == register)?;
        let at = self.ids[..index].iter().map(|id| words(*id)).sum::<usize>();
        self.words.get_mut(at)
    }

    /// Returns the ID registers.
    #[must_use]
    pub fn ids(&self) -> Vec<(SystemRegister, u64)> {
        let id = |(id, value): (u64, &[u64])| match kind(id) {
            Kind::Id(register) => Some((register, value[0])),
            _ => None,
        };
        self.iter().filter_map(id).collect()
    }

    /// Whether a guest can do without a register with this value that a host's KVM does not have.
    #[must_use]
    pub fn is_dispensable(&self, register: u64, value: &[u64]) -> bool {
        match (kind(register), register) {
            (Kind::Caches, _) => true,
            // KVM shows the physical timer since Linux 6.4. If it is off (CNTP_CTL_EL0.ENABLE) it is not missed.
            (_, PHYSICAL_COUNTER | PHYSICAL_VALUE | PHYSICAL_CONTROL) => {
                self.word(PHYSICAL_CONTROL).unwrap_or(0) & 1 == 0
            }
            _ => value.iter().all(|word| matches!(*word, 0 | UNKNOWN)),
        }
    }
}

const fn words(register: u64) -> usize {
    size(register).div_ceil(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FPSR: u64 = 0x6020_0000_0010_00d4;
    const Z0: u64 = 0x6080_0000_0015_0000;
    const ISAR0: u64 = 0x6030_0000_0013_c030;

    fn registers() -> Registers {
        let mut registers = Registers::default();
        registers.push(FPSR, &[1, 0, 0, 0]);
        registers.push(X0, &7_u64.to_le_bytes());
        registers.push(ISAR0, &3_u64.to_le_bytes());
        registers.push(Z0, &[0xff; 256]);
        registers
    }

    #[test]
    fn values_of_all_sizes_come_back() {
        let mut registers = registers();
        registers.check().expect("valid");
        assert_eq!(registers.word(FPSR), Some(1));
        assert_eq!(registers.word(X0), Some(7));
        assert_eq!(registers.get(Z0), Some(&[u64::MAX; 32][..]));
        assert_eq!(registers.word(PC), None);
        assert_eq!(registers.ids(), [(SystemRegister(0xc030), 3)]);
        *registers.word_mut(ISAR0).expect("it is there") = 4;
        assert_eq!(registers.word_mut(PC), None);
        let words = [FPSR, X0, ISAR0, Z0].map(|register| registers.word(register));
        assert_eq!(words, [Some(1), Some(7), Some(4), Some(u64::MAX)]);
    }

    #[test]
    fn what_anybody_may_have_written_is_refused() {
        let refused = |change: &dyn Fn(&mut Registers), text: &str| {
            let mut bad = registers();
            change(&mut bad);
            let error = bad.check().expect_err(text);
            assert!(error.contains(text), "{error}");
        };
        refused(&|bad| bad.ids.swap(0, 1), "is not in order");
        refused(&|bad| bad.ids[1] = FPSR, "is not in order");
        refused(
            &|bad| bad.ids = (0..=MOST as u64).collect(),
            "4097 registers",
        );
        refused(&|bad| bad.ids[3] = u64::MAX, "is none of ARM64");
        refused(&|bad| bad.ids[3] |= 1 << 52, "is none of ARM64");
        refused(&|bad| bad.words.truncate(3), "3 words of registers");
        refused(&|bad| bad.words.push(0), "36 words of registers");
        refused(&|bad| bad.words[0] = 1 << 32, "of 32 bits");
        // Nothing is read that is not there.
        let mut bad = registers();
        bad.words.clear();
        assert_eq!(bad.iter().count(), 0);
    }

    #[test]
    fn registers_are_what_they_are() {
        assert_eq!(kind(ISAR0), Kind::Id(SystemRegister(0xc030)));
        assert_eq!(kind(system(id::MIDR_EL1)), Kind::Cpu(id::MIDR_EL1));
        assert_eq!(kind(0x6020_0000_0011_0000), Kind::Caches);
        assert_eq!(kind(VIRTUAL_COUNTER), Kind::Counter);
        assert_eq!(kind(VECTOR_LENGTHS), Kind::VectorLengths);
        assert_eq!(kind(MPIDR), Kind::Other);
        assert!(begins_with_zero(Z0) && !begins_with_zero(PC) && !begins_with_zero(MPIDR));
        // DBGBVR3_EL1 and DBGWCR3_EL1, not OSLSR_EL1 and MDSCR_EL1.
        let debug =
            |crn, crm, op2| begins_with_zero(system(SystemRegister::new(2, 0, crn, crm, op2)));
        assert!(debug(0, 3, 4) && debug(0, 3, 7));
        assert!(!debug(1, 1, 4) && !debug(0, 2, 2));
    }

    #[test]
    fn bits_of_counters_are_cleared_by_their_own_registers() {
        let register = |op1, crm, op2| system(SystemRegister::new(3, op1, 9, crm, op2));
        // PMINTENSET_EL1, PMCNTENSET_EL0, PMOVSSET_EL0.
        for (set, clear) in [
            (register(0, 14, 1), register(0, 14, 2)),
            (register(3, 12, 1), register(3, 12, 2)),
            (register(3, 14, 3), register(3, 12, 3)),
        ] {
            assert_eq!(clearing(set), Some(clear));
            assert_eq!((kind(set), kind(clear)), (Kind::Other, Kind::Clearing));
        }
        assert_eq!(clearing(PC), None);
    }

    #[test]
    fn a_physical_timer_that_is_off_is_not_missed() {
        let mut registers = Registers::default();
        registers.push(PHYSICAL_COUNTER, &9_u64.to_le_bytes());
        registers.push(PHYSICAL_CONTROL, &0_u64.to_le_bytes());
        assert!(registers.is_dispensable(PHYSICAL_COUNTER, &[9]));
        registers.words[1] = 1;
        assert!(!registers.is_dispensable(PHYSICAL_COUNTER, &[9]));
        assert!(registers.is_dispensable(X0, &[0]));
        assert!(!registers.is_dispensable(X0, &[1]));
    }
}
