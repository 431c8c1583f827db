//! What a guest's driver does: it negotiates, sets queues up and makes requests, by the rules as far
//! as its input lets it.

use armlet_devices::virtio::{FEATURE_EVENT_IDX, FEATURE_VERSION_1};

use super::super::input::Input;
use super::super::memory::{BASE, END, HOLE, TABLES};
use super::super::ring::{INDIRECT, NEXT, WRITE};
use super::register::*;
use super::{DATA, Guest, Subject};

/// Sizes of buffers that devices think of.
const SIZES: [usize; 20] = [
    0, 1, 2, 4, 8, 11, 12, 13, 16, 17, 20, 40, 44, 45, 100, 512, 513, 1024, 1526, 4096,
];

impl<S: Subject> Guest<S> {
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
    pub(super) fn replace_queue(&mut self, queue: usize, input: &mut Input<'_>) {
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
    pub(super) fn request(&mut self, queue: usize, input: &mut Input<'_>) {
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

    pub(super) fn descriptor((address, len, flags): (u64, u32, u16), next: u16) -> [u8; 16] {
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

    pub(super) fn offer(&mut self, queue: usize, head: u16) {
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

    pub(super) fn address(&mut self, input: &mut Input<'_>) -> u64 {
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
}
