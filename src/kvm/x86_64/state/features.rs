//! The CPU's features that a guest was told of, against those of another host, by name.

use anyhow::{Result, bail, ensure};
use kvm_bindings::kvm_cpuid_entry2;

/// A leaf of CPUID: function, index, flags of KVM, EAX, EBX, ECX, EDX.
pub(super) type Leaf = [u32; 7];

/// Registers of a leaf.
const EAX: usize = 3;
const EBX: usize = 4;
const ECX: usize = 5;
const EDX: usize = 6;

/// Function, index and register of features, and their names from bit 0 on, as Linux has them in
/// /proc/cpuinfo; "-" for a bit without a name, and "." for one that is no feature or that follows the
/// guest's own registers (Intel SDM volume 2A, "CPUID"; AMD APM volume 3, appendix E;
/// Documentation/virt/kvm/x86/cpuid.rst).
const FEATURES: [(u32, u32, usize, &str); 19] = [
    (
        1,
        0,
        EDX,
        "fpu vme de pse tsc msr pae mce cx8 . - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss . tm ia64 pbe",
    ),
    (
        1,
        0,
        ECX,
        "pni pclmulqdq dtes64 . ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave . avx f16c rdrand hypervisor",
    ),
    (
        7,
        0,
        EBX,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    (
        7,
        0,
        ECX,
        "prefetchwt1 avx512vbmi umip pku . waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 . . . . . rdpid key_locker bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    (
        7,
        0,
        EDX,
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities spec_ctrl_ssbd",
    ),
    (
        7,
        1,
        EAX,
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam msrlist",
    ),
    (
        7,
        1,
        EDX,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti - - - cet_sss avx10 - apx_f",
    ),
    (
        7,
        2,
        EDX,
        "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    ),
    (
        0xd,
        0,
        EAX,
        "x87 sse avx bndregs bndcsr opmask zmm_hi256 hi16_zmm - pkru - - - - - - - xtilecfg xtiledata apx",
    ),
    (0xd, 1, EAX, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (
        0xd,
        1,
        ECX,
        "- - - - - - - - pt - pasid cet_u cet_s hdc uintr lbr",
    ),
    (
        0x4000_0001,
        0,
        EAX,
        "kvmclock nop_io_delay mmu_op kvmclock2 async_pf steal_time pv_eoi pv_unhalt - pv_tlb_flush async_pf_vmexit pv_send_ipi poll_control pv_sched_yield async_pf_int msi_ext_dest_id hc_map_gpa_range migration_control - - - - - - kvmclock_stable",
    ),
    (
        0x8000_0001,
        0,
        ECX,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    (
        0x8000_0001,
        0,
        EDX,
        "fpu vme de pse tsc msr pae mce cx8 . - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx fxsr fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    (0x8000_0007, 0, EDX, "- - - - - - - - invariant_tsc"),
    (
        0x8000_0008,
        0,
        EBX,
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp amd_ibrs_always_on amd_stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc - amd_psfd btc_no amd_ibpb_ret",
    ),
    (
        0x8000_000a,
        0,
        EDX,
        "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists - - pausefilter - pfthreshold avic - v_vmsave_vmload vgif",
    ),
    (
        0x8000_0021,
        0,
        EAX,
        "no_nested_data_bp fs_gs_base_ns lfence_rdtsc - - - null_sel_clr_base - autoibrs no_smm_ctl_msr - - - - - - - prefetchi - - - - - - - - - sbpb ibpb_brtype srso_no",
    ),
    (7, 1, ECX, "- - - - - msr_imm"),
];

/// Names of registers, from EAX on.
const REGISTERS: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];

/// Returns a leaf as plain data.
pub(super) fn leaf(entry: &kvm_cpuid_entry2) -> Leaf {
    let kvm_cpuid_entry2 {
        function,
        index,
        flags,
        eax,
        ebx,
        ecx,
        edx,
        ..
    } = *entry;
    [function, index, flags, eax, ebx, ecx, edx]
}

/// Returns KVM's form of a leaf.
pub(super) fn entry(leaf: &Leaf) -> kvm_cpuid_entry2 {
    let [function, index, flags, eax, ebx, ecx, edx] = *leaf;
    kvm_cpuid_entry2 {
        function,
        index,
        flags,
        eax,
        ebx,
        ecx,
        edx,
        padding: [0; 3],
    }
}

/// Returns the bits of a register that the guest's own registers decide: OSXSAVE, OSPKE, APIC, MONITOR, and
/// the size of what is enabled in XCR0 and IA32_XSS.
fn dynamic(function: u32, index: u32, register: usize) -> u32 {
    match (function, index, register) {
        (1, 0, ECX) => 1 << 27 | 1 << 3,
        (1, 0, EDX) | (0x8000_0001, 0, EDX) => 1 << 9,
        (7, 0, ECX) => 1 << 4,
        (0xd, 0 | 1, EBX) => u32::MAX,
        _ => 0,
    }
}

/// Returns whether a guest sees no difference between two CPUs.
pub(super) fn are_same(one: &[Leaf], other: &[Leaf]) -> bool {
    let alike = |(one, other): (&Leaf, &Leaf)| {
        one[..EAX] == other[..EAX]
            && (EAX..=EDX).all(|at| (one[at] ^ other[at]) & !dynamic(one[0], one[1], at) == 0)
    };
    one.len() == other.len() && one.iter().zip(other).all(alike)
}

/// Checks that a CPU has all that the guest was told of.
///
/// # Errors
/// Another vendor; the feature that it lacks, by its name.
pub(super) fn check(guest: &[Leaf], host: &[Leaf]) -> Result<()> {
    let register = |leaves: &[Leaf], function, index, register: usize| {
        let mut leaves = leaves.iter();
        let leaf = leaves.find(|leaf| (leaf[0], leaf[1]) == (function, index));
        leaf.map_or(0, |leaf| leaf[register])
    };
    let vendor = |leaves| {
        let words = [EBX, EDX, ECX].map(|at| register(leaves, 0, 0, at).to_le_bytes());
        let bytes = words.as_flattened();
        bytes.escape_ascii().to_string()
    };
    let (made, here) = (vendor(guest), vendor(host));
    ensure!(
        made == here,
        "it was made on a CPU of {made}, and this host's is of {here}"
    );
    let width = |leaves| register(leaves, 0x8000_0008, 0, EAX) & 0xff;
    let (bits, ours) = (width(guest), width(host));
    ensure!(
        bits <= ours,
        "the guest was told of {bits} bits of physical addresses, and this machine has {ours}"
    );
    for (function, index, at, names) in FEATURES {
        let of = |leaves| register(leaves, function, index, at);
        let lacking = of(guest) & !of(host) & !dynamic(function, index, at);
        let mut names = names.split(' ').chain(std::iter::repeat("-"));
        for bit in 0..u32::BITS {
            let name = names.next().unwrap_or("-");
            match (lacking >> bit & 1, name) {
                (0, _) | (_, ".") => {}
                (_, "-") => bail!(
                    "this host's CPU lacks bit {bit} of {} of CPUID {function:#x}.{index}, which the guest was told of",
                    REGISTERS[at - EAX]
                ),
                (_, name) => bail!("this host's CPU lacks {name}, which the guest was told of"),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Vec<Leaf> {
        vec![
            [0, 0, 0, 0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65],
            [1, 0, 0, 0, 0, u32::MAX, u32::MAX],
            [7, 0, 1, 1, 0xffff_ffff, 0xffff_ffff, 0],
            [0xd, 1, 1, 0xf, 576, 0, 0],
            [0x8000_0008, 0, 0, 0x3028, 0, 0, 0],
        ]
    }

    fn refusal(change: impl Fn(&mut Vec<Leaf>)) -> String {
        let mut lesser = host();
        change(&mut lesser);
        let error = check(&host(), &lesser).expect_err("less than the guest was told of");
        error.to_string()
    }

    #[test]
    fn a_feature_that_the_host_lacks_is_named() {
        check(&host(), &host()).expect("the same");
        for (at, register, bit, name) in [
            (1, ECX, 28, "lacks avx,"),
            (1, EDX, 0, "lacks fpu,"),
            (1, EDX, 31, "lacks pbe,"),
            (1, ECX, 31, "lacks hypervisor,"),
            (2, EBX, 16, "lacks avx512f,"),
            (2, EBX, 31, "lacks avx512vl,"),
            (2, EBX, 22, "bit 22 of EBX of CPUID 0x7.0"),
            (2, ECX, 31, "lacks pks,"),
            (3, EAX, 3, "lacks xsaves,"),
        ] {
            let said = refusal(|leaves| leaves[at][register] &= !(1 << bit));
            assert!(said.contains(name), "{said}");
        }
        let said = refusal(|leaves| {
            leaves.remove(3);
        });
        assert!(said.contains("lacks xsaveopt,"), "{said}");
        let said = refusal(|leaves| leaves[4][EAX] = 0x3027);
        assert!(
            said.contains("40 bits") && said.contains("has 39"),
            "{said}"
        );
    }

    #[test]
    fn another_vendors_cpu_is_refused() {
        let said = refusal(|leaves| leaves[0][EBX..].copy_from_slice(&[1, 2, 3]));
        assert!(said.contains("a CPU of AuthenticAMD, and this"), "{said}");
    }

    #[test]
    fn what_the_guests_own_registers_decide_is_no_difference() {
        let mut other = host();
        other[1][ECX] &= !(1 << 27);
        other[2][ECX] &= !(1 << 4);
        other[3][EBX] = 832;
        check(&host(), &other).expect("OSXSAVE, OSPKE and a size differ");
        assert!(are_same(&host(), &other));
        other[1][ECX] &= !1;
        assert!(!are_same(&host(), &other));
        assert!(!are_same(&host(), &host()[1..]));
    }

    #[test]
    fn each_register_has_at_most_32_names() {
        for (function, _, _, names) in FEATURES {
            assert!(names.split(' ').count() <= 32, "{function:#x}");
        }
    }
}
