//! Requests of any shape: which come out, and which break the queue.

use super::*;

#[test]
fn a_chain_comes_out_in_its_parts() {
    let mut bench = Bench::new();
    let table = RINGS.descriptors;
    bench.descriptor(table, 3, (BUFFERS, 4), NEXT, 6);
    bench.descriptor(table, 6, (BUFFERS + 0x100, 2), NEXT, 0);
    // An empty buffer is none.
    bench.descriptor(table, 0, (u64::MAX, 0), NEXT, 1);
    bench.descriptor(table, 1, (BUFFERS + 0x200, 3), NEXT | WRITE, 2);
    bench.descriptor(table, 2, (BUFFERS + 0x300, 5), WRITE, 9999);
    bench.put(BUFFERS, b"abcd");
    bench.put(BUFFERS + 0x100, b"ef");
    bench.offer(3);
    let chain = bench.queue.pop().expect("a request");
    assert_eq!(chain.head(), 3);
    let readable = [segment(BUFFERS, 4), segment(BUFFERS + 0x100, 2)];
    assert_eq!(chain.readable(), readable);
    let writable = [segment(BUFFERS + 0x200, 3), segment(BUFFERS + 0x300, 5)];
    assert_eq!(chain.writable(), writable);
    assert_eq!((chain.readable_len(), chain.writable_len()), (6, 8));

    let mut data = [0; 9];
    assert_eq!(chain.read(&bench.memory, 2, &mut data), 4);
    assert_eq!(&data, b"cdef\0\0\0\0\0");
    assert_eq!(chain.read(&bench.memory, 6, &mut data), 0);
    assert_eq!(chain.write(&bench.memory, 1, b"0123456789"), 7);
    let mut written = [0; 6];
    let at = GuestAddress(BUFFERS + 0x300);
    bench.memory.read_slice(&mut written, at).expect("memory");
    assert_eq!(&written, b"23456\0");

    bench.queue.complete(chain, 8);
    let mut used = [0; 12];
    let at = GuestAddress(RINGS.used);
    bench.memory.read_slice(&mut used, at).expect("memory");
    assert_eq!(used, [0, 0, 1, 0, 3, 0, 0, 0, 8, 0, 0, 0]);
}

#[test]
fn an_indirect_chain_comes_out_in_its_parts() {
    let mut bench = Bench::new();
    bench.descriptor(RINGS.descriptors, 0, (BUFFERS, 4), NEXT, 1);
    bench.descriptor(RINGS.descriptors, 1, (TABLE, 32), INDIRECT, 0);
    bench.descriptor(TABLE, 0, (BUFFERS + 8, 1), NEXT, 1);
    bench.descriptor(TABLE, 1, (BUFFERS + 16, 2), WRITE, 0);
    bench.offer(0);
    let chain = bench.queue.pop().expect("a request");
    let readable = [segment(BUFFERS, 4), segment(BUFFERS + 8, 1)];
    assert_eq!(chain.readable(), readable);
    assert_eq!(chain.writable(), [segment(BUFFERS + 16, 2)]);
}

#[test]
fn a_buffer_may_cross_from_one_bank_to_the_next() {
    let mut bench = Bench::new();
    bench.descriptor(RINGS.descriptors, 0, (0x1_fffe, 4), WRITE, 0);
    bench.offer(0);
    let chain = bench.queue.pop().expect("a request");
    assert_eq!(chain.write(&bench.memory, 0, b"abcd"), 4);
    let mut found = [0; 4];
    let at = GuestAddress(0x1_fffe);
    bench.memory.read_slice(&mut found, at).expect("memory");
    assert_eq!(&found, b"abcd");
}

#[test]
fn the_first_and_the_last_bytes_may_lie_in_any_bank() {
    let mut bench = Bench::new();
    // The rings are in the first bank; one buffer crosses into the second, one lies there.
    for (header, status) in [
        (0x1_fffc, 0x2_0100),
        (0x2_0200, 0x1_8000),
        (0x1_8000, 0x1_8010),
    ] {
        bench.put(header, &[1, 2, 3, 4, 5, 6, 7, 8]);
        bench.descriptor(RINGS.descriptors, 0, (header, 8), NEXT, 1);
        bench.descriptor(RINGS.descriptors, 1, (status - 1, 2), WRITE, 0);
        bench.offer(0);
        let chain = bench.queue.pop().expect("a request");
        let first = bench.queue.read_first::<u64>(&chain);
        assert_eq!(first, Some(u64::from_ne_bytes([1, 2, 3, 4, 5, 6, 7, 8])));
        bench.queue.put_last(&chain, 0x5a);
        let found = bench.memory.read_obj::<[u8; 3]>(GuestAddress(status - 1));
        assert_eq!(found.expect("memory"), [0, 0x5a, 0]);
        bench.queue.complete(chain, 2);
    }
}

#[test]
fn a_request_that_is_put_back_comes_again() {
    let mut bench = Bench::new();
    bench.offer_plain();
    bench.offer_plain();
    let chain = bench.queue.pop().expect("a request");
    let head = chain.head();
    bench.queue.undo_pop(chain);
    let again = bench.queue.pop().expect("the same");
    assert_eq!(again.head(), head);
    let next = bench.queue.pop().expect("the next");
    assert_ne!(next.head(), head);
    assert!(bench.queue.pop().is_none());
    assert!(!bench.queue.is_broken());
}

#[test]
fn a_chain_that_loops_breaks_the_queue() {
    for next in [0, 1] {
        let mut bench = Bench::new();
        bench.descriptor(RINGS.descriptors, 0, (BUFFERS, 4), NEXT, 1);
        bench.descriptor(RINGS.descriptors, 1, (BUFFERS, 4), NEXT, next);
        bench.offer(0);
        bench.assert_breaks();
    }
    let mut bench = Bench::new();
    bench.descriptor(RINGS.descriptors, 0, (TABLE, 32), INDIRECT, 0);
    bench.descriptor(TABLE, 0, (BUFFERS, 0), NEXT, 1);
    bench.descriptor(TABLE, 1, (BUFFERS, 0), NEXT, 0);
    bench.offer(0);
    bench.assert_breaks();
}

#[test]
fn a_chain_that_leads_out_of_its_table_breaks_the_queue() {
    for head in [SIZE, u16::MAX] {
        let mut bench = Bench::new();
        bench.offer(head);
        bench.assert_breaks();
    }
    for next in [SIZE, u16::MAX] {
        let mut bench = Bench::new();
        bench.descriptor(RINGS.descriptors, 0, (BUFFERS, 4), NEXT, next);
        bench.offer(0);
        bench.assert_breaks();
    }
    // In an indirect table it is the table's length that counts.
    let mut bench = Bench::new();
    bench.descriptor(RINGS.descriptors, 0, (TABLE, 16), INDIRECT, 0);
    bench.descriptor(TABLE, 0, (BUFFERS, 4), NEXT, 1);
    bench.descriptor(TABLE, 1, (BUFFERS, 4), 0, 0);
    bench.offer(0);
    bench.assert_breaks();
}

#[test]
fn an_indirect_table_that_is_wrong_breaks_the_queue() {
    let tables = [
        (TABLE, 0),
        (TABLE, 15),
        (TABLE, 17),
        // One entry more than a 16-bit index reaches.
        (TABLE, 16 << 16),
        (TABLE, u32::MAX),
        // Within memory for a part only, in a hole, across the end of memory, and of addresses.
        (0x2_7ff8, 16),
        (0x3_0000, 16),
        (0x4_7ff8, 32),
        (u64::MAX - 7, 16),
    ];
    for (address, len) in tables {
        let mut bench = Bench::new();
        bench.descriptor(RINGS.descriptors, 0, (address, len), INDIRECT, 0);
        if address == TABLE {
            bench.descriptor(TABLE, 0, (TABLE, 32), INDIRECT | NEXT, 1);
            bench.descriptor(TABLE, 1, (BUFFERS, 4), 0, 0);
        }
        bench.offer(0);
        bench.assert_breaks();
    }
}

#[test]
fn an_indirect_table_within_another_breaks_the_queue() {
    for first in [0, 1] {
        let mut bench = Bench::new();
        bench.descriptor(RINGS.descriptors, 0, (TABLE, 32), INDIRECT, 0);
        bench.descriptor(TABLE, 0, (BUFFERS, 4), NEXT, 1);
        bench.descriptor(TABLE, first, (TABLE + 0x100, 16), INDIRECT, 0);
        bench.descriptor(TABLE + 0x100, 0, (BUFFERS, 4), 0, 0);
        bench.offer(0);
        bench.assert_breaks();
    }
}

#[test]
fn a_readable_buffer_behind_a_writable_one_breaks_the_queue() {
    let mut bench = Bench::new();
    bench.descriptor(RINGS.descriptors, 0, (BUFFERS, 4), WRITE | NEXT, 1);
    bench.descriptor(RINGS.descriptors, 1, (BUFFERS, 4), 0, 0);
    bench.offer(0);
    bench.assert_breaks();
}

#[test]
fn of_a_request_the_buffers_before_the_first_outside_memory_are_shown() {
    let buffers = [
        (0, 1),
        (0xffff, 2),
        (0x2_7fff, 2),
        (0x3_0000, 1),
        (0x3_ffff, 2),
        (0x4_7ffc, 8),
        (0x4_0000, 0xffff_0000),
        (u64::MAX, 1),
        (u64::MAX, 2),
        (u64::MAX - 3, 8),
    ];
    for buffer in buffers {
        for flags in [0, WRITE] {
            let mut bench = Bench::new();
            let table = RINGS.descriptors;
            bench.descriptor(table, 0, (BUFFERS, 4), flags | NEXT, 1);
            bench.descriptor(table, 1, buffer, flags | NEXT, 2);
            bench.descriptor(table, 2, (BUFFERS + 16, 4), flags, 0);
            bench.offer(0);
            let chain = bench.queue.pop().expect("a request");
            assert!(!chain.is_whole());
            let (shown, not) = match flags {
                0 => (chain.readable(), chain.writable()),
                _ => (chain.writable(), chain.readable()),
            };
            assert_eq!((shown, not), (&[segment(BUFFERS, 4)][..], &[][..]));
            let last = (flags == WRITE).then_some(GuestAddress(BUFFERS + 19));
            assert_eq!(chain.last_writable(), last);
            bench.queue.complete(chain, 0);
            assert_eq!((bench.used(), bench.link.faults()), (1, 1));
            // The next one is as good as any.
            bench.offer_plain();
            let chain = bench.queue.pop().expect("a request");
            assert!(chain.is_whole() && chain.last_writable().is_some());
        }
    }
}

#[test]
fn where_the_last_writable_buffer_is_not_in_memory_no_byte_is_the_last() {
    let mut bench = Bench::new();
    bench.descriptor(RINGS.descriptors, 0, (BUFFERS, 4), WRITE | NEXT, 1);
    bench.descriptor(RINGS.descriptors, 1, (0, 4), WRITE, 0);
    bench.offer(0);
    let chain = bench.queue.pop().expect("a request");
    assert_eq!((chain.is_whole(), chain.last_writable()), (false, None));
}

#[test]
fn a_readable_buffer_behind_a_writable_one_outside_memory_breaks_the_queue() {
    let mut bench = Bench::new();
    bench.descriptor(RINGS.descriptors, 0, (0, 4), WRITE | NEXT, 1);
    bench.descriptor(RINGS.descriptors, 1, (BUFFERS, 4), 0, 0);
    bench.offer(0);
    assert!(bench.queue.pop().is_none() && bench.queue.is_broken());
}

#[test]
fn what_one_large_request_needed_is_given_back() {
    let mut bench = Bench::new();
    bench.indirect_chain((BUFFERS, 4), 1000);
    bench.offer_plain();
    let large = bench.queue.pop().expect("a request");
    let small = bench.queue.pop().expect("a request");
    assert_eq!(large.writable().len(), 1000);
    bench.queue.complete(large, 0);
    bench.queue.undo_pop(small);
    let small = bench.queue.pop().expect("a request");
    bench.queue.complete(small, 0);
    let kept = bench.queue.spare.iter();
    let kept: Vec<usize> = kept.map(|chain| chain.capacity()).collect();
    assert!(kept.len() == 1 && kept[0] <= KEPT_SEGMENTS, "{kept:?}");
}

#[test]
fn memory_that_cannot_be_written_is_only_read() {
    const READ_ONLY: u64 = 0x10_0000;
    let region = vm_memory::mmap::MmapRegionBuilder::new(0x1000)
        .with_mmap_prot(1)
        .with_mmap_flags(0x22);
    let region = region.build().expect("a mapping");
    let region = vm_memory::GuestRegionMmap::new(region, GuestAddress(READ_ONLY));
    let mut bench = Bench::new();
    let memory = bench.memory.insert_region(region.expect("an end").into());
    let memory = Arc::new(memory.expect("no overlap"));
    bench.queue.memory = Arc::clone(&memory);
    bench.descriptor(RINGS.descriptors, 0, (READ_ONLY, 4), NEXT, 1);
    bench.descriptor(RINGS.descriptors, 1, (READ_ONLY, 4), WRITE, 0);
    bench.offer(0);
    let chain = bench.queue.pop().expect("a request");
    assert_eq!(chain.readable(), [segment(READ_ONLY, 4)]);
    assert!(!chain.is_whole() && chain.writable().is_empty());
    // Nor does a used ring lie there.
    let (link, kick) = (Arc::clone(&bench.link), Arc::clone(bench.queue.kick()));
    let addresses = Addresses {
        used: READ_ONLY,
        ..RINGS
    };
    let place = (addresses, Position::default());
    let queue = Virtqueue::new(0, (SIZE, SIZE), place, false, memory, link, kick);
    assert!(queue.err().expect("refused").contains("used ring"));
}

#[test]
fn a_chain_of_4_gib_breaks_the_queue() {
    const BANK: usize = 4 << 20;
    for (count, breaks) in [(1023, false), (1024, true)] {
        let mut bench = Bench::of(&[(0x1_0000, BANK)], false);
        bench.indirect_chain((0x1_0000, BANK as u32), count);
        match breaks {
            true => bench.assert_breaks(),
            false => {
                let chain = bench.queue.pop().expect("a request");
                assert_eq!(chain.writable_len(), BANK * 1023);
            }
        }
    }
}

#[test]
fn more_buffers_than_any_device_takes_break_the_queue() {
    for (count, breaks) in [(MOST_SEGMENTS, false), (MOST_SEGMENTS + 1, true)] {
        let mut bench = Bench::new();
        bench.indirect_chain((BUFFERS, 1), count as u16);
        match breaks {
            true => bench.assert_breaks(),
            false => {
                let chain = bench.queue.pop().expect("a request");
                assert_eq!(chain.writable().len(), MOST_SEGMENTS);
            }
        }
    }
}

#[test]
fn the_descriptor_of_an_indirect_table_may_be_marked_writable_and_follow_others() {
    let mut bench = Bench::new();
    bench.descriptor(RINGS.descriptors, 0, (BUFFERS, 16), NEXT, 1);
    bench.descriptor(RINGS.descriptors, 1, (TABLE, 32), INDIRECT | WRITE, 0);
    bench.descriptor(TABLE, 0, (BUFFERS + 16, 4), NEXT, 1);
    bench.descriptor(TABLE, 1, (BUFFERS + 32, 8), WRITE, 0);
    bench.offer(0);
    let chain = bench.queue.pop().expect("a request");
    assert_eq!((chain.readable_len(), chain.writable_len()), (20, 8));
    assert!(!bench.queue.is_broken());
}
