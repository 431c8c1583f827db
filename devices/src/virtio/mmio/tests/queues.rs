//! Queues that are stopped and set up again while the device works.

use super::*;

#[test]
fn a_queue_stops_when_the_driver_says_so() {
    let mut guest = guest();
    guest.start(0);
    guest.request(0, &[b"x"], &[6]);
    guest.request(1, &[b"x"], &[6]);
    guest.kick(0);
    guest.kick(1);
    // A kick that is still pending.
    guest.write(QUEUE_NOTIFY, 0);
    guest.write(QUEUE_SEL.into(), 0);
    guest.write(QUEUE_READY.into(), 0);
    assert_eq!(
        guest.read(QUEUE_READY.into()),
        0,
        "the driver reads until it is"
    );
    assert_eq!(guest.mmio.faults(), 0, "it is no fault");
    assert!(guest.mmio.kicks()[0].read().is_err(), "it led nowhere");
    // Requests in flight there access nothing; the other queue keeps working.
    let interrupts = guest.interrupts();
    lock(&guest.device).answer_all();
    assert!(guest.used(0).is_empty());
    assert_eq!(guest.used(1)[0].1, b"answer");
    assert_eq!(guest.interrupts(), interrupts + 1);
    // Nothing more completes there, and a second stop has no effect.
    guest.request(0, &[b"x"], &[6]);
    guest.kick(0);
    guest.write(QUEUE_READY.into(), 0);
    assert!(lock(&guest.device).kept.is_empty());
    assert_eq!(guest.read(STATUS.into()), 15);
}

#[test]
fn a_queue_that_was_stopped_is_set_up_again() {
    let mut guest = guest();
    guest.start(0);
    for round in 0..10 {
        guest.request(0, &[b"x"], &[6]);
        guest.kick(0);
        if round % 2 == 0 {
            lock(&guest.device).answer_all();
            assert_eq!(guest.used(0)[0].1, b"answer");
        }
        guest.write(QUEUE_SEL.into(), 0);
        guest.write(QUEUE_READY.into(), 0);
        guest.set_up_queue(0);
        assert_eq!(guest.read(QUEUE_READY.into()), 1);
    }
    // Requests that are already available are processed without a kick.
    guest.write(QUEUE_READY.into(), 0);
    guest.write(QUEUE_SIZE.into(), 8);
    guest.write(QUEUE_READY.into(), 1);
    assert_eq!(guest.mmio.kicks()[0].read().expect("a kick"), 1);
    assert_eq!(
        lock(&guest.device).queues[0]
            .as_ref()
            .expect("a queue")
            .size(),
        8
    );
    assert_eq!(guest.mmio.faults(), 0);
    assert_eq!(lock(&guest.device).stops, 0);
}

#[test]
fn a_queue_that_was_left_out_is_set_up_later() {
    let mut guest = guest();
    guest.negotiate(0);
    guest.set_up_queue(0);
    guest.write(STATUS.into(), 15);
    guest.set_up_queue(1);
    guest.request(1, &[b"x"], &[6]);
    guest.kick(1);
    lock(&guest.device).answer_all();
    assert_eq!(guest.used(1)[0].1, b"answer");
    assert_eq!(guest.mmio.faults(), 0);
}

#[test]
fn a_queue_that_is_set_up_wrongly_asks_for_a_reset() {
    let mut guest = guest();
    guest.start(0);
    guest.write(QUEUE_SEL.into(), 0);
    guest.write(QUEUE_READY.into(), 0);
    guest.write(QUEUE_DESC.into(), 1);
    guest.write(QUEUE_READY.into(), 1);
    assert!(guest.is_broken());
    assert!(lock(&guest.device).queues[0].is_none());
    // The device never had it.
    guest.write(QUEUE_READY.into(), 0);
    assert_eq!(lock(&guest.device).queue_stops, 1);
    guest.start(0);
    assert!(!guest.is_broken());
    lock(&guest.device).refuses = true;
    guest.write(QUEUE_SEL.into(), 0);
    guest.write(QUEUE_READY.into(), 0);
    guest.write(QUEUE_READY.into(), 1);
    assert!(guest.is_broken());
}

#[test]
fn a_device_that_did_not_start_is_not_told_of_queues() {
    let mut guest = guest();
    lock(&guest.device).refuses = true;
    guest.negotiate(0);
    guest.write(STATUS.into(), 15);
    for ready in [1, 0, 1] {
        guest.write(QUEUE_READY.into(), ready);
        assert_eq!(guest.read(QUEUE_READY.into()), ready);
    }
    assert!(lock(&guest.device).queues.iter().all(Option::is_none));
}
