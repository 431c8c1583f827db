//! The rows of the bench: what is asked of each figure, and what the peers take.

/// Peers, in the order of the figures below.
pub(super) const PEERS: [&str; 6] = [
    "kvmtool",
    "alioth",
    "Firecracker",
    "libkrun",
    "Cloud Hypervisor",
    "QEMU",
];

/// What is asked of a figure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Reach {
    Nothing,
    Below(f64),
    AtMost(f64),
    AtLeast(f64),
}

/// A row of the table.
pub(super) struct Spec {
    /// The figure, such as `4k/timing/exec_to_marker_ms`.
    pub(super) key: &'static str,
    pub(super) label: &'static str,
    pub(super) unit: &'static str,
    pub(super) reach: Reach,
    /// What the peers take, where that was measured.
    pub(super) peers: &'static [f64],
}

const fn spec(
    key: &'static str,
    label: &'static str,
    unit: &'static str,
    reach: Reach,
    peers: &'static [f64],
) -> Spec {
    Spec {
        key,
        label,
        unit,
        reach,
        peers,
    }
}

/// The sources of the limits are the issue that asked for the bench, and the best peer.
pub(super) const SPECS: [Spec; 43] = [
    spec(
        "4k/timing/exec_to_entry_ms",
        "exec to first KVM_RUN",
        "ms",
        Reach::Nothing,
        &[22.6, 23.2, 24.1, 35.4, 32.0, 195.7],
    ),
    spec(
        "entry_less_kernel_ms",
        "  less reading the kernel",
        "ms",
        Reach::Nothing,
        &[],
    ),
    spec(
        "4k/reading/reading_kernel_ms",
        "  reading the kernel",
        "ms",
        Reach::Below(20.0),
        &[],
    ),
    spec(
        "4k/reading/reading_initrd_ms",
        "  reading the initramfs",
        "ms",
        Reach::Nothing,
        &[],
    ),
    spec(
        "4k/reading/reading_ms",
        "  reading both",
        "ms",
        Reach::Nothing,
        &[20.7, 20.7, 20.6, 22.0, 21.3],
    ),
    spec(
        "entry_less_reading_ms",
        "  less reading both",
        "ms",
        Reach::Below(1.9),
        &[1.9, 2.5, 3.5, 13.4, 10.7, 153.0],
    ),
    spec(
        "4k/timing/exec_to_marker_ms",
        "exec to the guest's init",
        "ms",
        Reach::Below(519.0),
        &[521.6, 519.4, 526.7, 533.3, 544.5, 714.6],
    ),
    spec(
        "4k/timing/exec_to_exit_ms",
        "exec to exit",
        "ms",
        Reach::Nothing,
        &[],
    ),
    spec(
        "4k/marker/user_exits",
        "exits to user space until the init",
        "",
        Reach::AtMost(72.0),
        &[96.0, 72.0, 157.0, 277.0, 429.0, 190.0],
    ),
    spec(
        "4k/marker/kvm_exits",
        "all exits until the init",
        "",
        Reach::Nothing,
        &[],
    ),
    spec(
        "4k/calls/calls_before_entry",
        "system calls before KVM_RUN",
        "",
        Reach::Nothing,
        &[156.0, 137.0, 297.0, 147.0, 372.0, 3737.0],
    ),
    spec(
        "4k/marker/vmm_rss_kib",
        "memory of the VMM",
        "KiB",
        Reach::AtMost(1132.0),
        &[1132.0, 3068.0, 2708.0, 1968.0, 4984.0, 76728.0],
    ),
    // Only two peers' peaks are known; the others' are at least what they hold in the end.
    spec(
        "4k/peak/vmm_peak_kib",
        "  its peak",
        "KiB",
        Reach::AtMost(1132.0),
        &[1140.0, f64::NAN, f64::NAN, 35564.0],
    ),
    spec(
        "4k/marker/threads",
        "threads",
        "",
        Reach::Nothing,
        &[5.0, 3.0, 2.0, 2.0, 4.0, 3.0],
    ),
    spec(
        "binary_kib",
        "stripped static binary",
        "KiB",
        Reach::AtMost(1228.8),
        &[1666.0, 4109.0, 3086.0, 2701.0, 5965.0, 34816.0],
    ),
    spec(
        "4k/verbose/verbose_bytes",
        "verbose boot: bytes of console",
        "",
        Reach::Nothing,
        &[],
    ),
    spec(
        "4k/verbose/verbose_user_exits",
        "  exits to user space",
        "",
        Reach::Nothing,
        &[f64::NAN, 31600.0, 31600.0],
    ),
    spec(
        "exits_per_byte",
        "  exits for a byte",
        "",
        Reach::AtMost(1.0),
        &[f64::NAN, 2.0, 2.0],
    ),
    spec(
        "4k/verbose/verbose_marker_ms",
        "  exec to the guest's init",
        "ms",
        Reach::Nothing,
        &[],
    ),
    spec(
        "instructions_per_byte",
        "  instructions for a byte, guest too",
        "",
        Reach::Nothing,
        &[],
    ),
    spec(
        "host_instructions_per_byte",
        "  instructions of the host for it",
        "",
        Reach::Nothing,
        &[f64::NAN, 22000.0, 22000.0],
    ),
    spec(
        "4k/idle/idle_others_ms",
        "5 s idle: CPU time outside vCPUs",
        "ms",
        Reach::AtMost(0.0),
        &[],
    ),
    spec(
        "4k/idle/idle_vcpus_ms",
        "  CPU time of vCPUs",
        "ms",
        Reach::Nothing,
        &[],
    ),
    spec(
        "4k/idle/idle_user_exits",
        "  exits to user space",
        "",
        Reach::AtMost(0.0),
        &[],
    ),
    spec(
        "ipa_bits",
        "IPA bits asked of KVM",
        "",
        Reach::Nothing,
        &[32.0, 40.0],
    ),
    spec(
        "4k/stage2_levels",
        "  stage-2 levels, 4 KiB pages",
        "",
        Reach::Nothing,
        &[],
    ),
    spec(
        "16k/stage2_levels",
        "  stage-2 levels, 16 KiB pages",
        "",
        Reach::Nothing,
        &[],
    ),
    spec(
        "4k/thp-always/huge_percent",
        "guest RAM in huge pages: 4k, always",
        "%",
        Reach::AtLeast(90.0),
        &[],
    ),
    spec(
        "4k/thp-always/exits",
        "  guest exits until the init",
        "",
        Reach::Nothing,
        &[630.0],
    ),
    spec(
        "4k/thp-madvise/huge_percent",
        "  4k, madvise",
        "%",
        Reach::AtLeast(90.0),
        &[],
    ),
    spec(
        "4k/thp-madvise/exits",
        "  guest exits until the init",
        "",
        Reach::Nothing,
        &[],
    ),
    spec(
        "4k/thp-never/huge_percent",
        "  4k, never (for information)",
        "%",
        Reach::Nothing,
        &[],
    ),
    spec(
        "4k/thp-never/exits",
        "  guest exits until the init",
        "",
        Reach::Nothing,
        &[],
    ),
    spec(
        "16k/thp-always/huge_percent",
        "  16k, always",
        "%",
        Reach::AtLeast(90.0),
        &[],
    ),
    spec(
        "16k/thp-always/exits",
        "  guest exits until the init",
        "",
        Reach::Nothing,
        &[4000.0, 840.0, 4000.0],
    ),
    spec(
        "16k/thp-madvise/huge_percent",
        "  16k, madvise",
        "%",
        Reach::AtLeast(90.0),
        &[],
    ),
    spec(
        "16k/thp-madvise/exits",
        "  guest exits until the init",
        "",
        Reach::Nothing,
        &[],
    ),
    spec(
        "16k/timing/exec_to_entry_ms",
        "16k: exec to first KVM_RUN",
        "ms",
        Reach::Nothing,
        &[],
    ),
    spec(
        "16k/timing/exec_to_marker_ms",
        "16k: exec to the guest's init",
        "ms",
        Reach::Nothing,
        &[],
    ),
    spec(
        "4k/restore/restore_to_entry_ms",
        "exec to first KVM_RUN, restored",
        "ms",
        Reach::AtMost(3.65),
        &[],
    ),
    spec(
        "4k/restore/restore_vmm_kib",
        "memory of the VMM, restored",
        "KiB",
        Reach::Nothing,
        &[],
    ),
    spec(
        "4k/restore/restore_clone_kib",
        "20 guests of a snapshot: each, beside what it wrote",
        "KiB",
        Reach::AtMost(1024.0),
        &[],
    ),
    spec(
        "4k/restore/restore_faults",
        "stage-2 faults in 2 s, restored",
        "",
        Reach::Nothing,
        &[],
    ),
];
