//! ACPI tables of a hardware-reduced PC (ACPI 6.5): RSDP, XSDT, FADT, MADT, DSDT, and MCFG where there is
//! PCI.
//!
//! Linux takes from them what it cannot discover otherwise: its CPUs, the interrupts of platform
//! devices, the registers that power off and reset the machine, and the power button.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, Equal, IO, If, Interrupt,
    Memory32Fixed, Method, Name, Notify, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::low_memory::{ACPI_TABLES, RESET_VECTOR};
use super::{Vcpu, X86_64};
use crate::arch::Layout;
use crate::board::PortKind;
use crate::error::PlanError;
use crate::machine::{Blob, DeviceKind, Placed, PlacedGeneration, PlacedPorts};

mod pci;

const OEM: [u8; 6] = *b"ARMLET";
const OEM_TABLE: [u8; 8] = *b"ARMLETPC";
const REVISION: u32 = 1;

/// FADT, IAPC_BOOT_ARCH (section 5.2.9.3): no VGA, no MSI (without PCI), no CMOS clock. The bits for other legacy
/// devices and for a keyboard controller stay clear, so that Linux does not probe them.
const NO_VGA: u16 = 1 << 2;
const NO_MSI: u16 = 1 << 3;
const NO_CMOS: u16 = 1 << 5;
/// The value of the reset control register that resets the machine (82801 datasheets, RST_CNT).
pub(super) const RESET: u8 = 0x06;
/// `\_S5`: the type of sleep that is soft off. The same as in `armlet_devices::power`.
const SLEEP_TYPE_OFF: u8 = 5;
/// The value of a device-specific notification: of a power button that it was pressed (section
/// 4.8.2.2.1.2), of VMGenID and VMClock that they have changed.
const CHANGED: u8 = 0x80;
const BUTTON: &str = "PWRB";
const VMGENID: &str = "VGEN";
const VMCLOCK: &str = "VCLK";

/// Returns the tables, as one blob.
pub(super) fn tables(layout: &Layout<X86_64>, vcpus: &[Vcpu]) -> Result<Blob, PlanError> {
    let mut bytes = vec![0; Rsdp::len().next_multiple_of(16)];
    let dsdt = append(&mut bytes, &dsdt(layout));
    let fadt = append(&mut bytes, &fadt(layout, dsdt));
    let madt = append(&mut bytes, &madt(layout, vcpus));
    let mut root = XSDT::new(OEM, OEM_TABLE, REVISION);
    root.add_entry(fadt);
    root.add_entry(madt);
    if let Some(placed) = &layout.pci {
        let mut mcfg = MCFG::new(OEM, OEM_TABLE, REVISION);
        pci::name_ecam(&mut mcfg, placed);
        root.add_entry(append(&mut bytes, &to_bytes(&mcfg)));
    }
    let root = append(&mut bytes, &to_bytes(&root));
    let rsdp = to_bytes(&Rsdp::new(OEM, root));
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    let room = RESET_VECTOR - ACPI_TABLES;
    if bytes.len() as u64 > room {
        return Err(PlanError::BootProtocol(format!(
            "the ACPI tables take {} bytes, there is room for {room}; use fewer devices or vCPUs",
            bytes.len()
        )));
    }
    Ok(Blob {
        name: "ACPI tables",
        address: ACPI_TABLES,
        bytes,
    })
}

fn to_bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Appends a table at the next multiple of 16, and returns its address.
fn append(bytes: &mut Vec<u8>, table: &[u8]) -> u64 {
    let at = bytes.len().next_multiple_of(16);
    bytes.resize(at, 0);
    bytes.extend_from_slice(table);
    ACPI_TABLES + at as u64
}

fn find(ports: &[PlacedPorts], kind: PortKind) -> Option<&PlacedPorts> {
    ports.iter().find(|device| device.kind == kind)
}

fn register(port: u64) -> GAS {
    GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, port)
}

fn fadt(layout: &Layout<X86_64>, dsdt: u64) -> Vec<u8> {
    let ports = &layout.ports;
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Headless)
        // The power button is a device in the DSDT; there is no sleep button.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    let cmos = match find(ports, PortKind::Cmos) {
        Some(_) => 0,
        None => NO_CMOS,
    };
    let msi = match layout.pci {
        Some(_) => 0,
        None => NO_MSI,
    };
    table.iapc_boot_arch = (NO_VGA | msi | cmos).into();
    if let Some(reset) = find(ports, PortKind::Reset) {
        table = table.flag(Flags::ResetRegSup);
        table.reset_reg = register(reset.ports.start());
        table.reset_value = RESET;
    }
    if let Some(acpi) = find(ports, PortKind::Acpi) {
        table.sleep_control_reg = register(acpi.ports.start());
        table.sleep_status_reg = register(acpi.ports.start() + 1);
    }
    to_bytes(&table.finalize())
}

fn madt(layout: &Layout<X86_64>, vcpus: &[Vcpu]) -> Vec<u8> {
    // Both lie below 4 GiB.
    let address = |range: crate::Range| range.start() as u32;
    let mut body = Vec::new();
    body.extend(address(layout.irqchip.lapic).to_le_bytes());
    // Flags: no 8259.
    body.extend([0; 4]);
    for vcpu in vcpus {
        match u8::try_from(vcpu.apic_id) {
            Ok(id) if id < u8::MAX => {
                ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut body);
            }
            _ => body.extend(local_x2apic(vcpu.apic_id)),
        }
    }
    IoApic::new(0, address(layout.irqchip.ioapic), 0).to_aml_bytes(&mut body);
    let mut table = Sdt::new(*b"APIC", 36, 1, OEM, OEM_TABLE, REVISION);
    table.append_slice(&body);
    table.as_slice().to_vec()
}

/// Returns the entry of a CPU whose APIC ID needs more than 8 bits (section 5.2.12.12).
fn local_x2apic(id: u32) -> [u8; 16] {
    const KIND: u8 = 9;
    const ENABLED: u8 = 1;
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&[KIND, 16]);
    bytes[4..8].copy_from_slice(&id.to_le_bytes());
    bytes[8] = ENABLED;
    bytes[12..].copy_from_slice(&id.to_le_bytes());
    bytes
}

fn dsdt(layout: &Layout<X86_64>) -> Vec<u8> {
    let mut devices = Vec::new();
    for device in &layout.ports {
        devices.extend(port_device(device));
    }
    for placed in &layout.devices {
        if let DeviceKind::VirtioMmio { slot } = placed.kind {
            devices.extend(virtio(placed, slot));
        }
    }
    if let Some(placed) = &layout.generation {
        devices.extend(generation(placed));
    }
    devices.extend(events(layout));
    if let Some(placed) = &layout.pci {
        devices.extend(pci::host_bridge(placed));
    }
    let mut body = Scope::raw(Path::new("\\_SB_"), devices);
    let off = Package::new(vec![&SLEEP_TYPE_OFF, &ZERO, &ZERO, &ZERO]);
    Name::new(Path::new("\\_S5_"), &off).to_aml_bytes(&mut body);
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, REVISION);
    table.append_slice(&body);
    table.as_slice().to_vec()
}

/// Returns a rising-edge interrupt.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn port_device(device: &PlacedPorts) -> Vec<u8> {
    // Ports have 16 bits, and no kind has more than 8 of them.
    let (first, count) = (device.ports.start() as u16, device.ports.size() as u8);
    let ports = IO::new(first, first, 1, count);
    let gsi = device.irq.map_or(0, |irq| irq.0);
    match device.kind {
        PortKind::Uart16550 => to_bytes(&Device::new(
            Path::new("COM1"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &ZERO),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&ports, &interrupt(gsi)]),
                ),
            ],
        )),
        PortKind::Cmos => to_bytes(&Device::new(
            Path::new("RTC_"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0B00")),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&ports])),
            ],
        )),
        PortKind::Acpi => power_button(),
        // Described by the FADT, or not at all.
        PortKind::Reset | PortKind::I8042 => Vec::new(),
    }
}

/// Returns the power button (section 4.8.2.2.1.2).
fn power_button() -> Vec<u8> {
    to_bytes(&Device::new(
        Path::new(BUTTON),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")),
            &Name::new(Path::new("_UID"), &ZERO),
        ],
    ))
}

/// Returns VMGenID (Microsoft, Virtual Machine Generation ID) and VMClock (UAPI.13, section "Discovery
/// via ACPI"). Linux looks for `VMGENCTR`.
fn generation(placed: &PlacedGeneration) -> Vec<u8> {
    // Both lie below 1 MiB.
    let (id, clock) = (placed.id.start() as u32, placed.clock.start() as u32);
    let name = "VM_Gen_Counter";
    // The low and the high half of the address.
    let address = Package::new(vec![&id, &ZERO]);
    let mut bytes = to_bytes(&Device::new(
        Path::new(VMGENID),
        vec![
            &Name::new(Path::new("_HID"), &"VMGENCTR"),
            &Name::new(Path::new("_CID"), &name),
            &Name::new(Path::new("_DDN"), &name),
            &Name::new(Path::new("ADDR"), &address),
        ],
    ));
    let name = "VMCLOCK";
    let memory = Memory32Fixed::new(false, clock, placed.clock.size() as u32);
    bytes.extend(to_bytes(&Device::new(
        Path::new(VMCLOCK),
        vec![
            &Name::new(Path::new("_HID"), &"AMZNC10C"),
            &Name::new(Path::new("_CID"), &name),
            &Name::new(Path::new("_DDN"), &name),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&memory])),
        ],
    )));
    bytes
}

/// Returns the generic event device, whose interrupts are turned into notifications of other devices
/// (section 5.6.9); none where there are no such interrupts.
fn events(layout: &Layout<X86_64>) -> Vec<u8> {
    let acpi = find(&layout.ports, PortKind::Acpi).and_then(|device| device.irq);
    let generation = layout.generation.map(|placed| placed.irq);
    let sources = [
        acpi.map(|irq| (irq.0, &[BUTTON] as &[&str])),
        generation.map(|irq| (irq.0, &[VMGENID, VMCLOCK] as &[&str])),
    ];
    let sources: Vec<_> = sources.into_iter().flatten().collect();
    if sources.is_empty() {
        return Vec::new();
    }
    let interrupts: Vec<_> = sources.iter().map(|(gsi, _)| interrupt(*gsi)).collect();
    let mut handlers = Vec::new();
    for (gsi, devices) in &sources {
        let paths: Vec<_> = devices.iter().map(|name| Path::new(name)).collect();
        let notes: Vec<_> = paths
            .iter()
            .map(|path| Notify::new(path, &CHANGED))
            .collect();
        let notes = notes.iter().map(|note| note as &dyn Aml).collect();
        handlers.push(to_bytes(&If::new(&Equal::new(&Arg(0), gsi), notes)));
    }
    let handlers: Vec<_> = handlers.iter().map(|bytes| Raw(bytes)).collect();
    to_bytes(&Device::new(
        Path::new("GED_"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(interrupts.iter().map(|one| one as &dyn Aml).collect()),
            ),
            &Method::new(
                Path::new("_EVT"),
                1,
                true,
                handlers.iter().map(|handler| handler as &dyn Aml).collect(),
            ),
        ],
    ))
}

/// AML that is encoded already.
struct Raw<'a>(&'a [u8]);

impl Aml for Raw<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0);
    }
}

/// Returns a virtio device over MMIO (drivers/virtio/virtio_mmio.c: virtio_mmio_acpi_match).
fn virtio(placed: &Placed, slot: u32) -> Vec<u8> {
    let (first, last) = (placed.window.start(), placed.window.last());
    let low = u32::try_from(last).is_ok();
    let memory_32 = Memory32Fixed::new(true, first as u32, placed.window.size() as u32);
    let memory_64 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        first,
        last,
        None::<u64>,
    );
    let memory: &dyn Aml = if low { &memory_32 } else { &memory_64 };
    let line = interrupt(placed.spi.0);
    to_bytes(&Device::new(
        Path::new(&format!("V{slot:03X}")),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &slot),
            // DMA is coherent.
            &Name::new(Path::new("_CCA"), &1_u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![memory, &line]),
            ),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Arch, Board, Request, plan};

    const PC: &str = include_str!("../../../boards/pc.toml");

    fn tables_of(board: &str, cpus: u32, virtio: &[&str]) -> Vec<u8> {
        tables_with(board, cpus, virtio, false)
    }

    fn tables_with(board: &str, cpus: u32, virtio: &[&str], vmgenid: bool) -> Vec<u8> {
        let board = Board::parse(board).expect("valid");
        let request = Request {
            cpus,
            vmgenid,
            virtio: virtio.iter().map(|name| (*name).to_owned()).collect(),
            ..crate::x86_64::plan::tests::request(512 << 20)
        };
        let plan = plan(&board, &request, &X86_64::assumed_host(&board)).expect("fits");
        let tables = plan
            .blobs
            .into_iter()
            .find(|blob| blob.address == ACPI_TABLES);
        tables.expect("tables").bytes
    }

    fn number(bytes: &[u8], at: usize, size: usize) -> u64 {
        let bytes = bytes[at..at + size].iter().rev();
        bytes.fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Returns the table at an address, by its own length, checked.
    fn table(all: &[u8], address: u64) -> &[u8] {
        let at = (address - ACPI_TABLES) as usize;
        let length = number(all, at + 4, 4) as usize;
        let table = &all[at..at + length];
        assert_eq!(sum(table), 0, "{:?}", &table[..4]);
        table
    }

    /// FADT, MADT and DSDT, found as a kernel finds them.
    fn found(all: &[u8]) -> [&[u8]; 3] {
        assert_eq!(&all[..8], b"RSD PTR ");
        assert_eq!((sum(&all[..20]), sum(&all[..36])), (0, 0));
        let root = table(all, number(all, 24, 8));
        assert_eq!((&root[..4], root.len()), (&b"XSDT"[..], 36 + 16));
        let fadt = table(all, number(root, 36, 8));
        let madt = table(all, number(root, 44, 8));
        let dsdt = table(all, number(fadt, 140, 8));
        assert_eq!(
            [&fadt[..4], &madt[..4], &dsdt[..4]],
            [b"FACP", b"APIC", b"DSDT"]
        );
        [fadt, madt, dsdt]
    }

    #[test]
    fn the_fadt_names_the_registers_that_switch_off_and_reset() {
        let all = tables_of(PC, 1, &[]);
        let [fadt, ..] = found(&all);
        let flags = number(fadt, 112, 4);
        assert_eq!(flags >> 20 & 1, 1, "hardware-reduced");
        assert_eq!(flags >> 10 & 1, 1, "the reset register is there");
        // In I/O space, 8 bits, by bytes.
        let port = |at: usize| (number(fadt, at, 4), number(fadt, at + 4, 8));
        assert_eq!(port(116), (0x0100_0801, 0xcf9));
        assert_eq!(fadt[128], 0x06);
        assert_eq!(port(244), (0x0100_0801, 0x600));
        assert_eq!(port(256), (0x0100_0801, 0x601));
        // Neither keyboard controller nor other legacy devices to look for; a clock.
        assert_eq!(number(fadt, 109, 2) & 0b10_0011, 0);
    }

    #[test]
    fn a_board_without_power_or_reset_promises_none() {
        let cut = PC
            .find("# The register by which")
            .expect("the reset register");
        let end = PC.find("# VMGenID and VMClock").expect("the next device");
        let board = format!("{}{}", &PC[..cut], &PC[end..]);
        let all = tables_of(&board, 1, &[]);
        let [fadt, _, dsdt] = found(&all);
        assert_eq!(number(fadt, 112, 4) >> 10 & 1, 0);
        assert_eq!((number(fadt, 248, 8), number(fadt, 260, 8)), (0, 0));
        assert!(!dsdt.windows(8).any(|part| part == b"ACPI0013"));
        // VMGenID and VMClock bring one that has their interrupt alone.
        let all = tables_with(&board, 1, &[], true);
        let [.., dsdt] = found(&all);
        let count = |part: &[u8]| dsdt.windows(part.len()).filter(|of| *of == part).count();
        assert_eq!(count(b"ACPI0013"), 1);
        assert_eq!(count(&[0x89, 6, 0, 3, 1, 5, 0, 0, 0]), 1);
        assert_eq!(count(b"PWRB"), 0);
    }

    #[test]
    fn vmgenid_and_vmclock_are_named_where_they_are_and_notified_by_their_interrupt() {
        let all = tables_with(PC, 1, &[], true);
        let [.., dsdt] = found(&all);
        let count = |part: &[u8]| dsdt.windows(part.len()).filter(|of| *of == part).count();
        // ADDR is a package of the low and the high half.
        assert_eq!(count(b"ADDR\x12\x08\x02\x0c\x00\xe0\x0d\x00\x00"), 1);
        assert_eq!(count(b"_HID\x0dVMGENCTR\0"), 1);
        assert_eq!(count(b"_CID\x0dVM_Gen_Counter\0"), 1);
        assert_eq!(count(b"_HID\x0dAMZNC10C\0"), 1);
        // Memory32Fixed, read-only, of a page.
        assert_eq!(count(&[0x86, 9, 0, 0, 0, 0xf0, 0x0d, 0, 0, 0x10, 0, 0]), 1);
        // The event device has both interrupts, and each notifies its own: If (Arg0 == GSI).
        for pin in [9, 5] {
            assert_eq!(count(&[0x89, 6, 0, 3, 1, pin, 0, 0, 0]), 1, "pin {pin}");
        }
        let button = b"\x93\x68\x0a\x09\x86PWRB\x0a\x80";
        let both = b"\x93\x68\x0a\x05\x86VGEN\x0a\x80\x86VCLK\x0a\x80";
        assert_eq!((count(button), count(both)), (1, 1));
        assert_eq!(count(b"PWRB"), 2);
        let all = tables_of(PC, 1, &[]);
        let [.., dsdt] = found(&all);
        assert!(
            !dsdt
                .windows(4)
                .any(|part| part == b"VGEN" || part == b"VCLK")
        );
    }

    #[test]
    fn the_madt_has_each_cpu_once_and_the_io_apic() {
        let all = tables_of(PC, 1024, &[]);
        let [_, madt, _] = found(&all);
        assert_eq!((number(madt, 36, 4), number(madt, 40, 4)), (0xfee0_0000, 0));
        let (mut at, mut cpus) = (44, Vec::new());
        while at < madt.len() {
            match madt[at] {
                0 => {
                    assert_eq!(number(madt, at + 4, 4), 1, "enabled");
                    cpus.push(u64::from(madt[at + 3]));
                    assert!(madt[at + 3] < 255, "255 means all");
                }
                9 => {
                    assert_eq!(number(madt, at + 8, 4), 1, "enabled");
                    assert_eq!(number(madt, at + 4, 4), number(madt, at + 12, 4));
                    cpus.push(number(madt, at + 4, 4));
                }
                1 => assert_eq!(number(madt, at + 4, 8), 0xfec0_0000),
                other => panic!("structure of type {other}"),
            }
            at += usize::from(madt[at + 1]);
        }
        assert_eq!(cpus, (0..1024).collect::<Vec<u64>>());
    }

    #[test]
    fn the_dsdt_has_a_device_for_each_slot_in_use() {
        let all = tables_of(PC, 1, &["disk0", "net0"]);
        let [.., dsdt] = found(&all);
        let count = |part: &[u8]| {
            let windows = dsdt.windows(part.len());
            windows.filter(|window| *window == part).count()
        };
        assert_eq!(count(b"LNRO0005"), 2);
        // Memory32Fixed, writable, at the second slot, of 0x200 bytes.
        assert_eq!(count(&[0x86, 9, 0, 1, 0, 2, 0, 0xd0, 0, 2, 0, 0]), 1);
        // Extended interrupts: consumers of rising edges, on pins 10 and 11, 4 and 9.
        for pin in [10, 11, 4, 9] {
            assert_eq!(count(&[0x89, 6, 0, 3, 1, pin, 0, 0, 0]), 1, "pin {pin}");
        }
        // Soft off is sleep of type 5.
        assert_eq!(count(b"_S5_\x12\x07\x04\x0a\x05"), 1);
    }

    #[test]
    fn a_slot_above_4_gib_has_a_descriptor_that_reaches_it() {
        let board = PC.replacen("base = 0xd000_0000", "base = 0x10_0000_0000", 1);
        let all = tables_of(&board, 1, &["disk0"]);
        let [.., dsdt] = found(&all);
        let first = 0x10_0000_0000_u64.to_le_bytes();
        assert!(dsdt.windows(8).any(|part| part == first));
    }

    #[test]
    fn a_bus_is_found_by_its_configuration_space_and_its_windows() {
        let board = Board::parse(PC).expect("valid");
        let mut request = crate::x86_64::plan::tests::request(5 << 30);
        let without = plan(&board, &request, &X86_64::assumed_host(&board)).expect("fits");
        request.pci = vec!["disk0".to_owned()];
        let plan = plan(&board, &request, &X86_64::assumed_host(&board)).expect("fits");
        let tables = |plan: &crate::Plan<X86_64>| {
            let blobs = plan.blobs.iter();
            let mut tables = blobs.filter(|blob| blob.address == ACPI_TABLES);
            tables.next().expect("tables").bytes.clone()
        };
        let (without, all) = (tables(&without), tables(&plan));
        let placed = plan.layout.pci.expect("PCI");
        let root = table(&all, number(&all, 24, 8));
        let mcfg = table(&all, number(root, 52, 8));
        assert_eq!((&mcfg[..4], mcfg.len()), (&b"MCFG"[..], 60));
        assert_eq!(number(mcfg, 44, 8), placed.ecam.start());
        assert_eq!(number(mcfg, 52, 4), 0, "segment 0, bus 0 to 0");
        let fadt = table(&all, number(root, 36, 8));
        let no_msi = u64::from(NO_MSI);
        assert_eq!(number(fadt, 109, 2) & no_msi, 0, "MSIs are taken");
        let dsdt = table(&all, number(fadt, 140, 8));
        let count = |part: &[u8]| dsdt.windows(part.len()).filter(|of| *of == part).count();
        assert_eq!(count(b"PCI0"), 1);
        // DWordMemory and QWordMemory: granularity, first, last.
        let (low, high) = (placed.low, placed.high.expect("it costs no bit"));
        let low = [0, low.start() as u32, low.last() as u32].map(u32::to_le_bytes);
        let high = [0, high.start(), high.last()].map(u64::to_le_bytes);
        assert_eq!((count(&low.concat()), count(&high.concat())), (1, 1));
        // Memory32Fixed, writable.
        let mut ecam = vec![0x86, 9, 0, 1];
        ecam.extend((placed.ecam.start() as u32).to_le_bytes());
        ecam.extend((placed.ecam.size() as u32).to_le_bytes());
        assert_eq!(count(&ecam), 1, "it is reserved");

        let root = table(&without, number(&without, 24, 8));
        assert_eq!(root.len(), 36 + 16, "no MCFG");
        let fadt = table(&without, number(root, 36, 8));
        assert_eq!(number(fadt, 109, 2) & no_msi, no_msi);
        let dsdt = table(&without, number(fadt, 140, 8));
        assert!(!dsdt.windows(4).any(|part| part == b"PCI0"));
    }
}
