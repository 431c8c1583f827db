//! KVM: what all architectures share, and the one place that knows which architecture this binary
//! is for.

use anyhow::Result;
use armlet_arch::Arch;

mod arch;
pub mod burst;
#[cfg(feature = "gdb")]
pub mod debug;
pub mod facts;
pub mod internal;
#[cfg(test)]
mod interrupted;
pub mod interrupts;
pub mod kick;
pub mod msi;
pub mod offers;
pub mod open;
pub mod page;
pub mod stats;
#[cfg(feature = "gdb")]
mod stops;

pub use arch::{Depth, Hypercall, KvmArch, OtherCalls, PortAccess, RawExit};

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
use aarch64::clean_to_memory;
#[cfg(all(target_arch = "aarch64", feature = "gdb"))]
use aarch64::debug as host_debug;
#[cfg(target_arch = "aarch64")]
pub use armlet_arch::aarch64::Aarch64 as HostArch;
#[cfg(target_arch = "x86_64")]
pub use armlet_arch::x86_64::X86_64 as HostArch;
#[cfg(target_arch = "x86_64")]
use x86_64::clean_to_memory;
#[cfg(all(target_arch = "x86_64", feature = "gdb"))]
use x86_64::debug as host_debug;

/// Probes this host for the plan of an aarch64 guest.
///
/// # Errors
/// When the host has another architecture, or no KVM.
#[cfg(target_arch = "aarch64")]
pub fn aarch64_host() -> Result<<HostArch as Arch>::Host> {
    HostArch::probe(&open::open()?, Depth::Full)
}

/// Probes this host for the plan of an x86_64 guest.
///
/// # Errors
/// When the host has another architecture, or no KVM.
#[cfg(target_arch = "x86_64")]
pub fn x86_64_host() -> Result<<HostArch as Arch>::Host> {
    HostArch::probe(&open::open()?, Depth::Full)
}

/// This host, as a plan for an aarch64 guest wants to know it: it is none.
///
/// # Errors
/// Always.
#[cfg(not(target_arch = "aarch64"))]
pub fn aarch64_host() -> Result<armlet_arch::aarch64::Host> {
    anyhow::bail!("--host this: this is no ARM64 host; name a board, or leave --host out")
}

/// This host, as a plan for an x86_64 guest wants to know it: it is none.
///
/// # Errors
/// Always.
#[cfg(not(target_arch = "x86_64"))]
pub fn x86_64_host() -> Result<<armlet_arch::x86_64::X86_64 as Arch>::Host> {
    anyhow::bail!("--host this: this is no x86_64 host; name a board, or leave --host out")
}
