//! What serial consoles have in common: where their output goes, and how input comes to them.

use crate::Device;

/// Where the guest's output goes.
///
/// Called with the device locked: it should not wait for long, as a vCPU waits with it.
pub trait Output: Send {
    /// Takes the next bytes of the output, all of them, in order.
    fn write(&mut self, bytes: &[u8]);
}

impl<F: FnMut(&[u8]) + Send> Output for F {
    fn write(&mut self, bytes: &[u8]) {
        self(bytes);
    }
}

/// A serial console, as the one who feeds it sees it.
pub trait Console: Device {
    /// The number of the time of the guest's listening, `None` while it does not listen. Who
    /// waits a moment and finds the same number knows that the guest has gone on listening.
    fn listening(&self) -> Option<u64>;

    /// Gives the guest of `input` what it wants. Returns how many bytes it took, and whether it
    /// wants more than there were.
    fn receive(&mut self, input: &[u8]) -> (usize, bool);

    /// Sends the guest a break, if it has room for one.
    fn receive_break(&mut self);

    /// Hands on output that was collected.
    fn flush(&mut self) {}

    /// Looks after collected output; false when no further tick is wanted.
    fn tick(&mut self) -> bool {
        false
    }

    /// Whether there may be output to hand on.
    fn in_burst(&self) -> bool {
        false
    }
}
