//! The block device, with an engine that does requests at once or much later, in any order.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::block::{Block, Engine, Operation, Outcome, Request, Shape};
use armlet_devices::virtio::queue::Segment;
use vm_memory::{Bytes, GuestMemoryMmap};

use super::guest::{Guest, Subject, lock};
use super::input::Input;

/// Bytes of the disk at most.
const SIZE: usize = 64 << 10;

/// A request under way.
struct Job {
    tag: u16,
    operation: Operation,
    offset: usize,
    len: usize,
    segments: Vec<Segment>,
}

struct Disk {
    bytes: Vec<u8>,
    /// Bytes that it has had since a request was begun last.
    size: u64,
    readonly: bool,
    depth: u16,
    most_bytes: u64,
    is_cancelled: bool,
    memory: Option<Arc<GuestMemoryMmap>>,
    /// Whether requests are done later.
    defers: bool,
    fails: bool,
    pending: VecDeque<Job>,
    done: VecDeque<(u16, Outcome)>,
}

impl Disk {
    fn carry_out(&mut self, job: &Job) -> Outcome {
        let memory = self.memory.as_ref().expect("a request while it is stopped");
        if self.fails {
            return Outcome::Failed;
        }
        let range = job.offset..job.offset + job.len;
        match job.operation {
            Operation::Read => {
                let mut data = &self.bytes[range];
                for part in &job.segments {
                    let (now, later) = data.split_at(part.len);
                    memory.write_slice(now, part.address).expect("memory");
                    data = later;
                }
                assert!(data.is_empty());
            }
            Operation::Write => {
                let mut data = &mut self.bytes[range];
                for part in &job.segments {
                    let (now, later) = data.split_at_mut(part.len);
                    memory.read_slice(now, part.address).expect("memory");
                    data = later;
                }
                assert!(data.is_empty());
            }
            Operation::Discard | Operation::WriteZeroes { .. } => self.bytes[range].fill(0),
            Operation::Flush => {}
        }
        Outcome::Done
    }

    fn do_one(&mut self, index: usize) {
        if let Some(job) = self.pending.remove(index) {
            let outcome = self.carry_out(&job);
            self.done.push_back((job.tag, outcome));
        }
    }
}

#[derive(Clone)]
struct Fake(Arc<Mutex<Disk>>);

impl Engine for Fake {
    fn start(&mut self, memory: &Arc<GuestMemoryMmap>) {
        let mut disk = lock(&self.0);
        assert!(disk.memory.is_none(), "started twice");
        disk.is_cancelled = false;
        disk.memory = Some(Arc::clone(memory));
    }

    fn begin(&mut self, request: &Request<'_>) -> Option<Outcome> {
        let mut disk = lock(&self.0);
        let end = request.offset.checked_add(request.len).expect("an end");
        assert!(end <= disk.size, "{request:?} reaches beyond the disk");
        assert!(request.offset.is_multiple_of(512) && request.len.is_multiple_of(512));
        assert!(request.tag < disk.depth, "{request:?} has no such tag");
        let has_data = matches!(request.operation, Operation::Read | Operation::Write);
        assert!(!disk.readonly || matches!(request.operation, Operation::Read | Operation::Flush));
        let segments: Vec<_> = request.data.parts().collect();
        let data: usize = segments.iter().map(|part| part.len).sum();
        assert_eq!(data as u64, if has_data { request.len } else { 0 });
        assert!(segments.iter().all(|part| part.len > 0));
        assert!(
            !disk.is_cancelled,
            "{request:?} is begun while the device is stopped"
        );
        let busy = disk.pending.iter().map(|job| job.tag);
        let mut busy = busy.chain(disk.done.iter().map(|(tag, _)| *tag));
        assert!(busy.all(|tag| tag != request.tag), "a tag twice");
        let job = Job {
            tag: request.tag,
            operation: request.operation,
            offset: request.offset as usize,
            len: request.len as usize,
            segments,
        };
        if disk.defers {
            disk.pending.push_back(job);
            return None;
        }
        Some(disk.carry_out(&job))
    }

    fn finished(&mut self) -> Option<(u16, Outcome)> {
        lock(&self.0).done.pop_front()
    }

    fn wait(&mut self, _most: Duration) {
        let mut disk = lock(&self.0);
        assert!(!disk.pending.is_empty(), "it waits for nothing");
        disk.do_one(0);
    }

    fn cancel(&mut self) {
        lock(&self.0).is_cancelled = true;
    }

    fn depth(&self) -> u16 {
        lock(&self.0).depth
    }

    fn most_bytes(&self) -> u64 {
        lock(&self.0).most_bytes
    }

    fn stop(&mut self) {
        let mut disk = lock(&self.0);
        assert!(disk.pending.is_empty() && disk.done.is_empty());
        disk.memory = None;
    }
}

struct World {
    disk: Arc<Mutex<Disk>>,
    shape: Shape,
}

impl World {
    /// The engine's descriptor is readable while there is something to fetch, and only then is the
    /// device called for it. Returns whether it was.
    fn fetch(&self, device: &Mutex<Block>) -> bool {
        let is_readable = !lock(&self.disk).done.is_empty();
        if is_readable {
            lock(device).ready(0);
        }
        is_readable
    }
}

impl Subject for World {
    type Device = Block;

    fn payload(&mut self, _queue: usize, input: &mut Input<'_>) -> Vec<u8> {
        let kind = match input.u8() {
            0..=63 => 0,
            64..=127 => 1,
            128..=159 => 4,
            160..=191 => 8,
            192..=215 => 11,
            216..=239 => 13,
            _ => input.number(),
        };
        let sector = match input.rarely(8) {
            true => input.u64(),
            false => u64::from(input.u8() & 0x8f),
        };
        let mut bytes = [kind, input.u8().into()].map(u32::to_le_bytes).concat();
        bytes.extend(sector.to_le_bytes());
        match kind {
            1 => {
                let len = 512 * input.below(4) + if input.rarely(16) { 1 } else { 0 };
                let fill = input.u8();
                bytes.resize(16 + len, fill);
            }
            11 | 13 => {
                let first = u64::from(input.u8());
                let count = input.number();
                let flags = if input.rarely(4) { input.u32() } else { 0 };
                bytes.extend(first.to_le_bytes());
                bytes.extend(count.to_le_bytes());
                bytes.extend(flags.to_le_bytes());
                if input.rarely(16) {
                    bytes.push(0);
                }
            }
            _ => {}
        }
        bytes
    }

    fn event(&mut self, device: &Mutex<Block>, input: &mut Input<'_>) {
        match input.u8() {
            choice @ 0..=127 => {
                let mut disk = lock(&self.disk);
                let count = disk.pending.len();
                if count > 0 {
                    let index = input.below(count);
                    disk.do_one(index);
                }
                drop(disk);
                // The thread may hear of a kick of some queue first.
                if choice < 64 {
                    self.fetch(device);
                }
            }
            128..=175 => lock(&self.disk).defers = input.flag(),
            176..=207 => lock(&self.disk).fails = input.flag(),
            208..=239 => {
                let size = u64::from(input.u16());
                lock(&self.disk).size = size / 512 * 512;
                lock(device).set_size(size);
            }
            _ => lock(device).ready(0),
        }
    }

    fn fresh(&mut self) -> Option<Block> {
        self.shape.size = lock(&self.disk).size;
        let engine = Box::new(Fake(Arc::clone(&self.disk)));
        Some(Block::new(&self.shape, engine))
    }

    fn finish(&mut self, device: &Mutex<Block>) {
        loop {
            let mut disk = lock(&self.disk);
            while !disk.pending.is_empty() {
                disk.do_one(0);
            }
            drop(disk);
            if !self.fetch(device) {
                break;
            }
        }
    }

    fn is_idle(&self) -> bool {
        let disk = lock(&self.disk);
        disk.pending.is_empty() && disk.done.is_empty()
    }

    fn is_drained(&self, _queue: usize) -> bool {
        self.is_idle()
    }
}

/// The block device.
pub fn block(data: &[u8]) {
    let mut input = Input::new(data);
    let shape = input.u8();
    let size = (SIZE as u64).min(u64::from(input.u16()) + 1);
    let readonly = shape & 7 == 7;
    let disk = Arc::new(Mutex::new(Disk {
        bytes: vec![0xdd; SIZE],
        size: size / 512 * 512,
        readonly,
        depth: [1, 2, 4, 128][usize::from(shape >> 3 & 3)],
        most_bytes: [512, 1024, 4096, 1 << 20][size as usize % 4],
        is_cancelled: false,
        memory: None,
        defers: shape & 0x80 != 0,
        fails: false,
        pending: VecDeque::new(),
        done: VecDeque::new(),
    }));
    let shape = Shape {
        size,
        readonly,
        serial: "a serial that is too long to fit".to_owned(),
        queues: 1 + u16::from(shape >> 5 & 3),
        flushes: true,
        block_size: 512,
        physical_block_size: 4096,
        optimal_io_size: 0,
        discard_granularity: 4096,
    };
    let device = Block::new(&shape, Box::new(Fake(Arc::clone(&disk))));
    let device = Arc::new(Mutex::new(device));
    Guest::new(World { disk, shape }, device).run(&mut input);
}
