//! Placement of kernel and initrd, and what the kernel reads at its start: zero page, command line,
//! GDT and page tables (Documentation/arch/x86/boot.rst, section "64-bit Boot Protocol"). An ELF
//! kernel begins in 32-bit mode and reads a start info in place of the zero page.

use super::low_memory::{
    CMDLINE, CMDLINE_ROOM, GDT_BASE, HIGH_RAM, MAPPED, PAGE, PAGE_TABLES, RESET_VECTOR, ZERO_PAGE,
};
use super::zero_page::initrd_limit;
use super::{Vcpu, X86_64, acpi, cpu, pvh, zero_page};
use crate::arch::{Layout, Request};
use crate::board::PortKind;
use crate::error::PlanError;
use crate::image::{X86BzImage, X86Elf, X86Kernel};
use crate::machine::{Blob, Payload};
use crate::range::{Range, align_up};
use crate::size::show_size;

/// Bytes from the load address to the 64-bit entry (boot.rst).
const ENTRY: u64 = 0x200;

/// Places the kernel at its preferred address, and the initrd as high as allowed in the bank at 0,
/// out of the way of the kernel, which unpacks itself upwards.
pub(super) fn place(ram: &[Range], request: &Request<X86_64>) -> Result<Payload, PlanError> {
    let bank = first_bank(ram)?;
    let kernel = request.kernel.as_ref().map(kernel_range).transpose()?;
    let initrd_size = request.initrd.filter(|size| *size > 0);
    let floor = kernel.map_or(HIGH_RAM, Range::end);
    let limit = match (initrd_size, &request.kernel) {
        (Some(_), Some(X86Kernel::Bz(image))) => initrd_limit(image),
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
            Some(X86Kernel::Elf(elf)) => elf.entry,
            _ => kernel.map_or(HIGH_RAM, Range::start) + ENTRY,
        },
        initrd,
        info: ZERO_PAGE,
    })
}

/// Returns the zero page and the structures that go with it.
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
    let mut blobs = match &request.kernel {
        Some(X86Kernel::Elf(_)) => {
            let map = zero_page::usable(&layout.ram, pvh::MAP_MAX)?;
            vec![
                blob("start info", ZERO_PAGE, pvh::start_info(layout, &map)),
                blob("GDT", GDT_BASE, cpu::gdt(cpu::CODE_32)),
            ]
        }
        _ => vec![
            blob(
                "zero page",
                ZERO_PAGE,
                zero_page::zero_page(layout, request)?,
            ),
            blob("GDT", GDT_BASE, cpu::gdt(cpu::CODE_64)),
            blob("page tables", PAGE_TABLES, cpu::page_tables()),
        ],
    };
    blobs.push(blob("command line", CMDLINE, cmdline(request)?));
    blobs.push(acpi::tables(layout, vcpus)?);
    blobs.extend(reset_code(layout).map(|code| blob("reset code", RESET_VECTOR, code)));
    Ok(blobs)
}

/// Returns real-mode code that resets the machine, if it has a reset register: MOV DX, port; MOV
/// AL, value; OUT DX, AL; HLT; JMP to HLT.
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

/// Returns the bank that everything is loaded into.
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

fn kernel_range(kernel: &X86Kernel) -> Result<Range, PlanError> {
    match kernel {
        X86Kernel::Bz(image) => bz_range(image),
        X86Kernel::Elf(elf) => elf_range(elf),
    }
}

/// Returns the range of an ELF kernel, which is loaded where its file says.
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

/// Returns the memory that the kernel needs from its load address on (boot.rst: init_size).
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

/// The command line limit of a kernel that does not state one (arch/x86/include/asm/setup.h:
/// COMMAND_LINE_SIZE, less the NUL).
const ELF_CMDLINE: u64 = 2047;

fn cmdline(request: &Request<X86_64>) -> Result<Vec<u8>, PlanError> {
    let kernel = match &request.kernel {
        Some(X86Kernel::Bz(image)) => u64::from(image.cmdline_size),
        Some(X86Kernel::Elf(_)) => ELF_CMDLINE,
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
mod tests;
