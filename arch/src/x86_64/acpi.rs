//! ACPI tables of a hardware-reduced PC (ACPI 6.5): RSDP, XSDT, FADT, MADT, DSDT.
//!
//! Linux takes from them what it finds by no other way: its CPUs, the interrupts of devices that
//! are on no bus, the registers that switch the machine off and reset it, and the power button.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, Equal, IO, If, Interrupt,
    Memory32Fixed, Method, Name, Notify, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::{Vcpu, X86_64};
use crate::board::PortKind;
use crate::plan::{Blob, DeviceKind, Layout, Placed, PlacedPorts, PlanError};

/// Where the tables lie: the RSDP is looked for here (ACPI 6.5, section 5.2.5.1).
pub(super) const TABLES: u64 = 0xe_0000;
/// Where the place for them ends.
const TABLES_END: u64 = 0x10_0000;

const OEM: [u8; 6] = *b"ARMLET";
const OEM_TABLE: [u8; 8] = *b"ARMLETPC";
const REVISION: u32 = 1;

/// FADT, IAPC_BOOT_ARCH (section 5.2.9.3): no VGA, no MSI, no CMOS clock. Bits that would say that
/// there are other legacy devices or a keyboard controller stay clear: Linux then looks for none.
const NO_VGA: u16 = 1 << 2;
const NO_MSI: u16 = 1 << 3;
const NO_CMOS: u16 = 1 << 5;
/// What the reset control register takes to reset the machine (82801 datasheets, RST_CNT).
const RESET: u8 = 0x06;
/// `\_S5`: the type of sleep that is soft off. The registers take the same
/// (`armlet_devices::power`).
const SLEEP_TYPE_OFF: u8 = 5;
/// The status value of a power button's notification (section 4.8.2.2.1.2).
const BUTTON_PRESSED: u8 = 0x80;

/// The tables, as one blob.
pub(super) fn tables(layout: &Layout<X86_64>, vcpus: &[Vcpu]) -> Result<Blob, PlanError> {
    let mut bytes = vec![0; Rsdp::len().next_multiple_of(16)];
    let dsdt = append(&mut bytes, &dsdt(layout));
    let fadt = append(&mut bytes, &fadt(&layout.ports, dsdt));
    let madt = append(&mut bytes, &madt(layout, vcpus));
    let mut root = XSDT::new(OEM, OEM_TABLE, REVISION);
    root.add_entry(fadt);
    root.add_entry(madt);
    let root = append(&mut bytes, &to_bytes(&root));
    let rsdp = to_bytes(&Rsdp::new(OEM, root));
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    let room = TABLES_END - TABLES;
    if bytes.len() as u64 > room {
        return Err(PlanError::BootProtocol(format!(
            "the ACPI tables take {} bytes, there is room for {room}; use fewer devices or vCPUs",
            bytes.len()
        )));
    }
    Ok(Blob {
        name: "ACPI tables",
        address: TABLES,
        bytes,
    })
}

fn to_bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Puts a table at the next multiple of 16 and returns its address.
fn append(bytes: &mut Vec<u8>, table: &[u8]) -> u64 {
    let at = bytes.len().next_multiple_of(16);
    bytes.resize(at, 0);
    bytes.extend_from_slice(table);
    TABLES + at as u64
}

fn find(ports: &[PlacedPorts], kind: PortKind) -> Option<&PlacedPorts> {
    ports.iter().find(|device| device.kind == kind)
}

fn register(port: u64) -> GAS {
    GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, port)
}

fn fadt(ports: &[PlacedPorts], dsdt: u64) -> Vec<u8> {
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Headless)
        // The power button is a device of the DSDT, the sleep button is none.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    let cmos = match find(ports, PortKind::Cmos) {
        Some(_) => 0,
        None => NO_CMOS,
    };
    table.iapc_boot_arch = (NO_VGA | NO_MSI | cmos).into();
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
    let lapic = LocalInterruptController::Address(address(layout.irqchip.lapic));
    let mut table = MADT::new(OEM, OEM_TABLE, REVISION, lapic);
    for vcpu in vcpus {
        // At most 255 of them.
        let id = vcpu.apic_id as u8;
        table.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, address(layout.irqchip.ioapic), 0));
    to_bytes(&table)
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
    let mut body = Scope::raw(Path::new("\\_SB_"), devices);
    let off = Package::new(vec![&SLEEP_TYPE_OFF, &ZERO, &ZERO, &ZERO]);
    Name::new(Path::new("\\_S5_"), &off).to_aml_bytes(&mut body);
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, REVISION);
    table.append_slice(&body);
    table.as_slice().to_vec()
}

/// An edge that rises.
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
        PortKind::Acpi => power_button(gsi),
        // The FADT tells of it, or nobody looks for it.
        PortKind::Reset | PortKind::I8042 => Vec::new(),
    }
}

/// The power button, and the event device whose interrupt means that it was pressed (sections
/// 4.8.2.2.1.2 and 5.6.9).
fn power_button(gsi: u32) -> Vec<u8> {
    let button = Path::new("PWRB");
    let mut bytes = to_bytes(&Device::new(
        Path::new("PWRB"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")),
            &Name::new(Path::new("_UID"), &ZERO),
        ],
    ));
    bytes.extend(to_bytes(&Device::new(
        Path::new("GED_"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&interrupt(gsi)]),
            ),
            &Method::new(
                Path::new("_EVT"),
                1,
                true,
                vec![&If::new(
                    &Equal::new(&Arg(0), &gsi),
                    vec![&Notify::new(&button, &BUTTON_PRESSED)],
                )],
            ),
        ],
    )));
    bytes
}

/// A virtio device over MMIO (drivers/virtio/virtio_mmio.c: virtio_mmio_acpi_match).
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
