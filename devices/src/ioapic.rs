//! An I/O APIC that delivers its interrupts as MSIs (82093AA datasheet; Intel SDM volume 3, section
//! 11.11), for machines with more CPUs than its 8-bit destination field can address. Seven more
//! destination bits are where hypervisors agree to put them (Linux, arch/x86/include/asm/io_apic.h:
//! virt_destid_8_14).
//!
//! Every interrupt is an edge, as all devices here signal edges: a pin that the guest programs as
//! level-triggered also sends one message for each. An edge at a masked pin is lost, as in
//! hardware.

use crate::Device;
use crate::action::Action;
use crate::bus::answer;
use crate::persist::{Persist, RestoreError};
use serde::{Deserialize, Serialize};

/// The number of pins, as in the hardware.
pub const PINS: usize = 24;

/// The message (MSI) that is sent for an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Bits 63:40 hold the destination's bits above the lowest 8.
    pub address: u64,
    /// Vector and delivery mode.
    pub data: u32,
}

/// The messages by pin; `None` for a masked one.
pub type Messages = [Option<Message>; PINS];

/// The I/O APIC's registers.
pub struct IoApic {
    selected: u8,
    id: u32,
    entries: [u64; PINS],
    on_change: Box<dyn Fn(&Messages) + Send>,
}

/// The window's two registers (section 3.1): register select, and data.
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;

/// The indirect registers (section 3.2).
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const FIRST_ENTRY: u8 = 0x10;

/// Version 0x11, that of the 82093AA, and the index of the last pin.
const IS_VERSION: u32 = 0x11 | (PINS as u32 - 1) << 16;
/// The bits of the I/O APIC's ID.
const ID_BITS: u32 = 0xf << 24;

/// A redirection entry (section 3.2.4).
mod entry {
    pub(super) const VECTOR_AND_MODE: u64 = 0x7ff;
    pub(super) const LOGICAL: u32 = 11;
    /// Delivery status and remote IRR, which are read-only.
    pub(super) const READ_ONLY: u64 = 1 << 12 | 1 << 14;
    pub(super) const MASKED: u64 = 1 << 16;
    pub(super) const TARGET: u32 = 56;
    /// The 7 extended destination bits.
    pub(super) const MORE_TARGET: u32 = 49;
    pub(super) const LOWEST_PRIORITY: u64 = 1;
}

/// A message's address (Intel SDM volume 3, section 11.11.1).
mod address {
    pub(super) const BASE: u64 = 0xfee0_0000;
    pub(super) const LOGICAL: u32 = 2;
    pub(super) const REDIRECT: u64 = 1 << 3;
    pub(super) const TARGET: u32 = 12;
    pub(super) const MORE_TARGET: u32 = 40;
}

impl IoApic {
    /// Creates an I/O APIC as after a reset, with all pins masked. `on_change` is called with the
    /// pins' messages whenever they change.
    pub fn new(on_change: Box<dyn Fn(&Messages) + Send>) -> IoApic {
        IoApic {
            selected: 0,
            id: 0,
            entries: [entry::MASKED; PINS],
            on_change,
        }
    }

    /// Returns the redirection entry that the selected register is half of, and the half's lowest
    /// bit.
    fn half(&self) -> Option<(usize, u32)> {
        let index = usize::from(self.selected.checked_sub(FIRST_ENTRY)?);
        (index / 2 < PINS).then_some((index / 2, index as u32 % 2 * 32))
    }

    fn register(&self) -> u32 {
        match (self.selected, self.half()) {
            (ID | ARBITRATION, _) => self.id,
            (VERSION, _) => IS_VERSION,
            (_, Some((pin, shift))) => (self.entries[pin] >> shift) as u32,
            (_, None) => 0,
        }
    }

    fn set_register(&mut self, value: u32) {
        match (self.selected, self.half()) {
            (ID, _) => self.id = value & ID_BITS,
            (_, Some((pin, shift))) => {
                let before = self.entries[pin];
                let kept = before & !(u64::from(u32::MAX) << shift);
                let written = (kept | u64::from(value) << shift) & !entry::READ_ONLY;
                self.entries[pin] = written;
                if message(before) != message(written) {
                    (self.on_change)(&self.entries.map(message));
                }
            }
            (_, None) => {}
        }
    }
}

/// The state of an [`IoApic`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    /// The selected register.
    pub selected: u8,
    /// The ID.
    pub id: u32,
    /// The redirection entries, by pin.
    pub entries: [u64; PINS],
}

impl Persist for IoApic {
    type State = IoApicState;

    fn save(&self) -> IoApicState {
        IoApicState {
            selected: self.selected,
            id: self.id,
            entries: self.entries,
        }
    }

    fn restore(&mut self, state: &IoApicState) -> Result<(), RestoreError> {
        const DEVICE: &str = "I/O APIC";
        RestoreError::check(DEVICE, "identity", state.id, ID_BITS)?;
        for (pin, entry) in state.entries.iter().enumerate() {
            let what = format!("entry {pin}");
            RestoreError::check(DEVICE, &what, *entry, !entry::READ_ONLY)?;
        }
        let before = std::mem::replace(&mut self.entries, state.entries);
        (self.selected, self.id) = (state.selected, state.id);
        if before.map(message) != self.entries.map(message) {
            (self.on_change)(&self.entries.map(message));
        }
        Ok(())
    }
}

fn message(entry: u64) -> Option<Message> {
    if entry & entry::MASKED != 0 {
        return None;
    }
    let logical = entry >> entry::LOGICAL & 1;
    let target = entry >> entry::TARGET & 0xff;
    let more = entry >> entry::MORE_TARGET & 0x7f;
    let redirect = match entry >> 8 & 7 {
        entry::LOWEST_PRIORITY => address::REDIRECT,
        _ => 0,
    };
    Some(Message {
        address: address::BASE
            | target << address::TARGET
            | more << address::MORE_TARGET
            | logical << address::LOGICAL
            | redirect,
        data: (entry & entry::VECTOR_AND_MODE) as u32,
    })
}

impl Device for IoApic {
    /// Handles a read of a 32-bit register; a narrower read returns its lowest bytes.
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        let value = match offset {
            IOREGSEL => u32::from(self.selected),
            IOWIN => self.register(),
            _ => 0,
        };
        data.fill(0);
        answer(data, value);
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let mut bytes = [0; 4];
        for (byte, of) in bytes.iter_mut().zip(data) {
            *byte = *of;
        }
        match offset {
            IOREGSEL => self.selected = bytes[0],
            IOWIN => self.set_register(u32::from_le_bytes(bytes)),
            _ => {}
        }
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;

    use super::*;
    use crate::fake::FakeLine;
    use crate::persist::tests::{Access, accesses, goes_on, refuses};

    struct Bench {
        apic: IoApic,
        changes_seen: Arc<Mutex<Vec<Messages>>>,
    }

    impl Bench {
        fn new() -> Bench {
            let changes_seen: Arc<Mutex<Vec<Messages>>> = Arc::default();
            let list = Arc::clone(&changes_seen);
            let apic = IoApic::new(Box::new(move |messages| {
                list.lock().expect("sound").push(*messages);
            }));
            Bench { apic, changes_seen }
        }

        fn get(&mut self, register: u8) -> u32 {
            assert_eq!(
                self.apic
                    .write(IOREGSEL, &u32::from(register).to_le_bytes()),
                Action::None
            );
            let mut data = [0xee; 4];
            assert_eq!(self.apic.read(IOWIN, &mut data), Action::None);
            u32::from_le_bytes(data)
        }

        fn set(&mut self, register: u8, value: u32) {
            assert_eq!(
                self.apic
                    .write(IOREGSEL, &u32::from(register).to_le_bytes()),
                Action::None
            );
            assert_eq!(self.apic.write(IOWIN, &value.to_le_bytes()), Action::None);
        }

        fn last(&self) -> Messages {
            *self
                .changes_seen
                .lock()
                .expect("sound")
                .last()
                .expect("a change")
        }

        fn changes(&self) -> usize {
            self.changes_seen.lock().expect("sound").len()
        }
    }

    #[test]
    fn after_a_reset_all_24_pins_are_masked() {
        let mut bench = Bench::new();
        assert_eq!(bench.get(VERSION), 0x0017_0011);
        for pin in 0..24 {
            assert_eq!(bench.get(0x10 + 2 * pin), 1 << 16);
            assert_eq!(bench.get(0x11 + 2 * pin), 0);
        }
        assert_eq!(bench.get(0x40), 0);
        assert_eq!(bench.changes(), 0);
    }

    #[test]
    fn an_unmasked_pin_sends_its_vector_to_its_destination() {
        let mut bench = Bench::new();
        bench.set(0x19, 0x2a00_0000);
        assert_eq!(bench.changes(), 0, "it is masked still");
        bench.set(0x18, 0x40);
        let message = bench.last()[4].expect("unmasked");
        assert_eq!((message.address, message.data), (0xfee2_a000, 0x40));
        assert_eq!(bench.last().iter().flatten().count(), 1);
        bench.set(0x18, 0x1_0040);
        assert_eq!(bench.last(), [None; PINS]);
    }

    #[test]
    fn destinations_have_15_bits() {
        let mut bench = Bench::new();
        // 299 is 0x12b: 0x2b, and one more bit.
        bench.set(0x13, 0x2b << 24 | 1 << 17);
        bench.set(0x12, 0x31);
        let message = bench.last()[1].expect("unmasked");
        assert_eq!(message.address, 1 << 40 | 0xfee2_b000);
        bench.set(0x13, u32::MAX);
        let message = bench.last()[1].expect("unmasked");
        assert_eq!(message.address, 0x7f << 40 | 0xfeef_f000);
    }

    #[test]
    fn logical_destinations_and_lowest_priority_are_in_the_address() {
        let mut bench = Bench::new();
        bench.set(0x10, 1 << 11 | 1 << 8 | 0x50);
        let message = bench.last()[0].expect("unmasked");
        assert_eq!((message.address, message.data), (0xfee0_000c, 0x150));
    }

    #[test]
    fn writing_the_same_value_changes_nothing_and_status_is_read_only() {
        let mut bench = Bench::new();
        bench.set(0x10, 0x50);
        bench.set(0x10, 0x50 | 1 << 12 | 1 << 14);
        // Polarity and trigger mode are stored, but do not change the message.
        bench.set(0x10, 0x50 | 1 << 13 | 1 << 15);
        assert_eq!(bench.get(0x10), 0x50 | 1 << 13 | 1 << 15);
        assert_eq!(bench.changes(), 1);
        bench.set(ID, 0xffff_ffff);
        assert_eq!(bench.get(ID), 0x0f00_0000);
        bench.set(VERSION, 0);
        assert_eq!(bench.get(VERSION), IS_VERSION);
    }

    #[test]
    fn restoring_reports_the_pins_messages() {
        let mut bench = Bench::new();
        bench.set(0x18, 0x40);
        let state = bench.apic.save();
        let mut other = Bench::new();
        other.apic.restore(&state).expect("a state that was saved");
        assert_eq!(other.last(), bench.last());
        other.apic.restore(&state).expect("a state that was saved");
        assert_eq!(other.changes(), 1, "the same again is no change");
    }

    #[test]
    fn a_state_that_no_guest_can_cause_is_refused() {
        let mut bench = Bench::new();
        let mut state = bench.apic.save();
        state.id = 1;
        refuses(&mut bench.apic, &state, "identity 0x1");
        let mut state = bench.apic.save();
        state.entries[23] = 1 << 14;
        refuses(&mut bench.apic, &state, "entry 23");
        assert_eq!(bench.changes(), 0);
    }

    fn events() -> impl Strategy<Value = Access> {
        prop_oneof![
            (0_u8..0x42).prop_map(|register| Access::Write(IOREGSEL, vec![register, 0, 0, 0])),
            accesses(&[IOREGSEL, IOWIN, 8], &[1, 4]),
        ]
    }

    proptest! {
        #[test]
        fn it_goes_on_where_it_was_saved(
            before in prop::collection::vec(events(), 0..60),
            after in prop::collection::vec(events(), 0..60),
        ) {
            let make = || (Bench::new().apic, FakeLine::new());
            goes_on(make, |apic, access: &Access| access.make(apic), &before, &after);
        }
    }
}
