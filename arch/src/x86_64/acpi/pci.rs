//! PCI in ACPI: MCFG (PCI Firmware 3.3, section 4.1.2), and the host bridge in the DSDT.
//!
//! Functions interrupt by MSI-X alone, so the bridge has no _PRT.

use crate::pci::PlacedPci;
use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, Memory32Fixed, Name, Path,
    ResourceTemplate, ZERO,
};
use acpi_tables::mcfg::MCFG;

/// Names the configuration space in its table.
pub(super) fn name_ecam(table: &mut MCFG, placed: &PlacedPci) {
    table.add_ecam(placed.ecam.start(), 0, 0, 0);
}

/// Returns the host bridge with its windows, and the reservation of the configuration space, without which
/// Linux takes it for a mistake of the firmware (arch/x86/pci/mmconfig-shared.c: `is_acpi_reserved`).
pub(super) fn host_bridge(placed: &PlacedPci) -> Vec<u8> {
    let bus = AddressSpace::new_bus_number(0_u16, 0_u16);
    let (first, last) = (placed.low.start() as u32, placed.low.last() as u32);
    let uncached = AddressSpaceCacheable::NotCacheable;
    let low = AddressSpace::new_memory(uncached, true, first, last, None::<u32>);
    let mut resources: Vec<&dyn Aml> = vec![&bus, &low];
    let high = placed.high.map(|high| {
        let (first, last) = (high.start(), high.last());
        AddressSpace::new_memory(uncached, true, first, last, None::<u64>)
    });
    if let Some(high) = &high {
        resources.push(high);
    }
    let mut bytes = Vec::new();
    Device::new(
        Path::new("PCI0"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(Path::new("_SEG"), &ZERO),
            &Name::new(Path::new("_BBN"), &ZERO),
            &Name::new(Path::new("_UID"), &ZERO),
            // DMA is coherent.
            &Name::new(Path::new("_CCA"), &1_u8),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources)),
        ],
    )
    .to_aml_bytes(&mut bytes);
    let ecam = Memory32Fixed::new(true, placed.ecam.start() as u32, placed.ecam.size() as u32);
    Device::new(
        Path::new("MBRD"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&ecam])),
        ],
    )
    .to_aml_bytes(&mut bytes);
    bytes
}
