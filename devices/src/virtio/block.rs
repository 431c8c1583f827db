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
    work: Work,
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
            },
            work: Work::new(shape.queues, engine),
        }
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
        if let Some(link) = self.work.link() {
            link.config_changed();
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
        self.set_writeback(features.is_none_or(|features| features & FEATURE_FLUSH != 0));
    }

    fn start(&mut self, driver: Driver) -> Result<(), StartError> {
        self.work.start(driver);
        Ok(())
    }

    fn quiesce(&mut self) -> Positions {
        self.work.quiesce()
    }

    fn reset(&mut self) {
        self.work.reset();
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
        let engine = &self.work.engine;
        let fds = [engine.source(), engine.growth_fd()];
        let source = |fd| Source {
            fd,
            output: false,
            edge: false,
        };
        fds.into_iter().flatten().map(source).collect()
    }

    fn ready(&mut self, source: usize) {
        let engine = &mut self.work.engine;
        let of_requests = usize::from(engine.source().is_some());
        if engine.growth_fd().is_some() && source == of_requests {
            if let Some(size) = engine.grown() {
                self.set_size(size);
            }
            return;
        }
        self.work.completed(&self.disk);
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.work.reset();
    }
}

#[cfg(test)]
mod tests;
