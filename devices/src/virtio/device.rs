//! What every virtio device does for its transport, and what it gets from it.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vm_memory::GuestMemoryMmap;

use super::config::ConfigSpace;
use super::link::Link;
use super::queue::{Position, Virtqueue};
use super::state::DeviceState;
use crate::persist::RestoreError;

/// A kind of virtio device: what it offers, and the work that it does.
///
/// Its life: [`start`](Self::start), work, then [`quiesce`](Self::quiesce) and `start` again, as
/// often as its machine is held and goes on, or [`reset`](Self::reset) and the next driver. While it
/// does not work it can be [saved](Self::save), and a device that no driver has touched can be
/// [made the same](Self::restore).
///
/// A busy device is owned by the thread that does its work, a light one stands behind a lock; a
/// transport reaches either by [`mailbox::Access`](super::mailbox::Access).
pub trait VirtioDevice: Send {
    /// Its device ID (virtio 1.2, section 5: 1 is a network card, 2 a block device).
    fn id(&self) -> u32;

    /// The device's own feature bits; those of the ring and the version come from the transport.
    fn features(&self) -> u64 {
        0
    }

    /// The most entries of each of its queues: powers of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Its configuration space.
    fn config(&self) -> Arc<ConfigSpace>;

    /// Takes a driver's write of `data` at `offset` bytes into the configuration space. The device
    /// checks it, and changes the space by [`ConfigSpace::change`] where it accepts it.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Takes note of the features that the driver accepted (FEATURES_OK); of none when it resets the
    /// device.
    /// What its configuration space says and takes is as they ask from here on, also before the start
    /// (virtio 1.2, section 3.1.1, step 7).
    fn agree(&mut self, features: Option<u64>) {
        let _ = features;
    }

    /// Starts work for a driver that is ready, or resumes it as it was when the device was quiesced or
    /// saved. Requests that are there already are served too.
    ///
    /// # Errors
    /// A backend that cannot be started; the device then asks the driver for a reset.
    fn start(&mut self, driver: Driver) -> Result<(), StartError>;

    /// Ends the work for now: each request that was taken is completed, or handed back so that it
    /// is the next one that is taken, and guest memory is not touched from here on. What the driver
    /// set stays. Returns where the work on each queue stands; a queue that is not among them stands
    /// where it stood at the start. A device that was not started does nothing.
    fn quiesce(&mut self) -> Positions;

    /// Resets the device, for its driver or as the machine ends: all work that began ends as soon as it
    /// can, answered or not, guest memory is not touched from here on, and what the driver set is
    /// forgotten. A device that was not started does nothing.
    fn reset(&mut self);

    /// Returns the device's own state, beside its queues, while it does not work.
    fn save(&self) -> DeviceState {
        DeviceState::Plain
    }

    /// Makes a device that no driver has touched the same as one that was saved. Nothing that
    /// `state` says is trusted.
    ///
    /// # Errors
    /// What this device cannot be; it is as before then.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Plain => Ok(()),
            other => Err(RestoreError::kind(other)),
        }
    }

    /// Stops one queue while the device works, as its driver asks (virtio 1.2, section 4.2.2.2): neither its
    /// rings nor the buffers of its requests are touched from here on. What the driver made
    /// available there and the device did not answer is forgotten.
    fn stop_queue(&mut self, queue: usize);

    /// Starts, while the device works, a queue that the driver had stopped or left out. A kick
    /// follows.
    ///
    /// # Errors
    /// A backend that refuses it; the device then asks the driver for a reset.
    fn start_queue(&mut self, queue: Virtqueue) -> Result<(), StartError>;

    /// A flag that is set while the device is to be reset: one that is in the middle of a long
    /// request looks at it, and ends what it does.
    fn cancel_flag(&self) -> Option<Arc<AtomicBool>> {
        None
    }

    /// A flag that is set while somebody waits for the device: one that has many requests to serve
    /// gives way between two of them, and kicks itself for the rest.
    fn wanted_flag(&self) -> Option<Arc<AtomicBool>> {
        None
    }

    /// Serves a queue in which the driver says that there is something new. Never called before
    /// `start`'s end; it may be called with nothing there.
    fn kicked(&mut self, queue: usize);

    /// Whether kicks go to [`Self::kicked`]; false where the kernel or another process takes them
    /// from the descriptors in [`Virtqueue::kick`].
    fn takes_kicks(&self) -> bool {
        true
    }

    /// The descriptors that the device waits for beside its kicks, the same for its whole life.
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    /// Looks after the source of this index (as in [`Self::sources`]), which is ready, whether or not
    /// the device was started. It may be called with nothing there.
    fn ready(&mut self, source: usize) {
        let _ = source;
    }
}

/// A descriptor that a device waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The descriptor; the device keeps it open.
    pub fd: RawFd,
    /// Whether the device waits for room to write too, not only for something to read.
    pub output: bool,
    /// Whether it wants to be called once for each change only (EPOLLET), and not again and again
    /// until it has read all.
    pub edge: bool,
}

/// What a device gets from the driver when it starts.
pub struct Driver {
    /// All negotiated features.
    pub features: u64,
    /// Queues by index; those that the driver left out are `None`.
    pub queues: Vec<Option<Virtqueue>>,
    /// Guest memory.
    pub memory: Arc<GuestMemoryMmap>,
    /// The way back to the driver.
    pub link: Arc<Link>,
}

impl Driver {
    /// Takes the queue of this index; `None` where the driver left it out or it was taken.
    pub fn take(&mut self, index: usize) -> Option<Virtqueue> {
        self.queues.get_mut(index).and_then(Option::take)
    }
}

/// Where the work on queues stands, by their indexes.
pub type Positions = Vec<(u16, Position)>;

/// Ends the work on queues, all of whose requests were completed or handed back.
#[must_use = "where the work goes on later"]
pub fn quiesced<'a>(queues: impl IntoIterator<Item = &'a mut Virtqueue>) -> Positions {
    let queues = queues.into_iter();
    queues
        .map(|queue| (queue.index(), queue.quiesce()))
        .collect()
}

/// Why a device did not start.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StartError(pub String);
