//! The IPA width: guest-physical address bits, and the translation levels that they take.

use super::Host;
use crate::error::PlanError;
use crate::range::Region;
use crate::width::{Offer, Width, WidthPolicy};

/// The width of a VM on a KVM without a choice of widths (KVM_PHYS_SHIFT).
pub const LEGACY_BITS: u8 = 40;

pub(super) fn width(
    highest: &Region,
    policy: WidthPolicy,
    host: &Host,
) -> Result<Width, PlanError> {
    Offer {
        limit: host.ipa_limit.unwrap_or(LEGACY_BITS),
        fixed: host.ipa_limit.is_none(),
        page: host.page_size,
        levels: stage2_levels,
    }
    .choose(highest, policy)
}

/// Returns the levels of stage-2 translation for `bits` address bits on pages of `page_size` bytes:
/// up to 16 first-level tables are concatenated, and there are at least two levels
/// (arch/arm64/include/asm/stage2_pgtable.h: stage2_pgtable_levels; arch/arm64/kvm/hyp/pgtable.c:
/// kvm_get_vtcr).
#[must_use]
pub const fn stage2_levels(bits: u8, page_size: u64) -> u8 {
    let page_shift = page_size.trailing_zeros() as u8;
    let levels = (bits - 4 - 4) / (page_shift - 3);
    if levels < 2 { 2 } else { levels }
}

/// Returns the smallest ID_AA64MMFR0_EL1.PARange encoding that holds `bits`, with the bits it
/// stands for (arch/arm64/tools/sysreg, ID_AA64MMFR0_EL1).
#[must_use]
pub const fn pa_range(bits: u8) -> (u64, u8) {
    match bits {
        0..=32 => (0, 32),
        33..=36 => (1, 36),
        37..=40 => (2, 40),
        41..=42 => (3, 42),
        43..=44 => (4, 44),
        45..=48 => (5, 48),
        _ => (6, 52),
    }
}

/// Returns the address bits that a PARange encoding stands for; `None` for encodings that KVM does
/// not use.
#[must_use]
pub const fn pa_range_bits(encoding: u64) -> Option<u8> {
    match encoding {
        0 => Some(32),
        1 => Some(36),
        2 => Some(40),
        3 => Some(42),
        4 => Some(44),
        5 => Some(48),
        6 => Some(52),
        _ => None,
    }
}

/// Returns ID_AA64MMFR0_EL1 as a guest of so many address bits needs it: PARange lowered to the smallest
/// that holds them and, up to 48 bits, without FEAT_LPA2 (TGran4, bits 31:28, 1; TGran16, bits 23:20, 2), so
/// that such a guest can go on on hosts that have fewer.
#[must_use]
pub const fn narrowed(mmfr0: u64, bits: u8) -> u64 {
    let (wanted, _) = pa_range(bits);
    let mut narrow = mmfr0;
    if mmfr0 & 0xf > wanted {
        narrow = narrow & !0xf | wanted;
    }
    if bits <= 48 {
        if narrow >> 28 & 0xf == 1 {
            narrow &= !(0xf << 28);
        }
        if narrow >> 20 & 0xf == 2 {
            narrow = narrow & !(0xf << 20) | 1 << 20;
        }
    }
    narrow
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Range;

    #[test]
    fn a_guest_of_few_bits_sees_no_52_bit_addresses() {
        // PARange 6, TGran16 2, TGran4 1: as QEMU's max has them.
        let max = 0x1_1020_0006 | 1 << 28;
        assert_eq!(narrowed(max, 34), 0x1_0010_0001);
        assert_eq!(narrowed(max, 48), 0x1_0010_0005);
        assert_eq!(narrowed(max, 52), max);
        // A host with fewer stays as it is, and so does one without 4 KiB pages.
        assert_eq!(narrowed(0xf010_0002, 48), 0xf010_0002);
        assert_eq!(narrowed(0x0010_0002, 36), 0x0010_0001);
    }
    use proptest::prelude::*;

    fn host(limit: Option<u8>) -> Host {
        Host {
            ipa_limit: limit,
            page_size: 4096,
            gic_v2: false,
            gic_v3: true,
            max_vcpus: 512,
            guest_pages: vec![4096],
            offered: Default::default(),
        }
    }

    fn ending_at(end: u64) -> Region {
        Region {
            name: "guest RAM".into(),
            range: Range::new(0x4000_0000, end - 0x4000_0000).expect("above its base"),
        }
    }

    /// The break points of stage-2 levels on each page size (KVM's concatenation of 16 tables).
    #[test]
    fn levels_are_those_of_kvm() {
        for (page, first_of_level) in [
            (
                4 << 10,
                [(32, 2), (34, 2), (35, 3), (43, 3), (44, 4), (52, 4)],
            ),
            (
                16 << 10,
                [(32, 2), (40, 2), (41, 3), (51, 3), (52, 4), (52, 4)],
            ),
            (
                64 << 10,
                [(32, 2), (46, 2), (47, 3), (48, 3), (51, 3), (52, 3)],
            ),
        ] {
            for (bits, levels) in first_of_level {
                assert_eq!(
                    stage2_levels(bits, page),
                    levels,
                    "{bits} bits, {page} bytes"
                );
            }
        }
    }

    #[test]
    fn a_legacy_host_gives_40_bits_and_only_40() {
        let small = ending_at(0x8000_0000);
        for policy in [WidthPolicy::Fit, WidthPolicy::Max, WidthPolicy::Exact(40)] {
            assert_eq!(
                width(&small, policy, &host(None)).map(|width| width.bits),
                Ok(40)
            );
        }
        assert!(matches!(
            width(&small, WidthPolicy::Exact(36), &host(None)),
            Err(PlanError::WidthNotOffered { asked: 36, .. })
        ));
        assert!(matches!(
            width(&ending_at(1 << 41), WidthPolicy::Fit, &host(None)),
            Err(PlanError::TooWide {
                need: 41,
                limit: 40,
                fixed: true,
                ..
            })
        ));
    }

    #[test]
    fn a_host_under_40_bits_is_no_obstacle_to_a_machine_that_fits() {
        let fit = width(&ending_at(0x8000_0000), WidthPolicy::Fit, &host(Some(36)));
        assert_eq!(fit.map(|width| width.bits), Ok(32));
    }

    proptest! {
        #[test]
        fn a_width_holds_the_machine_and_the_hosts_limit(
            end in 0x4000_0001_u64..(1 << 53), limit in 32_u8..=52, asked in 0_u8..=60, policy in 0..3,
        ) {
            let policy = match policy {
                0 => WidthPolicy::Fit,
                1 => WidthPolicy::Max,
                _ => WidthPolicy::Exact(asked),
            };
            let region = ending_at(end);
            match width(&region, policy, &host(Some(limit))) {
                Ok(width) => {
                    prop_assert!((32..=limit).contains(&width.bits));
                    prop_assert!(region.range.last() >> width.bits == 0);
                    prop_assert!(width.levels <= width.levels_at_limit);
                    if policy == WidthPolicy::Fit {
                        prop_assert_eq!(width.bits, width.need);
                    }
                }
                Err(_) => prop_assert!(
                    region.range.last() >> limit != 0
                        || matches!(policy, WidthPolicy::Exact(n)
                            if n < 32 || n > limit || region.range.last() >> n != 0)
                ),
            }
        }

        #[test]
        fn pa_range_is_the_smallest_that_holds(bits in 32_u8..=52) {
            let (encoding, held) = pa_range(bits);
            prop_assert!(held >= bits);
            prop_assert_eq!(pa_range_bits(encoding), Some(held));
            prop_assert!(encoding == 0 || pa_range_bits(encoding - 1).is_some_and(|less| less < bits));
        }
    }
}
