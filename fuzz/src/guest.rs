//! A guest that does what an input says: its driver works by the rules, breaks them, or both in
//! turn. After each step it is checked that the device kept its side.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use armlet_devices::virtio::mmio::{Mmio, QUEUE_NOTIFY, RegisterPage, WINDOW_SIZE};
use armlet_devices::virtio::{
    FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1, VirtioDevice,
};
use armlet_devices::{Device, IrqLine};

use super::input::Input;
use super::memory::{BASE, END, HOLE, Memory, TABLES};
use super::ring::{INDIRECT, NEXT, Ring, WRITE};

mod hold;

#[allow(
    unused_imports,
    reason = "tests/corpus.rs has it, and a fuzzer does not"
)]
pub use hold::holding;

/// Registers of virtio over MMIO (virtio 1.2, section 4.2.2), by their offsets in bytes.
pub mod register {
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC: u64 = 0x80;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DEVICE: u64 = 0xa0;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}
use register::*;

/// Status bits.
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
pub const NEEDS_RESET: u32 = 64;

/// The most that an input can ask for: steps, and calls of a device until it has nothing to do.
const STEPS: usize = 256;
const ROUNDS: usize = 4096;
/// Offset of the first data in memory, where queues have up to 16 entries.
const DATA: u64 = 0x1000;
/// Sizes of buffers that devices think of.
const SIZES: [usize; 20] = [
    0, 1, 2, 4, 8, 11, 12, 13, 16, 17, 20, 40, 44, 45, 100, 512, 513, 1024, 1526, 4096,
];

/// A device and the world around it.
pub trait Subject {
    type Device: VirtioDevice + 'static;

    /// Bytes that a driver would write for a request in this queue.
    fn payload(&mut self, queue: usize, input: &mut Input<'_>) -> Vec<u8>;

    /// Something happens in the world.
    fn event(&mut self, device: &Mutex<Self::Device>, input: &mut Input<'_>);

    /// The device is called for its kicks, as long as there are any. Returns whether it was.
    fn kicks(&mut self, guest: &mut Mmio, device: &Mutex<Self::Device>) -> bool {
        let mut was_kicked = false;
        for (queue, kick) in guest.kicks().to_vec().iter().enumerate() {
            if kick.read().is_ok() {
                lock(device).kicked(queue);
                was_kicked = true;
            }
        }
        was_kicked
    }

    /// Nothing keeps the device from its work any more; it is called as often as it takes.
    fn finish(&mut self, device: &Mutex<Self::Device>) {
        let _ = device;
    }

    /// Whether a queue is empty then, if the driver did not break it.
    fn is_drained(&self, queue: usize) -> bool;

    /// Whether nothing holds the device up now: then what it was kicked for is done.
    fn is_idle(&self) -> bool {
        false
    }

    /// Nothing stands in the way of a device that starts again.
    fn heal(&mut self, device: &Mutex<Self::Device>) {
        let _ = device;
    }

    /// Another device of the same kind, that no driver has touched, in the same world.
    fn fresh(&mut self) -> Option<Self::Device>;

    /// Whether another process works on the rings now.
    fn has_other_worker(&self) -> bool {
        false
    }

    /// Guest memory that the world was told to change: address, bytes.
    fn touched(&mut self) -> Vec<(u64, u64)> {
        Vec::new()
    }
}

/// Nothing here panics with a lock held and goes on.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nobody panicked")
}

/// A page that remembers what is in it.
struct Page(Mutex<[u32; WINDOW_SIZE / 4]>);

impl RegisterPage for Page {
    fn store(&self, offset: usize, value: u32) {
        assert!(offset.is_multiple_of(4) && offset < WINDOW_SIZE);
        lock(&self.0)[offset / 4] = value;
    }
}

/// Counts edges.
#[derive(Default)]
struct Line(AtomicUsize);

impl IrqLine for Line {
    fn set(&self, _high: bool) {
        panic!("virtio's lines have edges only");
    }

    fn pulse(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the driver wrote to a queue's registers.
#[derive(Clone, Copy, Default)]
pub struct QueueModel {
    pub most: u16,
    pub size: u32,
    pub ready: bool,
    pub addresses: [u64; 3],
}

/// A guest, its device, and the input that says what they do.
pub struct Guest<S: Subject> {
    pub subject: S,
    pub device: Arc<Mutex<S::Device>>,
    pub mmio: Mmio,
    pub memory: Memory,
    page: Arc<Page>,
    line: Arc<Line>,
    offered: u64,
    sizes: Vec<u16>,
    /// What the driver wrote.
    pub queues: Vec<QueueModel>,
    select: u32,
    accept_select: u32,
    accepted: u64,
    status: u32,
    started: bool,
    /// Whether the device took the start: it hears of queues that come and go then.
    works: bool,
    /// Whether the driver broke a rule of the start, so that it has to hear of it.
    must_break: bool,
    /// The configuration's when all registers were last compared.
    generation: u32,
    broken: bool,
    rings: Vec<Option<Ring>>,
    /// By queue: the available index when the driver kicked last.
    kicked: Vec<Option<u16>>,
    /// By queue: the descriptor that the driver uses next, and its available index.
    next: Vec<(u16, u16)>,
    data_from: u64,
    free: u64,
    free_table: u64,
    /// Steps since the machine was held; how often it was.
    steps: usize,
    holds: usize,
}

impl<S: Subject> Guest<S> {
    /// A guest that has not looked at the device yet.
    pub fn new(subject: S, device: Arc<Mutex<S::Device>>) -> Guest<S> {
        let memory = Memory::new();
        let page = Arc::new(Page(Mutex::new([0; WINDOW_SIZE / 4])));
        let line = Arc::new(Line::default());
        let (sizes, features) = {
            let device = lock(&device);
            (device.queue_sizes(), device.features())
        };
        let mmio = Mmio::new(
            "device".to_owned(),
            device.clone(),
            Arc::clone(&memory.guest),
            line.clone(),
            None,
            page.clone(),
        );
        let count = sizes.len();
        let mut guest = Guest {
            subject,
            device,
            mmio: mmio.expect("descriptors"),
            memory,
            page,
            line,
            offered: features | FEATURE_VERSION_1 | FEATURE_INDIRECT | FEATURE_EVENT_IDX,
            queues: Vec::new(),
            sizes,
            select: 0,
            accept_select: 0,
            accepted: 0,
            status: 0,
            started: false,
            works: false,
            must_break: false,
            generation: 0,
            broken: false,
            rings: (0..count).map(|_| None).collect(),
            kicked: vec![None; count],
            next: vec![(0, 0); count],
            data_from: DATA,
            free: DATA,
            free_table: TABLES,
            steps: 0,
            holds: 0,
        };
        guest.forget();
        guest.check_registers();
        guest
    }

    fn forget(&mut self) {
        let model = |most: &u16| QueueModel {
            most: *most,
            size: u32::from(*most),
            ..QueueModel::default()
        };
        self.queues = self.sizes.iter().map(model).collect();
        (self.select, self.accept_select) = (0, 0);
        (self.accepted, self.status) = (0, 0);
        (self.started, self.works) = (false, false);
        (self.broken, self.must_break) = (false, false);
        self.rings.fill_with(|| None);
        self.kicked.fill(None);
        self.memory.forbid_all();
    }

    // ----------------------------------------------------------------------------- registers

    /// Reads a register.
    pub fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        let _ = self.mmio.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register; the device then does what it is kicked to.
    pub fn write(&mut self, offset: u64, value: u32) {
        let stopped = self.note_write(offset, value);
        if offset == QUEUE_READY && self.works {
            self.write_ready(value, stopped);
            return;
        }
        // A device that broke as it started may work on the queues that it has, or may not.
        self.memory.tainted |= offset == QUEUE_READY && self.started;
        if offset != STATUS && offset != QUEUE_NOTIFY && offset < CONFIG {
            // The device does not hear of it.
            let _ = self.mmio.write(offset, &value.to_le_bytes());
            self.check_changing();
            return;
        }
        self.before();
        if offset == QUEUE_NOTIFY {
            self.note_kick(value);
        }
        let edges = self.line.0.load(Ordering::Relaxed);
        let _ = self.mmio.write(offset, &value.to_le_bytes());
        if self.started && !self.works {
            let status = self.read(STATUS);
            self.works = status & NEEDS_RESET == 0;
        }
        if offset == STATUS && value == 0 {
            let edges_now = self.line.0.load(Ordering::Relaxed);
            assert_eq!(edges, edges_now, "a reset interrupts nobody");
            self.memory.check();
            self.forget();
        }
        self.settle();
        self.after();
    }

    /// Writes QueueReady while the device works; `stopped` is the queue that it has to let go of.
    fn write_ready(&mut self, value: u32, stopped: Option<usize>) {
        self.before();
        let _ = self.mmio.write(QUEUE_READY, &value.to_le_bytes());
        if let Some(queue) = stopped {
            assert_eq!(self.read(QUEUE_READY), 0, "queue {queue} does not stop");
            // What was under way may have been completed until now.
            self.memory.check();
            let ring = self.rings[queue].take();
            self.kicked[queue] = None;
            if let Some(mut ring) = ring {
                if !self.memory.tainted && !self.subject.has_other_worker() {
                    ring.check_used(&self.memory);
                }
                match self.rings.iter().any(Option::is_some) {
                    true => self.memory.forget_rings(ring.areas()),
                    false => self.memory.forbid_all(),
                }
            }
        }
        self.settle();
        self.after();
    }

    /// What a write means (virtio 1.2, sections 2.1, 3.1 and 4.2.2). Returns the queue that a device
    /// which works must stop.
    fn note_write(&mut self, offset: u64, value: u32) -> Option<usize> {
        let selected = self.select as usize;
        let in_use = self.queues.get(selected).is_some_and(|queue| queue.ready);
        match offset {
            QUEUE_SEL => self.select = value,
            STATUS if value != 0 => {
                let new = value & !self.status & !NEEDS_RESET;
                let accepts =
                    self.accepted & !self.offered == 0 && self.accepted & FEATURE_VERSION_1 != 0;
                let features_ok = match new & FEATURES_OK {
                    0 => self.status & FEATURES_OK != 0,
                    _ => accepts,
                };
                if new & DRIVER_OK != 0 && !self.started {
                    self.must_break |= !(features_ok && self.start());
                }
            }
            DRIVER_FEATURES_SEL => self.accept_select = value,
            DRIVER_FEATURES if self.status & FEATURES_OK == 0 => {
                let value = u64::from(value);
                match self.accept_select {
                    0 => self.accepted = self.accepted >> 32 << 32 | value,
                    1 => self.accepted = self.accepted & 0xffff_ffff | value << 32,
                    _ => {}
                }
            }
            QUEUE_READY if self.works && selected < self.queues.len() => {
                let ready = value & 1 != 0;
                self.queue(|queue| queue.ready = ready);
                match (in_use, ready) {
                    (true, false) => return Some(selected),
                    (false, true) => self.must_break |= !self.start_queue(selected),
                    _ => {}
                }
            }
            _ if self.started && in_use && offset != QUEUE_READY => {}
            QUEUE_SIZE => self.queue(|queue| queue.size = value),
            QUEUE_READY => self.queue(|queue| queue.ready = value & 1 != 0),
            QUEUE_DESC..CONFIG => {
                for (index, base) in [QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE].iter().enumerate() {
                    let shift = match offset.checked_sub(*base) {
                        Some(0) => 0,
                        Some(4) => 32,
                        _ => continue,
                    };
                    self.queue(|queue| {
                        let address = &mut queue.addresses[index];
                        *address &= !(0xffff_ffff << shift);
                        *address |= u64::from(value) << shift;
                    });
                }
            }
            _ => {}
        }
        None
    }

    /// The driver sets up a queue while the device works. Returns whether it can be.
    fn start_queue(&mut self, index: usize) -> bool {
        let queue = &self.queues[index];
        let size = u16::try_from(queue.size).unwrap_or(0);
        let ring = Ring::new(size, queue.addresses);
        if !ring.is_valid(&self.memory, queue.most) {
            return false;
        }
        self.memory.note_rings(ring.areas());
        self.rings[index] = Some(ring);
        true
    }

    fn queue(&mut self, set: impl FnOnce(&mut QueueModel)) {
        if let Some(queue) = self.queues.get_mut(self.select as usize) {
            set(queue);
        }
    }

    /// The driver starts the device: its rings are known. Returns whether they can be.
    fn start(&mut self) -> bool {
        let mut all_valid = true;
        let mut rings = Vec::new();
        for queue in &self.queues {
            let size = u16::try_from(queue.size).unwrap_or(0);
            let ring = queue.ready.then(|| Ring::new(size, queue.addresses));
            let valid = ring.as_ref();
            all_valid &= valid.is_none_or(|ring| ring.is_valid(&self.memory, queue.most));
            rings.push(ring);
        }
        if !all_valid {
            return false;
        }
        self.started = true;
        for ring in rings.iter().flatten() {
            self.memory.note_rings(ring.areas());
        }
        self.rings = rings;
        true
    }

    /// The registers are what the specification says, and the page says the same.
    fn check_registers(&mut self) {
        for offset in (0..WINDOW_SIZE as u64).step_by(4) {
            self.check_register(offset);
        }
        self.generation = self.read(CONFIG_GENERATION);
        self.check_changing();
    }

    fn check_register(&mut self, offset: u64) {
        let read = self.read(offset);
        let shown = lock(&self.page.0)[offset as usize / 4];
        assert_eq!(read, shown, "the page differs at {offset:#x}");
    }

    /// As [`Self::check_registers`], of those that may have changed.
    fn check_changing(&mut self) {
        for offset in [
            DEVICE_FEATURES,
            QUEUE_SIZE_MAX,
            QUEUE_READY,
            INTERRUPT_STATUS,
            STATUS,
            CONFIG_GENERATION,
        ] {
            self.check_register(offset);
        }
        if self.read(CONFIG_GENERATION) != self.generation {
            self.check_registers();
            return;
        }
        let status = self.read(STATUS);
        assert!(
            status & NEEDS_RESET != 0 || !self.broken,
            "NEEDS_RESET went away"
        );
        self.broken = status & NEEDS_RESET != 0;
        assert!(
            self.broken || !self.must_break,
            "the driver broke a rule at its start and does not hear of it"
        );
        self.status = status & !NEEDS_RESET;
        let works = u32::from(status & DRIVER_OK != 0);
        assert_eq!(self.read(INTERRUPT_STATUS) & 1, works);
        let queue = self.queues.get(self.select as usize);
        let (most, ready) = queue.map_or((0, false), |queue| (queue.most, queue.ready));
        assert_eq!(self.read(QUEUE_SIZE_MAX), u32::from(most));
        assert_eq!(self.read(QUEUE_READY), u32::from(ready));
    }

    // ------------------------------------------------------------------------------- checks

    /// Before the device may look at memory.
    fn before(&mut self) {
        for ring in self.rings.iter_mut().flatten() {
            if self.subject.has_other_worker() {
                ring.hand_over(&self.memory);
            } else if !self.memory.tainted {
                // Nobody else has business there, and the device does not look.
                let index = ring.next_used.to_le_bytes();
                self.memory.poke(ring.used + 2, &index);
            }
            ring.look(&mut self.memory);
        }
    }

    /// The device is called until it has nothing to do.
    fn settle(&mut self) {
        let mut rounds = 0;
        while self.subject.kicks(&mut self.mmio, &self.device) {
            rounds += 1;
            assert!(rounds < ROUNDS, "the device kicks itself for ever");
        }
    }

    /// The driver kicks a queue.
    fn note_kick(&mut self, queue: u32) {
        if let Some(Some(ring)) = self.rings.get(queue as usize) {
            self.kicked[queue as usize] = Some(ring.index(&self.memory));
        }
    }

    /// What the device was kicked for waits only for what is under way: with nothing under way it
    /// is done, or the device waits for an event that does not come.
    fn check_kicked(&self) {
        if !self.works() || self.memory.tainted || !self.subject.is_idle() {
            return;
        }
        for (queue, (ring, kicked)) in self.rings.iter().zip(&self.kicked).enumerate() {
            let (Some(ring), Some(kicked)) = (ring, kicked) else {
                continue;
            };
            let left = kicked.wrapping_sub(ring.next_used).cast_signed();
            assert!(
                left <= 0,
                "queue {queue} has {left} requests that it was kicked for and nothing is under way"
            );
        }
    }

    /// After the device did something.
    fn after(&mut self) {
        for (start, len) in self.subject.touched() {
            assert!(self.memory.holds(start, len));
            self.memory.allow(start, len);
        }
        self.memory.check();
        if !self.memory.tainted && !self.subject.has_other_worker() {
            for ring in self.rings.iter_mut().flatten() {
                ring.check_used(&self.memory);
            }
        }
        self.check_changing();
        self.check_kicked();
    }

    /// The world does something.
    fn event(&mut self, input: &mut Input<'_>) {
        self.before();
        self.subject.event(&self.device, input);
        self.settle();
        self.after();
    }

    // ------------------------------------------------------------------------------ a driver

    /// Takes the device into use, by the rules in most cases.
    pub fn initialise(&mut self, input: &mut Input<'_>) {
        self.write(STATUS, 0);
        self.write(STATUS, 1);
        self.write(STATUS, 3);
        let refused = match input.u8() {
            0..=127 => 0,
            128..=191 => FEATURE_EVENT_IDX,
            192..=223 => input.u64(),
            _ => self.offered,
        };
        let features = self.offered & !refused | FEATURE_VERSION_1;
        for half in [0, 1] {
            self.write(DRIVER_FEATURES_SEL, half);
            self.write(DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.write(STATUS, 11);
        let shape = input.u8();
        let mut sizes: Vec<u16> = self.sizes.clone();
        for size in &mut sizes {
            *size = match shape {
                // As large as they get, if there is memory.
                0..=15 => *size,
                16..=63 => (*size).min(1 << input.below(5)),
                _ => (*size).min(16),
            };
        }
        let bytes = |size: u16| (26 * u64::from(size) + 32).next_multiple_of(64);
        if sizes.iter().map(|size| bytes(*size)).sum::<u64>() > 0x5000 {
            for size in &mut sizes {
                *size = (*size).min(16);
            }
        }
        let left_out = if input.rarely(32) { input.u8() } else { 0 };
        let mut at = BASE;
        for (index, size) in sizes.iter().enumerate() {
            let (table, available) = (at, at + 16 * u64::from(*size));
            let used = (available + 6 + 2 * u64::from(*size)).next_multiple_of(4);
            at += bytes(*size);
            self.memory.poke(available, &[0; 4]);
            self.memory.poke(used, &[0; 4]);
            self.next[index] = (0, 0);
            self.write(QUEUE_SEL, index as u32);
            self.write(QUEUE_SIZE, u32::from(*size));
            for (register, address) in [
                (QUEUE_DESC, table),
                (QUEUE_DRIVER, available),
                (QUEUE_DEVICE, used),
            ] {
                self.write(register, address as u32);
                self.write(register + 4, (address >> 32) as u32);
            }
            if left_out >> (index % 8) & 1 == 0 {
                self.write(QUEUE_READY, 1);
            }
        }
        self.data_from = (at - BASE).max(DATA);
        self.free = self.data_from;
        if !input.rarely(32) {
            self.write(STATUS, 15);
        }
    }

    /// Stops a queue and, mostly, sets it up again: where it was, with as many entries or fewer.
    fn replace_queue(&mut self, queue: usize, input: &mut Input<'_>) {
        let shape = input.u8();
        self.write(QUEUE_SEL, queue as u32);
        self.write(QUEUE_READY, 0);
        if shape & 3 == 0 {
            return;
        }
        let [_, available, used] = self.queues[queue].addresses;
        if shape & 0x1c != 0 {
            self.memory.poke(available, &[0; 4]);
            self.memory.poke(used, &[0; 4]);
            self.next[queue] = (0, 0);
        }
        if shape & 0xe0 == 0 {
            let size = self.queues[queue].size / 2;
            self.write(QUEUE_SIZE, size);
        }
        self.write(QUEUE_READY, 1);
    }

    /// Room for a buffer; there is some always, though others may have it already.
    fn buffer(&mut self, len: u64) -> u64 {
        if self.free + len > HOLE {
            self.free = self.data_from;
        }
        let address = BASE + self.free;
        self.free += len.next_multiple_of(4);
        address
    }

    /// A request by the rules, as far as the input lets it.
    fn request(&mut self, queue: usize, input: &mut Input<'_>) {
        let payload = match input.rarely(16) {
            true => input.bytes(64).to_vec(),
            false => self.subject.payload(queue, input),
        };
        let shape = input.u8();
        let mut parts: Vec<(u64, u32, u16)> = Vec::new();
        let mut left = &payload[..];
        let cuts = usize::from(shape & 3);
        for cut in 0..=cuts {
            let len = if cut == cuts {
                left.len()
            } else {
                usize::from(input.u8()).min(left.len())
            };
            let (now, later) = left.split_at(len);
            left = later;
            if !now.is_empty() || shape & 0x80 != 0 {
                let address = self.buffer(now.len() as u64);
                self.memory.poke(address, now);
                parts.push((address, now.len() as u32, 0));
            }
        }
        for _ in 0..shape >> 2 & 7 {
            let len = match input.u8() {
                choice @ 0..=199 => SIZES[usize::from(choice) % SIZES.len()],
                200..=250 => usize::from(input.u8()),
                _ => usize::from(input.u16()).min(0x3000),
            };
            let address = self.buffer(len as u64);
            parts.push((address, len as u32, WRITE));
        }
        if parts.is_empty() {
            parts.push((BASE + self.data_from, 16, WRITE));
        }
        let head = match shape & 0x60 {
            0x60 => self.indirect(queue, &parts),
            _ => self.chain(queue, &parts),
        };
        self.offer(queue, head);
    }

    fn descriptor((address, len, flags): (u64, u32, u16), next: u16) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    }

    fn chain(&mut self, queue: usize, parts: &[(u64, u32, u16)]) -> u16 {
        let model = self.queues[queue];
        let size = u16::try_from(model.size).unwrap_or(1).max(1);
        let head = self.next[queue].0 % size;
        let parts = &parts[..parts.len().min(usize::from(size))];
        for (index, part) in parts.iter().enumerate() {
            let this = self.next[queue].0 % size;
            let next = (this + 1) % size;
            self.next[queue].0 = next;
            let more = if index + 1 < parts.len() { NEXT } else { 0 };
            let bytes = Self::descriptor((part.0, part.1, part.2 | more), next);
            let table = model.addresses[0];
            self.memory
                .poke(table.wrapping_add(16 * u64::from(this)), &bytes);
        }
        head
    }

    fn indirect(&mut self, queue: usize, parts: &[(u64, u32, u16)]) -> u16 {
        let len = 16 * parts.len() as u64;
        if self.free_table + len > END {
            self.free_table = TABLES;
        }
        let table = BASE + self.free_table;
        self.free_table += len;
        for (part, index) in parts.iter().zip(0_u16..) {
            let more = if usize::from(index) + 1 < parts.len() {
                NEXT
            } else {
                0
            };
            let bytes = Self::descriptor((part.0, part.1, part.2 | more), index + 1);
            self.memory.poke(table + 16 * u64::from(index), &bytes);
        }
        self.chain(queue, &[(table, len as u32, INDIRECT)])
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let model = self.queues[queue];
        let size = u16::try_from(model.size).unwrap_or(1).max(1);
        let available = model.addresses[1];
        let next = &mut self.next[queue].1;
        let slot = available.wrapping_add(4 + 2 * u64::from(*next % size));
        *next = next.wrapping_add(1);
        let index = next.to_le_bytes();
        self.memory.poke(slot, &head.to_le_bytes());
        self.memory.poke(available.wrapping_add(2), &index);
    }

    fn address(&mut self, input: &mut Input<'_>) -> u64 {
        let rings = |queue: usize, part: usize| self.queues[queue].addresses[part];
        match input.u8() {
            0..=79 => BASE + u64::from(input.u16()) % END,
            80..=143 => {
                let queue = input.below(self.queues.len());
                let part = input.below(3);
                rings(queue, part).wrapping_add(u64::from(input.u8()))
            }
            144..=175 => {
                let edge = input.pick(&[0, 0x4000, HOLE, TABLES, END, 0_u64.wrapping_sub(BASE)]);
                let near = u64::from(input.u8());
                BASE.wrapping_add(edge).wrapping_add(near).wrapping_sub(64)
            }
            176..=207 => BASE + TABLES + 16 * u64::from(input.u8()),
            _ => input.u64(),
        }
    }

    // -------------------------------------------------------------------------------- steps

    /// Does what the input says, to its end.
    pub fn run(mut self, input: &mut Input<'_>) {
        self.initialise(input);
        let mut left = STEPS;
        while !input.is_empty() && left > 0 {
            left -= 1;
            self.step(input);
            self.hold_in_turn();
        }
        self.end();
    }

    /// As [`Self::run`], with a driver that mostly writes registers, and in no order.
    pub fn run_registers(mut self, input: &mut Input<'_>) {
        let mut left = STEPS;
        while !input.is_empty() && left > 0 {
            left -= 1;
            match input.u8() {
                0..=95 => self.any_register(input),
                96..=127 => self.write(STATUS, input.pick(&[0, 1, 3, 11, 15, 64, 79, 128, 4])),
                128..=159 => {
                    let queue = input.below(self.queues.len() + 1);
                    self.write(QUEUE_SEL, queue as u32);
                    let register = input.pick(&[QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE]);
                    let address = self.address(input) & !15;
                    self.write(register, address as u32);
                    self.write(register + 4, (address >> 32) as u32);
                    self.write(QUEUE_SIZE, 1 << input.below(10));
                    self.write(QUEUE_READY, u32::from(input.u8()));
                }
                160..=175 => self.config(input),
                176..=191 => self.initialise(input),
                _ => self.step(input),
            }
            self.hold_in_turn();
        }
        self.end();
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let choice = input.u8();
        let queue = input.below(self.queues.len());
        match choice {
            0..=79 => {
                self.request(queue, input);
                if choice < 56 {
                    self.write(QUEUE_NOTIFY, queue as u32);
                }
            }
            80..=103 => {
                for _ in 0..=input.below(8) {
                    self.request(queue, input);
                }
                self.write(QUEUE_NOTIFY, queue as u32);
            }
            104..=151 => self.event(input),
            152..=167 => self.write(QUEUE_NOTIFY, queue as u32),
            168..=183 => self.config(input),
            184..=191 => {
                // The driver says when it wants to be interrupted: flags and used_event.
                let available = self.queues[queue].addresses[1];
                let size = u64::from(self.queues[queue].size);
                let value = input.u16().to_le_bytes();
                let offset = if input.flag() { 0 } else { 4 + 2 * size };
                self.memory.poke(available.wrapping_add(offset), &value);
            }
            192..=199 => self.initialise(input),
            200..=215 => {
                // A descriptor as no driver makes it.
                let size = (self.queues[queue].size as usize).clamp(1, 1024);
                let slot = input.below(size) as u64;
                let address = self.address(input);
                let part = (address, input.number(), input.u16() & 0xff);
                let next = input.u8();
                let bytes = Self::descriptor(part, u16::from(next));
                let table = self.queues[queue].addresses[0];
                self.memory.poke(table.wrapping_add(16 * slot), &bytes);
                if input.flag() {
                    self.offer(queue, slot as u16);
                    self.write(QUEUE_NOTIFY, queue as u32);
                }
            }
            216..=223 => {
                let head = input.number() as u16;
                self.offer(queue, head);
                self.write(QUEUE_NOTIFY, queue as u32);
            }
            224..=231 => {
                // An index from nowhere, or one that goes on around its end.
                let index = match input.flag() {
                    true => input.u16(),
                    false => self.next[queue].1.wrapping_add(input.u8().into()),
                };
                self.next[queue].1 = index;
                let available = self.queues[queue].addresses[1];
                self.memory
                    .poke(available.wrapping_add(2), &index.to_le_bytes());
                self.write(QUEUE_NOTIFY, queue as u32);
            }
            232..=239 => {
                let address = self.address(input);
                let len = input.below(64);
                let data = input.bytes(len);
                self.memory.poke(address, data);
            }
            240..=247 => self.any_register(input),
            248..=251 => self.replace_queue(queue, input),
            255 => self.hold(input.flag()),
            _ => self.write(STATUS, input.pick(&[0, 1, 3, 11, 15, 64, 79, 128, 4])),
        }
    }

    /// The configuration space, read and written in all widths.
    fn config(&mut self, input: &mut Input<'_>) {
        let offset = match input.rarely(8) {
            true => u64::from(input.u16()),
            false => input.below(68) as u64,
        };
        let len = input.pick(&[1, 2, 4, 8]);
        let mut data = [0; 8];
        let value = input.u64().to_le_bytes();
        if input.flag() {
            self.before();
            let _ = self.mmio.write(CONFIG + offset, &value[..len]);
            self.settle();
            self.after();
        }
        let _ = self.mmio.read(CONFIG + offset, &mut data[..len]);
        let shown = lock(&self.page.0);
        for (byte, at) in data[..len].iter().zip(CONFIG + offset..) {
            let word = shown.get(at as usize / 4).copied().unwrap_or(0);
            assert_eq!(*byte, word.to_le_bytes()[at as usize % 4]);
        }
    }

    /// Any register, in any width.
    pub fn any_register(&mut self, input: &mut Input<'_>) {
        let offset = match input.rarely(8) {
            true => u64::from(input.u16()),
            false => 4 * input.below(64) as u64,
        };
        match input.u8() {
            0..=191 => {
                let value = input.number();
                self.write(offset, value);
            }
            192..=223 => {
                let value = input.u64().to_le_bytes();
                let len = input.pick(&[1, 2, 8]);
                self.before();
                let _ = self.mmio.write(offset, &value[..len]);
                self.settle();
                self.after();
            }
            _ => {
                let mut data = [0xff; 8];
                let len = input.pick(&[1, 2, 4, 8]);
                let _ = self.mmio.read(offset, &mut data[..len]);
                if offset < CONFIG && len != 4 {
                    assert_eq!(data[..len], [0; 8][..len]);
                }
            }
        }
        self.check_registers();
    }

    /// Whether the driver can expect of the device to work.
    pub fn works(&self) -> bool {
        self.started && !self.broken
    }

    /// All requests are done in the end, or the driver was told that it broke something; and
    /// after a reset nothing of it is left.
    fn end(&mut self) {
        for round in 0.. {
            assert!(round < ROUNDS, "the device never comes to an end");
            self.before();
            self.subject.finish(&self.device);
            for (ring, kick) in self.rings.iter().zip(self.mmio.kicks()) {
                if ring.is_some() {
                    kick.write(1).expect("room");
                }
            }
            let before: Vec<_> = self.used_indices();
            self.settle();
            self.after();
            if before == self.used_indices() {
                break;
            }
        }
        if self.works() && !self.memory.tainted && !self.subject.has_other_worker() {
            for (index, ring) in self.rings.iter().enumerate() {
                let Some(ring) = ring.as_ref().filter(|_| self.subject.is_drained(index)) else {
                    continue;
                };
                assert!(
                    !ring.is_overfull(&self.memory),
                    "queue {index} is broken, and the driver does not hear of it"
                );
                assert!(
                    ring.is_drained(&self.memory),
                    "queue {index} has requests that nobody answers"
                );
            }
        }
        self.check_registers();
        self.write(STATUS, 0);
        self.check_registers();
        assert_eq!(self.status, 0);
        // The memory is the guest's alone now.
        for queue in 0..self.queues.len() {
            self.write(QUEUE_NOTIFY, queue as u32);
        }
        self.subject.finish(&self.device);
        self.after();
    }

    fn used_indices(&self) -> Vec<u16> {
        let rings = self.rings.iter().flatten();
        rings.map(|ring| ring.next_used).collect()
    }
}
