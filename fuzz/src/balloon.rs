//! The balloon, with pages of the host of all sizes.

use std::sync::{Arc, Mutex};

use armlet_devices::virtio::balloon::{Balloon, Discard, Offer};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::guest::{Guest, Subject, lock};
use super::input::Input;
use super::memory::BASE;

type Ranges = Arc<Mutex<Vec<(u64, u64)>>>;

/// Gives nothing back, and zeroes what it would.
struct Zeroes {
    page: u64,
    done: Ranges,
    fails: Arc<Mutex<bool>>,
}

impl Discard for Zeroes {
    fn page_size(&self) -> u64 {
        self.page
    }

    fn discard(&self, memory: &GuestMemoryMmap, address: GuestAddress, len: u64) -> bool {
        assert!(len > 0 && address.0.is_multiple_of(self.page));
        assert!(len.is_multiple_of(self.page), "{len} bytes are no pages");
        if *lock(&self.fails) {
            return false;
        }
        let zeros = vec![0; usize::try_from(len).expect("less than memory")];
        memory.write_slice(&zeros, address).expect("guest memory");
        lock(&self.done).push((address.0, len));
        true
    }
}

struct Host {
    done: Ranges,
    fails: Arc<Mutex<bool>>,
    offer: Offer,
    page: u64,
}

impl Host {
    fn device(&self, target: u64) -> Balloon {
        let discard = Zeroes {
            page: self.page,
            done: Arc::clone(&self.done),
            fails: Arc::clone(&self.fails),
        };
        Balloon::new(target, self.offer, Box::new(discard))
    }
}

impl Subject for Host {
    type Device = Balloon;

    fn payload(&mut self, _queue: usize, input: &mut Input<'_>) -> Vec<u8> {
        match input.u8() {
            // Page numbers.
            0..=127 => {
                let first = (BASE >> 12) as u32 + u32::from(input.u8() & 15);
                let count = u32::from(input.u8() & 31);
                let step = u32::from(input.u8() & 1) + 1;
                let pages = (0..count).map(|page| first + page * step);
                pages.flat_map(u32::to_le_bytes).collect()
            }
            // Statistics.
            128..=191 => {
                let count = input.u8() & 31;
                let first = u16::from(input.u8() & 31);
                let tags = (0..count).flat_map(|tag| {
                    let mut bytes = (first + u16::from(tag)).to_le_bytes().to_vec();
                    bytes.extend(u64::MAX.to_le_bytes());
                    bytes
                });
                tags.collect()
            }
            // Commands of hints.
            192..=239 => u32::from(input.u8() & 7).to_le_bytes().to_vec(),
            _ => input.bytes(64).to_vec(),
        }
    }

    fn event(&mut self, device: &Mutex<Balloon>, input: &mut Input<'_>) {
        let mut balloon = lock(device);
        match input.u8() {
            0..=63 => balloon.set_target(input.u64() >> (input.u8() & 63)),
            64..=127 => drop(balloon.ask_for_statistics()),
            128..=191 => drop(balloon.ask_for_hints()),
            192..=207 => *lock(&self.fails) = input.flag(),
            208..=223 => {
                let named = balloon.statistics().map(|all| all.iter().count());
                assert!(named.unwrap_or(0) <= 16);
            }
            _ => {
                let hints = balloon.hints();
                let kept: u64 = hints.ranges.iter().map(|(_, len)| len).sum();
                assert!(kept <= hints.bytes);
                assert!(balloon.target() <= u64::from(u32::MAX) << 12);
                assert!(balloon.actual() <= u64::from(u32::MAX) << 12);
            }
        }
    }

    fn is_drained(&self, _queue: usize) -> bool {
        // The queue of statistics keeps a request, and which one it is depends on features.
        false
    }

    fn fresh(&mut self) -> Option<Balloon> {
        Some(self.device(0))
    }

    fn touched(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(&mut lock(&self.done))
    }
}

/// The balloon.
pub fn balloon(data: &[u8]) {
    let mut input = Input::new(data);
    let shape = input.u8();
    let offer = Offer {
        reporting: shape & 1 != 0,
        hinting: shape & 2 != 0,
        deflate_on_oom: shape & 4 != 0,
    };
    let host = Host {
        done: Ranges::default(),
        fails: Arc::default(),
        offer,
        page: [4096, 4096, 8192, 16384][usize::from(shape >> 3 & 3)],
    };
    let device = host.device(input.u32().into());
    Guest::new(host, Arc::new(Mutex::new(device))).run(&mut input);
}
