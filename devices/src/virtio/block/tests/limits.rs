//! A disk that is held to limits.

use super::*;
use crate::rate::tests::FakeAlarm;
use crate::rate::{Bucket, Limits};

/// A bucket that is refilled in an hour.
fn slow(size: u64) -> Bucket {
    Bucket {
        size,
        refill_time: Duration::from_secs(3600),
        one_time_burst: 0,
    }
}

struct Limited {
    guest: Guest<Block>,
    fake: Fake,
    throttle: Arc<Throttle>,
    alarm: Arc<Mutex<Option<Duration>>>,
}

fn limited(limits: Limits) -> Limited {
    let alarm = FakeAlarm::default();
    let set = Arc::clone(&alarm.0);
    let throttle = Arc::new(Throttle::new(&limits, Box::new(alarm)));
    throttle.heard();
    let fake = Fake::new();
    let shape = Shape {
        queues: 2,
        ..shape()
    };
    let device = Block::new(&shape, Box::new(fake.clone()));
    let device = device.held_to(Some(Arc::clone(&throttle)));
    Limited {
        guest: Guest::started(device, ALL | FEATURE_MQ),
        fake,
        throttle,
        alarm: set,
    }
}

impl Limited {
    /// The alarm goes off, as it is said to; it is the device's only source.
    fn alarmed(&mut self) {
        assert!(self.alarm.lock().expect("sound").is_some());
        lock(&self.guest.device).ready(0);
    }
}

#[test]
fn requests_beyond_the_limit_wait_for_the_alarm() {
    let mut limited = limited(Limits {
        bandwidth: None,
        ops: Some(slow(3)),
    });
    for queue in [0, 1] {
        for sector in 0..4 {
            limited
                .guest
                .request(queue, &[&header(IN, sector)], &[512, 1]);
        }
    }
    limited.guest.kick(0);
    limited.guest.kick(1);
    assert_eq!(limited.guest.used(0).len(), 3);
    assert_eq!(limited.guest.used(1).len(), 0);
    let wait = limited.alarm.lock().expect("sound").expect("an alarm");
    assert!(wait > Duration::from_secs(1190) && wait <= Duration::from_secs(1200));
    // What rings too early finds none, and asks for another.
    limited.alarmed();
    assert_eq!(limited.fake.store().seen.len(), 3);
    assert!(limited.alarm.lock().expect("sound").is_some());
    // More room, while it waits: at once.
    limited.throttle.change(&Limits {
        bandwidth: None,
        ops: Some(slow(4)),
    });
    limited.alarmed();
    assert_eq!(limited.fake.store().seen.len(), 7);
    limited.throttle.change(&Limits {
        bandwidth: None,
        ops: Some(slow(0)),
    });
    limited.alarmed();
    assert_eq!(limited.guest.used(0).len(), 1);
    assert_eq!(limited.guest.used(1).len(), 4);
}

#[test]
fn bytes_are_those_of_data() {
    let mut limited = limited(Limits {
        bandwidth: Some(slow(2048)),
        ops: None,
    });
    let guest = &mut limited.guest;
    // Neither has data: nothing is taken for them.
    assert_eq!(ask(guest, &header(FLUSH, 0), 1), OK);
    let zero = [header(WRITE_ZEROES, 0), range(0, 64, 0)].concat();
    assert_eq!(ask(guest, &zero, 1), OK);
    assert_eq!(ask(guest, &header(IN, 0), 1537), OK);
    guest.request(0, &[&header(IN, 0)], &[1024, 1]);
    guest.kick(0);
    assert_eq!(guest.used(0).len(), 0);
}

#[test]
fn more_than_the_bucket_holds_goes_alone() {
    let mut limited = limited(Limits {
        bandwidth: Some(slow(1024)),
        ops: None,
    });
    assert_eq!(ask(&mut limited.guest, &header(IN, 0), 4097), OK);
    limited.guest.request(0, &[&header(IN, 0)], &[512, 1]);
    limited.guest.kick(0);
    assert_eq!(limited.guest.used(0).len(), 0);
}

#[test]
fn one_that_is_held_back_is_paused_reset_and_stopped_as_others() {
    let mut limited = limited(Limits {
        bandwidth: None,
        ops: Some(slow(1)),
    });
    for sector in 0..3 {
        limited.guest.request(0, &[&header(IN, sector)], &[512, 1]);
    }
    limited.guest.kick(0);
    assert_eq!(limited.guest.used(0).len(), 1);
    limited.guest.pause();
    // Held back in the next life of the device, too.
    limited.guest.kick(0);
    assert_eq!(limited.guest.used(0).len(), 0);
    let off = Limits {
        bandwidth: None,
        ops: Some(slow(0)),
    };
    limited.throttle.change(&off);
    limited.alarmed();
    assert_eq!(limited.guest.used(0).len(), 2);
    limited.guest.start(ALL);
    assert_eq!(
        limited.guest.answer(0, &[&header(IN, 1)], &[512, 1])[512],
        OK
    );
    limited.guest.stop_queue(0);
    assert_eq!(limited.guest.mmio.faults(), 0);
}
