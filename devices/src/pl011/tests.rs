//! The test bench of the UART; the tests are grouped by subject.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;
use crate::fake::FakeLine;

mod anything;
mod linux;
mod receiving;
mod registers;
mod snapshot;
mod state;

/// A UART whose line, output and callbacks are recorded.
struct Bench {
    uart: Pl011,
    line: Arc<FakeLine>,
    /// One entry a call of the output.
    output: Arc<Mutex<Vec<Vec<u8>>>>,
    rooms: Arc<AtomicUsize>,
    input: Input,
}

/// The input that a VMM holds for the guest: it passes on what is wanted, and no more.
#[derive(Default)]
struct Input {
    waiting: VecDeque<u8>,
    /// How many bytes the VMM passes on after each access; none when empty.
    pace: VecDeque<usize>,
    /// What the device accepted.
    taken: Vec<u8>,
}

impl Bench {
    fn new() -> Bench {
        let line = FakeLine::new();
        let output: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        let rooms = Arc::new(AtomicUsize::new(0));
        let (sink, counter) = (output.clone(), rooms.clone());
        let uart = Pl011::new(
            line.clone(),
            Box::new(move |bytes: &[u8]| {
                sink.lock().expect("sound").push(bytes.to_vec());
            }),
            Box::new(move || {
                counter.fetch_add(1, Ordering::Relaxed);
            }),
        );
        Bench {
            uart,
            line,
            output,
            rooms,
            input: Input::default(),
        }
    }

    /// As Linux leaves it: FIFOs on, trigger at half.
    fn with_fifos() -> Bench {
        let mut bench = Bench::new();
        bench.write(offset::LCR_H, 0x70);
        bench
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        assert_eq!(self.uart.read(offset, &mut data), Action::None);
        u32::from_le_bytes(data)
    }

    /// As Linux reads this port: by halfwords.
    fn read16(&mut self, offset: u64) -> u16 {
        let mut data = [0xff; 2];
        assert_eq!(self.uart.read(offset, &mut data), Action::None);
        self.feed_at_pace();
        u16::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        assert_eq!(self.uart.write(offset, &value.to_le_bytes()), Action::None);
    }

    fn write16(&mut self, offset: u64, value: u16) {
        assert_eq!(self.uart.write(offset, &value.to_le_bytes()), Action::None);
        self.feed_at_pace();
    }

    /// Lets the VMM, which runs concurrently with the guest, act between two accesses.
    fn feed_at_pace(&mut self) {
        let most = self.input.pace.pop_front().unwrap_or(0);
        self.feed(most);
    }

    /// Passes on as much as is wanted, at most `most`.
    fn feed(&mut self, most: usize) {
        let Input { waiting, taken, .. } = &mut self.input;
        let count = self.uart.wanted().min(most).min(waiting.len());
        let bytes: Vec<u8> = waiting.drain(..count).collect();
        assert_eq!(self.uart.receive(&bytes), count, "what is wanted fits");
        taken.extend(bytes);
    }

    fn output(&self) -> Vec<u8> {
        self.output.lock().expect("sound").concat()
    }

    fn rooms(&self) -> usize {
        self.rooms.load(Ordering::Relaxed)
    }

    fn ris(&mut self) -> u32 {
        self.read(offset::RIS)
    }

    /// Reads characters until the flag says there are none.
    fn drain(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.read16(offset::FR) & 0x10 == 0 {
            bytes.push(self.read16(offset::DR) as u8);
        }
        bytes
    }
}

/// Checks what must hold after any sequence of events.
fn check_line(bench: &Bench) -> Result<(), TestCaseError> {
    let registers = &bench.uart.registers;
    prop_assert_eq!(bench.line.is_high(), registers.ris & registers.imsc != 0);
    let history = bench.line.history();
    let alternates = history
        .iter()
        .enumerate()
        .all(|(i, &high)| high == (i % 2 == 0));
    prop_assert!(alternates, "set without a change: {:?}", history);
    prop_assert!(bench.uart.rx.len() <= FIFO_DEPTH);
    Ok(())
}
