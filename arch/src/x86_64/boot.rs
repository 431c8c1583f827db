//! Kernel, initrd and what the kernel reads at its start: zero page, command line, GDT and page
//! tables (Documentation/arch/x86/boot.rst, section "64-bit Boot Protocol"; zero-page.rst). An ELF
//! kernel begins in 32-bit mode and reads a start info in place of the zero page.
//!
//! ```text
//! 0x1000   zero page or start info, 4 KiB
//! 0x2000   GDT
//! 0x3000   page tables, 24 KiB
//! 0x10000  command line, up to 0x90000
//! 0xa0000  video memory and ROMs of a PC: never given to the guest as RAM
//! 0xe0000  ACPI tables
//! 0xffff0  code that resets
//! 1 MiB    kernel, mostly at 16 MiB; the initrd ends where the bank does
//! ```

use super::{Boot, Kernel, Vcpu, X86_64, acpi, pvh};
use crate::Range;
use crate::board::PortKind;
use crate::elf::X86Elf;
use crate::image::X86BzImage;
use crate::plan::{Blob, Layout, Payload, PlanError, Request};
use crate::range::align_up;
use crate::size::show_size;

/// The zero page's address. The first page is left alone: the kernel looks there for what a BIOS
/// keeps (arch/x86/boot/compressed/pgtable_64.c: find_trampoline_placement).
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
const CODE_64: u64 = 0x00af_9b00_0000_ffff;
/// Execute and read, 32-bit code (D), 4 KiB units (G).
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;

const PAGE: u64 = 0x1000;
/// What the page tables map, one to one: the kernel, the zero page and the command line lie there.
const MAPPED: u64 = 4 << 30;
/// Below it lies what the VMM writes, and the legacy hole; kernel and initrd lie above.
const HIGH_RAM: u64 = 0x10_0000;
/// Where a PC's firmware begins after a reset. Linux jumps there, in real mode, to reset a
/// hardware-reduced machine, for it takes such a one to have EFI (arch/x86/kernel/reboot.c:
/// reboot_init, machine_real_restart).
pub(super) const RESET_VECTOR: u64 = 0xf_fff0;

/// Video memory and ROMs of a PC: Linux expects no RAM from here to [`HIGH_RAM`]
/// (arch/x86/include/asm/e820/types.h: BIOS_BEGIN, BIOS_END).
const LEGACY_HOLE: u64 = 0xa_0000;
/// Bytes from the load address to the 64-bit entry (boot.rst).
const ENTRY: u64 = 0x200;

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

/// A boot loader without a number of its own (boot.rst: type_of_loader).
const LOADER_UNDEFINED: u8 = 0xff;
/// Most entries of the zero page's memory map (bootparam.h: E820_MAX_ENTRIES_ZEROPAGE).
const E820_MAX: usize = 128;
/// Usable memory (arch/x86/include/asm/e820/types.h: E820_TYPE_RAM).
const E820_RAM: u32 = 1;

/// Kernel where it prefers to lie, initrd as high as it may in the bank at 0: there it is out of
/// the way of the kernel, which unpacks itself upwards.
pub(super) fn place(ram: &[Range], request: &Request<X86_64>) -> Result<Payload, PlanError> {
    let bank = first_bank(ram)?;
    let kernel = request.kernel.as_ref().map(kernel_range).transpose()?;
    let initrd_size = request.initrd.filter(|size| *size > 0);
    let floor = kernel.map_or(HIGH_RAM, Range::end);
    let limit = match (initrd_size, &request.kernel) {
        (Some(_), Some(Kernel::Bz(image))) => initrd_limit(image),
        _ => MAPPED,
    };
    // The arithmetic saturates: an initrd may claim any size.
    let pages = |bytes| align_up(bytes, PAGE).unwrap_or(u64::MAX);
    let need = pages(floor).saturating_add(pages(initrd_size.unwrap_or(0)));
    if need > limit.min(bank.size()) {
        return Err(no_room(ram, need, limit, kernel, initrd_size));
    }
    let initrd = initrd_size.and_then(|size| {
        let start = (bank.end().min(limit) - size) / PAGE * PAGE;
        Range::new(start, size)
    });
    Ok(Payload {
        kernel,
        entry: match &request.kernel {
            Some(Kernel::Elf(elf)) => elf.entry,
            _ => kernel.map_or(HIGH_RAM, Range::start) + ENTRY,
        },
        initrd,
        info: ZERO_PAGE,
    })
}

/// The registers of the boot CPU.
pub(super) fn registers(payload: &Payload, kernel: Option<&Kernel>) -> Boot {
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
        Some(Kernel::Elf(_)) => Boot {
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

/// The zero page and what it needs around it.
pub(super) fn blobs(
    layout: &Layout<X86_64>,
    vcpus: &[Vcpu],
    request: &Request<X86_64>,
) -> Result<Vec<Blob>, PlanError> {
    let blob = |name, address, bytes| Blob {
        name,
        address,
        bytes,
    };
    let gdt = |code| {
        let mut gdt = GDT;
        gdt[usize::from(BOOT_CS / 8)] = code;
        gdt.iter().flat_map(|entry| entry.to_le_bytes()).collect()
    };
    let mut blobs = match &request.kernel {
        Some(Kernel::Elf(_)) => {
            let map = usable(&layout.ram, pvh::MAP_MAX)?;
            vec![
                blob("start info", ZERO_PAGE, pvh::start_info(layout, &map)),
                blob("GDT", GDT_BASE, gdt(CODE_32)),
            ]
        }
        _ => vec![
            blob("zero page", ZERO_PAGE, zero_page(layout, request)?),
            blob("GDT", GDT_BASE, gdt(CODE_64)),
            blob("page tables", PAGE_TABLES, page_tables()),
        ],
    };
    blobs.push(blob("command line", CMDLINE, cmdline(request)?));
    blobs.push(acpi::tables(layout, vcpus)?);
    blobs.extend(reset_code(layout).map(|code| blob("reset code", RESET_VECTOR, code)));
    Ok(blobs)
}

/// Instructions of real mode that reset the machine, where it has a register for that: MOV DX, port;
/// MOV AL, value; OUT DX, AL; HLT; JMP to it.
fn reset_code(layout: &Layout<X86_64>) -> Option<Vec<u8>> {
    let mut ports = layout.ports.iter();
    let register = ports.find(|device| device.kind == PortKind::Reset)?;
    let [low, high, ..] = register.ports.start().to_le_bytes();
    Some(vec![
        0xba,
        low,
        high,
        0xb0,
        acpi::RESET,
        0xee,
        0xf4,
        0xeb,
        0xfd,
    ])
}

/// The bank that all is loaded to.
fn first_bank(ram: &[Range]) -> Result<Range, PlanError> {
    match ram.first() {
        None => Err(PlanError::NoMemory),
        Some(bank) if bank.start() == 0 => Ok(*bank),
        Some(bank) => Err(PlanError::BootProtocol(format!(
            "guest RAM begins at {:#x}, but an x86_64 guest starts in the first 1 MiB; give the board a bank with base = 0",
            bank.start()
        ))),
    }
}

fn kernel_range(kernel: &Kernel) -> Result<Range, PlanError> {
    match kernel {
        Kernel::Bz(image) => bz_range(image),
        Kernel::Elf(elf) => elf_range(elf),
    }
}

/// An ELF kernel lies where its file says.
fn elf_range(elf: &X86Elf) -> Result<Range, PlanError> {
    let memory = elf.memory();
    Range::new(memory.start, memory.end.saturating_sub(memory.start))
        .filter(|range| range.start() >= HIGH_RAM && range.last() < MAPPED)
        .ok_or_else(|| {
            PlanError::BootProtocol(format!(
                "the kernel lies at {:#x} to {:#x}, not between 1 MiB and 4 GiB; use another kernel",
                memory.start,
                memory.end.saturating_sub(1)
            ))
        })
}

/// What the kernel takes from its load address on (boot.rst: init_size).
fn bz_range(image: &X86BzImage) -> Result<Range, PlanError> {
    let wanted = image.pref_address;
    let start = match image.relocatable {
        true => align_up(wanted.max(HIGH_RAM), image.kernel_alignment),
        false => Some(wanted).filter(|start| *start >= HIGH_RAM),
    };
    let file = image.payload.end.saturating_sub(image.payload.start);
    let size = image.init_size.max(file);
    start
        .and_then(|start| Range::new(start, size))
        .filter(|range| range.last() < MAPPED)
        .ok_or_else(|| {
            PlanError::BootProtocol(format!(
                "the kernel takes {size} bytes from {wanted:#x}, which do not lie between 1 MiB and 4 GiB; use another kernel"
            ))
        })
}

/// The first address that the initrd must not reach, a multiple of the page size.
fn initrd_limit(image: &X86BzImage) -> u64 {
    let last = image
        .setup_header
        .get(offset::INITRD_ADDR_MAX - offset::HEADER..)
        .and_then(|rest| rest.first_chunk().copied())
        // For a header without the field (boot.rst: initrd_addr_max).
        .map_or(0x37ff_ffff, u32::from_le_bytes);
    (u64::from(last) + 1) / PAGE * PAGE
}

fn no_room(
    ram: &[Range],
    need: u64,
    limit: u64,
    kernel: Option<Range>,
    initrd: Option<u64>,
) -> PlanError {
    let mut parts = vec![format!("the boot data take {HIGH_RAM} bytes")];
    if let Some(kernel) = kernel {
        let (size, start) = (kernel.size(), kernel.start());
        parts.push(format!("the kernel takes {size} bytes from {start:#x}"));
    }
    if let Some(size) = initrd {
        parts.push(format!("the initrd {size}"));
    }
    let needs = parts.join(", ");
    let size = ram.first().map_or(0, |bank| bank.size());
    // More memory would go to the other banks.
    let full = ram.len() > 1;
    if need <= limit && !full {
        return PlanError::TooSmall {
            memory: show_size(size),
            needs,
            advice: show_size(align_up(need, 1 << 20).unwrap_or(u64::MAX)),
        };
    }
    let room = if full { limit.min(size) } else { limit };
    let advice = match initrd {
        Some(_) => "use a smaller initrd",
        None => "give the board's first bank more room",
    };
    PlanError::BootProtocol(format!(
        "{needs}, but the x86 boot protocol wants all below {room:#x} here; {advice}"
    ))
}

fn zero_page(layout: &Layout<X86_64>, request: &Request<X86_64>) -> Result<Vec<u8>, PlanError> {
    let mut page = vec![0; PAGE as usize];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    if let Some(Kernel::Bz(image)) = &request.kernel {
        let room = offset::HEADER_END - offset::HEADER;
        let header = &image.setup_header;
        put(offset::HEADER, &header[..header.len().min(room)]);
    }
    put(offset::ACPI_RSDP, &acpi::TABLES.to_le_bytes());
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

/// The memory map, if it fits into so many entries.
fn usable(ram: &[Range], most: usize) -> Result<Vec<Range>, PlanError> {
    let map = e820(ram);
    match map.len() {
        entries if entries > most => Err(PlanError::BootProtocol(format!(
            "the kernel's memory map holds {most} entries, this machine has {entries}; use a board with fewer banks"
        ))),
        _ => Ok(map),
    }
}

/// The RAM that the guest may use: all of it but the legacy hole.
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

/// Bytes of command line that a kernel takes which does not say (arch/x86/include/asm/setup.h:
/// COMMAND_LINE_SIZE, less the NUL).
const ELF_CMDLINE: u64 = 2047;

/// Four levels that map the first 4 GiB one to one by pages of 2 MiB, which every x86_64 CPU has
/// (Intel SDM volume 3, section 4.5): a PML4, a page-directory-pointer table, four directories.
fn page_tables() -> Vec<u8> {
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

fn cmdline(request: &Request<X86_64>) -> Result<Vec<u8>, PlanError> {
    let kernel = match &request.kernel {
        Some(Kernel::Bz(image)) => u64::from(image.cmdline_size),
        Some(Kernel::Elf(_)) => ELF_CMDLINE,
        None => u64::MAX,
    };
    let (most, who) = match kernel {
        0..CMDLINE_ROOM => (kernel, "this kernel takes"),
        _ => (CMDLINE_ROOM - 1, "there is room for"),
    };
    let mut bytes = request.cmdline.clone().into_bytes();
    if bytes.len() as u64 > most {
        return Err(PlanError::BootProtocol(format!(
            "the command line of {} bytes is longer than the {most} that {who}; use a shorter one",
            bytes.len()
        )));
    }
    bytes.push(0);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::parse_size;
    use crate::{Arch, Board, Plan};
    use proptest::prelude::*;

    const PC: &str = include_str!("../../../boards/pc.toml");
    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    /// The start of a bzImage with the figures of a Debian kernel: 16 MiB preferred, 2 MiB aligned,
    /// 32 MiB taken, initrd below 2 GiB.
    fn bz_head() -> Vec<u8> {
        let mut head = vec![0; 0x400];
        let mut put = |at: usize, value: &[u8]| head[at..at + value.len()].copy_from_slice(value);
        put(0x1ef, &[0xff]); // The sentinel, which must not reach the zero page.
        put(0x1f1, &[39]);
        put(0x1f4, &0x8_0000_u32.to_le_bytes());
        put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
        put(0x202, b"HdrS\x0f\x02");
        put(0x211, &[1]);
        put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
        put(0x230, &0x20_0000_u32.to_le_bytes());
        put(0x234, &[1, 21, 0x7f]);
        put(0x238, &2047_u32.to_le_bytes());
        put(0x258, &0x100_0000_u64.to_le_bytes());
        put(0x260, &0x200_0000_u32.to_le_bytes());
        head
    }

    fn kernel() -> X86BzImage {
        X86BzImage::parse(&bz_head()).expect("a bzImage")
    }

    fn request(memory: u64, initrd: Option<u64>) -> Request<X86_64> {
        Request {
            kernel: Some(Kernel::Bz(kernel())),
            initrd,
            ..crate::x86_64::tests::request(memory)
        }
    }

    fn pc() -> Board {
        Board::parse(PC).expect("valid")
    }

    fn plan_on(board: &Board, request: &Request<X86_64>) -> Result<Plan<X86_64>, PlanError> {
        crate::plan(board, request, &X86_64::assumed_host(board))
    }

    fn plan(request: &Request<X86_64>) -> Result<Plan<X86_64>, PlanError> {
        plan_on(&pc(), request)
    }

    fn range(start: u64, end: u64) -> Range {
        Range::new(start, end - start).expect("not empty")
    }

    /// The memory map as the guest reads it.
    fn read_e820(page: &[u8]) -> Vec<Range> {
        let number = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("8 bytes"));
        (0..usize::from(page[0x1e8]))
            .map(|index| 0x2d0 + 20 * index)
            .map(|at| {
                assert_eq!(page[at + 16..at + 20], [1, 0, 0, 0], "usable RAM");
                Range::new(number(at), number(at + 8)).expect("not empty")
            })
            .collect()
    }

    #[test]
    fn the_zero_page_byte_by_byte() {
        let plan = plan(&request(4 * GIB, Some(0x1234))).expect("fits");
        let head = bz_head();
        let mut page = vec![0; 4096];
        let mut put = |at: usize, value: &[u8]| page[at..at + value.len()].copy_from_slice(value);
        put(0x1f1, &head[0x1f1..0x26c]);
        put(0x210, &[0xff]);
        put(0x218, &[0x00, 0xe0, 0xff, 0x7f]);
        put(0x21c, &[0x34, 0x12]);
        put(0x228, &[0x00, 0x00, 0x01, 0x00]);
        put(0x1e8, &[3]);
        put(0x70, &0xe_0000_u64.to_le_bytes());
        for (index, (start, end)) in [(0, 0xa_0000), (MIB, 3 * GIB), (4 * GIB, 5 * GIB)]
            .into_iter()
            .enumerate()
        {
            let at = 0x2d0 + 20 * index;
            put(at, &u64::to_le_bytes(start));
            put(at + 8, &u64::to_le_bytes(end - start));
            put(at + 16, &[1, 0, 0, 0]);
        }
        let blob = &plan.blobs[0];
        assert_eq!(
            (blob.name, blob.address),
            ("zero page", plan.layout.payload.info)
        );
        assert_eq!(blob.bytes, page);
    }

    #[test]
    fn the_other_blobs() {
        let plan = plan(&request(64 * MIB, None)).expect("fits");
        let [_, gdt, tables, cmdline, _, reset] = plan.blobs.as_slice() else {
            panic!("six blobs")
        };
        assert_eq!(
            (reset.address, reset.bytes.as_slice()),
            (0xf_fff0, b"\xba\xf9\x0c\xb0\x06\xee\xf4\xeb\xfd".as_slice())
        );
        assert_eq!(
            (cmdline.address, cmdline.bytes.as_slice()),
            (0x1_0000, &b"console=ttyS0\0"[..])
        );
        assert_eq!(gdt.address, 0x2000);
        assert_eq!(gdt.bytes[..16], [0; 16]);
        assert_eq!(gdt.bytes[16..24], [0xff, 0xff, 0, 0, 0, 0x9b, 0xaf, 0]);
        assert_eq!(gdt.bytes[24..], [0xff, 0xff, 0, 0, 0, 0x93, 0xcf, 0]);
        assert_eq!(tables.address, 0x3000);
        assert_eq!(tables.bytes.len(), 6 * 4096);
        // Every 2 MiB page of the first 4 GiB, walked as the CPU does.
        let entry = |table: u64, index: u64| {
            let at = (table - 0x3000 + 8 * index) as usize;
            u64::from_le_bytes(tables.bytes[at..at + 8].try_into().expect("8 bytes"))
        };
        for address in (0..4 * GIB).step_by(2 << 20) {
            let mut table = 0x3000;
            for shift in [39, 30] {
                let found = entry(table, address >> shift & 511);
                assert_eq!(found & 0xfff, 3);
                table = found & !0xfff;
            }
            assert_eq!(entry(table, address >> 21 & 511), address | 0x83);
        }
        assert_eq!(entry(0x3000, 1), 0);
        assert_eq!(entry(0x4000, 4), 0);
    }

    #[test]
    fn the_kernel_lies_where_it_prefers() {
        let placed = plan(&request(512 * MIB, None))
            .expect("fits")
            .layout
            .payload;
        assert_eq!(placed.kernel, Some(range(16 * MIB, 48 * MIB)));
        assert_eq!((placed.entry, placed.info), (16 * MIB + 0x200, 0x1000));
        let mut low = request(512 * MIB, None);
        low.kernel = Some(Kernel::Bz(X86BzImage {
            pref_address: 0,
            ..kernel()
        }));
        let placed = plan(&low).expect("fits").layout.payload;
        assert_eq!(
            placed.kernel,
            Some(range(2 * MIB, 34 * MIB)),
            "aligned above 1 MiB"
        );
    }

    #[test]
    fn a_kernel_that_must_lie_elsewhere_is_refused() {
        for (pref_address, relocatable) in [(0x8_0000, false), (4 * GIB, false), (u64::MAX, true)] {
            let mut request = request(512 * MIB, None);
            request.kernel = Some(Kernel::Bz(X86BzImage {
                pref_address,
                relocatable,
                ..kernel()
            }));
            let error = plan(&request).expect_err("no place").to_string();
            assert!(
                error.contains(&format!("33554432 bytes from {pref_address:#x}")),
                "{error}"
            );
            assert!(error.contains("use another kernel"), "{error}");
        }
    }

    #[test]
    fn the_initrd_ends_with_the_bank_or_at_the_kernels_limit() {
        let initrd = |memory, size| {
            plan(&request(memory, Some(size)))
                .expect("fits")
                .layout
                .payload
                .initrd
        };
        assert_eq!(initrd(512 * MIB, MIB), Some(range(511 * MIB, 512 * MIB)));
        assert_eq!(initrd(3 * GIB, MIB), Some(range(2 * GIB - MIB, 2 * GIB)));
        assert_eq!(initrd(8 * GIB, MIB), Some(range(2 * GIB - MIB, 2 * GIB)));
        let start = 512 * MIB - 0x1000;
        assert_eq!(
            initrd(512 * MIB, 1),
            Some(range(start, start + 1)),
            "starts on a page"
        );
        assert_eq!(
            plan(&request(512 * MIB, Some(0)))
                .expect("fits")
                .layout
                .payload
                .initrd,
            None
        );
        // It may touch the kernel's end.
        assert_eq!(initrd(64 * MIB, 16 * MIB), Some(range(48 * MIB, 64 * MIB)));
    }

    #[test]
    fn memory_too_small_is_refused_with_what_would_do() {
        let error = |memory, initrd| {
            plan(&request(memory, initrd))
                .expect_err("small")
                .to_string()
        };
        assert_eq!(
            error(32 * MIB, None),
            "guest memory of 32M is too small: the boot data take 1048576 bytes, the kernel takes 33554432 bytes from 0x1000000; use --memory 48M or more"
        );
        assert_eq!(
            error(64 * MIB, Some(16 * MIB + 1)),
            "guest memory of 64M is too small: the boot data take 1048576 bytes, the kernel takes 33554432 bytes from 0x1000000, the initrd 16777217; use --memory 65M or more"
        );
        assert!(plan(&request(48 * MIB, None)).is_ok());
        assert!(plan(&request(65 * MIB, Some(16 * MIB + 1))).is_ok());
    }

    #[test]
    fn an_initrd_that_no_memory_holds_is_refused_as_such() {
        for (memory, size) in [
            (512 * MIB, 2 * GIB),
            (8 * GIB, 2 * GIB),
            (512 * MIB, u64::MAX),
        ] {
            let error = plan(&request(memory, Some(size)))
                .expect_err("large")
                .to_string();
            let expected = format!(
                "the boot data take 1048576 bytes, the kernel takes 33554432 bytes from 0x1000000, the initrd {size}, but the x86 boot protocol wants all below 0x80000000 here; use a smaller initrd"
            );
            assert_eq!(error, expected);
        }
    }

    #[test]
    fn a_board_without_ram_at_0_is_refused() {
        let board =
            Board::parse(&PC.replacen("base = 0\n", "base = 0x10_0000\n", 1)).expect("valid");
        let error = plan_on(&board, &request(512 * MIB, None)).expect_err("no RAM at 0");
        assert!(
            error.to_string().contains("guest RAM begins at 0x100000"),
            "{error}"
        );
    }

    #[test]
    fn the_command_line_is_held_to_the_kernels_limit() {
        let with = |length, kernel| {
            plan(&Request {
                cmdline: "x".repeat(length),
                kernel,
                ..request(512 * MIB, None)
            })
        };
        let kernel = || Some(Kernel::Bz(kernel()));
        assert!(with(2047, kernel()).is_ok());
        let error = with(2048, kernel()).expect_err("long").to_string();
        assert_eq!(
            error,
            "the command line of 2048 bytes is longer than the 2047 that this kernel takes; use a shorter one"
        );
        assert!(with(0x7_ffff, None).is_ok());
        let error = with(0x8_0000, None).expect_err("long").to_string();
        assert!(
            error.contains("524288 bytes is longer than the 524287"),
            "{error}"
        );
    }

    #[test]
    fn more_banks_than_the_map_holds_are_refused() {
        let mut text = PC.to_owned();
        for bank in 0..127 {
            let base = (64_u64 << 30) + bank * (2 << 20);
            text += &format!("\n[[memory]]\nbase = {base}\nsize = \"1M\"\n");
        }
        let board = Board::parse(&text).expect("valid");
        let error = plan_on(&board, &request(512 * MIB, None)).expect_err("too many");
        assert!(
            error
                .to_string()
                .contains("holds 128 entries, this machine has 129"),
            "{error}"
        );
    }

    /// Numbers of any magnitude.
    fn scaled() -> impl Strategy<Value = u64> {
        (any::<u64>(), 0_u32..64).prop_map(|(number, shift)| number >> shift)
    }

    prop_compose! {
        fn kernels()(
            pref_address in prop_oneof![Just(16 * MIB), scaled()],
            align in 0_u32..32,
            init_size in 1_u64..=GIB,
            file in scaled(),
            initrd_max in prop_oneof![Just(0x7fff_ffff_u32), any::<u32>()],
            relocatable: bool,
        ) -> X86BzImage {
            let mut image = kernel();
            image.setup_header[0x22c - 0x1f1..][..4].copy_from_slice(&initrd_max.to_le_bytes());
            X86BzImage {
                pref_address,
                kernel_alignment: 1 << align,
                init_size,
                payload: 0..file,
                relocatable,
                ..image
            }
        }
    }

    proptest! {
        #[test]
        fn the_memory_map_is_ram_without_the_hole(units in 16_u64..1_073_700_000) {
            let memory = units << 16;
            let plan = plan(&Request { kernel: None, ..request(memory, None) }).expect("fits");
            let map = read_e820(&plan.blobs[0].bytes);
            let hole = range(0xa_0000, 0x10_0000);
            prop_assert_eq!(map.iter().map(|range| range.size()).sum::<u64>(), memory - hole.size());
            for pair in map.windows(2) {
                prop_assert!(pair[0].last() < pair[1].start());
            }
            for range in map {
                prop_assert!(!range.overlaps(hole));
                prop_assert!(plan.layout.ram.iter().any(|bank| bank.contains(range)));
            }
        }

        #[test]
        fn nothing_overlaps_and_all_lies_in_ram(
            memory in scaled(),
            aligned in prop::bool::weighted(0.9),
            cpus in 0_u32..300,
            initrd in prop::option::of(scaled()),
            kernel in prop::option::weighted(0.9, kernels()),
            cmdline in "[ -~]{0,40}",
        ) {
            let memory = if aligned { memory & !0xffff } else { memory };
            let kernel = kernel.map(Kernel::Bz);
            let request = Request { cpus, kernel, cmdline, ..request(memory, initrd) };
            let plan = match plan(&request) {
                Ok(plan) => plan,
                Err(PlanError::TooSmall { advice, .. }) => {
                    // The advice works, unless the board's bank ends before.
                    let memory = parse_size(&advice).expect("a size");
                    let again = super::tests::plan(&Request { memory, ..request });
                    prop_assert!(again.is_ok() || memory > 3 * GIB, "{advice}: {again:?}");
                    return Ok(());
                }
                Err(error) => {
                    prop_assert!(!error.to_string().is_empty());
                    return Ok(());
                }
            };
            let payload = &plan.layout.payload;
            let mut ranges: Vec<Range> = plan
                .blobs
                .iter()
                .map(|blob| Range::new(blob.address, blob.bytes.len() as u64).expect("not empty"))
                .collect();
            for blob in &ranges {
                let tables = range(acpi::TABLES, HIGH_RAM);
                prop_assert!(blob.last() < CMDLINE + CMDLINE_ROOM || tables.contains(*blob));
            }
            ranges.extend(payload.kernel);
            ranges.extend(payload.initrd);
            ranges.sort();
            for pair in ranges.windows(2) {
                prop_assert!(!pair[0].overlaps(pair[1]), "{} {}", pair[0], pair[1]);
            }
            let usable = read_e820(&plan.blobs[0].bytes);
            for range in ranges {
                // The ROM of a PC, where the tables lie, is no usable RAM, but there is memory.
                let rom = range.start() >= acpi::TABLES && range.last() < HIGH_RAM;
                prop_assert!(rom || usable.iter().any(|ram| ram.contains(range)), "{range}");
                prop_assert!(range.last() < MAPPED);
            }
            if let (Some(initrd), Some(Kernel::Bz(image))) = (payload.initrd, &request.kernel) {
                prop_assert_eq!(Some(initrd.size()), request.initrd);
                prop_assert!(initrd.last() < initrd_limit(image));
            }
        }
    }
}
