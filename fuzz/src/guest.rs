//! A guest that does what an input says: its driver works by the rules, breaks them, or both in
//! turn. After each step it is checked that the device kept its side.

use armlet_devices::virtio::mailbox::direct;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use armlet_devices::virtio::mmio::{Mmio, QUEUE_NOTIFY, RegisterPage, WINDOW_SIZE};
use armlet_devices::virtio::{
    FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1, VirtioDevice,
};
use armlet_devices::{Device, IrqLine};

use super::input::Input;
use super::memory::{Memory, TABLES};
use super::ring::Ring;

mod driver;
mod hold;
mod steps;
mod subject;

#[allow(
    unused_imports,
    reason = "tests/corpus.rs has it, and a fuzzer does not"
)]
pub use hold::holding;
pub use subject::Subject;

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

/// The most calls of a device until it has nothing to do.
const ROUNDS: usize = 4096;
/// Offset of the first data in memory, where queues have up to 16 entries.
const DATA: u64 = 0x1000;
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
            direct(device.clone()),
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
