//! x86_64 guests.

mod acpi;
pub mod boot;
pub mod cpu;
pub mod debug;
pub mod features;
mod host;
pub mod low_memory;
pub mod phys;
mod plan;
mod pvh;
mod zero_page;

pub use host::Host;
pub use plan::{IOAPIC_VCPUS, MAX_VCPUS};

use crate::range::Range;
use serde::Serialize;

/// x86_64 as an [`Arch`](crate::Arch).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct X86_64;

/// The interrupt controllers, at fixed places.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Irqchip {
    /// The I/O APIC, 4 KiB.
    pub ioapic: Range,
    /// The local APICs, 4 KiB: each vCPU sees its own there.
    pub lapic: Range,
    /// Whether the VMM emulates the I/O APIC instead of KVM, and delivers interrupts as MSIs, which
    /// have more destination bits.
    pub messages: bool,
    /// KVM's page table for real mode, 4 KiB.
    pub identity_map: Range,
    /// KVM's task state for real mode, 12 KiB.
    pub task_state: Range,
}

/// A vCPU before its first instruction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Vcpu {
    /// Its APIC ID: KVM uses the vCPU's ID (arch/x86/kvm/lapic.c: kvm_lapic_reset).
    pub apic_id: u32,
    /// The boot CPU's initial registers; the others wait for INIT and SIPI.
    pub boot: Option<Boot>,
}

/// Registers of the boot CPU: long mode with paging (Documentation/arch/x86/boot.rst, section
/// "64-bit Boot Protocol"), or for an ELF kernel protected mode without. Interrupts are off. CS is
/// [`cpu::BOOT_CS`], the other segments are [`cpu::BOOT_DS`]. Further registers are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Boot {
    /// The kernel's entry.
    pub rip: u64,
    /// The zero page's address, for a bzImage.
    pub rsi: u64,
    /// The start info's address, for an ELF kernel.
    pub rbx: u64,
    /// Bit 1 reads as 1; IF is clear.
    pub rflags: u64,
    /// PE and ET; in long mode PG.
    pub cr0: u64,
    /// The first page table's address, in long mode.
    pub cr3: u64,
    /// In long mode PAE.
    pub cr4: u64,
    /// In long mode LME and LMA.
    pub efer: u64,
    /// GDTR: the table's address.
    pub gdt_base: u64,
    /// GDTR: the table's last byte.
    pub gdt_limit: u16,
    /// The code segment's descriptor.
    pub code: u64,
    /// The data segments' descriptor.
    pub data: u64,
}
