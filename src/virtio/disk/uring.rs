//! Works on an image by io_uring: many requests at a time, one system call for all that come
//! together. What the page cache can serve without a wait does not go through the ring, because
//! it costs less so: the ring hands most writes to the page cache to a thread of the kernel.

use super::image::{Alignment, Image, PlainEngine};
use super::sys::{Direction, Ring, end_of};
use armlet_devices::virtio::block::{Engine, Operation, Outcome, Request};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;

/// The most requests under way: what fast storage keeps busy with.
const DEPTH: u16 = 128;

/// Works on an image by io_uring.
pub(super) struct UringEngine {
    image: Arc<Image>,
    ring: Ring,
    /// By tag.
    jobs: Vec<Job>,
    /// Done, but not yet fetched.
    done: VecDeque<(u16, Outcome)>,
    /// For what a ring does not do.
    plain: PlainEngine,
    /// Whether the file system knows I/O that does not wait; true until it says no.
    tries_reads: bool,
    tries_writes: bool,
}

/// A request under way.
#[derive(Clone, Copy, Debug)]
struct Job {
    operation: Operation,
    offset: u64,
    len: u64,
    /// Bytes that were moved.
    moved: u64,
    durable: bool,
    step: Step,
}

/// What the kernel does of a request now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Move(Direction),
    Allocate(FallocateFlags),
    Sync,
}

const NO_JOB: Job = Job {
    operation: Operation::Flush,
    offset: 0,
    len: 0,
    moved: 0,
    durable: false,
    step: Step::Sync,
};

impl UringEngine {
    /// An engine for `image`.
    ///
    /// # Errors
    /// A kernel that has no io_uring, or none for this process.
    pub(super) fn new(image: &Arc<Image>) -> io::Result<UringEngine> {
        Ok(UringEngine {
            ring: Ring::new(&image.file, DEPTH)?,
            image: Arc::clone(image),
            jobs: vec![NO_JOB; usize::from(DEPTH)],
            done: VecDeque::new(),
            plain: PlainEngine::new(Arc::clone(image)),
            tries_reads: true,
            tries_writes: true,
        })
    }

    fn step_of(&self, request: &Request<'_>) -> Option<Step> {
        match request.operation {
            Operation::Read => Some(Step::Move(Direction::Read)),
            Operation::Write => Some(Step::Move(Direction::Write)),
            Operation::Flush => (!self.image.readonly).then_some(Step::Sync),
            Operation::Discard => self.image.discard_mode().map(Step::Allocate),
            Operation::WriteZeroes { unmap } => self.image.zero_mode(unmap).map(Step::Allocate),
        }
    }

    fn push(&mut self, tag: u16) {
        let job = self.jobs[usize::from(tag)];
        match job.step {
            Step::Move(direction) => {
                let offset = job.offset + job.moved;
                self.ring.push_move(tag, direction, offset, job.durable);
            }
            Step::Allocate(mode) => {
                let mode = mode.bits() as i32;
                self.ring.push_fallocate(tag, mode, job.offset, job.len);
            }
            Step::Sync => self.ring.push_sync(tag),
        }
    }

    /// Carries a request out while the caller waits.
    fn now(&mut self, request: &Request<'_>) -> Option<Outcome> {
        self.wait_to_read_around(request);
        self.plain.begin(request)
    }

    /// A write that reads what is around it in its block first must not meet another one there.
    fn wait_to_read_around(&mut self, request: &Request<'_>) {
        let writes = request.operation != Operation::Read;
        if writes && self.image.needs_read(request.offset, request.len) {
            self.wait_for_all();
        }
    }

    /// Moves by the page cache what goes without a wait; a write may wait where the file system
    /// does not know better, because a thread of the kernel would do the same at four times the
    /// cost. Returns the bytes that were moved.
    fn by_cache(&mut self, tag: u16, direction: Direction, offset: u64) -> io::Result<u64> {
        let file = &self.image.file;
        let tries = match direction {
            Direction::Read => &mut self.tries_reads,
            Direction::Write => &mut self.tries_writes,
        };
        if *tries {
            match self.ring.try_now(tag, file, direction, offset) {
                Ok(0) => return Err(end_of(direction)),
                Ok(moved) => return Ok(moved as u64),
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::OPNOTSUPP | Errno::NOSYS) => *tries = false,
                    Some(Errno::AGAIN | Errno::INTR) => return Ok(0),
                    _ => return Err(error),
                },
            }
        }
        if direction == Direction::Write {
            self.ring.finish_now(tag, file, direction, offset)?;
        }
        Ok(0)
    }

    fn wait_for_all(&mut self) {
        while self.ring.under_way() > 0 {
            self.ring.submit();
            self.ring.wait();
            while let Some(done) = self.next() {
                self.done.push_back(done);
            }
        }
    }

    /// A request that the kernel is done with, and nothing more is to be done for.
    fn next(&mut self) -> Option<(u16, Outcome)> {
        loop {
            let (tag, result) = self.ring.next()?;
            if let Some(result) = self.go_on(tag, result) {
                let job = self.jobs[usize::from(tag)];
                let complaints = &self.image.complaints;
                let outcome = complaints.outcome(job.operation, job.offset, job.len, result);
                return Some((tag, outcome));
            }
        }
    }

    /// What the request comes to after a step that ended like this; `None` where another follows.
    fn go_on(&mut self, tag: u16, result: io::Result<usize>) -> Option<io::Result<()>> {
        let job = &mut self.jobs[usize::from(tag)];
        match (job.step, result) {
            (Step::Move(direction), Ok(0)) => return Some(Err(end_of(direction))),
            (Step::Move(_), Ok(moved)) => {
                job.moved += moved as u64;
                self.ring.advance(tag, moved);
                if self.ring.is_moved(tag) {
                    return Some(Ok(()));
                }
                self.push(tag);
            }
            (Step::Move(direction), Err(error)) => {
                if !matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::AGAIN | Errno::INTR | Errno::CANCELED)
                ) {
                    return Some(Err(error));
                }
                // The kernel gave up on the way, and not because it cannot.
                let (file, offset) = (&self.image.file, job.offset + job.moved);
                let result = self.ring.finish_now(tag, file, direction, offset);
                return Some(match job.durable && direction == Direction::Write {
                    true => result.and_then(|()| self.image.flush()),
                    false => result,
                });
            }
            (Step::Allocate(mode), Err(error)) => {
                let refused = self.image.refuses(mode, &error);
                if !refused && Errno::from_io_error(&error) != Some(Errno::INTR) {
                    return Some(Err(error));
                }
                let request = Request {
                    tag,
                    operation: job.operation,
                    offset: job.offset,
                    len: job.len,
                    data: Default::default(),
                    durable: job.durable,
                };
                self.wait_to_read_around(&request);
                return Some(self.plain.perform(&request));
            }
            (Step::Allocate(_), Ok(_)) => {
                if !job.durable {
                    return Some(Ok(()));
                }
                job.step = Step::Sync;
                self.push(tag);
            }
            (Step::Sync, Err(error)) if Errno::from_io_error(&error) == Some(Errno::INTR) => {
                self.push(tag);
            }
            (Step::Sync, result) => return Some(self.image.flushed(result.map(drop))),
        }
        None
    }
}

impl Engine for UringEngine {
    fn start(&mut self, memory: &Arc<GuestMemoryMmap>) {
        self.ring.start(memory);
        self.plain.start(memory);
    }

    fn begin(&mut self, request: &Request<'_>) -> Option<Outcome> {
        let Some(step) = self.step_of(request) else {
            return self.now(request);
        };
        let (tag, offset) = (request.tag, request.offset);
        let mut moved = 0;
        if let Step::Move(direction) = step {
            let mut prepared = self.ring.set(tag, &request.data);
            let ring = &self.ring;
            let aligned = |direct: Alignment| ring.is_aligned(tag, direct.memory, direct.offset);
            let is_padded =
                direction == Direction::Read && self.image.is_beyond(offset, request.len);
            if is_padded || !self.image.takes(offset, aligned) {
                return self.now(request);
            }
            // To wait for stable storage is for the ring.
            let waits = request.durable && direction == Direction::Write;
            if prepared.is_ok() && self.image.direct.is_none() && !waits {
                prepared = self
                    .by_cache(tag, direction, offset)
                    .map(|count| moved = count);
            }
            if prepared.is_err() || self.ring.is_moved(tag) {
                let complaints = &self.image.complaints;
                let operation = request.operation;
                return Some(complaints.outcome(operation, offset, request.len, prepared));
            }
        }
        self.jobs[usize::from(tag)] = Job {
            operation: request.operation,
            offset,
            len: request.len,
            moved,
            durable: request.durable,
            step,
        };
        self.push(tag);
        None
    }

    fn submit(&mut self) {
        self.ring.submit();
    }

    fn finished(&mut self) -> Option<(u16, Outcome)> {
        if let Some(done) = self.done.pop_front() {
            return Some(done);
        }
        loop {
            if let Some(done) = self.next() {
                return Some(done);
            }
            // A step that follows another may be done at once.
            if !self.ring.submit() {
                return None;
            }
        }
    }

    fn wait(&mut self) {
        self.ring.submit();
        if self.done.is_empty() {
            self.ring.wait();
        }
    }

    fn depth(&self) -> u16 {
        DEPTH
    }

    fn source(&self) -> Option<RawFd> {
        Some(self.ring.as_raw_fd())
    }

    fn stop(&mut self) {
        self.ring.stop();
        self.plain.stop();
    }
}
