//! The zero page, the boot information of a bzImage: a copy of its setup header, the command line,
//! the initrd and the memory map (Documentation/arch/x86/zero-page.rst).

use super::X86_64;
use super::low_memory::{ACPI_TABLES, CMDLINE, HIGH_RAM, LEGACY_HOLE, PAGE};
use crate::arch::{Layout, Request};
use crate::error::PlanError;
use crate::image::{X86BzImage, X86Kernel};
use crate::range::Range;

/// Most entries of the zero page's memory map (bootparam.h: E820_MAX_ENTRIES_ZEROPAGE).
const E820_MAX: usize = 128;

/// Usable memory (arch/x86/include/asm/e820/types.h: E820_TYPE_RAM).
const E820_RAM: u32 = 1;

/// A boot loader without an assigned ID (boot.rst: type_of_loader).
const LOADER_UNDEFINED: u8 = 0xff;

/// Returns the zero page (struct boot_params).
pub(super) fn zero_page(
    layout: &Layout<X86_64>,
    request: &Request<X86_64>,
) -> Result<Vec<u8>, PlanError> {
    let mut page = vec![0; PAGE as usize];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    if let Some(X86Kernel::Bz(image)) = &request.kernel {
        let room = offset::HEADER_END - offset::HEADER;
        let header = &image.setup_header;
        put(offset::HEADER, &header[..header.len().min(room)]);
    }
    put(offset::ACPI_RSDP, &ACPI_TABLES.to_le_bytes());
    put(offset::TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    put(offset::CMD_LINE_PTR, &(CMDLINE as u32).to_le_bytes());
    if let Some(initrd) = layout.payload.initrd {
        // Both fit: the initrd lies below 4 GiB.
        let (start, size) = (initrd.start() as u32, initrd.size() as u32);
        put(offset::RAMDISK_IMAGE, &start.to_le_bytes());
        put(offset::RAMDISK_SIZE, &size.to_le_bytes());
    }
    let map = usable(&layout.ram, E820_MAX)?;
    put(offset::E820_ENTRIES, &[map.len() as u8]);
    let entries: Vec<u8> = map
        .iter()
        .flat_map(|range| {
            let mut entry = [0; 20];
            entry[..8].copy_from_slice(&range.start().to_le_bytes());
            entry[8..16].copy_from_slice(&range.size().to_le_bytes());
            entry[16..].copy_from_slice(&E820_RAM.to_le_bytes());
            entry
        })
        .collect();
    put(offset::E820_TABLE, &entries);
    Ok(page)
}

/// Returns the memory map, if it fits into `most` entries.
pub(super) fn usable(ram: &[Range], most: usize) -> Result<Vec<Range>, PlanError> {
    let map = e820(ram);
    match map.len() {
        entries if entries > most => Err(PlanError::BootProtocol(format!(
            "the kernel's memory map holds {most} entries, this machine has {entries}; use a board with fewer banks"
        ))),
        _ => Ok(map),
    }
}

/// Returns the RAM that the guest may use: everything except the legacy hole.
fn e820(ram: &[Range]) -> Vec<Range> {
    ram.iter()
        .flat_map(|bank| {
            [
                (bank.start(), bank.last().min(LEGACY_HOLE - 1)),
                (bank.start().max(HIGH_RAM), bank.last()),
            ]
        })
        .filter_map(|(first, last)| Range::new(first, last.checked_sub(first)? + 1))
        .collect()
}

/// Offsets in the zero page (arch/x86/include/uapi/asm/bootparam.h: struct boot_params).
mod offset {
    /// `acpi_rsdp_addr`, u64.
    pub(super) const ACPI_RSDP: usize = 0x70;
    /// `e820_entries`, u8.
    pub(super) const E820_ENTRIES: usize = 0x1e8;
    /// `hdr`, the setup header.
    pub(super) const HEADER: usize = 0x1f1;
    /// `hdr.type_of_loader`, u8.
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    /// `hdr.ramdisk_image`, u32.
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    /// `hdr.ramdisk_size`, u32.
    pub(super) const RAMDISK_SIZE: usize = 0x21c;
    /// `hdr.cmd_line_ptr`, u32.
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    /// `hdr.initrd_addr_max`, u32.
    pub(super) const INITRD_ADDR_MAX: usize = 0x22c;
    /// Where the room for the setup header ends.
    pub(super) const HEADER_END: usize = 0x290;
    /// `e820_table`, entries of 20 bytes.
    pub(super) const E820_TABLE: usize = 0x2d0;
}

/// Returns the first address that the initrd must not reach, a multiple of the page size.
pub(super) fn initrd_limit(image: &X86BzImage) -> u64 {
    let last = image
        .setup_header
        .get(offset::INITRD_ADDR_MAX - offset::HEADER..)
        .and_then(|rest| rest.first_chunk().copied())
        // For a header without the field (boot.rst: initrd_addr_max).
        .map_or(0x37ff_ffff, u32::from_le_bytes);
    (u64::from(last) + 1) / PAGE * PAGE
}
