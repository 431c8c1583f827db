//! The real-time clock of Arm boards: PrimeCell RTC PL031 (ARM DDI 0224).
//!
//! [`vm_superio::Rtc`] keeps the time: seconds since 1970 by the host's clock, plus the offset that
//! the guest loaded. It has no alarm (its match register only reads back), and a write to its
//! control register discards the time that the guest has set, where the hardware ignores the write
//! once the clock runs (section 3.3.4; QEMU ignores it too). Linux writes that register each time
//! its driver is loaded. Both are corrected here. It panics if the host's clock is before 1970.
//!
//! The device has no timer of its own: the event loop asks [`Pl031::deadline`] how long to wait,
//! and then calls [`Pl031::poll`].

use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vm_superio::rtc_pl031::NoEvents;
use vm_superio::{Rtc, RtcState};

use crate::action::Action;
use crate::persist::{Persist, RestoreError};
use crate::primecell::{self, Faults, Line, PrimeCell};
use crate::{Device, IrqLine};

/// A PL031 real-time clock with its alarm.
pub struct Pl031 {
    line: Line,
    on_deadline: Box<dyn Fn() + Send>,
    /// Data, load, match and mask registers.
    rtc: Rtc<NoEvents>,
    /// RTCRIS: the clock has passed the match register.
    matched: bool,
    /// The second up to which the clock was compared with the match register.
    compared: u32,
    /// Invalid accesses.
    faults: Faults,
}

/// Offsets in bytes (section 3.2).
mod offset {
    pub(super) const DR: u16 = 0x00;
    pub(super) const MR: u16 = 0x04;
    pub(super) const LR: u16 = 0x08;
    pub(super) const CR: u16 = 0x0c;
    pub(super) const IMSC: u16 = 0x10;
    pub(super) const RIS: u16 = 0x14;
    pub(super) const MIS: u16 = 0x18;
    pub(super) const ICR: u16 = 0x1c;
}

/// RTCCR: the clock runs. Once started, it cannot be stopped.
const CR_STARTED: u32 = 1;

/// The one interrupt in RTCIMSC, RTCRIS, RTCMIS and RTCICR.
const INTERRUPT: u32 = 1;

impl Pl031 {
    /// Creates a running clock that shows the host's time, with the alarm masked and the line low.
    ///
    /// `on_deadline` is called after each access that may change [`deadline`](Self::deadline), with
    /// the device locked: it may wake an event loop, but must not call the device.
    pub fn new(line: Arc<dyn IrqLine>, on_deadline: Box<dyn Fn() + Send>) -> Pl031 {
        let mut clock = Pl031 {
            line: Line::new(line),
            on_deadline,
            rtc: Rtc::new(),
            matched: false,
            compared: 0,
            faults: Faults::of("PL031"),
        };
        clock.compared = clock.now();
        clock
    }

    /// Returns the time until the alarm; `None` when none is set.
    ///
    /// It assumes that the host's clock is not set meanwhile: ask again after it was, and after
    /// each [`poll`](Self::poll).
    pub fn deadline(&mut self) -> Option<Duration> {
        // The fraction is read first: if a new second begins in between, the result is early, never
        // late.
        let fraction = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.subsec_nanos());
        self.compare();
        if self.matched || !self.is_unmasked() {
            return None;
        }
        let seconds = self.register(offset::MR).wrapping_sub(self.compared);
        if seconds == 0 {
            // The guest has cleared this second's match; the next one is 136 years away.
            return None;
        }
        let seconds = Duration::from_secs(u64::from(seconds));
        Some(seconds.saturating_sub(Duration::from_nanos(u64::from(fraction))))
    }

    /// Raises the alarm when its time has come.
    pub fn poll(&mut self) {
        self.compare();
        self.update_line();
    }

    /// Returns the number of invalid accesses: at an offset, of a width or in a direction that no
    /// register has.
    pub fn faults(&self) -> u64 {
        self.faults.count()
    }

    /// Resets the alarm to its power-on state. The time that the guest has set is kept, as by a
    /// battery-backed clock.
    pub fn reset(&mut self) {
        let kept = RtcState {
            mr: 0,
            imsc: 0,
            ris: 0,
            ..self.rtc.state()
        };
        self.rtc = Rtc::from_state(&kept, NoEvents);
        self.matched = false;
        self.compared = self.now();
        self.update_line();
        (self.on_deadline)();
    }

    /// Records a match if the clock has passed the match register since the last call.
    fn compare(&mut self) {
        let now = self.now();
        let passed = now.wrapping_sub(self.compared);
        let until_match = self.register(offset::MR).wrapping_sub(self.compared);
        // A difference of more than half the range means that the host's clock was set back.
        let forward = passed <= u32::MAX / 2;
        if forward && (1..=passed).contains(&until_match) {
            self.matched = true;
        }
        self.compared = now;
    }

    /// Returns the guest's time in seconds.
    fn now(&mut self) -> u32 {
        self.register(offset::DR)
    }

    fn is_unmasked(&mut self) -> bool {
        self.register(offset::IMSC) & INTERRUPT != 0
    }

    fn register(&mut self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.rtc.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn update_line(&mut self) {
        let asserted = self.matched && self.is_unmasked();
        self.line.set(asserted);
    }
}

/// The state of a [`Pl031`]. Times are in seconds of the guest's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pl031State {
    /// RTCLR.
    pub load: u32,
    /// How far the guest's clock is ahead of the host's, in seconds. The host's clock keeps running
    /// while the machine is saved.
    pub ahead: i64,
    /// RTCMR.
    pub alarm: u32,
    /// RTCIMSC.
    pub mask: u32,
    /// RTCRIS.
    pub matched: bool,
    /// The time up to which the clock was compared with the alarm. An alarm that falls between it
    /// and the restore is raised by the restore.
    pub compared: u32,
}

/// The largest difference of two 32-bit clocks, in seconds.
const MOST_AHEAD: i64 = u32::MAX as i64;

impl Persist for Pl031 {
    type State = Pl031State;

    fn save(&self) -> Pl031State {
        let RtcState {
            lr,
            offset,
            mr,
            imsc,
            ..
        } = self.rtc.state();
        Pl031State {
            load: lr,
            ahead: offset,
            alarm: mr,
            mask: imsc,
            matched: self.matched,
            compared: self.compared,
        }
    }

    fn restore(&mut self, state: &Pl031State) -> Result<(), RestoreError> {
        const DEVICE: &str = "PL031";
        RestoreError::check(DEVICE, "RTCIMSC", state.mask, INTERRUPT)?;
        if !(-MOST_AHEAD..=MOST_AHEAD).contains(&state.ahead) {
            return Err(RestoreError(format!(
                "the state of the {DEVICE} is not valid: its clock is {} s ahead of the host's, and has 32 bits",
                state.ahead
            )));
        }
        let registers = RtcState {
            lr: state.load,
            offset: state.ahead,
            mr: state.alarm,
            imsc: state.mask,
            ris: 0,
        };
        self.rtc = Rtc::from_state(&registers, NoEvents);
        (self.matched, self.compared) = (state.matched, state.compared);
        self.poll();
        (self.on_deadline)();
        Ok(())
    }
}

impl PrimeCell for Pl031 {
    /// RTCPeriphID0 to 3: part 0x031, designer 0x41 (Arm), revision 1, configuration 0, as
    /// QEMU's model and kvm-unit-tests have it. Linux matches 0x00041031 with any revision
    /// (drivers/rtc/rtc-pl031.c).
    const PERIPHERAL_ID: [u8; 4] = [0x31, 0x10, 0x14, 0x00];

    /// Registers are 32 bits wide, and drivers use only accesses of that width.
    const WIDTHS: &'static [usize] = &[4];

    fn read_register(&mut self, offset: u64) -> Option<u32> {
        let register = u16::try_from(offset).ok()?;
        Some(match register {
            offset::DR | offset::MR | offset::LR | offset::IMSC => self.register(register),
            offset::CR => CR_STARTED,
            offset::RIS => u32::from(self.matched),
            offset::MIS => u32::from(self.matched && self.is_unmasked()),
            _ => return None,
        })
    }

    fn write_register(&mut self, offset: u64, value: u32) -> Option<()> {
        let register = u16::try_from(offset).ok()?;
        match register {
            offset::MR | offset::LR => {
                self.rtc.write(register, &value.to_le_bytes());
                // Setting the time is not time that passes, but equality is a match at once.
                self.compared = self.now();
                self.matched |= self.compared == self.register(offset::MR);
            }
            offset::IMSC => self.rtc.write(register, &value.to_le_bytes()),
            offset::ICR => self.matched &= value & INTERRUPT == 0,
            // A running clock ignores the write; drivers read the register and write it back.
            offset::CR => return Some(()),
            _ => return None,
        }
        (self.on_deadline)();
        Some(())
    }
}

impl Device for Pl031 {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        self.compare();
        let faults = primecell::read(self, offset, data);
        self.faults.note(faults, "read", offset, data.len());
        self.update_line();
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        self.compare();
        let faults = primecell::write(self, offset, data);
        self.faults.note(faults, "write", offset, data.len());
        self.update_line();
        Action::None
    }
}

#[cfg(test)]
mod tests;
