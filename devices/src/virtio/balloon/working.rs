//! What a balloon has while a driver uses it.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::pages::{Inside, PAGE};
use crate::virtio::{Chain, Link, Virtqueue};

/// VIRTIO_BALLOON_F_MUST_TELL_HOST: pages are used again only after we were told.
pub(super) const FEATURE_MUST_TELL: u64 = 1 << 0;
/// VIRTIO_BALLOON_F_STATS_VQ.
pub(super) const FEATURE_STATISTICS: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM.
pub(super) const FEATURE_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_FREE_PAGE_HINT.
pub(super) const FEATURE_HINTING: u64 = 1 << 3;
/// VIRTIO_BALLOON_F_PAGE_POISON: the driver says what it fills free pages with.
pub(super) const FEATURE_POISON: u64 = 1 << 4;
/// VIRTIO_BALLOON_F_REPORTING.
pub(super) const FEATURE_REPORTING: u64 = 1 << 5;

/// Bytes of a page number.
pub(super) const NUMBER: usize = 4;
/// The most bytes of page numbers of one request; Linux sends 1 KiB.
pub(super) const MOST_NUMBERS: usize = 256 << 10;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hints,
    Reports,
}

/// What there is while the driver uses the device.
pub(super) struct Working {
    pub(super) memory: Arc<GuestMemoryMmap>,
    pub(super) link: Arc<Link>,
    pub(super) features: u64,
    pub(super) queues: Vec<(Role, Option<Virtqueue>)>,
    /// The driver's buffer for statistics, kept until they are wanted.
    pub(super) asked: Option<Chain>,
    /// Whether the guest takes part in the round of hints.
    pub(super) hinting: bool,
    /// Pages in the balloon, where the host's pages are larger than those.
    pub(super) inside: Option<Inside>,
    /// Kept for its capacity.
    pub(super) pages: Vec<u64>,
}

/// Returns the queues that there are with these features, in order. Drivers number the ones that
/// are there without gaps (drivers/virtio/virtio_mmio.c: vm_find_vqs).
pub(super) fn roles(features: u64) -> impl Iterator<Item = Role> {
    [
        (Role::Inflate, u64::MAX),
        (Role::Deflate, u64::MAX),
        (Role::Statistics, FEATURE_STATISTICS),
        (Role::Hints, FEATURE_HINTING),
        (Role::Reports, FEATURE_REPORTING),
    ]
    .into_iter()
    .filter(move |(_, feature)| features & feature != 0)
    .map(|(role, _)| role)
}

impl Working {
    /// Returns the queue of this role, where the driver has it.
    pub(super) fn queue(&mut self, role: Role) -> Option<&mut Virtqueue> {
        let found = self.queues.iter_mut().find(|(known, _)| *known == role);
        found.and_then(|(_, queue)| queue.as_mut())
    }

    /// Reads page numbers into [`Self::pages`] as addresses, in order, each once.
    pub(super) fn take_pages(&mut self, chain: &Chain) -> Result<(), &'static str> {
        self.pages.clear();
        let len = chain.readable_len();
        if len > MOST_NUMBERS {
            return Err("has more page numbers than memory has pages to speak of at once");
        }
        if !len.is_multiple_of(NUMBER) {
            let link = &self.link;
            link.fault(format_args!(
                "{len} bytes of page numbers are no whole number"
            ));
        }
        let mut buffer = [0; 1024];
        let mut offset = 0;
        loop {
            let count = chain.read(&self.memory, offset, &mut buffer);
            offset += count;
            let (numbers, _) = buffer[..count].as_chunks::<NUMBER>();
            let pages = numbers.iter();
            self.pages
                .extend(pages.map(|number| u64::from(u32::from_le_bytes(*number)) * PAGE));
            if count < buffer.len() {
                break;
            }
        }
        self.pages.sort_unstable();
        self.pages.dedup();
        let given = self.pages.len();
        let memory = &self.memory;
        self.pages
            .retain(|page| memory.check_range(GuestAddress(*page), PAGE as usize));
        let outside = given - self.pages.len();
        if outside > 0 {
            let link = &self.link;
            link.fault(format_args!(
                "{outside} pages of a request are not in memory"
            ));
        }
        Ok(())
    }

    /// Pages left the balloon. Nothing is to be done for them: the host gives them, zeroed, to
    /// who uses them.
    pub(super) fn deflate(&mut self) {
        if let Some(inside) = &mut self.inside {
            for page in &self.pages {
                inside.remove(*page);
            }
        }
    }
}
