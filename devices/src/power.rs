//! Power-off, reset and the power button of a PC.

use serde::{Deserialize, Serialize};
use std::sync::Arc;

use crate::action::Action;
use crate::persist::{Persist, RestoreError};
use crate::{Device, IrqLine};

/// A power key, by which the guest is asked to power off.
pub trait PowerKey: Send {
    /// Presses or releases the key.
    fn set_pressed(&mut self, pressed: bool);
}

/// ACPI's registers of hardware-reduced machines, one byte each: sleep control at the first port,
/// sleep status at the second (ACPI 6.5, section 4.8.3.7). The power button is an interrupt, which
/// the DSDT describes (section 5.6.9).
pub struct AcpiPower {
    line: Arc<dyn IrqLine>,
    control: u8,
}

/// The type of sleep that is soft off: the value of `\_S5` in the DSDT.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// Sleep control: the type of sleep, three bits from here.
const SLEEP_TYPE_SHIFT: u32 = 2;
/// Sleep control: enter the sleep state.
const SLEEP_ENABLE: u8 = 1 << 5;

impl AcpiPower {
    /// Creates the registers as after power-on.
    pub fn new(line: Arc<dyn IrqLine>) -> AcpiPower {
        AcpiPower { line, control: 0 }
    }
}

impl PowerKey for AcpiPower {
    fn set_pressed(&mut self, pressed: bool) {
        if pressed {
            self.line.pulse();
        }
    }
}

impl Device for AcpiPower {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        data.fill(0);
        // The machine never wakes from sleep, so the status is 0.
        if let (0, Some(first)) = (offset, data.first_mut()) {
            *first = self.control;
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let (0, Some(&value)) = (offset, data.first()) else {
            return Action::None;
        };
        // The enable bit reads as 0.
        self.control = value & !SLEEP_ENABLE;
        match value & SLEEP_ENABLE != 0 && value >> SLEEP_TYPE_SHIFT & 7 == SLEEP_TYPE_OFF {
            true => Action::PowerOff,
            false => Action::None,
        }
    }
}

/// The state of [`AcpiPower`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiPowerState {
    /// Sleep control.
    pub control: u8,
}

impl Persist for AcpiPower {
    type State = AcpiPowerState;

    fn save(&self) -> AcpiPowerState {
        AcpiPowerState {
            control: self.control,
        }
    }

    fn restore(&mut self, state: &AcpiPowerState) -> Result<(), RestoreError> {
        let control = state.control;
        RestoreError::check("ACPI power device", "sleep control", control, !SLEEP_ENABLE)?;
        self.control = control;
        Ok(())
    }
}

/// The reset control register of Intel's chipsets, at port 0xcf9 (82801 datasheets, RST_CNT).
#[derive(Default)]
pub struct ResetControl {
    value: u8,
}

/// The state of [`ResetControl`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetControlState {
    /// The register.
    pub value: u8,
}

impl Persist for ResetControl {
    type State = ResetControlState;

    fn save(&self) -> ResetControlState {
        ResetControlState { value: self.value }
    }

    fn restore(&mut self, state: &ResetControlState) -> Result<(), RestoreError> {
        RestoreError::check("reset control", "RST_CNT", state.value, RESET_BITS)?;
        self.value = state.value;
        Ok(())
    }
}

/// The bits that the register stores.
const RESET_BITS: u8 = 0x0e;
/// Reset the CPU.
const RESET_CPU: u8 = 1 << 2;

impl ResetControl {
    /// Creates the register as after power-on.
    pub fn new() -> ResetControl {
        ResetControl::default()
    }
}

impl Device for ResetControl {
    fn read(&mut self, _: u64, data: &mut [u8]) -> Action {
        data.fill(self.value);
        Action::None
    }

    fn write(&mut self, _: u64, data: &[u8]) -> Action {
        let Some(&value) = data.first() else {
            return Action::None;
        };
        // The bit has to go from 0 to 1.
        let rises = value & !self.value & RESET_CPU != 0;
        self.value = value & RESET_BITS;
        match rises {
            true => Action::Reset,
            false => Action::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fake::FakeLine;
    use crate::persist::tests::{Access, accesses, goes_on, refuses};

    #[test]
    fn soft_off_switches_off_and_no_other_sleep() {
        let mut acpi = AcpiPower::new(FakeLine::new());
        for value in [0x14, 0x20, 0x24, 0x38] {
            assert_eq!(acpi.write(0, &[value]), Action::None, "{value:#x}");
        }
        assert_eq!(acpi.write(1, &[0x34]), Action::None);
        let off = SLEEP_TYPE_OFF << 2 | 0x20;
        assert_eq!(acpi.write(0, &[off]), Action::PowerOff);
        let mut value = [0xee];
        assert_eq!(acpi.read(0, &mut value), Action::None);
        assert_eq!(value, [SLEEP_TYPE_OFF << 2]);
    }

    #[test]
    fn the_power_button_is_one_edge() {
        let line = FakeLine::new();
        let mut acpi = AcpiPower::new(line.clone());
        acpi.set_pressed(true);
        acpi.set_pressed(false);
        assert_eq!(line.history(), [true, false]);
    }

    #[test]
    fn a_rising_reset_bit_resets() {
        let mut register = ResetControl::new();
        assert_eq!(register.write(0, &[0x02]), Action::None);
        assert_eq!(register.write(0, &[0x06]), Action::Reset);
        assert_eq!(register.write(0, &[0x0e]), Action::None);
        let mut value = [0];
        assert_eq!(register.read(0, &mut value), Action::None);
        assert_eq!(value, [0x0e]);
    }

    #[test]
    fn a_state_that_no_guest_can_cause_is_refused() {
        let mut acpi = AcpiPower::new(FakeLine::new());
        refuses(
            &mut acpi,
            &AcpiPowerState { control: 0x20 },
            "sleep control 0x20",
        );
        let mut register = ResetControl::new();
        refuses(
            &mut register,
            &ResetControlState { value: 0x16 },
            "RST_CNT 0x16",
        );
    }

    proptest! {
        #[test]
        fn they_go_on_where_they_were_saved(
            before in prop::collection::vec(accesses(&[0, 1], &[1, 2]), 0..20),
            after in prop::collection::vec(accesses(&[0, 1], &[1, 2]), 0..20),
        ) {
            let acpi = || {
                let line = FakeLine::new();
                (AcpiPower::new(line.clone()), line)
            };
            goes_on(acpi, |device, access: &Access| access.make(device), &before, &after);
            let register = || (ResetControl::new(), FakeLine::new());
            goes_on(register, |device, access: &Access| access.make(device), &before, &after);
        }
    }
}
