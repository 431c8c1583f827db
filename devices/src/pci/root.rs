//! The root complex: the configuration spaces of its one bus, by ECAM (PCI Express Base 5.0, section
//! 7.2.2).

use std::sync::{Arc, Mutex};

use super::Function;
use super::config::{Config, Identity};
use crate::Device;
use crate::action::Action;
use crate::sync::lock;

/// Bytes of the window: one bus.
pub const WINDOW_SIZE: u64 = 1 << 20;
/// How many device numbers a bus has, that of the host bridge included.
pub const DEVICES: usize = 32;

/// Bytes of a function's configuration space, and of the functions of one device.
const FUNCTION: u64 = 1 << 12;
const DEVICE: u64 = 1 << 15;

/// The host bridge: Red Hat's generic one, which drivers have nothing to do with.
const BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_0000,
    subsystem: (0, 0),
};

/// The configuration spaces of a bus. Number 0 is the host bridge's; each function is function 0 of its
/// own device.
pub struct Root {
    bridge: Config,
    functions: [Option<Arc<Mutex<dyn Function>>>; DEVICES],
}

impl Default for Root {
    fn default() -> Root {
        Root {
            bridge: Config::new(BRIDGE),
            functions: Default::default(),
        }
    }
}

impl Root {
    /// Creates a bus with the host bridge alone.
    #[must_use]
    pub fn new() -> Root {
        Root::default()
    }

    /// Gives device number `number` (from 1 on) to a function; returns whether it was free.
    pub fn add(&mut self, number: usize, function: Arc<Mutex<dyn Function>>) -> bool {
        match self.functions.get_mut(number) {
            Some(place @ None) if number != 0 => {
                *place = Some(function);
                true
            }
            _ => false,
        }
    }

    /// Splits an offset into the function, if there is one, and its register.
    fn find(&self, offset: u64) -> (Option<usize>, usize) {
        let (device, within) = (offset / DEVICE, offset % DEVICE);
        let number = usize::try_from(device).ok();
        let number = number.filter(|_| within < FUNCTION);
        (number, (offset % FUNCTION) as usize)
    }
}

impl Device for Root {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        let (number, register) = self.find(offset);
        let function = number.and_then(|number| self.functions.get(number)?.as_ref());
        match (number, function) {
            (Some(0), _) => self.bridge.read(register, data),
            (_, Some(function)) => lock(function).read_config(register, data),
            // What a root complex answers for where nobody does (section 2.3.2).
            (_, None) => data.fill(0xff),
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let (number, register) = self.find(offset);
        match number {
            Some(0) => self.bridge.write(register, data),
            Some(number) => {
                if let Some(Some(function)) = self.functions.get(number) {
                    lock(function).write_config(register, data);
                }
            }
            None => {}
        }
        Action::None
    }
}

#[cfg(test)]
mod tests;
