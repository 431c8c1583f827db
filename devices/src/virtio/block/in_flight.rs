//! The requests that an engine is at work on, by their tags.

use crate::virtio::Chain;

/// The requests under way.
#[derive(Default)]
pub(super) struct InFlight {
    by_tag: Vec<Option<Pending>>,
    /// Tags that are free, of those that were in use before.
    free: Vec<u16>,
    /// By queue: what is under way of it.
    loads: Vec<Load>,
}

/// What is under way of a queue.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Load {
    pub(super) requests: u16,
    pub(super) bytes: u64,
}

/// A request under way.
pub(super) struct Pending {
    pub(super) queue: usize,
    pub(super) chain: Chain,
    /// Whether it fills the buffers before the status byte.
    pub(super) is_read: bool,
    /// Bytes of the disk that it is about.
    pub(super) bytes: u64,
}

impl InFlight {
    /// None so far, of so many queues.
    pub(super) fn new(queues: usize) -> InFlight {
        InFlight {
            loads: vec![Load::default(); queues],
            ..InFlight::default()
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.by_tag.len() - self.free.len()
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.by_tag.len()
    }

    /// Whether an engine that takes `depth` at a time has room for one more.
    pub(super) fn has_room(&self, depth: impl FnOnce() -> u16) -> bool {
        !self.free.is_empty() || self.by_tag.len() < usize::from(depth())
    }

    /// What is under way of a queue.
    pub(super) fn load(&self, queue: usize) -> Load {
        self.loads.get(queue).copied().unwrap_or_default()
    }

    /// Takes a tag that no request has; there is [room](Self::has_room) for one. It is taken until
    /// [`Self::release`] or [`Self::remove`].
    pub(super) fn reserve(&mut self) -> u16 {
        self.free.pop().unwrap_or_else(|| {
            self.by_tag.push(None);
            // Below the engine's depth.
            (self.by_tag.len() - 1) as u16
        })
    }

    /// Gives back a tag whose request did not get under way.
    pub(super) fn release(&mut self, tag: u16) {
        self.free.push(tag);
    }

    /// Adds the request of a tag that was reserved.
    pub(super) fn insert(&mut self, tag: u16, pending: Pending) {
        if let Some(load) = self.loads.get_mut(pending.queue) {
            load.requests += 1;
            load.bytes += pending.bytes;
        }
        self.by_tag[usize::from(tag)] = Some(pending);
    }

    /// Removes the request with this tag, which ended; its tag is free again.
    pub(super) fn remove(&mut self, tag: u16) -> Option<Pending> {
        let pending = self
            .by_tag
            .get_mut(usize::from(tag))
            .and_then(Option::take)?;
        self.free.push(tag);
        if let Some(load) = self.loads.get_mut(pending.queue) {
            load.requests -= 1;
            load.bytes -= pending.bytes;
        }
        Some(pending)
    }
}
