//! The boot information of an ELF kernel: `struct hvm_start_info` with its modules and its memory
//! map (include/xen/interface/hvm/start_info.h; Documentation/arch/x86, "PVH").

use super::X86_64;
use super::low_memory::{ACPI_TABLES, CMDLINE, ZERO_PAGE};
use crate::arch::Layout;
use crate::range::Range;

const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;
/// Offsets in the page: the list of modules and the memory map follow the structure.
const MODULES: u64 = 0x40;
const MAP: u64 = 0x80;
/// Bytes of an entry of the memory map.
const MAP_ENTRY: u64 = 24;
/// Most entries that fit on the page.
pub(super) const MAP_MAX: usize = ((0x1000 - MAP) / MAP_ENTRY) as usize;
/// XEN_HVM_MEMMAP_TYPE_RAM.
const RAM: u32 = 1;

/// Returns the page, with `map` as the guest's RAM.
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
    let addresses = [module, CMDLINE, ACPI_TABLES, ZERO_PAGE + MAP];
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

#[cfg(test)]
mod tests {
    use crate::image::{X86Elf, X86Kernel};
    use crate::x86_64::{Boot, X86_64};
    use crate::{Arch, Board, Plan, PlanError, Range, Request, plan};

    const PC: &str = include_str!("../../../boards/pc.toml");

    fn planned(memory: u64, initrd: Option<u64>) -> Result<Plan<X86_64>, PlanError> {
        let file = crate::image::elf::tests::vmlinux(0x100_0010);
        let mut elf = X86Elf::parse(&file).expect("a kernel");
        let notes = elf.notes.start as usize..elf.notes.end as usize;
        elf.find_entry(&file[notes]).expect("an entry");
        let board = Board::parse(PC).expect("valid");
        let request = Request {
            kernel: Some(X86Kernel::Elf(elf)),
            initrd,
            cmdline: "quiet".to_owned(),
            ..crate::x86_64::plan::tests::request(memory)
        };
        plan(&board, &request, &X86_64::assumed_host(&board))
    }

    #[test]
    fn an_elf_kernel_gets_a_start_info() {
        let plan = planned(4 << 30, Some(0x1234)).expect("fits");
        let payload = &plan.layout.payload;
        assert_eq!(payload.kernel, Range::new(0x100_0000, 0x2800));
        let initrd = payload.initrd.expect("an initrd");
        assert_eq!(initrd.end(), (3 << 30) - 0x1000 + 0x234);
        let blob = &plan.blobs[0];
        assert_eq!((blob.name, blob.address), ("start info", 0x1000));
        let words = |at: usize| u64::from_le_bytes(blob.bytes[at..at + 8].try_into().expect("8"));
        // Magic and version, flags and modules, the list of modules, command line, RSDP, map.
        let expected = [
            0x1_336e_c578,
            1 << 32,
            0x1040,
            0x1_0000,
            0xe_0000,
            0x1080,
            3,
        ];
        for (index, expected) in expected.into_iter().enumerate() {
            assert_eq!(words(8 * index), expected, "word {index}");
        }
        assert_eq!((words(0x40), words(0x48)), (initrd.start(), 0x1234));
        let map: Vec<_> = (0..3)
            .map(|entry| {
                let at = 0x80 + 24 * entry;
                (words(at), words(at + 8), words(at + 16))
            })
            .collect();
        let (gib, mib) = (1_u64 << 30, 1_u64 << 20);
        let expected = [(0, 0xa_0000, 1), (mib, 3 * gib - mib, 1), (4 * gib, gib, 1)];
        assert_eq!(map, expected);
    }

    #[test]
    fn it_begins_in_protected_mode() {
        let plan = planned(512 << 20, None).expect("fits");
        let Some(Boot {
            rip,
            rbx,
            cr0,
            efer,
            code,
            ..
        }) = plan.vcpus[0].boot
        else {
            panic!("no boot CPU");
        };
        assert_eq!((rip, rbx, cr0, efer), (0x100_0010, 0x1000, 0x11, 0));
        assert_eq!(code, 0x00cf_9b00_0000_ffff);
        let gdt = plan.blobs.iter().find(|blob| blob.name == "GDT");
        assert_eq!(gdt.expect("a GDT").bytes[16..24], code.to_le_bytes());
    }

    #[test]
    fn memory_that_does_not_hold_it_is_refused() {
        let error = planned(16 << 20, None).expect_err("small").to_string();
        assert!(
            error.contains("the kernel takes 10240 bytes from 0x1000000; use --memory 17M or more"),
            "{error}"
        );
    }
}
