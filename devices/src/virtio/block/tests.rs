//! A disk between a driver and an engine that both behave, and that do not.

mod agreed;

use super::*;
use crate::virtio::fake::{BASE, Guest, MEMORY};
use proptest::prelude::*;
use std::collections::VecDeque;
use std::sync::Mutex;
use vm_memory::{Bytes, GuestAddress};

mod held;

const SIZE: usize = 64 << 10;
const ALL: u64 = FEATURE_FLUSH | FEATURE_DISCARD | FEATURE_WRITE_ZEROES;

/// A disk in memory, which does each request at once or when it is told to.
#[derive(Default)]
struct Store {
    disk: Vec<u8>,
    memory: Option<Arc<GuestMemoryMmap>>,
    /// All requests: what, offset, length, whether durable.
    seen: Vec<(Operation, u64, u64, bool)>,
    /// Whether requests stay under way until they are released.
    holds: bool,
    held: VecDeque<(u16, Operation, u64, u64, Vec<Segment>)>,
    finished: VecDeque<(u16, Outcome)>,
    fails: bool,
    waits: usize,
}

impl Store {
    fn perform(&mut self, operation: Operation, offset: u64, len: u64, data: &[Segment]) {
        let memory = self.memory.clone().expect("started");
        let disk = &mut self.disk[offset as usize..(offset + len) as usize];
        let mut at = 0;
        for part in data {
            let piece = &mut disk[at..at + part.len];
            at += part.len;
            match operation {
                Operation::Read => memory.write_slice(piece, part.address),
                _ => memory.read_slice(piece, part.address),
            }
            .expect("memory");
        }
        if let Operation::WriteZeroes { .. } = operation {
            disk.fill(0);
        }
    }

    fn release(&mut self, index: usize) {
        let (tag, operation, offset, len, data) = self.held.remove(index).expect("held");
        self.perform(operation, offset, len, &data);
        self.finished.push_back((tag, Outcome::Done));
    }
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Store>>);

impl Fake {
    fn new() -> Fake {
        let fake = Fake::default();
        fake.store().disk = (0..SIZE).map(|at| (at / 512) as u8).collect();
        fake
    }

    fn store(&self) -> std::sync::MutexGuard<'_, Store> {
        self.0.lock().expect("sound")
    }
}

impl Engine for Fake {
    fn start(&mut self, memory: &Arc<GuestMemoryMmap>) {
        self.store().memory = Some(Arc::clone(memory));
    }

    fn begin(&mut self, request: &Request<'_>) -> Option<Outcome> {
        let mut store = self.store();
        let Request {
            tag,
            operation,
            offset,
            len,
            durable,
            ..
        } = *request;
        store.seen.push((operation, offset, len, durable));
        let data: Vec<Segment> = request.data.parts().collect();
        let bytes: usize = data.iter().map(|part| part.len).sum();
        let has_data = matches!(operation, Operation::Read | Operation::Write);
        assert_eq!(bytes as u64, if has_data { len } else { 0 });
        if store.holds {
            let twin = store.held.iter().any(|held| held.0 == tag);
            assert!(!twin, "two requests under way have one tag");
            store.held.push_back((tag, operation, offset, len, data));
            return None;
        }
        if store.fails {
            return Some(Outcome::Failed);
        }
        store.perform(operation, offset, len, &data);
        Some(Outcome::Done)
    }

    fn finished(&mut self) -> Option<(u16, Outcome)> {
        self.store().finished.pop_front()
    }

    fn wait(&mut self, _most: Duration) {
        let mut store = self.store();
        store.waits += 1;
        store.release(0);
    }

    fn most_bytes(&self) -> u64 {
        8 << 10
    }

    fn depth(&self) -> u16 {
        4
    }

    fn stop(&mut self) {
        let mut store = self.store();
        assert!(store.held.is_empty(), "stopped with requests under way");
        store.memory = None;
    }
}

fn shape() -> Shape {
    Shape {
        size: SIZE as u64,
        readonly: false,
        serial: "root".to_owned(),
        queues: 1,
        block_size: 512,
        physical_block_size: 4096,
        optimal_io_size: 65536,
        discard_granularity: 4096,
    }
}

fn start(features: u64) -> (Guest<Block>, Fake) {
    start_as(&shape(), features)
}

fn start_as(shape: &Shape, features: u64) -> (Guest<Block>, Fake) {
    let fake = Fake::new();
    let device = Block::new(shape, Box::new(fake.clone()));
    (Guest::started(device, features), fake)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// Sends a request with one buffer to read and one to write; returns what is in the latter before
/// the status, the status, and the length that the device says it wrote.
fn ask_whole(guest: &mut Guest<Block>, readable: &[u8], room: usize) -> (Vec<u8>, u8, usize) {
    let to_read = guest.buffer(readable);
    let to_write = guest.buffer(&vec![0xee; room]);
    let parts = [
        (to_read, readable.len() as u32, 0),
        (to_write, room as u32, 2),
    ];
    let head = guest.chain(0, &parts);
    guest.kick(0);
    let used = used(guest, 0);
    assert_eq!(used.len(), 1, "one request, one answer");
    assert_eq!(used[0].0, head);
    let mut data = vec![0; room];
    let memory = guest.memory.clone();
    memory
        .read_slice(&mut data, GuestAddress(to_write))
        .expect("memory");
    let status = data.pop().expect("a status");
    (data, status, used[0].1)
}

/// Heads and lengths of what was used since the last look.
fn used(guest: &mut Guest<Block>, queue: usize) -> Vec<(u16, usize)> {
    let [_, _, ring] = guest.rings(queue);
    let memory = guest.memory.clone();
    let slot = |index: u16| -> [u32; 2] {
        let at = GuestAddress(ring + 4 + 8 * u64::from(index % 64));
        memory.read_obj(at).expect("ring")
    };
    let before: u16 = memory.read_obj(GuestAddress(ring + 2)).expect("ring");
    let new = guest.used(queue).len() as u16;
    (before.wrapping_sub(new)..before)
        .map(|index| (slot(index)[0] as u16, slot(index)[1] as usize))
        .collect()
}

fn ask(guest: &mut Guest<Block>, readable: &[u8], room: usize) -> u8 {
    ask_whole(guest, readable, room).1
}

fn config(guest: &mut Guest<Block>, offset: usize, bytes: usize) -> u64 {
    let mut data = vec![0; bytes];
    let _ = crate::Device::read(&mut guest.mmio, 0x100 + offset as u64, &mut data);
    data.iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[test]
fn the_configuration_describes_the_disk() {
    let mut guest = Guest::new(Block::new(&shape(), Box::new(Fake::new())));
    assert_eq!(guest.read(0x08), 2, "device ID");
    guest.write(0x14, 0);
    let offered = u64::from(guest.read(0x10));
    let wanted = ALL | FEATURE_SEG_MAX | FEATURE_BLK_SIZE | FEATURE_TOPOLOGY | FEATURE_CONFIG_WCE;
    assert_eq!(offered & !(1 << 28 | 1 << 29), wanted);
    assert_eq!(config(&mut guest, 0, 8), 128, "sectors");
    assert_eq!(config(&mut guest, 12, 4), 254, "most segments");
    assert_eq!(config(&mut guest, 20, 4), 512, "block size");
    assert_eq!(
        config(&mut guest, 24, 1),
        3,
        "log2 of blocks of a physical one"
    );
    assert_eq!(config(&mut guest, 26, 2), 8, "blocks to write at least");
    assert_eq!(config(&mut guest, 28, 4), 128, "blocks to write best");
    assert_eq!(config(&mut guest, 32, 1), 1, "writeback");
    assert_eq!(config(&mut guest, 34, 2), 1, "queues");
    assert_eq!(
        config(&mut guest, 36, 4),
        1 << 21,
        "most sectors of a discard"
    );
    assert_eq!(config(&mut guest, 40, 4), 1, "ranges of a discard");
    assert_eq!(
        config(&mut guest, 44, 4),
        8,
        "sectors of a piece to discard"
    );
    assert_eq!(config(&mut guest, 48, 4), 1 << 18, "most sectors of zeroes");
    assert_eq!(config(&mut guest, 52, 4), 1, "ranges of zeroes");
    assert_eq!(config(&mut guest, 56, 1), 1, "zeroes may unmap");
}

#[test]
fn a_disk_may_have_queues_and_be_read_only() {
    let shape = Shape {
        queues: 3,
        readonly: true,
        ..shape()
    };
    let mut guest = Guest::new(Block::new(&shape, Box::new(Fake::new())));
    let offered = u64::from(guest.read(0x10));
    assert_eq!(offered & FEATURE_MQ, FEATURE_MQ);
    assert_eq!(offered & FEATURE_RO, FEATURE_RO);
    assert_eq!(offered & (FEATURE_DISCARD | FEATURE_WRITE_ZEROES), 0);
    assert_eq!(config(&mut guest, 34, 2), 3);
}

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
fn who_does_not_flush_gets_durable_writes() {
    let durable = |features: u64| {
        let (mut guest, fake) = start(features);
        let zero = [header(WRITE_ZEROES, 0), range(0, 1, 0)].concat();
        ask(&mut guest, &[header(OUT, 0), vec![0; 512]].concat(), 1);
        ask(&mut guest, &zero, 1);
        let seen = fake.store().seen.clone();
        assert_eq!(seen.len(), 2);
        seen.iter().map(|seen| seen.3).collect::<Vec<_>>()
    };
    assert_eq!(durable(ALL), [false, false]);
    assert_eq!(durable(ALL & !FEATURE_FLUSH), [true, true]);
    assert_eq!(
        durable(ALL & !FEATURE_FLUSH | FEATURE_CONFIG_WCE),
        [true, true]
    );
    assert_eq!(durable(ALL | FEATURE_CONFIG_WCE), [false, false]);
}

#[test]
fn the_driver_chooses_the_mode_of_the_cache() {
    let (mut guest, fake) = start(ALL | FEATURE_CONFIG_WCE);
    let write = [header(OUT, 0), vec![0; 512]].concat();
    for (mode, durable) in [(0_u8, true), (1, false), (0, true)] {
        let _ = crate::Device::write(&mut guest.mmio, 0x100 + 32, &[mode]);
        assert_eq!(config(&mut guest, 32, 1), u64::from(mode));
        ask(&mut guest, &write, 1);
        assert_eq!(fake.store().seen.last().map(|seen| seen.3), Some(durable));
    }
    // Nothing else can be written.
    let _ = crate::Device::write(&mut guest.mmio, 0x100 + 32, &[2]);
    let _ = crate::Device::write(&mut guest.mmio, 0x100, &[9; 8]);
    assert_eq!(config(&mut guest, 32, 1), 0);
    assert_eq!(config(&mut guest, 0, 8), 128);
    // The next driver finds it as the first one did.
    guest.start(ALL | FEATURE_CONFIG_WCE);
    assert_eq!(config(&mut guest, 32, 1), 1);
    // Who did not ask for it cannot.
    guest.start(ALL);
    let _ = crate::Device::write(&mut guest.mmio, 0x100 + 32, &[0]);
    assert_eq!(config(&mut guest, 32, 1), 1);
}

#[test]
fn a_flush_is_begun_after_what_was_answered_before_it() {
    let (mut guest, fake) = start(ALL);
    fake.store().holds = true;
    let write = guest.request(0, &[&header(OUT, 1), &[7; 512]], &[1]);
    guest.kick(0);
    assert_eq!(guest.used(0), [], "it is not done before the engine is");
    fake.store().release(0);
    super::super::lock(&guest.device).ready(0);
    assert_eq!(guest.used(0), [(write, vec![OK])]);
    let flush = guest.request(0, &[&header(FLUSH, 0)], &[1]);
    guest.kick(0);
    assert_eq!(guest.used(0), []);
    let operations: Vec<_> = fake.store().seen.iter().map(|seen| seen.0).collect();
    assert_eq!(operations, [Operation::Write, Operation::Flush]);
    fake.store().release(0);
    super::super::lock(&guest.device).ready(0);
    assert_eq!(guest.used(0), [(flush, vec![OK])]);
}

#[test]
fn requests_end_in_any_order_with_one_interrupt() {
    let (mut guest, fake) = start(ALL);
    fake.store().holds = true;
    let heads: Vec<u16> = (0..4)
        .map(|sector| guest.request(0, &[&header(IN, sector)], &[512, 1]))
        .collect();
    guest.kick(0);
    assert_eq!(guest.interrupts(), 0);
    for index in [2, 0, 1, 0] {
        fake.store().release(index);
    }
    super::super::lock(&guest.device).ready(0);
    assert_eq!(guest.interrupts(), 1);
    let answers = guest.used(0);
    let order: Vec<u16> = answers.iter().map(|answer| answer.0).collect();
    assert_eq!(order, [heads[2], heads[0], heads[3], heads[1]]);
    for (head, data) in answers {
        let sector = heads
            .iter()
            .position(|known| *known == head)
            .expect("known");
        assert_eq!(data[..], [&[sector as u8; 512][..], &[OK]].concat());
    }
}

#[test]
fn more_requests_than_the_engine_takes_wait_their_turn() {
    let (mut guest, fake) = start(ALL);
    fake.store().holds = true;
    for sector in 0..10 {
        guest.request(0, &[&header(IN, sector)], &[512, 1]);
    }
    guest.kick(0);
    assert_eq!(fake.store().held.len(), 4);
    let mut answered = 0;
    while answered < 10 {
        fake.store().release(0);
        super::super::lock(&guest.device).ready(0);
        assert!(fake.store().held.len() <= 4);
        answered += guest.used(0).len();
    }
    assert_eq!(fake.store().seen.len(), 10);
    // The queue is looked at again.
    fake.store().holds = false;
    assert_eq!(guest.answer(0, &[&header(FLUSH, 0)], &[1]), [OK]);
}

/// A guest with two queues, of which the first has more requests than the engine takes.
fn crowded() -> (Guest<Block>, Fake) {
    let shape = Shape {
        queues: 2,
        ..shape()
    };
    let (mut guest, fake) = start_as(&shape, ALL | FEATURE_MQ);
    fake.store().holds = true;
    for sector in 0..6 {
        guest.request(0, &[&header(IN, sector)], &[512, 1]);
    }
    guest.kick(0);
    assert_eq!(fake.store().held.len(), 4);
    (guest, fake)
}

#[test]
fn a_queue_is_held_only_while_a_request_is_under_way() {
    let (mut guest, fake) = crowded();
    for _ in 0..4 {
        fake.store().release(0);
    }
    // The other queue's turn takes the completions, and nothing will become readable any more.
    guest.kick(1);
    assert_eq!(guest.used(0).len(), 4);
    assert_eq!(fake.store().held.len(), 2, "the first queue goes on");
    fake.store().release(0);
    fake.store().release(0);
    super::super::lock(&guest.device).ready(0);
    assert_eq!(guest.used(0).len(), 2);
}

#[test]
fn queues_that_wait_get_tags_in_turn() {
    let (mut guest, fake) = crowded();
    for _ in 0..4 {
        guest.request(1, &[&header(IN, 9)], &[512, 1]);
    }
    guest.kick(1);
    assert_eq!(guest.used(1), []);
    // Both have requests that wait: the first that is done makes room for the first in line, the
    // second one for the other.
    for _ in 0..2 {
        fake.store().release(0);
        super::super::lock(&guest.device).ready(0);
    }
    let offsets: Vec<u64> = fake.store().held.iter().map(|held| held.2).collect();
    assert_eq!(offsets, [2, 3, 4, 9].map(|sector| 512 * sector));
}

#[test]
fn what_one_queue_has_under_way_is_bounded_in_bytes() {
    let (mut guest, fake) = start(ALL);
    fake.store().holds = true;
    // The engine takes 8 KiB of a queue, and more of one request where it is alone.
    for (sector, bytes) in [(0, 16 << 10), (1, 4096), (2, 4096), (3, 512), (4, 512)] {
        guest.request(0, &[&header(IN, sector)], &[bytes, 1]);
    }
    guest.kick(0);
    let mut sizes = Vec::new();
    while !fake.store().held.is_empty() {
        let held: Vec<u64> = fake.store().held.iter().map(|held| held.3).collect();
        sizes.push(held);
        fake.store().release(0);
        super::super::lock(&guest.device).ready(0);
    }
    let wanted: [&[u64]; 5] = [
        &[16 << 10],
        &[4096, 4096],
        &[4096, 512, 512],
        &[512, 512],
        &[512],
    ];
    assert_eq!(sizes, wanted);
    assert_eq!(guest.used(0).len(), 5);
}

#[test]
fn a_reset_that_waits_for_the_disk_gets_it() {
    let (mut guest, fake) = start(ALL);
    let device = guest.device.clone();
    let flag = super::super::lock(&device).wanted_flag().expect("a flag");
    flag.store(true, Ordering::Release);
    guest.request(0, &[&header(IN, 0)], &[512, 1]);
    super::super::lock(&device).kicked(0);
    assert!(fake.store().seen.is_empty(), "nothing is begun");
    guest.start(ALL);
    assert!(!flag.load(Ordering::Acquire), "whoever set it cleared it");
    assert_eq!(guest.answer(0, &[&header(FLUSH, 0)], &[1]), [OK]);
}

#[test]
fn a_reset_has_whoever_holds_the_lock_let_go_of_it() {
    let (mut guest, _fake) = start(ALL);
    let device = guest.device.clone();
    let (tell, told) = std::sync::mpsc::channel();
    let worker = std::thread::spawn(move || {
        let held = super::super::lock(&device);
        let flag = held.cancel_flag().expect("a flag");
        tell.send(()).expect("somebody waits");
        while !flag.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
    });
    told.recv().expect("it has the lock");
    guest.write(0x70, 0);
    worker.join().expect("it saw the flag");
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
fn a_reset_waits_for_what_is_under_way() {
    let (mut guest, fake) = start(ALL);
    fake.store().holds = true;
    for sector in 0..6 {
        guest.request(0, &[&header(IN, sector)], &[512, 1]);
    }
    guest.kick(0);
    guest.write(0x70, 0);
    assert_eq!(fake.store().waits, 4, "those under way, and no others");
    assert!(fake.store().memory.is_none(), "memory is let go");
    // A late event finds nothing, and the next driver a device that works.
    super::super::lock(&guest.device).ready(0);
    fake.store().holds = false;
    guest.start(ALL);
    assert_eq!(
        guest.answer(0, &[&header(IN, 9)], &[512, 1])[..512],
        [9; 512]
    );
}

#[test]
fn requests_made_before_the_start_are_served() {
    let (mut guest, _fake) = start(ALL);
    guest.negotiate(ALL);
    guest.set_up_queue(0);
    guest.request(0, &[&header(FLUSH, 0)], &[1]);
    guest.write(0x70, 15);
    // The device rings for itself; the driver does not kick.
    let kick = guest.mmio.kicks()[0].clone();
    assert!(kick.read().is_ok());
    super::super::lock(&guest.device).kicked(0);
    assert_eq!(guest.used(0).len(), 1);
}

#[test]
fn a_disk_grows_and_shrinks_under_its_guest() {
    let (mut guest, _fake) = start(ALL);
    assert_eq!(ask(&mut guest, &header(IN, 100), 513), OK);
    let before = guest.interrupts();
    super::super::lock(&guest.device).set_size(100 * 512 + 511);
    assert_eq!(config(&mut guest, 0, 8), 100);
    assert_eq!(guest.read(0x60) & 2, 2, "a configuration change");
    assert_eq!(guest.interrupts(), before + 1);
    assert_eq!(ask(&mut guest, &header(IN, 100), 513), IOERR);
    super::super::lock(&guest.device).set_size(SIZE as u64);
    assert_eq!(ask(&mut guest, &header(IN, 100), 513), OK);
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

/// A request as a driver makes it, with its buffers cut at random.
#[derive(Clone, Debug)]
struct Random {
    kind: u32,
    sector: u64,
    sectors: u64,
    fill: u8,
    cuts: Vec<usize>,
}

fn random() -> impl Strategy<Value = Random> {
    let kind = prop::sample::select(vec![IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES]);
    let cuts = prop::collection::vec(1_usize..900, 0..6);
    (kind, 0_u64..132, 0_u64..8, any::<u8>(), cuts).prop_map(
        |(kind, sector, sectors, fill, cuts)| Random {
            kind,
            sector,
            sectors,
            fill,
            cuts,
        },
    )
}

/// Puts buffers at the places where a number of bytes is cut.
fn cut(total: usize, cuts: &[usize]) -> Vec<usize> {
    let mut left = total;
    let mut sizes = Vec::new();
    for size in cuts {
        let size = (*size).min(left);
        if size > 0 {
            sizes.push(size);
        }
        left -= size;
    }
    if left > 0 {
        sizes.push(left);
    }
    sizes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_disk_is_what_was_written_to_it(requests in prop::collection::vec(random(), 1..40)) {
        let (mut guest, fake) = start(ALL);
        let mut model = fake.store().disk.clone();
        for request in requests {
            let bytes = request.sectors as usize * 512;
            let start = request.sector as usize * 512;
            let fits = start + bytes <= SIZE;
            let (mut readable, mut room) = (header(request.kind, request.sector), 1);
            match request.kind {
                OUT => readable.extend(vec![request.fill; bytes]),
                IN => room += bytes,
                GET_ID => room += 20,
                DISCARD | WRITE_ZEROES => {
                    readable.extend(range(request.sector, request.sectors as u32, 0));
                }
                _ => {}
            }
            let mut parts = Vec::new();
            let mut at = 0;
            for size in cut(readable.len(), &request.cuts) {
                let address = guest.buffer(&readable[at..at + size]);
                parts.push((address, size as u32, 0));
                at += size;
            }
            let rooms: Vec<(u64, usize)> = cut(room, &request.cuts)
                .into_iter()
                .map(|size| (guest.buffer(&vec![0xee; size]), size))
                .collect();
            parts.extend(rooms.iter().map(|(address, size)| (*address, *size as u32, 2)));
            guest.chain(0, &parts);
            guest.kick(0);
            prop_assert_eq!(guest.used(0).len(), 1);
            let mut data = Vec::new();
            for (address, size) in rooms {
                let mut part = vec![0; size];
                guest.memory.read_slice(&mut part, GuestAddress(address)).expect("memory");
                data.extend(part);
            }
            let whole_disk = matches!(request.kind, FLUSH | GET_ID);
            let wanted = if fits || whole_disk { OK } else { IOERR };
            prop_assert_eq!(data.pop(), Some(wanted));
            if fits {
                match request.kind {
                    OUT => model[start..start + bytes].fill(request.fill),
                    WRITE_ZEROES => model[start..start + bytes].fill(0),
                    IN => prop_assert_eq!(&data[..], &model[start..start + bytes]),
                    _ => {}
                }
            }
            prop_assert_eq!(&fake.store().disk, &model);
        }
    }

    #[test]
    fn nothing_that_a_driver_writes_does_harm(
        chains in prop::collection::vec(
            prop::collection::vec((any::<u32>(), 0_u32..70_000, 0_u16..8), 1..6),
            1..12,
        ),
        headers in prop::collection::vec((0_u32..16, any::<u64>(), any::<bool>()), 12),
        config in prop::collection::vec((0_u64..80, any::<u32>()), 0..4),
    ) {
        let (mut guest, fake) = start(ALL | FEATURE_CONFIG_WCE);
        for (chain, (kind, sector, near)) in chains.iter().zip(headers) {
            let sector = if near { sector % 130 } else { sector };
            let header = guest.buffer(&header(kind, sector));
            let parts: Vec<(u64, u32, u16)> = chain
                .iter()
                .enumerate()
                .map(|(index, (address, len, flags))| match index {
                    0 => (header, 16, 0),
                    // Mostly within memory, and never in the rings.
                    _ => (BASE + (1 << 20) + u64::from(*address) % MEMORY as u64, *len, flags & 6),
                })
                .collect();
            guest.chain(0, &parts);
            guest.kick(0);
        }
        for (offset, value) in config {
            let _ = crate::Device::write(&mut guest.mmio, 0x100 + offset, &value.to_le_bytes());
        }
        guest.used(0);
        // Whatever it was, a reset makes it good.
        guest.start(ALL);
        fake.store().disk.fill(3);
        prop_assert_eq!(guest.answer(0, &[&header(IN, 1)], &[1])[0], OK);
    }
}

#[test]
fn a_queue_stops_when_what_is_under_way_there_is_done() {
    let shape = Shape {
        queues: 2,
        ..shape()
    };
    let (mut guest, fake) = start_as(&shape, FEATURE_MQ | FEATURE_FLUSH);
    fake.store().holds = true;
    // As many as the engine takes: one in the other queue, which has one more than that.
    for _ in 0..2 {
        guest.request(1, &[&header(IN, 0)], &[512, 1]);
    }
    for _ in 0..3 {
        guest.request(0, &[&header(IN, 0)], &[512, 1]);
    }
    guest.kick(0);
    guest.kick(1);
    assert_eq!(fake.store().held.len(), 4);
    guest.stop_queue(0);
    assert_eq!(
        used(&mut guest, 0).len(),
        3,
        "the engine does not write to its buffers later"
    );
    assert_eq!(fake.store().held.len(), 1);
    // Nothing comes out of it, and the other queue's request that waited for a tag gets one.
    guest.request(0, &[&header(IN, 0)], &[512, 1]);
    guest.kick(0);
    guest.kick(1);
    assert_eq!(fake.store().held.len(), 2);
    while !fake.store().held.is_empty() {
        fake.store().release(0);
    }
    crate::virtio::lock(&guest.device).ready(0);
    assert_eq!(used(&mut guest, 1).len(), 2);
    assert!(used(&mut guest, 0).is_empty());
    guest.set_up_queue(0);
    fake.store().holds = false;
    assert_eq!(guest.answer(0, &[&header(IN, 1)], &[512, 1])[512], OK);
    assert_eq!(guest.mmio.faults(), 0);
}
