//! Rings as a hostile driver writes them.

use std::sync::atomic::AtomicUsize;

use proptest::prelude::*;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::virtio::{Interrupts, Vector};

mod positions;

/// Three banks; the second begins where the first ends, and before the third is a hole.
const BANKS: [(u64, usize); 3] = [(0x1_0000, 0x1_0000), (0x2_0000, 0x8000), (0x4_0000, 0x8000)];
/// Entries.
const SIZE: u16 = 8;
const RINGS: Addresses = Addresses {
    descriptors: 0x1_0000,
    available: 0x1_1000,
    used: 0x1_2000,
};
/// Where an indirect table lies.
const TABLE: u64 = 0x1_3000;
/// Where buffers lie.
const BUFFERS: u64 = 0x1_8000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Counts what the driver hears.
#[derive(Default)]
struct Heard {
    interrupts: AtomicUsize,
    resets: AtomicUsize,
}

impl Interrupts for Arc<Heard> {
    fn signal(&self, _: Vector) {
        self.interrupts.fetch_add(1, Ordering::Relaxed);
    }

    fn needs_reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
    }

    fn descriptor(&self, _: Vector) -> Option<Arc<EventFd>> {
        None
    }
}

/// A queue and the driver's end of it.
struct Bench {
    queue: Virtqueue,
    memory: Arc<GuestMemoryMmap>,
    heard: Arc<Heard>,
    link: Arc<Link>,
    kick: Arc<EventFd>,
    available: u16,
}

impl Bench {
    fn new() -> Bench {
        Bench::with(false)
    }

    fn with(event_idx: bool) -> Bench {
        Bench::of(&BANKS, event_idx)
    }

    fn of(banks: &[(u64, usize)], event_idx: bool) -> Bench {
        let banks = banks
            .iter()
            .map(|(start, size)| (GuestAddress(*start), *size));
        let banks: Vec<_> = banks.collect();
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&banks).expect("memory"));
        let heard = Arc::new(Heard::default());
        let link = Arc::new(Link::new("test".to_owned(), Box::new(Arc::clone(&heard))));
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).expect("a descriptor"));
        let queue = Virtqueue::new(
            0,
            (SIZE, SIZE),
            (RINGS, Position::default()),
            event_idx,
            Arc::clone(&memory),
            Arc::clone(&link),
            Arc::clone(&kick),
        );
        Bench {
            queue: queue.expect("a queue"),
            memory,
            heard,
            link,
            kick,
            available: 0,
        }
    }

    /// Writes a descriptor to the table at `table`.
    fn descriptor(
        &self,
        table: u64,
        index: u16,
        (address, len): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(table + 16 * u64::from(index), &bytes);
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        let at = GuestAddress(address);
        self.memory.write_slice(bytes, at).expect("memory");
    }

    fn set_available(&mut self, index: u16) {
        self.available = index;
        self.put(RINGS.available + 2, &index.to_le_bytes());
    }

    /// Makes a request of the chain that begins at `head`.
    fn offer(&mut self, head: u16) {
        let slot = u64::from(self.available % SIZE);
        self.put(RINGS.available + 4 + 2 * slot, &head.to_le_bytes());
        self.set_available(self.available.wrapping_add(1));
    }

    /// A request with one writable buffer of four bytes.
    fn offer_plain(&mut self) {
        let index = self.available % SIZE;
        let buffer = (BUFFERS + 16 * u64::from(index), 4);
        self.descriptor(RINGS.descriptors, index, buffer, WRITE, 0);
        self.offer(index);
    }

    /// A request in an indirect table of so many writable buffers, all the same.
    fn indirect_chain(&mut self, buffer: (u64, u32), count: u16) {
        let len = 16 * u32::from(count);
        self.descriptor(RINGS.descriptors, 0, (TABLE, len), INDIRECT, 0);
        for index in 0..count {
            let next = if index + 1 < count { NEXT } else { 0 };
            self.descriptor(TABLE, index, buffer, WRITE | next, index + 1);
        }
        self.offer(0);
    }

    fn used(&self) -> u16 {
        load_u16(&self.memory, RINGS.used + 2).expect("the ring")
    }

    fn interrupts(&self) -> usize {
        self.heard.interrupts.load(Ordering::Relaxed)
    }

    /// The queue took nothing, asks for a reset, and gives nothing from here on.
    #[track_caller]
    fn assert_breaks(mut self) {
        assert!(self.queue.pop().is_none());
        assert!(self.queue.is_broken());
        assert_eq!(self.heard.resets.load(Ordering::Relaxed), 1);
        assert_eq!(self.link.faults(), 1);
        self.descriptor(RINGS.descriptors, 0, (BUFFERS, 4), 0, 0);
        self.offer(0);
        assert!(self.queue.pop().is_none());
        assert!(!self.queue.listen(), "nothing new in a broken queue");
        self.queue
            .serve(|_, _| panic!("a broken queue has no requests"));
        assert_eq!(self.used(), 0);
        // Once is enough.
        assert_eq!(self.heard.resets.load(Ordering::Relaxed), 1);
    }

    /// All of memory.
    fn dump(&self) -> Vec<Vec<u8>> {
        let dump = |(start, size)| {
            let mut bytes = vec![0; size];
            let at = GuestAddress(start);
            self.memory.read_slice(&mut bytes, at).expect("memory");
            bytes
        };
        BANKS.map(dump).to_vec()
    }
}

fn segment(address: u64, len: usize) -> Segment {
    let address = GuestAddress(address);
    Segment { address, len }
}

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
    bench.queue.complete_together([(small, 0)]);
    let kept = bench.queue.spare.iter();
    let kept: Vec<usize> = kept.map(|chain| chain.writable.capacity()).collect();
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
fn an_available_index_that_jumps_breaks_the_queue() {
    for index in [SIZE + 1, 0x7fff, u16::MAX] {
        let mut bench = Bench::new();
        bench.set_available(index);
        bench.assert_breaks();
    }
    // As many as there are entries may be new.
    let mut bench = Bench::new();
    for _ in 0..SIZE {
        bench.offer_plain();
    }
    for _ in 0..SIZE {
        assert!(bench.queue.pop().is_some());
    }
    assert!(bench.queue.pop().is_none());
    assert!(!bench.queue.is_broken());
    // It goes back.
    bench.set_available(SIZE - 1);
    assert!(bench.queue.pop().is_none());
    assert!(bench.queue.is_broken());
}

#[test]
fn indexes_run_over_and_nothing_is_lost() {
    let mut bench = Bench::new();
    for round in 0..0x1_0010_u32 {
        bench.offer_plain();
        let mut served = 0;
        bench.queue.serve(|queue, chain| {
            served += 1;
            queue.complete(chain, 4);
        });
        assert_eq!(served, 1, "round {round}");
        assert_eq!(u32::from(bench.used()), (round + 1) & 0xffff);
    }
    assert!(!bench.queue.is_broken());
}

#[test]
fn rings_may_lie_in_banks_that_meet() {
    // Each part of the ring lies in two, and one entry of the used ring, too.
    let ends = [0x1_0000, 0x1_0020, 0x1_1008, 0x1_2010, 0x2_0000];
    let banks: Vec<_> = ends
        .windows(2)
        .map(|ends| (ends[0], (ends[1] - ends[0]) as usize))
        .collect();
    for event_idx in [false, true] {
        let mut bench = Bench::of(&banks, event_idx);
        for round in 0..3 * SIZE {
            bench.offer_plain();
            let mut served = 0;
            bench.queue.serve(|queue, chain| {
                served += 1;
                assert_eq!(chain.writable_len(), 4);
                queue.complete(chain, round.into());
            });
            assert_eq!((served, bench.used()), (1, round + 1));
            let slot = RINGS.used + 4 + 8 * u64::from(round % SIZE);
            let entry: [u32; 2] = bench.memory.read_obj(GuestAddress(slot)).expect("memory");
            assert_eq!(entry, [u32::from(round % SIZE), round.into()]);
        }
        assert!(!bench.queue.is_broken());
        assert_eq!(
            bench.interrupts(),
            if event_idx { 1 } else { 3 * usize::from(SIZE) }
        );
    }
}

#[test]
fn rings_outside_memory_are_refused() {
    let bench = Bench::new();
    let make = |size, addresses| {
        let (memory, link) = (Arc::clone(&bench.memory), Arc::clone(&bench.link));
        let kick = Arc::clone(&bench.kick);
        let place = (addresses, Position::default());
        Virtqueue::new(7, (SIZE, size), place, false, memory, link, kick)
            .map(|_| ())
            .expect_err("no such rings")
    };
    for size in [0, 3, SIZE * 2, u16::MAX] {
        assert!(make(size, RINGS).contains("takes up to 8"));
    }
    for (address, what) in [
        (0, "null"),
        (0x2_7ffc, "across the end"),
        (0x3_0000, "in a hole"),
        (0x1_0001, "odd"),
        (u64::MAX - 1, "the end of addresses"),
        (!0xf, "the end of addresses, aligned"),
    ] {
        let mut each = [RINGS; 3];
        each[0].descriptors = address;
        each[1].available = address;
        each[2].used = address;
        for (addresses, name) in each.into_iter().zip(["table", "available", "used"]) {
            let error = make(SIZE, addresses);
            assert!(
                error.contains(name) && error.contains("queue 7"),
                "{what}: {error}"
            );
        }
    }
    // 4 is aligned for an available ring, not for the others.
    let error = make(
        SIZE,
        Addresses {
            used: 0x1_0002,
            ..RINGS
        },
    );
    assert!(error.contains("0x10002"), "{error}");
}

#[test]
fn without_event_indexes_a_flag_holds_kicks_back() {
    let mut bench = Bench::new();
    let flags = |bench: &Bench| load_u16(&bench.memory, RINGS.used).expect("the ring");
    bench.queue.silence();
    assert_eq!(flags(&bench), 1);
    assert!(!bench.queue.listen());
    assert_eq!(flags(&bench), 0);
    bench.queue.silence();
    bench.offer_plain();
    assert!(bench.queue.listen(), "it came while nobody listened");
}

#[test]
fn the_driver_says_at_which_request_it_is_interrupted() {
    let mut bench = Bench::with(true);
    let serve = |bench: &mut Bench, count: usize| {
        for _ in 0..count {
            bench.offer_plain();
        }
        bench.queue.serve(|queue, chain| queue.complete(chain, 0));
        bench.interrupts()
    };
    let used_event = RINGS.available + 4 + 2 * u64::from(SIZE);
    bench.put(used_event, &4_u16.to_le_bytes());
    assert_eq!(serve(&mut bench, 4), 0, "entries 0 to 3");
    assert_eq!(serve(&mut bench, 1), 1, "entry 4");
    assert_eq!(serve(&mut bench, 3), 1, "the driver did not ask again");
    bench.put(used_event, &9_u16.to_le_bytes());
    assert_eq!(serve(&mut bench, 4), 2, "entry 9 is among them");
    bench.queue.signal();
    assert_eq!(bench.interrupts(), 2, "nothing new");
}

#[test]
fn without_event_indexes_a_flag_holds_interrupts_back() {
    let mut bench = Bench::new();
    let serve = |bench: &mut Bench| {
        bench.offer_plain();
        bench.queue.serve(|queue, chain| queue.complete(chain, 0));
        bench.interrupts()
    };
    assert_eq!(serve(&mut bench), 1);
    bench.put(RINGS.available, &[1, 0]);
    assert_eq!(serve(&mut bench), 1);
    bench.put(RINGS.available, &[0, 0]);
    assert_eq!(serve(&mut bench), 2);
}

#[test]
fn what_is_completed_together_is_in_the_ring_in_order() {
    let mut bench = Bench::with(true);
    // Twice, so that the second time goes over the ring's end.
    for round in 0..2_u16 {
        for _ in 0..6 {
            bench.offer_plain();
        }
        let chains: Vec<_> = std::iter::from_fn(|| bench.queue.pop()).collect();
        let heads: Vec<u32> = chains.iter().map(|chain| chain.head().into()).collect();
        let last = 4 + 2 * u64::from(SIZE);
        bench.put(RINGS.available + last, &(6 * round + 5).to_le_bytes());
        assert_eq!(bench.used(), 6 * round);
        // The driver must not see some of them before all are there.
        let memory = Arc::clone(&bench.memory);
        let chains = chains.into_iter().zip(100..).inspect(|_| {
            assert_eq!(load_u16(&memory, RINGS.used + 2), Some(6 * round));
        });
        bench.queue.complete_together(chains);
        assert_eq!(bench.used(), 6 * round + 6);
        bench.queue.signal();
        assert_eq!(bench.interrupts(), usize::from(round) + 1);
        for (offset, head) in heads.into_iter().enumerate() {
            let slot = (6 * u64::from(round) + offset as u64) % u64::from(SIZE);
            let at = GuestAddress(RINGS.used + 4 + 8 * slot);
            let entry: [u32; 2] = bench.memory.read_obj(at).expect("memory");
            assert_eq!(entry, [head, 100 + offset as u32]);
        }
    }
}

#[test]
fn a_queue_goes_on_where_another_stopped() {
    let mut bench = Bench::new();
    for _ in 0..4 {
        bench.offer_plain();
    }
    // The kernel did three of them.
    bench.put(RINGS.used + 2, &3_u16.to_le_bytes());
    bench.queue.adopt(None);
    let mut heads = Vec::new();
    bench.queue.serve(|queue, chain| {
        heads.push(chain.head());
        queue.complete(chain, 0);
    });
    assert_eq!((heads, bench.used()), (vec![3], 4));
    // It says that it did more than there was.
    let mut bench = Bench::new();
    bench.offer_plain();
    bench.put(RINGS.used + 2, &9_u16.to_le_bytes());
    bench.queue.adopt(None);
    assert!(bench.queue.pop().is_none() && bench.queue.is_broken());
}

#[test]
fn the_device_says_at_which_request_it_is_kicked() {
    let mut bench = Bench::with(true);
    let avail_event = RINGS.used + 4 + 8 * u64::from(SIZE);
    for count in 1..=5 {
        bench.offer_plain();
        bench.queue.serve(|queue, chain| queue.complete(chain, 0));
        assert_eq!(load_u16(&bench.memory, avail_event), Some(count));
    }
}

#[test]
fn a_driver_that_never_rests_does_not_keep_the_device() {
    let mut bench = Bench::new();
    bench.offer_plain();
    let mut served = 0_usize;
    let mut available = 1_u16;
    bench.queue.serve(|queue, chain| {
        served += 1;
        assert!(served < 1_000_000, "it serves for ever");
        // Another vCPU makes the next request while this one is served.
        available = available.wrapping_add(1);
        let at = GuestAddress(RINGS.available + 2);
        queue.memory().write_obj(available, at).expect("memory");
        queue.complete(chain, 0);
    });
    assert!(bench.kick.read().is_ok(), "it kicks itself");
    assert_eq!(bench.interrupts(), 1);
    let before = served;
    bench.queue.serve(|queue, chain| {
        served += 1;
        queue.complete(chain, 0);
    });
    assert_eq!(served, before + 1, "what is left");
    assert!(bench.kick.read().is_err(), "nothing left");
}

#[test]
fn completing_what_was_broken_meanwhile_does_nothing() {
    let mut bench = Bench::new();
    bench.offer_plain();
    let chain = bench.queue.pop().expect("a request");
    bench.queue.break_ring(format_args!("it makes no sense"));
    bench.queue.complete(chain, 4);
    bench.queue.signal();
    assert_eq!((bench.used(), bench.interrupts()), (0, 0));
}

/// Numbers that look random, the same for each seed.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Addresses: most of them in memory or near its edges.
fn addresses() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0x1_0000..0x2_8000_u64,
        2 => 0x4_0000..0x4_8000_u64,
        1 => 0x2_7ff0..0x2_8010_u64,
        1 => 0x4_7ff0..0x4_8010_u64,
        1 => Just(TABLE),
        1 => any::<u64>(),
        1 => (u64::MAX - 16)..=u64::MAX,
    ]
}

fn lengths() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0..64_u32,
        2 => (0..8_u32).prop_map(|count| count * 16),
        1 => 0..0x2_0000_u32,
        1 => any::<u32>(),
    ]
}

type Entry = ((u64, u32), u16, u16);

fn entries() -> impl Strategy<Value = Vec<Entry>> {
    let entry = ((addresses(), lengths()), 0..8_u16, 0..SIZE + 2);
    prop::collection::vec(entry, usize::from(SIZE))
}

/// Takes all there is, writes to all writable buffers and completes. Checks that nothing else was
/// touched.
fn exhaust(bench: &mut Bench) -> Result<(), TestCaseError> {
    let before = bench.dump();
    let mut touched = vec![(RINGS.used, 6 + 8 * usize::from(SIZE))];
    let mut taken = 0;
    // What it writes may be the ring itself, and look like ever more requests.
    while taken < 64
        && let Some(chain) = bench.queue.pop()
    {
        taken += 1;
        let memory = &bench.memory;
        for segment in chain.readable().iter().chain(chain.writable()) {
            prop_assert!(segment.len > 0);
            prop_assert!(memory.check_range(segment.address, segment.len));
        }
        let readable = chain.readable_len();
        let mut data = vec![0; readable.min(1 << 20) + 1];
        prop_assert_eq!(chain.read(memory, 0, &mut data), readable.min(data.len()));
        let writable = chain.writable_len();
        let data = vec![0xa5; writable.min(1 << 20) + 1];
        prop_assert_eq!(chain.write(memory, 0, &data), writable.min(data.len()));
        let written = chain.writable().iter();
        touched.extend(written.map(|segment| (segment.address.0, segment.len)));
        bench.queue.complete(chain, u32::MAX);
    }
    bench.queue.signal();
    let is_touched = |address: u64| {
        touched
            .iter()
            .any(|(start, len)| address >= *start && address - start < *len as u64)
    };
    for ((start, _), (before, after)) in BANKS.into_iter().zip(before.iter().zip(bench.dump())) {
        for (offset, (old, new)) in before.iter().zip(after).enumerate() {
            let address = start + offset as u64;
            prop_assert!(
                *old == new || is_touched(address),
                "{:#x} was written",
                address
            );
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn no_descriptors_do_harm(
        direct in entries(),
        indirect in entries(),
        heads in prop::collection::vec(0..SIZE + 1, 1..usize::from(SIZE)),
        event_idx: bool,
    ) {
        let mut bench = Bench::with(event_idx);
        for (table, entries) in [(RINGS.descriptors, direct), (TABLE, indirect)] {
            for (index, (buffer, flags, next)) in (0..).zip(entries) {
                bench.descriptor(table, index, buffer, flags, next);
            }
        }
        for head in heads {
            bench.offer(head);
        }
        exhaust(&mut bench)?;
    }

    #[test]
    fn no_bytes_do_harm(seed in 1..u64::MAX, available in prop::option::of(0..=SIZE), event_idx: bool) {
        let mut bench = Bench::with(event_idx);
        let mut noise = Noise(seed);
        for (start, size) in BANKS {
            let mut bytes = vec![0; size];
            noise.fill(&mut bytes);
            bench.put(start, &bytes);
        }
        if let Some(available) = available {
            bench.set_available(available);
        }
        exhaust(&mut bench)?;
    }

    #[test]
    fn parts_are_what_slicing_would_give(
        lens in prop::collection::vec(1..9_usize, 0..6),
        offset in 0..60_usize,
        len in 0..60_usize,
    ) {
        let mut segments = Vec::new();
        let mut all = Vec::new();
        for (index, len) in lens.into_iter().enumerate() {
            let start = 0x100 * index as u64;
            segments.push(segment(start, len));
            all.extend(start..start + len as u64);
        }
        let wanted: Vec<u64> = all.into_iter().skip(offset).take(len).collect();
        let found = parts(&segments, offset, len)
            .flat_map(|part| part.address.0..part.address.0 + part.len as u64);
        prop_assert_eq!(found.collect::<Vec<_>>(), wanted);
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

#[test]
fn with_event_indexes_neither_sides_flags_count() {
    let mut bench = Bench::with(true);
    // NO_INTERRUPT of a driver that has event indexes.
    bench.put(RINGS.available, &[1, 0]);
    bench.offer_plain();
    bench.queue.silence();
    assert_eq!(load_u16(&bench.memory, RINGS.used), Some(0), "flags stay 0");
    bench.queue.serve(|queue, chain| queue.complete(chain, 0));
    assert_eq!(bench.interrupts(), 1);
    assert_eq!(load_u16(&bench.memory, RINGS.used), Some(0));
}

#[test]
fn without_event_indexes_the_drivers_used_event_does_not_count() {
    let mut bench = Bench::new();
    // Far away: with event indexes there would be no interrupt.
    bench.put(RINGS.available + 4 + 2 * u64::from(SIZE), &[0, 0x70]);
    bench.offer_plain();
    bench.queue.serve(|queue, chain| queue.complete(chain, 0));
    assert_eq!(bench.interrupts(), 1);
}

#[test]
fn kicks_for_nothing_do_nothing() {
    let mut bench = Bench::new();
    for _ in 0..3 {
        bench.queue.serve(|_, _| panic!("there is no request"));
    }
    assert_eq!(bench.interrupts(), 0);
    assert_eq!(load_u16(&bench.memory, RINGS.used + 2), Some(0));
}
