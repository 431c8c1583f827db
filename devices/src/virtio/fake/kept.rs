//! A device that does nothing by itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::virtio::{
    Chain, ConfigSpace, Driver, Link, Positions, StartError, VirtioDevice, Virtqueue, quiesced,
};

/// A feature that the device offers.
pub(crate) const OFFERED: u64 = 1 << 5;
/// One that it does not.
pub(crate) const NOT_OFFERED: u64 = 1 << 6;
/// Queue sizes.
pub(crate) const SIZES: [u16; 2] = [64, 4];

/// A device that holds each request until it is told to answer, and records what happens.
pub(crate) struct Keeper {
    pub(crate) config: Arc<ConfigSpace>,
    pub(crate) refuses: bool,
    pub(crate) queues: Vec<Option<Virtqueue>>,
    pub(crate) kept: Vec<(usize, Chain)>,
    pub(crate) link: Option<Arc<Link>>,
    pub(crate) features: Vec<u64>,
    pub(crate) pauses: usize,
    pub(crate) stops: usize,
    pub(crate) queue_stops: usize,
    pub(crate) writes: Vec<(usize, Vec<u8>)>,
    pub(crate) kicks: Arc<AtomicUsize>,
}

impl Keeper {
    pub(crate) fn new() -> Keeper {
        Keeper {
            config: ConfigSpace::new((1..=10).collect()),
            refuses: false,
            queues: Vec::new(),
            kept: Vec::new(),
            link: None,
            features: Vec::new(),
            pauses: 0,
            stops: 0,
            queue_stops: 0,
            writes: Vec::new(),
            kicks: Arc::default(),
        }
    }

    pub(crate) fn answer_all(&mut self) {
        for (index, chain) in self.kept.drain(..) {
            let Some(queue) = &mut self.queues[index] else {
                continue;
            };
            let written = chain.write(queue.memory(), 0, b"answer");
            queue.complete(chain, written as u32);
        }
        for queue in self.queues.iter_mut().flatten() {
            queue.signal();
        }
    }
}

impl VirtioDevice for Keeper {
    fn id(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        OFFERED
    }

    fn queue_sizes(&self) -> Vec<u16> {
        SIZES.to_vec()
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.writes.push((offset, data.to_vec()));
    }

    fn start(&mut self, mut driver: Driver) -> Result<(), StartError> {
        self.features.push(driver.features);
        self.queues = (0..SIZES.len()).map(|index| driver.take(index)).collect();
        self.link = Some(driver.link);
        match self.refuses {
            true => Err(StartError("it does not like this".to_owned())),
            false => Ok(()),
        }
    }

    fn quiesce(&mut self) -> Positions {
        self.pauses += 1;
        for (index, chain) in self.kept.drain(..) {
            if let Some(queue) = &mut self.queues[index] {
                queue.hand_back([chain]);
            }
        }
        quiesced(
            self.queues
                .drain(..)
                .flatten()
                .collect::<Vec<_>>()
                .iter_mut(),
        )
    }

    fn reset(&mut self) {
        self.stops += 1;
        self.queues.clear();
        self.kept.clear();
    }

    fn stop_queue(&mut self, queue: usize) {
        self.queue_stops += 1;
        self.queues[queue] = None;
        self.kept.retain(|(index, _)| *index != queue);
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Result<(), StartError> {
        let index = usize::from(queue.index());
        self.queues[index] = Some(queue);
        match self.refuses {
            true => Err(StartError("it does not like this".to_owned())),
            false => Ok(()),
        }
    }

    fn kicked(&mut self, queue: usize) {
        self.kicks.fetch_add(1, Ordering::Relaxed);
        let kept = &mut self.kept;
        if let Some(Some(ring)) = self.queues.get_mut(queue) {
            ring.serve(|_, chain| kept.push((queue, chain)));
        }
    }
}
