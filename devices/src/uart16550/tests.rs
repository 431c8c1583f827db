//! A 16550A as drivers use it, and its saving and restoring.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;
use crate::console;
use crate::console::tests::{Event, Shown, act};
use crate::fake::FakeLine;
use crate::persist::tests::{goes_on, refuses};

struct Bench {
    uart: Uart16550,
    line: Arc<FakeLine>,
    output: Arc<Mutex<Vec<u8>>>,
    rooms: Arc<AtomicUsize>,
}

impl Bench {
    fn new() -> Bench {
        let line = FakeLine::new();
        let output: Arc<Mutex<Vec<u8>>> = Arc::default();
        let rooms = Arc::new(AtomicUsize::new(0));
        let (sink, counted) = (Arc::clone(&output), Arc::clone(&rooms));
        let write = move |bytes: &[u8]| sink.lock().expect("sound").extend(bytes);
        let room = move || {
            counted.fetch_add(1, Ordering::Relaxed);
        };
        Bench {
            uart: Uart16550::new(line.clone(), Box::new(write), Box::new(room)),
            line,
            output,
            rooms,
        }
    }

    /// Opens the port as Linux does: clears the FIFOs, then enables the receive interrupt.
    fn opened() -> Bench {
        let mut bench = Bench::new();
        bench.write(offset::FCR, 0x07);
        bench.write(offset::IER, 0x05);
        bench
    }

    fn read(&mut self, offset: u64) -> u8 {
        let mut data = [0xee];
        assert_eq!(self.uart.read(offset, &mut data), Action::None);
        data[0]
    }

    fn write(&mut self, offset: u64, value: u8) {
        assert_eq!(self.uart.write(offset, &[value]), Action::None);
    }

    fn interrupts(&self) -> usize {
        let edges = self.line.history();
        edges.iter().filter(|high| **high).count()
    }

    fn received(&mut self) -> Vec<(u8, bool)> {
        let mut characters = Vec::new();
        loop {
            let status = self.read(offset::LSR);
            if status & LSR_READY == 0 {
                return characters;
            }
            characters.push((self.read(offset::DATA), status & LSR_BREAK != 0));
        }
    }
}

/// Linux's handler reads up to 256 characters and then asks for the cause of another turn
/// (drivers/tty/serial/8250/8250_port.c: serial8250_rx_chars, serial8250_handle_irq). With a full FIFO
/// that it does not hear of, it would wait for ever.
#[test]
fn the_receive_interrupt_is_pending_until_all_is_read() {
    let mut bench = Bench::opened();
    assert_eq!(bench.uart.receive(b"abc"), 3);
    for left in (0..3).rev() {
        assert_eq!(
            bench.read(offset::IIR) & 0xf,
            IIR_RECEIVED,
            "{left} are left"
        );
        // It is no less pending for having been asked for.
        assert_eq!(bench.read(offset::IIR) & 0xf, IIR_RECEIVED);
        bench.read(offset::DATA);
    }
    assert_eq!(bench.read(offset::IIR) & 0xf, IIR_NONE);
    // One that is masked is not.
    bench.write(offset::IER, 0);
    assert_eq!(bench.uart.receive(b"d"), 1);
    assert_eq!(bench.read(offset::IIR) & 0xf, IIR_NONE);
    bench.write(offset::IER, IER_RECEIVED);
    assert_eq!(bench.read(offset::IIR) & 0xf, IIR_RECEIVED);
}

#[test]
fn writes_are_output_at_once() {
    let mut bench = Bench::new();
    assert_eq!(
        bench.read(offset::LSR) & 0x60,
        0x60,
        "the transmitter is empty"
    );
    for byte in *b"hello" {
        bench.write(offset::DATA, byte);
    }
    assert_eq!(*bench.output.lock().expect("sound"), b"hello");
}

#[test]
fn a_16550a_is_found_by_its_fifo_bits() {
    let mut bench = Bench::new();
    bench.write(offset::FCR, 1);
    assert_eq!(bench.read(2) & 0xc0, 0xc0);
    bench.write(7, 0x5a);
    assert_eq!(bench.read(7), 0x5a);
}

#[test]
fn a_guest_that_does_not_listen_gets_nothing() {
    let mut bench = Bench::new();
    assert_eq!(bench.uart.listening(), None);
    assert_eq!((bench.uart.wanted(), bench.uart.receive(b"")), (0, 0));
    assert!(bench.received().is_empty());
    assert_eq!(bench.rooms.load(Ordering::Relaxed), 0);
}

#[test]
fn a_guest_that_listens_gets_what_fits() {
    let mut bench = Bench::opened();
    assert_eq!(bench.uart.listening(), Some(1));
    assert_eq!(bench.rooms.load(Ordering::Relaxed), 1);
    assert_eq!(bench.uart.receive(b"ab"), 2);
    assert_eq!(bench.interrupts(), 1);
    let more = [b'x'; 100];
    assert_eq!((bench.uart.wanted(), bench.uart.receive(&more)), (62, 62));
    assert_eq!((bench.uart.wanted(), bench.uart.receive(&more)), (0, 0));
    let received = bench.received();
    assert_eq!(received.len(), 64);
    assert_eq!(received[..3], [(b'a', false), (b'b', false), (b'x', false)]);
    assert_eq!(bench.rooms.load(Ordering::Relaxed), 2);
}

#[test]
fn a_line_of_the_kernel_log_starts_no_new_session() {
    let mut bench = Bench::opened();
    bench.write(offset::IER, 0);
    assert_eq!(bench.uart.receive(b"q"), 1);
    assert_eq!(bench.interrupts(), 0);
    bench.write(offset::IER, 0x05);
    assert_eq!(bench.uart.listening(), Some(1));
    assert_eq!(bench.interrupts(), 1, "what came meanwhile is told");
    assert_eq!(bench.received(), [(b'q', false)]);
    bench.write(offset::FCR, 0x07);
    assert_eq!(bench.uart.listening(), None);
    bench.write(offset::IER, 0x05);
    assert_eq!(bench.uart.listening(), Some(2));
}

#[test]
fn clearing_the_receive_fifo_discards_input() {
    let mut bench = Bench::opened();
    bench.uart.receive(b"old");
    bench.uart.receive_break();
    bench.write(offset::FCR, 0x07);
    assert!(bench.received().is_empty());
    bench.write(offset::IER, 0x05);
    bench.uart.receive(b"n");
    assert_eq!(bench.received(), [(b'n', false)]);
}

#[test]
fn clearing_the_receive_fifo_ends_while_dlab_is_set() {
    let mut bench = Bench::opened();
    bench.uart.receive(b"old");
    bench.write(offset::LCR, 0x83);
    bench.write(offset::FCR, 0x07);
    assert_eq!(bench.read(offset::LCR), 0x83);
    bench.write(offset::LCR, 0x03);
    assert!(bench.received().is_empty());
}

#[test]
fn breaks_keep_their_place() {
    let mut bench = Bench::opened();
    bench.uart.receive(b"a");
    bench.uart.receive_break();
    bench.uart.receive_break();
    bench.uart.receive(b"b");
    bench.uart.receive_break();
    let expected = [
        (b'a', false),
        (0, true),
        (0, true),
        (b'b', false),
        (0, true),
    ];
    assert_eq!(bench.received(), expected);
    bench.uart.receive(b"c");
    assert_eq!(bench.received(), [(b'c', false)]);
}

#[test]
fn a_guest_that_polls_listens_too() {
    let mut bench = Bench::new();
    for _ in 0..POLLS {
        assert_eq!(bench.uart.listening(), None);
        bench.read(offset::LSR);
    }
    assert_eq!(bench.uart.listening(), Some(1));
    assert_eq!(bench.uart.receive(b"k"), 1);
    assert_eq!(bench.read(offset::DATA), b'k');
    bench.write(offset::DATA, b'!');
    assert_eq!(bench.uart.listening(), None);
}

#[test]
fn coalesced_output_is_as_if_it_had_been_written() {
    let mut bench = Bench::new();
    assert_eq!(bench.uart.write_data(b"one call"), Action::None);
    assert_eq!(*bench.output.lock().expect("sound"), b"one call");
    // Neither the divisor nor looped-back data is output.
    bench.write(offset::LCR, 0x83);
    assert_eq!(bench.uart.write_data(&[12]), Action::None);
    assert_eq!(bench.read(offset::DATA), 12);
    bench.write(offset::LCR, 0x03);
    bench.write(offset::MCR, MCR_LOOP);
    assert_eq!(bench.uart.write_data(b"back"), Action::None);
    let back: Vec<u8> = bench.received().into_iter().map(|pair| pair.0).collect();
    assert_eq!(back, b"back");
    bench.write(offset::MCR, 0);
    assert_eq!(*bench.output.lock().expect("sound"), b"one call");
}

#[test]
fn output_is_coalesced_for_guests_that_check_before_they_send() {
    let mut bench = Bench::new();
    assert_eq!(bench.uart.write_data(&[b'x'; 16]), Action::None);
    assert_eq!(bench.uart.snapshot(), Some(()));
    bench.write(offset::DATA, b'x');
    assert_eq!(bench.uart.snapshot(), None);
    bench.read(offset::LSR);
    assert_eq!(bench.uart.snapshot(), Some(()));
    assert_eq!(bench.uart.write_data(&[b'x'; 17]), Action::None);
    assert_eq!(bench.uart.snapshot(), None);
}

#[test]
fn a_guest_that_waits_for_the_interrupt_gets_it_with_each_byte() {
    let mut bench = Bench::opened();
    assert!(!bench.uart.sends_by_interrupt());
    bench.write(offset::IER, IER_RECEIVED | IER_EMPTY);
    assert!(bench.uart.sends_by_interrupt());
    // Acknowledges the interrupt that reported room.
    bench.read(2);
    let before = bench.interrupts();
    assert_eq!(bench.uart.write_data(b"x"), Action::None);
    assert_eq!(bench.interrupts(), before + 1);
    // The divisor's high byte is not the interrupt mask.
    bench.write(offset::LCR, 0x83);
    bench.write(offset::IER, 0);
    assert!(bench.uart.sends_by_interrupt());
    bench.write(offset::LCR, 0x03);
    bench.write(offset::IER, IER_RECEIVED);
    assert!(!bench.uart.sends_by_interrupt());
}

#[test]
fn the_divisor_is_no_data_and_no_interrupt_mask() {
    let mut bench = Bench::new();
    bench.write(offset::LCR, 0x83);
    assert_eq!(bench.uart.write(offset::DATA, &[1, 1]), Action::None);
    assert_eq!(bench.uart.listening(), None);
    let mut divisor = [0; 2];
    assert_eq!(bench.uart.read(offset::DATA, &mut divisor), Action::None);
    assert_eq!(divisor, [1, 1]);
    assert!(bench.output.lock().expect("sound").is_empty());
}

#[test]
fn a_state_that_no_guest_can_cause_is_refused() {
    let mut uart = Bench::new().uart;
    let saved = uart.save();
    let mut state = saved.clone();
    state.registers.in_buffer = vec![0; 65];
    refuses(&mut uart, &state, "65 received characters");
    for breaks in [vec![0], vec![usize::MAX, 1]] {
        let state = Uart16550State {
            breaks,
            ..saved.clone()
        };
        refuses(&mut uart, &state, "breaks");
    }
}

#[test]
fn a_pending_interrupt_is_raised_by_the_restore() {
    let mut bench = Bench::opened();
    bench.uart.receive(b"q");
    let mut other = Bench::new();
    other
        .uart
        .restore(&bench.uart.save())
        .expect("a state that was saved");
    assert_eq!(other.interrupts(), 1);
    assert_eq!(other.rooms.load(Ordering::Relaxed), 1);
    assert_eq!(other.received(), [(b'q', false)]);
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    console::tests::events(&[0, 1, 2, 3, 4, 5, 6, 7], &[1, 2], 60)
}

fn make() -> (Uart16550, Arc<FakeLine>) {
    let line = FakeLine::new();
    let uart = Uart16550::new(line.clone(), Box::new(Shown), Box::new(|| {}));
    (uart, line)
}

proptest! {
    #[test]
    fn it_goes_on_where_it_was_saved(before in events(), after in events()) {
        goes_on(make, act, &before, &after);
    }

    #[test]
    fn nothing_restored_panics(
        registers in any::<[u8; 9]>(),
        in_buffer in prop::collection::vec(any::<u8>(), 0..=64),
        breaks in prop::collection::vec(0_usize..4, 0..8),
        (opened, waits_for_room, unasked, polls) in any::<(bool, bool, usize, u8)>(),
        after in events(),
    ) {
        let [low, high, ier, iir, lcr, lsr, mcr, msr, scratch] = registers;
        let registers = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: ier,
            interrupt_identification: iir,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch,
            in_buffer,
        };
        let state = Uart16550State { registers, breaks, opened, waits_for_room, unasked, polls };
        let (mut uart, _) = make();
        // It may be refused: there may be more breaks than characters.
        let _ = uart.restore(&state);
        for event in &after {
            let _ = act(&mut uart, event);
        }
    }
}
