//! A device's configuration space, as device and transport share it.

use std::sync::{Arc, Mutex};

use crate::sync::lock;

/// Notified of each change, for whoever shows the configuration space to the guest: the bytes and the
/// generation.
type ConfigWatch = Box<dyn Fn(&[u8], u32) + Send>;

/// A device's configuration space, shared by device and transport (virtio 1.2, section 2.5).
pub struct ConfigSpace {
    inner: Mutex<ConfigInner>,
}

struct ConfigInner {
    bytes: Vec<u8>,
    generation: u32,
    watch: Option<ConfigWatch>,
}

impl ConfigSpace {
    /// A space with these bytes, in the device's little-endian layout.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Arc<ConfigSpace> {
        Arc::new(ConfigSpace {
            inner: Mutex::new(ConfigInner {
                bytes,
                generation: 0,
                watch: None,
            }),
        })
    }

    /// Changes the space. Where the driver should hear of it, [`Link::config_changed`](super::Link::config_changed) follows.
    pub fn change(&self, change: impl FnOnce(&mut [u8])) {
        let mut inner = lock(&self.inner);
        // Before and after: a driver that reads in between sees that it read parts of both.
        inner.generation = inner.generation.wrapping_add(1);
        inner.tell();
        change(&mut inner.bytes);
        inner.generation = inner.generation.wrapping_add(1);
        inner.tell();
    }

    /// Reads at `offset` bytes; what lies beyond the space reads as zero.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let inner = lock(&self.inner);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = inner.bytes.get(offset + index).copied().unwrap_or(0);
        }
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        lock(&self.inner).bytes.len()
    }

    /// The number that changes whenever the space does.
    #[must_use]
    pub fn generation(&self) -> u32 {
        lock(&self.inner).generation
    }

    /// All of its bytes and the number that changes with them.
    pub(super) fn contents(&self) -> (Vec<u8>, u32) {
        let inner = lock(&self.inner);
        (inner.bytes.clone(), inner.generation)
    }

    /// Goes on from the generation of a space that was saved with these bytes: a driver that read
    /// a part of it before sees whether the rest is of the same.
    pub(super) fn follow(&self, bytes: &[u8], generation: u32) {
        let mut inner = lock(&self.inner);
        inner.generation = match inner.bytes == bytes {
            true => generation,
            false => generation.wrapping_add(2),
        };
        inner.tell();
    }

    /// Has `watch` called now and at each change, in order.
    pub(super) fn set_watch(&self, watch: ConfigWatch) {
        let mut inner = lock(&self.inner);
        inner.watch = Some(watch);
        inner.tell();
    }
}

impl ConfigInner {
    fn tell(&self) {
        if let Some(watch) = &self.watch {
            watch(&self.bytes, self.generation);
        }
    }
}
