//! Addresses of what guest memory holds below 1 MiB at the start:
//!
//! ```text
//! 0x1000   zero page or start info, 4 KiB
//! 0x2000   GDT
//! 0x3000   page tables, 24 KiB
//! 0x10000  command line, up to 0x90000
//! 0xa0000  video memory and ROMs of a PC: never given to the guest as RAM
//! 0xde000  VMGenID and VMClock, 4 KiB each
//! 0xe0000  ACPI tables
//! 0xffff0  code that resets
//! 1 MiB    kernel, mostly at 16 MiB; the initrd ends where the bank does
//! ```

/// The zero page's address. The first page is left free: the kernel looks there for the BIOS data
/// area (arch/x86/boot/compressed/pgtable_64.c: find_trampoline_placement).
pub const ZERO_PAGE: u64 = 0x1000;

/// The GDT's address.
pub const GDT_BASE: u64 = 0x2000;

/// The first page table's address.
pub const PAGE_TABLES: u64 = 0x3000;

/// The command line's address.
pub const CMDLINE: u64 = 0x1_0000;

/// Bytes kept for the command line and its NUL. Linux takes 2048
/// (arch/x86/include/asm/setup.h: COMMAND_LINE_SIZE); what lies above is for its trampoline.
pub const CMDLINE_ROOM: u64 = 0x8_0000;

/// Video memory and ROMs of a PC: Linux does not use RAM from here to [`HIGH_RAM`]
/// (arch/x86/include/asm/e820/types.h: BIOS_BEGIN, BIOS_END).
pub(super) const LEGACY_HOLE: u64 = 0xa_0000;

/// The start of high memory, which holds kernel and initrd; below are the structures that the VMM
/// writes, and the legacy hole.
pub(super) const HIGH_RAM: u64 = 0x10_0000;

/// The page of VMGenID. As that of VMClock, it lies where no memory map has RAM, and no page that is
/// mapped uncached (Microsoft, Virtual Machine Generation ID; UAPI.13 VMClock, section "Discovery via
/// ACPI").
pub(super) const GENERATION_ID: u64 = 0xd_e000;

/// The page of VMClock.
pub(super) const VM_CLOCK: u64 = 0xd_f000;

/// The ACPI tables' address: the RSDP is looked for here (ACPI 6.5, section 5.2.5.1).
pub(super) const ACPI_TABLES: u64 = 0xe_0000;

/// Where a PC's firmware begins after a reset. Linux jumps there, in real mode, to reset a
/// hardware-reduced machine, because it assumes that such a machine has EFI
/// (arch/x86/kernel/reboot.c: reboot_init, machine_real_restart).
pub(super) const RESET_VECTOR: u64 = 0xf_fff0;

/// Bytes of a page.
pub(super) const PAGE: u64 = 0x1000;

/// The size of the identity-mapped memory, in which kernel, zero page and command line must lie.
pub(super) const MAPPED: u64 = 4 << 30;
