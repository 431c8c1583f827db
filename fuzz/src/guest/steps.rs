//! What an input says, step by step.

use armlet_devices::Device;
use armlet_devices::virtio::mmio::QUEUE_NOTIFY;

use super::super::input::Input;
use super::register::*;
use super::{Guest, Subject, lock};

/// The most steps that an input can ask for.
const STEPS: usize = 256;

impl<S: Subject> Guest<S> {
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
}
