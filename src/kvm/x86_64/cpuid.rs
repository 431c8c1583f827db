//! The guest's CPUID: what KVM supports, adapted to the planned machine (Intel SDM volume 2A,
//! "CPUID"; AMD APM volume 3, appendix E; Documentation/virt/kvm/x86/cpuid.rst).

use armlet_arch::x86_64::features::Features;
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// The properties of the machine that CPUID shows. Each vCPU is a core of its own, all in one
/// package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Topology {
    /// This vCPU's APIC ID.
    pub(super) apic_id: u32,
    /// The number of vCPUs.
    pub(super) vcpus: u32,
    /// Guest-physical address bits.
    pub(super) phys_bits: u8,
    /// The paravirtual features.
    pub(super) features: Features,
    /// Whether MSI destinations have 15 bits.
    pub(super) messages: bool,
}

/// CPUID 0x4000_0001 EAX: destinations of MSIs and I/O APICs have 15 bits
/// (KVM_FEATURE_MSI_EXT_DEST_ID). The VMM sets it, because it emulates the I/O APIC.
const EXTENDED_TARGETS: u32 = 15;

/// Leaves that are replaced: both extended topology leaves.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];

/// Levels of extended topology (leaf 0xb, ECX 15:8).
const THREADS: u32 = 1;
const CORES: u32 = 2;

/// Returns the leaves of one vCPU.
pub(super) fn fitted(supported: &[kvm_cpuid_entry2], topology: Topology) -> Vec<kvm_cpuid_entry2> {
    let mut leaves: Vec<_> = supported
        .iter()
        .filter(|leaf| !TOPOLOGY.contains(&leaf.function))
        .copied()
        .collect();
    let basic = leaves.iter().find(|leaf| leaf.function == 0);
    let last = basic.map_or(0, |leaf| leaf.eax);
    for leaf in &mut leaves {
        fit(leaf, topology);
    }
    for function in TOPOLOGY.into_iter().filter(|function| *function <= last) {
        leaves.extend(extended_topology(function, topology));
    }
    leaves
}

fn fit(leaf: &mut kvm_cpuid_entry2, topology: Topology) {
    let Topology {
        apic_id,
        vcpus,
        phys_bits,
        features,
        messages,
    } = topology;
    match leaf.function {
        0x1 => {
            // The initial APIC ID, and the number of IDs that the package reserves.
            let reserved = vcpus.next_power_of_two().min(255);
            leaf.ebx = leaf.ebx & 0xffff | reserved << 16 | apic_id << 24;
            // The hypervisor bit, and x2APIC, which KVM emulates on every host.
            leaf.ecx |= 1 << 31 | 1 << 21;
            set(&mut leaf.ecx, 24, features.tsc_deadline);
            // More than one logical processor in the package.
            set(&mut leaf.edx, 28, vcpus > 1);
        }
        // How many vCPUs share each cache, and cores in the package.
        0x4 if leaf.eax & 0x1f != 0 => {
            let sharing = sharing_cache(leaf.eax >> 5 & 7, vcpus);
            let cores = vcpus.min(64) - 1;
            leaf.eax = leaf.eax & 0x3fff | sharing << 14 | cores << 26;
        }
        0x4000_0001 => {
            leaf.eax = features.paravirtual;
            set(&mut leaf.eax, EXTENDED_TARGETS, messages);
            leaf.edx = features.hints;
        }
        0x8000_0008 => {
            // No separate guest width in bits 23:16.
            leaf.eax = leaf.eax & 0xff00_ff00 | u32::from(phys_bits);
            let bits = apic_id_bits(vcpus);
            // Where the number of ID bits is given, the 8-bit number of CPUs is ignored.
            leaf.ecx = leaf.ecx & !0xf0ff | (vcpus - 1).min(0xff) | bits << 12;
        }
        0x8000_001d if leaf.eax & 0x1f != 0 => {
            let sharing = sharing_cache(leaf.eax >> 5 & 7, vcpus);
            leaf.eax = leaf.eax & 0x3fff | sharing << 14;
        }
        // The extended APIC ID; one thread per core; one node per package.
        0x8000_001e => {
            leaf.eax = apic_id;
            leaf.ebx = apic_id & 0xff;
            leaf.ecx = 0;
        }
        _ => {}
    }
}

/// Returns how many more vCPUs share a cache of this level: all share the third.
fn sharing_cache(level: u32, vcpus: u32) -> u32 {
    if level >= 3 { vcpus.min(4096) - 1 } else { 0 }
}

/// Returns how many bits of the APIC ID distinguish cores.
fn apic_id_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = *register & !(1 << bit) | u32::from(on) << bit;
}

fn extended_topology(function: u32, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    let shift = apic_id_bits(topology.vcpus);
    let leaf = |index: u32, level: u32, eax: u32, ebx: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: index | level << 8,
        edx: topology.apic_id,
        padding: [0; 3],
    };
    [
        leaf(0, THREADS, 0, 1),
        leaf(1, CORES, shift, topology.vcpus),
        leaf(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn registers(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let mut fitting = leaves
            .iter()
            .filter(|leaf| (leaf.function, leaf.index) == (function, index));
        let found = fitting.next().expect("the leaf");
        assert!(
            fitting.next().is_none(),
            "leaf {function:#x} is there twice"
        );
        [found.eax, found.ebx, found.ecx, found.edx]
    }

    const SIX: Topology = Topology {
        apic_id: 5,
        vcpus: 6,
        phys_bits: 33,
        features: Features {
            paravirtual: 0x21,
            hints: 1,
            tsc_deadline: true,
            exits_off: 0,
        },
        messages: false,
    };

    #[test]
    fn each_vcpu_finds_itself_and_how_many_there_are() {
        let supported = [
            leaf(0, [0xd, 0, 0, 0]),
            leaf(1, [0, 0x0310_0800, 0, 0]),
            leaf(0xb, [9, 9, 9, 9]),
            leaf(0x4000_0001, [0xffff, 0, 0, 0]),
            leaf(0x8000_0008, [0x0030_3030, 0, 0xffff_ffff, 0]),
            leaf(0x8000_001e, [7, 7, 7, 0]),
        ];
        let leaves = fitted(&supported, SIX);
        let [_, ebx, ecx, edx] = registers(&leaves, 1, 0);
        assert_eq!(ebx, 0x0508_0800);
        assert_eq!((ecx, edx), (1 << 31 | 1 << 24 | 1 << 21, 1 << 28));
        assert_eq!(registers(&leaves, 0xb, 0), [0, 1, 0x100, 5]);
        assert_eq!(registers(&leaves, 0xb, 1), [3, 6, 0x201, 5]);
        assert_eq!(registers(&leaves, 0xb, 2), [0, 0, 2, 5]);
        assert_eq!(registers(&leaves, 0x8000_001e, 0), [5, 5, 0, 0]);
        assert_eq!(registers(&leaves, 0x4000_0001, 0), [0x21, 0, 0, 1]);
        let [eax, _, ecx, _] = registers(&leaves, 0x8000_0008, 0);
        assert_eq!((eax, ecx), (0x3021, 0xffff_3f05));
        assert!(leaves.iter().all(|leaf| leaf.function != 0x1f));
    }

    #[test]
    fn the_last_of_300_knows_its_whole_number() {
        let last = Topology {
            apic_id: 299,
            vcpus: 300,
            messages: true,
            ..SIX
        };
        let supported = [
            leaf(0, [0xb, 0, 0, 0]),
            leaf(1, [0; 4]),
            leaf(0xb, [0; 4]),
            leaf(0x4000_0001, [0; 4]),
            leaf(0x8000_0008, [0; 4]),
            leaf(0x8000_001e, [0; 4]),
        ];
        let leaves = fitted(&supported, last);
        // Both the ID and the count are truncated to 8 bits here.
        assert_eq!(registers(&leaves, 1, 0)[1], 0x2bff_0000);
        assert_eq!(registers(&leaves, 0xb, 1), [9, 300, 0x201, 299]);
        assert_eq!(registers(&leaves, 0x4000_0001, 0)[0], 0x8021);
        assert_eq!(registers(&leaves, 0x8000_0008, 0)[2], 0x90ff);
        assert_eq!(registers(&leaves, 0x8000_001e, 0), [299, 0x2b, 0, 0]);
    }

    #[test]
    fn one_vcpu_shares_nothing() {
        let alone = Topology {
            apic_id: 0,
            vcpus: 1,
            phys_bits: 52,
            features: Features {
                tsc_deadline: false,
                ..SIX.features
            },
            messages: false,
        };
        let l3 = 0x3 << 5 | 3;
        let supported = [
            leaf(0, [0x1f, 0, 0, 0]),
            leaf(1, [0, 0, u32::MAX, u32::MAX]),
            leaf(4, [0xffff_c000 | l3, 1, 2, 3]),
        ];
        let leaves = fitted(&supported, alone);
        let [_, ebx, ecx, edx] = registers(&leaves, 1, 0);
        assert_eq!((ebx, edx), (0x1_0000, !(1 << 28)));
        assert_eq!(ecx, !(1 << 24));
        assert_eq!(registers(&leaves, 4, 0), [l3, 1, 2, 3]);
        assert_eq!(registers(&leaves, 0x1f, 1), [0, 1, 0x201, 0]);
    }

    #[test]
    fn the_third_cache_is_shared_by_all() {
        let cache = |level: u32| level << 5 | 1;
        let mut supported = vec![leaf(4, [cache(1), 0, 0, 0]), leaf(4, [cache(3), 0, 0, 0])];
        supported[1].index = 3;
        let leaves = fitted(&supported, SIX);
        assert_eq!(registers(&leaves, 4, 0)[0], cache(1) | 5 << 26);
        assert_eq!(registers(&leaves, 4, 3)[0], cache(3) | 5 << 14 | 5 << 26);
    }
}
