//! The serial port of Arm boards: PrimeCell UART PL011 (ARM DDI 0183, revision r1p1).
//!
//! Both directions are faster than any serial line: output has left before the write that caused it
//! returns, and the receive timeout ("no more data for 32 bit periods") has always elapsed. Three
//! choices follow:
//!
//! * The transmit FIFO is always empty. Each write raises its interrupt, because the hardware
//!   raises it when the fill level passes the trigger, not while it is below (section 2.8,
//!   UARTTXINTR). Unmasking alone raises nothing; Linux writes first.
//! * Received data raises the receive timeout interrupt at once, and the receive interrupt too when
//!   the trigger level is reached.
//! * The caller holds input until the guest listens and it fits ([`Uart::wanted`]), so the FIFO is
//!   never overrun; a change of its depth keeps its contents.
//!
//! The enable bits of UARTCR are stored but ignored: firmware prints without setting them. CTS, DSR
//! and DCD are asserted, so a guest that waits for a carrier does not hang. DMA and infrared are
//! not implemented; their registers only store what is written.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::Arc;

use crate::action::Action;
pub use crate::console::Output;
use crate::console::Uart;
use crate::primecell::{self, Faults, Line, PrimeCell};
use crate::{Device, IrqLine};

/// The values of all registers, taken while no read has side effects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Indexed by offset in words.
    registers: [u32; SNAPSHOT_WORDS],
}

/// Words from UARTDR to UARTDMACR.
const SNAPSHOT_WORDS: usize = 0x4c / 4;

impl Snapshot {
    /// Returns each word that the guest can read: its offset in bytes, and its value.
    pub fn words(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        let registers = self.registers.iter().enumerate();
        let ids = (0xfe0..0x1000).step_by(4);
        registers
            .map(|(index, value)| (index * 4, *value))
            .chain(ids.map(|offset| {
                let id = primecell::identify(Pl011::PERIPHERAL_ID, offset as u64);
                (offset, id.unwrap_or(0))
            }))
    }
}

/// A PL011 UART.
pub struct Pl011 {
    line: Line,
    output: Box<dyn Output>,
    /// What the output of the current access means for the machine.
    action: Action,
    on_room: Box<dyn Fn() + Send>,
    /// Invalid accesses.
    faults: Faults,
    registers: Pl011Registers,
    /// Received characters in the layout of UARTDR, oldest first.
    rx: VecDeque<u16>,
    /// A looped-back character was lost, and none has been received since.
    overrun: bool,
    /// Consecutive reads of UARTFR, with neither a write nor, before there were [`POLLS`] of them,
    /// a received character in between.
    polls: u8,
    /// How many times the guest started to listen.
    sessions: u64,
}

/// How many consecutive reads of UARTFR make a guest that waits for input.
///
/// The transmitter is always empty, so a guest that sends reads UARTFR once before each character
/// and at most once after (Linux's early console). When Linux's driver drains the FIFO as it opens
/// the port, it reads a character after each. EDK2 polls for input by reading UARTFR and UARTCR in
/// turn, so reads of other registers do not count.
const POLLS: u8 = 3;

/// The registers that are stored; the others are computed (section 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pl011Registers {
    /// UARTRSR.
    pub rsr: u32,
    /// UARTILPR.
    pub ilpr: u32,
    /// UARTIBRD.
    pub ibrd: u32,
    /// UARTFBRD.
    pub fbrd: u32,
    /// UARTLCR_H.
    pub lcr_h: u32,
    /// UARTCR.
    pub cr: u32,
    /// UARTIFLS.
    pub ifls: u32,
    /// UARTIMSC.
    pub imsc: u32,
    /// UARTRIS.
    pub ris: u32,
    /// UARTDMACR.
    pub dmacr: u32,
}

/// Depth of either FIFO in characters, up to revision r1p4.
const FIFO_DEPTH: usize = 16;

/// Offsets in bytes (section 3.2).
mod offset {
    pub(super) const DR: u64 = 0x00;
    pub(super) const RSR_ECR: u64 = 0x04;
    pub(super) const FR: u64 = 0x18;
    pub(super) const ILPR: u64 = 0x20;
    pub(super) const IBRD: u64 = 0x24;
    pub(super) const FBRD: u64 = 0x28;
    pub(super) const LCR_H: u64 = 0x2c;
    pub(super) const CR: u64 = 0x30;
    pub(super) const IFLS: u64 = 0x34;
    pub(super) const IMSC: u64 = 0x38;
    pub(super) const RIS: u64 = 0x3c;
    pub(super) const MIS: u64 = 0x40;
    pub(super) const ICR: u64 = 0x44;
    pub(super) const DMACR: u64 = 0x48;
}

/// UARTDR: the error flags of a received character (section 3.3.1).
mod dr {
    pub(super) const BREAK: u16 = 1 << 10;
    pub(super) const OVERRUN: u32 = 1 << 11;
}

/// UARTRSR: framing, parity and break of the character last read, and overrun
/// (section 3.3.2).
mod rsr {
    pub(super) const OF_CHARACTER: u32 = 0x7;
    pub(super) const OVERRUN: u32 = 1 << 3;
}

/// UARTFR (section 3.3.3).
mod fr {
    pub(super) const CTS: u32 = 1 << 0;
    pub(super) const DSR: u32 = 1 << 1;
    pub(super) const DCD: u32 = 1 << 2;
    pub(super) const RXFE: u32 = 1 << 4;
    pub(super) const RXFF: u32 = 1 << 6;
    pub(super) const TXFE: u32 = 1 << 7;
    pub(super) const RI: u32 = 1 << 8;
}

/// UARTLCR_H (section 3.3.7).
mod lcr_h {
    pub(super) const BRK: u32 = 1 << 0;
    pub(super) const FEN: u32 = 1 << 4;
}

/// UARTCR (section 3.3.8).
mod cr {
    pub(super) const LBE: u32 = 1 << 7;
    pub(super) const TXE: u32 = 1 << 8;
    pub(super) const RXE: u32 = 1 << 9;
    pub(super) const DTR: u32 = 1 << 10;
    pub(super) const RTS: u32 = 1 << 11;
    pub(super) const OUT1: u32 = 1 << 12;
    pub(super) const OUT2: u32 = 1 << 13;
}

/// UARTIMSC, UARTRIS, UARTMIS and UARTICR (sections 3.3.10 to 3.3.13).
mod interrupt {
    pub(super) const RI: u32 = 1 << 0;
    pub(super) const CTS: u32 = 1 << 1;
    pub(super) const DCD: u32 = 1 << 2;
    pub(super) const DSR: u32 = 1 << 3;
    pub(super) const RX: u32 = 1 << 4;
    pub(super) const TX: u32 = 1 << 5;
    pub(super) const RT: u32 = 1 << 6;
    pub(super) const BE: u32 = 1 << 9;
    pub(super) const OE: u32 = 1 << 10;
}

/// Bits that exist in each register; the others read as zero (section 3.3).
mod mask {
    pub(super) const ILPR: u32 = 0xff;
    pub(super) const IBRD: u32 = 0xffff;
    pub(super) const FBRD: u32 = 0x3f;
    pub(super) const LCR_H: u32 = 0xff;
    pub(super) const CR: u32 = 0xff87;
    pub(super) const IFLS: u32 = 0x3f;
    pub(super) const RSR: u32 = 0xf;
    pub(super) const INTERRUPTS: u32 = 0x7ff;
    pub(super) const DMACR: u32 = 0x7;
}

impl Pl011Registers {
    /// Returns the reset values (section 3.2, table 3-1).
    fn at_reset() -> Pl011Registers {
        Pl011Registers {
            rsr: 0,
            ilpr: 0,
            ibrd: 0,
            fbrd: 0,
            lcr_h: 0,
            cr: cr::TXE | cr::RXE,
            ifls: 0x12,
            imsc: 0,
            ris: 0,
            dmacr: 0,
        }
    }
}

impl Pl011 {
    /// Creates a UART as after power-on, its line low.
    ///
    /// `on_room` is called each time an access of the guest makes [`wanted`](Uart::wanted) rise
    /// from 0, with the device locked: it may wake an event loop, but must not call the device.
    pub fn new(
        line: Arc<dyn IrqLine>,
        output: Box<dyn Output>,
        on_room: Box<dyn Fn() + Send>,
    ) -> Pl011 {
        Pl011 {
            line: Line::new(line),
            output,
            action: Action::None,
            on_room,
            faults: Faults::of("PL011"),
            registers: Pl011Registers::at_reset(),
            rx: VecDeque::with_capacity(FIFO_DEPTH),
            overrun: false,
            polls: 0,
            sessions: 0,
        }
    }

    fn listens(&self) -> bool {
        self.registers.imsc & (interrupt::RX | interrupt::RT) != 0 || self.polls >= POLLS
    }

    /// Returns how many bytes [`receive`](Uart::receive) would take now, whether or not the guest
    /// listens: 0 in loopback mode.
    pub fn room(&self) -> usize {
        if self.is_looped_back() {
            0
        } else {
            self.depth().saturating_sub(self.rx.len())
        }
    }

    /// Returns the number of invalid accesses: at an offset, of a width or in a direction that no
    /// register has.
    pub fn faults(&self) -> u64 {
        self.faults.count()
    }

    /// Resets registers, receive FIFO and line to their power-on state. Output is not affected.
    pub fn reset(&mut self) {
        let before = (self.listens(), self.wanted() > 0);
        self.registers = Pl011Registers::at_reset();
        self.rx.clear();
        self.overrun = false;
        self.polls = 0;
        self.settle(before);
    }

    /// Returns the value of a register that can be read without side effects: any but UARTDR.
    fn register(&self, offset: u64) -> Option<u32> {
        let registers = &self.registers;
        Some(match offset {
            offset::RSR_ECR => registers.rsr,
            offset::FR => self.flags(),
            offset::ILPR => registers.ilpr,
            offset::IBRD => registers.ibrd,
            offset::FBRD => registers.fbrd,
            offset::LCR_H => registers.lcr_h,
            offset::CR => registers.cr,
            offset::IFLS => registers.ifls,
            offset::IMSC => registers.imsc,
            offset::RIS => registers.ris,
            offset::MIS => registers.ris & registers.imsc,
            offset::DMACR => registers.dmacr,
            _ => return None,
        })
    }

    /// Transmits bytes, or receives them again in loopback mode.
    fn transmit(&mut self, bytes: &[u8]) {
        self.action.add(self.output.write(bytes));
        if self.is_looped_back() {
            for &byte in bytes {
                self.loop_back(u16::from(byte));
            }
        }
        self.registers.ris |= interrupt::TX;
    }

    /// Receives a looped-back character. Only here can the receiver be overrun, by the guest
    /// itself.
    fn loop_back(&mut self, character: u16) {
        if self.rx.len() < self.depth() {
            self.take_in(character);
        } else {
            self.overrun = true;
            self.registers.rsr |= rsr::OVERRUN;
            self.registers.ris |= interrupt::OE;
        }
    }

    fn take_in(&mut self, character: u16) {
        let reached = self.is_trigger_reached();
        self.rx.push_back(character);
        self.overrun = false;
        self.registers.ris |= interrupt::RT;
        self.update_receive_interrupts(reached);
    }

    /// Puts a break into the FIFO: a zero character with the break flag (section 3.3.1).
    fn take_in_break(&mut self) {
        self.take_in(dr::BREAK);
        self.registers.ris |= interrupt::BE;
    }

    /// Takes the oldest received character out of the FIFO, for a read of UARTDR. Returns zero if
    /// it is empty.
    fn take_out(&mut self) -> u32 {
        let reached = self.is_trigger_reached();
        let character = u32::from(self.rx.pop_front().unwrap_or(0));
        self.update_receive_interrupts(reached);
        self.registers.rsr =
            (self.registers.rsr & rsr::OVERRUN) | (character >> 8 & rsr::OF_CHARACTER);
        if self.overrun {
            character | dr::OVERRUN
        } else {
            character
        }
    }

    /// Updates the receive interrupts: UARTRXINTR ends below the trigger level, UARTRTINTR when the
    /// FIFO is empty (section 2.8). One that the guest cleared stays clear until the level is
    /// reached again. `reached` says whether it was reached before.
    fn update_receive_interrupts(&mut self, reached: bool) {
        if !self.is_trigger_reached() {
            self.registers.ris &= !interrupt::RX;
        } else if !reached {
            self.registers.ris |= interrupt::RX;
        }
        if self.rx.is_empty() {
            self.registers.ris &= !interrupt::RT;
        }
    }

    fn is_trigger_reached(&self) -> bool {
        self.rx.len() >= self.trigger()
    }

    /// Returns the fill of the receive FIFO that raises UARTRXINTR, in characters: eighths of the
    /// depth by RXIFLSEL (section 3.3.9). Reserved values count as the highest.
    fn trigger(&self) -> usize {
        if self.depth() == 1 {
            return 1;
        }
        let eighths = match self.registers.ifls >> 3 {
            0b000 => 1,
            0b001 => 2,
            0b010 => 4,
            0b011 => 6,
            _ => 7,
        };
        FIFO_DEPTH * eighths / 8
    }

    /// Returns the depth of the FIFO: 1 while FEN is clear, when it acts as a holding register.
    fn depth(&self) -> usize {
        if self.registers.lcr_h & lcr_h::FEN == 0 {
            1
        } else {
            FIFO_DEPTH
        }
    }

    fn set_line_control(&mut self, value: u32) {
        let reached = self.is_trigger_reached();
        let break_begins = value & !self.registers.lcr_h & lcr_h::BRK != 0;
        self.registers.lcr_h = value;
        self.update_receive_interrupts(reached);
        if break_begins && self.is_looped_back() && self.rx.len() < self.depth() {
            self.take_in_break();
        }
    }

    /// Writes UARTCR. A modem input that changes raises its interrupt (section 2.8); inputs change
    /// only by loopback of the modem outputs.
    fn set_control(&mut self, value: u32) {
        let before = self.modem_inputs();
        self.registers.cr = value;
        let changed = before ^ self.modem_inputs();
        for (input, raised) in [
            (fr::RI, interrupt::RI),
            (fr::CTS, interrupt::CTS),
            (fr::DCD, interrupt::DCD),
            (fr::DSR, interrupt::DSR),
        ] {
            if changed & input != 0 {
                self.registers.ris |= raised;
            }
        }
    }

    /// Returns the modem bits of UARTFR. In loopback mode each input follows an output (section
    /// 3.3.8, LBE).
    fn modem_inputs(&self) -> u32 {
        if !self.is_looped_back() {
            return fr::CTS | fr::DSR | fr::DCD;
        }
        [
            (cr::RTS, fr::CTS),
            (cr::DTR, fr::DSR),
            (cr::OUT1, fr::DCD),
            (cr::OUT2, fr::RI),
        ]
        .into_iter()
        .filter(|(output, _)| self.registers.cr & output != 0)
        .fold(0, |inputs, (_, input)| inputs | input)
    }

    fn is_looped_back(&self) -> bool {
        self.registers.cr & cr::LBE != 0
    }

    /// Returns UARTFR: never busy, the transmitter always empty.
    fn flags(&self) -> u32 {
        let mut flags = fr::TXFE | self.modem_inputs();
        if self.rx.is_empty() {
            flags |= fr::RXFE;
        }
        if self.rx.len() >= self.depth() {
            flags |= fr::RXFF;
        }
        flags
    }

    /// Completes each access: counts a new session, tells of new room, and updates the line.
    fn settle(&mut self, (listened, was_wanted): (bool, bool)) {
        self.update_line();
        if !listened && self.listens() {
            self.sessions += 1;
        }
        if !was_wanted && self.wanted() > 0 {
            (self.on_room)();
        }
    }

    fn update_line(&mut self) {
        let asserted = self.registers.ris & self.registers.imsc;
        self.line.set(asserted != 0);
    }
}

impl PrimeCell for Pl011 {
    /// UARTPeriphID0 to 3: part 0x011, designer 0x41 (Arm), revision 1, configuration 0.
    /// QEMU has the same. Linux takes a revision below 3 to have FIFOs of 16
    /// (drivers/tty/serial/amba-pl011.c, `get_fifosize_arm`).
    const PERIPHERAL_ID: [u8; 4] = [0x11, 0x10, 0x14, 0x00];

    fn read_register(&mut self, offset: u64) -> Option<u32> {
        match offset {
            offset::DR => Some(self.take_out()),
            offset => self.register(offset),
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) -> Option<()> {
        let registers = &mut self.registers;
        match offset {
            offset::DR => self.transmit(&value.to_le_bytes()[..1]),
            // UARTECR: a write of any value clears the errors.
            offset::RSR_ECR => registers.rsr = 0,
            offset::ILPR => registers.ilpr = value & mask::ILPR,
            offset::IBRD => registers.ibrd = value & mask::IBRD,
            offset::FBRD => registers.fbrd = value & mask::FBRD,
            offset::LCR_H => self.set_line_control(value & mask::LCR_H),
            offset::CR => self.set_control(value & mask::CR),
            offset::IFLS => {
                let reached = self.is_trigger_reached();
                self.registers.ifls = value & mask::IFLS;
                self.update_receive_interrupts(reached);
            }
            offset::IMSC => registers.imsc = value & mask::INTERRUPTS,
            offset::ICR => registers.ris &= !value,
            offset::DMACR => registers.dmacr = value & mask::DMACR,
            _ => return None,
        }
        Some(())
    }
}

impl Uart for Pl011 {
    type Snapshot = Snapshot;

    /// The guest listens while the receive or the receive timeout interrupt is unmasked, or while
    /// it polls UARTFR. A guest that does not listen may discard what it finds in the FIFO, as
    /// Linux's driver does when it opens the port; what the caller still holds is not lost.
    ///
    /// Linux's driver also unmasks the receive interrupts briefly before that (`pl011_hwinit` to
    /// `pl011_allocate_irq`), which looks the same: bytes received in between are lost. A caller
    /// avoids this window by waiting a millisecond after [`listening`](Self::listening) changed.
    fn wanted(&self) -> usize {
        if self.listens() { self.room() } else { 0 }
    }

    fn listening(&self) -> Option<u64> {
        self.listens().then_some(self.sessions)
    }

    fn receive(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.room());
        for &byte in bytes.iter().take(taken) {
            self.take_in(u16::from(byte));
        }
        self.update_line();
        taken
    }

    fn receive_break(&mut self) -> bool {
        let fits = self.room() > 0;
        if fits {
            self.take_in_break();
            self.update_line();
        }
        fits
    }

    fn write_data(&mut self, bytes: &[u8]) -> Action {
        if bytes.is_empty() {
            return Action::None;
        }
        self.polls = 0;
        self.transmit(bytes);
        self.update_line();
        std::mem::take(&mut self.action)
    }

    /// Returns `None` while a character or an error waits: reading either has side effects.
    fn snapshot(&self) -> Option<Snapshot> {
        if !self.rx.is_empty() || self.overrun || self.registers.rsr != 0 {
            return None;
        }
        let mut registers = [0; SNAPSHOT_WORDS];
        for (index, word) in registers.iter_mut().enumerate().skip(1) {
            *word = self.register(index as u64 * 4).unwrap_or(0);
        }
        Some(Snapshot { registers })
    }

    fn sends_by_interrupt(&self) -> bool {
        self.registers.imsc & interrupt::TX != 0
    }

    fn words(snapshot: &Snapshot) -> impl Iterator<Item = (usize, u32)> + '_ {
        snapshot.words()
    }
}

impl Device for Pl011 {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        let before = (self.listens(), self.wanted() > 0);
        self.polls = match offset {
            offset::FR => self.polls.saturating_add(1),
            offset::DR if self.polls < POLLS => 0,
            _ => self.polls,
        };
        let faults = primecell::read(self, offset, data);
        self.faults.note(faults, "read", offset, data.len());
        self.settle(before);
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let before = (self.listens(), self.wanted() > 0);
        self.polls = 0;
        let faults = primecell::write(self, offset, data);
        self.faults.note(faults, "write", offset, data.len());
        self.settle(before);
        std::mem::take(&mut self.action)
    }
}

mod state;

pub use state::Pl011State;

#[cfg(test)]
mod tests;
