//! What serial consoles have in common: the sink of their output, and how they get their input.

use crate::Device;
use crate::action::Action;

/// Where the guest's output goes.
///
/// Called with the device locked: it must not block for long, because a vCPU waits for it.
pub trait Output: Send {
    /// Writes all of `bytes`, in order. Returns what they mean for the machine.
    fn write(&mut self, bytes: &[u8]) -> Action;
}

impl<F: FnMut(&[u8]) + Send> Output for F {
    fn write(&mut self, bytes: &[u8]) -> Action {
        self(bytes);
        Action::None
    }
}

/// A UART whose output may be coalesced before it reaches the device: its data register is the
/// first one of its window, and its transmitter is always empty.
pub trait Uart: Device {
    /// The register values that the guest reads from memory while its output is coalesced, where
    /// the architecture allows that.
    type Snapshot: PartialEq + Send;

    /// Returns what the guest reads from the registers for as long as it only transmits; `None`
    /// while a read would have side effects.
    fn snapshot(&self) -> Option<Self::Snapshot>;

    /// Returns each word of a snapshot: its offset in bytes, and its value. There are none where
    /// the guest cannot read registers from memory.
    fn words(snapshot: &Self::Snapshot) -> impl Iterator<Item = (usize, u32)> + '_;

    /// Returns whether the guest waits for an interrupt before it sends more, as tty drivers do;
    /// kernel consoles poll instead.
    fn sends_by_interrupt(&self) -> bool;

    /// Does what writing each of `bytes` to the data register would do, with a single call of the
    /// output: for writes that were coalesced before they reached the device. Returns what they
    /// mean for the machine.
    fn write_data(&mut self, bytes: &[u8]) -> Action;

    /// Returns the number of the session in which the guest listens for input; `None` while it does
    /// not. A caller that waits a moment and finds the same number knows that the guest has
    /// listened all along.
    fn listening(&self) -> Option<u64>;

    /// Returns how many bytes the caller should pass to [`receive`](Self::receive) now: as many as
    /// fit while the guest listens, else 0.
    fn wanted(&self) -> usize;

    /// Receives as many of `bytes` as fit, and returns how many. The caller passes as many as are
    /// [`wanted`](Self::wanted) and keeps the rest.
    fn receive(&mut self, bytes: &[u8]) -> usize;

    /// Receives a break, which Linux takes as the SysRq key on its console. Returns false, and does
    /// nothing, when there is no room.
    fn receive_break(&mut self) -> bool;
}

/// A serial console, as the source of its input sees it. Each function that may flush coalesced
/// output also returns what that output means for the machine.
pub trait Console: Device {
    /// Returns the number of the session in which the guest listens, as [`Uart::listening`] does.
    fn listening(&self) -> Option<u64>;

    /// Passes as much of `input` to the guest as it wants. Returns how many bytes it took, and
    /// whether it wants more than there were.
    fn receive(&mut self, input: &[u8]) -> (usize, bool, Action);

    /// Sends a break to the guest, if it has room for one.
    fn receive_break(&mut self) -> Action;

    /// Flushes coalesced output.
    fn flush(&mut self) -> Action;

    /// Flushes coalesced output that has waited long enough. Returns whether another tick is
    /// needed.
    fn tick(&mut self) -> (bool, Action);

    /// Returns whether there may be output to flush.
    fn in_burst(&self) -> bool;
}

#[cfg(test)]
pub(crate) mod tests {
    //! Events that a UART may see before and after it is saved and restored.

    use proptest::prelude::*;

    use super::{Action, Output, Uart};
    use crate::persist::tests::{Access, accesses};

    /// An event at a UART.
    #[derive(Clone, Debug)]
    pub(crate) enum Event {
        Access(Access),
        WriteData(Vec<u8>),
        Receive(Vec<u8>),
        Break,
    }

    /// Generates fewer than `most` events, with accesses to these registers, of these widths.
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

    /// An output that returns what was written as the action, so that it becomes part of what is
    /// compared.
    pub(crate) struct Shown;

    impl Output for Shown {
        fn write(&mut self, bytes: &[u8]) -> Action {
            Action::panicked(format!("{bytes:?}"))
        }
    }

    /// Applies an event; returns everything that can be observed of it.
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
