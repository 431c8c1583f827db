//! The host's end of a network card, and the frames that pass between it and the card.

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use crate::virtio::queue::{Segment, parts};
use crate::virtio::{Source, Virtqueue};

/// Entries of a queue of frames. A frame of 64 KiB takes 16 of the guest's buffers. Where fewer are
/// left than the next one needs, vhost-net looks again and again until the guest brings more
/// (drivers/vhost/net.c, handle_rx): with 256, bulk data cost its thread twice the work.
pub(super) const ENTRIES: u16 = 512;
/// Entries of the control queue.
pub(super) const CONTROL_ENTRIES: u16 = 16;
/// Bytes of struct virtio_net_hdr before each frame (virtio 1.2, section 5.1.6).
pub const HEADER: usize = 12;
/// Bytes of the longest frame with its header: 64 KiB behind an Ethernet header with a VLAN tag.
pub const MOST_BYTES: usize = HEADER + 14 + 4 + (64 << 10);
/// Bytes of an Ethernet header, and so of the shortest frame.
pub(super) const LEAST_FRAME: usize = 14;
/// Bytes of an Ethernet header with a VLAN tag: a frame may have as many beyond the MTU.
pub(super) const LONGEST_HEADER: usize = LEAST_FRAME + 4;
/// The smallest MTU that a card may tell of (virtio 1.2, section 5.1.4.1), that of IPv4 (RFC 791).
pub(super) const LEAST_MTU: u16 = 68;
/// The most frames that a queue moves in one go: then the driver hears of them, and the other
/// queues get their turn.
pub(super) const BATCH: usize = 64;

/// The host's end of a network card.
pub trait Network: Send {
    /// Which of [`GUEST_OFFLOADS`](super::feature::GUEST_OFFLOADS) and
    /// [`HOST_OFFLOADS`](super::feature::HOST_OFFLOADS) it can do.
    fn offloads(&self) -> u64;

    /// How many pairs of queues it can serve, from 1.
    fn pairs(&self) -> u16 {
        1
    }

    /// The MTU in bytes that the driver should use, where it is not Ethernet's 1500; it is told once.
    fn mtu(&self) -> Option<u16> {
        None
    }

    /// Whether frames can go through at present.
    fn is_up(&self) -> bool {
        true
    }

    /// What it waits for; frames by edges.
    fn sources(&self) -> Vec<Source>;

    /// A source is ready: what that means.
    fn woken(&mut self, source: usize) -> SourceEvent;

    /// Uses the first `pairs` pairs of queues from now on, with frames that ask of the driver no
    /// more than the features `offloads`.
    ///
    /// # Errors
    /// What the host refuses.
    fn configure(&mut self, pairs: u16, offloads: u64) -> Result<(), String>;
}

/// A [`Network`] that takes and gives frames.
pub trait Frames: Network {
    /// Whether its frames have virtio's header of [`HEADER`] bytes; otherwise it gets and gives
    /// bare ones.
    fn has_header(&self) -> bool;

    /// Sends a frame. It never waits.
    ///
    /// # Errors
    /// What became of the frame instead.
    fn send(&mut self, pair: usize, frame: Frame<'_>) -> Result<(), FrameError>;

    /// Puts the frame that came next into `room`, which is large enough for any, and returns its
    /// bytes. It never waits.
    ///
    /// # Errors
    /// Why there is none.
    fn receive(&mut self, pair: usize, room: Room<'_>) -> Result<usize, FrameError>;
}

/// What a source that is ready means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// For the card nothing.
    Nothing,
    /// Frames may have come for this pair of queues, or can be sent again.
    Frames(usize),
    /// The link came up or went down.
    Link(bool),
    /// The driver broke a ring that the host's end works on.
    Broken(String),
    /// The network is gone for good, and why.
    Gone(String),
}

/// Why a frame was not moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// Not now: a source will be ready when it can be tried again.
    Wait,
    /// This one is lost, and why; the next may fare better.
    Lost(String),
    /// The network is gone for good, and why.
    Gone(String),
}

/// Pieces of this process's memory, which is there as long as `'a` lasts.
#[derive(Clone, Copy, Debug)]
pub struct Pieces<'a>(&'a [[usize; 2]]);

impl<'a> Pieces<'a> {
    /// Address and bytes of each, as struct iovec has them. Others may change what lies there.
    #[must_use]
    pub fn vector(self) -> &'a [[usize; 2]] {
        self.0
    }
}

/// A frame to send, in guest memory; never empty.
pub struct Frame<'a> {
    pub(super) queue: &'a Virtqueue,
    pub(super) segments: &'a [Segment],
    /// Its bytes, with those that are skipped.
    pub(super) size: usize,
    pub(super) skip: usize,
    /// Kept for its capacity.
    pub(super) vector: &'a mut Vec<[usize; 2]>,
}

impl<'a> Frame<'a> {
    /// Its bytes, counted.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size - self.skip
    }

    /// Its bytes, piece by piece.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'a>> + use<'a> {
        slices(self.queue.memory(), self.segments, self.skip)
    }

    /// Its bytes, as writev(2) takes them.
    #[must_use]
    pub fn pieces(&mut self) -> Pieces<'_> {
        self.vector.clear();
        self.queue.add_pieces(self.segments, self.skip, self.vector);
        Pieces(self.vector)
    }
}

/// The bytes of `segments` from `skip`. All of them are in memory, as their queue has checked.
pub(super) fn slices<'a>(
    memory: &'a GuestMemoryMmap,
    segments: &'a [Segment],
    skip: usize,
) -> impl Iterator<Item = VolatileSlice<'a>> + use<'a> {
    parts(segments, skip, usize::MAX)
        .flat_map(move |part| memory.get_slices(part.address, part.len))
        .map_while(Result::ok)
}

/// Room for a frame: where its header goes, if it has one; the driver's buffers, and behind them one
/// of ours.
pub struct Room<'a> {
    pub(super) queue: &'a Virtqueue,
    pub(super) header: Option<&'a mut [u8]>,
    pub(super) segments: &'a [Segment],
    pub(super) spill: &'a mut [u8],
    /// Its pieces, or nothing where they have changed.
    pub(super) vector: &'a mut Vec<[usize; 2]>,
}

impl<'a> Room<'a> {
    /// The bytes to write to, piece by piece; fewer than 1024 pieces.
    pub fn slices(self) -> impl Iterator<Item = VolatileSlice<'a>> {
        // The driver's header is written when the frame is handed over.
        let held = slices(self.queue.memory(), self.segments, HEADER);
        let header = self.header.into_iter().map(VolatileSlice::from);
        let spill = std::iter::once(VolatileSlice::from(self.spill));
        header.chain(held).chain(spill)
    }

    /// The same bytes, as readv(2) takes them.
    #[must_use]
    pub fn pieces(&mut self) -> Pieces<'_> {
        if self.vector.is_empty() {
            let ours = |bytes: &mut [u8]| [bytes.as_mut_ptr() as usize, bytes.len()];
            self.vector.extend(self.header.as_deref_mut().map(ours));
            self.queue.add_pieces(self.segments, HEADER, self.vector);
            self.vector.push(ours(self.spill));
        }
        Pieces(self.vector)
    }

    /// Writes a frame, as much as there is room for; returns its bytes.
    #[must_use]
    pub fn fill(self, frame: &[u8]) -> usize {
        let mut left = frame;
        for slice in self.slices() {
            let (now, later) = left.split_at(slice.len().min(left.len()));
            slice.copy_from(now);
            left = later;
            if left.is_empty() {
                break;
            }
        }
        frame.len() - left.len()
    }
}
