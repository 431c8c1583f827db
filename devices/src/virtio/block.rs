//! The block device (virtio 1.2, section 5.2). An [`Engine`] carries its requests out, at once or
//! many at a time.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use self::request::{Disk, SERIAL};
use self::shape::{ENTRIES, SECTOR, config_bytes, features, field, put};
use self::work::Work;
use super::{
    Change, ConfigSpace, DeviceState, Driver, Positions, RestoreError, Source, StartError,
    VirtioDevice, Virtqueue,
};
use crate::counts::Counts;
use crate::rate::Throttle;

mod data;
mod engine;
mod in_flight;
mod request;
mod shape;
mod work;

pub use super::state::BlockState;
pub use data::{Data, Place};
pub use engine::{Engine, Operation, Outcome, Request};
pub use shape::{
    FEATURE_BLK_SIZE, FEATURE_CONFIG_WCE, FEATURE_DISCARD, FEATURE_FLUSH, FEATURE_MQ, FEATURE_RO,
    FEATURE_SEG_MAX, FEATURE_TOPOLOGY, FEATURE_WRITE_ZEROES, Shape,
};

/// Device ID.
const ID: u32 = 2;

/// A block device.
pub struct Block {
    config: Arc<ConfigSpace>,
    features: u64,
    disk: Disk,
    /// Whether the driver has not been told of a change, which came while the device did not work.
    is_untold: bool,
    /// What was waited for when the device was made, which stays the same.
    sources: [Option<Waits>; 3],
    work: Work,
}

/// What a disk waits for beside its kicks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waits {
    /// For requests to be done.
    Engine,
    /// For the storage to become longer.
    Growth,
    /// For its limits to let it go on.
    Tokens,
}

impl Block {
    /// A disk of this shape, whose requests `engine` carries out.
    #[must_use]
    pub fn new(shape: &Shape, engine: Box<dyn Engine>) -> Block {
        let mut serial = [0; SERIAL];
        for (to, from) in serial.iter_mut().zip(shape.serial.bytes()) {
            *to = from;
        }
        Block {
            config: ConfigSpace::new(config_bytes(shape)),
            features: features(shape),
            disk: Disk {
                capacity: shape.size / SECTOR * SECTOR,
                readonly: shape.readonly,
                serial,
                agreed: 0,
                writeback: true,
                flushes: shape.flushes,
            },
            is_untold: false,
            sources: [
                engine.source().map(|_| Waits::Engine),
                None,
                engine.growth_fd().map(|_| Waits::Growth),
            ],
            work: Work::new(shape.queues, engine),
        }
    }

    /// The disk, held to the limits of `throttle`, if there is one.
    #[must_use]
    pub fn held_to(mut self, throttle: Option<Arc<Throttle>>) -> Block {
        self.sources[1] = throttle.as_ref().map(|_| Waits::Tokens);
        self.work.throttle = throttle;
        self
    }

    /// The disk, with what it does counted there.
    #[must_use]
    pub fn counted_by(mut self, counts: Arc<Counts>) -> Block {
        self.work.counts = counts;
        self
    }

    /// Changes the disk's size to so many bytes; a driver that has it in use is notified.
    pub fn set_size(&mut self, size: u64) {
        let sectors = size / SECTOR;
        if sectors * SECTOR == self.disk.capacity {
            return;
        }
        self.disk.capacity = sectors * SECTOR;
        self.config
            .change(|bytes| put(bytes, field::CAPACITY, &sectors.to_le_bytes()));
        self.tell();
    }

    /// Tells the driver that the configuration has changed, now or when the device works again.
    fn tell(&mut self) {
        match self.work.link() {
            Some(link) => link.config_changed(),
            None => self.is_untold = true,
        }
    }

    /// Finishes what is under way on the storage that the disk had, and turns to the other one; a driver
    /// that has it in use is notified, even if the size is the same.
    fn set_storage(&mut self, size: u64) {
        self.work.renew(&self.disk);
        let before = self.disk.capacity;
        self.set_size(size);
        if self.disk.capacity == before {
            self.tell();
        }
    }

    /// Sets the cache's mode, as the driver sees it where it can change it.
    fn set_writeback(&mut self, writeback: bool) {
        if std::mem::replace(&mut self.disk.writeback, writeback) != writeback {
            self.config
                .change(|bytes| bytes[field::WRITEBACK] = u8::from(writeback));
        }
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![ENTRIES; self.work.queue_count()]
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn change(&mut self, change: Change) -> bool {
        match change {
            Change::DiskSize(bytes) => self.set_size(bytes),
            Change::DiskStorage(bytes) => self.set_storage(bytes),
            _ => return false,
        }
        true
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let is_mode = self.disk.agreed & FEATURE_CONFIG_WCE != 0 && offset == field::WRITEBACK;
        match (data, self.work.link()) {
            ([mode @ (0 | 1)], _) if is_mode => self.set_writeback(*mode == 1),
            (_, Some(link)) => link.fault(format_args!(
                "the driver writes {data:?} to byte {offset} of the configuration"
            )),
            _ => {}
        }
    }

    fn agree(&mut self, features: Option<u64>) {
        self.disk.agreed = features.unwrap_or(0);
        // Sections 5.2.5.2 and 5.2.6.2: for a driver that does not flush, a write is done when it is
        // stable. The next driver finds the cache as the first one did.
        let flushes = |features| features & FEATURE_FLUSH != 0 || !self.disk.flushes;
        self.set_writeback(features.is_none_or(flushes));
    }

    fn start(&mut self, driver: Driver) -> Result<(), StartError> {
        self.work.start(driver);
        if std::mem::take(&mut self.is_untold) {
            self.tell();
        }
        Ok(())
    }

    fn quiesce(&mut self) -> Positions {
        self.work.quiesce()
    }

    fn reset(&mut self) {
        self.work.reset();
        self.is_untold = false;
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(BlockState {
            capacity: self.disk.capacity,
            writeback: self.disk.writeback,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Block(state) = state else {
            return Err(RestoreError::kind(state));
        };
        if state.capacity != self.disk.capacity {
            return Err(RestoreError(format!(
                "the disk has {} bytes, and had {} when it was saved; it needs the same image",
                self.disk.capacity, state.capacity
            )));
        }
        self.set_writeback(state.writeback);
        Ok(())
    }

    fn stop_queue(&mut self, queue: usize) {
        self.work.stop_queue(queue);
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Result<(), StartError> {
        self.work.start_queue(queue);
        Ok(())
    }

    fn cancel_flag(&self) -> Option<Arc<AtomicBool>> {
        Some(Arc::clone(&self.work.cancelled))
    }

    fn wanted_flag(&self) -> Option<Arc<AtomicBool>> {
        Some(Arc::clone(&self.work.wanted))
    }

    fn kicked(&mut self, queue: usize) {
        self.work.kicked(&self.disk, queue);
    }

    fn requests(&self) -> u32 {
        self.work.requests
    }

    fn sources(&self) -> Vec<Source> {
        let (engine, throttle) = (&self.work.engine, &self.work.throttle);
        let source = |fd| Source {
            fd,
            output: false,
            edge: false,
        };
        let source_of = |waits: &Waits| match waits {
            Waits::Engine => engine.source().map(source),
            Waits::Growth => engine.growth_fd().map(source),
            Waits::Tokens => throttle.as_ref().map(|throttle| throttle.source()),
        };
        let sources = self.sources.iter().flatten();
        sources.filter_map(source_of).collect()
    }

    fn ready(&mut self, source: usize) {
        match self.sources.iter().flatten().nth(source) {
            Some(Waits::Growth) => {
                if let Some(size) = self.work.engine.grown() {
                    self.set_size(size);
                }
            }
            Some(Waits::Tokens) => self.work.unthrottled(&self.disk),
            Some(Waits::Engine) | None => self.work.completed(&self.disk),
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.work.reset();
    }
}

#[cfg(test)]
mod tests;
