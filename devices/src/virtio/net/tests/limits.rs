//! A card that is held to limits.

use std::time::Duration;

use super::*;
use crate::rate::tests::FakeAlarm;
use crate::rate::{Bucket, Limits};

fn slow(size: u64) -> Option<Bucket> {
    Some(Bucket {
        size,
        refill_time: Duration::from_secs(3600),
        one_time_burst: 0,
    })
}

/// No limit of frames.
const NONE: Option<Bucket> = Some(Bucket {
    size: 0,
    refill_time: Duration::ZERO,
    one_time_burst: 0,
});

fn throttle(bandwidth: Option<Bucket>, ops: Option<Bucket>) -> Arc<Throttle> {
    let limits = Limits { bandwidth, ops };
    Arc::new(Throttle::new(&limits, Box::new(FakeAlarm::default())))
}

fn limited(
    network: &FakeNetwork,
    receive: Option<&Arc<Throttle>>,
    transmit: Option<&Arc<Throttle>>,
) -> TestGuest {
    let card = card(network).held_to([receive.cloned(), transmit.cloned()]);
    Guest::started(card, 0)
}

/// Takes the limit of frames away; it is the only throttle that the card has.
fn lift(guest: &TestGuest, throttle: &Throttle) {
    throttle.change(&Limits {
        bandwidth: NONE,
        ops: NONE,
    });
    wake(guest, 0);
}

#[test]
fn frames_beyond_the_limit_stay_with_the_network() {
    let network = FakeNetwork::default();
    let throttle = throttle(None, slow(3));
    let mut guest = limited(&network, Some(&throttle), None);
    for _ in 0..6 {
        guest.request(RX, &[], &[MOST_BYTES]);
    }
    for seed in 0..5 {
        network.come(0, &frame(&payload(100, seed)));
    }
    guest.kick(RX);
    assert_eq!(guest.used(RX).len(), 3);
    assert_eq!(lock(&network.0).incoming[0].len(), 2);
    // What is sent is not held back.
    guest.request(TX, &[&frame(&payload(60, 1))], &[]);
    guest.kick(TX);
    assert_eq!(network.sent().len(), 1);
    // It is held back over a pause, and an alarm that is early.
    guest.pause();
    wake(&guest, 0);
    assert_eq!(guest.used(RX).len(), 0);
    lift(&guest, &throttle);
    let answers = guest.used(RX);
    let frames: Vec<Vec<u8>> = answers.into_iter().map(|(_, bytes)| bytes).collect();
    assert_eq!(frames.len(), 2);
    assert!(frames[0].starts_with(&seen(&payload(100, 3), 1)));
    assert!(frames[1].starts_with(&seen(&payload(100, 4), 1)));
}

#[test]
fn bytes_that_come_are_counted_when_it_is_known_how_many_they_are() {
    let network = FakeNetwork::default();
    let throttle = throttle(slow(250), None);
    let mut guest = limited(&network, Some(&throttle), None);
    for _ in 0..6 {
        guest.request(RX, &[], &[MOST_BYTES]);
    }
    for seed in 0..6 {
        network.come(0, &frame(&payload(100, seed)));
    }
    guest.kick(RX);
    // The third one is owed for.
    assert_eq!(guest.used(RX).len(), 3);
    lift(&guest, &throttle);
    assert_eq!(guest.used(RX).len(), 3);
}

#[test]
fn frames_beyond_the_limit_stay_in_the_queue() {
    let network = FakeNetwork::default();
    let throttle = throttle(slow(250), None);
    let mut guest = limited(&network, None, Some(&throttle));
    for seed in 0..4 {
        guest.request(TX, &[&frame(&payload(100, seed))], &[]);
    }
    guest.kick(TX);
    assert_eq!(guest.used(TX).len(), 2);
    assert_eq!(network.sent().len(), 2);
    // The network is ready for more, which changes nothing.
    lock(&guest.device).kicked(TX);
    assert_eq!(network.sent().len(), 0);
    lift(&guest, &throttle);
    let sent = network.sent();
    assert_eq!(
        sent,
        [(0, frame(&payload(100, 2))), (0, frame(&payload(100, 3)))]
    );
    assert_eq!(guest.used(TX).len(), 2);
    // A network that is gone takes all that it is given: nothing is to be held back for it.
    throttle.change(&Limits {
        bandwidth: slow(1),
        ops: None,
    });
    network.change(|wire| wire.refuse = Some(FrameError::Gone("it is".to_owned())));
    for seed in 0..4 {
        guest.request(TX, &[&frame(&payload(100, seed))], &[]);
    }
    guest.kick(TX);
    assert_eq!(guest.used(TX).len(), 4);
}

#[test]
fn each_direction_has_its_alarm() {
    let network = FakeNetwork::default();
    let (receive, transmit) = (throttle(None, slow(1)), throttle(None, slow(1)));
    let mut guest = limited(&network, Some(&receive), Some(&transmit));
    assert_eq!(lock(&guest.device).sources().len(), 2);
    for seed in 0..2 {
        guest.request(RX, &[], &[MOST_BYTES]);
        network.come(0, &frame(&payload(100, seed)));
        guest.request(TX, &[&frame(&payload(100, seed))], &[]);
    }
    guest.kick(RX);
    guest.kick(TX);
    assert_eq!((guest.used(RX).len(), guest.used(TX).len()), (1, 1));
    for throttle in [&receive, &transmit] {
        throttle.change(&Limits {
            bandwidth: None,
            ops: NONE,
        });
    }
    wake(&guest, 1);
    assert_eq!((guest.used(RX).len(), guest.used(TX).len()), (0, 1));
    wake(&guest, 0);
    assert_eq!((guest.used(RX).len(), guest.used(TX).len()), (1, 0));
}
