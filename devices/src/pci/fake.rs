//! A machine's end of MSI-X: vectors that count the messages they send.

use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::{Message, MsiVector, MsiVectors, Placement};
use crate::sync::{bell, lock};

/// What a machine was told, and does like KVM: an eventfd that is routed is read at once, and one that
/// is not keeps its edges.
#[derive(Default)]
pub(crate) struct Machine {
    vectors: Mutex<Vec<Arc<Made>>>,
    /// How many vectors there are at most.
    pub(crate) room: Mutex<Option<usize>>,
    /// Every place of the BAR.
    pub(crate) places: Mutex<Vec<Option<u64>>>,
}

struct Made {
    call: Arc<EventFd>,
    route: Mutex<Option<Message>>,
}

struct Vector(Arc<Made>);

impl MsiVector for Vector {
    fn call(&self) -> Arc<EventFd> {
        Arc::clone(&self.0.call)
    }

    fn route(&self, message: Option<Message>) -> Result<(), String> {
        if message.is_some_and(|message| message.data == Machine::REFUSED) {
            return Err("no such message".to_owned());
        }
        *lock(&self.0.route) = message;
        Ok(())
    }
}

impl Machine {
    /// Data of a message that is refused.
    pub(crate) const REFUSED: u32 = 0xdead_dead;

    pub(crate) fn new() -> Arc<Machine> {
        Arc::default()
    }

    /// Returns the messages that arrived since the last look.
    pub(crate) fn messages(&self) -> Vec<Message> {
        let vectors = lock(&self.vectors);
        let sent = vectors.iter().filter_map(|vector| {
            let message = *lock(&vector.route);
            message.filter(|_| vector.call.read().is_ok())
        });
        sent.collect()
    }

    /// Returns how many vectors were made.
    pub(crate) fn made(&self) -> usize {
        lock(&self.vectors).len()
    }
}

impl MsiVectors for Machine {
    fn make(&self) -> Result<Box<dyn MsiVector>, String> {
        let mut vectors = lock(&self.vectors);
        if lock(&self.room).is_some_and(|room| vectors.len() >= room) {
            return Err("no room".to_owned());
        }
        let made = Arc::new(Made {
            call: Arc::new(bell().map_err(|error| error.to_string())?),
            route: Mutex::default(),
        });
        vectors.push(Arc::clone(&made));
        Ok(Box::new(Vector(made)))
    }
}

/// Follows a BAR, which cannot lie at 0xbad0000.
pub(crate) struct Follower(pub(crate) Arc<Machine>);

impl Placement for Follower {
    fn moved(&self, bar: Option<u64>) -> Result<(), String> {
        lock(&self.0.places).push(bar);
        match bar {
            Some(0xbad_0000) => Err("something else lies there".to_owned()),
            _ => Ok(()),
        }
    }
}
