//! Packets that may be anything, and ends of the host that do what they like.

use super::*;

/// Returns a packet of a guest that may be anything, but has to do with the connections that there
/// are.
fn wild_packet() -> impl Strategy<Value = (Header, Vec<u8>)> {
    let number = prop_oneof![
        Just(0_u32),
        Just(1),
        Just(BUFFER),
        Just(u32::MAX),
        any::<u32>()
    ];
    let header = (
        prop_oneof![9 => Just(u64::from(CID)), 1 => any::<u64>()],
        prop_oneof![9 => Just(HOST_CID), 1 => any::<u64>()],
        // Few ports, so that packets meet; nobody listens on 3, and the host's own come from
        // FIRST_PORT.
        0..4_u32,
        prop_oneof![3 => 0..4_u32, 1 => FIRST_PORT..FIRST_PORT + 4],
        prop_oneof![4 => Just(None), 1 => number.clone().prop_map(Some)],
        prop_oneof![9 => Just(STREAM), 1 => any::<u16>()],
        0..9_u16,
        prop_oneof![0..4_u32, any::<u32>()],
        (number.clone(), number),
    );
    let data = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..50),
        Just(vec![7; 60_000])
    ];
    (header, data).prop_map(|(header, data)| {
        let (src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, credit) = header;
        let header = Header {
            src_cid,
            dst_cid,
            src_port,
            dst_port,
            len: len.unwrap_or(data.len() as u32),
            kind,
            op,
            flags,
            buf_alloc: credit.0,
            fwd_cnt: credit.1,
        };
        (header, data)
    })
}

/// What guest and host do to the device.
#[derive(Clone, Debug)]
enum Deed {
    Packet(Header, Vec<u8>, usize),
    Buffers(Vec<usize>),
    Dial(&'static str),
    HostWrites,
    HostReads,
    HostCloses,
}

fn deed() -> impl Strategy<Value = Deed> {
    let cut = prop_oneof![4 => Just(HEADER), 1 => 0..HEADER];
    prop_oneof![
        6 => (wild_packet(), cut).prop_map(|((header, data), cut)| Deed::Packet(header, data, cut)),
        3 => prop::collection::vec(0..200_usize, 1..8).prop_map(Deed::Buffers),
        1 => prop::sample::select(vec!["CONNECT 1\n", "CONNECT 2\n", "CONN", "\n"])
            .prop_map(Deed::Dial),
        1 => Just(Deed::HostWrites),
        1 => Just(Deed::HostReads),
        1 => Just(Deed::HostCloses),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_guest_breaks_the_device(deeds in prop::collection::vec(deed(), 1..40)) {
        let mut world = World::asleep();
        let listeners = [0, 1, 2].map(|port| world.listen(port));
        for listener in &listeners {
            listener.set_nonblocking(true).expect("a socket");
        }
        world.start();
        let mut streams = VecDeque::new();
        for deed in deeds {
            match deed {
                Deed::Packet(header, data, cut) => {
                    let bytes = header.to_bytes();
                    world.guest.request(TRANSMIT, &[&bytes[..cut], &data], &[]);
                }
                Deed::Buffers(sizes) => {
                    for size in sizes {
                        world.guest.request(RECEIVE, &[], &[size]);
                    }
                }
                Deed::Dial(line) => streams.push_back(world.dial(line)),
                Deed::HostWrites => {
                    for mut stream in &streams {
                        let _ = stream.write(&[1; 5000]);
                    }
                }
                Deed::HostReads => {
                    for mut stream in &streams {
                        let _ = stream.read(&mut [0; 100_000]);
                    }
                }
                Deed::HostCloses => drop(streams.pop_front()),
            }
            lock(&world.guest.device).ready(0);
            world.guest.kick(RECEIVE);
            world.guest.kick(TRANSMIT);
            for listener in &listeners {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true).expect("a socket");
                    streams.push_back(stream);
                }
            }
            let device = lock(&world.guest.device);
            let running = device.running.as_ref().expect("it was started");
            prop_assert!(running.connections.len() <= LIMITS.connections);
            prop_assert!(running.waiting.len() <= running.connections.len());
            prop_assert!(running.tokens.len() <= running.connections.len());
            prop_assert!(running.resets.len() <= MOST_RESETS + LIMITS.connections);
        }
        // The next driver finds a device that works.
        world.guest.write(0x70, 0);
        drop(streams);
        world.start();
        world.give(BUFFERS);
        world.run();
        world.inbox.clear();
        let stream = world.connection(1000, 52);
        world.send(packet(Op::Data, 1000, 52), b"well");
        prop_assert_eq!(read_now(&stream), b"well");
    }
}
