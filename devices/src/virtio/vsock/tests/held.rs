//! A machine that is held while connections are open, and goes on with this device or another one.

use super::*;

impl World {
    /// The machine goes on with another device, elsewhere: at other sockets.
    fn move_on(&mut self) {
        let other = World::asleep();
        let World {
            guest,
            name,
            reactor,
            ..
        } = other;
        let Guest { device, mmio, .. } = guest;
        drop(mmio);
        let device = Arc::into_inner(device).expect("nobody else has it");
        self.guest
            .move_to(device.into_inner().expect("nobody panicked"));
        (self.name, self.reactor) = (name, reactor);
    }

    /// Gives the device buffers for events.
    fn give_events(&mut self, sizes: &[usize]) {
        for size in sizes {
            self.guest.request(EVENTS, &[], &[*size]);
        }
        self.guest.kick(EVENTS);
    }
}

#[test]
fn connections_stay_while_the_machine_is_held() {
    let mut world = World::new();
    world.give_events(&[8]);
    let mut stream = world.connection(1000, 52);
    world.guest.mmio.quiesce();
    // What comes meanwhile is noticed, and waits.
    stream.write_all(b"hello").expect("room");
    lock(&world.guest.device).ready(0);
    let events = world.reactor.wait(0, &mut [EpollEvent::default()]);
    assert_eq!(
        events.expect("a wait"),
        0,
        "it is not woken again and again"
    );
    assert!(world.guest.used(RECEIVE).is_empty());
    world.guest.mmio.resume();
    assert_eq!(world.expect(Op::Data).1, b"hello");
    world.send(packet(Op::Data, 1000, 52), b"well");
    assert_eq!(read_now(&stream), b"well");
    assert!(world.guest.used(EVENTS).is_empty());
    assert_eq!(world.faults(), 0);
}

#[test]
fn a_guest_that_goes_on_elsewhere_hears_that_its_connections_are_no_more() {
    let mut world = World::new();
    let stream = world.connection(1000, 52);
    // A packet that nobody is there for, and no buffer for the answer.
    world.refill = false;
    while !world.guest.used(RECEIVE).is_empty() {}
    world.move_on();
    assert!(is_ended(&stream));
    assert_eq!(world.connections(), 0);
    // Too short a buffer tells nothing.
    world.give_events(&[2, 4]);
    let told = world.guest.used(EVENTS);
    assert_eq!(told.len(), 1);
    world.guest.kick(EVENTS);
    assert_eq!(world.guest.used(EVENTS)[0].1, [0; 4], "TRANSPORT_RESET");
    world.give_events(&[4]);
    assert!(world.guest.used(EVENTS).is_empty(), "once");
    world.refill = true;
    let stream = world.connection(1001, 52);
    world.send(packet(Op::Data, 1001, 52), b"well");
    assert_eq!(read_now(&stream), b"well");
    assert_eq!(world.faults(), 0);
}

#[test]
fn without_connections_nothing_is_told() {
    let mut world = World::new();
    world.give_events(&[4]);
    world.move_on();
    world.guest.kick(EVENTS);
    assert!(world.guest.used(EVENTS).is_empty());
    world.connection(1000, 52);
}

#[test]
fn answers_that_wait_for_buffers_go_with_the_guest() {
    let mut world = World::asleep();
    world.start();
    for port in 0..3 {
        world.send(packet(Op::Request, port, 9), &[]);
    }
    world.move_on();
    world.give(3);
    for port in 0..3 {
        assert_eq!(world.expect(Op::Reset).0.dst_port, port);
    }
    world.expect_silence();
}

#[test]
fn a_queue_that_the_driver_stopped_stays_so() {
    for moves in [false, true] {
        let mut world = World::new();
        world.guest.stop_queue(TRANSMIT as u32);
        match moves {
            false => world.guest.pause(),
            true => world.move_on(),
        }
        world.guest.set_up_queue(TRANSMIT as u32);
        let stream = world.connection(1000, 52);
        world.send(packet(Op::Data, 1000, 52), b"well");
        assert_eq!(read_now(&stream), b"well");
    }
}

#[test]
fn packets_that_cannot_wait_are_refused() {
    let world = World::asleep();
    let mut device = lock(&world.guest.device);
    let with_data = Header {
        len: 1,
        ..packet(Op::Reset, 1, 2)
    };
    for packets in [
        vec![with_data.to_bytes()],
        vec![[0; HEADER]; MOST_RESETS + LIMITS.connections + 1],
    ] {
        let state = VsockState {
            in_use: true,
            had_connections: false,
            packets,
        };
        assert!(device.restore(&DeviceState::Vsock(state)).is_err());
    }
}
