//! Persistent memory (virtio 1.2, section 5.19): a file that the guest sees as memory, and one
//! request, which flushes it to stable storage.

use std::sync::Arc;

use super::{
    Chain, ConfigSpace, Driver, Link, Positions, Source, StartError, VirtioDevice, Virtqueue,
    quiesced,
};
use crate::rate::Throttle;

/// Device ID.
const ID: u32 = 27;
/// Entries of its queue.
const ENTRIES: u16 = 64;
/// VIRTIO_PMEM_REQ_TYPE_FLUSH.
const FLUSH: u32 = 0;
/// The result of a failed request.
const FAILED: i32 = -1;

/// Flushes everything that the guest wrote before the call to stable storage, and returns whether
/// it succeeded.
pub type Flush = Box<dyn FnMut() -> bool + Send>;

/// A persistent memory device.
pub struct Pmem {
    flush: Flush,
    config: Arc<ConfigSpace>,
    working: Option<(Virtqueue, Arc<Link>)>,
    /// Requests that wait for the flush; kept to reuse its allocation.
    waiting: Vec<Chain>,
    size: u64,
    throttle: Option<Arc<Throttle>>,
}

impl Pmem {
    /// Creates a device whose memory is `size` bytes at the guest-physical address `start`.
    #[must_use]
    pub fn new(start: u64, size: u64, flush: Flush) -> Pmem {
        let config = [start.to_le_bytes(), size.to_le_bytes()].concat();
        Pmem {
            flush,
            config: ConfigSpace::new(config),
            working: None,
            waiting: Vec::new(),
            size,
            throttle: None,
        }
    }

    /// The device, held to the limits of `throttle`, if there is one: a flush counts for as many bytes as
    /// there are.
    #[must_use]
    pub fn held_to(mut self, throttle: Option<Arc<Throttle>>) -> Pmem {
        self.throttle = throttle;
        self
    }

    /// Flushes for the requests that wait.
    fn flush(&mut self) {
        let Some((queue, _)) = &mut self.working else {
            return;
        };
        if self.waiting.is_empty() {
            return;
        }
        // One flush covers all requests that were made before it.
        let result = if (self.flush)() { 0 } else { FAILED };
        for chain in self.waiting.drain(..) {
            answer(queue, chain, result);
        }
        queue.signal();
    }

    /// As [`Self::flush`], as far as the limits let it.
    fn flush_in_time(&mut self) {
        let is_held = |throttle: &Arc<Throttle>| !throttle.admits(self.size);
        if !self.waiting.is_empty() && !self.throttle.as_ref().is_some_and(is_held) {
            self.flush();
        }
    }
}

impl VirtioDevice for Pmem {
    fn id(&self) -> u32 {
        ID
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![ENTRIES]
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn start(&mut self, mut driver: Driver) -> Result<(), StartError> {
        self.working = driver.take(0).map(|queue| (queue, driver.link));
        self.kicked(0);
        Ok(())
    }

    fn quiesce(&mut self) -> Positions {
        self.flush();
        let mut working = self.working.take();
        quiesced(working.iter_mut().map(|(queue, _)| queue))
    }

    fn reset(&mut self) {
        self.working = None;
        self.waiting.clear();
    }

    fn stop_queue(&mut self, _queue: usize) {
        self.reset();
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Result<(), StartError> {
        let link = Arc::clone(queue.link());
        self.working = Some((queue, link));
        Ok(())
    }

    fn kicked(&mut self, _queue: usize) {
        let Some((queue, link)) = &mut self.working else {
            return;
        };
        let waiting = &mut self.waiting;
        queue.serve(|queue, chain| {
            let mut kind = [0; 4];
            let whole = chain.read(queue.memory(), 0, &mut kind) == kind.len();
            let kind = u32::from_le_bytes(kind);
            if whole && kind == FLUSH && chain.writable_len() >= 4 {
                waiting.push(chain);
                return;
            }
            link.fault(format_args!(
                "the driver sends request type {kind:#x}, which is not a flush"
            ));
            answer(queue, chain, FAILED);
        });
        self.flush_in_time();
    }

    fn sources(&self) -> Vec<Source> {
        self.throttle.iter().map(|it| it.source()).collect()
    }

    fn ready(&mut self, _source: usize) {
        if let Some(throttle) = &self.throttle {
            throttle.heard();
        }
        self.flush_in_time();
    }
}

fn answer(queue: &mut Virtqueue, chain: Chain, result: i32) {
    let written = chain.write(queue.memory(), 0, &result.to_le_bytes());
    queue.complete(chain, written as u32);
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::rate::tests::FakeAlarm;
    use crate::rate::{Bucket, Limits};
    use crate::virtio::fake::Guest;
    use crate::virtio::lock;

    /// Counts flushes, and says whether they succeed.
    #[derive(Default)]
    struct Storage {
        flushes: usize,
        fails: bool,
    }

    fn pmem() -> (Pmem, Arc<Mutex<Storage>>) {
        let storage = Arc::new(Mutex::new(Storage::default()));
        let flushed = Arc::clone(&storage);
        let flush = move || {
            let mut storage = lock(&flushed);
            storage.flushes += 1;
            !storage.fails
        };
        (
            Pmem::new(0x1_2345_6000, 0x40_0000, Box::new(flush)),
            storage,
        )
    }

    #[test]
    fn the_driver_sees_where_the_memory_is() {
        let mut guest = Guest::new(pmem().0);
        let words = [0x100, 0x104, 0x108, 0x10c].map(|offset| guest.read(offset));
        assert_eq!(words, [0x2345_6000, 1, 0x40_0000, 0]);
    }

    #[test]
    fn a_flush_is_answered_when_it_is_done() {
        let (pmem, storage) = pmem();
        let mut guest = Guest::started(pmem, 0);
        assert_eq!(guest.answer(0, &[&[0; 4]], &[4]), [0; 4]);
        assert_eq!(lock(&storage).flushes, 1);
        // Split into several buffers, with room for more.
        assert_eq!(guest.answer(0, &[&[0], &[0; 3]], &[1, 7]), [0; 4]);
        assert_eq!(lock(&storage).flushes, 2);
        assert_eq!(guest.mmio.faults(), 0);
    }

    #[test]
    fn flushes_beyond_the_limit_wait_and_one_does_for_all_of_them() {
        let (pmem, storage) = pmem();
        let bucket = |size| Bucket {
            size,
            refill_time: Duration::from_secs(3600),
            one_time_burst: 0,
        };
        let limits = |size| Limits {
            bandwidth: Some(bucket(size)),
            ops: None,
        };
        // One and a half of what there is.
        let alarm = Box::new(FakeAlarm::default());
        let throttle = Arc::new(Throttle::new(&limits(0x60_0000), alarm));
        let pmem = pmem.held_to(Some(Arc::clone(&throttle)));
        let mut guest = Guest::started(pmem, 0);
        assert_eq!(guest.answer(0, &[&[0; 4]], &[4]), [0; 4]);
        for _ in 0..2 {
            guest.request(0, &[&[0; 4]], &[4]);
            guest.kick(0);
        }
        lock(&guest.device).ready(0);
        assert!(guest.used(0).is_empty());
        assert_eq!(lock(&storage).flushes, 1);
        throttle.change(&limits(0));
        lock(&guest.device).ready(0);
        assert_eq!(guest.used(0).len(), 2);
        assert_eq!(lock(&storage).flushes, 2);
        // One that waits when the machine is held is done by then.
        throttle.change(&limits(1 << 40));
        throttle.charge(1 << 40);
        guest.request(0, &[&[0; 4]], &[4]);
        guest.kick(0);
        assert!(guest.used(0).is_empty());
        guest.pause();
        assert_eq!(guest.used(0).len(), 1);
        // One that waits at a reset is forgotten.
        guest.request(0, &[&[0; 4]], &[4]);
        guest.kick(0);
        guest.start(0);
        throttle.change(&limits(0));
        lock(&guest.device).ready(0);
        assert_eq!(lock(&storage).flushes, 3);
        assert_eq!(guest.answer(0, &[&[0; 4]], &[4]), [0; 4]);
    }

    #[test]
    fn a_failed_flush_is_reported() {
        let (pmem, storage) = pmem();
        let mut guest = Guest::started(pmem, 0);
        lock(&storage).fails = true;
        assert_eq!(guest.answer(0, &[&[0; 4]], &[4]), [0xff; 4]);
    }

    #[test]
    fn one_flush_covers_all_waiting_requests() {
        let (pmem, storage) = pmem();
        let mut guest = Guest::started(pmem, 0);
        for _ in 0..5 {
            guest.request(0, &[&[0; 4]], &[4]);
        }
        guest.kick(0);
        let used = guest.used(0);
        assert_eq!(used.len(), 5);
        assert!(used.iter().all(|(_, answer)| *answer == [0; 4]));
        assert_eq!(lock(&storage).flushes, 1);
        assert_eq!(guest.interrupts(), 1);
    }

    #[test]
    fn a_request_that_is_not_a_flush_fails() {
        let (pmem, storage) = pmem();
        let mut guest = Guest::started(pmem, 0);
        assert_eq!(guest.answer(0, &[&[1, 0, 0, 0]], &[4]), [0xff; 4]);
        assert_eq!(guest.answer(0, &[&[0; 3]], &[4]), [0xff; 4]);
        assert_eq!(guest.answer(0, &[], &[4]), [0xff; 4]);
        // No room for the result.
        assert_eq!(guest.answer(0, &[&[0; 4]], &[3]), [0xff; 3]);
        assert_eq!(guest.answer(0, &[&[0; 4]], &[]), []);
        assert_eq!(lock(&storage).flushes, 0);
        assert_eq!(guest.mmio.faults(), 5);
        assert!(!guest.is_broken());
    }

    #[test]
    fn a_buffer_outside_memory_fails_its_request_only() {
        let (pmem, storage) = pmem();
        let mut guest = Guest::started(pmem, 0);
        guest.request_outside(0, &[false, true], 0);
        guest.request_outside(0, &[false, true], 1);
        assert_eq!(guest.used(0).len(), 2);
        assert_eq!(lock(&storage).flushes, 0);
        assert!(!guest.is_broken());
        assert_eq!(guest.answer(0, &[&[0; 4]], &[4]), [0; 4]);
    }

    #[test]
    fn a_reset_in_between_changes_nothing() {
        let (pmem, storage) = pmem();
        let mut guest = Guest::started(pmem, 0);
        guest.request(0, &[&[0; 4]], &[4]);
        guest.start(0);
        guest.kick(0);
        assert_eq!(lock(&storage).flushes, 0);
        assert_eq!(guest.answer(0, &[&[0; 4]], &[4]), [0; 4]);
    }

    #[test]
    fn a_flush_is_answered_after_resume_or_restore() {
        let mut guest = Guest::started(pmem().0, 0);
        assert_eq!(guest.answer(0, &[&[0; 4]], &[4]), [0; 4]);
        guest.pause();
        guest.mmio.quiesce();
        guest.request(0, &[&[0; 4]], &[4]);
        guest.kick(0);
        assert!(guest.used(0).is_empty());
        let (other, storage) = pmem();
        guest.move_to(other);
        assert_eq!(guest.used(0)[0].1, [0; 4]);
        assert_eq!(lock(&storage).flushes, 1);
        assert_eq!(guest.answer(0, &[&[0; 4]], &[4]), [0; 4]);
    }

    #[test]
    fn a_queue_that_is_stopped_flushes_nothing_until_it_is_set_up_again() {
        let (pmem, storage) = pmem();
        let mut guest = Guest::started(pmem, 0);
        guest.stop_queue(0);
        guest.request(0, &[&[0; 4]], &[4]);
        guest.kick(0);
        assert_eq!(lock(&storage).flushes, 0);
        guest.set_up_queue(0);
        assert_eq!(guest.answer(0, &[&[0; 4]], &[4]), [0; 4]);
        assert_eq!(guest.answer(0, &[&[0; 3]], &[4]), [0xff; 4]);
        assert_eq!(guest.mmio.faults(), 1);
    }

    proptest! {
        /// Each request is answered, and success is reported only for flushes that happened.
        #[test]
        fn every_request_is_answered(
            requests in prop::collection::vec(
                (prop::collection::vec(0..2_u8, 0..6), 0..6_usize),
                1..20,
            ),
        ) {
            let (pmem, storage) = pmem();
            let mut guest = Guest::started(pmem, 0);
            for (data, room) in &requests {
                guest.request(0, &[data], &[*room]);
            }
            guest.kick(0);
            let used = guest.used(0);
            prop_assert_eq!(used.len(), requests.len());
            let done = used.iter().any(|(_, answer)| *answer == [0; 4]);
            prop_assert_eq!(done, lock(&storage).flushes == 1);
        }
    }
}
