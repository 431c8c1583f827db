//! Buffers that are not in memory.

use super::*;

#[test]
fn a_buffer_outside_memory_fails_its_request_only() {
    let network = FakeNetwork::default();
    let features = feature::CTRL_VQ | feature::CTRL_MAC_ADDR | feature::MRG_RXBUF;
    let mut guest = started(&network, features);
    let bad = |guest: &mut TestGuest, queue: usize, parts: &[bool], outside: usize| {
        let before = guest.mmio.faults();
        guest.request_outside(queue, parts, outside);
        assert_eq!(guest.used(queue).len(), 1, "queue {queue}: one answer");
        assert_eq!(guest.mmio.faults(), before + 1, "queue {queue}");
        assert!(!guest.is_broken(), "queue {queue}");
    };
    network.come(0, &frame(&payload(100, 1)));
    wake(&guest, 0);
    bad(&mut guest, 0, &[true], 0);
    bad(&mut guest, 0, &[true, true], 1);
    // More of them than one turn takes.
    for _ in 0..60 {
        guest.chain(0, &[(TestGuest::OUTSIDE, 2048, 2)]);
    }
    guest.kick(0);
    assert_eq!(guest.used(0).len(), 60);
    guest.request(0, &[], &[2048]);
    guest.kick(0);
    assert_eq!(guest.used(0)[0].1, seen(&payload(100, 1), 1));
    bad(&mut guest, 1, &[false, false], 0);
    bad(&mut guest, 1, &[false, false], 1);
    assert!(network.sent().is_empty());
    guest.request(1, &[&frame(&payload(100, 2))], &[]);
    guest.kick(1);
    assert_eq!(network.sent().len(), 1);
    bad(&mut guest, 2, &[false, true], 0);
    bad(&mut guest, 2, &[false, true], 1);
    let mac = [1, 1, 2, 0, 0, 0, 0, 7];
    assert_eq!(control(&mut guest, 2, &mac), [0]);
}
