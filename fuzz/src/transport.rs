//! The register machine of virtio over MMIO, with a device that checks what it is told.

use std::sync::{Arc, Mutex};

use armlet_devices::virtio::{
    ConfigSpace, Driver, FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1, Link, Positions,
    StartError, VirtioDevice, Virtqueue, quiesced,
};

use super::guest::{Guest, Subject};
use super::input::Input;

/// A device that answers each request with as many bytes as there is room for.
pub(super) struct Probe {
    features: u64,
    sizes: Vec<u16>,
    config: Arc<ConfigSpace>,
    refuses: bool,
    working: Option<(Vec<Option<Virtqueue>>, Arc<Link>)>,
}

impl VirtioDevice for Probe {
    fn id(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.sizes.clone()
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let size = self.config.size();
        if let Some(end) = offset.checked_add(data.len()).filter(|end| *end <= size) {
            self.config
                .change(|bytes| bytes[offset..end].copy_from_slice(data));
        }
    }

    fn start(&mut self, driver: Driver) -> Result<(), StartError> {
        assert!(self.working.is_none(), "started twice");
        let offered = self.features | FEATURE_VERSION_1 | FEATURE_INDIRECT | FEATURE_EVENT_IDX;
        assert_eq!(driver.features & !offered, 0, "features that are none");
        assert!(driver.features & FEATURE_VERSION_1 != 0);
        assert_eq!(driver.queues.len(), self.sizes.len());
        for ((queue, most), index) in driver.queues.iter().zip(&self.sizes).zip(0..) {
            if let Some(queue) = queue {
                assert_eq!(queue.index(), index);
                assert!(queue.size().is_power_of_two() && queue.size() <= *most);
            }
        }
        self.working = Some((driver.queues, driver.link));
        match self.refuses {
            true => Err(StartError("not today".to_owned())),
            false => Ok(()),
        }
    }

    fn quiesce(&mut self) -> Positions {
        let mut working = self.working.take();
        quiesced(
            working
                .iter_mut()
                .flat_map(|(queues, _)| queues.iter_mut().flatten()),
        )
    }

    fn reset(&mut self) {
        self.working = None;
    }

    fn stop_queue(&mut self, queue: usize) {
        let (queues, _) = self.working.as_mut().expect("stopped, and not started");
        assert!(queues[queue].take().is_some(), "a queue stopped twice");
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Result<(), StartError> {
        let (queues, _) = self.working.as_mut().expect("a queue, and not started");
        let index = usize::from(queue.index());
        assert!(queue.size().is_power_of_two() && queue.size() <= self.sizes[index]);
        assert!(
            queues[index].replace(queue).is_none(),
            "a queue started twice"
        );
        match self.refuses {
            true => Err(StartError("not today".to_owned())),
            false => Ok(()),
        }
    }

    fn kicked(&mut self, queue: usize) {
        let Some((queues, _)) = &mut self.working else {
            return;
        };
        let Some(queue) = &mut queues[queue] else {
            return;
        };
        queue.serve(|queue, chain| {
            let mut seen = [0; 64];
            let read = chain.read(queue.memory(), 0, &mut seen);
            assert!(read <= chain.readable_len());
            let room = chain.writable_len();
            let answer = vec![0x5a; room.min(0x1_0000)];
            let written = chain.write(queue.memory(), 0, &answer);
            assert_eq!(written, answer.len());
            queue.complete(chain, written as u32);
        });
    }
}

/// A device with queues of these sizes.
pub(super) fn probe(sizes: &[u16]) -> Probe {
    Probe {
        features: 0b1011,
        sizes: sizes.to_vec(),
        config: ConfigSpace::new(vec![0x11; 40]),
        refuses: false,
        working: None,
    }
}

/// Changes that do not come from the driver.
struct World {
    features: u64,
    sizes: Vec<u16>,
    config: Arc<ConfigSpace>,
}

impl World {
    fn device(&self) -> Probe {
        // What it holds now is what the host says that it holds.
        let mut bytes = vec![0; self.config.size()];
        self.config.read(0, &mut bytes);
        Probe {
            features: self.features,
            sizes: self.sizes.clone(),
            config: ConfigSpace::new(bytes),
            refuses: false,
            working: None,
        }
    }
}

impl Subject for World {
    type Device = Probe;

    fn payload(&mut self, _queue: usize, input: &mut Input<'_>) -> Vec<u8> {
        let len = input.below(100);
        vec![0xa5; len]
    }

    fn event(&mut self, device: &Mutex<Probe>, input: &mut Input<'_>) {
        let mut probe = device.lock().expect("nobody panicked");
        match input.u8() {
            0..=127 => {
                let size = probe.config.size();
                if size > 0 {
                    let at = input.below(size);
                    let value = input.u8();
                    probe.config.change(|bytes| bytes[at] = value);
                }
                if let Some((_, link)) = &probe.working {
                    link.config_changed();
                }
            }
            128..=175 => {
                if let Some((_, link)) = &probe.working {
                    let before = link.faults();
                    link.broken(format_args!("the world wants it so"));
                    assert_eq!(link.faults(), before + 1);
                }
            }
            176..=191 => probe.refuses = input.flag(),
            _ => {
                if let Some((_, link)) = &probe.working {
                    link.queue_used(input.u16());
                }
            }
        }
    }

    fn heal(&mut self, device: &Mutex<Probe>) {
        device.lock().expect("nobody panicked").refuses = false;
    }

    fn fresh(&mut self) -> Option<Probe> {
        let device = self.device();
        self.config = device.config();
        Some(device)
    }

    fn is_drained(&self, _queue: usize) -> bool {
        true
    }
}

/// The register machine.
pub fn transport(data: &[u8]) {
    let mut input = Input::new(data);
    let shape = input.u8();
    let count = usize::from(shape & 7) + 1;
    let sizes = (0..count).map(|_| 1 << input.below(11)).collect();
    let mut world = World {
        // The transport's own bits are not a device's to offer.
        features: if input.flag() { input.u64() } else { 0b1011 }
            & !(FEATURE_VERSION_1 | FEATURE_INDIRECT | FEATURE_EVENT_IDX),
        sizes,
        config: ConfigSpace::new(vec![0x11; input.below(80)]),
    };
    let device = world.fresh().expect("a device");
    let guest = Guest::new(world, Arc::new(Mutex::new(device)));
    match shape & 0x80 {
        0 => guest.run_registers(&mut input),
        _ => guest.run(&mut input),
    }
}
