//! What the guest reads from memory while its output is coalesced.

use proptest::prelude::*;

use super::linux::linux_opens;
use super::*;

/// The window of the snapshot: a word that is not a register reads as zero.
const WINDOW: std::ops::Range<usize> = 0..0x1000;

fn snapshot(bench: &Bench) -> Snapshot {
    bench.uart.snapshot().expect("nothing waits to be read")
}

/// Asserts that the guest cannot tell the snapshot's words from the device's own.
fn assert_shows_what_is_read(bench: &mut Bench) {
    let mut shown = [0; WINDOW.end / 4];
    for (offset, value) in snapshot(bench).words() {
        assert!(offset.is_multiple_of(4) && WINDOW.contains(&offset));
        shown[offset / 4] = value;
    }
    for offset in WINDOW.step_by(4) {
        assert_eq!(shown[offset / 4], bench.read(offset as u64), "{offset:#x}");
    }
}

#[test]
fn a_snapshot_is_what_reads_of_every_register_return() {
    let mut bench = Bench::new();
    assert_shows_what_is_read(&mut bench);
    for offset in [
        offset::ILPR,
        offset::IBRD,
        offset::FBRD,
        offset::LCR_H,
        offset::CR,
        offset::IFLS,
        offset::IMSC,
        offset::DMACR,
    ] {
        bench.write(offset, 0x5a5a);
        assert_shows_what_is_read(&mut bench);
    }
    bench.uart.reset();
    assert_shows_what_is_read(&mut bench);
}

#[test]
fn it_is_what_linux_reads_while_it_prints() {
    let mut bench = Bench::new();
    linux_opens(&mut bench);
    assert_shows_what_is_read(&mut bench);
    bench.write(offset::DR, u32::from(b'x'));
    bench.write(offset::IMSC, interrupt::TX);
    assert_shows_what_is_read(&mut bench);
    bench.write(offset::CR, cr::LBE | cr::RTS);
    assert_shows_what_is_read(&mut bench);
}

#[test]
fn each_word_is_named_once_and_the_data_register_is_zero() {
    let bench = Bench::new();
    let words: Vec<_> = snapshot(&bench).words().collect();
    assert_eq!(words[0], (0, 0));
    let offsets: Vec<_> = words.iter().map(|(offset, _)| *offset).collect();
    let expected: Vec<_> = (0..0x4c).chain(0xfe0..0x1000).step_by(4).collect();
    assert_eq!(offsets, expected);
    let ids: Vec<_> = words.iter().map(|(_, value)| *value).skip(19).collect();
    assert_eq!(ids, [0x11, 0x10, 0x14, 0, 0x0d, 0xf0, 0x05, 0xb1]);
}

#[test]
fn taking_a_snapshot_has_no_side_effects() {
    let mut bench = Bench::new();
    linux_opens(&mut bench);
    let (faults, rooms) = (bench.uart.faults(), bench.rooms());
    let listening = bench.uart.listening();
    let first = snapshot(&bench);
    // It does not even count as a poll of the flags, which would mean that the guest listens.
    assert_eq!(snapshot(&bench), first);
    assert_eq!(bench.uart.faults(), faults);
    assert_eq!(bench.rooms(), rooms);
    assert_eq!(bench.uart.listening(), listening);
    assert_eq!(bench.line.history(), []);
}

#[test]
fn there_is_none_while_a_character_waits() {
    let mut bench = Bench::with_fifos();
    assert_eq!(bench.uart.receive(b"ab"), 2);
    assert_eq!(bench.uart.snapshot(), None);
    bench.read(offset::DR);
    assert_eq!(bench.uart.snapshot(), None);
    bench.read(offset::DR);
    assert_shows_what_is_read(&mut bench);
    bench.write(offset::CR, cr::LBE);
    bench.write(offset::DR, u32::from(b'c'));
    assert_eq!(bench.uart.snapshot(), None);
    assert_eq!(bench.drain(), b"c");
    assert_shows_what_is_read(&mut bench);
}

#[test]
fn there_is_none_while_an_error_waits() {
    let mut bench = Bench::with_fifos();
    assert!(bench.uart.receive_break());
    assert_eq!(bench.uart.snapshot(), None);
    // The character is gone; its error flags stay in UARTRSR until the next one, or a write.
    bench.read(offset::DR);
    assert_eq!(bench.uart.snapshot(), None);
    bench.write(offset::RSR_ECR, 0);
    assert_shows_what_is_read(&mut bench);

    bench.write(offset::CR, cr::LBE);
    assert_eq!(bench.uart.write_data(&[b'x'; FIFO_DEPTH + 1]), Action::None);
    bench.drain();
    assert_eq!(bench.uart.snapshot(), None);
    bench.write(offset::RSR_ECR, 0);
    // UARTDR shows the overrun until another character has been received.
    assert_eq!(bench.read(offset::DR), dr::OVERRUN);
    assert_eq!(bench.uart.snapshot(), None);
    bench.write(offset::DR, u32::from(b'y'));
    bench.drain();
    assert_shows_what_is_read(&mut bench);
}

#[test]
fn it_changes_with_the_registers_that_change() {
    let mut bench = Bench::new();
    bench.write(offset::DR, u32::from(b'x'));
    for (offset, value) in [
        (offset::CR, cr::TXE | cr::RXE | cr::DTR),
        (offset::IMSC, interrupt::TX),
        (offset::ICR, interrupt::TX),
    ] {
        let before = snapshot(&bench);
        bench.write(offset, value);
        assert_ne!(snapshot(&bench), before, "{offset:#x}");
        assert_shows_what_is_read(&mut bench);
        // Writing the same value again is no change.
        let before = snapshot(&bench);
        bench.write(offset, value);
        assert_eq!(snapshot(&bench), before, "{offset:#x}");
    }
}

#[test]
fn output_after_its_first_byte_leaves_it_as_it_is() {
    let mut bench = Bench::new();
    linux_opens(&mut bench);
    let before = snapshot(&bench);
    bench.write(offset::DR, u32::from(b'a'));
    // The transmit interrupt is raised, and stays so.
    let during = snapshot(&bench);
    assert_ne!(during, before);
    for byte in b'b'..=b'z' {
        bench.write(offset::DR, u32::from(byte));
        assert_eq!(snapshot(&bench), during);
    }
    assert_eq!(bench.uart.write_data(b"and more"), Action::None);
    assert_eq!(snapshot(&bench), during);
    bench.write(offset::ICR, interrupt::TX);
    assert_eq!(snapshot(&bench), before);
}

proptest! {
    #[test]
    fn it_is_what_is_read_whatever_the_guest_wrote(
        writes in prop::collection::vec(((0u64..0x14).prop_map(|i| i * 4), any::<u32>()), 0..40),
    ) {
        let mut bench = Bench::new();
        for (offset, value) in writes {
            bench.write(offset, value);
            if bench.uart.snapshot().is_some() {
                assert_shows_what_is_read(&mut bench);
            }
        }
    }
}
