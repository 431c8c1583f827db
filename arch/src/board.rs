//! Board profiles: what a TOML file of `boards/` says, as a value.

use crate::irq::GicChoice;
use crate::size::parse_size;
use crate::width::{MAX_BITS, MIN_BITS, WidthPolicy};
use serde::Serialize;
use std::fmt;
use toml_span::value::{Table, Value, ValueInner};

/// An instruction set that guests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// ARM, 64 bits.
    Aarch64,
    /// Intel and AMD, 64 bits.
    X86_64,
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
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Slots for virtio devices.
    pub virtio_mmio: Option<VirtioSlots>,
}

/// Facts about a host that a plan made elsewhere starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssumedHost {
    /// Most guest-physical address bits.
    pub ipa_limit: u8,
    /// Page size in bytes.
    pub page_size: u64,
    /// GIC versions that KVM emulates (2, 3).
    pub gic: Vec<u8>,
    /// Page sizes in bytes that guest kernels may use.
    pub guest_pages: Vec<u64>,
}

/// Values for flags that were not given.
#[derive(Clone, Debug, PartialEq, Eq)]
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
}

/// A bank of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bank {
    /// Its first guest-physical address.
    pub base: u64,
    /// How much of the guest's memory lies there.
    pub share: Share,
}

/// How much of the guest's memory a bank takes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// Just so much.
    Exactly(u64),
    /// What is left, up to so much.
    UpTo(u64),
    /// All that is left.
    Rest,
}

/// Where the interrupt controller's frames lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BoardDevice {
    /// What it is.
    pub kind: BoardDeviceKind,
    /// Its first guest-physical address.
    pub base: u64,
    /// Its SPI number (INTID - 32).
    pub spi: u32,
}

/// Kinds of device that a board file can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoardDeviceKind {
    /// ARM PrimeCell UART.
    Pl011,
    /// ARM PrimeCell real-time clock.
    Pl031,
    /// ARM PrimeCell GPIO; its line 3 is the power key.
    Pl061,
}

/// Slots for virtio devices over MMIO, 0x200 bytes each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    #[error("line {line}: {cause}")]
    Syntax {
        /// Line, from 1.
        line: usize,
        /// What the parser says.
        cause: String,
    },
    /// A key that no board has.
    #[error(
        "line {line}: unknown key '{key}' in {table}; did you mean '{nearest}'? Known here: {known}"
    )]
    UnknownKey {
        /// Line, from 1.
        line: usize,
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
    #[error("line {line}: '{key}' {cause}")]
    Value {
        /// Line, from 1.
        line: usize,
        /// The key.
        key: String,
        /// What is wrong and what is valid.
        cause: String,
    },
}

impl Board {
    /// Reads a board file's text.
    ///
    /// # Errors
    /// [`BoardError`]: no TOML, unknown or missing keys, values out of range. Overlaps are found
    /// when a machine is planned, since they depend on the memory asked for.
    pub fn parse(text: &str) -> Result<Board, BoardError> {
        let mut document = toml_span::parse(text).map_err(|error| BoardError::Syntax {
            line: line_of(text, error.span.start),
            cause: error.to_string(),
        })?;
        let mut root = Fields::of(text, "the board", document.take(), 0)?;
        let arch = match root.string("arch", "\"aarch64\"")?.as_str() {
            "aarch64" => Architecture::Aarch64,
            "x86_64" => Architecture::X86_64,
            other => return Err(root.wrong("arch", format!("is '{other}'; use aarch64 or x86_64"))),
        };
        let board = Board {
            name: root.string("name", "\"my-board\"")?,
            description: root.optional_string("description")?.unwrap_or_default(),
            arch,
            host: assumed_host(root.table("host", "[host]")?)?,
            guest: guest_defaults(root.table("guest", "[guest]")?)?,
            memory: root
                .tables("memory")?
                .into_iter()
                .map(bank)
                .collect::<Result<_, _>>()?,
            gic: root.optional_table("gic")?.map(gic_windows).transpose()?,
            devices: root
                .tables("device")?
                .into_iter()
                .map(device)
                .collect::<Result<_, _>>()?,
            virtio_mmio: root
                .optional_table("virtio-mmio")?
                .map(virtio_slots)
                .transpose()?,
        };
        root.finish(&[
            "name",
            "description",
            "arch",
            "host",
            "guest",
            "memory",
            "gic",
            "device",
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
}

fn assumed_host(mut fields: Fields<'_>) -> Result<AssumedHost, BoardError> {
    let mut ipa_limit = fields.number("ipa-limit", "ipa-limit = 48")?;
    if !(u64::from(MIN_BITS)..=u64::from(MAX_BITS)).contains(&ipa_limit) {
        return Err(fields.wrong(
            "ipa-limit",
            format!("must be {MIN_BITS} to {MAX_BITS} bits"),
        ));
    }
    // The check above keeps it within a byte.
    ipa_limit &= 0xff;
    let page_size = fields.size("page-size", "page-size = \"4K\"")?;
    let pages = |size: &u64| matches!(size, 0x1000 | 0x4000 | 0x1_0000);
    if !pages(&page_size) {
        return Err(fields.wrong("page-size", "must be 4K, 16K or 64K".to_owned()));
    }
    let gic = fields.list("gic", |value| match value {
        ValueInner::Integer(2) => Some(2),
        ValueInner::Integer(3) => Some(3),
        _ => None,
    })?;
    let gic = gic.ok_or_else(|| fields.wrong("gic", "must be a list of 2 and 3".to_owned()))?;
    let guest_pages = fields
        .list("guest-pages", |value| {
            let text = value.as_str()?;
            parse_size(text).ok().filter(pages)
        })?
        .ok_or_else(|| {
            fields.wrong(
                "guest-pages",
                "must be a list of \"4K\", \"16K\", \"64K\"".to_owned(),
            )
        })?;
    fields.finish(&["ipa-limit", "page-size", "gic", "guest-pages"])?;
    Ok(AssumedHost {
        ipa_limit: ipa_limit as u8,
        page_size,
        gic,
        guest_pages,
    })
}

fn guest_defaults(mut fields: Fields<'_>) -> Result<GuestDefaults, BoardError> {
    let cpus = fields.number_u32("cpus", "cpus = 1")?;
    let memory = fields.size("memory", "memory = \"512M\"")?;
    let cmdline = fields.optional_string("cmdline")?.unwrap_or_default();
    let gic = fields.parsed("gic")?.unwrap_or_default();
    let width = fields.parsed("ipa-bits")?.unwrap_or_default();
    fields.finish(&["cpus", "memory", "cmdline", "gic", "ipa-bits"])?;
    Ok(GuestDefaults {
        cpus,
        memory,
        cmdline,
        gic,
        width,
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
        spi: fields.spi("spi")?,
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

fn virtio_slots(mut fields: Fields<'_>) -> Result<VirtioSlots, BoardError> {
    let slots = VirtioSlots {
        base: fields.number("base", "base = 0x0a00_0000")?,
        slots: fields.number_u32("slots", "slots = 32")?,
        spi: fields.spi("spi")?,
    };
    if slots.slots > 512 || !slots.base.is_multiple_of(0x200) {
        let cause = "must be at most 512, from a base that is a multiple of 0x200".to_owned();
        return Err(fields.wrong("slots", cause));
    }
    fields.finish(&["base", "slots", "spi"])?;
    Ok(slots)
}

/// The fields of one table, taken one by one; what is left at the end is unknown.
struct Fields<'a> {
    text: &'a str,
    name: String,
    table: Table<'a>,
    /// Where the fields already taken stand in the text, for errors about their values.
    taken: Vec<(&'static str, usize)>,
}

impl<'a> Fields<'a> {
    fn of(text: &'a str, name: &str, value: ValueInner<'a>, at: usize) -> Result<Self, BoardError> {
        match value {
            ValueInner::Table(table) => Ok(Fields {
                text,
                name: name.to_owned(),
                table,
                taken: Vec::new(),
            }),
            _ => Err(BoardError::Value {
                line: line_of(text, at),
                key: name.to_owned(),
                cause: "must be a table".to_owned(),
            }),
        }
    }

    fn take(&mut self, key: &'static str) -> Option<Value<'a>> {
        let value = self.table.remove(key)?;
        self.taken.push((key, value.span.start));
        Some(value)
    }

    fn missing(&self, key: &str, example: &str) -> BoardError {
        BoardError::Missing {
            table: self.name.clone(),
            key: key.to_owned(),
            example: example.to_owned(),
        }
    }

    fn wrong(&self, key: &str, cause: String) -> BoardError {
        let place = self.taken.iter().find(|(taken, _)| *taken == key);
        BoardError::Value {
            line: line_of(self.text, place.map_or(0, |(_, offset)| *offset)),
            key: key.to_owned(),
            cause,
        }
    }

    fn optional_string(&mut self, key: &'static str) -> Result<Option<String>, BoardError> {
        match self.take(key).map(|mut value| value.take()) {
            None => Ok(None),
            Some(ValueInner::String(text)) if text.contains(char::is_control) => {
                Err(self.wrong(key, "must be one line of printable text".to_owned()))
            }
            Some(ValueInner::String(text)) => Ok(Some(text.into_owned())),
            Some(_) => Err(self.wrong(key, "must be a string in quotes".to_owned())),
        }
    }

    fn string(&mut self, key: &'static str, example: &str) -> Result<String, BoardError> {
        self.optional_string(key)?
            .ok_or_else(|| self.missing(key, &format!("{key} = {example}")))
    }

    fn number(&mut self, key: &'static str, example: &str) -> Result<u64, BoardError> {
        match self.take(key).map(|mut value| value.take()) {
            None => Err(self.missing(key, example)),
            Some(ValueInner::Integer(number)) => u64::try_from(number)
                .map_err(|_| self.wrong(key, format!("is {number}; it can't be negative"))),
            Some(_) => Err(self.wrong(key, format!("must be a number: {example}"))),
        }
    }

    fn number_u32(&mut self, key: &'static str, example: &str) -> Result<u32, BoardError> {
        let number = self.number(key, example)?;
        u32::try_from(number).map_err(|_| self.wrong(key, format!("is {number}; that is too many")))
    }

    fn spi(&mut self, key: &'static str) -> Result<u32, BoardError> {
        match self.number_u32(key, "spi = 1")? {
            // KVM takes at most 992 interrupts, 32 of them private (arch/arm64/kvm/vgic/
            // vgic-kvm-device.c: vgic_set_common_attr).
            spi @ 0..960 => Ok(spi),
            spi => Err(self.wrong(key, format!("is {spi}; SPIs are numbered 0 to 959"))),
        }
    }

    fn optional_size(&mut self, key: &'static str) -> Result<Option<u64>, BoardError> {
        match self.optional_string(key)?.map(|text| parse_size(&text)) {
            None => Ok(None),
            Some(Ok(0)) => Err(self.wrong(key, "must not be 0".to_owned())),
            Some(Ok(bytes)) => Ok(Some(bytes)),
            Some(Err(cause)) => Err(self.wrong(key, format!("holds a bad size: {cause}"))),
        }
    }

    fn size(&mut self, key: &'static str, example: &str) -> Result<u64, BoardError> {
        self.optional_size(key)?
            .ok_or_else(|| self.missing(key, example))
    }

    fn parsed<T: std::str::FromStr<Err = String>>(
        &mut self,
        key: &'static str,
    ) -> Result<Option<T>, BoardError> {
        match self.optional_string(key)?.map(|text| text.parse()) {
            None => Ok(None),
            Some(Ok(value)) => Ok(Some(value)),
            Some(Err(cause)) => Err(self.wrong(key, format!("does not fit: {cause}"))),
        }
    }

    /// The items of a list; `Ok(None)` if one of them does not fit.
    fn list<T>(
        &mut self,
        key: &'static str,
        item: impl Fn(&ValueInner<'a>) -> Option<T>,
    ) -> Result<Option<Vec<T>>, BoardError> {
        match self.take(key).map(|mut value| value.take()) {
            None => Err(self.missing(key, &format!("{key} = [..]"))),
            Some(ValueInner::Array(items)) => Ok(items
                .into_iter()
                .map(|mut value| item(&value.take()))
                .collect()),
            Some(_) => Ok(None),
        }
    }

    fn optional_table(&mut self, key: &'static str) -> Result<Option<Fields<'a>>, BoardError> {
        self.take(key)
            .map(|mut value| {
                let at = value.span.start;
                Fields::of(self.text, &format!("[{key}]"), value.take(), at)
            })
            .transpose()
    }

    fn table(&mut self, key: &'static str, example: &str) -> Result<Fields<'a>, BoardError> {
        self.optional_table(key)?
            .ok_or_else(|| self.missing(key, example))
    }

    fn tables(&mut self, key: &'static str) -> Result<Vec<Fields<'a>>, BoardError> {
        match self.take(key).map(|mut value| value.take()) {
            None => Ok(Vec::new()),
            Some(ValueInner::Array(items)) => items
                .into_iter()
                .map(|mut value| {
                    let at = value.span.start;
                    Fields::of(self.text, &format!("[[{key}]]"), value.take(), at)
                })
                .collect(),
            Some(_) => Err(self.wrong(key, format!("must be a list of tables: [[{key}]]"))),
        }
    }

    fn finish(self, known: &[&str]) -> Result<(), BoardError> {
        let Some(key) = self.table.keys().next() else {
            return Ok(());
        };
        let nearest = known
            .iter()
            .min_by_key(|name| distance(name, &key.name))
            .copied()
            .unwrap_or_default();
        Err(BoardError::UnknownKey {
            line: line_of(self.text, key.span.start),
            key: key.name.escape_debug().to_string(),
            table: self.name,
            nearest: nearest.to_owned(),
            known: known.join(", "),
        })
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes()
        .take(offset)
        .filter(|&byte| byte == b'\n')
        .count()
        + 1
}

/// The Levenshtein distance of two words.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
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
            line, key, nearest, ..
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
                .nth(line - 2)
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
