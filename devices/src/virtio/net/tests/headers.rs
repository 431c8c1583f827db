//! What the header of a frame that comes may say, by what the driver agreed to (virtio 1.2, sections
//! 5.1.4.1 and 5.1.6.4.1).

use super::*;

/// VIRTIO_NET_HDR_F_* and VIRTIO_NET_HDR_GSO_*.
const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const RSC_INFO: u8 = 4;
const TCPV4: u8 = 1;
const UDP: u8 = 3;
const TCPV6: u8 = 4;
const UDP_L4: u8 = 5;
const ECN: u8 = 0x80;

const ALL: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;

/// A network that can do everything.
fn network() -> FakeNetwork {
    FakeNetwork::new(Wire {
        offloads: ALL,
        ..Wire::default()
    })
}

/// A frame whose header has these flags and this type, and numbers in its other fields.
fn said(flags: u8, kind: u8) -> Vec<u8> {
    let header = [flags, kind, 54, 0, 0xa0, 5, 34, 0, 16, 0, 0, 0];
    [&header[..], b"an Ethernet frame of some bytes"].concat()
}

/// What the driver gets of a frame; nothing where it is dropped.
fn got(guest: &mut TestGuest, network: &FakeNetwork, frame: &[u8]) -> Option<Vec<u8>> {
    network.come(0, frame);
    wake(guest, 0);
    let used = guest.used(RX);
    // The buffer of one that was dropped serves the next.
    if !used.is_empty() {
        guest.request(RX, &[], &[1526]);
    }
    used.into_iter().next().map(|(_, data)| data)
}

fn started_with_room(network: &FakeNetwork, features: u64) -> TestGuest {
    let mut guest = started(network, features);
    guest.request(RX, &[], &[1526]);
    guest.kick(RX);
    guest
}

#[test]
fn a_driver_without_checksums_gets_headers_that_say_nothing() {
    let network = network();
    let mut guest = started_with_room(&network, MRG_RXBUF);
    // A TAP says so of what the host has looked at.
    let frame = got(&mut guest, &network, &said(DATA_VALID, 0)).expect("a frame");
    assert_eq!(frame[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(frame[HEADER..], said(0, 0)[HEADER..]);
    assert_eq!(guest.mmio.faults(), 0);
    assert_eq!(
        got(&mut guest, &network, &said(NEEDS_CSUM, 0)),
        None,
        "its checksum is not there"
    );
    assert_eq!(guest.mmio.faults(), 1);
    assert!(!guest.is_broken());
}

#[test]
fn a_driver_gets_frames_to_be_segmented_of_the_kinds_that_it_agreed_to() {
    let network = network();
    for (kind, needed) in [
        (TCPV4, GUEST_TSO4),
        (TCPV6, GUEST_TSO6),
        (UDP_L4, GUEST_USO4 | GUEST_USO6),
        (TCPV4 | ECN, GUEST_TSO4 | GUEST_ECN),
        (UDP, 0),
        (0x7f, 0),
    ] {
        let mut lacks = started_with_room(&network, MRG_RXBUF | ALL & !needed);
        let frame = said(NEEDS_CSUM, kind);
        assert_eq!(got(&mut lacks, &network, &frame), None, "type {kind}");
        assert_eq!(lacks.mmio.faults(), 1);
        let after = got(&mut lacks, &network, &said(DATA_VALID, 0)).expect("the next");
        assert_eq!(after[0], DATA_VALID);
        if needed != 0 {
            let mut has = started_with_room(&network, MRG_RXBUF | GUEST_CSUM | needed);
            let frame = got(&mut has, &network, &frame).expect("a frame");
            assert_eq!(frame[..2], [NEEDS_CSUM, kind]);
            assert_eq!(frame[2..10], said(0, 0)[2..10]);
            assert_eq!(has.mmio.faults(), 0);
        }
    }
}

#[test]
fn flags_that_nobody_agreed_to_are_not_shown() {
    let network = network();
    let mut guest = started_with_room(&network, MRG_RXBUF | GUEST_CSUM);
    let frame = got(&mut guest, &network, &said(DATA_VALID | RSC_INFO, 0)).expect("a frame");
    assert_eq!(frame[0], DATA_VALID);
}

#[test]
fn what_the_control_queue_takes_back_is_not_asked_of_the_driver() {
    let network = network();
    let features = MRG_RXBUF | CTRL_VQ | CTRL_GUEST_OFFLOADS | GUEST_CSUM | GUEST_TSO4;
    let mut guest = started_with_room(&network, features);
    let large = said(NEEDS_CSUM, TCPV4);
    assert!(got(&mut guest, &network, &large).is_some());
    let set = |offloads: u64| [&[5, 0][..], &offloads.to_le_bytes()].concat();
    assert_eq!(control(&mut guest, CONTROL, &set(0)), [0]);
    // The host had it before it heard of that.
    assert_eq!(got(&mut guest, &network, &large), None);
    assert_eq!(
        control(&mut guest, CONTROL, &set(GUEST_CSUM | GUEST_TSO4)),
        [0]
    );
    assert!(got(&mut guest, &network, &large).is_some());
}

#[test]
fn no_frame_is_longer_than_the_mtu_that_the_driver_was_told() {
    for (features, wanted) in [(MTU, false), (0, true)] {
        let network = network();
        network.change(|wire| wire.mtu = Some(1000));
        let mut guest = started_with_room(&network, MRG_RXBUF | GUEST_CSUM | GUEST_TSO4 | features);
        // With a VLAN tag it is as long as it may be.
        let longest = [&[0; HEADER][..], &payload(1018, 1)].concat();
        assert!(got(&mut guest, &network, &longest).is_some());
        let longer = [&[0; HEADER][..], &payload(1019, 1)].concat();
        assert_eq!(got(&mut guest, &network, &longer).is_some(), wanted);
        assert_eq!(guest.mmio.faults(), u64::from(!wanted));
        // What is to be segmented may be longer.
        let mut large = said(NEEDS_CSUM, TCPV4);
        large.extend(payload(1400, 2));
        assert!(got(&mut guest, &network, &large).is_some());
    }
}

#[test]
fn an_mtu_that_no_driver_could_use_is_not_told() {
    for (mtu, told) in [(67, 0), (68, 68), (65_535, 65_535)] {
        let network = network();
        network.change(|wire| wire.mtu = Some(mtu));
        let mut guest = Guest::new(card(&network));
        let features = lock(&guest.device).features();
        assert_eq!(features & MTU != 0, told != 0, "{mtu}");
        assert_eq!(guest.read(0x108) >> 16, told);
        // Nor does it change, whatever the host does with its own.
        network.change(|wire| {
            wire.mtu = Some(1400);
            wire.woken = Some(SourceEvent::Link(false));
        });
        guest.start(features);
        wake(&guest, 0);
        assert_eq!(guest.read(0x108) >> 16, told);
    }
}
