//! The facts about an x86_64 host that planning needs, as plain data.

use serde::Serialize;

/// What KVM/x86 offers on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Host {
    /// Most guest-physical address bits: CPUID 0x8000_0008 as KVM_GET_SUPPORTED_CPUID gives it,
    /// EAX bits 23:16 where they are not 0, else bits 7:0 (arch/x86/kvm/cpuid.c).
    pub phys_bits: u8,
    /// Most vCPUs in one VM (KVM_CAP_MAX_VCPUS).
    pub max_vcpus: u32,
    /// CPUID 0x4000_0001 EAX, as KVM_GET_SUPPORTED_CPUID gives it.
    pub paravirtual: u32,
    /// Whether the local APIC's timer can have a deadline in TSC ticks
    /// (KVM_CAP_TSC_DEADLINE_TIMER).
    pub tsc_deadline: bool,
    /// Whether the VMM can emulate the I/O APIC, and APIC IDs have 32 bits (KVM_CAP_SPLIT_IRQCHIP,
    /// KVM_CAP_X2APIC_API).
    pub wide_apic_ids: bool,
    /// The exits that can be disabled (KVM_CAP_X86_DISABLE_EXITS).
    pub exits_off: u32,
}
