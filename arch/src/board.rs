//! Board profiles: what a TOML file of `boards/` says, as a value.

mod fields;
mod layers;
mod signature;

pub use layers::{Find, Place};
pub use signature::{Identity, Midr, Signature, recognize};

use crate::aarch64::features::Offered;
use crate::backing::HugePages;
use crate::cores::PinPolicy;
use crate::irq::GicChoice;
use crate::size::parse_size;
use crate::switch::Switch;
use crate::width::{MAX_BITS, MIN_BITS, WidthPolicy};
use fields::{Fields, Line, Record};
use layers::Item;
use serde::{Deserialize, Serialize};
use std::fmt;

/// An instruction set that guests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// ARM, 64 bits.
    Aarch64,
    /// Intel and AMD, 64 bits.
    X86_64,
}

impl Architecture {
    /// What its shared interrupts are called, and how many there are of them. aarch64: KVM takes at
    /// most 992 interrupts, 32 of them private (arch/arm64/kvm/vgic/vgic-kvm-device.c:
    /// vgic_set_common_attr). x86_64: the pins of an I/O APIC (82093AA datasheet, section 2.4).
    #[must_use]
    pub const fn interrupts(self) -> (&'static str, u32) {
        match self {
            Architecture::Aarch64 => ("SPI", 960),
            Architecture::X86_64 => ("GSI", 24),
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Architecture::Aarch64 => "aarch64",
            Architecture::X86_64 => "x86_64",
        })
    }
}

/// A board: the machine that a guest gets and the host that it is meant for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Board {
    /// The name that `--board` takes.
    pub name: String,
    /// One sentence for `armlet boards`.
    pub description: String,
    /// The guest's instruction set.
    pub arch: Architecture,
    /// What to assume of the host when no host is asked.
    pub host: AssumedHost,
    /// What the guest gets where no flag says otherwise.
    pub guest: GuestDefaults,
    /// Banks of RAM, in the order of the file.
    pub memory: Vec<Bank>,
    /// The GIC's windows; present on aarch64 boards.
    pub gic: Option<GicWindows>,
    /// Devices at fixed places.
    pub devices: Vec<BoardDevice>,
    /// Devices at I/O ports; x86_64 boards alone have ports.
    pub ports: Vec<PortDevice>,
    /// Slots for virtio devices.
    pub virtio_mmio: Option<VirtioSlots>,
}

/// Facts about a host that a plan made elsewhere starts from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AssumedHost {
    /// Most guest-physical address bits.
    pub ipa_limit: u8,
    /// Page size in bytes.
    pub page_size: u64,
    /// GIC versions that KVM emulates (2, 3).
    pub gic: Vec<u8>,
    /// Page sizes in bytes that guest kernels may use, and host kernels too.
    pub guest_pages: Vec<u64>,
    /// What KVM offers on its cores beside the base architecture.
    pub offered: Offered,
    /// Bytes of memory that such hosts are sold with, fewest first.
    pub ram: Vec<u64>,
    /// Its cores by kind, in the order of their numbers. A board without any is generic: nothing
    /// is known of the host.
    pub clusters: Vec<Cluster>,
    /// What to know of such hosts.
    pub notes: Vec<HostNote>,
}

/// Cores of one kind with successive numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Their name ("Cortex-A76").
    pub core: String,
    /// What they are, by MIDR_EL1.
    pub midr: Option<Midr>,
    /// How many there are.
    pub cpus: u32,
    /// Computing power beside the other kinds, where 1024 is the most.
    pub capacity: u32,
}

/// How much a fact about a host matters, most first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Severity {
    /// No guest runs.
    Stops,
    /// Some guests do not run, or run slower.
    Limits,
    /// Good to know.
    Note,
}

/// What to know of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostNote {
    /// How much it matters.
    pub severity: Severity,
    /// What it is.
    pub what: String,
    /// What to do about it.
    pub fix: String,
}

/// Values for flags that were not given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestDefaults {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Kernel command line.
    pub cmdline: String,
    /// GIC version.
    pub gic: GicChoice,
    /// IPA bits.
    pub width: WidthPolicy,
    /// Which CPUs the vCPUs run on.
    pub pin: PinPolicy,
    /// What pages its memory is made of.
    pub huge_pages: HugePages,
    /// Performance counters.
    pub pmu: Switch,
    /// Scalable vectors.
    pub sve: Switch,
    /// Pointer authentication.
    pub pauth: Switch,
}

/// A bank of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bank {
    /// Its first guest-physical address.
    pub base: u64,
    /// How much of the guest's memory lies there.
    pub share: Share,
}

/// How much of the guest's memory a bank takes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Share {
    /// Just so much.
    Exactly(u64),
    /// What is left, up to so much.
    UpTo(u64),
    /// All that is left.
    Rest,
}

/// Where the interrupt controller's frames lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GicWindows {
    /// GICD: 64 KiB (GICv3) or 4 KiB (GICv2).
    pub distributor: u64,
    /// GICC of GICv2: 8 KiB.
    pub cpu_interface: u64,
    /// GICR of GICv3: 128 KiB a vCPU.
    pub redistributors: u64,
    /// How many redistributor frames fit there; further ones go above RAM.
    pub redistributor_frames: u32,
}

/// A device at a fixed place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardDevice {
    /// What it is.
    pub kind: BoardDeviceKind,
    /// Its first guest-physical address.
    pub base: u64,
    /// Its SPI number (INTID - 32).
    pub spi: u32,
}

/// Kinds of device that a board file can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BoardDeviceKind {
    /// ARM PrimeCell UART.
    Pl011,
    /// ARM PrimeCell real-time clock.
    Pl031,
    /// ARM PrimeCell GPIO; its line 3 is the power key.
    Pl061,
}

/// A device at I/O ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortDevice {
    /// What it is.
    pub kind: PortKind,
    /// Its first port.
    pub base: u16,
    /// Its interrupt (GSI); there for the kinds that have one.
    pub irq: Option<u32>,
}

/// Kinds of device that stand at I/O ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortKind {
    /// 16550A UART: the serial console.
    #[serde(rename = "16550")]
    Uart16550,
    /// MC146818 clock with its memory.
    Cmos,
    /// Keyboard controller without a keyboard; its command 0xfe resets.
    I8042,
    /// The reset control register of Intel's chipsets.
    Reset,
    /// ACPI's sleep registers, and the power button's interrupt.
    Acpi,
}

impl PortKind {
    const ALL: [PortKind; 5] = [
        PortKind::Uart16550,
        PortKind::Cmos,
        PortKind::I8042,
        PortKind::Reset,
        PortKind::Acpi,
    ];

    /// The name in board files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            PortKind::Uart16550 => "16550",
            PortKind::Cmos => "cmos",
            PortKind::I8042 => "i8042",
            PortKind::Reset => "reset",
            PortKind::Acpi => "acpi",
        }
    }

    /// How many ports it takes.
    #[must_use]
    pub const fn ports(self) -> u16 {
        match self {
            PortKind::Uart16550 => 8,
            PortKind::Cmos | PortKind::Acpi => 2,
            // Data, control port B of the PC, and at the fourth place behind it the command.
            PortKind::I8042 => 5,
            PortKind::Reset => 1,
        }
    }

    /// Whether it raises an interrupt.
    #[must_use]
    pub const fn interrupts(self) -> bool {
        matches!(self, PortKind::Uart16550 | PortKind::Acpi)
    }
}

impl fmt::Display for PortKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PortKind::Uart16550 => "16550 serial console",
            PortKind::Cmos => "CMOS real-time clock",
            PortKind::I8042 => "i8042 keyboard controller",
            PortKind::Reset => "reset control register",
            PortKind::Acpi => "ACPI sleep registers, power button",
        })
    }
}

/// Slots for virtio devices over MMIO, 0x200 bytes each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioSlots {
    /// The first slot's address.
    pub base: u64,
    /// How many slots there are.
    pub slots: u32,
    /// SPI of the first slot; the next slot has the next one.
    pub spi: u32,
}

/// Why a board file was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BoardError {
    /// The text is no TOML.
    #[error("{place}: {cause}")]
    Syntax {
        /// Where.
        place: Place,
        /// What the parser says.
        cause: String,
    },
    /// A key that no board has.
    #[error(
        "{place}: unknown key '{key}' in {table}; did you mean '{nearest}'? Known here: {known}"
    )]
    UnknownKey {
        /// Where.
        place: Place,
        /// The key.
        key: String,
        /// The table that it stands in.
        table: String,
        /// The known key that looks most like it.
        nearest: String,
        /// All known keys of the table.
        known: String,
    },
    /// A key that each board must have.
    #[error("{table} lacks '{key}'; add {example}")]
    Missing {
        /// The table.
        table: String,
        /// The key.
        key: String,
        /// How it is written.
        example: String,
    },
    /// A value that does not fit its key.
    #[error("{place}: '{key}' {cause}")]
    Value {
        /// Where.
        place: Place,
        /// The key.
        key: String,
        /// What is wrong and what is valid.
        cause: String,
    },
}

impl Board {
    /// Reads the text of a board file that inherits from no other.
    ///
    /// # Errors
    /// As [`Profile::read`].
    pub fn parse(text: &str) -> Result<Board, BoardError> {
        let alone =
            |_: &str, name: &str| Err(format!("is '{name}', and no other board is at hand"));
        Ok(Profile::read("", text, &alone)?.board)
    }
}

/// A board with the places that its values come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// The board.
    pub board: Board,
    lines: Vec<Line>,
}

impl Profile {
    /// Reads a board file's text. `name` is what the file is called, `find` finds those that it
    /// inherits from.
    ///
    /// # Errors
    /// [`BoardError`]: no TOML, unknown or missing keys, values out of range. Overlaps are found
    /// when a machine is planned, since they depend on the memory asked for.
    pub fn read(name: &str, text: &str, find: Find<'_>) -> Result<Profile, BoardError> {
        let tree = layers::read(name, text, find)?;
        let record = Record::default();
        let board = board(Fields::top(tree, Some(&record)))?;
        Ok(Profile {
            board,
            lines: record.into_inner(),
        })
    }

    /// The board as a file that inherits from no other: behind each value the line that it comes
    /// from, in this board's own file or in the one named, and the comment that stands there.
    #[must_use]
    pub fn show(&self) -> String {
        let mut out = String::new();
        for line in &self.lines {
            match line {
                Line::Table(head) => out += &format!("\n{head}\n"),
                Line::Value {
                    key,
                    written,
                    place,
                    note,
                } => {
                    let from = match place {
                        None => "default".to_owned(),
                        Some(place) => {
                            let file = place.parent.as_deref().unwrap_or(&self.board.name);
                            format!("{file}:{}", place.line)
                        }
                    };
                    let space = if note.is_empty() { "" } else { "  " };
                    out += &format!(
                        "{:<39} # {from}{space}{note}\n",
                        format!("{key} = {written}")
                    );
                }
            }
        }
        out
    }
}

fn board(mut root: Fields<'_>) -> Result<Board, BoardError> {
    let name = root.string("name", "\"my-board\"")?;
    let description = root.optional_string("description")?.unwrap_or_default();
    let arch = architecture(&mut root)?;
    // Recognition reads it by itself; here it is checked.
    if let Some(fields) = root.optional_table("match")? {
        signature::signature(fields)?;
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

/// What `read` makes of each table.
fn each<'a, T>(
    tables: Vec<Fields<'a>>,
    read: fn(Fields<'a>) -> Result<T, BoardError>,
) -> Result<Vec<T>, BoardError> {
    tables.into_iter().map(read).collect()
}

fn architecture(root: &mut Fields<'_>) -> Result<Architecture, BoardError> {
    match root.string("arch", "\"aarch64\"")?.as_str() {
        "aarch64" => Ok(Architecture::Aarch64),
        "x86_64" => Ok(Architecture::X86_64),
        other => Err(root.wrong("arch", format!("is '{other}'; use aarch64 or x86_64"))),
    }
}

fn is_page(size: &u64) -> bool {
    matches!(size, 0x1000 | 0x4000 | 0x1_0000)
}

/// A size among those that `fits` lets through.
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

/// The most computing power (Documentation/devicetree/bindings/cpu/cpu-capacity.txt).
pub const FULL_CAPACITY: u32 = 1024;

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
        // 64 KiB is what GICv3 asks for and what suits every host page size.
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
        "pl031" => BoardDeviceKind::Pl031,
        "pl061" => BoardDeviceKind::Pl061,
        other => {
            let cause = format!("is '{other}'; use pl011, pl031 or pl061");
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

fn virtio_slots(mut fields: Fields<'_>, arch: Architecture) -> Result<VirtioSlots, BoardError> {
    let key = match arch {
        Architecture::Aarch64 => "spi",
        Architecture::X86_64 => "irq",
    };
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VIRT: &str = include_str!("../../boards/virt.toml");

    fn refused(from: &str, to: &str) -> BoardError {
        assert!(VIRT.contains(from), "the test replaces what is not there");
        Board::parse(&VIRT.replacen(from, to, 1)).expect_err(to)
    }

    #[test]
    fn the_built_in_board_is_read() {
        let board = Board::parse(VIRT).expect("valid");
        assert_eq!(board.name, "virt");
        assert_eq!(board.guest.memory, 512 << 20);
        assert_eq!(board.memory[0].base, 0x4000_0000);
        assert_eq!(board.devices.len(), 3);
        assert_eq!(board.gic.map(|gic| gic.redistributor_frames), Some(123));
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_the_nearest_one() {
        let error = refused("ipa-limit = 48", "ipa-limit = 48\nipa-limitt = 3");
        let BoardError::UnknownKey {
            place,
            key,
            nearest,
            ..
        } = &error
        else {
            panic!("{error}");
        };
        assert_eq!(
            (key.as_str(), nearest.as_str()),
            ("ipa-limitt", "ipa-limit")
        );
        assert!(
            VIRT.lines()
                .nth(place.line - 2)
                .is_some_and(|text| text.contains("ipa-limit"))
        );
    }

    #[test]
    fn a_missing_field_is_named_with_an_example() {
        let error = refused("distributor = 0x0800_0000\n", "");
        assert_eq!(
            error.to_string(),
            "[gic] lacks 'distributor'; add distributor = 0x0800_0000"
        );
        assert!(matches!(
            refused("[[memory]]\nbase = 0x4000_0000", ""),
            BoardError::Missing { .. }
        ));
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for (from, to) in [
            ("ipa-limit = 48", "ipa-limit = 56"),
            ("page-size = \"4K\"", "page-size = \"8K\""),
            ("gic = [3]", "gic = [4]"),
            ("features = [\"pmu\"", "features = [\"fpu\""),
            ("cpus = 1", "cpus = 1\npmu = \"yes\""),
            ("memory = \"512M\"", "memory = \"many\""),
            ("memory = \"512M\"", "memory = 512"),
            ("cpus = 1", "cpus = -1"),
            ("spi = 1", "spi = 960"),
            ("0x0800_0000", "0x0800_1000"),
            ("kind = \"pl011\"", "kind = \"ns16550\""),
            ("arch = \"aarch64\"", "arch = \"riscv\""),
        ] {
            assert!(
                matches!(refused(from, to), BoardError::Value { .. }),
                "{to}"
            );
        }
        assert!(matches!(
            refused("cpus = 1", "cpus = "),
            BoardError::Syntax { .. }
        ));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC*", at in 0..VIRT.len()) {
            let _ = Board::parse(&text);
            if VIRT.is_char_boundary(at) {
                let _ = Board::parse(&format!("{}{text}{}", &VIRT[..at], &VIRT[at..]));
            }
        }
    }
}
