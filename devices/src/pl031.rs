//! The real-time clock of Arm boards: PrimeCell RTC PL031 (ARM DDI 0224).
//!
//! The time, and setting it, are those of [`vm_superio::Rtc`]: seconds since 1970 by
//! the host's clock, plus what the guest loaded. It has no alarm (its match register
//! only reads back), and a write to its control register throws away the time that
//! the guest has set, where a clock that runs takes no notice (section 3.3.4; QEMU
//! ignores it too). Linux writes that register each time its driver is loaded. Both
//! are put right here. A host whose clock stands before 1970 makes it panic.
//!
//! A device has no timer of its own. Who owns the event loop asks
//! [`Pl031::deadline`] for how long, and then calls [`Pl031::poll`].

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
    /// Up to which second the clock was compared with the match register.
    compared: u32,
    /// Accesses that no register answers.
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

/// RTCCR: the clock runs. It cannot be stopped once it does.
const CR_STARTED: u32 = 1;

/// The one interrupt in RTCIMSC, RTCRIS, RTCMIS and RTCICR.
const INTERRUPT: u32 = 1;

impl Pl031 {
    /// A clock that runs and shows the host's time, its alarm masked and its line low.
    ///
    /// `on_deadline` is called when the guest has done what may change
    /// [`deadline`](Self::deadline), with the device locked: it may wake an event
    /// loop, but not come back into the device.
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

    /// How long until the alarm; `None` when the guest waits for none.
    ///
    /// By the host's clock as it goes now: ask again after that clock was set, and
    /// after each [`poll`](Self::poll).
    pub fn deadline(&mut self) -> Option<Duration> {
        // The fraction is taken first: if a second begins in between, the answer is
        // early and asked again, and never late.
        let fraction = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.subsec_nanos());
        self.compare();
        if self.matched || !self.is_unmasked() {
            return None;
        }
        let seconds = self.register(offset::MR).wrapping_sub(self.compared);
        if seconds == 0 {
            // The guest has cleared this second's match; the next is 136 years off.
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

    /// Accesses so far at offsets, of widths or in directions that no register answers.
    pub fn faults(&self) -> u64 {
        self.faults.count()
    }

    /// Takes the alarm back to power-on. The time goes on as the guest has set it, as
    /// that of a clock with a battery does.
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

    /// Notices whether the clock has passed the match register since it was last asked.
    fn compare(&mut self) {
        let now = self.now();
        let passed = now.wrapping_sub(self.compared);
        let until_match = self.register(offset::MR).wrapping_sub(self.compared);
        // More than half the range is no time that passed: the host's clock was set
        // back.
        let forward = passed <= u32::MAX / 2;
        if forward && (1..=passed).contains(&until_match) {
            self.matched = true;
        }
        self.compared = now;
    }

    /// The clock in seconds.
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

/// The state of a [`Pl031`]. Its times are those of the guest's clock, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pl031State {
    /// RTCLR.
    pub load: u32,
    /// Seconds that the guest's clock is ahead of the host's, which goes on meanwhile.
    pub ahead: i64,
    /// RTCMR.
    pub alarm: u32,
    /// RTCIMSC.
    pub mask: u32,
    /// RTCRIS.
    pub matched: bool,
    /// Up to when the clock was compared with the alarm. An alarm of the time after it, up to the
    /// restore, comes with the restore.
    pub compared: u32,
}

/// As much as a clock of 32 bits can be ahead of another, or behind it, in seconds.
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

    /// Its registers are 32 bits wide and so are its drivers' accesses; no other is answered.
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
                // A new time is not time that passed, and equal is a match at once.
                self.compared = self.now();
                self.matched |= self.compared == self.register(offset::MR);
            }
            offset::IMSC => self.rtc.write(register, &value.to_le_bytes()),
            offset::ICR => self.matched &= value & INTERRUPT == 0,
            // A clock that runs takes no notice; reading and writing back is usual.
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
