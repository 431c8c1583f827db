//! The initial state of the boot CPU: its registers, descriptors and page tables.

use super::Boot;
use super::low_memory::{GDT_BASE, MAPPED, PAGE, PAGE_TABLES};
use crate::image::X86Kernel;
use crate::machine::Payload;

/// The selector of the boot CPU's code segment (boot.rst: __BOOT_CS).
pub const BOOT_CS: u16 = 0x10;

/// The selector of its data segments (boot.rst: __BOOT_DS).
pub const BOOT_DS: u16 = 0x18;

/// The descriptors, by selector / 8 (Intel SDM volume 3, section 3.4.5): flat segments of
/// ring 0, marked as accessed.
pub const GDT: [u64; 4] = [
    0,
    0,
    CODE_64,
    // Read and write, 32-bit stack (B), 4 KiB units (G).
    0x00cf_9300_0000_ffff,
];

/// Execute and read, 64-bit code (L), 4 KiB units (G).
pub(super) const CODE_64: u64 = 0x00af_9b00_0000_ffff;

/// Execute and read, 32-bit code (D), 4 KiB units (G).
pub(super) const CODE_32: u64 = 0x00cf_9b00_0000_ffff;

/// Returns the registers of the boot CPU.
pub(super) fn registers(payload: &Payload, kernel: Option<&X86Kernel>) -> Boot {
    let long_mode = Boot {
        rip: payload.entry,
        rsi: payload.info,
        rbx: 0,
        rflags: 1 << 1,
        // PE, ET, PG; PAE; LME, LMA (Intel SDM volume 3, sections 2.2.1 and 2.5).
        cr0: 1 << 31 | 1 << 4 | 1,
        cr3: PAGE_TABLES,
        cr4: 1 << 5,
        efer: 1 << 10 | 1 << 8,
        gdt_base: GDT_BASE,
        gdt_limit: size_of_val(&GDT) as u16 - 1,
        code: CODE_64,
        data: GDT[usize::from(BOOT_DS / 8)],
    };
    match kernel {
        Some(X86Kernel::Elf(_)) => Boot {
            rsi: 0,
            rbx: payload.info,
            cr0: 1 << 4 | 1,
            cr3: 0,
            cr4: 0,
            efer: 0,
            code: CODE_32,
            ..long_mode
        },
        _ => long_mode,
    }
}

/// Returns four-level page tables that identity-map the first 4 GiB with 2 MiB pages, which every
/// x86_64 CPU supports (Intel SDM volume 3, section 4.5): a PML4, a page-directory-pointer table,
/// four directories.
pub(super) fn page_tables() -> Vec<u8> {
    /// Present, writable.
    const TABLE: u64 = 0b11;
    /// Present, writable, a page of 2 MiB.
    const LEAF: u64 = 0b1000_0011;
    let table = |index: u64| (PAGE_TABLES + index * PAGE) | TABLE;
    let mut entries = vec![0_u64; 1024];
    entries[0] = table(1);
    for directory in 0..4 {
        entries[512 + directory] = table(2 + directory as u64);
    }
    entries.extend((0..MAPPED >> 21).map(|page| page << 21 | LEAF));
    entries
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect()
}

/// Returns the GDT's bytes, with `code` as the descriptor of the code segment.
pub(super) fn gdt(code: u64) -> Vec<u8> {
    let mut gdt = GDT;
    gdt[usize::from(BOOT_CS / 8)] = code;
    gdt.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}
