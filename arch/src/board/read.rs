//! Reads the tables of a board file into a [`Board`]: one function for each table.

use super::error::BoardError;
use super::fields::Fields;
use super::layers::Item;
use super::signature::signature;
use super::{
    AssumedHost, Bank, Board, BoardDevice, BoardDeviceKind, Cluster, GicWindows, GuestDefaults,
    HostNote, PortDevice, PortKind, Severity, Share, VirtioSlots,
};
use crate::aarch64::Offered;
use crate::architecture::Architecture;
use crate::cores::FULL_CAPACITY;
use crate::midr::Midr;
use crate::size::parse_size;
use crate::width::{MAX_BITS, MIN_BITS};

/// Returns the board that the tree of a file describes.
pub(super) fn board(mut root: Fields<'_>) -> Result<Board, BoardError> {
    let name = root.string("name", "\"my-board\"")?;
    let description = root.optional_string("description")?.unwrap_or_default();
    let arch = root.architecture()?;
    // Recognition reads it separately; it is only checked here.
    if let Some(fields) = root.optional_table("match")? {
        signature(fields)?;
    }
    let board = Board {
        name,
        description,
        arch,
        host: assumed_host(root.table("host", "[host]")?)?,
        guest: guest_defaults(root.table("guest", "[guest]")?)?,
        memory: each(root.tables("memory")?, bank)?,
        gic: root.optional_table("gic")?.map(gic_windows).transpose()?,
        devices: match arch {
            Architecture::Aarch64 => each(root.tables("device")?, device)?,
            Architecture::X86_64 => Vec::new(),
        },
        ports: match arch {
            Architecture::Aarch64 => Vec::new(),
            Architecture::X86_64 => each(root.tables("port")?, port_device)?,
        },
        virtio_mmio: root
            .optional_table("virtio-mmio")?
            .map(|fields| virtio_slots(fields, arch))
            .transpose()?,
        vmgenid: root
            .optional_table("vmgenid")?
            .map(|fields| vmgenid(fields, arch))
            .transpose()?,
    };
    root.finish(&[
        "name",
        "description",
        "inherits",
        "arch",
        "match",
        "host",
        "guest",
        "memory",
        "gic",
        match arch {
            Architecture::Aarch64 => "device",
            Architecture::X86_64 => "port",
        },
        "virtio-mmio",
        "vmgenid",
    ])?;
    let missing = |key: &str, example: &str| BoardError::Missing {
        table: "the board".to_owned(),
        key: key.to_owned(),
        example: example.to_owned(),
    };
    if board.memory.is_empty() {
        return Err(missing("memory", "[[memory]] with base = 0x4000_0000"));
    }
    if board.arch == Architecture::Aarch64 && board.gic.is_none() {
        return Err(missing("gic", "[gic] with its windows"));
    }
    Ok(board)
}

/// Returns what `read` makes of each table.
fn each<'a, T>(
    tables: Vec<Fields<'a>>,
    read: fn(Fields<'a>) -> Result<T, BoardError>,
) -> Result<Vec<T>, BoardError> {
    tables.into_iter().map(read).collect()
}

fn is_page(size: &u64) -> bool {
    matches!(size, 0x1000 | 0x4000 | 0x1_0000)
}

/// Returns a size among those that `fits` lets through.
fn size_item(item: &Item, fits: fn(&u64) -> bool) -> Option<u64> {
    match item {
        Item::Text(text) => parse_size(text).ok().filter(fits),
        _ => None,
    }
}

const PAGES: &str = "\"4K\", \"16K\", \"64K\"";

fn assumed_host(mut fields: Fields<'_>) -> Result<AssumedHost, BoardError> {
    let ipa_limit = match fields.number("ipa-limit", "ipa-limit = 48")? {
        bits if (u64::from(MIN_BITS)..=u64::from(MAX_BITS)).contains(&bits) => bits as u8,
        _ => {
            let cause = format!("must be {MIN_BITS} to {MAX_BITS} bits");
            return Err(fields.wrong("ipa-limit", cause));
        }
    };
    let page_size = fields.size("page-size", "page-size = \"4K\"")?;
    if !is_page(&page_size) {
        return Err(fields.wrong("page-size", "must be 4K, 16K or 64K"));
    }
    let gic = fields.required_list("gic", "2 and 3", |item| match item {
        Item::Number(2) => Some(2),
        Item::Number(3) => Some(3),
        _ => None,
    })?;
    let guest_pages =
        fields.required_list("guest-pages", PAGES, |item| size_item(item, is_page))?;
    if !guest_pages.contains(&page_size) {
        return Err(fields.wrong("page-size", "must be among the guest-pages"));
    }
    let mut offered = Offered::default();
    for name in fields.texts("features")? {
        match name.as_str() {
            "pmu" => offered.pmu = true,
            "sve" => offered.sve = true,
            "pauth" => offered.pauth = true,
            "steal-time" => offered.steal_time = true,
            other => {
                let cause = format!("holds '{other}'; use pmu, sve, pauth and steal-time");
                return Err(fields.wrong("features", cause));
            }
        }
    }
    let ram = fields.list("ram", "sizes such as \"8G\", fewest first", |item| {
        size_item(item, |bytes| *bytes > 0)
    })?;
    let clusters = each(fields.tables("cluster")?, cluster)?;
    let notes = each(fields.tables("note")?, note)?;
    fields.finish(&[
        "ipa-limit",
        "page-size",
        "gic",
        "guest-pages",
        "features",
        "ram",
        "cluster",
        "note",
    ])?;
    Ok(AssumedHost {
        ipa_limit,
        page_size,
        gic,
        guest_pages,
        offered,
        ram,
        clusters,
        notes,
    })
}

fn cluster(mut fields: Fields<'_>) -> Result<Cluster, BoardError> {
    let core = fields.string("core", "\"Cortex-A76\"")?;
    let midr = fields.optional_number("midr")?.map(Midr::kind);
    let cpus = fields.number_u32("cpus", "cpus = 4")?;
    let capacity = match fields.optional_number("capacity")? {
        None => FULL_CAPACITY,
        Some(value @ 1..=1024) => value as u32,
        Some(_) => return Err(fields.wrong("capacity", "must be 1 to 1024")),
    };
    if !(1..=4096).contains(&cpus) {
        return Err(fields.wrong("cpus", "must be 1 to 4096"));
    }
    fields.finish(&["core", "midr", "cpus", "capacity"])?;
    Ok(Cluster {
        core,
        midr,
        cpus,
        capacity,
    })
}

fn note(mut fields: Fields<'_>) -> Result<HostNote, BoardError> {
    let severity = match fields.string("severity", "\"note\"")?.as_str() {
        "stops" => Severity::Stops,
        "limits" => Severity::Limits,
        "note" => Severity::Note,
        other => {
            let cause = format!("is '{other}'; use stops, limits or note");
            return Err(fields.wrong("severity", cause));
        }
    };
    let what = fields.string("what", "\"no GIC\"")?;
    let fix = fields.string("fix", "\"use another board\"")?;
    fields.finish(&["severity", "what", "fix"])?;
    Ok(HostNote {
        severity,
        what,
        fix,
    })
}

fn guest_defaults(mut fields: Fields<'_>) -> Result<GuestDefaults, BoardError> {
    let cpus = fields.number_u32("cpus", "cpus = 1")?;
    let memory = fields.size("memory", "memory = \"512M\"")?;
    let cmdline = fields.optional_string("cmdline")?.unwrap_or_default();
    let gic = fields.parsed("gic")?;
    let width = fields.parsed("ipa-bits")?;
    let pin = fields.parsed("pin")?;
    let huge_pages = fields.parsed("hugepages")?;
    let pmu = fields.parsed("pmu")?;
    let sve = fields.parsed("sve")?;
    let pauth = fields.parsed("pauth")?;
    let vmgenid = fields.parsed("vmgenid")?;
    fields.finish(&[
        "cpus",
        "memory",
        "cmdline",
        "gic",
        "ipa-bits",
        "pin",
        "hugepages",
        "pmu",
        "sve",
        "pauth",
        "vmgenid",
    ])?;
    Ok(GuestDefaults {
        cpus,
        memory,
        cmdline,
        gic,
        width,
        pin,
        huge_pages,
        pmu,
        sve,
        pauth,
        vmgenid,
    })
}

fn bank(mut fields: Fields<'_>) -> Result<Bank, BoardError> {
    let base = fields.number("base", "base = 0x4000_0000")?;
    let share = match (
        fields.optional_size("size")?,
        fields.optional_size("up-to")?,
    ) {
        (None, None) => Share::Rest,
        (Some(size), None) => Share::Exactly(size),
        (None, Some(most)) => Share::UpTo(most),
        (Some(_), Some(_)) => {
            return Err(fields.wrong("size", "and 'up-to' exclude one another".to_owned()));
        }
    };
    fields.finish(&["base", "size", "up-to"])?;
    Ok(Bank { base, share })
}

fn gic_windows(mut fields: Fields<'_>) -> Result<GicWindows, BoardError> {
    let windows = GicWindows {
        distributor: fields.number("distributor", "distributor = 0x0800_0000")?,
        cpu_interface: fields.number("cpu-interface", "cpu-interface = 0x0801_0000")?,
        redistributors: fields.number("redistributors", "redistributors = 0x080a_0000")?,
        redistributor_frames: fields
            .number_u32("redistributor-frames", "redistributor-frames = 123")?,
    };
    for (key, address) in [
        ("distributor", windows.distributor),
        ("cpu-interface", windows.cpu_interface),
        ("redistributors", windows.redistributors),
    ] {
        // GICv3 requires 64 KiB, which also suits every host page size.
        if !address.is_multiple_of(0x1_0000) {
            return Err(fields.wrong(key, format!("{address:#x} must be a multiple of 64 KiB")));
        }
    }
    fields.finish(&[
        "distributor",
        "cpu-interface",
        "redistributors",
        "redistributor-frames",
    ])?;
    Ok(windows)
}

fn device(mut fields: Fields<'_>) -> Result<BoardDevice, BoardError> {
    let kind = match fields.string("kind", "kind = \"pl011\"")?.as_str() {
        "pl011" => BoardDeviceKind::Pl011,
        "16550" => BoardDeviceKind::Uart16550,
        "pl031" => BoardDeviceKind::Pl031,
        "pl061" => BoardDeviceKind::Pl061,
        other => {
            let cause = format!("is '{other}'; use pl011, 16550, pl031 or pl061");
            return Err(fields.wrong("kind", cause));
        }
    };
    let device = BoardDevice {
        kind,
        base: fields.number("base", "base = 0x0900_0000")?,
        spi: fields.interrupt("spi", Architecture::Aarch64)?,
    };
    if !device.base.is_multiple_of(0x1000) {
        return Err(fields.wrong(
            "base",
            format!("{:#x} must be a multiple of 4 KiB", device.base),
        ));
    }
    fields.finish(&["kind", "base", "spi"])?;
    Ok(device)
}

fn port_device(mut fields: Fields<'_>) -> Result<PortDevice, BoardError> {
    let name = fields.string("kind", "kind = \"16550\"")?;
    let Some(kind) = PortKind::ALL.into_iter().find(|kind| kind.name() == name) else {
        let names = PortKind::ALL.map(PortKind::name).join(", ");
        return Err(fields.wrong("kind", format!("is '{name}'; use one of {names}")));
    };
    let base = fields.number("base", "base = 0x3f8")?;
    let Some(base) = u16::try_from(base)
        .ok()
        .filter(|base| base.checked_add(kind.ports() - 1).is_some())
    else {
        let cause = format!("{base:#x} is no port for it; ports are numbered 0 to 0xffff");
        return Err(fields.wrong("base", cause));
    };
    let irq = match kind.interrupts() {
        true => Some(fields.interrupt("irq", Architecture::X86_64)?),
        false => None,
    };
    let known: &[&str] = match irq {
        Some(_) => &["kind", "base", "irq"],
        None => &["kind", "base"],
    };
    fields.finish(known)?;
    Ok(PortDevice { kind, base, irq })
}

/// Returns the key of a device's interrupt.
const fn irq_key(arch: Architecture) -> &'static str {
    match arch {
        Architecture::Aarch64 => "spi",
        Architecture::X86_64 => "irq",
    }
}

/// Returns the interrupt of VMGenID and VMClock.
fn vmgenid(mut fields: Fields<'_>, arch: Architecture) -> Result<u32, BoardError> {
    let key = irq_key(arch);
    let irq = fields.interrupt(key, arch)?;
    fields.finish(&[key])?;
    Ok(irq)
}

fn virtio_slots(mut fields: Fields<'_>, arch: Architecture) -> Result<VirtioSlots, BoardError> {
    let key = irq_key(arch);
    let slots = VirtioSlots {
        base: fields.number("base", "base = 0x0a00_0000")?,
        slots: fields.number_u32("slots", "slots = 32")?,
        spi: fields.interrupt(key, arch)?,
    };
    if slots.slots > 512 || !slots.base.is_multiple_of(0x200) {
        let cause = "must be at most 512, from a base that is a multiple of 0x200".to_owned();
        return Err(fields.wrong("slots", cause));
    }
    fields.finish(&["base", "slots", key])?;
    Ok(slots)
}
