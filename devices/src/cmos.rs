//! The PC's real-time clock and CMOS memory: an MC146818 behind an index and a data port (MC146818A
//! datasheet; arch/x86/kernel/rtc.c for the century).
//!
//! It shows the host's time in UTC plus the offset that the guest set, in BCD and 24-hour mode. It
//! raises no interrupts: no alarm, no periodic tick.

use serde::{Deserialize, Serialize};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::Device;
use crate::action::Action;
use crate::persist::{Persist, RestoreError};

/// An MC146818 with 128 bytes.
pub struct Cmos {
    index: u8,
    memory: [u8; SIZE],
    /// Seconds that the guest's clock is ahead of the host's.
    ahead: i64,
    /// The host's clock: seconds since 1970.
    now: fn() -> i64,
}

const SIZE: usize = 128;
/// The valid bits of an index.
const INDEX: u8 = SIZE as u8 - 1;

/// Registers.
mod register {
    pub(super) const SECONDS: u8 = 0x00;
    pub(super) const MINUTES: u8 = 0x02;
    pub(super) const HOURS: u8 = 0x04;
    pub(super) const WEEKDAY: u8 = 0x06;
    pub(super) const DAY: u8 = 0x07;
    pub(super) const MONTH: u8 = 0x08;
    pub(super) const YEAR: u8 = 0x09;
    pub(super) const A: u8 = 0x0a;
    pub(super) const B: u8 = 0x0b;
    pub(super) const C: u8 = 0x0c;
    pub(super) const D: u8 = 0x0d;
    pub(super) const CENTURY: u8 = 0x32;
}

/// The registers that hold the time.
const TIME: [u8; 8] = [
    register::SECONDS,
    register::MINUTES,
    register::HOURS,
    register::WEEKDAY,
    register::DAY,
    register::MONTH,
    register::YEAR,
    register::CENTURY,
];

/// Register A: 32 kHz oscillator, 1024 Hz rate, no update in progress.
const A_RUNNING: u8 = 0x26;
/// Register B: 24-hour mode, BCD.
const B_24_HOURS: u8 = 1 << 1;
/// Register B: the time is being set, and the clock is stopped (SET).
const B_SET: u8 = 1 << 7;
/// Register D: the battery is good (VRT).
const D_VALID: u8 = 1 << 7;

impl Cmos {
    /// Creates a clock that shows the host's time.
    #[must_use]
    pub fn new() -> Cmos {
        Cmos::with_clock(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH);
            since.map_or(0, |since| since.as_secs() as i64)
        })
    }

    fn with_clock(now: fn() -> i64) -> Cmos {
        let mut memory = [0; SIZE];
        memory[usize::from(register::A)] = A_RUNNING;
        memory[usize::from(register::B)] = B_24_HOURS;
        Cmos {
            index: 0,
            memory,
            ahead: 0,
            now,
        }
    }

    fn is_setting(&self) -> bool {
        self.memory[usize::from(register::B)] & B_SET != 0
    }

    /// Updates the time registers from the clock.
    fn show_time(&mut self) {
        let seconds = (self.now)().saturating_add(self.ahead);
        let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let (year, month, day) = date(days);
        let fields = [
            second % 60,
            second / 60 % 60,
            second / 3600,
            // 1970 began on a Thursday; Sunday is 1.
            (days + 4).rem_euclid(7) + 1,
            day,
            month,
            year.rem_euclid(100),
            year.div_euclid(100).rem_euclid(100),
        ];
        for (register, value) in TIME.into_iter().zip(fields) {
            self.memory[usize::from(register)] = to_bcd(value);
        }
    }

    /// Sets the clock from the time registers.
    fn set_time(&mut self) {
        let field = |register: u8| from_bcd(self.memory[usize::from(register)]);
        let year = field(register::CENTURY) * 100 + field(register::YEAR);
        let days = day_number(year, field(register::MONTH), field(register::DAY));
        let second = (field(register::HOURS) * 60 + field(register::MINUTES)) * 60
            + field(register::SECONDS);
        self.ahead = (days * 86_400 + second).saturating_sub((self.now)());
    }

    fn read_register(&mut self) -> u8 {
        if TIME.contains(&self.index) && !self.is_setting() {
            self.show_time();
        }
        match self.index {
            register::C => 0,
            register::D => D_VALID,
            index => self.memory[usize::from(index)],
        }
    }

    fn write_register(&mut self, value: u8) {
        let setting = self.is_setting();
        match self.index {
            register::A | register::C | register::D => {}
            register::B => {
                if !setting && value & B_SET != 0 {
                    self.show_time();
                }
                // Interrupts, binary mode and 12-hour mode are not supported.
                self.memory[usize::from(register::B)] = value & B_SET | B_24_HOURS;
                if setting && value & B_SET == 0 {
                    self.set_time();
                }
            }
            index if TIME.contains(&index) => {
                // Without SET, the write changes one field of a running clock.
                if !setting {
                    self.show_time();
                }
                self.memory[usize::from(index)] = value;
                if !setting {
                    self.set_time();
                }
            }
            index => self.memory[usize::from(index)] = value,
        }
    }
}

/// The state of a [`Cmos`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CmosState {
    /// The register that the data port shows.
    pub index: u8,
    /// All registers. The time registers hold the time at which they were last read or set.
    pub memory: Vec<u8>,
    /// Seconds that the guest's clock is ahead of the host's, which goes on meanwhile.
    pub ahead: i64,
}

impl Persist for Cmos {
    type State = CmosState;

    fn save(&self) -> CmosState {
        CmosState {
            index: self.index,
            memory: self.memory.to_vec(),
            ahead: self.ahead,
        }
    }

    fn restore(&mut self, state: &CmosState) -> Result<(), RestoreError> {
        const DEVICE: &str = "CMOS clock";
        RestoreError::check(DEVICE, "index", state.index, INDEX)?;
        let Ok(memory) = <[u8; SIZE]>::try_from(&*state.memory) else {
            return Err(RestoreError(format!(
                "the state of the {DEVICE} is not valid: it has {} registers, not {SIZE}",
                state.memory.len()
            )));
        };
        let fixed = [
            ("register A", register::A, !0, A_RUNNING),
            ("register B", register::B, !B_SET, B_24_HOURS),
            ("register C", register::C, !0, 0),
            ("register D", register::D, !0, 0),
        ];
        for (name, index, mask, value) in fixed {
            let found = memory[usize::from(index)];
            if found & mask != value {
                return Err(RestoreError(format!(
                    "the state of the {DEVICE} is not valid: {name} is {found:#x}, which no guest can cause"
                )));
            }
        }
        (self.index, self.memory, self.ahead) = (state.index, memory, state.ahead);
        Ok(())
    }
}

impl Default for Cmos {
    fn default() -> Cmos {
        Cmos::new()
    }
}

impl Device for Cmos {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        // The index cannot be read back.
        data.fill(0xff);
        if let (1, Some(first)) = (offset, data.first_mut()) {
            *first = self.read_register();
        }
        Action::None
    }

    /// Handles a write; one of two bytes sets the index and the register that it selects.
    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        for (port, value) in (offset..).zip(data) {
            match port {
                // Bit 7 masks NMIs, which this machine does not have.
                0 => self.index = value & INDEX,
                1 => self.write_register(*value),
                _ => {}
            }
        }
        Action::None
    }
}

fn to_bcd(value: i64) -> u8 {
    ((value / 10) << 4 | (value % 10)) as u8
}

fn from_bcd(value: u8) -> i64 {
    i64::from(value >> 4) * 10 + i64::from(value & 0xf)
}

/// The number of days in 400 Gregorian years, and from 1 March of the year 0 to 1 January 1970.
const ERA_DAYS: i64 = 146_097;
const TO_1970: i64 = 719_468;

/// Returns year, month and day of the day `days` after 1 January 1970. Internally, years begin in
/// March, so that the leap day comes last.
fn date(days: i64) -> (i64, i64, i64) {
    let days = days + TO_1970;
    let (era, day) = (days.div_euclid(ERA_DAYS), days.rem_euclid(ERA_DAYS));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + i64::from(month <= 2), month, day)
}

/// Returns the day number of a date: the inverse of [`date`].
fn day_number(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let (era, year) = (year.div_euclid(400), year.rem_euclid(400));
    let month = if month > 2 { month - 3 } else { month + 9 };
    let day_of_year = (153 * month + 2) / 5 + day - 1;
    era * ERA_DAYS + 365 * year + year / 4 - year / 100 + day_of_year - TO_1970
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fake::FakeLine;
    use crate::persist::tests::{Access, goes_on, refuses};

    fn read(cmos: &mut Cmos, register: u8) -> u8 {
        assert_eq!(cmos.write(0, &[register | 0x80]), Action::None);
        let mut data = [0];
        assert_eq!(cmos.read(1, &mut data), Action::None);
        data[0]
    }

    fn time(cmos: &mut Cmos) -> [u8; 8] {
        TIME.map(|register| read(cmos, register))
    }

    #[test]
    fn the_time_is_the_hosts_in_bcd() {
        // Thursday, 29 February 2024, 23:59:58.
        let mut cmos = Cmos::with_clock(|| 1_709_251_198);
        assert_eq!(
            time(&mut cmos),
            [0x58, 0x59, 0x23, 5, 0x29, 0x02, 0x24, 0x20]
        );
        assert_eq!(
            read(&mut cmos, register::A) & 0x80,
            0,
            "no update in progress"
        );
        assert_eq!(read(&mut cmos, register::B), B_24_HOURS);
        assert_eq!(read(&mut cmos, register::C), 0);
        assert_eq!(read(&mut cmos, register::D), D_VALID);
    }

    #[test]
    fn the_guest_can_set_the_time() {
        let mut cmos = Cmos::with_clock(|| 1_709_251_198);
        assert_eq!(cmos.write(0, &[register::B, B_SET]), Action::None);
        for (register, value) in TIME.into_iter().zip([0, 0, 0, 6, 1, 1, 0, 0x20]) {
            assert_eq!(cmos.write(0, &[register, value]), Action::None);
        }
        assert_eq!(cmos.write(0, &[register::B, 0]), Action::None);
        assert_eq!(time(&mut cmos), [0, 0, 0, 7, 1, 1, 0, 0x20]);
    }

    #[test]
    fn memory_holds_what_is_written() {
        let mut cmos = Cmos::new();
        for register in 0x10..0x30 {
            assert_eq!(cmos.write(0, &[register]), Action::None);
            assert_eq!(cmos.write(1, &[register ^ 0xff]), Action::None);
        }
        for register in 0x10..0x30 {
            assert_eq!(read(&mut cmos, register), register ^ 0xff);
        }
    }

    #[test]
    fn a_state_that_no_guest_can_cause_is_refused() {
        let mut cmos = Cmos::with_clock(|| 0);
        let state = cmos.save();
        refuses(
            &mut cmos,
            &CmosState {
                index: 0x80,
                ..state.clone()
            },
            "index 0x80",
        );
        for register in [register::A, register::B, register::C, register::D] {
            let mut memory = state.memory.clone();
            memory[usize::from(register)] = 0x77;
            refuses(
                &mut cmos,
                &CmosState {
                    memory,
                    ..state.clone()
                },
                "is 0x77",
            );
        }
    }

    #[test]
    fn the_time_goes_on_while_it_is_saved() {
        let mut cmos = Cmos::with_clock(|| 1_000_000);
        assert_eq!(cmos.write(0, &[register::YEAR, 0x30]), Action::None);
        let mut later = Cmos::with_clock(|| 1_000_061);
        later.restore(&cmos.save()).expect("a state that was saved");
        let (before, after) = (time(&mut cmos), time(&mut later));
        assert_eq!(after[0], before[0] + 1);
        assert_eq!(after[1], before[1] + 1);
        assert_eq!(after[2..], before[2..]);
    }

    /// Generates complete accesses: an index with its value, or a read.
    fn accesses() -> impl Strategy<Value = Access> {
        let register = prop_oneof![prop::sample::select(&TIME[..]), 0x0a..=0x0e_u8, any::<u8>()];
        prop_oneof![
            (register.clone(), any::<u8>())
                .prop_map(|(index, value)| Access::Write(0, vec![index, value])),
            register.prop_map(|index| Access::Write(0, vec![index])),
            Just(Access::Read(1, 1)),
            Just(Access::Read(0, 2)),
        ]
    }

    proptest! {
        #[test]
        fn it_goes_on_where_it_was_saved(
            before in prop::collection::vec(accesses(), 0..40),
            after in prop::collection::vec(accesses(), 0..40),
        ) {
            let make = || (Cmos::with_clock(|| 1_709_251_198), FakeLine::new());
            goes_on(make, |device, access: &Access| access.make(device), &before, &after);
        }

        #[test]
        fn nothing_restored_panics(ahead: i64, bytes: [u8; 32], setting: bool, reads: [u8; 32]) {
            let mut cmos = Cmos::new();
            let mut state = CmosState { ahead, ..cmos.save() };
            for register in TIME {
                state.memory[usize::from(register)] = bytes[usize::from(register) % 32];
            }
            state.memory[usize::from(register::B)] |= u8::from(setting) * B_SET;
            prop_assert_eq!(cmos.restore(&state), Ok(()));
            for register in reads {
                read(&mut cmos, register);
                let _ = cmos.write(0, &[register::B, register & B_SET]);
            }
        }

        #[test]
        fn dates_convert_back(days in -1_000_000_i64..1_000_000) {
            let (year, month, day) = date(days);
            prop_assert!((1..=12).contains(&month) && (1..=31).contains(&day));
            prop_assert_eq!(day_number(year, month, day), days);
        }

        #[test]
        fn nothing_written_panics(writes: Vec<(u8, u8)>) {
            let mut cmos = Cmos::new();
            for (register, value) in writes {
                assert_eq!(cmos.write(0, &[register, value]), Action::None);
                let _ = time(&mut cmos);
            }
        }
    }
}
