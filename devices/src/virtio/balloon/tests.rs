//! A balloon on hosts with pages of several sizes.

use std::collections::BTreeSet;
use std::sync::Mutex;

use proptest::prelude::*;
use vm_memory::GuestMemoryBackend;

use super::working::{MOST_NUMBERS, NUMBER};
use super::*;
use crate::Device;
use crate::virtio::fake::{BASE, Guest, MEMORY};
use crate::virtio::lock;

mod statements;

const ALL: Offer = Offer {
    reporting: true,
    hinting: true,
    deflate_on_oom: true,
};
const REPORTING: Offer = Offer {
    hinting: false,
    deflate_on_oom: false,
    ..ALL
};
const NOTHING: Offer = Offer {
    reporting: false,
    ..REPORTING
};

/// Number of the first page of memory.
const FIRST: u32 = (BASE / PAGE) as u32;
/// First page above the fake driver's rings and buffers.
const FREE: u32 = FIRST + 1024;

/// What went back: address and bytes.
type Log = Arc<Mutex<Vec<(u64, u64)>>>;

struct FakeHost {
    page_size: u64,
    log: Log,
}

impl Discard for FakeHost {
    fn page_size(&self) -> u64 {
        self.page_size
    }

    fn discard(&self, memory: &GuestMemoryMmap, address: GuestAddress, len: u64) -> bool {
        assert!(len > 0 && len.is_multiple_of(self.page_size));
        assert!(address.0.is_multiple_of(self.page_size));
        assert!(memory.check_range(address, len as usize));
        lock(&self.log).push((address.0, len));
        true
    }
}

struct Bench {
    guest: Guest<Balloon>,
    log: Log,
}

impl Bench {
    fn new(page_size: u64, offer: Offer) -> Bench {
        let log = Log::default();
        let host = FakeHost {
            page_size,
            log: Arc::clone(&log),
        };
        let balloon = Balloon::new(16 << 20, offer, Box::new(host));
        Bench {
            guest: Guest::new(balloon),
            log,
        }
    }

    /// The machine is held and goes on, with another balloon in the stead of this one if it `moves`.
    fn hold(&mut self, moves: bool) {
        if !moves {
            self.guest.pause();
            return;
        }
        let (offer, page_size) = {
            let device = lock(&self.guest.device);
            (device.offer, device.discard.page_size())
        };
        let host = FakeHost {
            page_size,
            log: Arc::clone(&self.log),
        };
        self.guest.move_to(Balloon::new(0, offer, Box::new(host)));
    }

    /// Returns a driver that takes all that is offered, as Linux does where it fills free pages.
    fn started(page_size: u64, offer: Offer) -> Bench {
        let mut bench = Bench::new(page_size, offer);
        let features = lock(&bench.guest.device).features();
        bench.guest.start(features);
        bench
    }

    fn send(&mut self, queue: usize, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.guest.request(queue, &[&bytes], &[]);
        self.guest.kick(queue);
        assert_eq!(self.guest.used(queue).len(), 1);
    }

    fn inflate(&mut self, pages: &[u32]) {
        self.send(0, pages);
    }

    fn deflate(&mut self, pages: &[u32]) {
        self.send(1, pages);
    }

    /// Returns what went back since the last look, by page.
    fn back(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut *lock(&self.log))
    }

    fn config(&mut self, field: usize) -> u32 {
        self.guest.read(0x100 + field as u64)
    }

    fn told(&mut self) -> bool {
        let told = self.guest.read(0x60) & 2 != 0;
        self.guest.write(0x64, 2);
        told
    }

    /// Reports ranges: address and bytes.
    fn report(&mut self, queue: usize, ranges: &[(u64, u32)]) {
        let parts: Vec<_> = ranges.iter().map(|(at, len)| (*at, *len, 2)).collect();
        self.guest.chain(queue, &parts);
        self.guest.kick(queue);
        self.guest.used(queue);
    }
}

fn at(page: u32) -> u64 {
    u64::from(page) * PAGE
}

#[test]
fn pages_in_the_balloon_go_back_to_the_host() {
    let mut bench = Bench::started(PAGE, NOTHING);
    // In the order of the guest's allocator, which is none.
    bench.inflate(&[FREE + 7, FREE, FREE + 2, FREE + 1, FREE]);
    assert_eq!(bench.back(), [(at(FREE), 3 * PAGE), (at(FREE + 7), PAGE)]);
    assert_eq!(lock(&bench.guest.device).discarded(), 4 * PAGE);
    bench.deflate(&[FREE]);
    assert_eq!(bench.back(), []);
    bench.inflate(&[FREE]);
    assert_eq!(bench.back(), [(at(FREE), PAGE)]);
}

#[test]
fn a_larger_page_goes_back_when_all_of_it_is_in() {
    for parts in [4_u32, 16] {
        let host = u64::from(parts) * PAGE;
        let mut bench = Bench::started(host, NOTHING);
        let pages: Vec<u32> = (FREE..FREE + 3 * parts).collect();
        // All but one of the first, the second, all but one of the third.
        let some: Vec<u32> = pages[1..pages.len() - 1].to_vec();
        bench.inflate(&some);
        assert_eq!(bench.back(), [(at(FREE + parts), host)]);
        // Once more tells nothing new.
        bench.inflate(&some);
        assert_eq!(bench.back(), []);
        bench.inflate(&[pages[0], pages[pages.len() - 1]]);
        let last = at(FREE + 2 * parts);
        assert_eq!(bench.back(), [(at(FREE), host), (last, host)]);
        // The guest takes a part out again: the page is in use.
        bench.deflate(&[pages[3]]);
        bench.inflate(&[pages[2]]);
        assert_eq!(bench.back(), []);
        bench.inflate(&[pages[3]]);
        assert_eq!(bench.back(), [(at(FREE), host)]);
    }
}

#[test]
fn after_a_reset_all_pages_are_the_guests() {
    let mut bench = Bench::started(4 * PAGE, ALL);
    bench.inflate(&[FREE, FREE + 1, FREE + 2]);
    bench.guest.write(0x104, 3);
    assert_eq!(lock(&bench.guest.device).actual(), 3 * PAGE);
    bench.guest.start(0);
    assert_eq!(lock(&bench.guest.device).actual(), 0);
    bench.inflate(&[FREE + 3]);
    assert_eq!(bench.back(), [], "the others are in use");
    bench.inflate(&[FREE, FREE + 1, FREE + 2]);
    assert_eq!(bench.back(), [(at(FREE), 4 * PAGE)]);
    assert_eq!(
        lock(&bench.guest.device).target(),
        16 << 20,
        "the host's wish stays"
    );
}

#[test]
fn pages_that_are_not_in_memory_stay_out_of_it() {
    for page_size in [PAGE, 16 * PAGE] {
        let mut bench = Bench::started(page_size, NOTHING);
        let last = FIRST + (MEMORY as u64 / PAGE) as u32 - 1;
        bench.inflate(&[0, FIRST - 1, last + 1, u32::MAX]);
        assert_eq!(bench.back(), []);
        assert_eq!(bench.guest.mmio.faults(), 1);
        let pages: Vec<u32> = (last - 15..last + 17).collect();
        bench.inflate(&pages);
        assert_eq!(bench.back(), [(at(last - 15), 16 * PAGE)]);
        assert_eq!(bench.guest.mmio.faults(), 2);
        assert!(!bench.guest.is_broken());
    }
}

#[test]
fn odd_requests_do_no_harm() {
    let mut bench = Bench::started(PAGE, NOTHING);
    bench.inflate(&[]);
    // A number and a half, in pieces.
    let bytes = FREE.to_le_bytes();
    bench
        .guest
        .request(0, &[&bytes[..1], &bytes[1..], &bytes[..2]], &[]);
    bench.guest.kick(0);
    assert_eq!(bench.back(), [(at(FREE), PAGE)]);
    assert_eq!(bench.guest.mmio.faults(), 1);
    // Nothing to read.
    bench.guest.request(1, &[], &[64]);
    bench.guest.kick(1);
    assert_eq!(bench.guest.used(1).len(), 1);
    // As many as fit, and more than any driver sends.
    let most: Vec<u8> = FREE.to_le_bytes().repeat(MOST_NUMBERS / NUMBER);
    bench.guest.request(0, &[&most], &[]);
    bench.guest.kick(0);
    assert_eq!(bench.back(), [(at(FREE), PAGE)]);
    assert!(!bench.guest.is_broken());
    bench.guest.request(0, &[&most, &bytes], &[]);
    bench.guest.kick(0);
    assert!(bench.guest.is_broken());
    assert_eq!(bench.back(), []);
}

#[test]
fn the_target_is_told() {
    let mut bench = Bench::new(PAGE, NOTHING);
    assert_eq!(bench.config(TARGET), 4096);
    lock(&bench.guest.device).set_target(1 << 20);
    assert_eq!(bench.config(TARGET), 256);
    bench.guest.start(0);
    assert!(!bench.told());
    lock(&bench.guest.device).set_target(3 * PAGE + 5);
    assert!(bench.told());
    assert_eq!(bench.config(TARGET), 3);
    lock(&bench.guest.device).set_target(u64::MAX);
    assert_eq!(bench.config(TARGET), u32::MAX);
}

#[test]
fn the_driver_writes_its_fields_only() {
    let mut bench = Bench::started(PAGE, ALL);
    for (offset, data) in [
        (0, &[1_u8; 4][..]),
        (3, &[1; 2]),
        (8, &[1; 4]),
        (6, &[1; 4]),
        (14, &[1; 4]),
        (16, &[1; 4]),
        (0, &[1; 16]),
        (0xff, &[1; 1]),
    ] {
        let _ = bench.guest.mmio.write(0x100 + offset, data);
    }
    assert_eq!(bench.guest.mmio.faults(), 8);
    let fields = [TARGET, ACTUAL, COMMAND, POISON].map(|field| bench.config(field));
    assert_eq!(fields, [4096, 0, 0, 0]);
    let _ = bench.guest.mmio.write(0x104, &7_u32.to_le_bytes());
    let _ = bench.guest.mmio.write(0x10f, &[0xaa]);
    assert_eq!(bench.config(ACTUAL), 7);
    assert_eq!(bench.config(POISON), 0xaa00_0000);
    assert_eq!(lock(&bench.guest.device).actual(), 7 * PAGE);
}

#[test]
fn queues_have_the_numbers_that_the_features_leave() {
    // Offered all; taken: what is named.
    let cases = [
        (0, None, None),
        (FEATURE_REPORTING, None, Some(2)),
        (FEATURE_STATISTICS | FEATURE_REPORTING, Some(2), Some(3)),
        (FEATURE_HINTING | FEATURE_REPORTING, None, Some(3)),
        (
            FEATURE_STATISTICS | FEATURE_HINTING | FEATURE_REPORTING,
            Some(2),
            Some(4),
        ),
    ];
    for (features, statistics, reports) in cases {
        let mut bench = Bench::new(PAGE, ALL);
        bench.guest.start(features);
        if let Some(queue) = reports {
            bench.report(queue, &[(at(FREE), 2 << 20)]);
            assert_eq!(bench.back(), [(at(FREE), 2 << 20)], "{features:#x}");
        }
        if let Some(queue) = statistics {
            bench
                .guest
                .request(queue, &[&[4, 0, 9, 0, 0, 0, 0, 0, 0, 0]], &[]);
            bench.guest.kick(queue);
            let device = lock(&bench.guest.device);
            let all: Vec<_> = device.statistics().expect("them").iter().collect();
            assert_eq!(all, [("free", 9)], "{features:#x}");
        }
    }
    assert_eq!(
        lock(&Bench::new(PAGE, NOTHING).guest.device)
            .queue_sizes()
            .len(),
        3
    );
    assert_eq!(
        lock(&Bench::new(PAGE, ALL).guest.device)
            .queue_sizes()
            .len(),
        5
    );
}

#[test]
fn what_is_offered_is_what_was_asked_for() {
    let features = |page_size, offer| lock(&Bench::new(page_size, offer).guest.device).features();
    assert_eq!(features(PAGE, NOTHING), FEATURE_STATISTICS);
    assert_eq!(
        features(PAGE, REPORTING),
        FEATURE_STATISTICS | FEATURE_REPORTING | FEATURE_POISON
    );
    assert_eq!(features(PAGE, ALL), 0b11_1110);
    // Where a page of the host has parts, they must not be in use without our knowing.
    assert_eq!(features(4 * PAGE, ALL), 0b11_1111);
}

#[test]
fn a_balloon_without_some_of_its_queues_does_no_harm() {
    let mut bench = Bench::new(PAGE, ALL);
    bench
        .guest
        .negotiate(FEATURE_STATISTICS | FEATURE_REPORTING);
    bench.guest.set_up_queue(0);
    bench.guest.write(0x70, 15);
    for queue in 0..5 {
        bench.guest.kick(queue);
    }
    assert!(!lock(&bench.guest.device).ask_for_statistics());
    bench.inflate(&[FREE]);
    assert_eq!(bench.back(), [(at(FREE), PAGE)]);
}

#[test]
fn banks_that_meet_within_a_page_of_the_host_are_one() {
    let banks = [(GuestAddress(0), 0x5000), (GuestAddress(0x5000), 0x1b000)];
    let memory = GuestMemoryMmap::from_ranges(&banks).expect("memory");
    let mut inside = Inside::new(&memory);
    for page in [0x4000, 0x5000, 0x6000] {
        assert!(!inside.insert(page, 0x4000));
    }
    assert!(inside.insert(0x7000, 0x4000));
    assert!(!inside.insert(0x7000, 0x4000), "it went back already");
    inside.remove(0x5000);
    assert!(inside.insert(0x5000, 0x4000));
    assert!(!inside.insert(0x1000_0000, 0x4000));
}

#[test]
fn a_buffer_outside_memory_fails_its_request_only() {
    let mut bench = Bench::started(PAGE, REPORTING);
    for (queue, is_writable) in [(0, false), (1, false), (3, true)] {
        let faults = bench.guest.mmio.faults();
        let parts = [is_writable, is_writable];
        bench.guest.request_outside(queue, &parts, 1);
        assert_eq!(bench.guest.used(queue).len(), 1, "queue {queue}");
        assert_eq!(bench.guest.mmio.faults(), faults + 1);
        assert_eq!(bench.back(), []);
    }
    assert!(!bench.guest.is_broken());
    bench.inflate(&[FREE]);
    assert_eq!(bench.back(), [(u64::from(FREE) * PAGE, PAGE)]);
}

proptest! {
    /// A page of the host goes back when the last of its parts comes in, and at no other time.
    #[test]
    fn a_page_in_use_never_goes_back(
        shift in 0..5_u32,
        acts in prop::collection::vec(
            (any::<bool>(), prop::collection::vec(FREE..FREE + 48, 1..40)),
            1..20,
        ),
        holds in prop::collection::vec(prop::option::weighted(0.3, any::<bool>()), 20),
    ) {
        let parts = 1 << shift;
        let host = u64::from(parts) * PAGE;
        let mut bench = Bench::started(host, NOTHING);
        let mut inside: BTreeSet<u32> = BTreeSet::new();
        for ((inflate, pages), hold) in acts.into_iter().zip(holds) {
            if let Some(moves) = hold {
                bench.hold(moves);
                prop_assert_eq!(bench.back(), []);
            }
            if !inflate {
                bench.deflate(&pages);
                inside.retain(|page| !pages.contains(page));
                prop_assert_eq!(bench.back(), []);
                continue;
            }
            let is_full = |inside: &BTreeSet<u32>, first: u32| {
                (first..first + parts).all(|page| inside.contains(&page))
            };
            let before = inside.clone();
            inside.extend(&pages);
            let mut expected = BTreeSet::new();
            for page in &pages {
                let first = page - page % parts;
                // On a host with pages of 4 KiB there is no record, and once more does no harm.
                let is_new = parts == 1 || !is_full(&before, first);
                if is_new && is_full(&inside, first) {
                    expected.insert(at(first));
                }
            }
            bench.inflate(&pages);
            let back: Vec<u64> = bench
                .back()
                .into_iter()
                .flat_map(|(start, len)| (start..start + len).step_by(host as usize))
                .collect();
            prop_assert_eq!(back, expected.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn no_request_does_harm(
        requests in prop::collection::vec(
            (0..5_usize, prop::collection::vec(any::<u8>(), 0..64), 0..3_usize, 0..0x3000_usize),
            1..30,
        ),
        shift in 0..5_u32,
        asks in any::<u32>(),
    ) {
        // The host asserts that what goes back is whole pages of memory.
        let mut bench = Bench::started(PAGE << shift, ALL);
        for (index, (queue, data, writable, size)) in requests.into_iter().enumerate() {
            if asks >> (index % 32) & 1 == 1 {
                lock(&bench.guest.device).ask_for_statistics();
                lock(&bench.guest.device).ask_for_hints();
            }
            bench.guest.request(queue, &[&data], &vec![size; writable]);
            bench.guest.kick(queue);
        }
        prop_assert!(!bench.guest.is_broken());
    }
}

#[test]
fn a_queue_that_is_stopped_takes_nothing_and_forgets_its_buffer() {
    let mut bench = Bench::started(4096, NOTHING);
    bench.guest.request(2, &[&[0; 10]], &[]);
    bench.guest.kick(2);
    bench.guest.stop_queue(2);
    assert!(!lock(&bench.guest.device).ask_for_statistics());
    bench.guest.set_up_queue(2);
    bench.guest.request(2, &[&[0; 10]], &[]);
    bench.guest.kick(2);
    assert!(lock(&bench.guest.device).ask_for_statistics());
    assert_eq!(bench.guest.used(2).len(), 1);
    bench.guest.stop_queue(0);
    bench.guest.request(0, &[&FREE.to_le_bytes()], &[]);
    bench.guest.kick(0);
    assert!(bench.guest.used(0).is_empty() && bench.back().is_empty());
    bench.deflate(&[FREE]);
    bench.guest.set_up_queue(0);
    bench.inflate(&[FREE]);
    assert_eq!(bench.back(), [(at(FREE), 4096)]);
    assert_eq!(bench.guest.mmio.faults(), 0);
}
