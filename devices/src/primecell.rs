//! What Arm's PrimeCell peripherals have in common: 32-bit registers on word boundaries in a 4 KiB
//! window, identification registers at its end, and a level-triggered interrupt line.

use std::sync::Arc;

use crate::IrqLine;
use crate::bus::answer;
use crate::limit::{Admitted, RateLimit};

/// The registers of one peripheral, by offset in bytes, a multiple of 4.
pub(crate) trait PrimeCell {
    /// PeriphID0 to PeriphID3.
    const PERIPHERAL_ID: [u8; 4];

    /// The access widths that its registers support, in bytes.
    ///
    /// Drivers use all three: Linux writes the PL011 by halfwords, its early console by
    /// bytes, and reads identification by words.
    const WIDTHS: &'static [usize] = &[1, 2, 4];

    /// Reads a register, with its side effects; returns `None` when no readable register is there.
    /// Not called for the identification registers.
    fn read_register(&mut self, offset: u64) -> Option<u32>;

    /// Writes a register, with its side effects; returns `None` when no writable register is there.
    fn write_register(&mut self, offset: u64, value: u32) -> Option<()>;
}

/// Handles a read of the guest; an invalid one returns zeros. Returns how many faults to count: 1
/// for an invalid read, else 0.
pub(crate) fn read<P: PrimeCell>(peripheral: &mut P, offset: u64, data: &mut [u8]) -> u64 {
    data.fill(0);
    let value = reaches_register(offset, data.len(), P::WIDTHS)
        .then(|| {
            let value = peripheral.read_register(offset);
            value.or_else(|| identify(P::PERIPHERAL_ID, offset))
        })
        .flatten();
    answer(data, value.unwrap_or(0));
    u64::from(value.is_none())
}

/// Handles a write of the guest; an invalid one is ignored. Returns how many faults to count: 1 for
/// an invalid write, else 0.
pub(crate) fn write<P: PrimeCell>(peripheral: &mut P, offset: u64, data: &[u8]) -> u64 {
    let answered = reaches_register(offset, data.len(), P::WIDTHS)
        .then(|| peripheral.write_register(offset, written(data)))
        .flatten();
    u64::from(answered.is_none())
}

/// A peripheral's invalid accesses: counted, and logged at a limited rate.
pub(crate) struct Faults {
    name: &'static str,
    limit: RateLimit,
}

impl Faults {
    /// Creates the count of the peripheral called `name`.
    pub(crate) fn of(name: &'static str) -> Faults {
        Faults {
            name,
            limit: RateLimit::default(),
        }
    }

    /// Counts `faults`, 1 or 0, of an access.
    pub(crate) fn note(&self, faults: u64, access: &str, offset: u64, size: usize) {
        if faults > 0 {
            self.limit.log(log::Level::Warn, |Admitted { count, .. }| {
                let name = self.name;
                format!(
                    "{name}: no register answers a {access} of {size} bytes at {offset:#x} (fault {count} of this device)"
                )
            });
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.limit.count()
    }
}

/// The interrupt line of a peripheral, which passes on only changes of its level.
pub(crate) struct Line {
    wire: Arc<dyn IrqLine>,
    is_high: bool,
}

impl Line {
    /// Creates a line that is low, as after power-on.
    pub(crate) fn new(wire: Arc<dyn IrqLine>) -> Line {
        Line {
            wire,
            is_high: false,
        }
    }

    /// Drives the line high or low.
    pub(crate) fn set(&mut self, high: bool) {
        if high != self.is_high {
            self.is_high = high;
            self.wire.set(high);
        }
    }
}

/// Offset of the first identification register in bytes (e.g. ARM DDI 0183,
/// section 3.3.15). Linux's AMBA bus finds the driver by these
/// (drivers/amba/bus.c, `amba_read_periphid`).
const ID_FIRST: u64 = 0xfe0;

/// Offset of the last identification register in bytes.
const ID_LAST: u64 = 0xffc;

/// PrimeCellID0 to PrimeCellID3: 0xb105f00d, one byte a register, the same on all.
const PRIMECELL_ID: [u8; 4] = [0x0d, 0xf0, 0x05, 0xb1];

/// Returns whether an access of `size` bytes at `offset` is one that a register supports: it begins
/// at the register and has one of `widths`.
fn reaches_register(offset: u64, size: usize, widths: &[usize]) -> bool {
    offset.is_multiple_of(4) && widths.contains(&size)
}

/// Returns the value of a write of at most four bytes; bytes not written count as zero.
fn written(data: &[u8]) -> u32 {
    data.iter()
        .rev()
        .fold(0, |value, &byte| value << 8 | u32::from(byte))
}

/// Returns the identification register at `offset` of the peripheral whose PeriphID0 to
/// PeriphID3 are `peripheral`; `None` when there is no such register.
pub(crate) fn identify(peripheral: [u8; 4], offset: u64) -> Option<u32> {
    if !(ID_FIRST..=ID_LAST).contains(&offset) {
        return None;
    }
    let index = usize::try_from((offset - ID_FIRST) / 4).ok()?;
    let id = peripheral.iter().chain(&PRIMECELL_ID).nth(index)?;
    Some(u32::from(*id))
}

#[cfg(test)]
pub(crate) mod tests;
