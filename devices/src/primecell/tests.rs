//! The registers of a PrimeCell, and assertions for the tests of each peripheral.

use super::*;
use crate::Device;
use crate::action::Action;
use crate::fake::FakeLine;

/// Reads the identification registers of a device.
pub(crate) fn identification(device: &mut impl Device) -> Vec<u32> {
    let mut word = [0xff; 4];
    let mut read = |offset| {
        assert_eq!(device.read(offset, &mut word), Action::None);
        u32::from_le_bytes(word)
    };
    (ID_FIRST..=ID_LAST).step_by(4).map(&mut read).collect()
}

/// Asserts that an access is invalid: a read returns zeros, a write does nothing that a fault
/// does not say, and each is one fault.
pub(crate) fn assert_invalid<D: Device>(
    device: &mut D,
    faults: fn(&D) -> u64,
    offset: u64,
    size: usize,
) {
    let before = faults(device);
    let mut data = vec![0xff; size];
    assert_eq!(device.read(offset, &mut data), Action::None);
    assert_eq!(data, vec![0; size], "{offset:#x}");
    assert_eq!(device.write(offset, &vec![0xff; size]), Action::None);
    assert_eq!(faults(device), before + 2, "{offset:#x}");
}

/// Asserts that a register cannot be written, and that trying to is one fault.
pub(crate) fn assert_read_only<D: Device>(device: &mut D, faults: fn(&D) -> u64, offset: u64) {
    let (before, mut values) = (faults(device), [[0; 4]; 2]);
    assert_eq!(device.read(offset, &mut values[0]), Action::None);
    assert_eq!(device.write(offset, &[0xff; 4]), Action::None);
    assert_eq!(device.read(offset, &mut values[1]), Action::None);
    assert_eq!(values[0], values[1], "{offset:#x}");
    assert_eq!(faults(device), before + 1, "{offset:#x}");
}

/// A peripheral with one register, at offset 4.
struct Echo {
    register: u32,
}

impl PrimeCell for Echo {
    const PERIPHERAL_ID: [u8; 4] = [1, 2, 3, 4];

    fn read_register(&mut self, offset: u64) -> Option<u32> {
        (offset == 4).then_some(self.register)
    }

    fn write_register(&mut self, offset: u64, value: u32) -> Option<()> {
        (offset == 4).then(|| self.register = value)
    }
}

#[test]
fn registers_take_one_two_and_four_bytes_at_their_own_offset() {
    for size in [1, 2, 4] {
        assert!(reaches_register(0x18, size, Echo::WIDTHS));
        assert!(!reaches_register(0x19, size, Echo::WIDTHS));
        assert!(!reaches_register(0x1a, size, Echo::WIDTHS));
    }
    for size in [0, 3, 5, 8, 16] {
        assert!(!reaches_register(0x18, size, Echo::WIDTHS));
    }
}

#[test]
fn an_invalid_access_is_a_fault_and_reads_as_zeros() {
    let mut echo = Echo { register: 0 };
    assert_eq!(write(&mut echo, 4, &[0x78, 0x56]), 0);
    assert_eq!(echo.register, 0x5678);
    let mut data = [0xff; 4];
    assert_eq!(read(&mut echo, 4, &mut data), 0);
    assert_eq!(data, [0x78, 0x56, 0, 0]);
    assert_eq!(read(&mut echo, ID_FIRST, &mut data), 0);
    assert_eq!(data, [1, 0, 0, 0]);
    for (offset, size) in [(0, 4), (5, 1), (4, 3), (4, 8), (4, 0), (0x1000, 4)] {
        let mut data = vec![0xff; size];
        assert_eq!(write(&mut echo, offset, &data), 1, "{offset:#x}");
        assert_eq!(read(&mut echo, offset, &mut data), 1, "{offset:#x}");
        assert_eq!(data, vec![0; size], "{offset:#x}");
    }
    assert_eq!(write(&mut echo, ID_FIRST, &[1]), 1);
    assert_eq!(echo.register, 0x5678);
}

#[test]
fn a_line_passes_on_changes_only() {
    let wire = FakeLine::new();
    let mut line = Line::new(wire.clone());
    for high in [false, true, true, false, false, true] {
        line.set(high);
        assert_eq!(wire.is_high(), high);
    }
    assert_eq!(wire.history(), [true, false, true]);
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
fn each_peripheral_identifies_itself_as_qemus_does() {
    // QEMU's hw/char/pl011.c, hw/rtc/pl031.c and hw/gpio/pl061.c; kvm-unit-tests checks the
    // PL031's. A PL011 has FIFOs of 16 entries, as ours are, before revision 3 (ARM DDI 0183G).
    let known = [
        (crate::pl011::Pl011::PERIPHERAL_ID, 0x0014_1011),
        (crate::pl031::Pl031::PERIPHERAL_ID, 0x0014_1031),
        (crate::pl061::Pl061::PERIPHERAL_ID, 0x0004_1061),
    ];
    for (id, expected) in known {
        assert_eq!(u32::from_le_bytes(id), expected);
    }
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
