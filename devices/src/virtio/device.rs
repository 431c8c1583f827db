//! The interface between virtio devices and their transport.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vm_memory::GuestMemoryMmap;

use super::config::ConfigSpace;
use super::link::Link;
use super::queue::{Position, Virtqueue};
use super::state::DeviceState;
use crate::persist::RestoreError;

/// A virtio device: what it offers, and how it processes requests.
///
/// Its life cycle: [`start`](Self::start), work, then [`quiesce`](Self::quiesce) and `start` again
/// each time the machine is paused and resumed, or [`reset`](Self::reset) and the next driver.
/// While it is quiesced it can be [saved](Self::save), and a device that no driver has used can be
/// [restored](Self::restore) to that state.
///
/// A busy device is owned by its worker thread, a light one is behind a lock; a transport reaches
/// either by [`mailbox::Access`](super::mailbox::Access).
pub trait VirtioDevice: Send {
    /// Returns the device ID (virtio 1.2, section 5: 1 is a network card, 2 a block device).
    fn id(&self) -> u32;

    /// Returns the device's own feature bits; the transport adds those of the ring and the version.
    fn features(&self) -> u64 {
        0
    }

    /// Returns the maximum size of each queue: powers of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Returns the configuration space.
    fn config(&self) -> Arc<ConfigSpace>;

    /// Handles a driver's write of `data` at `offset` bytes into the configuration space. The
    /// device checks it, and applies it by [`ConfigSpace::change`] if it accepts it.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Records the features that the driver accepted (FEATURES_OK), or `None` when it resets the
    /// device. The configuration space follows them from here on, even before the start (virtio
    /// 1.2, section 3.1.1, step 7).
    fn agree(&mut self, features: Option<u64>) {
        let _ = features;
    }

    /// Starts processing requests for a driver that is ready, or resumes where the device was
    /// quiesced or saved. Requests that are already available are processed too.
    ///
    /// # Errors
    /// When the backend cannot be started; the device then asks the driver for a reset.
    fn start(&mut self, driver: Driver) -> Result<(), StartError>;

    /// Quiesces the device: each request that was popped is completed, or put back to be the next
    /// one popped, and guest memory is not accessed from here on. What the driver configured stays.
    /// Returns the position in each queue; a queue that is missing has not moved since the start.
    /// Does nothing if the device was not started.
    fn quiesce(&mut self) -> Positions;

    /// Resets the device, for its driver or because the machine ends: requests in flight end as
    /// soon as they can, completed or not, guest memory is not accessed from here on, and what the
    /// driver configured is forgotten. Does nothing if the device was not started.
    fn reset(&mut self);

    /// Returns the device's own state beside its queues, while it is quiesced.
    fn save(&self) -> DeviceState {
        DeviceState::Plain
    }

    /// Restores the state of a saved device in one that no driver has used. `state` is not trusted.
    ///
    /// # Errors
    /// When the state is not valid for this device, which is then unchanged.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Plain => Ok(()),
            other => Err(RestoreError::kind(other)),
        }
    }

    /// Stops one queue while the device works, at the driver's request (virtio 1.2, section
    /// 4.2.2.2): neither its rings nor the buffers of its requests are accessed from here on.
    /// Requests that were available but not completed are forgotten.
    fn stop_queue(&mut self, queue: usize);

    /// Starts a queue that the driver had stopped or left out, while the device works. A kick
    /// follows.
    ///
    /// # Errors
    /// When the backend refuses it; the device then asks the driver for a reset.
    fn start_queue(&mut self, queue: Virtqueue) -> Result<(), StartError>;

    /// Makes a change that the host asks for, whether or not a driver has the device in use. Returns
    /// false for a change that this device does not know.
    fn change(&mut self, change: Change) -> bool {
        let _ = change;
        false
    }

    /// Returns a flag that is set while the device is to be reset: a device that is processing a
    /// long request checks it and abandons the request.
    fn cancel_flag(&self) -> Option<Arc<AtomicBool>> {
        None
    }

    /// Returns a flag that is set while someone waits for the device: a device with many requests
    /// yields between two of them, and kicks itself for the rest.
    fn wanted_flag(&self) -> Option<Arc<AtomicBool>> {
        None
    }

    /// Processes a queue that the driver kicked. Called only after `start` has returned; the queue
    /// may be empty.
    fn kicked(&mut self, queue: usize);

    /// Returns how many requests were taken from the queues so far, modulo 2^32, for the thread that
    /// owns the device; 0 where the device does not count them.
    fn requests(&self) -> u32 {
        0
    }

    /// Returns whether the thread that kicks this queue calls [`Self::kicked`] itself, unless another
    /// thread has the device just then: for a driver that waits busily for the answer, and work that is
    /// short and never blocks.
    fn answers_at_once(&self, queue: usize) -> bool {
        let _ = queue;
        false
    }

    /// Returns whether kicks go to [`Self::kicked`]; false where the kernel or another process
    /// receives them by the eventfds in [`Virtqueue::kick`].
    fn takes_kicks(&self) -> bool {
        true
    }

    /// Returns the descriptors that the device waits for beside its kicks, which never change.
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    /// Handles the source of this index (as in [`Self::sources`]), which is ready, whether or not
    /// the device was started. It may be called spuriously.
    fn ready(&mut self, source: usize) {
        let _ = source;
    }
}

/// What the host may change of a device while a guest has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A disk has so many bytes.
    DiskSize(u64),
    /// A disk has other storage, of so many bytes.
    DiskStorage(u64),
    /// A balloon should hold so many bytes.
    BalloonTarget(u64),
    /// Ask the guest anew for statistics of its memory; done if a driver uses the balloon.
    BalloonStatistics,
}

/// A descriptor that a device waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The descriptor; the device keeps it open.
    pub fd: RawFd,
    /// Whether the device also waits for it to be writable, not only readable.
    pub output: bool,
    /// Whether it is watched edge-triggered (EPOLLET) rather than level-triggered.
    pub edge: bool,
}

/// What a device gets from its driver when it starts.
pub struct Driver {
    /// All negotiated features.
    pub features: u64,
    /// The queues by index; `None` where the driver left one out.
    pub queues: Vec<Option<Virtqueue>>,
    /// Guest memory.
    pub memory: Arc<GuestMemoryMmap>,
    /// The connection to the driver.
    pub link: Arc<Link>,
}

impl Driver {
    /// Takes the queue of this index; `None` if the driver left it out, or if it was taken already.
    pub fn take(&mut self, index: usize) -> Option<Virtqueue> {
        self.queues.get_mut(index).and_then(Option::take)
    }
}

/// The positions in queues, by queue index.
pub type Positions = Vec<(u16, Position)>;

/// Quiesces queues, all of whose requests were completed or put back.
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
