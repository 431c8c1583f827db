//! ID registers: what a guest was told about its CPU, compared with what another host has (Arm DDI 0487,
//! section D24.2; arch/arm64/tools/sysreg).
//!
//! Nearly all of their fields have 4 bits, of which a larger value means more of a feature: a guest that
//! was told less than a host has runs there.

use std::fmt::Write;

/// The number of a system register: op0, op1, CRn, CRm and op2, as in KVM_REG_ARM64_SYSREG
/// (Documentation/virt/kvm/api.rst, 4.68).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SystemRegister(pub u16);

impl SystemRegister {
    /// Returns the register with these numbers.
    #[must_use]
    pub const fn new(op0: u16, op1: u16, crn: u16, crm: u16, op2: u16) -> SystemRegister {
        SystemRegister(op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2)
    }

    const fn numbers(self) -> [u16; 5] {
        let number = self.0;
        [
            number >> 14,
            number >> 11 & 7,
            number >> 7 & 0xf,
            number >> 3 & 0xf,
            number & 7,
        ]
    }

    /// Whether it is in the space of ID registers, those that are not allocated yet included.
    #[must_use]
    pub const fn is_id(self) -> bool {
        let [op0, op1, crn, crm, _] = self.numbers();
        op0 == 3 && op1 == 0 && crn == 0 && matches!(crm, 1..=7)
    }

    /// Returns its name; that of its numbers if there is none here.
    #[must_use]
    pub fn name(self) -> String {
        let known = REGISTERS.iter().find(|(register, ..)| *register == self);
        match known {
            Some((_, name, _)) => (*name).to_owned(),
            None => {
                let [op0, op1, crn, crm, op2] = self.numbers();
                format!("S{op0}_{op1}_C{crn}_C{crm}_{op2}")
            }
        }
    }

    fn fields(self) -> &'static str {
        let known = REGISTERS.iter().find(|(register, ..)| *register == self);
        known.map_or("", |(.., fields)| fields)
    }
}

/// ID_AA64PFR0_EL1.
pub const ID_AA64PFR0_EL1: SystemRegister = id(4, 0);
/// MIDR_EL1.
pub const MIDR_EL1: SystemRegister = id(0, 0);
/// REVIDR_EL1.
pub const REVIDR_EL1: SystemRegister = id(0, 6);
/// AIDR_EL1.
pub const AIDR_EL1: SystemRegister = SystemRegister::new(3, 1, 0, 0, 7);
/// CLIDR_EL1.
pub const CLIDR_EL1: SystemRegister = SystemRegister::new(3, 1, 0, 0, 1);
/// CTR_EL0.
pub const CTR_EL0: SystemRegister = SystemRegister::new(3, 3, 0, 0, 1);

const fn id(crm: u16, op2: u16) -> SystemRegister {
    SystemRegister::new(3, 0, 0, crm, op2)
}

/// Registers with their names and those of their fields, from bits 3:0 on. Before a field's name: `-`, it is
/// signed (-1 means none); `=`, only the same value is the same feature; `~`, it says nothing to a guest at
/// EL1, or KVM does as the plan says (PARange). `.` is a field without a name. After `/` is the feature that
/// it stands for, where that is called otherwise or the field is of none.
const REGISTERS: &[(SystemRegister, &str, &str)] = &[
    (MIDR_EL1, "MIDR_EL1", ""),
    (id(0, 5), "MPIDR_EL1", ""),
    (REVIDR_EL1, "REVIDR_EL1", ""),
    (AIDR_EL1, "AIDR_EL1", ""),
    (CLIDR_EL1, "CLIDR_EL1", ""),
    (CTR_EL0, "CTR_EL0", ""),
    (
        ID_AA64PFR0_EL1,
        "ID_AA64PFR0_EL1",
        "EL0/ EL1/ ~EL2 ~EL3 -FP -AdvSIMD GIC/GICv3 RAS SVE ~SEL2 ~MPAM AMU/AMUv1 DIT ~RME CSV2 CSV3",
    ),
    (
        id(4, 1),
        "ID_AA64PFR1_EL1",
        "BT/BTI SSBS MTE RAS_frac/ ~MPAM_frac . SME RNDR_trap/RNG_TRAP CSV2_frac/ NMI MTE_frac/ GCS THE MTEX/ DF2 \
         PFAR",
    ),
    (
        id(4, 2),
        "ID_AA64PFR2_EL1",
        "MTEPERM/MTE_PERM MTESTOREONLY/MTE_STORE_ONLY MTEFAR/MTE_TAGGED_FAR . . . . . FPMR",
    ),
    (
        id(4, 4),
        "ID_AA64ZFR0_EL1",
        "SVEver/SVE2 AES/SVE_AES . EltPerm/SVE2p2 BitPerm/SVE_BitPerm BF16 B16B16/SVE_B16B16 . SHA3/SVE_SHA3 . SM4/SVE_SM4 \
         I8MM . F32MM F64MM",
    ),
    (id(4, 5), "ID_AA64SMFR0_EL1", ""),
    (
        id(5, 0),
        "ID_AA64DFR0_EL1",
        "DebugVer/ ~TraceVer -PMUVer/PMUv3 BRPs/ PMSS/PMUv3_SS WRPs/ SEBEP CTX_CMPs/ PMSVer/SPE ~DoubleLock ~TraceFilt \
         ~TraceBuffer ~MTPMU ~BRBE ~ExtTrcBuff ~HPMN0",
    ),
    (id(5, 1), "ID_AA64DFR1_EL1", ""),
    (
        id(6, 0),
        "ID_AA64ISAR0_EL1",
        ". AES SHA1 SHA2/SHA256 CRC32 Atomic/LSE TME RDM SHA3 SM3 SM4 DP/DotProd FHM TS/FlagM \
         TLB/TLBIRANGE RNDR/RNG",
    ),
    (
        id(6, 1),
        "ID_AA64ISAR1_EL1",
        "DPB =APA/PAuth =API/PAuth JSCVT FCMA LRCPC =GPA/PAuth =GPI/PAuth FRINTTS SB SPECRES BF16 DGH \
         I8MM XS LS64",
    ),
    (
        id(6, 2),
        "ID_AA64ISAR2_EL1",
        "WFxT RPRES =GPA3/PAuth =APA3/PAuth MOPS BC/HBC PAC_frac/CONSTPACFIELD CLRBHB SYSREG_128 SYSINSTR_128 PRFMSLC \
         PCDPHINT RPRFM CSSC LUT ATS1A",
    ),
    (
        id(6, 3),
        "ID_AA64ISAR3_EL1",
        "CPA FAMINMAX TLBIW PACM LSFE OCCMO LSUI FPRCVT",
    ),
    (
        id(7, 0),
        "ID_AA64MMFR0_EL1",
        "~PARange ASIDBits/ BigEnd/MixedEnd ~SNSMem BigEndEL0/MixedEndEL0 TGran16/ -TGran64/ -TGran4/LPA2 ~TGran16_2 \
         ~TGran64_2 ~TGran4_2 ExS . . ~FGT ECV",
    ),
    (
        id(7, 1),
        "ID_AA64MMFR1_EL1",
        "HAFDBS ~VMIDBits ~VH HPDS LO/LOR PAN ~SpecSEI ~XNX ~TWED ETS ~HCX AFP nTLBPA TIDCP1 CMOW ECBHB",
    ),
    (
        id(7, 2),
        "ID_AA64MMFR2_EL1",
        "CnP/TTCNP UAO LSM IESB VARange/LVA ~CCIDX ~NV ST/TTST AT/LSE2 IDS ~FWB . TTL BBM ~EVT E0PD",
    ),
    (
        id(7, 3),
        "ID_AA64MMFR3_EL1",
        "TCRX/TCR2 SCTLRX/SCTLR2 S1PIE ~S2PIE S1POE ~S2POE AIE MEC D128 ~D128_2 SNERR ANERR . SDERR ADERR \
         Spec_FPACC",
    ),
    (
        id(7, 4),
        "ID_AA64MMFR4_EL1",
        ". EIESB ASID2 ~HACDBS ~FGWTE3 ~NV_frac ~E2H0",
    ),
    (id(1, 0), "ID_PFR0_EL1", ""),
    (id(1, 1), "ID_PFR1_EL1", ""),
    (id(1, 2), "ID_DFR0_EL1", ""),
    (id(1, 3), "ID_AFR0_EL1", ""),
    (id(1, 4), "ID_MMFR0_EL1", ""),
    (id(1, 5), "ID_MMFR1_EL1", ""),
    (id(1, 6), "ID_MMFR2_EL1", ""),
    (id(1, 7), "ID_MMFR3_EL1", ""),
    (id(2, 0), "ID_ISAR0_EL1", ""),
    (id(2, 1), "ID_ISAR1_EL1", ""),
    (id(2, 2), "ID_ISAR2_EL1", ""),
    (id(2, 3), "ID_ISAR3_EL1", ""),
    (id(2, 4), "ID_ISAR4_EL1", ""),
    (id(2, 5), "ID_ISAR5_EL1", ""),
    (id(2, 6), "ID_MMFR4_EL1", ""),
    (id(2, 7), "ID_ISAR6_EL1", ""),
    (id(3, 0), "MVFR0_EL1", ""),
    (id(3, 1), "MVFR1_EL1", ""),
    (id(3, 2), "MVFR2_EL1", ""),
    (id(3, 4), "ID_PFR2_EL1", ""),
    (id(3, 5), "ID_DFR1_EL1", ""),
    (id(3, 6), "ID_MMFR5_EL1", ""),
];

/// Bits of a field.
pub const FIELD_BITS: u32 = 4;

/// Returns the lowest bits of the fields in which two values of an ID register differ.
pub fn differing(one: u64, other: u64) -> impl Iterator<Item = u32> {
    let shifts = (0..u64::BITS).step_by(FIELD_BITS as usize);
    shifts.filter(move |shift| (one ^ other) >> shift & 0xf != 0)
}

/// Returns what a guest that was told `saved` by an ID register lacks on a CPU that says `host`: a sentence
/// for each field. None: it runs there.
fn fields_lacking(register: SystemRegister, saved: u64, host: u64) -> Vec<String> {
    let name = |shift: u32| {
        let mut names = register.fields().split(' ');
        names.nth((shift / FIELD_BITS) as usize).unwrap_or("")
    };
    let sentence = |shift: u32| {
        let (was, is) = (saved >> shift & 0xf, host >> shift & 0xf);
        let name = name(shift);
        let (rule, name) = match name.split_at_checked(1) {
            Some((rule @ ("-" | "=" | "~"), name)) => (rule, name),
            _ => ("", name),
        };
        let signed = |field: u64| (field as i8) << 4 >> 4;
        let is_enough = match rule {
            "~" => true,
            "=" => false,
            "-" => signed(is) >= signed(was),
            _ => is >= was,
        };
        if is_enough {
            return None;
        }
        let (field, feature) = name.split_once('/').unwrap_or((name, name));
        let mut text = match feature {
            "" | "." => String::new(),
            _ => format!("FEAT_{feature}: "),
        };
        let _ = match field {
            "" | "." => write!(
                text,
                "{}, bits {}:{shift},",
                register.name(),
                shift + FIELD_BITS - 1
            ),
            _ => write!(text, "{}.{field}", register.name()),
        };
        let _ = write!(text, " is {is:#x} on this host, and {was:#x} for the guest");
        Some(text)
    };
    differing(saved, host).filter_map(sentence).collect()
}

/// Returns why a guest that was told `saved` by the ID registers of its CPU cannot run on one that says `host`:
/// a sentence for each feature that is missing. Registers that the host does not have are 0.
#[must_use]
pub fn lacking(saved: &[(SystemRegister, u64)], host: &[(SystemRegister, u64)]) -> Vec<String> {
    let narrow = is_narrow(saved);
    let mut reasons = Vec::new();
    for &(register, value) in saved {
        let is = host.iter().find(|(other, _)| *other == register);
        if register.is_id() && !(narrow && is_of_aarch32(register)) {
            reasons.extend(fields_lacking(register, value, is.map_or(0, |(_, is)| *is)));
        }
    }
    reasons
}

/// Whether a CPU with these ID registers has no AArch32: what registers say of it is then unknown.
fn is_narrow(registers: &[(SystemRegister, u64)]) -> bool {
    let pfr0 = registers.iter().find(|(id, _)| *id == ID_AA64PFR0_EL1);
    // ID_AA64PFR0_EL1.EL0 and EL1: 1 means AArch64 only.
    pfr0.is_some_and(|(_, value)| value & 0xff == 0x11)
}

/// Whether an ID register is one of AArch32.
const fn is_of_aarch32(register: SystemRegister) -> bool {
    let [.., crm, _] = register.numbers();
    register.is_id() && matches!(crm, 1..=3)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ISAR0: SystemRegister = id(6, 0);
    const MMFR0: SystemRegister = id(7, 0);

    #[test]
    fn a_feature_that_is_missing_is_named_with_both_values() {
        assert_eq!(
            fields_lacking(ISAR0, 2 << 20, 0),
            ["FEAT_LSE: ID_AA64ISAR0_EL1.Atomic is 0x0 on this host, and 0x2 for the guest"]
        );
        assert_eq!(
            fields_lacking(ID_AA64PFR0_EL1, 1 << 32, 0),
            ["FEAT_SVE: ID_AA64PFR0_EL1.SVE is 0x0 on this host, and 0x1 for the guest"]
        );
        assert_eq!(
            fields_lacking(id(7, 5), 3 << 12, 1 << 12),
            ["S3_0_C0_C7_5, bits 15:12, is 0x1 on this host, and 0x3 for the guest"]
        );
        assert_eq!(fields_lacking(ISAR0, u64::MAX, 0).len(), 16);
    }

    #[test]
    fn a_host_that_has_more_is_enough() {
        assert!(fields_lacking(ISAR0, 0x1121, 0x2222).is_empty());
        // TGran4 is signed: 0xf, none, is less than 0, and 1 is 52 bits.
        assert!(fields_lacking(MMFR0, 0xf << 28, 0).is_empty());
        assert_eq!(fields_lacking(MMFR0, 0, 0xf << 28).len(), 1);
        let lpa2 = fields_lacking(MMFR0, 1 << 28, 0);
        assert!(lpa2[0].starts_with("FEAT_LPA2: "), "{lpa2:?}");
    }

    #[test]
    fn the_address_range_is_the_plans_and_algorithms_must_be_the_same() {
        assert!(fields_lacking(MMFR0, 6, 2).is_empty());
        assert_eq!(fields_lacking(id(6, 1), 1 << 4, 2 << 4).len(), 1);
    }

    #[test]
    fn registers_of_aarch32_count_where_the_guest_has_it() {
        let saved = |pfr0| vec![(id(2, 0), 5), (ID_AA64PFR0_EL1, pfr0)];
        assert_eq!(lacking(&saved(0x12), &[(ID_AA64PFR0_EL1, 0x12)]).len(), 1);
        assert!(lacking(&saved(0x11), &[(ID_AA64PFR0_EL1, 0x11)]).is_empty());
    }

    #[test]
    fn every_list_of_fields_fits_its_register() {
        for (register, name, fields) in REGISTERS {
            assert!(fields.split(' ').count() <= 16, "{name}");
            assert!(!fields.contains("  "), "{name}");
            let same = REGISTERS.iter().filter(|(other, ..)| other == register);
            assert_eq!(same.count(), 1, "{name}");
        }
    }
}
