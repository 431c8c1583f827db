//! What KVM offers on a host, as plain data for `armlet probe`.

use super::offers::Offers;
use armlet_arch::{aarch64, x86_64};

/// What KVM offers, by architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Virtualization {
    /// KVM/arm64.
    Arm(ArmFacts),
    /// KVM on x86.
    X86(X86Facts),
}

/// What KVM/arm64 offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArmFacts {
    /// What planning needs.
    pub host: aarch64::Host,
    /// Whether it emulates an ITS (message-signalled interrupts).
    pub its: bool,
    /// Address bits of ID_AA64MMFR0_EL1.PARange as guests see it.
    pub pa_range: Option<u8>,
    /// Memory tagging.
    pub mte: bool,
    /// Guests with their own EL2.
    pub nested: bool,
    /// Whether feature ID registers can be written, so that guests see fewer features.
    pub writable_id_registers: bool,
    /// Whether the guest's PARange can be lowered to its machine's width.
    pub pa_range_writable: bool,
    /// What else KVM offers.
    pub offers: Offers,
}

/// What KVM on x86 offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct X86Facts {
    /// What planning needs.
    pub host: x86_64::Host,
    /// Whether guests' timers can fire without an exit.
    pub timers: ExitlessTimers,
    /// Whether the CPU has VMX or SVM.
    pub hardware: bool,
    /// What else KVM offers.
    pub offers: Offers,
}

/// What it takes for guests' timers to fire without an exit: the host's housekeeping CPUs run them
/// and post the interrupt (arch/x86/kvm/lapic.c: kvm_can_post_timer_interrupt).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitlessTimers {
    /// The module's parameter `pi_inject_timer`: on by default where CPUs are isolated.
    pub injected: bool,
    /// Interrupts can be posted: APICv or AVIC.
    pub posted: bool,
}

impl ExitlessTimers {
    /// Reads the modules' parameters.
    #[must_use]
    pub fn look() -> ExitlessTimers {
        let is_on = |path: &str| {
            let value = std::fs::read_to_string(format!("/sys/module/{path}"));
            value.is_ok_and(|value| matches!(value.trim(), "Y" | "1"))
        };
        ExitlessTimers {
            injected: is_on("kvm/parameters/pi_inject_timer"),
            posted: is_on("kvm_intel/parameters/enable_apicv") || is_on("kvm_amd/parameters/avic"),
        }
    }
}
