//! Frames from the driver to the network.

use crate::counts::Counts;
use crate::rate::Throttle;
use crate::sync::ring;
use std::sync::Arc;

use super::network::{BATCH, Frame, FrameError, Frames, HEADER, LEAST_FRAME, MOST_BYTES};
use crate::virtio::queue::{Buffer, Segment, Way};
use crate::virtio::{Link, Position, Virtqueue};

/// A queue of frames to send.
pub(super) struct Transmitter {
    queue: Virtqueue,
    link: Arc<Link>,
    has_header: bool,
    /// Whether the network took no more when it was last tried.
    blocked: bool,
    /// Where the frame lies that is sent now.
    segments: Vec<Segment>,
    /// Kept for its capacity.
    vector: Vec<[usize; 2]>,
}

impl Transmitter {
    pub(super) fn new(queue: Virtqueue, link: &Arc<Link>, has_header: bool) -> Transmitter {
        Transmitter {
            queue,
            link: Arc::clone(link),
            has_header,
            blocked: false,
            segments: Vec::new(),
            vector: Vec::new(),
        }
    }

    /// Where its queue stands; nothing of it is held here.
    pub(super) fn quiesce(&mut self) -> (u16, Position) {
        (self.queue.index(), self.queue.quiesce())
    }

    /// The network may take frames again; returns whether one waits for that.
    pub(super) fn woken(&mut self) -> bool {
        std::mem::take(&mut self.blocked)
    }

    /// Sends what can be sent; without a network it is thrown away. A frame that the network
    /// cannot take yet stays in the queue: nothing is lost for want of room, and the driver slows
    /// down as with a real card. So does one that `throttle` does not let through until its alarm. `counts` count what
    /// is sent.
    ///
    /// # Errors
    /// Why the network is gone.
    pub(super) fn run(
        &mut self,
        mut network: Option<&mut dyn Frames>,
        pair: usize,
        throttle: Option<&Throttle>,
        counts: &Counts,
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
            self.segments.clear();
            let Some(taken) = self.queue.pop_buffer(Way::Out, &mut self.segments) else {
                if self.queue.listen() {
                    self.queue.silence();
                    continue;
                }
                break;
            };
            left -= 1;
            let Ok(buffer) = taken else {
                continue;
            };
            let is_held = |throttle: &Throttle| {
                let bytes = buffer.room.saturating_sub(HEADER) as u64;
                network.is_some() && self.is_frame(buffer) && !throttle.admits(bytes)
            };
            if throttle.is_some_and(is_held) {
                self.queue.hand_back_buffers(1);
                break;
            }
            let sent = match (self.is_frame(buffer), &mut network) {
                (true, Some(network)) => {
                    let sent = network.send(pair, self.frame(buffer));
                    sent.inspect(|()| counts.from_guest.add((buffer.room - HEADER) as u64))
                }
                (true, None) => {
                    counts.failed.add(1);
                    Ok(())
                }
                (false, _) => Err(FrameError::Lost(format!(
                    "a frame to send has {} bytes in {} pieces",
                    buffer.room, buffer.pieces
                ))),
            };
            match sent {
                Ok(()) => {}
                Err(FrameError::Wait) => {
                    self.queue.hand_back_buffers(1);
                    self.blocked = true;
                    break;
                }
                Err(FrameError::Lost(why)) => {
                    counts.failed.add(1);
                    self.link.fault(format_args!("{why}"));
                }
                Err(FrameError::Gone(why)) => result = Err(why),
            }
            self.queue.complete_buffers(&[buffer], 0);
        }
        self.queue.signal();
        result
    }

    /// Whether a request is a frame that a network can have.
    fn is_frame(&self, buffer: Buffer) -> bool {
        // No more pieces than a request may have (virtio 1.2, section 2.7.5.3.1).
        (HEADER + LEAST_FRAME..=MOST_BYTES).contains(&buffer.room)
            && buffer.pieces <= self.queue.size()
    }

    fn frame(&mut self, buffer: Buffer) -> Frame<'_> {
        Frame {
            queue: &self.queue,
            segments: &self.segments,
            size: buffer.room,
            skip: if self.has_header { 0 } else { HEADER },
            vector: &mut self.vector,
        }
    }
}
