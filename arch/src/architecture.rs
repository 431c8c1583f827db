//! The instruction sets that guests run.

use serde::{Deserialize, Serialize};
use std::fmt;

/// An instruction set that guests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// ARM, 64 bits.
    Aarch64,
    /// Intel and AMD, 64 bits.
    X86_64,
}

impl Architecture {
    /// Returns the term for its shared interrupts, and their number. aarch64: KVM takes at most 992
    /// interrupts, 32 of them private (arch/arm64/kvm/vgic/vgic-kvm-device.c:
    /// vgic_set_common_attr). x86_64: the pins of an I/O APIC (82093AA datasheet, section 2.4).
    #[must_use]
    pub const fn interrupts(self) -> (&'static str, u32) {
        match self {
            Architecture::Aarch64 => ("SPI", 960),
            Architecture::X86_64 => ("GSI", 24),
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Architecture::Aarch64 => "aarch64",
            Architecture::X86_64 => "x86_64",
        })
    }
}
