//! The PC's keyboard controller, an 8042, with nothing plugged in, and the PC/AT's control port B,
//! which lies between its two ports (IBM PC/AT Technical Reference, "Keyboard Controller").
//!
//! It exists for its reset command, which is how Linux reboots where ACPI offers no other way, and
//! so that a kernel that probes it gets an answer and does not time out.

use crate::Device;
use crate::action::Action;
use crate::persist::{Persist, RestoreError};
use serde::{Deserialize, Serialize};

/// An 8042 and control port B.
pub struct I8042 {
    /// A byte for the guest.
    output: Option<u8>,
    /// The command byte.
    mode: u8,
    /// The command whose data byte is to come.
    awaits: Option<u8>,
    /// Bits 0 and 1 of port B: the timer's gate, the speaker.
    port_b: u8,
    /// Bit 4 of port B, which changes with each refresh of the memory.
    refresh: bool,
}

/// Offsets in ports from 0x60.
mod offset {
    pub(super) const DATA: u64 = 0;
    pub(super) const PORT_B: u64 = 1;
    pub(super) const COMMAND: u64 = 4;
}

/// Status: the output buffer is full.
const STATUS_OUTPUT: u8 = 1 << 0;
/// Status: the self-test has passed.
const STATUS_SYSTEM: u8 = 1 << 2;
/// Status: the keyboard is not locked.
const STATUS_UNLOCKED: u8 = 1 << 4;
/// Command byte after a reset: both interfaces off, self-test passed.
const MODE: u8 = 0x34;
/// Port B: the writable bits.
const PORT_B_WRITTEN: u8 = 0x03;
/// Port B: timer channel 2 has expired, so that no guest waits for it.
const PORT_B_OUT: u8 = 1 << 5;

impl I8042 {
    /// Creates a controller as after power-on.
    #[must_use]
    pub fn new() -> I8042 {
        I8042 {
            output: None,
            mode: MODE,
            awaits: None,
            port_b: 0,
            refresh: false,
        }
    }

    fn command(&mut self, command: u8) -> Action {
        self.awaits = None;
        match command {
            0x20 => self.output = Some(self.mode),
            _ if takes_data(command) => self.awaits = Some(command),
            // Self-test passed; both interfaces' tests passed.
            0xaa => self.output = Some(0x55),
            0xa9 | 0xab => self.output = Some(0),
            0xa7 => self.mode |= 0x20,
            0xa8 => self.mode &= !0x20,
            0xad => self.mode |= 0x10,
            0xae => self.mode &= !0x10,
            // The output port: not in reset, A20 on.
            0xd0 => self.output = Some(0x03),
            // Pulses the output bits that are 0 in the command; bit 0 is the CPU's reset.
            0xf0..=0xff if command & 1 == 0 => return Action::Reset,
            _ => {}
        }
        Action::None
    }

    fn data(&mut self, value: u8) -> Action {
        match self.awaits.take() {
            Some(0x60) => self.mode = value,
            // A write of the output port with the reset bit clear.
            Some(0xd1) if value & 1 == 0 => return Action::Reset,
            // Echoes the byte as if a device had sent it.
            Some(0xd2 | 0xd3) => self.output = Some(value),
            // For a keyboard or mouse, of which there is none.
            _ => {}
        }
        Action::None
    }
}

/// The state of an [`I8042`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// A byte for the guest.
    pub output: Option<u8>,
    /// The command byte.
    pub mode: u8,
    /// The command whose data byte is to come.
    pub awaits: Option<u8>,
    /// Bits 0 and 1 of port B.
    pub port_b: u8,
    /// Bit 4 of port B.
    pub refresh: bool,
}

impl Persist for I8042 {
    type State = I8042State;

    fn save(&self) -> I8042State {
        I8042State {
            output: self.output,
            mode: self.mode,
            awaits: self.awaits,
            port_b: self.port_b,
            refresh: self.refresh,
        }
    }

    fn restore(&mut self, state: &I8042State) -> Result<(), RestoreError> {
        const DEVICE: &str = "keyboard controller";
        RestoreError::check(DEVICE, "port B", state.port_b, PORT_B_WRITTEN)?;
        if let Some(command) = state.awaits.filter(|command| !takes_data(*command)) {
            return Err(RestoreError(format!(
                "the state of the {DEVICE} is not valid: the command {command:#x} takes no data"
            )));
        }
        let I8042State {
            output,
            mode,
            awaits,
            port_b,
            refresh,
        } = *state;
        *self = I8042 {
            output,
            mode,
            awaits,
            port_b,
            refresh,
        };
        Ok(())
    }
}

/// Returns whether this command takes a data byte.
fn takes_data(command: u8) -> bool {
    matches!(command, 0x60 | 0xd1..=0xd4)
}

impl Default for I8042 {
    fn default() -> I8042 {
        I8042::new()
    }
}

impl Device for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        data.fill(0);
        let value = match offset {
            offset::DATA => self.output.take().unwrap_or(0),
            offset::PORT_B => {
                self.refresh = !self.refresh;
                self.port_b | PORT_B_OUT | u8::from(self.refresh) << 4
            }
            offset::COMMAND => {
                let output = u8::from(self.output.is_some()) * STATUS_OUTPUT;
                output | STATUS_SYSTEM | STATUS_UNLOCKED
            }
            _ => 0xff,
        };
        if let Some(first) = data.first_mut() {
            *first = value;
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let Some(&value) = data.first() else {
            return Action::None;
        };
        match offset {
            offset::DATA => return self.data(value),
            offset::PORT_B => self.port_b = value & PORT_B_WRITTEN,
            offset::COMMAND => return self.command(value),
            _ => {}
        }
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fake::FakeLine;
    use crate::persist::tests::{Access, accesses, goes_on, refuses};

    fn read(controller: &mut I8042, offset: u64) -> u8 {
        let mut data = [0xee];
        assert_eq!(controller.read(offset, &mut data), Action::None);
        data[0]
    }

    #[test]
    fn its_input_buffer_is_never_full() {
        let mut controller = I8042::new();
        assert_eq!(controller.write(offset::DATA, &[0xed]), Action::None);
        assert_eq!(read(&mut controller, offset::COMMAND) & 0b11, 0);
    }

    #[test]
    fn a_guest_can_reset_in_two_ways() {
        let mut controller = I8042::new();
        for (offset, value, action) in [
            (offset::COMMAND, 0xff, Action::None),
            (offset::DATA, 0xfe, Action::None),
            (offset::COMMAND, 0xfe, Action::Reset),
            (offset::COMMAND, 0xd1, Action::None),
            (offset::DATA, 0x03, Action::None),
            (offset::COMMAND, 0xd1, Action::None),
            (offset::DATA, 0x02, Action::Reset),
        ] {
            assert_eq!(controller.write(offset, &[value]), action, "{value:#x}");
        }
    }

    #[test]
    fn a_drivers_probe_is_answered() {
        let mut controller = I8042::new();
        assert_eq!(controller.write(offset::COMMAND, &[0xaa]), Action::None);
        assert_eq!(read(&mut controller, offset::COMMAND) & STATUS_OUTPUT, 1);
        assert_eq!(read(&mut controller, offset::DATA), 0x55);
        assert_eq!(read(&mut controller, offset::COMMAND) & STATUS_OUTPUT, 0);
        assert_eq!(controller.write(offset::COMMAND, &[0x60]), Action::None);
        assert_eq!(controller.write(offset::DATA, &[0x47]), Action::None);
        assert_eq!(controller.write(offset::COMMAND, &[0x20]), Action::None);
        assert_eq!(read(&mut controller, offset::DATA), 0x47);
    }

    #[test]
    fn the_refresh_bit_of_port_b_toggles() {
        let mut controller = I8042::new();
        assert_eq!(controller.write(offset::PORT_B, &[0xff]), Action::None);
        let (first, second) = (
            read(&mut controller, offset::PORT_B),
            read(&mut controller, offset::PORT_B),
        );
        assert_eq!((first ^ second, first & 0x23), (0x10, 0x23));
    }

    #[test]
    fn a_state_that_no_guest_can_cause_is_refused() {
        let mut controller = I8042::new();
        let state = controller.save();
        let awaits = Some(0xaa);
        refuses(
            &mut controller,
            &I8042State { awaits, ..state },
            "the command 0xaa",
        );
        refuses(
            &mut controller,
            &I8042State { port_b: 4, ..state },
            "port B 0x4",
        );
    }

    fn commands() -> impl Strategy<Value = Access> {
        let command = prop_oneof![
            0xa0..=0xae_u8,
            0xd0..=0xd4_u8,
            Just(0x20),
            Just(0x60),
            any::<u8>()
        ];
        prop_oneof![
            command.prop_map(|command| Access::Write(offset::COMMAND, vec![command])),
            accesses(&[offset::DATA, offset::PORT_B, offset::COMMAND, 2], &[1, 2]),
        ]
    }

    proptest! {
        #[test]
        fn it_goes_on_where_it_was_saved(
            before in prop::collection::vec(commands(), 0..20),
            after in prop::collection::vec(commands(), 0..20),
        ) {
            let make = || (I8042::new(), FakeLine::new());
            goes_on(make, |device, access: &Access| access.make(device), &before, &after);
        }
    }
}
