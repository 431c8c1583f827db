//! The registers, loopback, and reset.

use super::linux::linux_opens;
use super::*;
use crate::primecell::tests::{assert_invalid, assert_read_only, identification};

#[test]
fn registers_have_their_reset_values() {
    let mut bench = Bench::new();
    let values = [
        (offset::DR, 0),
        (offset::RSR_ECR, 0),
        (offset::FR, 0x97),
        (offset::ILPR, 0),
        (offset::IBRD, 0),
        (offset::FBRD, 0),
        (offset::LCR_H, 0),
        (offset::CR, 0x300),
        (offset::IFLS, 0x12),
        (offset::IMSC, 0),
        (offset::RIS, 0),
        (offset::MIS, 0),
        (offset::DMACR, 0),
    ];
    for (offset, value) in values {
        assert_eq!(bench.read(offset), value, "{offset:#x}");
    }
    assert_eq!(bench.uart.faults(), 0);
    assert_eq!(bench.line.history(), []);
}

#[test]
fn identification_is_what_linux_matches() {
    let mut bench = Bench::new();
    let ids = identification(&mut bench.uart);
    assert_eq!(ids, [0x11, 0x10, 0x14, 0, 0x0d, 0xf0, 0x05, 0xb1]);
    // drivers/tty/serial/amba-pl011.c: id 0x00041011, mask 0x000fffff.
    let id = ids[0] | ids[1] << 8 | ids[2] << 16 | ids[3] << 24;
    assert_eq!(id & 0x000f_ffff, 0x0004_1011);
    // Linux: a FIFO of 16 below revision 3.
    assert!(id >> 20 & 0xf < 3);
}

#[test]
fn registers_keep_the_bits_they_have() {
    let mut bench = Bench::new();
    let masks = [
        (offset::ILPR, 0xff),
        (offset::IBRD, 0xffff),
        (offset::FBRD, 0x3f),
        (offset::LCR_H, 0xff),
        (offset::CR, 0xff87),
        (offset::IFLS, 0x3f),
        (offset::IMSC, 0x7ff),
        (offset::DMACR, 0x7),
    ];
    for (offset, mask) in masks {
        bench.write(offset, u32::MAX);
        assert_eq!(bench.read(offset), mask, "{offset:#x}");
        bench.write(offset, 0);
        assert_eq!(bench.read(offset), 0, "{offset:#x}");
    }
    assert_eq!(bench.uart.faults(), 0);
}

#[test]
fn narrow_accesses_see_the_low_bytes() {
    let mut bench = Bench::new();
    assert_eq!(bench.uart.write(offset::IBRD, &[0x34, 0x12]), Action::None);
    let mut byte = [0];
    assert_eq!(bench.uart.read(offset::IBRD, &mut byte), Action::None);
    assert_eq!(byte, [0x34]);
    assert_eq!(bench.read16(offset::IBRD), 0x1234);
    assert_eq!(bench.read(offset::IBRD), 0x1234);
    // A narrow write writes the whole register, zero-extended.
    assert_eq!(bench.uart.write(offset::IBRD, &[0x56]), Action::None);
    assert_eq!(bench.read(offset::IBRD), 0x56);
    assert_eq!(bench.uart.faults(), 0);
}

#[test]
fn invalid_accesses_read_as_zero_are_ignored_and_counted() {
    let mut bench = Bench::new();
    let mut wide = [0xff; 8];
    assert_eq!(bench.uart.read(offset::CR, &mut wide), Action::None);
    assert_eq!(wide, [0; 8]);
    assert_eq!(bench.uart.write(offset::DR, &[b'x'; 8]), Action::None);
    assert_eq!(bench.output(), b"");
    let mut inside = [0xff; 1];
    assert_eq!(bench.uart.read(offset::CR + 1, &mut inside), Action::None);
    assert_eq!(inside, [0]);
    assert_eq!(bench.uart.faults(), 3);
    for offset in [0x08, 0x14, 0x1c, 0x4c, 0x80, 0xfdc, 0x1000, u64::MAX - 3] {
        assert_invalid(&mut bench.uart, Pl011::faults, offset, 4);
    }
    // Read-only and write-only registers.
    for offset in [offset::FR, offset::RIS, offset::MIS, 0xfe0] {
        assert_read_only(&mut bench.uart, Pl011::faults, offset);
    }
    let before = bench.uart.faults();
    assert_eq!(bench.read(offset::ICR), 0);
    assert_eq!(bench.uart.faults(), before + 1);
}

#[test]
fn unmasking_alone_raises_no_transmit_interrupt() {
    let mut bench = Bench::new();
    bench.write(offset::IMSC, interrupt::TX);
    assert!(!bench.line.is_high());
    bench.write(offset::DR, 0);
    assert!(bench.line.is_high());
    assert_eq!(bench.read(offset::MIS), interrupt::TX);
    bench.write(offset::ICR, interrupt::TX);
    assert!(!bench.line.is_high());
}

#[test]
fn collected_writes_are_one_output() {
    let mut bench = Bench::new();
    bench.write(offset::IMSC, interrupt::TX);
    assert_eq!(bench.uart.write_data(b""), Action::None);
    assert!(!bench.line.is_high());
    assert_eq!(bench.uart.write_data(b"many bytes"), Action::None);
    assert_eq!(
        *bench.output.lock().expect("sound"),
        [b"many bytes".to_vec()]
    );
    assert!(bench.line.is_high());
}

#[test]
fn looped_back_output_comes_in_and_input_waits() {
    let mut bench = Bench::with_fifos();
    bench.write(offset::CR, 0x381);
    bench.write(offset::IMSC, interrupt::RX);
    assert_eq!(bench.uart.room(), 0);
    assert_eq!(bench.uart.wanted(), 0);
    assert_eq!(bench.uart.receive(b"x"), 0);
    assert!(!bench.uart.receive_break());
    assert_eq!(bench.uart.write_data(b"ab"), Action::None);
    bench.write(offset::DR, u32::from(b'c'));
    assert_eq!(bench.drain(), b"abc");
    assert_eq!(bench.rooms(), 0);
    bench.write(offset::CR, 0x301);
    assert_eq!(bench.rooms(), 1);
    assert_eq!(bench.uart.receive(b"x"), 1);
}

#[test]
fn a_guest_can_overrun_itself_when_looped_back() {
    let mut bench = Bench::with_fifos();
    bench.write(offset::CR, 0x381);
    assert_eq!(bench.uart.write_data(&[b'x'; 17]), Action::None);
    assert_ne!(bench.ris() & interrupt::OE, 0);
    assert_eq!(bench.read(offset::RSR_ECR), rsr::OVERRUN);
    assert_eq!(bench.read(offset::DR), u32::from(b'x') | dr::OVERRUN);
    bench.write(offset::DR, u32::from(b'y'));
    assert_eq!(bench.read(offset::DR), u32::from(b'x'));
    assert_eq!(bench.read(offset::RSR_ECR), rsr::OVERRUN);
    bench.write(offset::RSR_ECR, 0);
    assert_eq!(bench.read(offset::RSR_ECR), 0);
}

#[test]
fn looped_back_modem_lines_follow_the_outputs() {
    let mut bench = Bench::new();
    bench.write(offset::CR, 0x381);
    assert_eq!(bench.read(offset::FR) & 0x107, 0);
    // CTS, DCD and DSR fell.
    assert_eq!(bench.ris(), 0xe);
    bench.write(offset::ICR, 0xf);
    for (output, input, raised) in [
        (cr::RTS, fr::CTS, interrupt::CTS),
        (cr::DTR, fr::DSR, interrupt::DSR),
        (cr::OUT1, fr::DCD, interrupt::DCD),
        (cr::OUT2, fr::RI, interrupt::RI),
    ] {
        bench.write(offset::CR, cr::LBE | output);
        assert_eq!(bench.read(offset::FR) & 0x107, input);
        assert_eq!(bench.ris(), raised);
        bench.write(offset::CR, cr::LBE);
        assert_eq!(bench.ris(), raised);
        bench.write(offset::ICR, 0xf);
    }
}

#[test]
fn reset_is_power_on() {
    let mut bench = Bench::new();
    linux_opens(&mut bench);
    assert_eq!(bench.uart.write_data(b"last words"), Action::None);
    assert_eq!(bench.uart.receive(&[b'x'; 20]), 16);
    assert!(bench.line.is_high());
    let rooms = bench.rooms();
    bench.uart.reset();
    assert!(!bench.line.is_high());
    // There is room again, but the guest does not listen.
    assert_eq!(bench.rooms(), rooms);
    assert_eq!(bench.uart.wanted(), 0);
    assert_eq!(bench.output(), b"last words");
    for (offset, value) in [
        (offset::FR, 0x97),
        (offset::IBRD, 0),
        (offset::LCR_H, 0),
        (offset::CR, 0x300),
        (offset::IFLS, 0x12),
        (offset::IMSC, 0),
        (offset::RIS, 0),
        (offset::DR, 0),
    ] {
        assert_eq!(bench.read(offset), value, "{offset:#x}");
    }
    assert_eq!(bench.uart.room(), 1);
}
