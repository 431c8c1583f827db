//! Virtio (OASIS virtio 1.2): what devices and transports are to one another.
//!
//! A [`VirtioDevice`] has features, queues and a configuration space, and does its work when its
//! queues are kicked; a transport ([`mmio::Mmio`]) shows it to the guest and owns the register
//! machine. Between them stands [`Link`]: by it a device interrupts the guest. Whoever runs the
//! device's thread waits for its kicks and its [sources](VirtioDevice::sources) and calls it.

use crate::limit::{Admitted, RateLimit};
pub(crate) use crate::sync::lock;
use std::fmt;
use std::os::fd::RawFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

pub mod balloon;
pub mod block;
pub mod console;
pub mod fs;
pub mod mailbox;
pub mod mmio;
pub mod net;
pub mod pmem;
pub mod queue;
pub mod rng;
mod transport;
pub mod vsock;

#[cfg(test)]
pub(crate) mod fake;

pub use crate::persist::RestoreError;
pub use queue::{Chain, Position, Virtqueue};
pub use transport::{QueueState, TransportState};

/// VIRTIO_F_INDIRECT_DESC, bit 28 (virtio 1.2, section 6).
pub const FEATURE_INDIRECT: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX, bit 29.
pub const FEATURE_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1, bit 32.
pub const FEATURE_VERSION_1: u64 = 1 << 32;

/// A kind of virtio device: what it offers, and the work that it does.
///
/// Its life: [`start`](Self::start), work, then [`quiesce`](Self::quiesce) and `start` again, as
/// often as its machine is held and goes on, or [`reset`](Self::reset) and the next driver. While it
/// does not work it can be [saved](Self::save), and a device that no driver has touched can be
/// [made the same](Self::restore).
///
/// A busy device is owned by the thread that does its work, a light one stands behind a lock; a
/// transport reaches either by [`mailbox::Access`].
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

    /// The driver wrote `data` at `offset` bytes into the configuration space. The device checks
    /// it, and changes the space by [`ConfigSpace::change`] where it takes it.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver agreed to these features (FEATURES_OK), or resets the device: then to none any more.
    /// What its configuration space says and takes is as they ask from here on, also before the start
    /// (virtio 1.2, section 3.1.1, step 7).
    fn agree(&mut self, features: Option<u64>) {
        let _ = features;
    }

    /// The driver is ready: work begins, or goes on as it was when the device was quiesced or saved.
    /// Requests that are there already are served too.
    ///
    /// # Errors
    /// A backend that cannot be started; the device then asks the driver for a reset.
    fn start(&mut self, driver: Driver) -> Result<(), StartError>;

    /// Ends the work for now: each request that was taken is completed, or handed back so that it
    /// is the next one that is taken, and guest memory is not touched from here on. What the driver
    /// set stays. Returns where the work on each queue stands; a queue that is not among them stands
    /// where it stood at the start. A device that was not started does nothing.
    fn quiesce(&mut self) -> Positions;

    /// The driver resets the device, or the machine ends: all work that began ends as soon as it
    /// can, answered or not, guest memory is not touched from here on, and what the driver set is
    /// forgotten. A device that was not started does nothing.
    fn reset(&mut self);

    /// What the device has of its own beside its queues, while it does not work.
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

    /// The driver stops one queue while the device works (virtio 1.2, section 4.2.2.2): neither its
    /// rings nor the buffers of its requests are touched from here on. What the driver made
    /// available there and the device did not answer is forgotten.
    fn stop_queue(&mut self, queue: usize);

    /// The driver sets up, while the device works, a queue that it had stopped or left out. A kick
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

    /// The driver says that there is something new in a queue. Never called before `start`'s end;
    /// it may be called with nothing there.
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

    /// The source of this index (as in [`Self::sources`]) is ready, whether or not the device was
    /// started. It may be called with nothing there.
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

/// What a device has of its own beside its queues: plain data, by which another device goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// Nothing.
    Plain,
    /// A memory balloon's.
    Balloon(Box<balloon::BalloonState>),
    /// A disk's.
    Block(block::BlockState),
    /// A console's.
    Console(console::ConsoleState),
    /// A file system's.
    Fs(fs::FsState),
    /// A network card's.
    Net(net::NetState),
    /// A socket device's.
    Vsock(vsock::VsockState),
}

impl RestoreError {
    /// The state is that of another kind of device.
    #[must_use]
    pub fn kind(state: &DeviceState) -> RestoreError {
        let kind = match state {
            DeviceState::Plain => "a device without one",
            DeviceState::Balloon(_) => "a balloon",
            DeviceState::Block(_) => "a disk",
            DeviceState::Console(_) => "a console",
            DeviceState::Fs(_) => "a shared folder",
            DeviceState::Net(_) => "a network card",
            DeviceState::Vsock(_) => "a socket device",
        };
        RestoreError(format!("the state is that of {kind}"))
    }
}

/// Why a device did not start, in words.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StartError(pub String);

/// What a device interrupts the guest for. Each transport has its own interrupt for it: one line for
/// all over MMIO, an entry of a table over PCI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vector {
    /// The configuration space or the device's status changed.
    Config,
    /// A buffer of this queue was used (virtio 1.2, section 2.3).
    Queue(u16),
}

/// How a transport interrupts the guest. What differs between transports, and nothing else.
pub trait Interrupts: Send + Sync {
    /// Interrupts the guest for this.
    fn signal(&self, vector: Vector);

    /// Shows DEVICE_NEEDS_RESET in the device's status (virtio 1.2, section 2.1.2).
    fn needs_reset(&self);

    /// A descriptor by which another process or the kernel interrupts the guest (a vhost call
    /// descriptor); `None` where the transport has none. It stays the same whatever interrupt the
    /// driver chooses.
    fn descriptor(&self, vector: Vector) -> Option<Arc<EventFd>>;
}

/// A device's way to its driver: interrupts, and a count of what the driver did wrong.
pub struct Link {
    name: String,
    interrupts: Box<dyn Interrupts>,
    faults: RateLimit,
}

impl Link {
    /// The way of the device called `name` ("disk0", for messages).
    #[must_use]
    pub fn new(name: String, interrupts: Box<dyn Interrupts>) -> Link {
        Link {
            name,
            interrupts,
            faults: RateLimit::default(),
        }
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A buffer of this queue was used: interrupts the guest.
    pub fn queue_used(&self, queue: u16) {
        self.interrupts.signal(Vector::Queue(queue));
    }

    /// The configuration space changed: interrupts the guest.
    pub fn config_changed(&self) {
        self.interrupts.signal(Vector::Config);
    }

    /// As [`Interrupts::descriptor`], for a queue.
    #[must_use]
    pub fn call(&self, queue: u16) -> Option<Arc<EventFd>> {
        self.interrupts.descriptor(Vector::Queue(queue))
    }

    /// Counts what the driver did wrong, and logs it at a limited rate. The device goes on.
    pub fn fault(&self, what: fmt::Arguments<'_>) {
        self.faults.log(log::Level::Warn, |Admitted { count, .. }| {
            format!("{}: {what} (fault {count} of this device)", self.name)
        });
    }

    /// Counts what the driver broke beyond repair, and asks it for a reset.
    pub fn broken(&self, what: fmt::Arguments<'_>) {
        self.fault(what);
        self.interrupts.needs_reset();
    }

    /// What the driver did wrong so far, counted.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.faults.count()
    }
}

/// Tells whoever shows the configuration space to the guest of a change: the bytes and the
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

    /// Changes the space. Where the driver should hear of it, [`Link::config_changed`] follows.
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
    fn contents(&self) -> (Vec<u8>, u32) {
        let inner = lock(&self.inner);
        (inner.bytes.clone(), inner.generation)
    }

    /// Goes on from the generation of a space that was saved with these bytes: a driver that read
    /// a part of it before sees whether the rest is of the same.
    fn follow(&self, bytes: &[u8], generation: u32) {
        let mut inner = lock(&self.inner);
        inner.generation = match inner.bytes == bytes {
            true => generation,
            false => generation.wrapping_add(2),
        };
        inner.tell();
    }

    /// Has `watch` called now and at each change, in order.
    fn set_watch(&self, watch: ConfigWatch) {
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
