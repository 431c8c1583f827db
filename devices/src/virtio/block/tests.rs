//! A disk between a driver and an engine that both behave, and that do not.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::request::*;
use super::shape::*;
use super::*;
use crate::virtio::fake::{BASE, Guest, MEMORY};
use crate::virtio::lock;
use crate::virtio::queue::Segment;

mod agreed;
mod anything;
mod held;
mod limits;
mod requests;
mod storage;

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
    /// How often it was turned to other storage, and whether something was under way then.
    renewals: Vec<bool>,
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

    fn renew(&mut self) {
        let mut store = self.store();
        let is_busy = !store.held.is_empty();
        store.renewals.push(is_busy);
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
        flushes: true,
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
    lock(&guest.device).ready(0);
    assert_eq!(guest.used(0), [(write, vec![OK])]);
    let flush = guest.request(0, &[&header(FLUSH, 0)], &[1]);
    guest.kick(0);
    assert_eq!(guest.used(0), []);
    let operations: Vec<_> = fake.store().seen.iter().map(|seen| seen.0).collect();
    assert_eq!(operations, [Operation::Write, Operation::Flush]);
    fake.store().release(0);
    lock(&guest.device).ready(0);
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
    lock(&guest.device).ready(0);
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
        lock(&guest.device).ready(0);
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
    lock(&guest.device).ready(0);
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
        lock(&guest.device).ready(0);
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
        lock(&guest.device).ready(0);
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
    let flag = lock(&device).wanted_flag().expect("a flag");
    flag.store(true, Ordering::Release);
    guest.request(0, &[&header(IN, 0)], &[512, 1]);
    lock(&device).kicked(0);
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
        let held = lock(&device);
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
    lock(&guest.device).ready(0);
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
    lock(&guest.device).kicked(0);
    assert_eq!(guest.used(0).len(), 1);
}

#[test]
fn a_disk_grows_and_shrinks_under_its_guest() {
    let (mut guest, _fake) = start(ALL);
    assert_eq!(ask(&mut guest, &header(IN, 100), 513), OK);
    let before = guest.interrupts();
    lock(&guest.device).set_size(100 * 512 + 511);
    assert_eq!(config(&mut guest, 0, 8), 100);
    assert_eq!(guest.read(0x60) & 2, 2, "a configuration change");
    assert_eq!(guest.interrupts(), before + 1);
    assert_eq!(ask(&mut guest, &header(IN, 100), 513), IOERR);
    lock(&guest.device).set_size(SIZE as u64);
    assert_eq!(ask(&mut guest, &header(IN, 100), 513), OK);
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
    lock(&guest.device).ready(0);
    assert_eq!(used(&mut guest, 1).len(), 2);
    assert!(used(&mut guest, 0).is_empty());
    guest.set_up_queue(0);
    fake.store().holds = false;
    assert_eq!(guest.answer(0, &[&header(IN, 1)], &[512, 1])[512], OK);
    assert_eq!(guest.mmio.faults(), 0);
}
