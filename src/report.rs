//! Formats a plan as text and as JSON.

use crate::settings::Setting;
use armlet_arch::Plan;
use armlet_arch::irq::Spi;
use armlet_arch::pci::Msi;
use armlet_arch::size::show_size;
use armlet_arch::{Arch, Architecture, PlacedGeneration, Range, Region, Width};
use armlet_system::messages::visible;
use serde_json::{Value, json};
use std::fmt::Write;

/// One line of the address map.
struct Row {
    range: Range,
    what: String,
}

/// Returns the plan as a table with its reasons, for a terminal. `kernel` describes the kernel
/// file.
#[must_use]
pub fn text<A: Arch>(plan: &Plan<A>, kernel: Option<&str>, settings: &[Setting]) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "Board {} ({}), {} vCPU{}, {} of memory",
        shown(&plan.board),
        A::ARCHITECTURE,
        plan.vcpus.len(),
        if plan.vcpus.len() == 1 { "" } else { "s" },
        show_size(plan.layout.ram.iter().map(|bank| bank.size()).sum()),
    );
    let _ = writeln!(out, "\n{}", address_bits(&plan.width));
    let _ = writeln!(out, "\nAddress map");
    table(&mut out, &map_rows(plan));
    let _ = writeln!(out, "\nIn RAM");
    table(&mut out, &payload_rows(plan, kernel));
    if plan.layout.payload.kernel.is_some() {
        let _ = writeln!(out, "  entry  {:#x}", plan.layout.payload.entry);
    }
    if !plan.layout.ports.is_empty() {
        let _ = writeln!(out, "\nI/O ports");
    }
    for device in &plan.layout.ports {
        let (first, last) = (device.ports.start(), device.ports.last());
        let _ = writeln!(out, "  {first:>#6x} {last:>#6x}  {}", device.kind);
    }
    pci(&mut out, plan);
    let private = A::private_interrupts(&plan.features);
    let interrupts = interrupts(plan);
    if !interrupts.is_empty() || !private.is_empty() {
        let _ = writeln!(out, "\nInterrupts");
    }
    for (intid, what) in private {
        // PPIs are the 16 from INTID 16 on (Arm IHI 0069, section 2.2).
        let _ = writeln!(out, "  PPI {:<4} INTID {intid:<4} {what}", intid - 16);
    }
    for (spi, what) in interrupts {
        let _ = match A::ARCHITECTURE {
            Architecture::Aarch64 => {
                writeln!(out, "  SPI {:<4} INTID {:<4} {what}", spi.0, spi.intid())
            }
            Architecture::X86_64 => writeln!(out, "  GSI {:<4} {what}", spi.0),
        };
    }
    let _ = writeln!(out, "\nChosen by");
    let widest = settings.iter().map(|setting| setting.from.len()).max();
    let widest = widest.unwrap_or(0);
    for Setting { name, value, from } in settings {
        let (value, from) = (shown(value), shown(from));
        let _ = writeln!(out, "  {from:<widest$}  {name}: {value}");
    }
    out
}

/// Lists the functions of the PCI bus, if there is one.
fn pci<A: Arch>(out: &mut String, plan: &Plan<A>) {
    let Some(pci) = &plan.layout.pci else { return };
    let _ = writeln!(out, "\nPCI functions, by MSI-X");
    for function in &pci.functions {
        let (number, bar) = (function.number, function.bar.start());
        let name = shown(&function.name);
        let _ = writeln!(
            out,
            "  00:{number:02x}.0  BAR at {bar:#x}  virtio-pci: {name}"
        );
    }
}

/// Returns an untrusted name, escaped to fit on one line.
fn shown(text: &str) -> String {
    visible(text.as_bytes(), usize::MAX)
}

fn address_bits(width: &Width) -> String {
    let mut text = format!(
        "IPA bits: {}\n  {} ends at {:#x} and needs {}",
        width.bits,
        width.highest.name,
        width.highest.range.last(),
        width.highest.range.bits(),
    );
    if width.highest.range.bits() < width.need {
        let _ = write!(text, " (KVM's least is {})", width.need);
    }
    let _ = match width.fixed {
        true => write!(text, "; the host gives {} and no other number", width.limit),
        false => write!(text, "; the host offers up to {}", width.limit),
    };
    let _ = write!(
        text,
        "\n  {} levels of stage-2 translation on {} host pages",
        width.levels,
        show_size(width.host_page)
    );
    if width.levels_at_limit > width.levels {
        let _ = write!(
            text,
            "; the host's limit would have cost {}",
            width.levels_at_limit
        );
    }
    text
}

/// Returns the interrupts with their sources, memory-mapped devices first.
fn interrupts<A: Arch>(plan: &Plan<A>) -> Vec<(Spi, String)> {
    let devices = plan.layout.devices.iter();
    let devices = devices.map(|device| (device.spi, device.to_string()));
    let messages = match plan.layout.pci.as_ref().map(|pci| pci.msi) {
        Some(Msi::V2m { first, count, .. }) => {
            let last = first.0 + count.saturating_sub(1);
            Some((
                first,
                format!("and on to SPI {last}: MSIs by the GICv2m frame"),
            ))
        }
        _ => None,
    };
    let ports = plan.layout.ports.iter();
    let ports = ports.filter_map(|device| Some((device.irq?, device.kind.to_string())));
    let generation = plan.layout.generation.iter();
    let generation = generation.map(|placed| (placed.irq, PlacedGeneration::NAME.to_owned()));
    let all = devices.chain(ports).chain(generation);
    all.chain(messages).collect()
}

fn map_rows<A: Arch>(plan: &Plan<A>) -> Vec<Row> {
    let regions = plan.layout.regions().into_iter();
    regions
        .map(|Region { name, range }| Row {
            range,
            what: name.into_owned(),
        })
        .collect()
}

fn payload_rows<A: Arch>(plan: &Plan<A>, kernel: Option<&str>) -> Vec<Row> {
    let payload = &plan.layout.payload;
    let row = |range: Option<Range>, what: String| range.map(|range| Row { range, what });
    let mut rows = vec![
        row(
            payload.kernel,
            format!("kernel: {}", kernel.unwrap_or("its file")),
        ),
        row(payload.initrd, "initrd".to_owned()),
    ];
    for blob in &plan.blobs {
        let range = Range::new(blob.address, blob.bytes.len() as u64);
        rows.push(row(range, blob.name.to_owned()));
    }
    if let Some(Region { name, range }) = A::reserved(&plan.vcpus) {
        rows.push(row(Some(range), name.into_owned()));
    }
    if let Some(placed) = &plan.layout.generation {
        rows.push(row(Some(placed.id), "VMGenID".to_owned()));
        rows.push(row(Some(placed.clock), "VMClock".to_owned()));
    }
    let mut rows: Vec<Row> = rows.into_iter().flatten().collect();
    rows.sort_by_key(|row| row.range);
    rows
}

fn table(out: &mut String, rows: &[Row]) {
    let _ = writeln!(out, "  {:>18} {:>18} {:>10}  what", "start", "end", "size");
    for row in rows {
        let _ = writeln!(
            out,
            "  {:>#18x} {:>#18x} {:>10}  {}",
            row.range.start(),
            row.range.last(),
            show_size(row.range.size()),
            shown(&row.what)
        );
    }
}

/// Returns the plan as JSON. Addresses are numbers; ends are inclusive.
#[must_use]
pub fn json<A: Arch>(plan: &Plan<A>, settings: &[Setting], cmdline: &str) -> Value {
    let rows = |rows: Vec<Row>| -> Vec<Value> {
        rows.into_iter()
            .map(|row| {
                json!({
                    "start": row.range.start(),
                    "end": row.range.last(),
                    "size": row.range.size(),
                    "what": row.what,
                })
            })
            .collect()
    };
    let mut all = json!({
        "board": plan.board,
        "architecture": A::ARCHITECTURE,
        "ipa": {
            "bits": plan.width.bits,
            "need": plan.width.need,
            "needed_by": plan.width.highest.name,
            "needed_by_end": plan.width.highest.range.last(),
            "host_limit": plan.width.limit,
            "host_limit_fixed": plan.width.fixed,
            "stage2_levels": plan.width.levels,
            "stage2_levels_at_limit": plan.width.levels_at_limit,
            "host_page_size": plan.width.host_page,
        },
        "map": rows(map_rows(plan)),
        "payload": rows(payload_rows(plan, None)),
        "entry": plan.layout.payload.entry,
        "irqchip": plan.layout.irqchip,
        "devices": plan.layout.devices,
        "ports": plan.layout.ports,
        "features": plan.features,
        "vcpus": plan.vcpus,
        "cmdline": cmdline,
        "settings": settings
            .iter()
            .map(|Setting { name, value, from }| json!({"name": name, "value": value, "from": from}))
            .collect::<Vec<_>>(),
    });
    if let Some(pci) = &plan.layout.pci {
        all["pci"] = json!(pci);
    }
    all
}
