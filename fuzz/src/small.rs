//! Devices of one queue: entropy and persistent memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use armlet_devices::virtio::pmem::Pmem;
use armlet_devices::virtio::rng::Rng;

use super::guest::{Guest, Subject};
use super::input::Input;

struct Entropy(Arc<AtomicBool>);

impl Entropy {
    fn device(&self) -> Rng {
        let works = Arc::clone(&self.0);
        let mut next = 0_u8;
        Rng::new(Box::new(move |buffer| {
            assert!(buffer.len() <= 256);
            for byte in &mut *buffer {
                next = next.wrapping_add(1);
                *byte = next;
            }
            works.load(Ordering::Relaxed)
        }))
    }
}

impl Subject for Entropy {
    type Device = Rng;

    fn payload(&mut self, _queue: usize, _input: &mut Input<'_>) -> Vec<u8> {
        Vec::new()
    }

    fn event(&mut self, _device: &Mutex<Rng>, input: &mut Input<'_>) {
        self.0.store(input.flag(), Ordering::Relaxed);
    }

    fn fresh(&mut self) -> Option<Rng> {
        Some(self.device())
    }

    fn is_drained(&self, _queue: usize) -> bool {
        true
    }
}

/// The entropy device.
pub fn rng(data: &[u8]) {
    let world = Entropy(Arc::new(AtomicBool::new(true)));
    let device = Arc::new(Mutex::new(world.device()));
    Guest::new(world, device).run(&mut Input::new(data));
}

struct Storage(Arc<AtomicBool>);

impl Storage {
    fn device(&self) -> Pmem {
        let works = Arc::clone(&self.0);
        let flush = move || works.load(Ordering::Relaxed);
        Pmem::new(1 << 32, 1 << 21, Box::new(flush))
    }
}

impl Subject for Storage {
    type Device = Pmem;

    fn payload(&mut self, _queue: usize, input: &mut Input<'_>) -> Vec<u8> {
        let kind = match input.rarely(4) {
            true => input.u32(),
            false => 0,
        };
        kind.to_le_bytes().to_vec()
    }

    fn event(&mut self, _device: &Mutex<Pmem>, input: &mut Input<'_>) {
        self.0.store(input.flag(), Ordering::Relaxed);
    }

    fn fresh(&mut self) -> Option<Pmem> {
        Some(self.device())
    }

    fn is_drained(&self, _queue: usize) -> bool {
        true
    }
}

/// Persistent memory.
pub fn pmem(data: &[u8]) {
    let world = Storage(Arc::new(AtomicBool::new(true)));
    let device = Arc::new(Mutex::new(world.device()));
    Guest::new(world, device).run(&mut Input::new(data));
}
