//! A ring that is kept from one life of a guest to the next.

use super::sys::Ring;
use armlet_devices::sync::lock;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};

/// Where a ring is kept from one life of a guest to the next: a confined process cannot make another.
pub(super) type Home = Arc<Mutex<Option<Ring>>>;

/// A ring that goes back to its home when this is dropped, without requests.
pub(super) struct Lent {
    ring: ManuallyDrop<Ring>,
    pub(super) home: Home,
}

impl Lent {
    /// The ring that is at home, or another for `slots` requests on `file`.
    ///
    /// # Errors
    /// As those of [`Ring::new`].
    pub(super) fn new(home: &Home, file: &File, slots: u16) -> io::Result<Lent> {
        let kept = lock(home).take();
        let mut ring = kept.map_or_else(|| Ring::new(file, slots), Ok)?;
        // The disk may have had another file then.
        ring.turn_to(file);
        Ok(Lent {
            ring: ManuallyDrop::new(ring),
            home: Arc::clone(home),
        })
    }
}

impl Deref for Lent {
    type Target = Ring;

    fn deref(&self) -> &Ring {
        &self.ring
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut Ring {
        &mut self.ring
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.ring.stop();
        // SAFETY: nothing uses the ring here after it was taken.
        let ring = unsafe { ManuallyDrop::take(&mut self.ring) };
        lock(&self.home).get_or_insert(ring);
    }
}
