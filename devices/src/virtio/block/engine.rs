//! What carries a disk's requests out, and what it is given.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use vm_memory::GuestMemoryMmap;

use super::data::Data;

/// Carries a disk's requests out.
pub trait Engine: Send {
    /// Prepares for requests, whose data lies in this memory.
    fn start(&mut self, memory: &Arc<GuestMemoryMmap>);

    /// Begins a request. `None` says that it is under way: [`Self::finished`] says when it is done.
    /// No request has the tag of another that is under way.
    fn begin(&mut self, request: &Request<'_>) -> Option<Outcome>;

    /// Submits what was begun: the last of a number of requests was.
    fn submit(&mut self) {}

    /// Returns a request that was under way and is done now: its tag, and its outcome.
    fn finished(&mut self) -> Option<(u16, Outcome)> {
        None
    }

    /// Waits until a request that is under way is done, but not for longer than `most`; there is
    /// one.
    fn wait(&mut self, most: Duration) {
        let _ = most;
    }

    /// Cancels what is under way: each request ends as soon as it can, done or not.
    fn cancel(&mut self) {}

    /// The most requests that may be under way; their tags are smaller than this.
    fn depth(&self) -> u16 {
        1
    }

    /// The most bytes of one queue's requests that may be under way; a request that has more by
    /// itself goes alone.
    fn most_bytes(&self) -> u64 {
        32 << 20
    }

    /// A descriptor that is readable when a request is done.
    fn source(&self) -> Option<RawFd> {
        None
    }

    /// A descriptor that is readable when the storage may have become longer: then
    /// [`Self::grown`] looks.
    fn growth_fd(&self) -> Option<RawFd> {
        None
    }

    /// Bytes of the storage, if there are more than before.
    fn grown(&mut self) -> Option<u64> {
        None
    }

    /// Turns to the storage that the disk has now; no request is under way.
    fn renew(&mut self) {}

    /// Releases guest memory: no request is under way, and none comes before the next start.
    fn stop(&mut self);
}

/// A request of which all is checked: it lies within the disk, and a disk that is read-only gets
/// no writes.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Tells it from others under way.
    pub tag: u16,
    /// What is to be done.
    pub operation: Operation,
    /// Where on the disk, in bytes: a multiple of 512.
    pub offset: u64,
    /// How much of the disk, in bytes: a multiple of 512, as much as there is data.
    pub len: u64,
    /// Guest memory to read to or to write from; empty for what has no data.
    pub data: Data<'a>,
    /// Whether what it changes must have reached stable storage when it is done.
    pub durable: bool,
    /// Becomes true when nobody wants it any more. An engine that carries a long one out while its
    /// caller waits looks at it in between.
    pub cancelled: &'a Arc<AtomicBool>,
}

impl<'a> Request<'a> {
    /// Has a read or write carried out in parts of up to `most` bytes, a multiple of 512, of which
    /// only the last one has to be durable; anything else as it is.
    ///
    /// # Errors
    /// The first of `each`, which ends it.
    pub fn each_part<E>(
        &self,
        most: usize,
        mut each: impl FnMut(&Request<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let has_data = matches!(self.operation, Operation::Read | Operation::Write);
        let most = most as u64;
        if !has_data || self.len <= most {
            return each(self);
        }
        let mut start = 0;
        while start < self.len {
            let len = most.min(self.len - start);
            each(&Request {
                offset: self.offset + start,
                len,
                data: self.data.slice(start as usize, len as usize),
                durable: self.durable && start + len == self.len,
                ..*self
            })?;
            start += len;
        }
        Ok(())
    }
}

/// What a request does with its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reads it into memory.
    Read,
    /// Writes memory to it.
    Write,
    /// Flushes the whole disk: all writes that were done reach stable storage.
    Flush,
    /// Discards it: its contents do not matter any more.
    Discard,
    /// Makes it read as zeroes.
    WriteZeroes {
        /// Whether it may lose its place on the storage.
        unmap: bool,
    },
}

/// The outcome of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Done,
    /// The storage failed; the engine has told the user.
    Failed,
}
