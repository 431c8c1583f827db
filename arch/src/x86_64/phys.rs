//! The guest's physical address bits: the width that it sees, and the translation levels that it
//! takes.

use super::Host;
use crate::error::PlanError;
use crate::range::Region;
use crate::width::{Offer, Width, WidthPolicy};

/// Bytes of a page, and the granule of EPT and NPT.
const PAGE: u64 = 0x1000;

pub(super) fn width(
    highest: &Region,
    policy: WidthPolicy,
    host: &Host,
) -> Result<Width, PlanError> {
    Offer {
        limit: host.phys_bits,
        fixed: false,
        page: PAGE,
        levels: |bits, _| tdp_levels(bits),
    }
    .choose(highest, policy)
}

/// Returns the EPT levels for a guest with `bits` address bits: KVM uses a fifth only if needed
/// (arch/x86/kvm/mmu/mmu.c: kvm_mmu_get_tdp_level). NPT always has as many as the host's own page
/// tables, which is unknown here (arch/x86/kvm/svm/svm.c: get_npt_level).
#[must_use]
pub const fn tdp_levels(bits: u8) -> u8 {
    if bits <= 48 { 4 } else { 5 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Range;
    use crate::width::MIN_BITS;
    use proptest::prelude::*;

    fn ending_at(end: u64) -> Region {
        Region {
            name: "guest RAM".into(),
            range: Range::new(0, end).expect("not empty"),
        }
    }

    fn host(phys_bits: u8) -> Host {
        Host {
            phys_bits,
            max_vcpus: 1,
            paravirtual: 0,
            tsc_deadline: false,
            wide_apic_ids: false,
            exits_off: 0,
        }
    }

    #[test]
    fn a_fifth_level_is_for_more_than_48_bits() {
        let chosen = width(&ending_at(5 << 30), WidthPolicy::Fit, &host(52)).expect("fits");
        assert_eq!((chosen.bits, chosen.need, chosen.limit), (33, 33, 52));
        assert_eq!((chosen.levels, chosen.levels_at_limit), (4, 5));
        assert_eq!(chosen.host_page, 4096);
        let chosen = width(&ending_at(1 << 20), WidthPolicy::Exact(49), &host(52)).expect("fits");
        assert_eq!((chosen.bits, chosen.need, chosen.levels), (49, 32, 5));
        let chosen = width(&ending_at(1 << 20), WidthPolicy::Max, &host(48)).expect("fits");
        assert_eq!((chosen.bits, chosen.levels), (48, 4));
    }

    #[test]
    fn the_hosts_limit_is_named_as_on_arm64() {
        let error = width(&ending_at(1 << 20), WidthPolicy::Exact(40), &host(39));
        assert_eq!(
            error.map_err(|error| error.to_string()),
            Err("--ipa-bits 40: this host offers 32 to 39 bits; use --ipa-bits fit".to_owned())
        );
    }

    proptest! {
        #[test]
        fn a_width_holds_the_machine_within_the_hosts_limit(
            end in 1_u64..(1 << 53), limit: u8, asked: u8, policy in 0..3,
        ) {
            let policy = match policy {
                0 => WidthPolicy::Fit,
                1 => WidthPolicy::Max,
                _ => WidthPolicy::Exact(asked),
            };
            let region = ending_at(end);
            if let Ok(width) = width(&region, policy, &host(limit)) {
                prop_assert!((MIN_BITS..=limit).contains(&width.bits));
                prop_assert!(region.range.bits() <= width.bits);
                prop_assert!(width.levels <= width.levels_at_limit);
            }
        }
    }
}
