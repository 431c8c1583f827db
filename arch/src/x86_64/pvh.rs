//! What an ELF kernel reads at its start: `struct hvm_start_info` with its modules and its memory
//! map (include/xen/interface/hvm/start_info.h; Documentation/arch/x86, "PVH").

use super::boot::{CMDLINE, ZERO_PAGE};
use super::{X86_64, acpi};
use crate::Range;
use crate::plan::Layout;

const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;
/// Offsets in the page: the list of modules and the memory map stand behind the structure.
const MODULES: u64 = 0x40;
const MAP: u64 = 0x80;
/// Bytes of an entry of the memory map.
const MAP_ENTRY: u64 = 24;
/// Most entries that fit on the page.
pub(super) const MAP_MAX: usize = ((0x1000 - MAP) / MAP_ENTRY) as usize;
/// XEN_HVM_MEMMAP_TYPE_RAM.
const RAM: u32 = 1;

/// The structure, with `map` as the guest's RAM.
pub(super) fn start_info(layout: &Layout<X86_64>, map: &[Range]) -> Vec<u8> {
    let mut page = Vec::new();
    let initrd = layout.payload.initrd;
    let module = ZERO_PAGE + MODULES;
    let words = [
        MAGIC,
        VERSION,
        // Flags.
        0,
        u32::from(initrd.is_some()),
    ];
    page.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    let addresses = [module, CMDLINE, acpi::TABLES, ZERO_PAGE + MAP];
    page.extend(addresses.iter().flat_map(|address| address.to_le_bytes()));
    page.extend((map.len() as u32).to_le_bytes());
    page.resize(MODULES as usize, 0);
    if let Some(initrd) = initrd {
        // Address, size, command line, reserved.
        let entry = [initrd.start(), initrd.size(), 0, 0];
        page.extend(entry.iter().flat_map(|word| word.to_le_bytes()));
    }
    page.resize(MAP as usize, 0);
    for range in map {
        page.extend(range.start().to_le_bytes());
        page.extend(range.size().to_le_bytes());
        page.extend(u64::from(RAM).to_le_bytes());
    }
    page
}
