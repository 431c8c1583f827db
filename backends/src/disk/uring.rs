//! Works on an image by io_uring: many requests at a time, one system call for all that come
//! together. What the page cache can serve without a wait does not go through the ring, because
//! it costs less so: the ring hands most writes to the page cache to a thread of the kernel.

use super::complaints::cancelled;
use super::image::{Alignment, Current, Image, PlainEngine};
use super::lent::{Home, Lent};
use super::opened::is_in_memory;
use super::sys::{Direction, end_of};
use armlet_devices::virtio::block::{Engine, Operation, Outcome, Request};
use armlet_system::eintr::CallError;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

/// The most requests under way: what fast storage keeps busy with.
const DEPTH: u16 = 128;

/// Works on an image by io_uring.
pub(super) struct UringEngine {
    current: Current,
    image: Arc<Image>,
    ring: Lent,
    /// By tag.
    jobs: Vec<Job>,
    /// Done, but not yet fetched.
    done: VecDeque<(u16, Outcome)>,
    /// For what a ring does not do.
    plain: PlainEngine,
    /// Whether no request has to wait for storage: then a ring only has threads do each.
    is_in_memory: bool,
    /// Whether the file system knows I/O that does not wait; true until it says no.
    tries_reads: bool,
    tries_writes: bool,
    /// Whether nobody wants what is under way.
    is_cancelled: bool,
    /// As [`Request::cancelled`], for what is done by other means after all.
    cancelled: Arc<AtomicBool>,
}

/// A request under way.
#[derive(Clone, Copy, Debug)]
struct Job {
    operation: Operation,
    offset: u64,
    len: u64,
    /// Bytes that were moved.
    moved: u64,
    /// Whether each move has to reach stable storage by itself.
    durable: bool,
    /// Whether all that it changes is brought to stable storage at its end.
    syncs: bool,
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
    syncs: false,
    step: Step::Sync,
};

impl UringEngine {
    /// An engine for a disk's image, by the ring that is at home, or another.
    ///
    /// # Errors
    /// A kernel that has no io_uring, or none for this process.
    pub(super) fn new(current: &Current, home: &Home) -> io::Result<UringEngine> {
        let image = current.get();
        Ok(UringEngine {
            ring: Lent::new(home, &image.file, DEPTH)?,
            jobs: vec![NO_JOB; usize::from(DEPTH)],
            done: VecDeque::new(),
            plain: PlainEngine::new(current),
            is_in_memory: is_in_memory(&image.file),
            image,
            current: current.clone(),
            tries_reads: true,
            tries_writes: true,
            is_cancelled: false,
            cancelled: Arc::default(),
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
                Err(error) if error.is_interrupted() => return Ok(0),
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::OPNOTSUPP | Errno::NOSYS) => *tries = false,
                    Some(Errno::AGAIN) => return Ok(0),
                    _ => return Err(error),
                },
            }
        }
        match direction {
            Direction::Read => Ok(0),
            Direction::Write => match self.ring.move_now(tag, file, direction, offset)? {
                0 => Err(end_of(direction)),
                moved => Ok(moved as u64),
            },
        }
    }

    fn wait_for_all(&mut self) {
        while self.ring.under_way() > 0 {
            self.ring.submit();
            self.ring.wait(Duration::MAX);
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
                self.ring.release(tag);
                return Some((tag, outcome));
            }
        }
    }

    /// What the request comes to after a step that ended like this; `None` where another follows.
    fn go_on(&mut self, tag: u16, result: io::Result<usize>) -> Option<io::Result<()>> {
        if self.is_cancelled {
            return Some(Err(cancelled()));
        }
        let job = &mut self.jobs[usize::from(tag)];
        match (job.step, result) {
            (Step::Move(direction), Ok(moved)) => {
                self.ring.advance(tag, moved);
                return self.moved(tag, direction, moved);
            }
            (Step::Move(direction), Err(error)) => {
                let errno = Errno::from_io_error(&error);
                let gave_up = matches!(errno, Some(Errno::AGAIN | Errno::CANCELED));
                if !gave_up && !error.is_interrupted() {
                    return Some(Err(error));
                }
                // The kernel gave up on the way, and not because it cannot.
                job.syncs |= job.durable;
                let (file, offset) = (&self.image.file, job.offset + job.moved);
                match self.ring.move_now(tag, file, direction, offset) {
                    Ok(moved) => return self.moved(tag, direction, moved),
                    Err(error) => return Some(Err(error)),
                }
            }
            (Step::Allocate(mode), Err(error)) => {
                let refused = self.image.refuses(mode, &error);
                if !refused && !error.is_interrupted() {
                    return Some(Err(error));
                }
                let request = Request {
                    cancelled: &Arc::clone(&self.cancelled),
                    tag,
                    operation: job.operation,
                    offset: job.offset,
                    len: job.len,
                    data: Default::default(),
                    durable: job.syncs,
                };
                self.wait_to_read_around(&request);
                return Some(self.plain.perform(&request));
            }
            (Step::Allocate(_), Ok(_)) => return self.changed(tag),
            (Step::Sync, Err(error)) if error.is_interrupted() => {
                self.push(tag);
            }
            (Step::Sync, result) => return Some(self.image.flushed(result.map(drop))),
        }
        None
    }

    /// As [`Self::go_on`], after so many more bytes were moved.
    fn moved(&mut self, tag: u16, direction: Direction, moved: usize) -> Option<io::Result<()>> {
        if moved == 0 {
            return Some(Err(end_of(direction)));
        }
        self.jobs[usize::from(tag)].moved += moved as u64;
        if self.ring.is_moved(tag) {
            return self.changed(tag);
        }
        self.push(tag);
        None
    }

    /// As [`Self::go_on`], after all was moved or changed.
    fn changed(&mut self, tag: u16) -> Option<io::Result<()>> {
        let job = &mut self.jobs[usize::from(tag)];
        if !job.syncs {
            return Some(Ok(()));
        }
        job.step = Step::Sync;
        self.push(tag);
        None
    }
}

impl Engine for UringEngine {
    fn start(&mut self, memory: &Arc<GuestMemoryMmap>) {
        self.is_cancelled = false;
        self.ring.start(memory);
        self.plain.start(memory);
    }

    fn begin(&mut self, request: &Request<'_>) -> Option<Outcome> {
        if self.is_in_memory {
            return self.plain.begin(request);
        }
        let Some(mut step) = self.step_of(request) else {
            return self.now(request);
        };
        let (tag, offset) = (request.tag, request.offset);
        let complain = |image: &Image, result| {
            let complaints = &image.complaints;
            Some(complaints.outcome(request.operation, offset, request.len, result))
        };
        let changes = !matches!(request.operation, Operation::Read | Operation::Flush);
        if changes && let Err(error) = self.image.check_end(offset, request.len) {
            return complain(&self.image, Err(error));
        }
        let durable = request.durable && changes;
        // A write to the page cache that the kernel brings to stable storage by itself says "I/O
        // error" both when nothing was taken and when what was taken is lost. So it is two steps.
        let is_cached = self.image.direct.is_none();
        let syncs = durable && (is_cached || matches!(step, Step::Allocate(_)));
        if matches!(step, Step::Allocate(_)) {
            self.cancelled = Arc::clone(request.cancelled);
        }
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
            if prepared.is_ok() && self.image.direct.is_none() {
                prepared = self
                    .by_cache(tag, direction, offset)
                    .map(|count| moved = count);
            }
            let is_moved = self.ring.is_moved(tag);
            if prepared.is_err() || is_moved && !syncs {
                self.ring.release(tag);
                return complain(&self.image, prepared);
            }
            if is_moved {
                step = Step::Sync;
            }
        }
        self.jobs[usize::from(tag)] = Job {
            operation: request.operation,
            offset,
            len: request.len,
            moved,
            durable: durable && self.image.direct.is_some(),
            syncs,
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

    fn wait(&mut self, most: Duration) {
        self.ring.submit();
        if self.done.is_empty() {
            self.ring.wait(most);
        }
    }

    fn cancel(&mut self) {
        self.is_cancelled = true;
        self.ring.cancel();
    }

    fn renew(&mut self) {
        self.image = self.current.get();
        self.ring.turn_to(&self.image.file);
        self.plain.renew();
        self.is_in_memory = is_in_memory(&self.image.file);
        (self.tries_reads, self.tries_writes) = (true, true);
    }

    fn growth_fd(&self) -> Option<RawFd> {
        self.image.growth_fd()
    }

    fn grown(&mut self) -> Option<u64> {
        self.image.grown()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::complaints::Complaints;
    use armlet_devices::virtio::block::Data;
    use armlet_devices::virtio::queue::Segment;
    use std::fs::File;
    use std::path::PathBuf;
    use vm_memory::{Bytes, GuestAddress};

    /// An engine on a file of 64 KiB; `None` on a host that has no io_uring.
    fn engine() -> Option<(UringEngine, Current)> {
        engine_on(tempfile::tempfile().expect("a file"))
    }

    fn engine_on(file: File) -> Option<(UringEngine, Current)> {
        file.set_len(64 << 10).expect("room");
        let complaints = Complaints::new("disk0".to_owned(), PathBuf::new());
        let image = Current::new(Image::new(file, false, false, None, 512, complaints));
        let mut engine = UringEngine::new(&image, &Home::default())
            .inspect_err(|error| println!("skipped: {error}"))
            .ok()?;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 10)]);
        engine.start(&Arc::new(memory.expect("memory")));
        Some((engine, image))
    }

    fn write<'a>(data: Data<'a>, cancelled: &'a Arc<AtomicBool>) -> Request<'a> {
        Request {
            tag: 3,
            operation: Operation::Write,
            offset: 0,
            len: data.len() as u64,
            data,
            durable: true,
            cancelled,
        }
    }

    #[test]
    fn a_ring_serves_every_life_of_a_guest_and_does_no_more_than_a_disk_needs() {
        let Some((engine, image)) = engine() else {
            return;
        };
        let home = Arc::clone(&engine.ring.home);
        let first = engine.ring.as_raw_fd();
        drop(engine);
        let mut engine = UringEngine::new(&image, &home).expect("the ring is at home");
        assert_eq!(engine.ring.as_raw_fd(), first);
        assert!(armlet_devices::sync::lock(&home).is_none());
        assert_eq!(engine.ring.try_nop(), -libc::EACCES);
    }

    #[test]
    fn a_disk_that_has_another_image_works_there_by_the_same_ring() {
        let Some((mut engine, image)) = engine() else {
            return;
        };
        let home = Arc::clone(&engine.ring.home);
        let descriptor = engine.ring.as_raw_fd();
        let segments = [Segment {
            address: GuestAddress(0),
            len: 4096,
        }];
        let cancelled = Arc::default();
        let perform = |engine: &mut UringEngine, byte: u8| {
            let memory = engine.plain.memory();
            memory
                .write_slice(&[byte; 4096], GuestAddress(0))
                .expect("memory");
            let request = write(Data::new(&segments, 0, 4096), &cancelled);
            assert_eq!(engine.begin(&request), None, "stable storage takes a while");
            let mut done = engine.finished();
            while done.is_none() {
                engine.wait(Duration::MAX);
                done = engine.finished();
            }
            assert_eq!(done, Some((3, Outcome::Done)));
        };
        perform(&mut engine, 1);
        let first = image.get();
        let other = tempfile::tempfile().expect("a file");
        other.set_len(64 << 10).expect("room");
        let complaints = Complaints::new("disk0".to_owned(), PathBuf::new());
        image.replace(Image::new(other, false, false, None, 512, complaints));
        // It is told of it later.
        perform(&mut engine, 2);
        engine.renew();
        perform(&mut engine, 3);
        assert_eq!(engine.ring.as_raw_fd(), descriptor);
        let byte_of = |image: &Image| {
            let mut byte = [0];
            image.peek(4095, &mut byte).expect("there");
            byte[0]
        };
        assert_eq!((byte_of(&first), byte_of(&image.get())), (2, 3));
        // So it does in the next life.
        drop(engine);
        let mut engine = UringEngine::new(&image, &home).expect("the ring is at home");
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 10)]);
        engine.start(&Arc::new(memory.expect("memory")));
        perform(&mut engine, 4);
        assert_eq!((byte_of(&first), byte_of(&image.get())), (2, 4));
    }

    #[test]
    fn a_file_in_memory_is_not_worked_on_by_threads() {
        let Ok(file) = tempfile::tempfile_in("/dev/shm") else {
            println!("skipped: no /dev/shm");
            return;
        };
        assert!(is_in_memory(&file), "/dev/shm is a tmpfs");
        let Some((mut engine, _)) = engine_on(file) else {
            return;
        };
        let segments = [Segment {
            address: GuestAddress(0),
            len: 4096,
        }];
        let cancelled = Arc::default();
        for operation in [Operation::Write, Operation::Read, Operation::Flush] {
            let len = if operation == Operation::Flush {
                0
            } else {
                4096
            };
            let request = Request {
                operation,
                ..write(Data::new(&segments, 0, len), &cancelled)
            };
            assert_eq!(engine.begin(&request), Some(Outcome::Done), "{operation:?}");
        }
        assert_eq!(engine.ring.under_way(), 0);
    }

    #[test]
    fn after_a_durable_write_that_was_lost_flushes_fail() {
        let Some((mut engine, image)) = engine() else {
            return;
        };
        let segments = [Segment {
            address: GuestAddress(0),
            len: 4096,
        }];
        let cancelled = Arc::default();
        let request = write(Data::new(&segments, 0, 4096), &cancelled);
        assert_eq!(engine.begin(&request), None, "stable storage takes a while");
        // The kernel says that it could not bring to stable storage what it had taken.
        engine.ring.stop();
        let lost = Err(Errno::IO.into());
        let result = engine.go_on(3, lost).expect("nothing follows");
        assert!(result.is_err());
        assert!(image.get().flush().is_err(), "what was written is nowhere");
    }

    #[test]
    fn what_one_large_request_needed_is_given_back() {
        let Some((mut engine, _image)) = engine() else {
            return;
        };
        let segments: Vec<Segment> = (0..4096)
            .map(|index| Segment {
                address: GuestAddress(16 * index),
                len: 16,
            })
            .collect();
        let cancelled = Arc::default();
        let request = write(Data::new(&segments, 0, 64 << 10), &cancelled);
        assert_eq!(engine.begin(&request), None);
        while engine.finished().is_none() {
            engine.wait(Duration::MAX);
        }
        let kept = engine.ring.kept_pieces(3);
        assert!(kept <= 64, "{kept} pieces are kept");
    }
}
