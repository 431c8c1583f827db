//! The event queue of a socket device (virtio 1.2, section 5.10.6.7). Its one event is the
//! transport reset: the guest's connections are gone, because it was restored elsewhere.

use crate::virtio::{Positions, Virtqueue, quiesced};

/// Index of the event queue.
pub const EVENTS: usize = 2;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, struct virtio_vsock_event.
const TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();

/// The event queue, and whether an event is due.
#[derive(Default)]
pub struct Events {
    queue: Option<Virtqueue>,
    owes: bool,
}

impl Events {
    /// Sets the queue, or removes it; does not use it yet.
    pub fn set_queue(&mut self, queue: Option<Virtqueue>) {
        self.queue = queue;
    }

    /// Returns whether a transport reset is still to be reported to the guest.
    #[must_use]
    pub fn owes_reset(&self) -> bool {
        self.owes
    }

    /// Sets whether a transport reset is to be reported to the guest.
    pub fn owe_reset(&mut self, owes: bool) {
        self.owes = owes;
    }

    /// Reports an event that is due, if the guest has a buffer for it.
    pub fn tell(&mut self) {
        let Some(queue) = self.queue.as_mut().filter(|_| self.owes) else {
            return;
        };
        let mut chain = queue.pop();
        if chain.is_none() && queue.listen() {
            chain = queue.pop();
        }
        if let Some(chain) = chain {
            let written = chain.write(queue.memory(), 0, &TRANSPORT_RESET);
            queue.complete(chain, written as u32);
            queue.signal();
            // A buffer that is too small reports nothing; the next one may be large enough.
            self.owes = written < TRANSPORT_RESET.len();
        }
    }

    /// Quiesces the queue; an event that is due stays so.
    pub fn quiesce(&mut self) -> Positions {
        quiesced(self.queue.take().iter_mut())
    }
}
