//! The serial console on the bus: a PL011 whose output leaves the guest in bursts.
//!
//! A kernel that prints reads the flag register and writes the data register for each byte: two
//! exits. While a burst lasts KVM collects the writes, and each exit for another register, or a
//! tick of the event loop, takes them out in order. So a burst costs one exit a byte at most, no
//! byte waits longer than a tick, and a guest that is quiet costs nothing.

use crate::kvm::coalesced::CoalescedWrites;
use armlet_devices::Device;
use armlet_devices::pl011::Pl011;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often a burst is looked after: the longest that a byte waits.
pub const TICK: Duration = Duration::from_millis(10);

/// So many bytes within [`BURST_TIME`] are a burst: more than a prompt or an echo.
const BURST_BYTES: u32 = 48;
const BURST_TIME: Duration = Duration::from_millis(100);

/// The data register, UARTDR.
const DATA: u64 = 0;

/// A PL011 behind collected writes.
pub struct Serial {
    uart: Arc<Mutex<Pl011>>,
    /// `None` where KVM has no ring: then each write is an exit.
    writes: Option<CoalescedWrites>,
    /// Called when a burst begins: from then on [`tick`](Self::tick) wants to be called.
    on_burst: Box<dyn Fn() + Send>,
    /// Bytes written since `since`, outside a burst.
    count: u32,
    since: Instant,
    /// Whether KVM collects writes.
    in_burst: bool,
    /// Whether the guest wrote since the last tick.
    written: bool,
    /// Kept for its capacity.
    taken: Vec<u8>,
}

impl Serial {
    /// A console on `uart`.
    #[must_use]
    pub fn new(
        uart: Arc<Mutex<Pl011>>,
        writes: Option<CoalescedWrites>,
        on_burst: Box<dyn Fn() + Send>,
    ) -> Serial {
        Serial {
            uart,
            writes,
            on_burst,
            count: 0,
            since: Instant::now(),
            in_burst: false,
            written: false,
            taken: Vec::new(),
        }
    }

    /// Hands on what was collected.
    pub fn flush(&mut self) {
        if let Some(writes) = self.writes.as_mut().filter(|_| self.in_burst) {
            self.taken.clear();
            writes.drain(&mut self.taken);
            self.written |= !self.taken.is_empty();
            lock(&self.uart).write_data(&self.taken);
        }
    }

    /// Looks after a burst; false when it is over and no further tick is wanted.
    pub fn tick(&mut self) -> bool {
        self.flush();
        if std::mem::take(&mut self.written) {
            return true;
        }
        let stopped = self
            .writes
            .as_ref()
            .is_some_and(|writes| writes.stop().is_ok());
        // What came between the flush and the stop.
        self.flush();
        self.in_burst = !stopped;
        self.in_burst
    }

    /// Counts a byte that was an exit of its own.
    fn count(&mut self) {
        self.written = true;
        let Some(writes) = self.writes.as_ref().filter(|_| !self.in_burst) else {
            return;
        };
        if self.count == 0 {
            self.since = Instant::now();
        }
        self.count += 1;
        if self.count < BURST_BYTES {
            return;
        }
        self.count = 0;
        if self.since.elapsed() < BURST_TIME && writes.start().is_ok() {
            self.in_burst = true;
            (self.on_burst)();
        }
    }
}

impl Device for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.flush();
        lock(&self.uart).read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.flush();
        if offset == DATA {
            self.count();
        }
        lock(&self.uart).write(offset, data);
    }
}

fn lock(uart: &Mutex<Pl011>) -> MutexGuard<'_, Pl011> {
    uart.lock().unwrap_or_else(PoisonError::into_inner)
}
