//! The serial console on the bus: a PL011 whose output leaves the guest in bursts.
//!
//! A kernel that prints reads the flag register and writes the data register for each byte: two
//! exits. While a burst lasts the guest reads the registers from memory and KVM collects what it
//! writes to the data register ([`BurstWindow`]); each exit for another register, or a tick of the
//! event loop, takes the bytes out in order. No byte waits longer than a tick, and a guest that
//! is quiet costs nothing.

use crate::kvm::burst::BurstWindow;
use armlet_devices::Device;
use armlet_devices::pl011::{Pl011, Snapshot};
use std::time::{Duration, Instant};

/// How often a burst is looked after: the longest that a byte waits.
pub const TICK: Duration = Duration::from_millis(10);

/// So many bytes within [`BURST_TIME`] are a burst: more than a prompt or an echo.
const BURST_BYTES: u32 = 48;
const BURST_TIME: Duration = Duration::from_millis(100);
/// The most bytes that it takes to begin one, where bursts have been short of late.
const BURST_BYTES_MOST: u32 = 1 << 16;

/// The data register, UARTDR.
const DATA: u64 = 0;

/// A PL011 behind a window for bursts.
pub struct Serial {
    uart: Pl011,
    /// `None` where KVM or the board's map has no room for it: then each access is an exit.
    window: Option<BurstWindow>,
    /// Called when a burst begins: from then on [`tick`](Self::tick) wants to be called.
    on_burst: Box<dyn Fn() + Send>,
    /// What the guest reads while the window is open.
    shown: Option<Snapshot>,
    /// Bytes written since `since`, outside a burst; or in it.
    count: u32,
    since: Instant,
    /// Bytes that it takes to begin a burst.
    threshold: u32,
    /// Whether the guest wrote since the last tick.
    written: bool,
    /// Kept for its capacity.
    taken: Vec<u8>,
}

impl Serial {
    /// A console on `uart`.
    #[must_use]
    pub fn new(uart: Pl011, window: Option<BurstWindow>, on_burst: Box<dyn Fn() + Send>) -> Serial {
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

    /// Hands on what was collected.
    pub fn flush(&mut self) {
        if let Some(window) = self.window.as_mut().filter(|_| self.shown.is_some()) {
            self.taken.clear();
            window.drain(&mut self.taken);
            self.count = self.count.saturating_add(self.taken.len() as u32);
            self.written |= !self.taken.is_empty();
            self.uart.write_data(&self.taken);
        }
    }

    /// Looks after a burst; false when it is over and no further tick is wanted.
    pub fn tick(&mut self) -> bool {
        self.flush();
        if !std::mem::take(&mut self.written) {
            self.end_burst();
        }
        self.shown.is_some()
    }

    /// The time of the guest's listening ([`Pl011::listening`]).
    #[must_use]
    pub fn listening(&self) -> Option<u64> {
        self.uart.listening()
    }

    /// Gives the guest of `input` what it wants. Returns how many bytes it took, and whether it
    /// wants more than there were.
    pub fn receive(&mut self, input: &[u8]) -> (usize, bool) {
        let wanted = self.uart.wanted();
        let count = wanted.min(input.len());
        if count > 0 {
            self.end_burst();
        }
        (self.uart.receive(&input[..count]), wanted > count)
    }

    /// Sends the guest a break, if it has room for one.
    pub fn receive_break(&mut self) {
        self.end_burst();
        self.uart.receive_break();
    }

    /// Counts a byte that was an exit of its own, and begins a burst when it is one of many.
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

    fn begin_burst(&mut self) {
        let (Some(window), Some(snapshot)) = (&mut self.window, self.uart.snapshot()) else {
            return;
        };
        if window.open(snapshot.words()).is_ok() {
            self.shown = Some(snapshot);
            self.written = true;
            (self.on_burst)();
        }
    }

    /// Shows the guest the registers as they are now; where a read would change something, it must
    /// be an exit again.
    fn refresh(&mut self) {
        let (Some(window), Some(shown)) = (&mut self.window, &mut self.shown) else {
            return;
        };
        match self.uart.snapshot() {
            Some(now) if now == *shown => {}
            Some(now) => {
                window.update(now.words());
                *shown = now;
            }
            None => self.end_burst(),
        }
    }

    fn end_burst(&mut self) {
        let Some(window) = self.window.as_mut().filter(|_| self.shown.is_some()) else {
            return;
        };
        window.close();
        // What came before it was closed.
        self.flush();
        self.shown = None;
        // One that was not worth its while makes the next one harder to begin.
        self.threshold = match self.count < self.threshold {
            true => (self.threshold * 2).min(BURST_BYTES_MOST),
            false => BURST_BYTES,
        };
        self.count = 0;
    }
}

impl Device for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.flush();
        self.uart.read(offset, data);
        self.refresh();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.flush();
        self.uart.write(offset, data);
        self.refresh();
        if offset == DATA {
            self.count();
        }
    }
}
