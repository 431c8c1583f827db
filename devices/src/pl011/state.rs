//! Saving and restoring the state of a PL011.

use super::{FIFO_DEPTH, POLLS, Pl011, Pl011Registers, mask};
use crate::console::Uart;
use crate::persist::{Persist, RestoreError};
use serde::{Deserialize, Serialize};

/// The state of a [`Pl011`].
///
/// The number of its session ([`Uart::listening`]) is not part of it: it means something only to
/// callers that saw an earlier number of the same device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pl011State {
    /// The registers that are stored.
    pub registers: Pl011Registers,
    /// Received characters in the layout of UARTDR, oldest first.
    pub received: Vec<u16>,
    /// A looped-back character was lost, and none has been received since.
    pub overrun: bool,
    /// Consecutive reads of UARTFR by a guest that may be waiting for input.
    pub polls: u8,
}

/// UARTDR: a received character with its error flags.
const CHARACTER: u16 = 0x7ff;

impl Persist for Pl011 {
    type State = Pl011State;

    fn save(&self) -> Pl011State {
        Pl011State {
            registers: self.registers,
            received: self.rx.iter().copied().collect(),
            overrun: self.overrun,
            polls: self.polls.min(POLLS),
        }
    }

    fn restore(&mut self, state: &Pl011State) -> Result<(), RestoreError> {
        const DEVICE: &str = "PL011";
        let registers = &state.registers;
        for (name, value, mask) in [
            ("UARTRSR", registers.rsr, mask::RSR),
            ("UARTILPR", registers.ilpr, mask::ILPR),
            ("UARTIBRD", registers.ibrd, mask::IBRD),
            ("UARTFBRD", registers.fbrd, mask::FBRD),
            ("UARTLCR_H", registers.lcr_h, mask::LCR_H),
            ("UARTCR", registers.cr, mask::CR),
            ("UARTIFLS", registers.ifls, mask::IFLS),
            ("UARTIMSC", registers.imsc, mask::INTERRUPTS),
            ("UARTRIS", registers.ris, mask::INTERRUPTS),
            ("UARTDMACR", registers.dmacr, mask::DMACR),
        ] {
            RestoreError::check(DEVICE, name, value, mask)?;
        }
        let count = state.received.len();
        RestoreError::check_count(DEVICE, "received characters", count, FIFO_DEPTH)?;
        for character in &state.received {
            RestoreError::check(DEVICE, "the received character", *character, CHARACTER)?;
        }
        let before = (self.listens(), self.wanted() > 0);
        self.registers = *registers;
        self.rx = state.received.iter().copied().collect();
        (self.overrun, self.polls) = (state.overrun, state.polls);
        self.settle(before);
        Ok(())
    }
}
