//! Device models: the registers that a guest sees, and the interrupt lines that they drive.
//!
//! Nothing here knows KVM, an architecture, an absolute address (except as a key of the
//! [`bus::Bus`]) or an interrupt number. A device gets its interrupt lines and callbacks from its
//! creator ([`IrqLine`], closures), so each one can be built and tested on any host.

pub mod action;
pub mod bus;
pub mod cmos;
pub mod console;
pub mod counts;
pub mod generation;
pub mod gicv2m;
pub mod i8042;
pub mod ioapic;
pub mod limit;
pub mod pci;
pub mod persist;
pub mod pl011;
pub mod pl031;
pub mod pl061;
pub mod power;
mod primecell;
pub mod rate;
pub mod sync;
pub mod uart16550;
pub mod virtio;

use action::Action;

/// A device that answers the guest's reads and writes in one window of addresses.
///
/// The data is in the guest's byte order on the bus, which is little-endian. An access never fails:
/// an invalid read returns zeros, an invalid write is ignored, and the device counts both.
pub trait Device: Send {
    /// Handles a read of `data.len()` bytes at `offset` bytes into the window, and fills all of
    /// `data`. Returns what the access means for the machine.
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action;

    /// Handles a write of `data.len()` bytes at `offset` bytes into the window. Returns what the
    /// access means for the machine.
    fn write(&mut self, offset: u64, data: &[u8]) -> Action;
}

/// An interrupt line from a device to the interrupt controller. The device does not know its
/// number.
pub trait IrqLine: Send + Sync {
    /// Drives a level-triggered line high or low.
    fn set(&self, high: bool);

    /// Signals one rising edge on an edge-triggered line.
    fn pulse(&self);
}

#[cfg(test)]
pub(crate) mod fake {
    //! An interrupt line that records how it was driven.

    use std::sync::{Arc, Mutex};

    use crate::IrqLine;

    type Answer = Box<dyn FnOnce() + Send>;

    #[derive(Default)]
    pub(crate) struct FakeLine {
        history: Mutex<Vec<bool>>,
        /// What the guest does when the line is driven high next.
        pub(crate) answer: Mutex<Option<Answer>>,
    }

    impl FakeLine {
        pub(crate) fn new() -> Arc<FakeLine> {
            Arc::default()
        }

        /// Returns the current level; a line that was never driven is low.
        pub(crate) fn is_high(&self) -> bool {
            self.history().last().copied().unwrap_or(false)
        }

        /// Returns every level that was set, oldest first.
        pub(crate) fn history(&self) -> Vec<bool> {
            self.history.lock().expect("no test panics here").clone()
        }
    }

    impl IrqLine for FakeLine {
        fn set(&self, high: bool) {
            self.history.lock().expect("no test panics here").push(high);
            let mut answer = self.answer.lock().expect("no test panics here");
            if let Some(answer) = answer.take_if(|_| high) {
                answer();
            }
        }

        fn pulse(&self) {
            self.set(true);
            self.set(false);
        }
    }
}
