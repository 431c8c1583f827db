//! When the guest listens, and how the receive FIFO handles input.

use super::*;

#[test]
fn either_receive_interrupt_listens_and_no_other() {
    let mut bench = Bench::with_fifos();
    for unmasked in (0..11).map(|bit| 1 << bit) {
        bench.write(offset::IMSC, unmasked);
        let listens = [interrupt::RX, interrupt::RT].contains(&unmasked);
        assert_eq!(bench.uart.wanted() > 0, listens, "{unmasked:#x}");
    }
}

#[test]
fn firmware_listens_by_polling() {
    // U-Boot, serial_pl01x.c: the flags until there is a character, then the character.
    let mut bench = Bench::with_fifos();
    for _ in 0..2 {
        bench.read(offset::FR);
        assert_eq!(bench.uart.wanted(), 0);
    }
    bench.read(offset::FR);
    assert_eq!(bench.uart.wanted(), 16);
    assert_eq!(bench.rooms(), 1);
    for _ in 0..1000 {
        bench.read(offset::FR);
    }
    assert_eq!(bench.uart.wanted(), 16);
    assert_eq!(bench.uart.receive(b"ls"), 2);
    for &byte in b"ls" {
        assert_eq!(bench.read(offset::FR) & 0x10, 0);
        assert_eq!(bench.read(offset::DR), u32::from(byte));
        assert!(bench.uart.wanted() > 0);
    }
    assert_eq!(bench.read(offset::FR) & 0x10, 0x10);
    assert_eq!(bench.uart.wanted(), 16);
    assert_eq!(bench.rooms(), 1, "wanted all the time");

    // The echo ends it, until it polls again.
    bench.read(offset::FR);
    bench.write(offset::DR, u32::from(b'l'));
    assert_eq!(bench.uart.wanted(), 0);
    for _ in 0..2 {
        bench.read(offset::FR);
        assert_eq!(bench.uart.wanted(), 0);
    }
    bench.read(offset::FR);
    assert_eq!(bench.uart.wanted(), 16);
    assert_eq!(bench.rooms(), 2);
    bench.uart.reset();
    assert_eq!(bench.uart.wanted(), 0);
}

#[test]
fn firmware_that_echoes_each_character_gets_all() {
    let mut bench = Bench::new();
    let text: Vec<u8> = (0..100).collect();
    bench.input.waiting = text.iter().copied().collect();
    let (mut got, mut idle) = (Vec::new(), 0);
    while got.len() < text.len() {
        bench.feed(usize::MAX);
        if bench.read(offset::FR) & 0x10 != 0 {
            idle += 1;
            assert!(idle <= 3, "polls in vain");
            continue;
        }
        idle = 0;
        let byte = bench.read(offset::DR);
        got.push(byte as u8);
        bench.read(offset::FR);
        bench.write(offset::DR, byte);
    }
    assert_eq!(got, text);
    assert_eq!(bench.output(), text);
}

#[test]
fn firmware_that_reads_the_control_register_between_polls() {
    // EDK2, TerminalDxe and PL011UartLib: GetControl until it reports input, then Poll, Read.
    let mut bench = Bench::with_fifos();
    for _ in 0..3 {
        assert_eq!(bench.uart.wanted(), 0);
        bench.read(offset::FR);
        bench.read(offset::CR);
    }
    assert_eq!(bench.uart.wanted(), 16);
    assert_eq!(bench.rooms(), 1);
    assert_eq!(bench.uart.receive(b"\x1b"), 1);
    for _ in 0..3 {
        assert_eq!(bench.read(offset::FR) & 0x10, 0);
    }
    assert_eq!(bench.read(offset::DR), 0x1b);
    assert_eq!(bench.uart.wanted(), 16);
}

#[test]
fn without_fifos_one_character_is_held() {
    let mut bench = Bench::new();
    bench.write(offset::IMSC, interrupt::RX);
    let rooms = bench.rooms();
    assert_eq!(bench.uart.room(), 1);
    assert_eq!(bench.uart.wanted(), 1);
    assert_eq!(bench.uart.receive(b"abc"), 1);
    assert_eq!(bench.uart.room(), 0);
    assert_eq!(bench.read(offset::FR) & 0x50, 0x40);
    assert!(bench.line.is_high());
    assert_eq!(bench.read(offset::DR), u32::from(b'a'));
    assert!(!bench.line.is_high());
    assert_eq!(bench.read(offset::FR) & 0x50, 0x10);
    assert_eq!(bench.rooms(), rooms + 1);
    assert_eq!(bench.uart.receive(b"bc"), 1);
    assert_eq!(bench.read(offset::DR), u32::from(b'b'));
}

#[test]
fn a_change_of_depth_loses_nothing() {
    let mut bench = Bench::with_fifos();
    assert_eq!(bench.uart.receive(b"abcde"), 5);
    bench.write(offset::LCR_H, 0x60);
    bench.write(offset::IMSC, interrupt::RX);
    assert_eq!(bench.uart.room(), 0);
    assert_eq!(bench.uart.wanted(), 0);
    assert_eq!(bench.uart.receive(b"f"), 0);
    assert_eq!(bench.read(offset::FR) & 0x50, 0x40);
    // Five of a depth of one: the trigger is reached by the change.
    assert_eq!(bench.ris(), interrupt::RT | interrupt::RX);
    assert_eq!(bench.read(offset::DR), u32::from(b'a'));
    assert_eq!(bench.rooms(), 0);
    bench.write(offset::LCR_H, 0x70);
    assert_eq!(bench.rooms(), 1);
    assert_eq!(bench.ris(), interrupt::RT);
    assert_eq!(bench.drain(), b"bcde");
}

#[test]
fn each_trigger_level_raises_and_lowers_the_receive_interrupt() {
    for (select, trigger) in [(0, 2), (1, 4), (2, 8), (3, 12), (4, 14), (7, 14)] {
        let mut bench = Bench::with_fifos();
        bench.write(offset::IFLS, select << 3);
        for count in 1..=FIFO_DEPTH {
            assert_eq!(bench.uart.receive(b"x"), 1);
            assert_eq!(bench.ris() & interrupt::RX != 0, count >= trigger);
        }
        assert_eq!(bench.uart.receive(b"x"), 0);
        for left in (0..FIFO_DEPTH).rev() {
            bench.read(offset::DR);
            assert_eq!(bench.ris() & interrupt::RX != 0, left >= trigger);
            assert_eq!(bench.ris() & interrupt::RT != 0, left > 0);
        }
    }
}

#[test]
fn a_lower_trigger_is_noticed() {
    let mut bench = Bench::with_fifos();
    bench.uart.receive(b"1234");
    assert_eq!(bench.ris() & interrupt::RX, 0);
    bench.write(offset::IFLS, 0);
    assert_eq!(bench.ris() & interrupt::RX, interrupt::RX);
    bench.write(offset::IFLS, 0x12);
    assert_eq!(bench.ris() & interrupt::RX, 0);
}

#[test]
fn cleared_interrupts_stay_clear_until_their_cause_comes_again() {
    let mut bench = Bench::with_fifos();
    bench.uart.receive(&[b'x'; 8]);
    bench.write(offset::DR, u32::from(b'y'));
    assert_eq!(bench.ris(), interrupt::RX | interrupt::RT | interrupt::TX);
    bench.write(offset::ICR, 0x7ff);
    assert_eq!(bench.ris(), 0);
    // Above the trigger already: only the timeout interrupt is raised.
    bench.uart.receive(b"x");
    assert_eq!(bench.ris(), interrupt::RT);
    bench.write(offset::DR, u32::from(b'y'));
    assert_eq!(bench.ris(), interrupt::RT | interrupt::TX);
}

#[test]
fn a_break_is_a_zero_with_the_break_flag() {
    let mut bench = Bench::with_fifos();
    assert!(bench.uart.receive_break());
    bench.uart.receive(b"b");
    assert_ne!(bench.ris() & interrupt::BE, 0);
    assert_eq!(bench.read(offset::DR), 0x400);
    assert_eq!(bench.read(offset::RSR_ECR), 0x4);
    assert_eq!(bench.read(offset::DR), u32::from(b'b'));
    assert_eq!(bench.read(offset::RSR_ECR), 0);

    bench.write(offset::CR, 0x381);
    bench.write(offset::LCR_H, 0x71);
    bench.write(offset::LCR_H, 0x71);
    assert_eq!(bench.read(offset::DR), 0x400);
    assert_eq!(bench.read(offset::FR) & 0x10, 0x10);
}
