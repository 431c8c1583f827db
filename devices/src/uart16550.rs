//! The serial console of PCs: a 16550A at eight I/O ports (PC16550D datasheet, section 8).
//!
//! The registers are those of [`vm_superio::Serial`], whose transmitter is always empty. What it
//! lacks is added here: breaks, the receiver's reset by the FIFO control register, and knowing
//! when the guest listens. Its interrupt is an edge, as on the ISA bus.

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::Arc;

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};

use crate::action::Action;
use crate::console::{Output, Uart};
use crate::persist::{Persist, RestoreError};
use crate::{Device, IrqLine};

/// A 16550A UART.
pub struct Uart16550 {
    registers: Serial<Edge, NoEvents, Printer>,
    /// The line, for when the registers are made anew.
    line: Arc<dyn IrqLine>,
    on_room: Box<dyn Fn() + Send>,
    /// How many characters stand before each received break, counted from the one before it.
    breaks: Vec<usize>,
    /// Whether the guest takes input by interrupt, since it last emptied the receiver.
    opened: bool,
    /// Whether the guest takes an interrupt when it may send on.
    waits_for_room: bool,
    /// Characters sent since the guest last looked at the line status.
    unasked: usize,
    /// Reads of the line status without a write between.
    polls: u8,
    /// How often the guest began to listen.
    sessions: u64,
}

/// Offsets in ports.
mod offset {
    pub(super) const DATA: u64 = 0;
    pub(super) const IER: u64 = 1;
    pub(super) const FCR: u64 = 2;
    pub(super) const LCR: u64 = 3;
    pub(super) const MCR: u64 = 4;
    pub(super) const LSR: u64 = 5;
    pub(super) const LAST: u64 = 7;
}

/// IER: received data interrupt.
const IER_RECEIVED: u8 = 1 << 0;
/// IER: transmitter empty interrupt.
const IER_EMPTY: u8 = 1 << 1;
/// FCR: reset the receiver's FIFO.
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;
/// LCR: the first two ports are the baud rate's.
const LCR_DIVISOR: u8 = 1 << 7;
/// MCR: what is sent is received, and goes nowhere else.
const MCR_LOOP: u8 = 1 << 4;
/// LSR: there is a character.
const LSR_READY: u8 = 1 << 0;
/// LSR: the character is a break.
const LSR_BREAK: u8 = 1 << 4;

/// So many reads of the line status without a write between are a guest that waits for input:
/// the transmitter is always empty, so one that sends reads it once before each character and at
/// most once after.
const POLLS: u8 = 3;

/// Characters that the transmitter holds (section 8.4).
const FIFO_DEPTH: usize = 16;
/// Characters that the receiver of [`vm_superio::Serial`] holds.
const RECEIVER_DEPTH: usize = 64;

/// One rising edge an interrupt.
struct Edge(Arc<dyn IrqLine>);

impl Trigger for Edge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse();
        Ok(())
    }
}

struct Printer {
    output: Box<dyn Output>,
    /// What the output of the access that is answered means for the machine.
    action: Action,
}

impl Write for Printer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.action.add(self.output.write(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Uart16550 {
    /// A UART as after a reset. `on_room` is called when the guest takes input again, with the
    /// device locked: it may wake an event loop, but not come back into the device.
    pub fn new(
        line: Arc<dyn IrqLine>,
        output: Box<dyn Output>,
        on_room: Box<dyn Fn() + Send>,
    ) -> Uart16550 {
        Uart16550 {
            registers: Serial::new(
                Edge(Arc::clone(&line)),
                Printer {
                    output,
                    action: Action::None,
                },
            ),
            line,
            on_room,
            breaks: Vec::new(),
            opened: false,
            waits_for_room: false,
            unasked: 0,
            polls: 0,
            sessions: 0,
        }
    }

    fn listens(&self) -> bool {
        self.opened || self.polls >= POLLS
    }

    fn divisor_shown(&mut self) -> bool {
        self.registers.read(offset::LCR as u8) & LCR_DIVISOR != 0
    }

    fn is_looped_back(&mut self) -> bool {
        self.registers.read(offset::MCR as u8) & MCR_LOOP != 0
    }

    fn is_empty(&mut self) -> bool {
        self.registers.read(offset::LSR as u8) & LSR_READY == 0
    }

    fn read_register(&mut self, offset: u64) -> u8 {
        let value = self.registers.read(offset as u8);
        match offset {
            offset::LSR => {
                self.unasked = 0;
                self.polls = self.polls.saturating_add(1);
                match self.breaks.first() {
                    Some(0) => value | LSR_BREAK,
                    _ => value,
                }
            }
            offset::DATA if !self.divisor_shown() => {
                if self.polls < POLLS {
                    self.polls = 0;
                }
                match self.breaks.first_mut() {
                    Some(0) => {
                        self.breaks.remove(0);
                    }
                    Some(before) => *before -= 1,
                    None => {}
                }
                value
            }
            _ => value,
        }
    }

    /// Throws away what was received.
    fn empty_receiver(&mut self) {
        // With the divisor in the data register's place nothing is taken out by reading. Neither
        // write can fail.
        let control = self.registers.read(offset::LCR as u8);
        let _ = self
            .registers
            .write(offset::LCR as u8, control & !LCR_DIVISOR);
        while !self.is_empty() {
            self.registers.read(offset::DATA as u8);
        }
        let _ = self.registers.write(offset::LCR as u8, control);
        self.breaks.clear();
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        self.polls = 0;
        match offset {
            offset::FCR if value & FCR_CLEAR_RECEIVER != 0 => {
                self.empty_receiver();
                // Linux does so when it opens and when it closes the port (drivers/tty/serial/
                // 8250/8250_port.c: serial8250_clear_fifos). Between the two it masks the
                // interrupt for each line of its log and goes on listening.
                self.opened = false;
            }
            offset::IER if !self.divisor_shown() => {
                self.opened |= value & IER_RECEIVED != 0;
                self.waits_for_room = value & IER_EMPTY != 0;
            }
            offset::DATA => self.unasked = self.unasked.saturating_add(1),
            _ => {}
        }
        // Neither the printer nor the line can fail.
        let _ = self.registers.write(offset as u8, value);
    }

    /// Ends everything that the guest does to the device.
    fn settle(&mut self, listened: bool, wanted: usize) {
        if !listened && self.listens() {
            self.sessions += 1;
        }
        if wanted == 0 && self.wanted() > 0 {
            (self.on_room)();
        }
    }
}

/// The state of a [`Uart16550`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uart16550State {
    /// The registers, and what was received.
    pub registers: SerialState,
    /// How many characters stand before each received break, counted from the one before it.
    pub breaks: Vec<usize>,
    /// Whether the guest takes input by interrupt, since it last emptied the receiver.
    pub opened: bool,
    /// Whether the guest takes an interrupt when it may send on.
    pub waits_for_room: bool,
    /// Characters sent since the guest last looked at the line status, up to one more than the
    /// transmitter holds.
    pub unasked: usize,
    /// Reads of the line status by a guest that may wait for input.
    pub polls: u8,
}

impl Persist for Uart16550 {
    type State = Uart16550State;

    fn save(&self) -> Uart16550State {
        Uart16550State {
            registers: self.registers.state(),
            breaks: self.breaks.clone(),
            opened: self.opened,
            waits_for_room: self.waits_for_room,
            unasked: self.unasked.min(FIFO_DEPTH + 1),
            polls: self.polls.min(POLLS),
        }
    }

    /// What is pending makes an edge again: an interrupt more is one that the guest finds nothing
    /// for, an interrupt less is one that it waits for.
    fn restore(&mut self, state: &Uart16550State) -> Result<(), RestoreError> {
        const DEVICE: &str = "16550";
        let received = state.registers.in_buffer.len();
        RestoreError::check_count(DEVICE, "received characters", received, RECEIVER_DEPTH)?;
        // In order, as each counts from the one before it.
        let mut left = Some(received);
        for ahead in &state.breaks {
            left = left.and_then(|left| left.checked_sub(*ahead)?.checked_sub(1));
        }
        if left.is_none() {
            let breaks = state.breaks.len();
            return Err(RestoreError(format!(
                "the state of the {DEVICE} is not valid: its {breaks} breaks are not among its {received} received characters"
            )));
        }
        let (listened, wanted) = (self.listens(), self.wanted());
        let printer = Printer {
            output: std::mem::replace(
                &mut self.registers.writer_mut().output,
                Box::new(|_: &[u8]| {}),
            ),
            action: Action::None,
        };
        let edge = Edge(Arc::clone(&self.line));
        // It cannot fail: the receiver's depth was checked, and the line does not.
        self.registers = Serial::from_state(&state.registers, edge, NoEvents, printer)
            .map_err(|error| RestoreError(format!("cannot restore the {DEVICE}: {error}")))?;
        self.breaks.clone_from(&state.breaks);
        (self.opened, self.waits_for_room) = (state.opened, state.waits_for_room);
        (self.unasked, self.polls) = (state.unasked, state.polls);
        self.settle(listened, wanted);
        Ok(())
    }
}

impl Device for Uart16550 {
    /// Wider accesses are those of neighbouring ports, as on the ISA bus.
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        let (listened, wanted) = (self.listens(), self.wanted());
        for (port, byte) in (offset..=offset::LAST).zip(data) {
            *byte = self.read_register(port);
        }
        self.settle(listened, wanted);
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let (listened, wanted) = (self.listens(), self.wanted());
        for (port, byte) in (offset..=offset::LAST).zip(data) {
            self.write_register(port, *byte);
        }
        self.settle(listened, wanted);
        std::mem::take(&mut self.registers.writer_mut().action)
    }
}

impl Uart for Uart16550 {
    /// Ports cannot be read from memory.
    type Snapshot = ();

    /// Each read is an exit, so it may change what it likes. But KVM drops what a string instruction
    /// writes beyond the room that is left for collected writes (arch/x86/kvm/x86.c:
    /// emulator_pio_in_out), so only those are collected who do as the hardware wants it: they look
    /// at the line status before they write more than the FIFO holds. Each look makes room.
    fn snapshot(&self) -> Option<()> {
        (self.unasked <= FIFO_DEPTH).then_some(())
    }

    fn words((): &()) -> impl Iterator<Item = (usize, u32)> + '_ {
        std::iter::empty()
    }

    fn sends_by_interrupt(&self) -> bool {
        self.waits_for_room
    }

    fn write_data(&mut self, bytes: &[u8]) -> Action {
        let plain = !self.divisor_shown() && !self.is_looped_back() && !self.waits_for_room;
        if plain && !bytes.is_empty() {
            self.polls = 0;
            self.unasked = self.unasked.saturating_add(bytes.len());
            return self.registers.writer_mut().output.write(bytes);
        }
        let mut action = Action::None;
        for byte in bytes {
            action.add(self.write(offset::DATA, &[*byte]));
        }
        action
    }

    fn listening(&self) -> Option<u64> {
        self.listens().then_some(self.sessions)
    }

    fn wanted(&self) -> usize {
        match self.listens() {
            true => self.registers.fifo_capacity(),
            false => 0,
        }
    }

    fn receive(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.registers.fifo_capacity());
        // In loopback mode it takes nothing.
        let taken = self.registers.enqueue_raw_bytes(&bytes[..count]);
        taken.unwrap_or(0)
    }

    fn receive_break(&mut self) -> bool {
        let before = self.registers.state().in_buffer.len();
        let fits = matches!(self.registers.enqueue_raw_bytes(&[0]), Ok(1));
        if fits {
            let counted: usize = self.breaks.iter().map(|ahead| ahead + 1).sum();
            self.breaks.push(before - counted);
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::fake::FakeLine;
    use crate::persist::tests::{Access, accesses, goes_on, refuses};

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

        /// As Linux opens the port: FIFOs emptied, then the interrupt of received data.
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

    #[test]
    fn what_is_written_is_printed_at_once() {
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
    fn a_line_of_the_log_between_is_no_new_session() {
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
    fn the_receivers_reset_throws_away_what_came() {
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
    fn the_receivers_reset_ends_while_the_divisor_is_shown() {
        let mut bench = Bench::opened();
        bench.uart.receive(b"old");
        bench.write(offset::LCR, 0x83);
        bench.write(offset::FCR, 0x07);
        assert_eq!(bench.read(offset::LCR), 0x83);
        bench.write(offset::LCR, 0x03);
        assert!(bench.received().is_empty());
    }

    #[test]
    fn breaks_stand_where_they_came() {
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
    fn what_was_collected_is_as_if_it_had_been_written() {
        let mut bench = Bench::new();
        assert_eq!(bench.uart.write_data(b"one call"), Action::None);
        assert_eq!(*bench.output.lock().expect("sound"), b"one call");
        // The divisor, and what comes back at once, are no output.
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
    fn output_is_collected_of_those_who_look_before_they_send() {
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
        // It has been told that there is room, and takes note.
        bench.read(2);
        let before = bench.interrupts();
        assert_eq!(bench.uart.write_data(b"x"), Action::None);
        assert_eq!(bench.interrupts(), before + 1);
        // The divisor's high byte is no mask.
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
    fn what_no_guest_can_bring_about_is_not_restored() {
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
    fn a_received_byte_of_a_restored_one_is_told_of() {
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

    #[derive(Clone, Debug)]
    enum Event {
        Access(Access),
        WriteData(Vec<u8>),
        Receive(Vec<u8>),
        Break,
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..20);
        let event = prop_oneof![
            8 => accesses(&[0, 1, 2, 3, 4, 5, 6, 7], &[1, 2]).prop_map(Event::Access),
            1 => bytes().prop_map(Event::WriteData),
            1 => bytes().prop_map(Event::Receive),
            1 => Just(Event::Break),
        ];
        prop::collection::vec(event, 0..60)
    }

    /// A UART whose output is what its accesses mean for the machine, and so part of their answers.
    fn make() -> (Uart16550, Arc<FakeLine>) {
        struct Told;

        impl Output for Told {
            fn write(&mut self, bytes: &[u8]) -> Action {
                Action::panicked(format!("{bytes:?}"))
            }
        }

        let line = FakeLine::new();
        (
            Uart16550::new(line.clone(), Box::new(Told), Box::new(|| {})),
            line,
        )
    }

    fn act(uart: &mut Uart16550, event: &Event) -> (Vec<u8>, Action, usize, bool) {
        let (data, action) = match event {
            Event::Access(access) => access.make(uart),
            Event::WriteData(bytes) => (Vec::new(), uart.write_data(bytes)),
            Event::Receive(bytes) => (vec![uart.receive(bytes) as u8], Action::None),
            Event::Break => (vec![u8::from(uart.receive_break())], Action::None),
        };
        (data, action, uart.wanted(), uart.snapshot().is_some())
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
            // Breaks may be more than characters.
            let _ = uart.restore(&state);
            for event in &after {
                let _ = act(&mut uart, event);
            }
        }
    }
}
