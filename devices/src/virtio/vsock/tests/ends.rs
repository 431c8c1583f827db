//! How connections end, from either side.

use super::*;

#[test]
fn the_hosts_end_of_sending_comes_behind_its_data() {
    let mut world = World::new();
    let mut stream = world.connection(1000, 52);
    let sent = pattern(10 * ROOM);
    stream.write_all(&sent).expect("room");
    stream.shutdown(Shutdown::Write).expect("a socket");
    let mut received = Vec::new();
    while received.len() < sent.len() {
        received.extend(world.expect(Op::Data).1);
    }
    assert!(received == sent);
    assert_eq!(world.expect(Op::Shutdown).0.flags, SHUT_SEND);
    // The other direction works on.
    world.send(packet(Op::Data, 1000, 52), b"still here");
    assert_eq!(read_now(&stream), b"still here");
    let end = Header {
        flags: SHUT_BOTH,
        ..packet(Op::Shutdown, 1000, 52)
    };
    world.send(end, &[]);
    world.expect(Op::Reset);
    assert!(is_ended(&stream));
    assert_eq!(world.connections(), 0);
}

#[test]
fn the_guests_end_of_sending_leaves_the_other_direction() {
    let mut world = World::new();
    let mut stream = world.connection(1000, 52);
    world.send(packet(Op::Data, 1000, 52), b"that is all");
    let end = Header {
        flags: SHUT_SEND,
        ..packet(Op::Shutdown, 1000, 52)
    };
    world.send(end, &[]);
    assert_eq!(read_now(&stream), b"that is all");
    assert!(is_ended(&stream));
    stream.write_all(b"not for me").expect("room");
    assert_eq!(world.expect(Op::Data).1, b"not for me");
    // What comes after the end breaks the rules.
    world.send(packet(Op::Data, 1000, 52), b"one more thing");
    world.expect(Op::Reset);
    assert_eq!(world.faults(), 1);
}

#[test]
fn a_guest_that_takes_no_more_stops_the_hosts_end() {
    let mut world = World::new();
    let mut stream = world.connection(1000, 52);
    let end = Header {
        flags: SHUT_RECEIVE,
        ..packet(Op::Shutdown, 1000, 52)
    };
    world.send(end, &[]);
    let error = stream.write_all(b"too late").expect_err("nobody reads it");
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    world.send(packet(Op::Data, 1000, 52), b"bye");
    assert_eq!(read_now(&stream), b"bye");
}

#[test]
fn the_hosts_close_is_told_and_answered() {
    let mut world = World::new();
    let mut stream = world.connection(1000, 52);
    stream.write_all(b"bye").expect("room");
    drop(stream);
    assert_eq!(world.expect(Op::Data).1, b"bye");
    assert_eq!(world.expect(Op::Shutdown).0.flags, SHUT_BOTH);
    // What was under way is nobody's any more, but the guest gets its room back.
    world.send(packet(Op::Data, 1000, 52), b"hello?");
    world.send(packet(Op::CreditRequest, 1000, 52), &[]);
    assert_eq!(world.expect(Op::CreditUpdate).0.fwd_cnt, 6);
    world.send(packet(Op::Reset, 1000, 52), &[]);
    assert_eq!(world.connections(), 0);
    world.expect_silence();
}

#[test]
fn the_guests_close_waits_for_the_host_to_take_all() {
    let mut world = World::new();
    let stream = world.connection(1000, 52);
    let sent = fill(&mut world);
    let end = Header {
        flags: SHUT_BOTH,
        ..packet(Op::Shutdown, 1000, 52)
    };
    world.send(end, &[]);
    world.expect_silence();
    let mut received = Vec::new();
    while received.len() < sent.len() {
        received.extend(read_now(&stream));
        world.run();
    }
    assert!(received == sent);
    // Like each packet of a connection it says how much room there is.
    let (reset, _) = world.expect(Op::Reset);
    assert_eq!(
        (reset.buf_alloc, reset.fwd_cnt),
        (BUFFER, sent.len() as u32)
    );
    assert!(is_ended(&stream));
}

#[test]
fn a_guest_reset_closes_all_and_the_next_driver_starts_anew() {
    let mut world = World::new();
    let stream = world.connection(1000, 52);
    let asked = world.dial("CONNECT 9\n");
    world.run();
    world.guest.write(0x70, 0);
    assert!(is_ended(&stream));
    assert!(is_ended(&asked));
    assert_eq!(world.connections(), 0);
    world.inbox.clear();
    world.start();
    world.give(BUFFERS);
    world.send(packet(Op::Data, 1000, 52), b"old");
    world.expect(Op::Reset);
    let stream = world.connection(1000, 53);
    world.send(packet(Op::Data, 1000, 53), b"new");
    assert_eq!(read_now(&stream), b"new");
}
