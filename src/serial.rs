//! The serial console on the bus: a UART whose output is coalesced in bursts.
//!
//! A kernel that prints reads a status register and writes the data register for each byte: two
//! exits. During a burst, KVM coalesces writes to the data register, and the guest reads the
//! registers from memory where the architecture allows it ([`BurstWindow`]); each exit for another
//! register, and each tick of the event loop, flushes the bytes in order. No byte waits longer than
//! a tick, and a guest that is quiet costs nothing.

use crate::kvm::burst::BurstWindow;
use armlet_devices::Device;
use armlet_devices::action::Action;
use armlet_devices::console::{Console, Uart};
use armlet_devices::persist::{Persist, RestoreError};
use armlet_devices::pl011::{Pl011, Pl011State};
use armlet_devices::uart16550::{Uart16550, Uart16550State};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// The interval at which a burst is flushed: the longest that a byte waits.
pub const TICK: Duration = Duration::from_millis(10);

/// The number of bytes within [`BURST_TIME`] that start a burst: more than a prompt or an echo.
const BURST_BYTES: u32 = 48;
const BURST_TIME: Duration = Duration::from_millis(100);
/// The highest such number, reached after a series of short bursts.
const BURST_BYTES_MOST: u32 = 1 << 16;

/// The data register.
const DATA: u64 = 0;

/// The state of a UART.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UartState {
    /// A PL011's.
    Pl011(Pl011State),
    /// A 16550's.
    Uart16550(Uart16550State),
}

/// A UART whose state has its place among those of others.
trait SavedUart: Uart + Persist {
    fn wrap(state: Self::State) -> UartState;

    /// Returns `None` for the state of another kind of UART.
    fn unwrap(state: &UartState) -> Option<&Self::State>;
}

impl SavedUart for Pl011 {
    fn wrap(state: Pl011State) -> UartState {
        UartState::Pl011(state)
    }

    fn unwrap(state: &UartState) -> Option<&Pl011State> {
        match state {
            UartState::Pl011(state) => Some(state),
            UartState::Uart16550(_) => None,
        }
    }
}

impl SavedUart for Uart16550 {
    fn wrap(state: Uart16550State) -> UartState {
        UartState::Uart16550(state)
    }

    fn unwrap(state: &UartState) -> Option<&Uart16550State> {
        match state {
            UartState::Uart16550(state) => Some(state),
            UartState::Pl011(_) => None,
        }
    }
}

/// A serial console that can be saved.
pub trait SerialConsole: Console {
    /// Flushes coalesced output, and returns the UART's state and what that output means for the
    /// machine. No vCPU may be running.
    fn save(&mut self) -> (UartState, Action);

    /// Makes the UART, which no guest has accessed yet, the one that was saved.
    ///
    /// # Errors
    /// As [`Persist::restore`]; the state of another kind of UART.
    fn restore(&mut self, state: &UartState) -> Result<(), RestoreError>;
}

/// A UART with a window that coalesces its output.
pub struct Serial<U: Uart> {
    uart: U,
    /// `None` where KVM or the board's address map does not allow it: each access is then an exit.
    window: Option<BurstWindow>,
    /// Called when a burst begins: from then on [`tick`](Self::tick) must be called.
    on_burst: Box<dyn Fn() + Send>,
    /// What the guest reads while the window is open.
    shown: Option<U::Snapshot>,
    /// Bytes written since `since` outside a burst, or in the current burst.
    count: u32,
    since: Instant,
    /// The number of bytes that start a burst.
    threshold: u32,
    /// Whether the guest wrote since the last tick.
    written: bool,
    /// Kept to reuse its allocation.
    taken: Vec<u8>,
}

impl<U: Uart> Serial<U> {
    /// Creates a console on `uart`.
    #[must_use]
    pub fn new(uart: U, window: Option<BurstWindow>, on_burst: Box<dyn Fn() + Send>) -> Serial<U> {
        Serial {
            uart,
            window,
            on_burst,
            shown: None,
            count: 0,
            since: Instant::now(),
            threshold: BURST_BYTES,
            written: false,
            taken: Vec::new(),
        }
    }

    /// Counts a byte that caused an exit, and begins a burst when there are many.
    fn count(&mut self) {
        if self.window.is_none() || self.shown.is_some() {
            return;
        }
        if self.count == 0 {
            self.since = Instant::now();
        }
        self.count += 1;
        if self.count >= self.threshold {
            self.count = 0;
            if self.since.elapsed() < BURST_TIME {
                self.begin_burst();
            }
        }
    }

    /// Returns what the guest may read from memory; `None` for a guest that sends by interrupt, as
    /// it would wait a tick for each interrupt, which comes with the bytes.
    fn snapshot(&self) -> Option<U::Snapshot> {
        match self.uart.sends_by_interrupt() {
            true => None,
            false => self.uart.snapshot(),
        }
    }

    fn begin_burst(&mut self) {
        let snapshot = self.snapshot();
        let (Some(window), Some(snapshot)) = (&mut self.window, snapshot) else {
            return;
        };
        if window.open(U::words(&snapshot)).is_ok() {
            self.shown = Some(snapshot);
            self.written = true;
            (self.on_burst)();
        }
    }

    /// Updates the registers in memory, or closes the window if a read would have side effects.
    fn refresh(&mut self) -> Action {
        let snapshot = self.snapshot();
        let (Some(window), Some(shown)) = (&mut self.window, &mut self.shown) else {
            return Action::None;
        };
        match snapshot {
            Some(now) if now == *shown => {}
            Some(now) => {
                window.update(U::words(&now));
                *shown = now;
            }
            None => return self.end_burst(),
        }
        Action::None
    }

    fn end_burst(&mut self) -> Action {
        let Some(window) = self.window.as_mut().filter(|_| self.shown.is_some()) else {
            return Action::None;
        };
        window.close();
        // Bytes from before it was closed.
        let action = self.flush();
        self.shown = None;
        // Backs off after a short burst: the next one takes more bytes to begin.
        self.threshold = match self.count < self.threshold {
            true => (self.threshold * 2).min(BURST_BYTES_MOST),
            false => BURST_BYTES,
        };
        self.count = 0;
        action
    }
}

impl<U: Uart> Console for Serial<U> {
    fn flush(&mut self) -> Action {
        let Some(window) = self.window.as_mut().filter(|_| self.shown.is_some()) else {
            return Action::None;
        };
        self.taken.clear();
        window.drain(&mut self.taken);
        self.count = self.count.saturating_add(self.taken.len() as u32);
        self.written |= !self.taken.is_empty();
        self.uart.write_data(&self.taken)
    }

    fn tick(&mut self) -> (bool, Action) {
        let mut action = self.flush();
        if !std::mem::take(&mut self.written) {
            action.add(self.end_burst());
        }
        (self.shown.is_some(), action)
    }

    fn in_burst(&self) -> bool {
        self.shown.is_some()
    }

    fn listening(&self) -> Option<u64> {
        self.uart.listening()
    }

    fn receive(&mut self, input: &[u8]) -> (usize, bool, Action) {
        let wanted = self.uart.wanted();
        let count = wanted.min(input.len());
        let action = match count > 0 {
            true => self.end_burst(),
            false => Action::None,
        };
        (self.uart.receive(&input[..count]), wanted > count, action)
    }

    fn receive_break(&mut self) -> Action {
        let action = self.end_burst();
        self.uart.receive_break();
        action
    }
}

impl<U: SavedUart> SerialConsole for Serial<U> {
    fn save(&mut self) -> (UartState, Action) {
        let action = self.end_burst();
        (U::wrap(self.uart.save()), action)
    }

    fn restore(&mut self, state: &UartState) -> Result<(), RestoreError> {
        let other = || RestoreError("the state is that of another kind of UART".into());
        self.uart.restore(U::unwrap(state).ok_or_else(other)?)
    }
}

impl<U: Uart> Device for Serial<U> {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        let mut action = self.flush();
        action.add(self.uart.read(offset, data));
        action.add(self.refresh());
        action
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let mut action = self.flush();
        action.add(self.uart.write(offset, data));
        action.add(self.refresh());
        if offset == DATA {
            self.count();
        }
        action
    }
}

#[cfg(test)]
mod tests {
    //! The behaviour without KVM; the boot tests cover the window.

    use super::*;
    use armlet_devices::IrqLine;

    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};

    /// Offsets of registers in bytes (ARM DDI 0183, section 3.2).
    const FLAGS: u64 = 0x18;
    const LINE_CONTROL: u64 = 0x2c;
    const MASK: u64 = 0x38;
    const RAW: u64 = 0x3c;

    /// UARTLCR_H: FIFOs on, eight bits.
    const FIFOS: u32 = 0x70;
    /// UARTIMSC: the receive and the receive timeout interrupt.
    const RECEIVE: u32 = 0x50;
    /// UARTFR: nothing received.
    const EMPTY: u32 = 0x10;

    struct NoLine;

    impl IrqLine for NoLine {
        fn set(&self, _: bool) {}

        fn pulse(&self) {}
    }

    /// A console without a window, whose output and callbacks are recorded.
    struct Bench {
        serial: Serial<Pl011>,
        /// One entry for each call of the output.
        output: Arc<Mutex<Vec<Vec<u8>>>>,
        rooms: Arc<AtomicUsize>,
        bursts: Arc<AtomicUsize>,
    }

    impl Bench {
        fn new() -> Bench {
            let output: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
            let (rooms, on_room) = counter();
            let (bursts, on_burst) = counter();
            let sink = Arc::clone(&output);
            let write = move |bytes: &[u8]| sink.lock().expect("sound").push(bytes.to_vec());
            let uart = Pl011::new(Arc::new(NoLine), Box::new(write), on_room);
            Bench {
                serial: Serial::new(uart, None, on_burst),
                output,
                rooms,
                bursts,
            }
        }

        /// Creates one with a guest that listens like Linux: FIFOs on, the receive interrupts
        /// unmasked.
        fn listening() -> Bench {
            let mut bench = Bench::new();
            bench.write(LINE_CONTROL, FIFOS);
            bench.write(MASK, RECEIVE);
            bench
        }

        fn read(&mut self, offset: u64) -> u32 {
            let mut data = [0xff; 4];
            assert_eq!(self.serial.read(offset, &mut data), Action::None);
            u32::from_le_bytes(data)
        }

        fn write(&mut self, offset: u64, value: u32) {
            assert_eq!(
                self.serial.write(offset, &value.to_le_bytes()),
                Action::None
            );
        }

        /// Reads characters as the guest until UARTFR shows that there are no more.
        fn received(&mut self) -> Vec<u32> {
            let mut characters = Vec::new();
            while self.read(FLAGS) & EMPTY == 0 {
                characters.push(self.read(DATA));
            }
            characters
        }

        fn calls(&self) -> Vec<Vec<u8>> {
            self.output.lock().expect("sound").clone()
        }
    }

    /// Returns a counter, and a callback that increments it.
    fn counter() -> (Arc<AtomicUsize>, Box<dyn Fn() + Send>) {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        let call = move || {
            counted.fetch_add(1, Ordering::Relaxed);
        };
        (count, Box::new(call))
    }

    #[test]
    fn accesses_pass_through() {
        let mut bench = Bench::new();
        assert_eq!(bench.read(FLAGS), 0x97);
        bench.write(LINE_CONTROL, FIFOS);
        assert_eq!(bench.read(LINE_CONTROL), FIFOS);
        // Accesses keep the width that the guest used.
        assert_eq!(bench.serial.write(MASK, &[0x20, 0x04]), Action::None);
        let mut byte = [0xff];
        assert_eq!(bench.serial.read(MASK, &mut byte), Action::None);
        assert_eq!(byte, [0x20]);
        assert_eq!(bench.read(MASK), 0x420);
        assert_eq!(bench.read(RAW), 0);
        assert_eq!(bench.serial.write(DATA, b"x"), Action::None);
        assert_eq!(bench.read(RAW), 0x20);
        let mut wide = [0xff; 8];
        assert_eq!(bench.serial.read(MASK, &mut wide), Action::None);
        assert_eq!(wide, [0; 8]);
        assert_eq!(bench.read(0xfe0), 0x11);
    }

    #[test]
    fn without_a_window_each_byte_is_out_at_once_and_no_burst_begins() {
        let mut bench = Bench::new();
        let text: Vec<u8> = (0..=255).cycle().take(4 * BURST_BYTES as usize).collect();
        for (index, &byte) in text.iter().enumerate() {
            assert_eq!(bench.serial.write(DATA, &[byte]), Action::None);
            assert_eq!(bench.calls().len(), index + 1);
        }
        assert_eq!(bench.calls().concat(), text);
        assert_eq!(bench.bursts.load(Ordering::Relaxed), 0);
        assert_eq!(
            bench.serial.tick(),
            (false, Action::None),
            "no tick is wanted"
        );
        assert_eq!(bench.calls().len(), text.len());
    }

    #[test]
    fn without_a_window_there_is_nothing_to_flush() {
        let mut bench = Bench::listening();
        assert_eq!(bench.serial.flush(), Action::None);
        assert_eq!(bench.serial.write(DATA, b"x"), Action::None);
        assert_eq!(bench.serial.flush(), Action::None);
        assert_eq!(bench.serial.flush(), Action::None);
        assert_eq!(bench.calls(), [b"x".to_vec()]);
        assert_eq!(bench.serial.tick(), (false, Action::None));
        assert_eq!(bench.calls(), [b"x".to_vec()]);
        assert_eq!(bench.serial.listening(), Some(1));
    }

    #[test]
    fn a_guest_that_does_not_listen_gets_nothing() {
        let mut bench = Bench::new();
        bench.write(LINE_CONTROL, FIFOS);
        assert_eq!(bench.serial.listening(), None);
        assert_eq!(bench.serial.receive(b""), (0, false, Action::None));
        assert_eq!(bench.serial.receive(b"early"), (0, false, Action::None));
        assert!(bench.received().is_empty());
        assert_eq!(bench.rooms.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_guest_that_listens_takes_what_fits_and_wants_the_rest_of_its_room() {
        let mut bench = Bench::listening();
        assert_eq!(bench.rooms.load(Ordering::Relaxed), 1);
        assert_eq!(bench.serial.receive(b""), (0, true, Action::None));
        assert_eq!(bench.serial.receive(b"abc"), (3, true, Action::None));
        // 13 of 16 are free; what does not fit stays with the caller.
        let more: Vec<u8> = (0..20).collect();
        assert_eq!(bench.serial.receive(&more), (13, false, Action::None));
        assert_eq!(bench.serial.receive(&more[13..]), (0, false, Action::None));
        let expected = b"abc".iter().chain(&more[..13]);
        let expected: Vec<_> = expected.map(|&byte| u32::from(byte)).collect();
        assert_eq!(bench.received(), expected);
        assert_eq!(bench.rooms.load(Ordering::Relaxed), 2);
        assert_eq!(bench.serial.receive(&more[13..]), (7, true, Action::None));
    }

    #[test]
    fn input_that_just_fits_leaves_nothing_wanted() {
        let mut bench = Bench::listening();
        assert_eq!(bench.serial.receive(&[b'x'; 16]), (16, false, Action::None));
        bench.read(DATA);
        assert_eq!(bench.serial.receive(b""), (0, true, Action::None));
    }

    #[test]
    fn each_time_of_listening_has_its_number() {
        let mut bench = Bench::listening();
        assert_eq!(bench.serial.listening(), Some(1));
        bench.write(DATA, u32::from(b'x'));
        assert_eq!(bench.serial.receive(b"y"), (1, true, Action::None));
        assert_eq!(bench.serial.listening(), Some(1));
        bench.write(MASK, 0);
        assert_eq!(bench.serial.listening(), None);
        assert_eq!(bench.serial.receive(b"z"), (0, false, Action::None));
        bench.write(MASK, RECEIVE);
        assert_eq!(bench.serial.listening(), Some(2));
        // Firmware polls the flags for input.
        bench.write(MASK, 0);
        for _ in 0..3 {
            assert_eq!(bench.serial.listening(), None);
            bench.read(FLAGS);
        }
        assert_eq!(bench.serial.listening(), Some(3));
    }

    #[test]
    fn a_break_comes_between_characters_whether_the_guest_listens_or_not() {
        const BREAK: u32 = 1 << 10;
        let mut bench = Bench::listening();
        assert_eq!(bench.serial.receive(b"a"), (1, true, Action::None));
        assert_eq!(bench.serial.receive_break(), Action::None);
        assert_eq!(bench.serial.receive(b"b"), (1, true, Action::None));
        let expected = [u32::from(b'a'), BREAK, u32::from(b'b')];
        assert_eq!(bench.received(), expected);
        bench.write(MASK, 0);
        assert_eq!(bench.serial.receive_break(), Action::None);
        assert_eq!(bench.received(), [BREAK]);
    }

    #[test]
    fn a_break_without_room_is_no_break() {
        let mut bench = Bench::listening();
        let text = [b'x'; 16];
        assert_eq!(bench.serial.receive(&text), (16, false, Action::None));
        assert_eq!(bench.serial.receive_break(), Action::None);
        assert_eq!(bench.received(), text.map(u32::from));
    }
}
