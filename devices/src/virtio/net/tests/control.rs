//! The control queue.

use super::*;

#[test]
fn the_control_queue_sets_the_address() {
    let network = FakeNetwork::default();
    let mut guest = started(&network, CTRL_VQ | CTRL_MAC_ADDR);
    assert_eq!(control(&mut guest, CONTROL, &[1, 1, 2, 1, 1, 1, 1, 9]), [0]);
    assert_eq!(guest.read(0x100), 0x0101_0102);
    for wrong in [[1, 1, 3, 1, 1, 1, 1, 9], [1, 1, 0, 0, 0, 0, 0, 0]] {
        assert_eq!(control(&mut guest, CONTROL, &wrong), [1]);
    }
    assert_eq!(control(&mut guest, CONTROL, &[1, 1, 2, 2]), [1], "short");
    assert_eq!(guest.read(0x100), 0x0101_0102);
    assert_eq!(guest.mmio.faults(), 3);
    // The next driver finds the card as it was.
    guest.start(0);
    assert_eq!(guest.read(0x100), 0x0000_0002);
}

#[test]
fn the_control_queue_sets_the_offloads() {
    let network = FakeNetwork::new(Wire {
        offloads: GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6,
        ..Wire::default()
    });
    let features = CTRL_VQ | CTRL_GUEST_OFFLOADS | GUEST_CSUM | GUEST_TSO4;
    let mut guest = started(&network, features);
    let configured = || lock(&network.0).configured;
    assert_eq!(configured().1 & GUEST_OFFLOADS, GUEST_CSUM | GUEST_TSO4);
    let set = |offloads: u64| [&[5, 0][..], &offloads.to_le_bytes()].concat();
    assert_eq!(control(&mut guest, CONTROL, &set(GUEST_CSUM)), [0]);
    assert_eq!(configured(), (1, GUEST_CSUM));
    let wrong = set(GUEST_CSUM | GUEST_TSO6);
    assert_eq!(control(&mut guest, CONTROL, &wrong), [1]);
    network.change(|wire| wire.refuses_configuration = true);
    assert_eq!(control(&mut guest, CONTROL, &set(0)), [1]);
    assert_eq!(configured(), (1, GUEST_CSUM));
}

#[test]
fn what_was_not_offered_is_refused() {
    let network = FakeNetwork::default();
    let mut guest = started(&network, CTRL_VQ);
    let requests = [
        &[0, 0, 1][..],
        &[4, 0, 1, 0],
        &[1, 1, 2, 1, 1, 1, 1, 9],
        &[9, 9, 9],
    ];
    for request in requests {
        assert_eq!(control(&mut guest, CONTROL, request), [1], "{request:?}");
    }
    assert_eq!(guest.mmio.faults(), 4);
    assert!(!guest.is_broken());
}

#[test]
fn a_control_request_without_sense_breaks_the_card() {
    for (readable, writable) in [(&[1][..], &[1][..]), (&[1, 1, 2], &[])] {
        let mut guest = started(&FakeNetwork::default(), CTRL_VQ);
        guest.request(CONTROL, &[readable], writable);
        guest.kick(CONTROL);
        assert!(guest.is_broken());
    }
}

#[test]
fn frames_go_by_the_pairs_that_the_driver_uses() {
    let network = FakeNetwork::new(Wire {
        pairs: 3,
        ..Wire::default()
    });
    let mut guest = started(&network, CTRL_VQ | MQ | MRG_RXBUF);
    let control_queue = 6;
    assert_eq!(lock(&network.0).configured.0, 1);
    // Not in use yet: nothing comes, what is sent goes nowhere.
    network.come(1, &frame(b"on the second pair"));
    guest.request(2, &[], &[1526]);
    guest.kick(2);
    assert_eq!(guest.used(2), []);
    guest.answer(3, &[&frame(b"not sent by this")], &[]);
    assert_eq!(network.sent(), []);
    for wrong in [0, 4] {
        assert_eq!(control(&mut guest, control_queue, &[4, 0, wrong, 0]), [1]);
    }
    assert_eq!(control(&mut guest, control_queue, &[4, 0, 2, 0]), [0]);
    assert_eq!(lock(&network.0).configured.0, 2);
    assert_eq!(guest.used(2)[0].1, seen(b"on the second pair", 1));
    guest.answer(3, &[&frame(b"sent by this one")], &[]);
    assert_eq!(network.sent(), [(1, frame(b"sent by this one"))]);
    // Without MQ the control queue is the third one.
    guest.start(CTRL_VQ | CTRL_MAC_ADDR);
    assert_eq!(control(&mut guest, CONTROL, &[1, 1, 2, 1, 1, 1, 1, 9]), [0]);
}

#[test]
fn queues_of_a_card_stop_one_by_one() {
    let network = FakeNetwork::default();
    let mut guest = started(&network, CTRL_VQ | CTRL_MAC_ADDR);
    guest.stop_queue(0);
    guest.request(0, &[], &[2000]);
    guest.kick(0);
    network.come(0, &frame(&payload(60, 1)));
    wake(&guest, 0);
    assert!(guest.used(0).is_empty());
    // It sends all the same.
    guest.request(1, &[&frame(&payload(60, 2))], &[]);
    guest.kick(1);
    assert_eq!(network.sent().len(), 1);
    guest.stop_queue(1);
    guest.request(1, &[&frame(&payload(60, 3))], &[]);
    guest.kick(1);
    assert!(network.sent().is_empty());
    guest.set_up_queue(0);
    guest.request(0, &[], &[2000]);
    guest.kick(0);
    assert_eq!(
        guest.used(0)[0].1,
        seen(&payload(60, 1), 1),
        "it waited at the network"
    );
    guest.set_up_queue(1);
    guest.request(1, &[&frame(&payload(60, 4))], &[]);
    guest.kick(1);
    assert_eq!(network.sent()[0].1, frame(&payload(60, 4)));
    guest.stop_queue(CONTROL as u32);
    guest.request(CONTROL, &[&[1, 1], &[2; 6]], &[1]);
    guest.kick(CONTROL);
    assert!(guest.used(CONTROL).is_empty());
    guest.set_up_queue(CONTROL as u32);
    assert_eq!(control(&mut guest, CONTROL, &[1, 1, 2, 2, 2, 2, 2, 2]), [0]);
    assert_eq!(guest.mmio.faults(), 0);
}
