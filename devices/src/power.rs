//! How a PC is switched off and reset, and how somebody asks it to switch itself off.

use std::sync::Arc;

use crate::action::Action;
use crate::{Device, IrqLine};

/// What somebody outside the machine presses to ask it to switch itself off.
pub trait PowerKey: Send {
    /// Presses the key, or lets it go.
    fn set_pressed(&mut self, pressed: bool);
}

/// ACPI's registers of hardware-reduced machines, one byte each: sleep control at the first port,
/// sleep status at the second (ACPI 6.5, section 4.8.3.7). The power button is an interrupt,
/// whose meaning the DSDT tells (section 5.6.9).
pub struct AcpiPower {
    line: Arc<dyn IrqLine>,
    control: u8,
}

/// The type of sleep that is soft off: the value of `\_S5` in the DSDT.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// Sleep control: the type of sleep, three bits from here.
const SLEEP_TYPE_SHIFT: u32 = 2;
/// Sleep control: begin.
const SLEEP_ENABLE: u8 = 1 << 5;

impl AcpiPower {
    /// The registers of a machine that is on.
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
        // It never wakes, so the status is 0.
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

/// The reset control register of Intel's chipsets, at port 0xcf9 (82801 datasheets, RST_CNT).
#[derive(Default)]
pub struct ResetControl {
    value: u8,
}

/// Reset the CPU.
const RESET_CPU: u8 = 1 << 2;

impl ResetControl {
    /// The register as after power-on.
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
        self.value = value & 0x0e;
        match rises {
            true => Action::Reset,
            false => Action::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeLine;

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
    fn a_reset_is_the_rise_of_its_bit() {
        let mut register = ResetControl::new();
        assert_eq!(register.write(0, &[0x02]), Action::None);
        assert_eq!(register.write(0, &[0x06]), Action::Reset);
        assert_eq!(register.write(0, &[0x0e]), Action::None);
        let mut value = [0];
        assert_eq!(register.read(0, &mut value), Action::None);
        assert_eq!(value, [0x0e]);
    }
}
