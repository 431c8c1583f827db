//! Devices of one queue: entropy and persistent memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use armlet_devices::virtio::pmem::Pmem;
use armlet_devices::virtio::rng::Rng;

use super::guest::{Guest, Subject};
use super::input::Input;

struct Entropy(Arc<AtomicBool>);

impl Subject for Entropy {
    type Device = Rng;

    fn payload(&mut self, _queue: usize, _input: &mut Input<'_>) -> Vec<u8> {
        Vec::new()
    }

    fn event(&mut self, _device: &Mutex<Rng>, input: &mut Input<'_>) {
        self.0.store(input.flag(), Ordering::Relaxed);
    }

    fn is_drained(&self, _queue: usize) -> bool {
        true
    }
}

/// The entropy device.
pub fn rng(data: &[u8]) {
    let works = Arc::new(AtomicBool::new(true));
    let source = Arc::clone(&works);
    let mut next = 0_u8;
    let device = Rng::new(Box::new(move |buffer| {
        assert!(buffer.len() <= 256);
        for byte in &mut *buffer {
            next = next.wrapping_add(1);
            *byte = next;
        }
        source.load(Ordering::Relaxed)
    }));
    let device = Arc::new(Mutex::new(device));
    Guest::new(Entropy(works), device).run(&mut Input::new(data));
}

struct Storage(Arc<AtomicBool>);

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

    fn is_drained(&self, _queue: usize) -> bool {
        true
    }
}

/// Persistent memory.
pub fn pmem(data: &[u8]) {
    let works = Arc::new(AtomicBool::new(true));
    let storage = Arc::clone(&works);
    let flush = Box::new(move || storage.load(Ordering::Relaxed));
    let device = Arc::new(Mutex::new(Pmem::new(1 << 32, 1 << 21, flush)));
    Guest::new(Storage(works), device).run(&mut Input::new(data));
}
