//! What Arm's PrimeCell peripherals have in common: 32-bit registers on word
//! boundaries in a 4 KiB window, and identification registers at the end of it.

/// Offset of the first identification register in bytes (e.g. ARM DDI 0183,
/// section 3.3.15). Linux's AMBA bus finds the driver by these
/// (drivers/amba/bus.c, `amba_read_periphid`).
const ID_FIRST: u64 = 0xfe0;

/// Offset of the last identification register in bytes.
const ID_LAST: u64 = 0xffc;

/// PrimeCellID0 to PrimeCellID3: 0xb105f00d, one byte a register, the same on all.
const PRIMECELL_ID: [u8; 4] = [0x0d, 0xf0, 0x05, 0xb1];

/// Whether an access of `size` bytes at `offset` is one a register answers: it begins
/// at the register and is not wider.
///
/// Drivers use all three widths: Linux writes the PL011 by halfwords, its early
/// console by bytes, and reads identification by words.
pub(crate) fn reaches_register(offset: u64, size: usize) -> bool {
    offset.is_multiple_of(4) && matches!(size, 1 | 2 | 4)
}

/// The value of a write of at most four bytes; bytes not written count as zero.
pub(crate) fn written(data: &[u8]) -> u32 {
    data.iter()
        .rev()
        .fold(0, |value, &byte| value << 8 | u32::from(byte))
}

/// Answers a read of at most four bytes with the low bytes of `value`.
pub(crate) fn answer(data: &mut [u8], value: u32) {
    for (byte, source) in data.iter_mut().zip(value.to_le_bytes()) {
        *byte = source;
    }
}

/// The identification register at `offset` of the peripheral whose PeriphID0 to
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
mod tests {
    use super::*;

    #[test]
    fn registers_take_one_two_and_four_bytes_at_their_own_offset() {
        for size in [1, 2, 4] {
            assert!(reaches_register(0x18, size));
            assert!(!reaches_register(0x19, size));
            assert!(!reaches_register(0x1a, size));
        }
        for size in [0, 3, 5, 8, 16] {
            assert!(!reaches_register(0x18, size));
        }
    }

    #[test]
    fn values_are_little_endian_and_extended_with_zeros() {
        assert_eq!(written(&[0x78]), 0x78);
        assert_eq!(written(&[0x78, 0x56]), 0x5678);
        assert_eq!(written(&[0x78, 0x56, 0x34, 0x12]), 0x1234_5678);
        let mut data = [0; 2];
        answer(&mut data, 0x1234_5678);
        assert_eq!(data, [0x78, 0x56]);
    }

    #[test]
    fn identification_ends_with_the_window() {
        let read: Vec<_> = (ID_FIRST..0x1000)
            .step_by(4)
            .map(|offset| identify([1, 2, 3, 4], offset))
            .collect();
        let ids = [1, 2, 3, 4, 0x0d, 0xf0, 0x05, 0xb1].map(Some);
        assert_eq!(read, ids);
        assert_eq!(identify([1, 2, 3, 4], 0xfdc), None);
        assert_eq!(identify([1, 2, 3, 4], 0x1000), None);
    }
}
