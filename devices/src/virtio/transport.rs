//! The register machine that every transport has: status, features, queues and their start
//! (virtio 1.2, sections 2.1, 2.2, 3.1).

use crate::sync::ring;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::Addresses;
use super::{
    ConfigSpace, Driver, FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1, Link,
    VirtioDevice, Virtqueue, lock,
};

/// How long a reset waits for the device's lock before the user hears of it, and how often it looks.
const PATIENCE: Duration = Duration::from_secs(2);
const GLANCE: Duration = Duration::from_micros(100);
/// DRIVER_OK (virtio 1.2, section 2.1).
pub(crate) const DRIVER_OK: u32 = 4;
/// FEATURES_OK.
pub(crate) const FEATURES_OK: u32 = 8;
/// DEVICE_NEEDS_RESET.
pub(crate) const NEEDS_RESET: u32 = 64;

/// What a transport's registers are about.
pub(crate) struct Transport {
    pub(crate) device: Arc<Mutex<dyn VirtioDevice>>,
    pub(crate) id: u32,
    pub(crate) config: Arc<ConfigSpace>,
    pub(crate) link: Arc<Link>,
    memory: Arc<GuestMemoryMmap>,
    kicks: Vec<Arc<EventFd>>,
    offered: u64,
    accepted: u64,
    /// The status bits that the driver set; DEVICE_NEEDS_RESET is not among them.
    status: u32,
    queues: Vec<QueueRegisters>,
    started: bool,
    /// Whether the device took the start.
    works: bool,
    /// As [`VirtioDevice::cancel_flag`].
    cancel: Option<Arc<AtomicBool>>,
}

/// What the driver says of a queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueRegisters {
    pub(crate) most: u16,
    pub(crate) size: u32,
    pub(crate) ready: bool,
    pub(crate) addresses: Addresses,
    /// Whether the device has it: one that cannot be is ready, and the device asks for a reset.
    in_use: bool,
}

impl QueueRegisters {
    fn new(most: u16) -> QueueRegisters {
        QueueRegisters {
            most,
            size: u32::from(most),
            ready: false,
            addresses: Addresses::default(),
            in_use: false,
        }
    }
}

impl Transport {
    /// The transport of `device`, whose driver is reached by `link`.
    ///
    /// # Errors
    /// A process without room for more descriptors.
    pub(crate) fn new(
        device: Arc<Mutex<dyn VirtioDevice>>,
        memory: Arc<GuestMemoryMmap>,
        link: Arc<Link>,
    ) -> std::io::Result<Transport> {
        let (id, features, config, sizes, cancel) = {
            let device = lock(&device);
            let (config, sizes) = (device.config(), device.queue_sizes());
            let cancel = device.cancel_flag();
            (device.id(), device.features(), config, sizes, cancel)
        };
        let kicks = sizes
            .iter()
            .map(|_| Ok(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?)))
            .collect::<std::io::Result<Vec<_>>>()?;
        Ok(Transport {
            device,
            id,
            config,
            link,
            memory,
            kicks,
            offered: features | FEATURE_VERSION_1 | FEATURE_INDIRECT | FEATURE_EVENT_IDX,
            accepted: 0,
            status: 0,
            queues: sizes.into_iter().map(QueueRegisters::new).collect(),
            started: false,
            works: false,
            cancel,
        })
    }

    /// The descriptors that kicks come by, by queue.
    pub(crate) fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// The status bits that the driver set and the device let stand.
    pub(crate) fn status(&self) -> u32 {
        self.status
    }

    /// 32 feature bits from bit 32 * `select`.
    pub(crate) fn offered(&self, select: u32) -> u32 {
        match select {
            0 => self.offered as u32,
            1 => (self.offered >> 32) as u32,
            _ => 0,
        }
    }

    /// The driver accepts these of the 32 feature bits from bit 32 * `select`.
    pub(crate) fn accept(&mut self, select: u32, bits: u32) {
        if self.status & FEATURES_OK != 0 {
            let link = &self.link;
            link.fault(format_args!(
                "the driver changes features after FEATURES_OK"
            ));
            return;
        }
        let bits = u64::from(bits);
        match select {
            0 => self.accepted = self.accepted & !0xffff_ffff | bits,
            1 => self.accepted = self.accepted & 0xffff_ffff | bits << 32,
            _ => {}
        }
    }

    /// The registers of a queue.
    pub(crate) fn queue(&self, index: u32) -> Option<&QueueRegisters> {
        self.queues.get(index as usize)
    }

    /// Changes the size or the addresses of a queue, which is allowed while the device does not work
    /// on it.
    pub(crate) fn set_queue(&mut self, index: u32, set: impl FnOnce(&mut QueueRegisters)) {
        let Some(queue) = self.queues.get_mut(index as usize) else {
            return;
        };
        match self.started && queue.ready {
            false => set(queue),
            true => self.link.fault(format_args!(
                "the driver changes queue {index} while the device works on it"
            )),
        }
    }

    /// The driver says whether the device may work on a queue. When it stops one, the device is out
    /// of its rings and buffers when this returns.
    pub(crate) fn set_ready(&mut self, index: u32, ready: bool) {
        let Some(queue) = self.queues.get_mut(index as usize) else {
            return;
        };
        if std::mem::replace(&mut queue.ready, ready) == ready || !self.works {
            return;
        }
        let kick = &self.kicks[index as usize];
        if !ready {
            if !std::mem::take(&mut queue.in_use) {
                return;
            }
            self.lock_device().stop_queue(index as usize);
            // A kick that nobody took is not for the queue that is set up next.
            let _ = kick.read();
            return;
        }
        let made = self.make_queue(index as usize);
        self.queues[index as usize].in_use = made.is_ok();
        let started = made.and_then(|queue| {
            let started = self.lock_device().start_queue(queue);
            started.map_err(|error| format!("it does not start queue {index}: {error}"))
        });
        match started {
            // What is there already is served.
            Ok(()) => ring(kick),
            Err(what) => self.link.broken(format_args!("{what}")),
        }
    }

    /// The driver kicks a queue by a register, where no ioeventfd takes it.
    pub(crate) fn kick(&self, index: u32) {
        match self.kicks.get(index as usize) {
            Some(kick) => ring(kick),
            None => self
                .link
                .fault(format_args!("the driver kicks queue {index}, which is not")),
        }
    }

    /// The driver writes the configuration space.
    pub(crate) fn write_config(&mut self, offset: usize, data: &[u8]) {
        lock(&self.device).write_config(offset, data);
    }

    /// The driver writes its status; 0 resets the device.
    pub(crate) fn set_status(&mut self, status: u32) {
        if status == 0 {
            self.reset();
            return;
        }
        let new = status & !self.status & !NEEDS_RESET;
        // Bits are only ever added.
        self.status |= new;
        if new & FEATURES_OK != 0 {
            match self.features_work() {
                true => lock(&self.device).agree(Some(self.accepted)),
                false => self.status &= !FEATURES_OK,
            }
        }
        if new & DRIVER_OK != 0 && !self.started {
            self.start();
        }
    }

    fn features_work(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & FEATURE_VERSION_1 != 0
    }

    fn start(&mut self) {
        if self.status & FEATURES_OK == 0 {
            let what = format_args!("the driver starts without FEATURES_OK");
            self.link.broken(what);
            return;
        }
        let queues = match self.make_queues() {
            Ok(queues) => queues,
            Err(what) => {
                self.link.broken(format_args!("{what}"));
                return;
            }
        };
        let driver = Driver {
            features: self.accepted,
            queues,
            memory: Arc::clone(&self.memory),
            link: Arc::clone(&self.link),
        };
        self.started = true;
        for queue in &mut self.queues {
            queue.in_use = queue.ready;
        }
        let started = lock(&self.device).start(driver);
        self.works = started.is_ok();
        if let Err(error) = started {
            self.link.broken(format_args!("it does not start: {error}"));
        }
    }

    fn make_queues(&self) -> Result<Vec<Option<Virtqueue>>, String> {
        let queues = self.queues.iter().enumerate();
        queues
            .map(|(index, registers)| {
                let ready = registers.ready.then(|| self.make_queue(index));
                ready.transpose()
            })
            .collect()
    }

    fn make_queue(&self, index: usize) -> Result<Virtqueue, String> {
        let registers = &self.queues[index];
        let size = u16::try_from(registers.size).unwrap_or(u16::MAX);
        Virtqueue::new(
            index as u16,
            (registers.most, size),
            registers.addresses,
            self.accepted & FEATURE_EVENT_IDX != 0,
            Arc::clone(&self.memory),
            Arc::clone(&self.link),
            Arc::clone(&self.kicks[index]),
        )
    }

    /// Stops the device, which may be at work with its lock held.
    fn stop(&self) {
        if let Some(cancel) = &self.cancel {
            cancel.store(true, Ordering::Release);
        }
        let mut device = self.lock_device();
        device.stop();
        if let Some(cancel) = &self.cancel {
            cancel.store(false, Ordering::Release);
        }
    }

    /// The device as soon as whoever works with it lets go of it. Says so where that takes long: it
    /// may wait for what the host does not finish.
    fn lock_device(&self) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
        let (begun, mut told) = (Instant::now(), PATIENCE);
        loop {
            match self.device.try_lock() {
                Ok(device) => return device,
                Err(TryLockError::Poisoned(device)) => return device.into_inner(),
                Err(TryLockError::WouldBlock) => {}
            }
            let waited = begun.elapsed();
            if waited >= told {
                told *= 2;
                log::warn!(
                    "{}: a reset has waited {} s for the end of a request that the host is at work on",
                    self.link.name(),
                    waited.as_secs()
                );
            }
            std::thread::sleep(GLANCE);
        }
    }

    fn reset(&mut self) {
        if std::mem::take(&mut self.started) {
            self.stop();
        }
        if self.status & FEATURES_OK != 0 {
            lock(&self.device).agree(None);
        }
        self.works = false;
        self.status = 0;
        self.accepted = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.most);
        }
        // A kick that nobody took is not for the driver that comes next.
        for kick in &self.kicks {
            let _ = kick.read();
        }
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.reset();
    }
}
