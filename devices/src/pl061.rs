//! The GPIO controller of Arm boards: PrimeCell GPIO PL061 (ARM DDI 0190), eight lines.
//!
//! The VMM drives input lines with [`Pl061::set_input`]. A power key is a line that goes high,
//! stays high for a while (100 ms suffice) and goes low again: Linux's gpio-keys debounces by
//! reading the level again some milliseconds after the edge.

use serde::{Deserialize, Serialize};
use std::sync::Arc;

use crate::action::Action;
use crate::persist::{Persist, RestoreError};
use crate::primecell::{self, Faults, Line, PrimeCell};
use crate::{Device, IrqLine};

/// A PL061 GPIO controller. In all of its masks, bit 0 is line 0.
pub struct Pl061 {
    line: Line,
    /// Invalid accesses.
    faults: Faults,
    registers: Pl061Registers,
    /// The levels driven from outside, also on lines that are outputs now.
    inputs: u8,
}

/// The registers that are stored; the others are computed. All are zero at reset (section 3.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pl061Registers {
    /// GPIODATA: the levels driven on outputs.
    pub data: u8,
    /// GPIODIR: 1 is an output.
    pub dir: u8,
    /// GPIOIS: 1 detects a level, 0 an edge.
    pub sense: u8,
    /// GPIOIBE: 1 detects both edges.
    pub both_edges: u8,
    /// GPIOIEV: 1 detects high levels or rising edges, 0 low or falling.
    pub event: u8,
    /// GPIOIE: 1 lets the interrupt through.
    pub enable: u8,
    /// Edges detected and not cleared.
    pub edges: u8,
    /// GPIOAFSEL: stored without effect, as no line has an alternate function.
    pub alternate: u8,
}

/// The state of a [`Pl061`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pl061State {
    /// The registers that are stored.
    pub registers: Pl061Registers,
    /// The levels driven from outside.
    pub inputs: u8,
}

impl Persist for Pl061 {
    type State = Pl061State;

    fn save(&self) -> Pl061State {
        Pl061State {
            registers: self.registers,
            inputs: self.inputs,
        }
    }

    /// Restores any state: none is invalid.
    fn restore(&mut self, state: &Pl061State) -> Result<(), RestoreError> {
        (self.registers, self.inputs) = (state.registers, state.inputs);
        self.update_line();
        Ok(())
    }
}

/// Number of lines.
const LINES: u8 = 8;

/// Offsets in bytes (section 3.2).
mod offset {
    pub(super) const DATA_LAST: u64 = 0x3fc;
    pub(super) const DIR: u64 = 0x400;
    pub(super) const IS: u64 = 0x404;
    pub(super) const IBE: u64 = 0x408;
    pub(super) const IEV: u64 = 0x40c;
    pub(super) const IE: u64 = 0x410;
    pub(super) const RIS: u64 = 0x414;
    pub(super) const MIS: u64 = 0x418;
    pub(super) const IC: u64 = 0x41c;
    pub(super) const AFSEL: u64 = 0x420;
}

impl Pl061 {
    /// Creates a controller as after power-on, all lines inputs and low, its interrupt low.
    pub fn new(line: Arc<dyn IrqLine>) -> Pl061 {
        Pl061 {
            line: Line::new(line),
            faults: Faults::of("PL061"),
            registers: Pl061Registers::default(),
            inputs: 0,
        }
    }

    /// Drives a line (0 to 7) from outside; any other is ignored.
    pub fn set_input(&mut self, line: u8, high: bool) {
        if line >= LINES {
            return;
        }
        let bit = 1 << line;
        let before = self.inputs;
        self.inputs = if high { before | bit } else { before & !bit };
        self.detect_edges(before ^ self.inputs);
        self.update_line();
    }

    /// Returns the level of each line: driven by the guest on outputs, and from outside on inputs.
    pub fn levels(&self) -> u8 {
        let registers = &self.registers;
        (registers.data & registers.dir) | (self.inputs & !registers.dir)
    }

    /// Returns the number of invalid accesses: at an offset, of a width or in a direction that no
    /// register has.
    pub fn faults(&self) -> u64 {
        self.faults.count()
    }

    /// Resets to the power-on state. Lines stay driven from outside.
    pub fn reset(&mut self) {
        self.registers = Pl061Registers::default();
        self.update_line();
    }

    /// Records the configured edges among the inputs that changed.
    fn detect_edges(&mut self, changed: u8) {
        let registers = &mut self.registers;
        let to_event = !(self.inputs ^ registers.event);
        let wanted = !registers.sense & !registers.dir & (registers.both_edges | to_event);
        registers.edges |= changed & wanted;
    }

    /// Returns GPIORIS: edges until they are cleared, levels as long as they last.
    fn interrupts(&self) -> u8 {
        let registers = &self.registers;
        let at_event = !(self.inputs ^ registers.event);
        let levels = at_event & registers.sense & !registers.dir;
        (registers.edges & !registers.sense) | levels
    }

    fn update_line(&mut self) {
        let asserted = self.interrupts() & self.registers.enable;
        self.line.set(asserted != 0);
    }
}

/// Returns which lines an access to GPIODATA means, from bits 9 to 2 of its address: one line can
/// be written without a read-modify-write (section 3.3.1).
fn data_mask(offset: u64) -> u8 {
    (offset >> 2) as u8
}

impl PrimeCell for Pl061 {
    /// GPIOPeriphID0 to 3: part 0x061, designer 0x41 (Arm), revision 0, configuration 0.
    /// Linux matches 0x00041061 (drivers/gpio/gpio-pl061.c).
    const PERIPHERAL_ID: [u8; 4] = [0x61, 0x10, 0x04, 0x00];

    fn read_register(&mut self, offset: u64) -> Option<u32> {
        let registers = &self.registers;
        let value = match offset {
            0..=offset::DATA_LAST => self.levels() & data_mask(offset),
            offset::DIR => registers.dir,
            offset::IS => registers.sense,
            offset::IBE => registers.both_edges,
            offset::IEV => registers.event,
            offset::IE => registers.enable,
            offset::RIS => self.interrupts(),
            offset::MIS => self.interrupts() & registers.enable,
            offset::AFSEL => registers.alternate,
            _ => return None,
        };
        Some(u32::from(value))
    }

    fn write_register(&mut self, offset: u64, value: u32) -> Option<()> {
        // Registers are eight bits wide; higher bits do not exist.
        let value = value as u8;
        let registers = &mut self.registers;
        match offset {
            // A write to an input is lost: Linux writes again once the line is an output
            // (gpio-pl061.c, `pl061_direction_output`).
            0..=offset::DATA_LAST => {
                let mask = data_mask(offset) & registers.dir;
                registers.data = (registers.data & !mask) | (value & mask);
            }
            offset::DIR => registers.dir = value,
            offset::IS => registers.sense = value,
            offset::IBE => registers.both_edges = value,
            offset::IEV => registers.event = value,
            offset::IE => registers.enable = value,
            offset::IC => registers.edges &= !value,
            offset::AFSEL => registers.alternate = value,
            _ => return None,
        }
        Some(())
    }
}

impl Device for Pl061 {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        let faults = primecell::read(self, offset, data);
        self.faults.note(faults, "read", offset, data.len());
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let faults = primecell::write(self, offset, data);
        self.faults.note(faults, "write", offset, data.len());
        self.update_line();
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fake::FakeLine;
    use crate::persist::tests::{Access, accesses, goes_on};
    use crate::primecell::tests::{assert_invalid, assert_read_only, identification};

    struct Bench {
        gpio: Pl061,
        line: Arc<FakeLine>,
    }

    impl Bench {
        fn new() -> Bench {
            let line = FakeLine::new();
            let gpio = Pl061::new(line.clone());
            Bench { gpio, line }
        }

        /// Reads one byte, as Linux does.
        fn read(&mut self, offset: u64) -> u8 {
            let mut data = [0xff];
            assert_eq!(self.gpio.read(offset, &mut data), Action::None);
            data[0]
        }

        fn write(&mut self, offset: u64, value: u8) {
            assert_eq!(self.gpio.write(offset, &[value]), Action::None);
        }
    }

    /// Returns the offset at which GPIODATA shows the lines of `mask`.
    fn data(mask: u8) -> u64 {
        u64::from(mask) << 2
    }

    #[test]
    fn registers_are_zero_at_reset_and_keep_eight_bits() {
        let mut bench = Bench::new();
        for offset in (offset::DIR..=offset::MIS)
            .step_by(4)
            .chain([offset::AFSEL])
        {
            assert_eq!(bench.read(offset), 0, "{offset:#x}");
        }
        for offset in [
            offset::DIR,
            offset::IS,
            offset::IBE,
            offset::IEV,
            offset::IE,
            offset::AFSEL,
        ] {
            assert_eq!(
                bench.gpio.write(offset, &0x1234_56a5_u32.to_le_bytes()),
                Action::None
            );
            let mut word = [0xff; 4];
            assert_eq!(bench.gpio.read(offset, &mut word), Action::None);
            assert_eq!(u32::from_le_bytes(word), 0xa5, "{offset:#x}");
        }
        assert_eq!(bench.gpio.faults(), 0);
    }

    #[test]
    fn identification_is_what_linux_matches() {
        let mut bench = Bench::new();
        let ids = identification(&mut bench.gpio);
        assert_eq!(ids, [0x61, 0x10, 0x04, 0, 0x0d, 0xf0, 0x05, 0xb1]);
    }

    #[test]
    fn addresses_mask_the_data() {
        let mut bench = Bench::new();
        bench.write(offset::DIR, 0xff);
        bench.write(data(0xff), 0b1100_0011);
        bench.write(data(0b0000_0101), 0b0011_1100);
        assert_eq!(bench.gpio.levels(), 0b1100_0110);
        assert_eq!(bench.read(data(0xff)), 0b1100_0110);
        assert_eq!(bench.read(data(0b0000_0110)), 0b0000_0110);
        assert_eq!(bench.read(data(0)), 0);
    }

    #[test]
    fn inputs_show_their_level_and_ignore_writes() {
        let mut bench = Bench::new();
        bench.write(offset::DIR, 0x0f);
        bench.write(data(0xff), 0xff);
        assert_eq!(bench.read(data(0xff)), 0x0f);
        bench.gpio.set_input(7, true);
        bench.gpio.set_input(0, true);
        bench.write(data(0xff), 0);
        assert_eq!(bench.read(data(0xff)), 0x80);
        // The level from outside shows once the line is an input.
        bench.write(offset::DIR, 0);
        assert_eq!(bench.read(data(0xff)), 0x81);
    }

    #[test]
    fn lines_that_do_not_exist_are_not_driven() {
        let mut bench = Bench::new();
        bench.gpio.set_input(8, true);
        bench.gpio.set_input(255, true);
        assert_eq!(bench.gpio.levels(), 0);
    }

    #[test]
    fn linux_sees_a_power_key() {
        let mut bench = Bench::new();
        let key = 1 << 3;
        // pl061_probe; pl061_direction_input; pl061_irq_type for both edges, which is
        // what gpio-keys asks for; pl061_irq_unmask.
        bench.write(offset::IE, 0);
        bench.write(offset::DIR, 0);
        bench.write(offset::IS, 0);
        bench.write(offset::IBE, key);
        bench.write(offset::IEV, 0);
        bench.write(offset::IE, key);
        for pressed in [true, false] {
            bench.gpio.set_input(3, pressed);
            assert!(bench.line.is_high());
            // pl061_irq_handler, pl061_irq_ack; later pl061_get_value.
            assert_eq!(bench.read(offset::MIS), key);
            bench.write(offset::IC, key);
            assert!(!bench.line.is_high());
            assert_eq!(bench.read(data(key)) != 0, pressed);
        }
        assert_eq!(bench.line.history(), [true, false, true, false]);
        assert_eq!(bench.gpio.faults(), 0);
    }

    #[test]
    fn only_the_configured_edge_is_recorded() {
        for (event, both, rising, falling) in [
            (0x01, 0x00, true, false),
            (0x00, 0x00, false, true),
            (0x00, 0x01, true, true),
            (0x01, 0x01, true, true),
        ] {
            let mut bench = Bench::new();
            bench.write(offset::IEV, event);
            bench.write(offset::IBE, both);
            bench.gpio.set_input(0, true);
            assert_eq!(bench.read(offset::RIS) != 0, rising);
            bench.write(offset::IC, 0xff);
            // No edge: it is high already.
            bench.gpio.set_input(0, true);
            assert_eq!(bench.read(offset::RIS), 0);
            bench.gpio.set_input(0, false);
            assert_eq!(bench.read(offset::RIS) != 0, falling);
        }
    }

    #[test]
    fn level_interrupts_follow_their_line() {
        let mut bench = Bench::new();
        bench.write(offset::IS, 0x01);
        bench.write(offset::IEV, 0x01);
        bench.write(offset::IE, 0x01);
        bench.gpio.set_input(0, true);
        assert!(bench.line.is_high());
        bench.write(offset::IC, 0x01);
        assert!(bench.line.is_high());
        bench.gpio.set_input(0, false);
        assert!(!bench.line.is_high());
        bench.write(offset::IEV, 0);
        assert!(bench.line.is_high());
        // An output raises no interrupt.
        bench.write(offset::DIR, 0x01);
        assert!(!bench.line.is_high());
    }

    #[test]
    fn masked_edges_stay_pending() {
        let mut bench = Bench::new();
        bench.write(offset::IEV, 0x10);
        bench.gpio.set_input(4, true);
        assert_eq!(bench.read(offset::RIS), 0x10);
        assert_eq!(bench.read(offset::MIS), 0);
        assert!(!bench.line.is_high());
        bench.write(offset::IE, 0x10);
        assert!(bench.line.is_high());
    }

    #[test]
    fn invalid_accesses_read_as_zero_are_ignored_and_counted() {
        let mut bench = Bench::new();
        for (offset, size) in [
            (offset::DIR, 8),
            (offset::DIR, 3),
            (offset::DIR + 1, 1),
            (0x424, 4),
            (0xfdc, 4),
            (0x1000, 4),
            (u64::MAX - 3, 4),
            (offset::DIR, 0),
        ] {
            assert_invalid(&mut bench.gpio, Pl061::faults, offset, size);
        }
        assert_eq!(bench.read(offset::DIR), 0);
        for read_only in [offset::RIS, offset::MIS, 0xfe0] {
            assert_read_only(&mut bench.gpio, Pl061::faults, read_only);
        }
        let before = bench.gpio.faults();
        assert_eq!(bench.read(offset::IC), 0);
        assert_eq!(bench.gpio.faults(), before + 1);
    }

    #[test]
    fn reset_is_power_on_with_the_key_still_held() {
        let mut bench = Bench::new();
        bench.write(offset::IEV, 0xff);
        bench.write(offset::IE, 0xff);
        bench.gpio.set_input(3, true);
        assert!(bench.line.is_high());
        bench.gpio.reset();
        assert!(!bench.line.is_high());
        assert_eq!(bench.read(offset::IE), 0);
        assert_eq!(bench.read(offset::RIS), 0);
        assert_eq!(bench.read(data(0xff)), 0x08);
    }

    proptest! {
        #[test]
        fn nothing_a_guest_does_panics_or_leaves_the_line_wrong(
            events in prop::collection::vec(
                (
                    prop_oneof![
                        4 => (0u64..0x110).prop_map(|i| i * 4),
                        8 => (0x100u64..0x109).prop_map(|i| i * 4),
                        1 => any::<u64>(),
                    ],
                    prop_oneof![4 => Just(1usize), 1 => Just(2), 1 => Just(4), 1 => Just(8)],
                    any::<Option<[u8; 8]>>(),
                    (any::<u8>(), any::<bool>()),
                ),
                0..200,
            ),
        ) {
            let mut bench = Bench::new();
            for (offset, size, value, (line, high)) in events {
                let action = match value {
                    Some(value) => bench.gpio.write(offset, &value[..size]),
                    None => bench.gpio.read(offset, &mut vec![0; size]),
                };
                prop_assert_eq!(action, Action::None);
                bench.gpio.set_input(line % 10, high);
                let asserted = bench.read(offset::RIS) & bench.read(offset::IE);
                prop_assert_eq!(bench.read(offset::MIS), asserted);
                prop_assert_eq!(bench.line.is_high(), asserted != 0);
                let history = bench.line.history();
                prop_assert!(history.iter().enumerate().all(|(i, &h)| h == (i % 2 == 0)));
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Event {
        Access(Access),
        Drive(u8, bool),
    }

    const REGISTERS: &[u64] = &[
        0x004,
        0x0fc,
        offset::DATA_LAST,
        offset::DIR,
        offset::IS,
        offset::IBE,
        offset::IEV,
        offset::IE,
        offset::RIS,
        offset::MIS,
        offset::IC,
        offset::AFSEL,
    ];

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let event = prop_oneof![
            3 => accesses(REGISTERS, &[1, 2, 4]).prop_map(Event::Access),
            1 => (0..LINES, any::<bool>()).prop_map(|(line, high)| Event::Drive(line, high)),
        ];
        prop::collection::vec(event, 0..60)
    }

    proptest! {
        #[test]
        fn it_goes_on_where_it_was_saved(before in events(), after in events()) {
            let make = || {
                let line = FakeLine::new();
                (Pl061::new(line.clone()), line)
            };
            let act = |gpio: &mut Pl061, event: &Event| match event {
                Event::Access(access) => (access.make(gpio), gpio.levels()),
                Event::Drive(line, high) => {
                    gpio.set_input(*line, *high);
                    ((Vec::new(), Action::None), gpio.levels())
                }
            };
            goes_on(make, act, &before, &after);
        }
    }
}
