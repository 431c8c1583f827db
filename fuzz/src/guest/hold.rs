//! A machine that is held between two steps of its guest, and goes on: with the same device, or with
//! another that was made what the first one was.

use armlet_devices::virtio::mailbox::direct;
use std::cell::Cell;
use std::sync::{Arc, Mutex};

use armlet_devices::virtio::mmio::{Mmio, WINDOW_SIZE};

use super::{Guest, Page, Subject};

thread_local! {
    /// The machine is held after so many steps, again and again; 0 is never.
    static HOLDS: Cell<usize> = const { Cell::new(0) };
}

/// Does something with guests whose machine is held after every so many steps, and goes on with
/// the same device or with another in its stead, in turn.
#[allow(dead_code, reason = "tests/corpus.rs does it, and a fuzzer does not")]
pub fn holding(every: usize, what: impl FnOnce()) {
    HOLDS.set(every);
    what();
    HOLDS.set(0);
}

impl<S: Subject> Guest<S> {
    /// After a step the machine may be held.
    pub(super) fn hold_in_turn(&mut self) {
        self.steps += 1;
        let every = HOLDS.get();
        if every > 0 && self.steps.is_multiple_of(every) {
            self.hold(self.holds.is_multiple_of(2));
        }
    }

    /// The machine is held, and goes on; with another device in the stead of this one if it
    /// `moves`.
    pub(super) fn hold(&mut self, moves: bool) {
        self.holds += 1;
        self.subject.heal(&self.device);
        self.before();
        self.mmio.quiesce();
        for (start, len) in self.subject.touched() {
            self.memory.allow(start, len);
        }
        self.memory.check();
        let before = self.memory.all();
        self.settle();
        assert!(before == self.memory.all(), "a device that is held works");
        if moves && let Some(device) = self.subject.fresh() {
            let state = self.mmio.save().expect("it is held");
            let device = Arc::new(Mutex::new(device));
            self.page = Arc::new(Page(Mutex::new([0; WINDOW_SIZE / 4])));
            let mmio = Mmio::new(
                "device".to_owned(),
                direct(device.clone()),
                Arc::clone(&self.memory.guest),
                self.line.clone(),
                None,
                self.page.clone(),
            );
            // The one before ends before the new one begins.
            self.mmio = mmio.expect("descriptors");
            self.device = device;
            self.mmio.quiesce();
            let restored = self.mmio.restore(&state);
            restored.unwrap_or_else(|error| panic!("{error}: {state:?}"));
            assert_eq!(self.mmio.save().expect("it is held"), state);
        }
        self.mmio.resume();
        self.settle();
        self.after();
        self.check_registers();
    }
}
