//! What stands behind a virtio device on the host.

use crate::balloon::BalloonTarget;
use crate::disk::DiskHandle;
use crate::pmem::PmemImage;
use anyhow::Result;
use armlet_devices::counts::Tally;
use armlet_devices::rate::Throttle;
use armlet_devices::virtio::VirtioDevice;
use std::sync::{Arc, Mutex};

/// What stands behind a virtio device on the host.
///
/// It has two steps, and a process that confines itself does so between them:
///
/// 1. **open** ([`crate::open::open`], and `open` of each kind's options), once. It may open files by
///    name, connect, fork and have programs executed (by the broker), and ask for memory.
/// 2. [`Self::examine`], once, and [`Self::device`], at each life of the guest, and what devices do from then on. It uses the
///    descriptors that were kept and asks the broker, which was told in the first step what that may be.
///    It opens no file by name, connects to nothing, does not fork and executes nothing.
///
/// `docs/ARCHITECTURE.md` ("Before and after confinement") lists what each kind does in the second.
pub trait Backend: Send {
    /// What it is called in messages and in the name of its thread: "disk0", up to 15 bytes.
    fn name(&self) -> String;

    /// Reads what is not to be trusted in what was opened, beyond the headers that say what it is: once,
    /// before the first [`Self::device`], and when the process is confined.
    ///
    /// # Errors
    /// What is damaged, or not what the user says it is.
    fn examine(&mut self) -> Result<()> {
        Ok(())
    }

    /// The device for the guest that starts now; the one of the guest before is gone. It uses what
    /// was opened, and opens nothing by name.
    ///
    /// # Errors
    /// What the host refuses.
    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>>;

    /// Whether its work gets a thread of its own; light devices share the event loop.
    fn is_busy(&self) -> bool {
        false
    }

    /// Whether another process works in guest memory, which then has to be shareable.
    fn shares_memory(&self) -> bool {
        false
    }

    /// Whether it gives the guest's memory back to the host: then it has to do with RAM only.
    fn takes_memory(&self) -> bool {
        false
    }

    /// The memory of the host that the guest gets with the device, for persistent memory.
    fn pmem(&self) -> Option<&PmemImage> {
        None
    }

    /// Returns the image of a disk, for whoever looks at it while the guest runs.
    fn disk(&self) -> Option<DiskHandle> {
        None
    }

    /// Returns what holds the device, or one direction of it, to limits, for whoever changes them while
    /// the guest runs; `None` where that is not possible.
    fn throttle(&self, flow: Flow) -> Option<&Throttle> {
        let _ = flow;
        None
    }

    /// Returns what the device has done, in all lives of the guest, where that is counted.
    fn tally(&self) -> Option<Tally> {
        None
    }

    /// Returns what a balloon should hold, for whoever changes it while the guest runs.
    fn balloon(&self) -> Option<&BalloonTarget> {
        None
    }
}

/// What of a device limits are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// All of it.
    All,
    /// What the guest receives from a network card.
    Receive,
    /// What the guest sends by a network card.
    Transmit,
}

impl<B: Backend + Sync + ?Sized> Backend for Arc<B> {
    fn name(&self) -> String {
        (**self).name()
    }

    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
        (**self).device()
    }

    fn is_busy(&self) -> bool {
        (**self).is_busy()
    }

    fn shares_memory(&self) -> bool {
        (**self).shares_memory()
    }

    fn takes_memory(&self) -> bool {
        (**self).takes_memory()
    }

    fn pmem(&self) -> Option<&PmemImage> {
        (**self).pmem()
    }

    fn disk(&self) -> Option<DiskHandle> {
        (**self).disk()
    }

    fn throttle(&self, flow: Flow) -> Option<&Throttle> {
        (**self).throttle(flow)
    }

    fn balloon(&self) -> Option<&BalloonTarget> {
        (**self).balloon()
    }
}
