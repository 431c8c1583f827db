//! The register machine that every transport has: status, features, queues and their start
//! (virtio 1.2, sections 2.1, 2.2, 3.1).

use crate::sync::{bell, ring};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::mailbox::{Access, ask};
use super::queue::{Addresses, Position};
use super::{
    ConfigSpace, DeviceState, Driver, FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1, Link,
    RestoreError, VirtioDevice, Virtqueue,
};

/// DRIVER_OK (virtio 1.2, section 2.1).
pub(crate) const DRIVER_OK: u32 = 4;
/// FEATURES_OK.
pub(crate) const FEATURES_OK: u32 = 8;
/// DEVICE_NEEDS_RESET.
pub(crate) const NEEDS_RESET: u32 = 64;

/// The state that every transport's registers show and change.
pub(crate) struct Transport {
    device: Arc<dyn Access>,
    pub(crate) id: u32,
    pub(crate) config: Arc<ConfigSpace>,
    pub(crate) link: Arc<Link>,
    memory: Arc<GuestMemoryMmap>,
    kicks: Vec<Arc<EventFd>>,
    offered: u64,
    accepted: u64,
    /// The status bits that the driver set, without DEVICE_NEEDS_RESET.
    status: u32,
    queues: Vec<QueueRegisters>,
    started: bool,
    /// Whether the device took the start.
    works: bool,
    /// While the machine is paused: the configuration space and generation that the driver last
    /// could read.
    held: Option<(Vec<u8>, u32)>,
    /// As [`VirtioDevice::cancel_flag`] and [`VirtioDevice::wanted_flag`].
    cancel: Option<Arc<AtomicBool>>,
    wanted: Option<Arc<AtomicBool>>,
}

/// The registers of a queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueRegisters {
    pub(crate) most: u16,
    pub(crate) size: u32,
    pub(crate) ready: bool,
    pub(crate) addresses: Addresses,
    /// Whether the device was given the queue. An invalid queue is ready but not in use, and the
    /// device asks for a reset.
    in_use: bool,
    /// Where the device resumes, while it does not use the queue.
    position: Position,
}

/// The state of a transport whose machine is paused, as plain data from which another one can
/// resume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// The device ID.
    pub id: u32,
    /// The features that the driver accepted.
    pub accepted: u64,
    /// The status bits that the driver set.
    pub status: u32,
    /// Whether the driver started the device.
    pub started: bool,
    /// Whether the device took the start.
    pub works: bool,
    /// The queues by index.
    pub queues: Vec<QueueState>,
    /// The configuration space.
    pub config: Vec<u8>,
    /// Its generation.
    pub generation: u32,
    /// The device's own state.
    pub device: DeviceState,
}

/// The state of a queue: what the driver set up, and the device's position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Its size, as the driver wrote it.
    pub size: u32,
    /// Whether the driver made it ready.
    pub ready: bool,
    /// Whether the device was given the queue.
    pub in_use: bool,
    /// The addresses of its rings.
    pub addresses: Addresses,
    /// Where the device resumes.
    pub position: Position,
}

impl QueueRegisters {
    fn new(most: u16) -> QueueRegisters {
        QueueRegisters {
            most,
            size: u32::from(most),
            ready: false,
            addresses: Addresses::default(),
            in_use: false,
            position: Position::default(),
        }
    }
}

impl Transport {
    /// Creates the transport of `device`, which reaches its driver by `link`.
    ///
    /// # Errors
    /// A process without room for more descriptors.
    pub(crate) fn new(
        device: Arc<dyn Access>,
        memory: Arc<GuestMemoryMmap>,
        link: Arc<Link>,
    ) -> std::io::Result<Transport> {
        let what = format_args!("{}: reading its properties", link.name());
        let ((id, features), (config, sizes), (cancel, wanted)) = ask(&*device, what, |device| {
            (
                (device.id(), device.features()),
                (device.config(), device.queue_sizes()),
                (device.cancel_flag(), device.wanted_flag()),
            )
        });
        let kicks = sizes
            .iter()
            .map(|_| Ok(Arc::new(bell()?)))
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
            held: None,
            cancel,
            wanted,
        })
    }

    /// Returns the eventfds that kicks arrive by, by queue.
    pub(crate) fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// Returns the status bits that the driver set and the device accepted.
    pub(crate) fn status(&self) -> u32 {
        self.status
    }

    /// 32 feature bits from bit 32 * `select`.
    pub(crate) fn offered(&self, select: u32) -> u32 {
        half(self.offered, select)
    }

    /// Returns the 32 feature bits from bit 32 * `select` that the driver accepts.
    pub(crate) fn accepted(&self, select: u32) -> u32 {
        half(self.accepted, select)
    }

    /// Records which of the feature bits from bit 32 * `select` the driver accepts.
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

    /// Returns the registers of a queue.
    pub(crate) fn queue(&self, index: u32) -> Option<&QueueRegisters> {
        self.queues.get(index as usize)
    }

    /// Changes the size or the addresses of a queue, which is allowed while the device does not use
    /// it.
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

    /// Makes a queue ready, or stops it. Once a stop returns, the device no longer accesses its
    /// rings and buffers.
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
            if self.held.is_none() {
                self.ask("the stop of a queue", move |device| {
                    device.stop_queue(index as usize);
                });
            }
            // A stale kick must not reach the queue that is set up next.
            let _ = kick.read();
            return;
        }
        queue.position = Position::default();
        let made = self.make_queue(index as usize);
        self.queues[index as usize].in_use = made.is_ok();
        let started = made.and_then(|queue| {
            // A paused device gets the queue with the others, when it resumes.
            let started = match self.held.is_none() {
                true => self.ask("the start of a queue", |device| device.start_queue(queue)),
                false => Ok(()),
            };
            started.map_err(|error| format!("it does not start queue {index}: {error}"))
        });
        match started {
            // Requests may be available already.
            Ok(()) => ring(kick),
            Err(what) => self.link.broken(format_args!("{what}")),
        }
    }

    /// Kicks a queue by the register, where no ioeventfd catches the write.
    pub(crate) fn kick(&self, index: u32) {
        let queue = index as usize;
        if self.works && self.held.is_none() && self.device.answer(queue) {
            return;
        }
        match self.kicks.get(queue) {
            Some(kick) => ring(kick),
            None => self
                .link
                .fault(format_args!("the driver kicks queue {index}, which is not")),
        }
    }

    /// Writes the configuration space for the driver.
    pub(crate) fn write_config(&mut self, offset: usize, data: &[u8]) {
        let data = data.to_vec();
        self.ask("a write to the configuration", move |device| {
            device.write_config(offset, &data);
        });
    }

    /// Sets the status for the driver; 0 resets the device.
    pub(crate) fn set_status(&mut self, status: u32) {
        if status == 0 {
            self.reset();
            return;
        }
        let new = status & !self.status & !NEEDS_RESET;
        // Status bits can only be added.
        self.status |= new;
        if new & FEATURES_OK != 0 {
            match self.features_work() {
                true => self.agree(Some(self.accepted)),
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
        let queues = match self.make_queues(|queue| queue.ready) {
            Ok(queues) => queues,
            Err(what) => {
                self.link.broken(format_args!("{what}"));
                return;
            }
        };
        (self.started, self.works) = (true, true);
        for queue in &mut self.queues {
            queue.in_use = queue.ready;
        }
        if self.held.is_none() {
            self.start_device(queues);
        }
    }

    fn start_device(&mut self, queues: Vec<Option<Virtqueue>>) {
        let driver = Driver {
            features: self.accepted,
            queues,
            memory: Arc::clone(&self.memory),
            link: Arc::clone(&self.link),
        };
        let started = self.ask("the start", |device| device.start(driver));
        self.works = started.is_ok();
        if let Err(error) = started {
            // No queue is in use until the driver resets the device.
            for queue in &mut self.queues {
                queue.in_use = false;
            }
            self.link.broken(format_args!("it does not start: {error}"));
        }
    }

    fn make_queues(
        &self,
        is_wanted: impl Fn(&QueueRegisters) -> bool,
    ) -> Result<Vec<Option<Virtqueue>>, String> {
        let queues = self.queues.iter().enumerate();
        queues
            .map(|(index, registers)| {
                let wanted = is_wanted(registers).then(|| self.make_queue(index));
                wanted.transpose()
            })
            .collect()
    }

    /// Quiesces the device while the machine is paused: once this returns, it does not access guest
    /// memory until [`Self::resume`].
    pub(crate) fn quiesce(&mut self) {
        if self.held.is_some() {
            return;
        }
        // A device whose start failed may have started in part.
        if self.started {
            let positions = self.ask("a pause", |device| device.quiesce());
            for (index, position) in positions {
                if let Some(queue) = self.queues.get_mut(usize::from(index)) {
                    queue.position = position;
                }
            }
        }
        self.held = Some(self.config.contents());
    }

    /// Resumes the device where it was quiesced.
    pub(crate) fn resume(&mut self) {
        let Some((config, _)) = self.held.take() else {
            return;
        };
        if !self.works {
            return;
        }
        match self.make_queues(|queue| queue.in_use) {
            Ok(queues) => self.start_device(queues),
            // Neither the queues nor guest memory can have changed meanwhile.
            Err(what) => self.link.broken(format_args!("{what}")),
        }
        if self.config.contents().0 != config {
            self.link.config_changed();
        }
        for (queue, kick) in self.queues.iter().zip(&self.kicks) {
            if queue.in_use {
                // For a kick that was consumed while the device was quiesced.
                ring(kick);
            }
        }
    }

    /// Returns the state, while the machine is paused.
    ///
    /// # Errors
    /// While the device is running.
    pub(crate) fn save(&self) -> Result<TransportState, RestoreError> {
        let Some((config, generation)) = &self.held else {
            return Err(RestoreError("a running device cannot be saved".into()));
        };
        let queues = self.queues.iter().map(|queue| QueueState {
            size: queue.size,
            ready: queue.ready,
            in_use: queue.in_use,
            addresses: queue.addresses,
            position: queue.position,
        });
        Ok(TransportState {
            id: self.id,
            accepted: self.accepted,
            status: self.status,
            started: self.started,
            works: self.works,
            queues: queues.collect(),
            config: config.clone(),
            generation: *generation,
            device: self.ask("the saving of its state", |device| device.save()),
        })
    }

    /// Restores the state of a saved transport in one that is paused and that no driver has used.
    /// `state` is not trusted.
    ///
    /// # Errors
    /// When the state is not valid for the transport or its device; nothing has changed then.
    pub(crate) fn restore(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        self.check(state).map_err(RestoreError)?;
        let before = self.queues.clone();
        for (queue, saved) in self.queues.iter_mut().zip(&state.queues) {
            *queue = QueueRegisters {
                most: queue.most,
                size: saved.size,
                ready: saved.ready,
                addresses: saved.addresses,
                in_use: saved.in_use,
                position: saved.position,
            };
        }
        // The rings' layout depends on the restored features and sizes.
        let accepted = std::mem::replace(&mut self.accepted, state.accepted);
        let made = self.make_queues(|queue| queue.in_use && state.works);
        let agreed = (state.status & FEATURES_OK != 0).then_some(state.accepted);
        let saved = state.device.clone();
        let restored = made.map_err(RestoreError).and_then(|_| {
            self.ask("the restoring of its state", move |device| {
                // Restored again, because negotiating the features has changed it.
                if agreed.is_some() {
                    device.agree(agreed);
                }
                let restored = device.restore(&saved);
                if restored.is_err() && agreed.is_some() {
                    device.agree(None);
                }
                restored
            })
        });
        if restored.is_err() {
            (self.queues, self.accepted) = (before, accepted);
            return restored;
        }
        self.status = state.status;
        (self.started, self.works) = (state.started, state.works);
        self.config.follow(&state.config, state.generation);
        self.held = Some((state.config.clone(), state.generation));
        Ok(())
    }

    /// Checks that a state is valid for this transport.
    fn check(&self, state: &TransportState) -> Result<(), String> {
        if self.held.is_none() || self.started || self.status != 0 {
            return Err("a driver has the device in use already".to_owned());
        }
        if state.id != self.id {
            let (saved, id) = (state.id, self.id);
            return Err(format!(
                "the state is that of device ID {saved}; this is {id}"
            ));
        }
        let (saved, count) = (state.queues.len(), self.queues.len());
        if saved != count {
            return Err(format!("the state has {saved} queues; the device {count}"));
        }
        let size = self.config.size();
        if state.config.len() != size {
            return Err(format!(
                "the state has {} bytes of configuration; the device {size}",
                state.config.len()
            ));
        }
        let lacking = state.accepted & !self.offered;
        if state.status & FEATURES_OK != 0 && lacking != 0 {
            return Err(format!(
                "the driver agreed to features {lacking:#x}, which the device does not offer here"
            ));
        }
        let is_started = FEATURES_OK | DRIVER_OK;
        let agrees = state.status & NEEDS_RESET == 0
            && (!state.started || state.status & is_started == is_started)
            && (!state.works || state.started)
            && state
                .queues
                .iter()
                .all(|queue| !queue.in_use || queue.ready && state.started);
        match agrees {
            true => Ok(()),
            false => Err(format!(
                "status {:#x} does not go with what is said of the device's start and its queues",
                state.status
            )),
        }
    }

    fn make_queue(&self, index: usize) -> Result<Virtqueue, String> {
        let registers = &self.queues[index];
        let size = u16::try_from(registers.size).unwrap_or(u16::MAX);
        Virtqueue::new(
            index as u16,
            (registers.most, size),
            (registers.addresses, registers.position),
            self.accepted & FEATURE_EVENT_IDX != 0,
            Arc::clone(&self.memory),
            Arc::clone(&self.link),
            Arc::clone(&self.kicks[index]),
        )
    }

    fn agree(&self, features: Option<u64>) {
        self.ask("an agreement on features", move |device| {
            device.agree(features);
        });
    }

    /// Resets the device, which may be processing a request.
    fn reset_device(&self) {
        if let Some(cancel) = &self.cancel {
            cancel.store(true, Ordering::Release);
        }
        self.ask("a reset", |device| device.reset());
        if let Some(cancel) = &self.cancel {
            cancel.store(false, Ordering::Release);
        }
    }

    /// Runs a command on the device, after at most one request that its owner is processing.
    fn ask<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce(&mut dyn VirtioDevice) -> T + Send + 'static,
    ) -> T {
        if let Some(wanted) = &self.wanted {
            wanted.store(true, Ordering::Release);
        }
        let what = format_args!("{}: {what}", self.link.name());
        let answer = ask(&*self.device, what, work);
        if let Some(wanted) = &self.wanted {
            wanted.store(false, Ordering::Release);
        }
        answer
    }

    fn reset(&mut self) {
        if std::mem::take(&mut self.started) {
            self.reset_device();
        }
        if self.status & FEATURES_OK != 0 {
            self.agree(None);
        }
        self.works = false;
        self.status = 0;
        self.accepted = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.most);
        }
        // A stale kick must not reach the next driver.
        for kick in &self.kicks {
            let _ = kick.read();
        }
    }
}

/// Returns 32 bits of `features`, from bit 32 * `select`.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.reset();
    }
}
