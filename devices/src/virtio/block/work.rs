//! The queues of a disk at work: whose turn it is, and how requests begin and end.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::data::Data;
use super::engine::{Engine, Operation, Outcome, Request};
use super::in_flight::{InFlight, Pending};
use super::request::{Disk, HEADER, IOERR, OK, Parsed, SERIAL};
use super::shape::ENTRIES;
use crate::counts::Counts;
use crate::rate::Throttle;
use crate::sync::ring;
use crate::virtio::{Chain, Driver, Link, Positions, Virtqueue, quiesced};

/// The most requests that the device begins before it looks at what else is to be done.
const TURN: u16 = ENTRIES;
/// How long a reset waits for the storage before a warning is logged.
const PATIENCE: Duration = Duration::from_secs(2);

/// The queues of a disk and the engine that carries their requests out.
pub(super) struct Work {
    pub(super) engine: Box<dyn Engine>,
    queues: Vec<Option<Virtqueue>>,
    /// The way to the driver that started the device.
    running: Option<Arc<Link>>,
    /// Queues whose turn it is, or that are held: the next request of each has no tag, would be
    /// too many bytes of its queue, or more than the disk's limits allow for now.
    ///
    /// Apart from these limits, whose alarm is set, a queue is held only while a request is under way, of
    /// itself where bytes hold it. The end of any request, whoever meets it, gives all of them their turn (`is_freed`). So none waits
    /// for an event that does not come: the ring's descriptor tells of completions that nobody has
    /// fetched yet, and another queue's turn may have fetched the last of them.
    waiting: VecDeque<usize>,
    /// Whether something changed for the queues that wait.
    is_freed: bool,
    in_flight: InFlight,
    /// What it has done.
    pub(super) counts: Arc<Counts>,
    /// What holds the disk back, and whether it does: then its alarm gives all queues their turn.
    pub(super) throttle: Option<Arc<Throttle>>,
    is_throttled: bool,
    /// Taken from the queues so far, modulo 2^32.
    pub(super) requests: u32,
    /// Set while the device is to be reset.
    pub(super) cancelled: Arc<AtomicBool>,
    /// Set while somebody waits for the device, to reset it or else.
    pub(super) wanted: Arc<AtomicBool>,
}

impl Work {
    /// So many queues, none of which is in use yet.
    pub(super) fn new(queues: u16, engine: Box<dyn Engine>) -> Work {
        Work {
            engine,
            queues: (0..queues).map(|_| None).collect(),
            running: None,
            waiting: VecDeque::new(),
            is_freed: false,
            in_flight: InFlight::new(usize::from(queues)),
            counts: Arc::default(),
            throttle: None,
            is_throttled: false,
            requests: 0,
            cancelled: Arc::default(),
            wanted: Arc::default(),
        }
    }

    /// How many queues there are, in use or not.
    pub(super) fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// The way to the driver, while it has the device in use.
    pub(super) fn link(&self) -> Option<&Link> {
        self.running.as_deref()
    }

    // ---------------------------------------------------------------------------- life cycle

    /// Takes the driver's queues up, and kicks each for the requests that are there.
    pub(super) fn start(&mut self, mut driver: Driver) {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            *queue = driver.take(index);
        }
        self.engine.start(&driver.memory);
        self.running = Some(driver.link);
        for queue in self.queues.iter().flatten() {
            // Its thread begins the requests that are there, not the vCPU that starts it.
            ring(queue.kick());
        }
    }

    /// Finishes what is under way and gives up the queues; returns where each of them stands.
    pub(super) fn quiesce(&mut self) -> Positions {
        if self.running.is_none() {
            return Positions::new();
        }
        // What nobody has taken from a queue that waits stays there.
        self.waiting.clear();
        self.wait_until("a pause", |work| work.in_flight.is_empty(), Work::collect);
        self.is_freed = false;
        let positions = quiesced(self.queues.iter_mut().flatten());
        self.running = None;
        self.engine.stop();
        self.queues.fill_with(|| None);
        positions
    }

    /// Finishes what is under way, and has the engine turn to other storage.
    pub(super) fn renew(&mut self, disk: &Disk) {
        let is_over = |work: &Work| work.in_flight.is_empty();
        self.wait_until("a change of its image", is_over, Work::collect);
        self.engine.renew();
        // Those that wait may have their turn now, and what ended is told of.
        self.turn(disk);
    }

    /// Ends what is under way, answered or not, and gives up the queues.
    pub(super) fn reset(&mut self) {
        self.waiting.clear();
        self.is_freed = false;
        self.is_throttled = false;
        self.cancel();
        if self.running.take().is_some() {
            self.engine.stop();
        }
        self.queues.fill_with(|| None);
    }

    /// Finishes what is under way of a queue, and gives it up.
    pub(super) fn stop_queue(&mut self, queue: usize) {
        // Their data lies in the driver's buffers, so they are completed first.
        let is_over = |work: &Work| work.in_flight.load(queue).requests == 0;
        self.wait_until("the stop of a queue", is_over, Work::collect);
        for ring in self.queues.iter_mut().flatten() {
            ring.signal();
        }
        if let Some(ring) = self.queues.get_mut(queue) {
            *ring = None;
        }
        // Those that wait may have their turn now.
        while let Some(waiting) = self.waiting.pop_front() {
            if let Some(queue) = self.queue(waiting) {
                ring(queue.kick());
            }
        }
    }

    /// Has a queue in use from now on.
    pub(super) fn start_queue(&mut self, queue: Virtqueue) {
        let index = usize::from(queue.index());
        if let Some(ring) = self.queues.get_mut(index) {
            *ring = Some(queue);
        }
    }

    // --------------------------------------------------------------------- the queues' turns

    /// Serves a queue that was kicked, when its turn comes.
    pub(super) fn kicked(&mut self, disk: &Disk, queue: usize) {
        if !self.waiting.contains(&queue) {
            self.waiting.push_back(queue);
        }
        if !self.has_tag() {
            self.collect();
        }
        self.is_freed = true;
        self.turn(disk);
    }

    /// Completes what the engine is done with, and serves the queues that waited for it.
    pub(super) fn completed(&mut self, disk: &Disk) {
        self.collect();
        self.turn(disk);
    }

    /// The alarm of the limits was heard: whoever they held back may go on.
    pub(super) fn unthrottled(&mut self, disk: &Disk) {
        if let Some(throttle) = &self.throttle {
            throttle.heard();
        }
        self.is_throttled = false;
        self.is_freed = true;
        self.turn(disk);
    }

    /// Gives the queues that wait their turns, until nothing can be begun now; interrupts the
    /// driver for what was completed.
    fn turn(&mut self, disk: &Disk) {
        let mut left = TURN;
        while std::mem::take(&mut self.is_freed) {
            for _ in 0..self.waiting.len() {
                // Those behind keep their places in the line.
                if !self.has_tag() {
                    break;
                }
                if let Some(index) = self.waiting.pop_front() {
                    self.serve(disk, index, &mut left);
                }
            }
        }
        debug_assert!(
            self.waiting.iter().all(|index| self.may_be_held(*index)),
            "a queue is held while nothing is under way"
        );
        for queue in self.queues.iter_mut().flatten() {
            queue.signal();
        }
    }

    /// Whether the end of a request that is under way will give a queue its turn, or the alarm.
    fn may_be_held(&self, index: usize) -> bool {
        match self.has_tag() {
            _ if self.is_throttled => true,
            true => self.in_flight.load(index).requests > 0,
            false => !self.in_flight.is_empty(),
        }
    }

    /// Takes requests from a queue and begins them, as many as there are and may be under way, up
    /// to `left` of them, which are counted down.
    fn serve(&mut self, disk: &Disk, index: usize, left: &mut u16) {
        while let Some(queue) = self.queue(index) {
            queue.silence();
            let mut is_held = false;
            let emptied = loop {
                // Whoever waits for the device, to reset it or else, gets it between two requests.
                if *left == 0 || self.wanted.load(Ordering::Relaxed) {
                    break false;
                }
                is_held = !self.has_tag();
                if is_held {
                    break false;
                }
                let Some(chain) = self.queue(index).and_then(Virtqueue::pop) else {
                    break true;
                };
                *left -= 1;
                self.requests = self.requests.wrapping_add(1);
                if let Err(chain) = self.begin(disk, index, chain) {
                    if let Some(queue) = self.queue(index) {
                        queue.undo_pop(chain);
                    }
                    is_held = true;
                    break false;
                }
            };
            self.engine.submit();
            self.collect();
            if emptied {
                let Some(queue) = self.queue(index) else {
                    return;
                };
                // A driver on another CPU makes more while it is interrupted, and is asked for
                // kicks only when it has made none.
                queue.signal();
                if !queue.has_next() && !queue.listen() {
                    return;
                }
            } else if is_held {
                // What ended just now counts for it, too: then `turn` comes back at once.
                self.waiting.push_back(index);
                return;
            } else {
                // A driver that fills the ring as fast as it is emptied does not keep the device
                // from others: the kick brings us back.
                let kick = self.queue(index).map(|queue| Arc::clone(queue.kick()));
                if let Some(kick) = kick {
                    ring(&kick);
                }
                return;
            }
        }
    }

    // ------------------------------------------------------------- how requests begin and end

    /// Begins a request, or answers it at once.
    ///
    /// # Errors
    /// A request that would be too much of its queue under way, or of the disk for now: the same again.
    fn begin(&mut self, disk: &Disk, queue: usize, chain: Chain) -> Result<(), Chain> {
        let Some(ring) = self.queues.get(queue).and_then(Option::as_ref) else {
            return Ok(());
        };
        let room = chain.writable_len();
        let parsed = match room {
            _ if !chain.is_whole() => Parsed::Done(IOERR),
            0 => Parsed::Done(IOERR),
            _ => disk.parse(ring, &chain),
        };
        let mut pending = Pending {
            queue,
            chain,
            is_read: matches!(parsed, Parsed::Run(Operation::Read, ..)),
            bytes: 0,
        };
        let (operation, offset, len) = match parsed {
            Parsed::Run(operation, offset, len) => (operation, offset, len),
            Parsed::Identify => {
                let wanted = SERIAL.min(room - 1);
                let memory = ring.memory();
                pending.chain.write(memory, 0, &disk.serial[..wanted]);
                pending.is_read = wanted == room - 1;
                self.complete(pending, OK);
                return Ok(());
            }
            Parsed::Done(status) => {
                self.complete(pending, status);
                return Ok(());
            }
        };
        pending.bytes = len;
        let load = self.in_flight.load(queue);
        if load.requests > 0 && load.bytes + len > self.engine.most_bytes() {
            return Err(pending.chain);
        }
        let has_data = matches!(operation, Operation::Read | Operation::Write);
        if let Some(throttle) = &self.throttle
            && !throttle.admits(if has_data { len } else { 0 })
        {
            self.is_throttled = true;
            return Err(pending.chain);
        }
        match operation {
            Operation::Read => self.counts.to_guest.add(len),
            Operation::Write => self.counts.from_guest.add(len),
            Operation::Flush => self.counts.flushes.add(1),
            _ => {}
        }
        let data = match operation {
            Operation::Read => Data::new(pending.chain.writable(), 0, len as usize),
            Operation::Write => Data::new(pending.chain.readable(), HEADER, len as usize),
            _ => Data::default(),
        };
        let tag = self.in_flight.reserve();
        let outcome = self.engine.begin(&Request {
            tag,
            operation,
            offset,
            len,
            data,
            durable: disk.flushes && !disk.writeback,
            cancelled: &self.cancelled,
        });
        match outcome {
            Some(outcome) => {
                self.in_flight.release(tag);
                self.complete(pending, status_of(outcome));
            }
            None => self.in_flight.insert(tag, pending),
        }
        Ok(())
    }

    /// Completes the requests that the engine is done with.
    fn collect(&mut self) {
        if self.in_flight.is_empty() {
            return;
        }
        while let Some((tag, outcome)) = self.engine.finished() {
            if let Some(pending) = self.remove(tag) {
                self.complete(pending, status_of(outcome));
            }
        }
    }

    /// Removes the request with this tag, which ended.
    fn remove(&mut self, tag: u16) -> Option<Pending> {
        let pending = self.in_flight.remove(tag)?;
        self.is_freed = true;
        Some(pending)
    }

    /// Writes a request's status and hands its buffers back to the driver.
    fn complete(&mut self, pending: Pending, status: u8) {
        let Pending {
            queue,
            chain,
            is_read,
            ..
        } = pending;
        if status == IOERR {
            self.counts.failed.add(1);
        }
        let Some(queue) = self.queue(queue) else {
            return;
        };
        match chain.last_writable() {
            Some(_) => queue.put_last(&chain, status),
            None if chain.is_whole() => {
                let head = chain.head();
                queue.break_ring(format_args!(
                    "the request at descriptor {head} has no room for its status"
                ));
                return;
            }
            // The status cannot be written; the fault was counted when the request was taken.
            None => {}
        }
        if !chain.is_whole() {
            queue.complete(chain, 0);
            return;
        }
        let last = chain.writable_len().saturating_sub(1);
        // The bytes that were written for sure, from the first on.
        let written = match is_read && status == OK || last == 0 {
            true => last + 1,
            false => 0,
        };
        queue.complete(chain, written as u32);
    }

    fn queue(&mut self, index: usize) -> Option<&mut Virtqueue> {
        self.queues.get_mut(index).and_then(Option::as_mut)
    }

    fn has_tag(&self) -> bool {
        self.in_flight.has_room(|| self.engine.depth())
    }

    // ------------------------------------------------------------------------------- waiting

    /// Ends what is under way; the driver does not wait for it any more.
    fn cancel(&mut self) {
        if self.in_flight.is_empty() {
            return;
        }
        self.engine.cancel();
        let forget = |work: &mut Work| {
            while let Some((tag, _)) = work.engine.finished() {
                work.remove(tag);
            }
        };
        self.wait_until("a reset", |work| work.in_flight.is_empty(), forget);
    }

    /// Waits for the engine until `is_over`, and logs a warning where it takes long; `fetch` takes
    /// what the engine is done with.
    fn wait_until(
        &mut self,
        what: &str,
        is_over: impl Fn(&Work) -> bool,
        fetch: impl Fn(&mut Work),
    ) {
        let (begun, mut warned) = (Instant::now(), PATIENCE);
        loop {
            fetch(self);
            if is_over(self) {
                return;
            }
            let waited = begun.elapsed();
            if waited >= warned {
                warned *= 2;
                let name = self.link().map_or("a disk", Link::name);
                log::warn!(
                    "{name}: {what} has waited {} s for {} requests that the host's storage has not answered",
                    waited.as_secs(),
                    self.in_flight.count()
                );
            }
            self.engine.wait(warned.saturating_sub(waited));
        }
    }
}

fn status_of(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Done => OK,
        Outcome::Failed => IOERR,
    }
}
