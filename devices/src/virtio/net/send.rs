//! Frames from the driver to the network.

use crate::sync::ring;
use std::sync::Arc;

use super::network::{BATCH, Frame, FrameError, Frames, HEADER, LEAST_FRAME, MOST_BYTES};
use crate::virtio::{Chain, Link, Position, Virtqueue};

/// A queue of frames to send.
pub(super) struct Transmitter {
    queue: Virtqueue,
    link: Arc<Link>,
    has_header: bool,
    /// Whether the network took no more when it was last tried.
    blocked: bool,
}

impl Transmitter {
    pub(super) fn new(queue: Virtqueue, link: &Arc<Link>, has_header: bool) -> Transmitter {
        Transmitter {
            queue,
            link: Arc::clone(link),
            has_header,
            blocked: false,
        }
    }

    /// Where its queue stands; nothing of it is held here.
    pub(super) fn quiesce(&mut self) -> (u16, Position) {
        (self.queue.index(), self.queue.quiesce())
    }

    /// The network may take frames again.
    pub(super) fn woken(&mut self) {
        self.blocked = false;
    }

    /// Sends what can be sent; without a network it is thrown away. A frame that the network
    /// cannot take yet stays in the queue: nothing is lost for want of room, and the driver slows
    /// down as with a real card.
    ///
    /// # Errors
    /// Why the network is gone.
    pub(super) fn run(
        &mut self,
        mut network: Option<&mut impl Frames>,
        pair: usize,
    ) -> Result<(), String> {
        if self.blocked {
            return Ok(());
        }
        let mut left = BATCH;
        let mut result = Ok(());
        self.queue.silence();
        while result.is_ok() {
            if left == 0 {
                // The other queues first; the kick brings us back.
                ring(self.queue.kick());
                break;
            }
            let Some(chain) = self.queue.pop() else {
                if self.queue.listen() {
                    self.queue.silence();
                    continue;
                }
                break;
            };
            left -= 1;
            if !chain.is_whole() {
                self.queue.complete(chain, 0);
                continue;
            }
            let sent = match (self.frame(&chain), &mut network) {
                (Some(frame), Some(network)) => network.send(pair, frame),
                (Some(_), None) => Ok(()),
                (None, _) => Err(FrameError::Lost(format!(
                    "a frame to send has {} bytes in {} pieces",
                    chain.readable_len(),
                    chain.readable().len()
                ))),
            };
            match sent {
                Ok(()) => {}
                Err(FrameError::Wait) => {
                    self.queue.undo_pop(chain);
                    self.blocked = true;
                    break;
                }
                Err(FrameError::Lost(why)) => self.link.fault(format_args!("{why}")),
                Err(FrameError::Gone(why)) => result = Err(why),
            }
            self.queue.complete(chain, 0);
        }
        self.queue.signal();
        result
    }

    /// The frame of a request, if it is one that a network can have.
    fn frame<'a>(&'a self, chain: &'a Chain) -> Option<Frame<'a>> {
        let segments = chain.readable();
        let size = chain.readable_len();
        // No more pieces than a request may have (virtio 1.2, section 2.7.5.3.1).
        let can_be = (HEADER + LEAST_FRAME..=MOST_BYTES).contains(&size)
            && segments.len() <= usize::from(self.queue.size());
        can_be.then_some(Frame {
            memory: self.queue.memory(),
            segments,
            skip: if self.has_header { 0 } else { HEADER },
        })
    }
}
