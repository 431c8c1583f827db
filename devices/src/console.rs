//! What serial consoles have in common: where their output goes, and how input comes to them.

use crate::Device;
use crate::action::Action;

/// Where the guest's output goes.
///
/// Called with the device locked: it should not wait for long, as a vCPU waits with it.
pub trait Output: Send {
    /// Takes the next bytes of the output, all of them, in order. Returns what they mean for the
    /// machine.
    fn write(&mut self, bytes: &[u8]) -> Action;
}

impl<F: FnMut(&[u8]) + Send> Output for F {
    fn write(&mut self, bytes: &[u8]) -> Action {
        self(bytes);
        Action::None
    }
}

/// A UART whose output may be collected before it reaches the device: its data register stands first
/// in its window, and its transmitter is always empty.
pub trait Uart: Device {
    /// What the guest may read from memory while its output is collected, where it may.
    type Snapshot: PartialEq + Send;

    /// What the guest reads from the registers for as long as it only sends; `None` while a read
    /// could change something.
    fn snapshot(&self) -> Option<Self::Snapshot>;

    /// Each word of a snapshot: its offset in bytes, and its value. There are none where the guest
    /// cannot read registers from memory.
    fn words(snapshot: &Self::Snapshot) -> impl Iterator<Item = (usize, u32)> + '_;

    /// Whether the guest waits for an interrupt before it sends on, as drivers do; consoles of
    /// kernels poll instead.
    fn sends_by_interrupt(&self) -> bool;

    /// Does what writing each of `bytes` to the data register would do, with one call of the
    /// output: for writes that were collected before they reached the device. Returns what they mean
    /// for the machine.
    fn write_data(&mut self, bytes: &[u8]) -> Action;

    /// The number of the time that the guest listens; `None` while it does not. A caller that
    /// waits a moment and finds the same number knows that the guest has gone on listening.
    fn listening(&self) -> Option<u64>;

    /// How many bytes the caller should hand to [`receive`](Self::receive) now: as many as fit
    /// while the guest listens, else 0.
    fn wanted(&self) -> usize;

    /// Takes as many of `bytes` as fit and returns how many. The caller hands over what is
    /// [`wanted`](Self::wanted) and keeps the rest.
    fn receive(&mut self, bytes: &[u8]) -> usize;

    /// Receives a break, the condition that Linux answers as SysRq on its console.
    /// False, and nothing happened, when there is no room.
    fn receive_break(&mut self) -> bool;
}

/// A serial console, as the one who feeds it sees it. Whatever hands on output that was collected
/// also returns what that output means for the machine.
pub trait Console: Device {
    /// The number of the time of the guest's listening, `None` while it does not listen. Who
    /// waits a moment and finds the same number knows that the guest has gone on listening.
    fn listening(&self) -> Option<u64>;

    /// Gives the guest of `input` what it wants. Returns how many bytes it took, and whether it
    /// wants more than there were.
    fn receive(&mut self, input: &[u8]) -> (usize, bool, Action);

    /// Sends the guest a break, if it has room for one.
    fn receive_break(&mut self) -> Action;

    /// Hands on output that was collected.
    fn flush(&mut self) -> Action;

    /// Looks after collected output. Returns whether a further tick is wanted.
    fn tick(&mut self) -> (bool, Action);

    /// Whether there may be output to hand on.
    fn in_burst(&self) -> bool;
}

#[cfg(test)]
pub(crate) mod tests {
    //! What a UART may go through while it is saved and restored.

    use proptest::prelude::*;

    use super::{Action, Output, Uart};
    use crate::persist::tests::{Access, accesses};

    /// Something that happens to a UART.
    #[derive(Clone, Debug)]
    pub(crate) enum Event {
        Access(Access),
        WriteData(Vec<u8>),
        Receive(Vec<u8>),
        Break,
    }

    /// Fewer than `most` events, with accesses to these registers, of these widths.
    pub(crate) fn events(
        registers: &'static [u64],
        widths: &'static [usize],
        most: usize,
    ) -> impl Strategy<Value = Vec<Event>> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..20);
        let event = prop_oneof![
            8 => accesses(registers, widths).prop_map(Event::Access),
            1 => bytes().prop_map(Event::WriteData),
            1 => bytes().prop_map(Event::Receive),
            1 => Just(Event::Break),
        ];
        prop::collection::vec(event, 0..most)
    }

    /// An output that is what accesses mean for the machine, and so part of their answers.
    pub(crate) struct Shown;

    impl Output for Shown {
        fn write(&mut self, bytes: &[u8]) -> Action {
            Action::panicked(format!("{bytes:?}"))
        }
    }

    /// Has an event happen; returns all that can be seen of it.
    pub(crate) fn act<U: Uart>(
        uart: &mut U,
        event: &Event,
    ) -> (Vec<u8>, Action, usize, Option<U::Snapshot>) {
        let (data, action) = match event {
            Event::Access(access) => access.make(uart),
            Event::WriteData(bytes) => (Vec::new(), uart.write_data(bytes)),
            Event::Receive(bytes) => (vec![uart.receive(bytes) as u8], Action::None),
            Event::Break => (vec![u8::from(uart.receive_break())], Action::None),
        };
        (data, action, uart.wanted(), uart.snapshot())
    }
}
