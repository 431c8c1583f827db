//! The queue for events of a socket device (virtio 1.2, section 5.10.6.7). There is one event: the
//! guest's connections are no more, because it goes on where it was not before.

use crate::virtio::{Positions, Virtqueue, quiesced};

/// Index of the queue.
pub const EVENTS: usize = 2;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, struct virtio_vsock_event.
const TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();

/// The queue, and whether there is something to tell by it.
#[derive(Default)]
pub struct Events {
    queue: Option<Virtqueue>,
    owes: bool,
}

impl Events {
    /// Has this queue from now on, or none; nothing is done with it yet.
    pub fn set_queue(&mut self, queue: Option<Virtqueue>) {
        self.queue = queue;
    }

    /// Whether the guest has still to hear that its connections are no more.
    #[must_use]
    pub fn owes_reset(&self) -> bool {
        self.owes
    }

    /// The guest has to hear that its connections are no more, or has not.
    pub fn owe_reset(&mut self, owes: bool) {
        self.owes = owes;
    }

    /// Tells what there is to tell, if the guest has a buffer for it.
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
            // A buffer without room for it told nothing; the next one may.
            self.owes = written < TRANSPORT_RESET.len();
        }
    }

    /// Ends the work for now; what is to be told stays so.
    pub fn quiesce(&mut self) -> Positions {
        quiesced(self.queue.take().iter_mut())
    }
}
