//! The PC's serial port: a 16550A at eight I/O ports, or eight bytes of memory (PC16550D datasheet,
//! section 8).
//!
//! [`vm_superio::Serial`] implements the registers; its transmitter is always empty. Added here is
//! what it lacks: breaks, the reset of the receive FIFO, an identification of the interrupt that goes by
//! what was received and is not read yet, and tracking when the guest listens. Its interrupt is an edge, as on the ISA bus: each cause that arises signals one, also while the guest
//! handles another, so none is lost.

use serde::{Deserialize, Serialize};
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
    /// The interrupt line, kept for when the registers are replaced.
    line: Arc<dyn IrqLine>,
    on_room: Box<dyn Fn() + Send>,
    /// The number of characters in front of each received break, counted from the previous break.
    breaks: Vec<usize>,
    /// Whether the guest has enabled the receive interrupt since it last cleared the receive FIFO.
    opened: bool,
    /// Whether the guest has enabled the transmit interrupt.
    waits_for_room: bool,
    /// Characters sent since the guest last read the line status.
    unasked: usize,
    /// Consecutive reads of the line status, without a write in between.
    polls: u8,
    /// How many times the guest started to listen.
    sessions: u64,
}

/// Offsets in ports.
mod offset {
    pub(super) const DATA: u64 = 0;
    pub(super) const IER: u64 = 1;
    /// The same offset as FCR, which is only written.
    pub(super) const IIR: u64 = 2;
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
/// IIR: no interrupt is pending.
const IIR_NONE: u8 = 1 << 0;
/// IIR: received data are available.
const IIR_RECEIVED: u8 = 1 << 2;
/// FCR: reset the receiver's FIFO.
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;
/// LCR: the first two ports access the divisor latch (DLAB).
const LCR_DIVISOR: u8 = 1 << 7;
/// MCR: loopback mode.
const MCR_LOOP: u8 = 1 << 4;
/// LSR: data ready.
const LSR_READY: u8 = 1 << 0;
/// LSR: break interrupt.
const LSR_BREAK: u8 = 1 << 4;

/// How many consecutive reads of the line status make a guest that waits for input: the transmitter
/// is always empty, so one that sends reads it once before each character and at most once after.
const POLLS: u8 = 3;

/// The depth of the transmit FIFO in characters (section 8.4).
const FIFO_DEPTH: usize = 16;
/// The depth of the receive FIFO of [`vm_superio::Serial`] in characters.
const RECEIVER_DEPTH: usize = 64;

/// An interrupt line that signals one rising edge for each interrupt.
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
    /// What the output of the current access means for the machine.
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
    /// Creates a UART as after a reset. `on_room` is called when the guest has room for input
    /// again, with the device locked: it may wake an event loop, but must not call the device.
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

    /// Whether the guest has the receive interrupt enabled now.
    fn hears_received(&mut self) -> bool {
        !self.divisor_shown() && self.registers.read(offset::IER as u8) & IER_RECEIVED != 0
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
            // As long as something is received, the interrupt is pending (section 8.6.1). Linux reads 256
            // characters at a time and then looks for more here; meanwhile others have arrived.
            offset::IIR if value & IIR_NONE != 0 && !self.is_empty() && self.hears_received() => {
                value & !IIR_NONE | IIR_RECEIVED
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

    /// Clears the receive FIFO.
    fn empty_receiver(&mut self) {
        // While DLAB is set, reading the data register would not drain the FIFO. Neither write can
        // fail.
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
                // Linux clears the FIFO when it opens and when it closes the port
                // (drivers/tty/serial/8250/8250_port.c: serial8250_clear_fifos). In between it
                // masks the interrupt for each line of its log, but still listens.
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

    /// Completes each access: counts a new session, and tells of new room.
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uart16550State {
    /// The registers, and what was received.
    #[serde(with = "Registers")]
    pub registers: SerialState,
    /// The number of characters in front of each received break, counted from the previous break.
    pub breaks: Vec<usize>,
    /// Whether the guest has enabled the receive interrupt since it last cleared the receive FIFO.
    pub opened: bool,
    /// Whether the guest has enabled the transmit interrupt.
    pub waits_for_room: bool,
    /// Characters sent since the guest last read the line status, at most one more than the
    /// transmit FIFO holds.
    pub unasked: usize,
    /// Consecutive reads of the line status by a guest that may be waiting for input.
    pub polls: u8,
}

/// [`SerialState`], as it is written and read.
#[derive(Serialize, Deserialize)]
#[serde(remote = "SerialState")]
struct Registers {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
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

    /// Restores the state. A pending interrupt signals its edge again: a spurious interrupt does no
    /// harm, a lost one would leave the guest waiting.
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
        // This cannot fail: the number of received characters was checked, and the line never
        // fails.
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
    /// Handles a read; a wider access reads consecutive ports, as on the ISA bus.
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
    /// I/O ports cannot be backed by memory, and some registers change when they are read.
    type Snapshot = ();

    /// Reads always exit, so they may have side effects. But KVM drops what a string instruction
    /// writes beyond the free entries of the coalescing ring (arch/x86/kvm/x86.c:
    /// emulator_pio_in_out). So output is coalesced only for guests that follow the hardware's
    /// rules and read the line status before they write more than the FIFO holds: that exit drains
    /// the ring.
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
        // In loopback mode nothing is received.
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
mod tests;
