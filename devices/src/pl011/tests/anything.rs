//! Properties that hold whatever a guest does.

use proptest::prelude::*;

use super::*;

/// An event at a UART.
#[derive(Clone, Debug)]
enum Event {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Receive(Vec<u8>),
    WriteData(Vec<u8>),
    Break,
    Reset,
}

fn some_offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0u64..0x14).prop_map(|index| index * 4),
        4 => Just(offset::DR),
        1 => 0u64..0x1010,
        1 => any::<u64>(),
    ]
}

fn some_size() -> impl Strategy<Value = usize> {
    prop_oneof![Just(1), Just(2), Just(4), Just(8)]
}

fn event() -> impl Strategy<Value = Event> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..24);
    prop_oneof![
        8 => (some_offset(), some_size()).prop_map(|(o, s)| Event::Read(o, s)),
        8 => (some_offset(), some_size(), any::<[u8; 8]>())
            .prop_map(|(o, s, v)| Event::Write(o, v[..s].to_vec())),
        4 => bytes().prop_map(Event::Receive),
        1 => bytes().prop_map(Event::WriteData),
        1 => Just(Event::Break),
        1 => Just(Event::Reset),
    ]
}

proptest! {
    #[test]
    fn nothing_a_guest_does_panics_or_leaves_the_line_wrong(
        events in prop::collection::vec(event(), 0..200),
    ) {
        let mut bench = Bench::new();
        for event in events {
            match event {
                Event::Read(offset, size) => {
                    let mut data = vec![0xff; size];
                    assert_eq!(bench.uart.read(offset, &mut data), Action::None);
                    if size == 8 {
                        prop_assert_eq!(data, vec![0; 8]);
                    }
                }
                Event::Write(offset, data) => {
                        prop_assert_eq!(bench.uart.write(offset, &data), Action::None);
                    }
                Event::Receive(bytes) => {
                    let room = bench.uart.room();
                    prop_assert_eq!(bench.uart.receive(&bytes), bytes.len().min(room));
                }
                Event::WriteData(bytes) => {
 prop_assert_eq!(bench.uart.write_data(&bytes), Action::None);
}
                Event::Break => {
                    let room = bench.uart.room();
                    prop_assert_eq!(bench.uart.receive_break(), room > 0);
                }
                Event::Reset => bench.uart.reset(),
            }
            check_line(&bench)?;
        }
    }

    #[test]
    fn bytes_arrive_in_order_and_whole(
        events in prop::collection::vec(event(), 0..200),
        input in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut bench = Bench::new();
        let mut output = Vec::new();
        let (mut sent, mut received) = (0, Vec::new());
        for event in events {
            let rooms = bench.rooms();
            let was_wanted = bench.uart.wanted() > 0;
            match event {
                Event::Read(offset, size) => {
                    let waits = bench.uart.flags() & 0x10 == 0;
                    let mut data = vec![0; size];
                    assert_eq!(bench.uart.read(offset, &mut data), Action::None);
                    if offset == offset::DR && size != 8 && waits {
                        received.push(data[0]);
                    }
                }
                Event::Write(offset, mut data) => {
                    if offset == offset::CR {
                        // Loopback mixes the two directions; it is tested separately.
                        data[0] &= !0x80;
                    }
                    assert_eq!(bench.uart.write(offset, &data), Action::None);
                    if offset == offset::DR && data.len() != 8 {
                        output.push(data[0]);
                    }
                }
                Event::Receive(bytes) => {
                    let end = input.len().min(sent + bytes.len());
                    sent += bench.uart.receive(&input[sent..end]);
                }
                Event::WriteData(bytes) => {
                    assert_eq!(bench.uart.write_data(&bytes), Action::None);
                    output.extend(bytes);
                }
                // These add input that was not sent, or drop input that was not read.
                Event::Break | Event::Reset => {}
            }
            let told = bench.rooms() - rooms;
            let wanted = bench.uart.wanted();
            prop_assert_eq!(told, usize::from(!was_wanted && wanted > 0));
            prop_assert!(wanted == 0 || wanted == bench.uart.room());
            check_line(&bench)?;
        }
        received.extend(bench.drain());
        prop_assert_eq!(received, &input[..sent]);
        prop_assert_eq!(bench.output(), output);
    }
}
