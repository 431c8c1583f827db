//! The entropy device (virtio 1.2, section 5.4).

use std::sync::Arc;

use super::{
    ConfigSpace, Driver, Positions, Source, StartError, VirtioDevice, Virtqueue, quiesced,
};
use crate::rate::Throttle;

/// Device ID.
const ID: u32 = 4;
/// Entries of its queue: Linux has one request in flight at a time.
const ENTRIES: u16 = 8;
/// The most bytes for one request: up to this many, getrandom is not interrupted
/// (drivers/char/random.c). A driver that wants more asks again.
const MOST: usize = 256;

/// The source of the random numbers: fills the buffer, and returns whether it succeeded.
pub type Entropy = Box<dyn FnMut(&mut [u8]) -> bool + Send>;

/// An entropy device.
pub struct Rng {
    source: Entropy,
    config: Arc<ConfigSpace>,
    queue: Option<Virtqueue>,
    throttle: Option<Arc<Throttle>>,
}

impl Rng {
    /// Creates a device that passes on the numbers of `source`.
    #[must_use]
    pub fn new(source: Entropy) -> Rng {
        Rng {
            source,
            config: ConfigSpace::new(Vec::new()),
            queue: None,
            throttle: None,
        }
    }

    /// The device, held to the limits of `throttle`, if there is one.
    #[must_use]
    pub fn held_to(mut self, throttle: Option<Arc<Throttle>>) -> Rng {
        self.throttle = throttle;
        self
    }
}

impl VirtioDevice for Rng {
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
        self.queue = driver.take(0);
        self.kicked(0);
        Ok(())
    }

    fn quiesce(&mut self) -> Positions {
        quiesced(self.queue.take().iter_mut())
    }

    fn reset(&mut self) {
        self.queue = None;
    }

    fn stop_queue(&mut self, _queue: usize) {
        self.queue = None;
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Result<(), StartError> {
        self.queue = Some(queue);
        Ok(())
    }

    fn kicked(&mut self, _queue: usize) {
        let Some(queue) = &mut self.queue else {
            return;
        };
        let throttle = self.throttle.as_deref();
        queue.serve_while(|queue, chain| {
            let mut buffer = [0; MOST];
            let wanted = chain.writable_len().min(MOST);
            if throttle.is_some_and(|throttle| !throttle.admits(wanted as u64)) {
                return Err(chain);
            }
            let written = match (self.source)(&mut buffer[..wanted]) {
                true => chain.write(queue.memory(), 0, &buffer[..wanted]),
                false => 0,
            };
            queue.complete(chain, written as u32);
            Ok(())
        });
    }

    fn sources(&self) -> Vec<Source> {
        self.throttle.iter().map(|it| it.source()).collect()
    }

    fn ready(&mut self, _source: usize) {
        if let Some(throttle) = &self.throttle {
            throttle.heard();
        }
        self.kicked(0);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::rate::tests::FakeAlarm;
    use crate::rate::{Bucket, Limits};
    use crate::virtio::fake::Guest;
    use crate::virtio::lock;

    fn counting() -> Rng {
        let mut next = 0_u8;
        Rng::new(Box::new(move |buffer| {
            for byte in buffer {
                next = next.wrapping_add(1);
                *byte = next;
            }
            true
        }))
    }

    #[test]
    fn each_request_gets_fresh_numbers() {
        let mut guest = Guest::started(counting(), 0);
        assert_eq!(guest.answer(0, &[], &[3, 2]), [1, 2, 3, 4, 5]);
        assert_eq!(guest.answer(0, &[], &[2]), [6, 7]);
        assert_eq!(guest.interrupts(), 2);
    }

    #[test]
    fn a_large_request_gets_a_part() {
        let mut guest = Guest::started(counting(), 0);
        assert_eq!(guest.answer(0, &[], &[1 << 20]).len(), MOST);
    }

    #[test]
    fn a_request_without_room_gets_nothing() {
        let mut guest = Guest::started(counting(), 0);
        assert_eq!(guest.answer(0, &[b"read me"], &[]), []);
        assert!(!guest.is_broken());
    }

    #[test]
    fn a_queue_that_is_stopped_gets_nothing_until_it_is_set_up_again() {
        let mut guest = Guest::started(counting(), 0);
        guest.stop_queue(0);
        guest.request(0, &[], &[3]);
        guest.kick(0);
        assert!(guest.used(0).is_empty());
        guest.set_up_queue(0);
        assert_eq!(guest.answer(0, &[], &[2]), [1, 2]);
    }

    #[test]
    fn requests_are_served_after_resume_or_restore() {
        let mut guest = Guest::started(counting(), 0);
        assert_eq!(guest.answer(0, &[], &[2]), [1, 2]);
        guest.pause();
        assert_eq!(guest.answer(0, &[], &[2]), [3, 4]);
        // Made while the device is quiesced.
        guest.mmio.quiesce();
        guest.request(0, &[], &[2]);
        guest.kick(0);
        assert!(guest.used(0).is_empty());
        guest.move_to(counting());
        assert_eq!(guest.used(0)[0].1, [1, 2]);
        assert_eq!(guest.answer(0, &[], &[1]), [3]);
    }

    #[test]
    fn a_buffer_outside_memory_fails_its_request_only() {
        let mut guest = Guest::started(counting(), 0);
        guest.request_outside(0, &[true], 0);
        assert_eq!(guest.used(0).len(), 1);
        assert!(!guest.is_broken());
        assert_eq!(guest.answer(0, &[], &[2]), [1, 2]);
    }

    #[test]
    fn a_source_that_fails_gives_nothing() {
        let mut guest = Guest::started(Rng::new(Box::new(|_| false)), 0);
        assert_eq!(guest.answer(0, &[], &[8]), []);
    }

    #[test]
    fn one_that_is_held_to_limits_gives_the_rest_later() {
        let limits = Limits {
            bandwidth: Some(Bucket {
                size: 5,
                refill_time: Duration::from_secs(3600),
                one_time_burst: 0,
            }),
            ops: None,
        };
        let alarm = FakeAlarm::default();
        let set = Arc::clone(&alarm.0);
        let throttle = Arc::new(Throttle::new(&limits, Box::new(alarm)));
        let device = counting().held_to(Some(Arc::clone(&throttle)));
        let mut guest = Guest::started(device, 0);
        assert_eq!(guest.answer(0, &[], &[3]), [1, 2, 3]);
        guest.request(0, &[], &[3]);
        guest.kick(0);
        assert!(guest.used(0).is_empty());
        assert!(lock(&set).is_some());
        // It rings, and it is too early.
        lock(&guest.device).ready(0);
        assert!(guest.used(0).is_empty());
        throttle.change(&Limits {
            bandwidth: Some(Bucket::per_second(0)),
            ops: None,
        });
        lock(&guest.device).ready(0);
        assert_eq!(guest.used(0)[0].1, [4, 5, 6]);
        assert_eq!(guest.answer(0, &[], &[1]), [7]);
    }
}
