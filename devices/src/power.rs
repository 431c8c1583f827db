//! How a PC is switched off and reset, and how somebody asks it to switch itself off.

use std::sync::Arc;

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
    on_power_off: Box<dyn Fn() + Send>,
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
    pub fn new(line: Arc<dyn IrqLine>, on_power_off: Box<dyn Fn() + Send>) -> AcpiPower {
        AcpiPower {
            line,
            on_power_off,
            control: 0,
        }
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
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        // It never wakes, so the status is 0.
        if let (0, Some(first)) = (offset, data.first_mut()) {
            *first = self.control;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (0, Some(&value)) = (offset, data.first()) else {
            return;
        };
        // The enable bit reads as 0.
        self.control = value & !SLEEP_ENABLE;
        if value & SLEEP_ENABLE != 0 && value >> SLEEP_TYPE_SHIFT & 7 == SLEEP_TYPE_OFF {
            (self.on_power_off)();
        }
    }
}

/// The reset control register of Intel's chipsets, at port 0xcf9 (82801 datasheets, RST_CNT).
pub struct ResetControl {
    on_reset: Box<dyn Fn() + Send>,
    value: u8,
}

/// Reset the CPU.
const RESET_CPU: u8 = 1 << 2;

impl ResetControl {
    /// The register as after power-on.
    pub fn new(on_reset: Box<dyn Fn() + Send>) -> ResetControl {
        ResetControl { on_reset, value: 0 }
    }
}

impl Device for ResetControl {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(self.value);
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        // The bit has to go from 0 to 1.
        if value & !self.value & RESET_CPU != 0 {
            (self.on_reset)();
        }
        self.value = value & 0x0e;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::fake::FakeLine;

    fn counter() -> (Arc<AtomicUsize>, Box<dyn Fn() + Send>) {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        let call = move || {
            counted.fetch_add(1, Ordering::Relaxed);
        };
        (count, Box::new(call))
    }

    #[test]
    fn soft_off_switches_off_and_no_other_sleep() {
        let (offs, on_off) = counter();
        let mut acpi = AcpiPower::new(FakeLine::new(), on_off);
        for value in [0x14, 0x20, 0x24, 0x38] {
            acpi.write(0, &[value]);
        }
        acpi.write(1, &[0x34]);
        assert_eq!(offs.load(Ordering::Relaxed), 0);
        acpi.write(0, &[SLEEP_TYPE_OFF << 2 | 0x20]);
        assert_eq!(offs.load(Ordering::Relaxed), 1);
        let mut value = [0xee];
        acpi.read(0, &mut value);
        assert_eq!(value, [SLEEP_TYPE_OFF << 2]);
    }

    #[test]
    fn the_power_button_is_one_edge() {
        let line = FakeLine::new();
        let mut acpi = AcpiPower::new(line.clone(), counter().1);
        acpi.set_pressed(true);
        acpi.set_pressed(false);
        assert_eq!(line.history(), [true, false]);
    }

    #[test]
    fn a_reset_is_the_rise_of_its_bit() {
        let (resets, on_reset) = counter();
        let mut register = ResetControl::new(on_reset);
        register.write(0, &[0x02]);
        assert_eq!(resets.load(Ordering::Relaxed), 0);
        register.write(0, &[0x06]);
        assert_eq!(resets.load(Ordering::Relaxed), 1);
        register.write(0, &[0x0e]);
        assert_eq!(resets.load(Ordering::Relaxed), 1);
        let mut value = [0];
        register.read(0, &mut value);
        assert_eq!(value, [0x0e]);
    }
}
