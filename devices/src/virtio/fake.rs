//! A driver for tests: it starts a device by the transport's registers, as a guest does, and
//! sends it requests.

use crate::virtio::mailbox::direct;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::mmio::{Mmio, NoPage};
use super::{FEATURE_VERSION_1, MmioState, Registers, VirtioDevice, lock};
use crate::fake::FakeLine;

#[cfg(test)]
pub(crate) mod kept;

/// Where guest memory begins; not at 0, so that a null address is wrong.
pub(crate) const BASE: u64 = 0x10_0000;
pub(crate) const MEMORY: usize = 8 << 20;
/// Bytes for a queue's rings.
const RINGS: u64 = 0x1_0000;
/// Entries of each queue, unless the device takes fewer.
const ENTRIES: u16 = 64;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A guest with a driver for one device. Its registers are those of virtio over MMIO, or translated
/// into others.
pub(crate) struct Guest<D: VirtioDevice + 'static, R = Mmio> {
    pub(crate) device: Arc<Mutex<D>>,
    pub(crate) mmio: R,
    pub(crate) memory: Arc<GuestMemoryMmap>,
    pub(crate) line: Arc<FakeLine>,
    queues: Vec<Queue>,
    /// The next free address for buffers.
    free: u64,
}

#[derive(Default)]
struct Queue {
    rings: u64,
    size: u16,
    next_descriptor: u16,
    available: u16,
    seen: u16,
    /// By head: where the writable buffers lie.
    writable: HashMap<u16, Vec<(u64, usize)>>,
}

impl<D: VirtioDevice + 'static> Guest<D> {
    /// Creates a guest that has not looked at the device yet.
    pub(crate) fn new(device: D) -> Guest<D> {
        Guest::over(device, |device, memory, line| {
            Mmio::new(
                "device".to_owned(),
                direct(device),
                memory,
                line,
                None,
                Arc::new(NoPage),
            )
            .expect("descriptors")
        })
    }

    /// Returns a guest whose driver took the device into use with these features of the device.
    pub(crate) fn started(device: D, features: u64) -> Guest<D> {
        let mut guest = Guest::new(device);
        guest.start(features);
        guest
    }

    /// An address behind the end of memory.
    pub(crate) const OUTSIDE: u64 = BASE + MEMORY as u64;

    /// Holds the machine; it goes on with `device`, which has not seen this driver, in the stead of
    /// the one before. Returns what was saved of that one.
    pub(crate) fn move_to(&mut self, device: D) -> MmioState {
        self.mmio.quiesce();
        let state = self.mmio.save().expect("it is held");
        let device = Arc::new(Mutex::new(device));
        let mmio = Mmio::new(
            "device".to_owned(),
            direct(device.clone()),
            self.memory.clone(),
            self.line.clone(),
            None,
            Arc::new(NoPage),
        );
        // The one before ends before the new one begins.
        self.mmio = mmio.expect("descriptors");
        self.device = device;
        self.mmio.quiesce();
        self.mmio.restore(&state).expect("it is as the one before");
        assert_eq!(self.mmio.save().expect("it is held"), state);
        self.mmio.resume();
        self.follow_kicks();
        state
    }
}

impl<D: VirtioDevice + 'static, R: Registers> Guest<D, R> {
    /// Creates a guest that has not looked at the device yet, whose registers `make` makes.
    pub(crate) fn over(
        device: D,
        make: impl FnOnce(Arc<Mutex<D>>, Arc<GuestMemoryMmap>, Arc<FakeLine>) -> R,
    ) -> Guest<D, R> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(BASE), MEMORY)]);
        let memory = Arc::new(memory.expect("memory"));
        let sizes = device.queue_sizes();
        let device = Arc::new(Mutex::new(device));
        let line = FakeLine::new();
        let mmio = make(device.clone(), memory.clone(), line.clone());
        let queues = sizes.iter().zip(0..).map(|(size, index)| Queue {
            rings: BASE + RINGS * index,
            size: ENTRIES.min(*size),
            ..Queue::default()
        });
        Guest {
            device,
            mmio,
            memory,
            line,
            queues: queues.collect(),
            free: BASE + RINGS * 16,
        }
    }

    pub(crate) fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        let _ = self.mmio.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write(&mut self, offset: u64, value: u32) {
        let _ = self.mmio.write(offset, &value.to_le_bytes());
    }

    /// Takes the device into use with all its queues (virtio 1.2, section 3.1.1).
    pub(crate) fn start(&mut self, features: u64) {
        self.negotiate(features);
        for index in 0..self.queues.len() {
            self.set_up_queue(index as u32);
        }
        self.write(0x70, 15);
        assert_eq!(self.read(0x70), 15, "the device did not start");
    }

    /// As far as FEATURES_OK.
    pub(crate) fn negotiate(&mut self, features: u64) {
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        let features = features | FEATURE_VERSION_1;
        for half in [0, 1] {
            self.write(0x24, half);
            self.write(0x20, (features >> (32 * half)) as u32);
        }
        self.write(0x70, 11);
        assert_eq!(self.read(0x70), 11, "the device refuses the features");
    }

    /// Tells the device where a queue lies, its rings empty.
    pub(crate) fn set_up_queue(&mut self, index: u32) {
        let queue = &mut self.queues[index as usize];
        let (rings, size) = (queue.rings, queue.size);
        *queue = Queue {
            rings,
            size,
            ..Queue::default()
        };
        let empty = vec![0; RINGS as usize];
        self.memory
            .write_slice(&empty, GuestAddress(rings))
            .expect("memory");
        self.write(0x30, index);
        self.write(0x38, u32::from(size));
        for (register, address) in [
            (0x80, rings),
            (0x90, rings + 0x4000),
            (0xa0, rings + 0x8000),
        ] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
    }

    /// Stops a queue as a driver does (virtio 1.2, section 4.2.2.2).
    pub(crate) fn stop_queue(&mut self, index: u32) {
        self.write(0x30, index);
        self.write(0x44, 0);
        assert_eq!(self.read(0x44), 0, "queue {index} does not stop");
    }

    /// Returns where the rings of a queue lie: descriptors, available, used.
    pub(crate) fn rings(&self, index: usize) -> [u64; 3] {
        let rings = self.queues[index].rings;
        [rings, rings + 0x4000, rings + 0x8000]
    }

    /// Memory for a buffer.
    pub(crate) fn buffer(&mut self, data: &[u8]) -> u64 {
        let address = self.free;
        self.free += data.len() as u64 + 16;
        self.memory
            .write_slice(data, GuestAddress(address))
            .expect("memory");
        address
    }

    /// Makes a request available: buffers to read, then buffers of these sizes to write. Returns
    /// its head.
    pub(crate) fn request(&mut self, index: usize, readable: &[&[u8]], writable: &[usize]) -> u16 {
        let mut parts: Vec<(u64, u32, u16)> = Vec::new();
        for data in readable {
            parts.push((self.buffer(data), data.len() as u32, 0));
        }
        let mut room = Vec::new();
        for size in writable {
            let address = self.buffer(&vec![0; *size]);
            room.push((address, *size));
            parts.push((address, *size as u32, WRITE));
        }
        let head = self.chain(index, &parts);
        self.queues[index].writable.insert(head, room);
        head
    }

    /// Makes a chain of descriptors available as it is: address, bytes, flags without NEXT.
    pub(crate) fn chain(&mut self, index: usize, parts: &[(u64, u32, u16)]) -> u16 {
        let [table, ..] = self.rings(index);
        let queue = &mut self.queues[index];
        let head = queue.next_descriptor;
        for (position, (address, len, flags)) in parts.iter().enumerate() {
            let this = queue.next_descriptor;
            queue.next_descriptor = (this + 1) % queue.size;
            let last = position + 1 == parts.len();
            let flags = flags | if last { 0 } else { NEXT };
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&queue.next_descriptor.to_le_bytes());
            let at = GuestAddress(table + 16 * u64::from(this));
            self.memory.write_slice(&bytes, at).expect("memory");
        }
        self.make_available(index, head);
        head
    }

    /// Puts a head into the available ring.
    pub(crate) fn make_available(&mut self, index: usize, head: u16) {
        let [_, available, _] = self.rings(index);
        let queue = &mut self.queues[index];
        let slot = u64::from(queue.available % queue.size);
        queue.available = queue.available.wrapping_add(1);
        let at = GuestAddress(available + 4 + 2 * slot);
        self.memory.write_obj(head, at).expect("memory");
        let at = GuestAddress(available + 2);
        self.memory.write_obj(queue.available, at).expect("memory");
    }

    /// Kicks a queue, as far as the device hears of it.
    pub(crate) fn kick(&mut self, index: usize) {
        self.write(0x50, index as u32);
        let kick = self.mmio.kicks()[index].clone();
        // A queue with very many requests kicks itself.
        while kick.read().is_ok() {
            lock(&self.device).kicked(index);
        }
    }

    /// Holds the machine and lets it go on.
    pub(crate) fn pause(&mut self) {
        self.mmio.quiesce();
        self.mmio.resume();
        self.follow_kicks();
    }

    /// Calls the device for its kicks.
    fn follow_kicks(&mut self) {
        for (queue, kick) in self.mmio.kicks().to_vec().iter().enumerate() {
            while kick.read().is_ok() {
                lock(&self.device).kicked(queue);
            }
        }
    }

    /// Returns what was used since the last look: heads, with what the device wrote to their
    /// buffers.
    pub(crate) fn used(&mut self, index: usize) -> Vec<(u16, Vec<u8>)> {
        let [_, _, used] = self.rings(index);
        let queue = &mut self.queues[index];
        let count: u16 = self.memory.read_obj(GuestAddress(used + 2)).expect("ring");
        let mut found = Vec::new();
        while queue.seen != count {
            let slot = u64::from(queue.seen % queue.size);
            queue.seen = queue.seen.wrapping_add(1);
            let at = GuestAddress(used + 4 + 8 * slot);
            let [head, len]: [u32; 2] = self.memory.read_obj(at).expect("ring");
            let mut left = len as usize;
            let mut data = Vec::new();
            for (address, size) in queue.writable.remove(&(head as u16)).unwrap_or_default() {
                let mut part = vec![0; size.min(left)];
                left -= part.len();
                self.memory
                    .read_slice(&mut part, GuestAddress(address))
                    .expect("memory");
                data.extend(part);
            }
            found.push((head as u16, data));
        }
        found
    }

    /// Makes a request, kicks and returns what the device wrote; it must answer at once.
    pub(crate) fn answer(
        &mut self,
        index: usize,
        readable: &[&[u8]],
        writable: &[usize],
    ) -> Vec<u8> {
        let head = self.request(index, readable, writable);
        self.kick(index);
        let mut used = self.used(index);
        assert_eq!(used.len(), 1, "one request, one answer");
        let (answered, data) = used.remove(0);
        assert_eq!(answered, head);
        data
    }

    /// Makes a request whose buffers are `parts` of 64 bytes, readable ones or (`true`) writable
    /// ones, of which the one at `outside` is not in memory; kicks.
    pub(crate) fn request_outside(&mut self, index: usize, parts: &[bool], outside: usize) {
        let parts: Vec<(u64, u32, u16)> = parts
            .iter()
            .enumerate()
            .map(|(part, is_writable)| {
                let address = match part == outside {
                    true => BASE + MEMORY as u64,
                    false => self.buffer(&[0; 64]),
                };
                (address, 64, if *is_writable { WRITE } else { 0 })
            })
            .collect();
        self.chain(index, &parts);
        self.kick(index);
    }

    /// Returns whether the device asked for a reset.
    pub(crate) fn is_broken(&mut self) -> bool {
        self.read(0x70) & 64 != 0
    }

    /// Returns how often it was interrupted.
    pub(crate) fn interrupts(&self) -> usize {
        self.line.history().iter().filter(|level| **level).count()
    }
}
