//! The panic notifier that QEMU invented: a register by which a guest tells of its end
//! (QEMU, docs/specs/pvpanic.rst).
//!
//! One byte at offset 0. Reading tells which events the device knows; writing one tells
//! that it happened. Linux's driver reads once and then writes bytes
//! (drivers/misc/pvpanic/pvpanic.c); its device tree node is compatible with
//! "qemu,pvpanic-mmio" (drivers/misc/pvpanic/pvpanic-mmio.c).

use crate::Device;

/// Events, which are bits of the register (Linux, include/uapi/misc/pvpanic.h).
pub mod event {
    /// The guest has panicked, and leaves the rest to the host.
    pub const PANICKED: u8 = 1 << 0;

    /// The guest has panicked and goes on by itself, in a crash kernel: the host should
    /// record it and let the guest run.
    pub const CRASH_LOADED: u8 = 1 << 1;

    /// The guest shuts down as it should.
    pub const SHUTDOWN: u8 = 1 << 2;
}

/// Every event there is.
const EVENTS: u8 = event::PANICKED | event::CRASH_LOADED | event::SHUTDOWN;

/// Offset of the only register in bytes.
const REGISTER: u64 = 0;

/// A pvpanic device.
pub struct Pvpanic {
    on_event: Box<dyn Fn(u8) + Send>,
    /// Accesses that the register does not answer.
    faults: u64,
}

impl Pvpanic {
    /// A device that knows every [`event`].
    ///
    /// `on_event` is called with the events of each write that has any, with the device
    /// locked and on the thread of the vCPU that wrote: it may wake an event loop, but not
    /// come back into the device. The guest runs on and may tell of more.
    pub fn new(on_event: Box<dyn Fn(u8) + Send>) -> Pvpanic {
        Pvpanic {
            on_event,
            faults: 0,
        }
    }

    /// Accesses so far at offsets or of widths that the register does not answer.
    pub fn faults(&self) -> u64 {
        self.faults
    }
}

impl Device for Pvpanic {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match (offset, data) {
            (REGISTER, [byte]) => *byte = EVENTS,
            _ => self.faults += 1,
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (REGISTER, &[byte]) = (offset, data) else {
            self.faults += 1;
            return;
        };
        // Bits that the device does not know are ignored.
        let events = byte & EVENTS;
        if events != 0 {
            (self.on_event)(events);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;

    use super::*;

    /// A device, and what it told.
    fn device() -> (Pvpanic, Arc<Mutex<Vec<u8>>>) {
        let told: Arc<Mutex<Vec<u8>>> = Arc::default();
        let sink = told.clone();
        let pvpanic = Pvpanic::new(Box::new(move |events| {
            sink.lock().expect("sound").push(events);
        }));
        (pvpanic, told)
    }

    #[test]
    fn linux_finds_all_events_and_sends_each() {
        let (mut pvpanic, told) = device();
        let mut capability = [0xff];
        pvpanic.read(0, &mut capability);
        assert_eq!(capability, [0x7]);
        assert_eq!(*told.lock().expect("sound"), []);
        for event in [event::CRASH_LOADED, event::PANICKED, event::SHUTDOWN] {
            pvpanic.write(0, &[event]);
        }
        assert_eq!(*told.lock().expect("sound"), [2, 1, 4]);
        assert_eq!(pvpanic.faults(), 0);
    }

    #[test]
    fn each_write_tells_again() {
        let (mut pvpanic, told) = device();
        pvpanic.write(0, &[event::CRASH_LOADED]);
        pvpanic.write(0, &[event::CRASH_LOADED]);
        assert_eq!(*told.lock().expect("sound"), [2, 2]);
    }

    #[test]
    fn unknown_events_are_ignored_and_known_ones_beside_them_are_not() {
        let (mut pvpanic, told) = device();
        for events in [0, 0x8, 0xf8, 0x9, 0xff] {
            pvpanic.write(0, &[events]);
        }
        assert_eq!(*told.lock().expect("sound"), [0x1, 0x7]);
        assert_eq!(pvpanic.faults(), 0);
    }

    proptest! {
        #[test]
        fn wrong_accesses_are_zero_ignored_and_counted(
            offset in prop_oneof![Just(0), 0u64..16, any::<u64>()],
            size in 0usize..=8,
        ) {
            let (mut pvpanic, told) = device();
            let wrong = offset != 0 || size != 1;
            let mut data = vec![0xff; size];
            pvpanic.write(offset, &data);
            pvpanic.read(offset, &mut data);
            prop_assert_eq!(pvpanic.faults(), if wrong { 2 } else { 0 });
            prop_assert_eq!(told.lock().expect("sound").is_empty(), wrong);
            if wrong {
                prop_assert_eq!(data, vec![0; size]);
            }
        }
    }
}
