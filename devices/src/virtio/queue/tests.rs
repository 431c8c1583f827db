//! Rings as a hostile driver writes them.

use std::sync::atomic::AtomicUsize;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemoryBackend};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::chain::{INDIRECT, MOST_SEGMENTS, NEXT, WRITE};
use super::*;
use crate::virtio::{Interrupts, Vector};

mod anything;
mod buffers;
mod chains;
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

/// Loads a little-endian 16-bit number of a ring.
fn load_u16(memory: &GuestMemoryMmap, address: u64) -> Option<u16> {
    memory
        .load::<u16>(GuestAddress(address), Ordering::Acquire)
        .map(u16::from_le)
        .ok()
}

fn segment(address: u64, len: usize) -> Segment {
    let address = GuestAddress(address);
    Segment { address, len }
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
