//! Guests and ends of the host that do not keep to the rules.

use super::*;

#[test]
fn a_host_that_does_not_read_stops_the_guest_and_loses_nothing() {
    let mut world = World::new();
    let stream = world.connection(1000, 52);
    let sent = fill(&mut world);
    world.expect_silence();
    // Others are not in its way.
    let other = world.connection(1001, 53);
    world.send(packet(Op::Data, 1001, 53), b"through");
    assert_eq!(read_now(&other), b"through");
    let mut received = Vec::new();
    while received.len() < sent.len() {
        let part = read_now(&stream);
        assert!(!part.is_empty(), "it is stuck");
        received.extend(part);
        world.run();
    }
    assert!(received == sent);
    // And the guest hears of its room.
    let (update, _) = world.inbox.pop_back().expect("an update");
    assert_eq!(Op::of(update.op), Some(Op::CreditUpdate));
    assert!(sent.len() - update.fwd_cnt as usize <= BUFFER as usize / 2);
}

#[test]
fn a_host_that_leaves_unread_data_behind_does_not_hold_the_guest() {
    let mut world = World::new();
    let stream = world.connection(1000, 52);
    fill(&mut world);
    let end = Header {
        flags: SHUT_BOTH,
        ..packet(Op::Shutdown, 1000, 52)
    };
    world.send(end, &[]);
    world.expect_silence();
    drop(stream);
    world.expect(Op::Reset);
    assert_eq!(world.connections(), 0);
}

#[test]
fn a_guest_that_sends_more_than_it_may_loses_its_connection() {
    let mut world = World::new();
    let _stream = world.connection(1000, 52);
    fill(&mut world);
    world.send(packet(Op::Data, 1000, 52), b"x");
    world.expect(Op::Reset);
    assert_eq!(world.connections(), 0);
    assert_eq!(world.faults(), 1);
}

#[test]
fn a_guest_without_room_gets_nothing_until_it_has_some() {
    let mut world = World::new();
    let listener = world.listen(52);
    let small = Header {
        buf_alloc: 10,
        ..packet(Op::Request, 1000, 52)
    };
    world.send(small, &[]);
    world.expect(Op::Response);
    let (mut stream, _) = listener.accept().expect("a connection");
    stream.write_all(b"0123456789abcdef").expect("room");
    assert_eq!(world.expect(Op::Data).1, b"0123456789");
    world.expect(Op::CreditRequest);
    world.expect_silence();
    // Another connection is not in its way.
    let mut other = world.connection(1001, 53);
    other.write_all(b"through").expect("room");
    assert_eq!(world.expect(Op::Data).1, b"through");
    let update = Header {
        buf_alloc: 10,
        fwd_cnt: 4,
        ..packet(Op::CreditUpdate, 1000, 52)
    };
    world.send(update, &[]);
    assert_eq!(world.expect(Op::Data).1, b"abcd");
    world.expect(Op::CreditRequest);
    world.expect_silence();
    // One that takes back what it promised gets nothing either.
    let lie = Header {
        buf_alloc: 2,
        fwd_cnt: 4,
        ..packet(Op::CreditUpdate, 1000, 52)
    };
    world.send(lie, &[]);
    world.expect(Op::CreditRequest);
    world.expect_silence();
}

#[test]
fn a_stuck_end_of_the_host_costs_no_more_than_it_may() {
    let mut world = World::new();
    let mut stream = world.connection(1000, 52);
    world.refill = false;
    let sent = pattern(1 << 20);
    let mut written = 0;
    // The guest has few buffers: the host's end comes to a halt.
    while let Ok(len) = stream.write(&sent[written..]) {
        written += len;
        world.run();
    }
    assert!(written < sent.len());
    world.refill = true;
    world.give(BUFFERS);
    let mut received: Vec<u8> = Vec::new();
    while received.len() < sent.len() {
        world.run();
        assert!(!world.inbox.is_empty(), "it is stuck");
        received.extend(world.inbox.drain(..).flat_map(|(_, data)| data));
        written += stream.write(&sent[written..]).unwrap_or(0);
    }
    assert!(received == sent);
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to() {
    let mut world = World::new();
    world.refill = false;
    let mut taken = 0;
    for _ in 0..3 * MOST_RESETS {
        let header = packet(Op::Request, 1, 1).to_bytes();
        world.guest.request(TRANSMIT, &[&header], &[]);
        world.guest.kick(TRANSMIT);
        let used = world.guest.used(TRANSMIT).len();
        if used == 0 {
            break;
        }
        taken += used;
    }
    assert_eq!(taken, MOST_RESETS + BUFFERS);
    // With buffers it goes on, and each is answered.
    world.refill = true;
    world.give(BUFFERS);
    world.run();
    taken += world.guest.used(TRANSMIT).len();
    assert_eq!(taken, MOST_RESETS + BUFFERS + 1);
    assert_eq!(world.inbox.len(), taken);
}

#[test]
fn packets_that_are_none_are_counted() {
    let mut world = World::new();
    world.guest.request(TRANSMIT, &[b"short"], &[]);
    world.guest.request(TRANSMIT, &[], &[100]);
    world.guest.kick(TRANSMIT);
    assert_eq!(world.guest.used(TRANSMIT).len(), 2);
    assert_eq!(world.faults(), 2);
    let stranger = Header {
        src_cid: 99,
        ..packet(Op::Request, 1000, 52)
    };
    world.send(stranger, &[]);
    assert_eq!(world.faults(), 3);
    world.expect_silence();
    assert!(!world.guest.is_broken());
}

#[test]
fn what_cannot_be_reached_is_refused_in_its_own_name() {
    let mut world = World::new();
    let elsewhere = Header {
        dst_cid: 99,
        ..packet(Op::Request, 1000, 52)
    };
    world.send(elsewhere, &[]);
    assert_eq!(world.expect(Op::Reset).0.src_cid, 99);
    let datagram = Header {
        kind: 3,
        ..packet(Op::Request, 1000, 52)
    };
    world.send(datagram, &[]);
    assert_eq!(world.expect(Op::Reset).0.kind, 3);
    for op in [Op::Data, Op::Shutdown, Op::CreditRequest, Op::Response] {
        world.send(packet(op, 1000, 52), &[]);
        world.expect(Op::Reset);
    }
    // An answer to an answer would go on for ever.
    world.send(packet(Op::Reset, 1000, 52), &[]);
    world.expect_silence();
}

#[test]
fn packets_against_the_rules_end_their_connection() {
    let longer = Header {
        len: 100,
        ..packet(Op::Data, 1000, 52)
    };
    let longest = Header {
        len: u32::MAX,
        ..packet(Op::Data, 1000, 52)
    };
    let unknown = Header {
        op: 77,
        ..packet(Op::Data, 1000, 52)
    };
    let response = packet(Op::Response, 1000, 52);
    let request = packet(Op::Request, 1000, 52);
    for header in [longer, longest, unknown, response, request] {
        let mut world = World::new();
        let stream = world.connection(1000, 52);
        world.send_raw(header, b"data");
        world.expect(Op::Reset);
        assert!(is_ended(&stream), "{header:?}");
        assert_eq!(world.connections(), 0, "{header:?}");
        assert_eq!(world.faults(), 1, "{header:?}");
    }
}

#[test]
fn buffers_without_room_are_given_back() {
    let mut world = World::asleep();
    world.start();
    for room in [1, HEADER] {
        world.guest.request(RECEIVE, &[], &[room]);
    }
    world.send(packet(Op::Request, 1000, 52), &[]);
    let used = world.guest.used(RECEIVE);
    assert!(used.iter().all(|(_, data)| data.is_empty()));
    assert_eq!(used.len(), 2);
    world.give(1);
    world.expect(Op::Reset);
    assert_eq!(world.faults(), 2);
}

#[test]
fn a_buffer_outside_memory_fails_its_request_only() {
    let mut world = World::new();
    let mut stream = world.connection(5, 6);
    let faults = world.faults();
    world.guest.request_outside(TRANSMIT, &[false, false], 0);
    world.guest.request_outside(RECEIVE, &[true], 0);
    assert_eq!(world.guest.used(TRANSMIT).len(), 1);
    assert!(world.faults() > faults);
    // What still lies in memory of a packet is not all of it: its connection ends.
    world.send(packet(Op::Data, 5, 6), b"heard");
    world.run();
    assert_eq!(read_now(&stream), b"heard");
    stream.write_all(b"there").expect("room");
    assert_eq!(world.expect(Op::Data).1, b"there");
    let header = Header {
        len: 64,
        ..packet(Op::Data, 5, 6)
    };
    let header = world.guest.buffer(&header.to_bytes());
    let outside = Guest::<Vsock>::OUTSIDE;
    world
        .guest
        .chain(TRANSMIT, &[(header, 44, 0), (outside, 64, 0)]);
    world.guest.kick(TRANSMIT);
    world.expect(Op::Reset);
    assert!(is_ended(&stream));
    assert!(!world.guest.is_broken());
}
