//! The facts about an ARM64 host that planning needs, as plain data.

use serde::{Deserialize, Serialize};

/// What KVM/arm64 offers on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Host {
    /// Most IPA bits (KVM_CAP_ARM_VM_IPA_SIZE); `None` for a KVM without that capability (before
    /// Linux 4.20), which gives 40 bits and only 40.
    pub ipa_limit: Option<u8>,
    /// Page size in bytes, stage 2's granule.
    pub page_size: u64,
    /// Whether KVM emulates GICv2.
    pub gic_v2: bool,
    /// Whether KVM emulates GICv3.
    pub gic_v3: bool,
    /// Most vCPUs in one VM (KVM_CAP_MAX_VCPUS).
    pub max_vcpus: u32,
    /// Page sizes in bytes that the CPUs translate for guests
    /// (ID_AA64MMFR0_EL1.TGRAN4, TGRAN16, TGRAN64).
    pub guest_pages: Vec<u64>,
    /// The optional features that it offers.
    pub offered: Offered,
}

/// The optional features that KVM offers on a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offered {
    /// Performance counters: PMUv3 (KVM_CAP_ARM_PMU_V3).
    pub pmu: bool,
    /// Scalable vectors: SVE (KVM_CAP_ARM_SVE).
    pub sve: bool,
    /// Pointer authentication, of addresses and generic (KVM_CAP_ARM_PTRAUTH_ADDRESS, _GENERIC).
    pub pauth: bool,
    /// Stolen time (KVM_CAP_STEAL_TIME).
    pub steal_time: bool,
}
