//! Frames from the network to the driver.

use crate::counts::Counts;
use crate::rate::Throttle;
use crate::sync::ring;
use std::sync::Arc;

use vm_memory::Bytes;

use super::feature;
use super::network::{BATCH, FrameError, Frames, HEADER, MOST_BYTES, Room};
use crate::virtio::queue::{Buffer, Segment, Way, parts};
use crate::virtio::{Link, Position, Virtqueue};

/// Offset of num_buffers in the header, in bytes (virtio 1.2, section 5.1.6).
const NUM_BUFFERS: usize = 10;
/// VIRTIO_NET_HDR_F_NEEDS_CSUM and VIRTIO_NET_HDR_F_DATA_VALID, in the header's first byte.
const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
/// VIRTIO_NET_HDR_GSO_*, in its second byte: what a driver must have agreed to for each.
const SEGMENTED: [(u8, u64); 3] = [
    (1, feature::GUEST_TSO4),
    (4, feature::GUEST_TSO6),
    (5, feature::GUEST_USO4 | feature::GUEST_USO6),
];
/// VIRTIO_NET_HDR_GSO_ECN, beside one of those.
const ECN: u8 = 0x80;
/// The most pieces of memory that a frame is offered while there are enough for one: with a last
/// buffer of as many pieces as a request may have, each in two banks of memory, they are fewer
/// than the 1024 that one system call takes.
const PIECES: usize = 128;

/// A queue of buffers for frames that come.
///
/// How long the next frame is is not known before it is read, and most are short while some have
/// 64 KiB. So it is read into as many of the driver's buffers as the last ones needed, and what is
/// longer than that goes to a buffer of ours and is copied.
pub(super) struct Receiver {
    queue: Virtqueue,
    link: Arc<Link>,
    /// Whether a frame may lie in several buffers.
    merges: bool,
    has_header: bool,
    /// The most bytes of a frame that the driver gets in one piece, where it was told of an MTU.
    longest: Option<usize>,
    /// The header of the frame that was read last; zeros where the network has none.
    header: [u8; HEADER],
    /// Buffers from the queue that are not used yet, in order.
    held: Vec<Buffer>,
    /// Where they lie. A frame begins with the first byte, and goes on from one to the next.
    segments: Vec<Segment>,
    /// Bytes of all of them.
    room: usize,
    /// Bytes that the next frame may well have.
    expected: usize,
    /// The part of a frame for which there was no room.
    spill: Vec<u8>,
    /// A frame that waits for buffers.
    waiting: Option<Waiting>,
    /// Whether there may be frames at the network.
    more: bool,
    /// Buffers that were handed back in this turn, because they are not all in memory.
    refused: usize,
    /// Where to read to, or nothing where that has changed.
    vector: Vec<[usize; 2]>,
}

/// A frame that was read.
#[derive(Clone, Copy)]
struct Waiting {
    /// Bytes, with the header.
    size: usize,
    /// So many of them lie in the buffers that are held, the rest in the spill.
    placed: usize,
}

impl Receiver {
    pub(super) fn new(
        queue: Virtqueue,
        link: &Arc<Link>,
        features: u64,
        has_header: bool,
        longest: Option<usize>,
    ) -> Receiver {
        Receiver {
            queue,
            link: Arc::clone(link),
            merges: features & feature::MRG_RXBUF != 0,
            has_header,
            longest,
            header: [0; HEADER],
            held: Vec::new(),
            segments: Vec::new(),
            room: 0,
            expected: 0,
            spill: vec![0; MOST_BYTES],
            waiting: None,
            // It may have frames from the time before the driver.
            more: true,
            refused: 0,
            vector: Vec::new(),
        }
    }

    /// Hands the driver's buffers back. Returns where the queue stands, and the frame that was read
    /// and waits for more of them, with its header; there may be none.
    pub(super) fn quiesce(mut self) -> ((u16, Position), Option<Vec<u8>>) {
        let frame = self.waiting.map(|frame| self.copy_frame(frame));
        self.queue.hand_back_buffers(self.held.len());
        ((self.queue.index(), self.queue.quiesce()), frame)
    }

    /// A frame that was read, wherever it lies.
    fn copy_frame(&self, frame: Waiting) -> Vec<u8> {
        let mut bytes = vec![0; frame.size];
        let (placed, spilled) = bytes.split_at_mut(frame.placed.min(frame.size));
        let mut at = 0;
        for part in parts(&self.segments, 0, placed.len()) {
            // All of it is memory.
            let place = &mut placed[at..at + part.len];
            let _ = self.queue.memory().read_slice(place, part.address);
            at += part.len;
        }
        spilled.copy_from_slice(&self.spill[..spilled.len()]);
        bytes[..NUM_BUFFERS].copy_from_slice(&self.header[..NUM_BUFFERS]);
        bytes[NUM_BUFFERS..HEADER].fill(0);
        bytes
    }

    /// Has a frame that was read before: it is the next one that the driver gets.
    pub(super) fn put(&mut self, frame: &[u8]) {
        let header = frame.first_chunk();
        if let (Some(header), Some(place)) = (header, self.spill.get_mut(..frame.len())) {
            place.copy_from_slice(frame);
            self.header = *header;
            self.waiting = Some(Waiting {
                size: frame.len(),
                placed: 0,
            });
        }
    }

    /// Frames may have come.
    pub(super) fn woken(&mut self) {
        self.more = true;
    }

    /// Hands over what has come, as far as the driver has buffers for it. What there is no buffer
    /// for stays with the network, until the driver kicks. `offloads` are the features that the
    /// driver wants of frames now. What `throttle` does not let through stays there, too, until its alarm.
    /// `counts` count what is handed over.
    ///
    /// # Errors
    /// Why the network is gone.
    pub(super) fn run(
        &mut self,
        network: &mut dyn Frames,
        pair: usize,
        offloads: u64,
        throttle: Option<&Throttle>,
        counts: &Counts,
    ) -> Result<(), String> {
        let mut left = BATCH;
        let mut result = Ok(());
        self.refused = 0;
        self.queue.silence();
        while (self.waiting.is_some() || self.more) && !self.queue.is_broken() {
            if left == 0 || self.refused >= BATCH {
                // The other queues first; the kick brings us back.
                ring(self.queue.kick());
                break;
            }
            let has_room = match self.waiting {
                Some(waiting) => self.hand_over(waiting),
                None => self.gather(),
            };
            if !has_room {
                if self.refused >= BATCH || self.queue.listen() {
                    self.queue.silence();
                    continue;
                }
                break;
            }
            if self.waiting.is_some() {
                self.waiting = None;
                left -= 1;
                continue;
            }
            if throttle.is_some_and(|throttle| !throttle.is_open()) {
                break;
            }
            match network.receive(pair, self.offer()) {
                Ok(size) => {
                    if let Some(throttle) = throttle {
                        let header = if self.has_header { HEADER } else { 0 };
                        throttle.charge(size.saturating_sub(header) as u64);
                    }
                    let size = if self.has_header { size } else { size + HEADER };
                    match self.admit(size, offloads) {
                        Ok(()) => {
                            counts.to_guest.add((size - HEADER) as u64);
                            let placed = self.room;
                            self.waiting = Some(Waiting { size, placed });
                        }
                        Err(why) => {
                            left -= 1;
                            counts.failed.add(1);
                            self.link.fault(format_args!("{why}"));
                        }
                    }
                }
                Err(FrameError::Wait) => self.more = false,
                Err(FrameError::Lost(why)) => {
                    left -= 1;
                    counts.failed.add(1);
                    self.link.fault(format_args!("{why}"));
                }
                Err(FrameError::Gone(why)) => {
                    self.more = false;
                    result = Err(why);
                }
            }
        }
        self.queue.signal();
        result
    }

    fn offer(&mut self) -> Room<'_> {
        Room {
            queue: &self.queue,
            header: self.has_header.then_some(&mut self.header[..]),
            segments: &self.segments,
            spill: &mut self.spill,
            vector: &mut self.vector,
        }
    }

    /// Has the header of a frame of `size` bytes, with it, ask no more of the driver than it agreed to
    /// (virtio 1.2, sections 5.1.4.1 and 5.1.6.4.1). A TAP says of frames whose checksum the host has
    /// seen that it is valid, whatever its offloads are (include/linux/virtio_net.h:
    /// virtio_net_hdr_from_skb), and it may hold frames of the time before they were changed.
    ///
    /// # Errors
    /// A frame that the driver cannot take.
    fn admit(&mut self, size: usize, offloads: u64) -> Result<(), String> {
        let [flags, kind, ..] = self.header;
        let has = |features: u64| offloads & features == features;
        if kind == 0 {
            if let Some(most) = self.longest.filter(|most| size - HEADER > *most) {
                let size = size - HEADER;
                return Err(format!(
                    "a frame of {size} bytes came, and the driver was told of {most} at most"
                ));
            }
        } else {
            let known = SEGMENTED.iter().find(|(known, _)| *known == kind & !ECN);
            let agreed = known.is_some_and(|(_, needed)| has(*needed))
                && (kind & ECN == 0 || has(feature::GUEST_ECN));
            if !agreed {
                return Err(format!(
                    "a frame came that is to be segmented (type {kind:#x}), which the driver does not do"
                ));
            }
        }
        if has(feature::GUEST_CSUM) {
            self.header[0] &= NEEDS_CSUM | DATA_VALID;
            return Ok(());
        }
        if flags & NEEDS_CSUM != 0 {
            return Err(
                "a frame came whose checksum is to be completed, which the driver does not do"
                    .to_owned(),
            );
        }
        self.header[..NUM_BUFFERS].fill(0);
        Ok(())
    }

    /// Takes buffers from the queue, as many as the next frame may well need; false without any.
    fn gather(&mut self) -> bool {
        while self.held.is_empty()
            || (self.merges && self.room < self.expected && self.segments.len() < PIECES)
        {
            if !self.take() {
                break;
            }
        }
        !self.held.is_empty()
    }

    /// Takes one buffer from the queue, if there is one.
    fn take(&mut self) -> bool {
        let buffer = loop {
            match self.queue.pop_buffer(Way::In, &mut self.segments) {
                Some(Ok(buffer)) => break buffer,
                Some(Err(())) => {
                    self.refused += 1;
                    if self.refused >= BATCH {
                        return false;
                    }
                }
                None => return false,
            }
        };
        let Buffer { room, pieces, .. } = buffer;
        // The header has to fit, and a request has no more pieces than its queue entries (virtio
        // 1.2, sections 5.1.6.3.1 and 2.7.5.3.1).
        if room < HEADER || pieces > self.queue.size() {
            let kept = self.segments.len() - usize::from(pieces);
            self.segments.truncate(kept);
            self.queue.break_ring(format_args!(
                "a receive buffer has {room} bytes in {pieces} pieces"
            ));
            return false;
        }
        self.room += room;
        self.vector.clear();
        self.held.push(buffer);
        true
    }

    /// Gives the driver a frame that was read, or drops it where it never fits; false where it has
    /// to wait for buffers.
    fn hand_over(&mut self, frame: Waiting) -> bool {
        let most = if self.merges { self.queue.size() } else { 1 };
        while self.room < frame.size && self.held.len() < usize::from(most) && self.take() {}
        if self.room < frame.size {
            let is_hopeless = self.held.len() >= usize::from(most);
            if is_hopeless {
                self.link.fault(format_args!(
                    "a frame of {} bytes does not fit the {} bytes of the driver's buffers",
                    frame.size - HEADER,
                    self.room
                ));
            }
            return is_hopeless;
        }
        // Short frames follow long ones more often than not, and copying one that was not expected
        // costs more than some buffers too many: so the memory of long ones fades slowly.
        self.expected = frame.size.max(self.expected - self.expected / 8);
        self.copy_spill(frame);
        let (mut count, mut room, mut pieces) = (0, 0, 0);
        while room < frame.size {
            room += self.held[count].room;
            pieces += usize::from(self.held[count].pieces);
            count += 1;
        }
        self.header[NUM_BUFFERS..].copy_from_slice(&(count as u16).to_le_bytes());
        self.write(0, &self.header);
        self.queue.complete_buffers(&self.held[..count], frame.size);
        self.room -= room;
        self.vector.clear();
        self.held.drain(..count);
        self.segments.drain(..pieces);
        true
    }

    /// Copies to the driver's buffers what was not read into them.
    fn copy_spill(&self, frame: Waiting) {
        let data = self.spill.get(..frame.size.saturating_sub(frame.placed));
        if let Some(data @ [_, ..]) = data {
            self.write(frame.placed, data);
        }
    }

    /// Writes to the driver's buffers, from their byte `offset` on.
    fn write(&self, offset: usize, data: &[u8]) {
        let mut left = data;
        for Segment { address, len } in parts(&self.segments, offset, data.len()) {
            let (now, later) = left.split_at(len);
            // All of it is memory.
            let _ = self.queue.memory().write_slice(now, address);
            left = later;
        }
    }
}
