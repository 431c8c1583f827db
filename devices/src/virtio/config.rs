//! A device's configuration space, shared by device and transport.

use std::sync::{Arc, Mutex};

use crate::sync::lock;

/// Called with bytes and generation at each change of the configuration space.
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
    /// Creates a space with these bytes, in the device's little-endian layout.
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

    /// Changes the space. If the driver is to be notified, call
    /// [`Link::config_changed`](super::Link::config_changed) afterwards.
    pub fn change(&self, change: impl FnOnce(&mut [u8])) {
        let mut inner = lock(&self.inner);
        // Incremented before and after: a driver that reads in between can tell that it read a
        // mixture.
        inner.generation = inner.generation.wrapping_add(1);
        inner.tell();
        change(&mut inner.bytes);
        inner.generation = inner.generation.wrapping_add(1);
        inner.tell();
    }

    /// Reads at `offset` bytes; bytes beyond the space read as zero.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let inner = lock(&self.inner);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = inner.bytes.get(offset + index).copied().unwrap_or(0);
        }
    }

    /// Returns its size in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        lock(&self.inner).bytes.len()
    }

    /// Returns the generation, which changes whenever the space does.
    #[must_use]
    pub fn generation(&self) -> u32 {
        lock(&self.inner).generation
    }

    /// Returns all of its bytes and the generation.
    pub(super) fn contents(&self) -> (Vec<u8>, u32) {
        let inner = lock(&self.inner);
        (inner.bytes.clone(), inner.generation)
    }

    /// Continues from the generation of a space that was saved with these bytes: a driver that was
    /// in the middle of reading can tell whether the rest belongs together.
    pub(super) fn follow(&self, bytes: &[u8], generation: u32) {
        let mut inner = lock(&self.inner);
        inner.generation = match inner.bytes == bytes {
            true => generation,
            false => generation.wrapping_add(2),
        };
        inner.tell();
    }

    /// Sets `watch` to be called now and at each change, in order.
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
