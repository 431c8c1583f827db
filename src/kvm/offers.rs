//! Newer features of KVM, by its capabilities (include/uapi/linux/kvm.h). Armlet uses none of them
//! yet; they help to choose a kernel.

use serde_json::{Value, json};

/// The capabilities by number: kvm-bindings ends at 239.
mod cap {
    pub(super) const DIRTY_LOG_RING: u32 = 192;
    pub(super) const DIRTY_LOG_RING_ACQ_REL: u32 = 223;
    pub(super) const COUNTER_OFFSET: u32 = 227;
    pub(super) const ARM_SUPPORTED_BLOCK_SIZES: u32 = 229;
    pub(super) const GUEST_MEMFD: u32 = 234;
    pub(super) const ARM_WRITABLE_IMP_ID_REGS: u32 = 239;
    pub(super) const ARM_EL2: u32 = 240;
    pub(super) const ARM_EL2_E2H0: u32 = 241;
    pub(super) const GUEST_MEMFD_FLAGS: u32 = 244;
    pub(super) const ARM_SEA_TO_USER: u32 = 245;
    pub(super) const ARM_PMU_V3_STRICT: u32 = 251;
}

/// The names of guest_memfd's flags, by bit.
const MEMFD_FLAGS: [&str; 2] = ["mmap", "init-shared"];

/// Features of KVM that armlet does not use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offers {
    /// guest_memfd, with the bits of the flags that it supports.
    pub guest_memfd: Option<u32>,
    /// The maximum size of the dirty ring in bytes; 0 for none.
    pub dirty_ring: u32,
    /// Whether the counter offset of a VM can be set.
    pub counter_offset: bool,
    /// The block sizes of stage 2 in bytes, smallest first; empty where KVM does not report them.
    pub block_sizes: Vec<u64>,
    /// Whether synchronous external aborts can exit to the VMM.
    pub sea_to_user: bool,
    /// Whether a guest can be restricted to the PMU of its own kind of core.
    pub pmu_strict: bool,
    /// Whether the implementation ID registers are writable.
    pub implementation_ids: bool,
    /// The kinds of nested hypervisors that are supported.
    pub nested: Vec<&'static str>,
}

impl Offers {
    /// Queries KVM: `ask` returns the result of KVM_CHECK_EXTENSION; a negative one is an error and
    /// counts as 0.
    #[must_use]
    pub fn ask(ask: impl Fn(u32) -> i32) -> Offers {
        let number = |cap| u32::try_from(ask(cap)).unwrap_or(0);
        let has = |cap| number(cap) != 0;
        let blocks = number(cap::ARM_SUPPORTED_BLOCK_SIZES);
        let mut nested = Vec::new();
        if has(cap::ARM_EL2) {
            nested.push("vhe");
        }
        if has(cap::ARM_EL2_E2H0) {
            nested.push("nvhe");
        }
        Offers {
            guest_memfd: has(cap::GUEST_MEMFD).then(|| number(cap::GUEST_MEMFD_FLAGS)),
            dirty_ring: number(cap::DIRTY_LOG_RING_ACQ_REL).max(number(cap::DIRTY_LOG_RING)),
            counter_offset: has(cap::COUNTER_OFFSET),
            block_sizes: (0..u32::BITS)
                .filter(|bit| blocks >> bit & 1 != 0)
                .map(|bit| 1 << bit)
                .collect(),
            sea_to_user: has(cap::ARM_SEA_TO_USER),
            pmu_strict: has(cap::ARM_PMU_V3_STRICT),
            implementation_ids: has(cap::ARM_WRITABLE_IMP_ID_REGS),
            nested,
        }
    }

    /// Returns those of all architectures, as `armlet probe` shows them.
    pub fn facts(&self) -> Vec<(&'static str, &'static str, Value)> {
        let flags = self.guest_memfd.unwrap_or(0);
        let known = MEMFD_FLAGS.iter().enumerate();
        let mut flags_shown: Vec<String> = known
            .filter(|(bit, _)| flags >> bit & 1 != 0)
            .map(|(_, name)| (*name).to_owned())
            .collect();
        let unknown = flags >> MEMFD_FLAGS.len() << MEMFD_FLAGS.len();
        if unknown != 0 {
            flags_shown.push(format!("{unknown:#x}"));
        }
        vec![
            (
                "guest_memfd",
                "guest_memfd",
                json!(self.guest_memfd.is_some()),
            ),
            (
                "guest_memfd_flags",
                "guest_memfd, flags",
                json!(flags_shown),
            ),
            (
                "dirty_ring_bytes",
                "Dirty ring, bytes at most",
                json!(self.dirty_ring),
            ),
        ]
    }

    /// Returns those of ARM64.
    pub fn arm_facts(&self) -> Vec<(&'static str, &'static str, Value)> {
        let mut facts = self.facts();
        facts.extend([
            (
                "counter_offset",
                "Counter offset",
                json!(self.counter_offset),
            ),
            (
                "block_sizes",
                "Stage-2 blocks, bytes",
                json!(self.block_sizes),
            ),
            (
                "sea_to_user",
                "Memory errors to the VMM",
                json!(self.sea_to_user),
            ),
            (
                "pmu_v3_strict",
                "PMU of one kind only",
                json!(self.pmu_strict),
            ),
            (
                "implementation_id_registers",
                "MIDR writable",
                json!(self.implementation_ids),
            ),
            ("nested_kinds", "Nested hypervisors", json!(self.nested)),
        ]);
        facts
    }
}

/// Returns the mode of KVM/arm64 that the kernel's command line selects
/// (Documentation/admin-guide/kernel-parameters.txt: `kvm-arm.mode=`); the last of several counts.
#[must_use]
pub fn mode_of(cmdline: &str) -> String {
    let words = cmdline.split_whitespace();
    let mut modes = words.filter_map(|word| word.strip_prefix("kvm-arm.mode="));
    modes.next_back().unwrap_or("default").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_7_3_offers_more_than_6_12() {
        // As observed on both, with 4 KiB pages.
        let blocks = 1 << 30 | 1 << 21 | 1 << 12;
        let old = Offers::ask(|cap| match cap {
            223 => 65536 * 16,
            227 => 1,
            229 => blocks,
            131 => -1,
            _ => 0,
        });
        assert_eq!(old.block_sizes, [4096, 2 << 20, 1 << 30]);
        assert!(old.counter_offset && old.guest_memfd.is_none() && old.nested.is_empty());
        assert_eq!(old.dirty_ring, 1 << 20);
        let new = Offers::ask(|cap| match cap {
            234 | 239 | 240 | 241 | 245 | 251 => 1,
            244 => 3,
            _ => -1,
        });
        assert_eq!(new.guest_memfd, Some(3));
        assert!(new.sea_to_user && new.pmu_strict && new.implementation_ids);
        assert!(!new.counter_offset && new.block_sizes.is_empty() && new.dirty_ring == 0);
        let shown = new.arm_facts();
        let value = |key: &str| {
            let mut shown = shown.iter();
            shown
                .find(|(name, ..)| *name == key)
                .map(|fact| fact.2.clone())
        };
        assert_eq!(
            value("guest_memfd_flags"),
            Some(json!(["mmap", "init-shared"]))
        );
        assert_eq!(value("nested_kinds"), Some(json!(["vhe", "nvhe"])));
        let later = Offers {
            guest_memfd: Some(7),
            ..Offers::default()
        };
        assert_eq!(later.facts()[1].2, json!(["mmap", "init-shared", "0x4"]));
    }

    #[test]
    fn the_mode_is_the_last_that_was_asked_for() {
        assert_eq!(mode_of("console=ttyAMA0 quiet"), "default");
        assert_eq!(
            mode_of("kvm-arm.mode=nested quiet kvm-arm.mode=protected"),
            "protected"
        );
    }
}
