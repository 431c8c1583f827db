//! The console, with a reader that takes what it likes.

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::console::{Console, Sink};

use super::guest::{Guest, Subject, lock};
use super::input::Input;

/// How many bytes the reader takes now.
#[derive(Clone)]
struct Reader(Arc<Mutex<usize>>);

impl Sink for Reader {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut room = lock(&self.0);
        let taken = bytes.len().min(*room);
        *room -= taken;
        taken
    }

    fn room(&self) -> Option<RawFd> {
        None
    }
}

struct Terminal {
    room: Arc<Mutex<usize>>,
    /// What was typed and not taken.
    typed: Vec<u8>,
    has_reader: bool,
    size: Option<(u16, u16)>,
}

impl Terminal {
    fn type_on(&mut self, device: &Mutex<Console>) {
        let (taken, wants_more) = lock(device).receive(&self.typed);
        assert!(taken <= self.typed.len());
        assert!(!wants_more || taken == self.typed.len());
        self.typed.drain(..taken);
    }
}

impl Subject for Terminal {
    type Device = Console;

    fn payload(&mut self, _queue: usize, input: &mut Input<'_>) -> Vec<u8> {
        let len = match input.rarely(8) {
            true => usize::from(input.u16()) % 0x3000,
            false => input.below(64),
        };
        vec![input.u8(); len]
    }

    fn event(&mut self, device: &Mutex<Console>, input: &mut Input<'_>) {
        match input.u8() {
            0..=79 => {
                let len = input.below(600);
                let new = self.typed.len() + len;
                self.typed.resize(new.min(10_000), b'a');
                self.type_on(device);
            }
            80..=127 => self.type_on(device),
            128..=175 => {
                *lock(&self.room) = match input.rarely(4) {
                    true => input.u32() as usize,
                    false => input.below(300),
                };
                lock(device).ready(0);
            }
            176..=207 => lock(device).resize((input.u16(), input.u16())),
            208..=239 => {
                let listening = lock(device).listening();
                self.has_reader |= listening.is_some();
            }
            _ => lock(device).ready(0),
        }
    }

    fn fresh(&mut self) -> Option<Console> {
        let reader = Box::new(Reader(Arc::clone(&self.room)));
        Some(Console::new(reader, Box::new(|| ()), self.size))
    }

    fn finish(&mut self, device: &Mutex<Console>) {
        *lock(&self.room) = usize::MAX;
        lock(device).ready(0);
    }

    fn is_drained(&self, queue: usize) -> bool {
        queue == 1
    }
}

/// The console.
pub fn console(data: &[u8]) {
    let mut input = Input::new(data);
    let size = input.flag().then(|| (input.u8().into(), input.u8().into()));
    let room = Arc::new(Mutex::new(usize::from(input.u16())));
    let reader = Box::new(Reader(Arc::clone(&room)));
    let device = Console::new(reader, Box::new(|| ()), size);
    let world = Terminal {
        room,
        typed: Vec::new(),
        has_reader: false,
        size,
    };
    Guest::new(world, Arc::new(Mutex::new(device))).run(&mut input);
}
