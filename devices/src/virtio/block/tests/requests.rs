//! What requests do, and which are refused.

use super::*;
use vm_memory::Address;

#[test]
fn each_queue_is_served() {
    let shape = Shape {
        queues: 3,
        ..shape()
    };
    let (mut guest, _fake) = start_as(&shape, FEATURE_MQ);
    for queue in 0..3 {
        let data = guest.answer(queue, &[&header(IN, 5)], &[512, 1]);
        assert_eq!(data[..], [&[5; 512][..], &[OK]].concat());
    }
}

#[test]
fn requests_are_counted_once_each_for_the_thread_that_owns_the_device() {
    let (mut guest, _fake) = start(ALL);
    for count in 1..=3 {
        guest.answer(0, &[&header(IN, 0)], &[512, 1]);
        assert_eq!(lock(&guest.device).requests(), count);
    }
}

#[test]
fn a_driver_that_makes_more_while_it_is_interrupted_need_not_kick() {
    let (mut guest, _fake) = start(ALL);
    let [_, available, used] = guest.rings(0).map(GuestAddress);
    guest.request(0, &[&header(IN, 0)], &[512, 1]);
    guest.request(0, &[&header(IN, 1)], &[512, 1]);
    let set_index = move |memory: &GuestMemoryMmap, index: u16| {
        let at = available.unchecked_add(2);
        memory.write_obj(index, at).expect("memory");
    };
    set_index(&guest.memory, 1);
    let asked = Arc::new(Mutex::new(None));
    let (memory, told) = (Arc::clone(&guest.memory), Arc::clone(&asked));
    let answer = move || {
        // VIRTQ_USED_F_NO_NOTIFY.
        let flags: u16 = memory.read_obj(used).expect("memory");
        *lock(&told) = Some(flags);
        set_index(&memory, 2);
    };
    *lock(&guest.line.answer) = Some(Box::new(answer));
    lock(&guest.device).kicked(0);
    assert_eq!(*lock(&asked), Some(1), "it is not asked for kicks then");
    assert_eq!(guest.used(0).len(), 2);
}

#[test]
fn header_data_and_status_may_be_cut_in_any_way() {
    let (mut guest, fake) = start(ALL);
    let write = [header(OUT, 2), vec![0xab; 1024]].concat();
    let cuts: [&[&[u8]]; 3] = [
        &[&write],
        &[&write[..3], &write[3..17], &write[17..]],
        &[&write[..16], &write[16..528], &write[528..]],
    ];
    for cut in cuts {
        fake.store().disk.fill(0);
        assert_eq!(guest.answer(0, cut, &[1]), [OK]);
        let store = fake.store();
        assert_eq!(store.disk[1024..2048], [0xab; 1024]);
        assert!(
            store.disk[..1024]
                .iter()
                .chain(&store.disk[2048..])
                .all(|byte| *byte == 0)
        );
    }
    let whole = [&[0; 512][..], &[0xab; 1024], &[OK]].concat();
    for room in [&[1537][..], &[1536, 1], &[1, 2, 1534], &[512, 512, 513]] {
        assert_eq!(guest.answer(0, &[&header(IN, 1)], room), whole);
    }
}

#[test]
fn the_serial_number_is_told() {
    let (mut guest, _fake) = start(0);
    let mut wanted = b"root".to_vec();
    wanted.resize(20, 0);
    let whole = ask_whole(&mut guest, &header(GET_ID, 0), 21);
    assert_eq!(whole, (wanted.clone(), OK, 21));
    // Less room than the driver must give, and more.
    let (data, status, _) = ask_whole(&mut guest, &header(GET_ID, 0), 3);
    assert_eq!((data, status), (b"ro".to_vec(), OK));
    let (data, status, _) = ask_whole(&mut guest, &header(GET_ID, 0), 31);
    assert_eq!(
        (&data[..20], &data[20..], status),
        (&wanted[..], &[0xee; 10][..], OK)
    );
}

#[test]
fn what_is_not_within_the_disk_fails() {
    let (mut guest, fake) = start(ALL);
    for (sector, bytes) in [
        (128, 512),
        (127, 1024),
        (u64::MAX, 512),
        (1 << 55, 512),
        (0, 65537 * 512),
    ] {
        let write = [header(OUT, sector), vec![0; bytes.min(4096)]].concat();
        if bytes <= 4096 {
            assert_eq!(ask(&mut guest, &write, 1), IOERR);
        }
        let (data, status, written) =
            ask_whole(&mut guest, &header(IN, sector), bytes.min(1 << 20) + 1);
        assert_eq!((status, written), (IOERR, 0));
        assert!(data.iter().all(|byte| *byte == 0xee), "nothing was read");
    }
    for what in [
        range(128, 1, 0),
        range(0, 129, 0),
        range(u64::MAX, 1, 0),
        range(0, DISCARD_SECTORS + 1, 0),
        range(0, u32::MAX, 0),
    ] {
        for kind in [DISCARD, WRITE_ZEROES] {
            assert_eq!(
                ask(&mut guest, &[header(kind, 0), what.clone()].concat(), 1),
                IOERR
            );
        }
    }
    assert!(fake.store().seen.is_empty());
    assert!(!guest.is_broken());
}

#[test]
fn malformed_requests_fail_and_the_queue_goes_on() {
    let (mut guest, fake) = start(ALL);
    let bad = [
        vec![],
        header(IN, 0)[..15].to_vec(),
        // Half a sector, no range, half of one, two.
        [header(OUT, 0), vec![0; 100]].concat(),
        header(DISCARD, 0),
        [header(DISCARD, 0), vec![0; 15]].concat(),
        [header(WRITE_ZEROES, 0), vec![0; 32]].concat(),
    ];
    for readable in bad {
        let head = guest.request(0, &[&readable], &[1]);
        guest.kick(0);
        assert_eq!(guest.used(0), [(head, vec![IOERR])]);
    }
    assert_eq!(ask(&mut guest, &header(IN, 0), 100), IOERR);
    assert!(fake.store().seen.is_empty());
    assert_eq!(guest.answer(0, &[&header(FLUSH, 0)], &[1]), [OK]);
}

#[test]
fn a_request_without_a_status_byte_breaks_the_queue() {
    let (mut guest, fake) = start(ALL);
    guest.request(0, &[&header(FLUSH, 0)], &[]);
    guest.kick(0);
    assert!(guest.is_broken());
    assert_eq!(guest.used(0), []);
    assert!(fake.store().seen.is_empty());
    guest.start(ALL);
    assert_eq!(guest.answer(0, &[&header(FLUSH, 0)], &[1]), [OK]);
}

#[test]
fn what_is_not_known_or_not_agreed_is_unsupported() {
    let (mut guest, fake) = start(ALL);
    for kind in [2, 3, 5, 9, 10, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(ask(&mut guest, &header(kind, 0), 1), UNSUPP);
    }
    for (kind, flags) in [
        (DISCARD, 1),
        (DISCARD, 2),
        (WRITE_ZEROES, 2),
        (WRITE_ZEROES, u32::MAX),
    ] {
        let request = [header(kind, 0), range(0, 1, flags)].concat();
        assert_eq!(ask(&mut guest, &request, 1), UNSUPP);
    }
    guest.start(0);
    for kind in [DISCARD, WRITE_ZEROES] {
        let request = [header(kind, 0), range(0, 1, 0)].concat();
        assert_eq!(ask(&mut guest, &request, 1), UNSUPP);
    }
    assert!(fake.store().seen.is_empty());
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let (mut guest, fake) = start(ALL);
    for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)] {
        let request = [header(kind, 77), range(3, 2, flags)].concat();
        assert_eq!(ask(&mut guest, &request, 1), OK);
    }
    let zeroes = |unmap| Operation::WriteZeroes { unmap };
    let wanted = [Operation::Discard, zeroes(false), zeroes(true)]
        .map(|operation| (operation, 1536, 1024, false));
    assert_eq!(fake.store().seen, wanted);
    // Nothing of nothing.
    let request = [header(DISCARD, 0), range(128, 0, 0)].concat();
    assert_eq!(ask(&mut guest, &request, 1), OK);
    assert_eq!(fake.store().seen.len(), 3);
}

#[test]
fn a_disk_that_is_read_only_stays_as_it_is() {
    let shape = Shape {
        readonly: true,
        ..shape()
    };
    let (mut guest, fake) = start_as(&shape, FEATURE_RO | FEATURE_FLUSH);
    assert_eq!(
        ask(&mut guest, &[header(OUT, 0), vec![0; 512]].concat(), 1),
        IOERR
    );
    let zero = [header(WRITE_ZEROES, 0), range(0, 1, 0)].concat();
    assert_eq!(ask(&mut guest, &zero, 1), UNSUPP);
    assert!(fake.store().seen.is_empty());
    assert_eq!(
        guest.answer(0, &[&header(IN, 3)], &[512, 1])[..512],
        [3; 512]
    );
}

#[test]
fn storage_that_fails_is_an_io_error() {
    let (mut guest, fake) = start(ALL);
    fake.store().fails = true;
    assert_eq!(ask(&mut guest, &header(FLUSH, 0), 1), IOERR);
    assert_eq!(ask_whole(&mut guest, &header(IN, 0), 513).1, IOERR);
    assert!(!guest.is_broken());
}

#[test]
fn a_buffer_outside_memory_fails_its_request_only() {
    let (mut guest, fake) = start(ALL);
    let outside = BASE + MEMORY as u64;
    let status = |guest: &mut Guest<Block>| guest.buffer(&[0xee]);
    let seen = |guest: &Guest<Block>, at: u64| -> u8 {
        guest.memory.read_obj(GuestAddress(at)).expect("memory")
    };
    for kind in [IN, OUT, GET_ID] {
        let header = guest.buffer(&header(kind, 0));
        let data = u16::from(kind != OUT) * 2;
        let last = status(&mut guest);
        for address in [outside, outside - 100, 0, u64::MAX - 511] {
            guest.chain(0, &[(header, 16, 0), (address, 512, data), (last, 1, 2)]);
            guest.kick(0);
            assert_eq!(used(&mut guest, 0).len(), 1, "it is answered");
            assert_eq!(seen(&guest, last), IOERR);
        }
    }
    let faults = guest.mmio.faults();
    assert_eq!(faults, 12, "each is counted");
    // The header, and the status byte.
    let last = status(&mut guest);
    guest.chain(0, &[(outside, 16, 0), (last, 1, 2)]);
    let header_at = guest.buffer(&header(FLUSH, 0));
    guest.chain(0, &[(header_at, 16, 0), (outside, 1, 2)]);
    guest.kick(0);
    assert_eq!(used(&mut guest, 0).len(), 2);
    assert_eq!(seen(&guest, last), IOERR);
    assert!(fake.store().seen.is_empty());
    assert!(!guest.is_broken());
    assert_eq!(guest.answer(0, &[&header(FLUSH, 0)], &[1]), [OK]);
}

#[test]
fn a_read_of_very_much_is_refused() {
    let shape = Shape {
        size: 1 << 40,
        ..shape()
    };
    let (mut guest, fake) = start_as(&shape, ALL);
    let address = guest.buffer(&header(IN, 0));
    let mut parts = vec![(address, 16, 0)];
    // The same 4 MiB again and again: more than 1 GiB.
    parts.extend([(BASE + (2 << 20), 4 << 20, 2); 60]);
    let [table, ..] = guest.rings(0);
    let list: Vec<u8> = (0..5)
        .flat_map(|_| parts[1..].iter())
        .enumerate()
        .flat_map(|(index, (address, len, flags))| {
            let next = index as u16 + 2;
            // The last one is for the status.
            let (len, flags): (u32, u16) = match index {
                299 => (1, *flags),
                _ => (*len, flags | 1),
            };
            [
                &address.to_le_bytes()[..],
                &u32::to_le_bytes(len),
                &flags.to_le_bytes(),
                &next.to_le_bytes(),
            ]
            .concat()
        })
        .collect();
    let first = [
        &address.to_le_bytes()[..],
        &16_u32.to_le_bytes(),
        &1_u16.to_le_bytes(),
        &1_u16.to_le_bytes(),
    ]
    .concat();
    let indirect = guest.buffer(&[first, list].concat());
    let entry = [
        &indirect.to_le_bytes()[..],
        &(301 * 16_u32).to_le_bytes(),
        &4_u16.to_le_bytes(),
        &0_u16.to_le_bytes(),
    ]
    .concat();
    let memory = guest.memory.clone();
    memory
        .write_slice(&entry, GuestAddress(table))
        .expect("memory");
    guest.make_available(0, 0);
    guest.kick(0);
    assert_eq!(guest.used(0).len(), 1);
    assert!(fake.store().seen.is_empty());
}
