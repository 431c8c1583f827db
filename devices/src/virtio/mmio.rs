//! Virtio over MMIO, version 2 (virtio 1.2, section 4.2), whose registers the guest can read
//! without an exit.
//!
//! Every readable register is kept up to date in a [`RegisterPage`], which may be a page of memory
//! that the guest reads in place of the registers. InterruptStatus shows "a buffer was used" for as
//! long as the device works: the interrupt itself says when, and a driver that checks its queues
//! spuriously finds nothing. So neither reading nor acknowledging it needs the device, and the
//! kernel or another process can interrupt the guest for us (ADR 0010).

use std::sync::{Arc, Mutex};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::mailbox::Access;
use super::transport::{DRIVER_OK, NEEDS_RESET, Transport};
use super::{Interrupts, Link, MmioState, Registers, RegistersState, RestoreError, Vector, lock};
use crate::action::Action;
use crate::{Device, IrqLine};

/// Bytes of the window.
pub const WINDOW_SIZE: usize = 0x200;
/// Offset of QueueNotify in bytes: the driver writes a queue's index there.
pub const QUEUE_NOTIFY: u64 = 0x050;
/// Offset of InterruptACK in bytes.
pub const INTERRUPT_ACK: u64 = 0x064;
/// InterruptStatus: a buffer was used.
pub const USED: u32 = 1;
/// InterruptStatus: the configuration changed.
const CONFIG_CHANGED: u32 = 2;

const MAGIC: u32 = 0x000;
const VERSION: u32 = 0x004;
const DEVICE_ID: u32 = 0x008;
const VENDOR_ID: u32 = 0x00c;
const DEVICE_FEATURES: u32 = 0x010;
const DEVICE_FEATURES_SEL: u32 = 0x014;
const DRIVER_FEATURES: u32 = 0x020;
const DRIVER_FEATURES_SEL: u32 = 0x024;
const QUEUE_SEL: u32 = 0x030;
const QUEUE_SIZE_MAX: u32 = 0x034;
const QUEUE_SIZE: u32 = 0x038;
const QUEUE_READY: u32 = 0x044;
const INTERRUPT_STATUS: u32 = 0x060;
const STATUS: u32 = 0x070;
const QUEUE_DESC: u32 = 0x080;
const QUEUE_DRIVER: u32 = 0x090;
const QUEUE_DEVICE: u32 = 0x0a0;
const QUEUE_DEVICE_HIGH: u32 = 0x0a4;
const SHM_SEL: u32 = 0x0ac;
const SHM_LEN: u32 = 0x0b0;
const SHM_LAST: u32 = 0x0bc;
const CONFIG_GENERATION: u32 = 0x0fc;
const CONFIG: usize = 0x100;

/// The registers whose value depends on the selectors that the driver wrote last.
const CHANGING: [u32; 3] = [DEVICE_FEATURES, QUEUE_SIZE_MAX, QUEUE_READY];

/// VendorID: "ARML".
const VENDOR: u32 = 0x4c4d_5241;

/// Memory from which the guest can read the window's registers without an exit.
pub trait RegisterPage: Send + Sync {
    /// Makes the aligned word at `offset` bytes into the window read as `value`.
    fn store(&self, offset: usize, value: u32);

    /// Makes the two words at `offset` bytes, a multiple of 8, read as `value`: where possible, a
    /// reader that sees one new word does not see the other's old value.
    fn store_two(&self, offset: usize, value: u64) {
        self.store(offset, value as u32);
        self.store(offset + 4, (value >> 32) as u32);
    }
}

/// No such page: the guest's reads exit to [`Mmio`].
#[derive(Debug)]
pub struct NoPage;

impl RegisterPage for NoPage {
    fn store(&self, _offset: usize, _value: u32) {}
}

/// A virtio device's window on the bus.
pub struct Mmio {
    transport: Transport,
    shared: Arc<Shared>,
    page: Arc<dyn RegisterPage>,
    features_select: u32,
    accept_select: u32,
    queue_select: u32,
}

/// State that the device's thread changes too.
struct Shared {
    line: Arc<dyn IrqLine>,
    call: Option<Arc<EventFd>>,
    page: Arc<dyn RegisterPage>,
    state: Mutex<State>,
}

/// The sources of Status and InterruptStatus.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    status: u32,
    config_changed: bool,
}

impl State {
    fn interrupt_status(self) -> u32 {
        let used = if self.status & DRIVER_OK != 0 {
            USED
        } else {
            0
        };
        used | if self.config_changed {
            CONFIG_CHANGED
        } else {
            0
        }
    }
}

impl Shared {
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.state);
        change(&mut state);
        self.page.store(STATUS as usize, state.status);
        let pending = state.interrupt_status();
        self.page.store(INTERRUPT_STATUS as usize, pending);
    }
}

/// The device's end of [`Shared`].
struct Wire(Arc<Shared>);

impl Interrupts for Wire {
    fn signal(&self, vector: Vector) {
        if vector == Vector::Config {
            self.0.change(|state| state.config_changed = true);
        }
        self.0.line.pulse();
    }

    fn needs_reset(&self) {
        let mut works = false;
        self.0.change(|state| {
            works = state.status & DRIVER_OK != 0;
            state.status |= NEEDS_RESET;
            state.config_changed |= works;
        });
        if works {
            self.0.line.pulse();
        }
    }

    fn descriptor(&self, _: Vector) -> Option<Arc<EventFd>> {
        self.0.call.clone()
    }
}

impl Mmio {
    /// Creates the window of `device`, called `name` in messages. It interrupts by the
    /// edge-triggered `line`, or by writing the eventfd `call` where there is one.
    ///
    /// # Errors
    /// A process without room for more descriptors.
    pub fn new(
        name: String,
        device: Arc<dyn Access>,
        memory: Arc<GuestMemoryMmap>,
        line: Arc<dyn IrqLine>,
        call: Option<Arc<EventFd>>,
        page: Arc<dyn RegisterPage>,
    ) -> std::io::Result<Mmio> {
        let shared = Arc::new(Shared {
            line,
            call,
            page: Arc::clone(&page),
            state: Mutex::default(),
        });
        let link = Arc::new(Link::new(name, Box::new(Wire(Arc::clone(&shared)))));
        let transport = Transport::new(device, memory, link)?;
        let mmio = Mmio {
            transport,
            shared,
            page,
            features_select: 0,
            accept_select: 0,
            queue_select: 0,
        };
        for offset in (0..CONFIG as u32).step_by(4) {
            mmio.page.store(offset as usize, mmio.register(offset));
        }
        mmio.show_config();
        Ok(mmio)
    }

    /// Returns the eventfds that kicks arrive by, by queue: ioeventfds for [`QUEUE_NOTIFY`].
    #[must_use]
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        self.transport.kicks()
    }

    /// Returns the number of the driver's faults so far.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.transport.link.faults()
    }

    /// Returns the device's connection to its driver, which counts the driver's faults.
    #[must_use]
    pub fn link(&self) -> Arc<Link> {
        Arc::clone(&self.transport.link)
    }

    /// Returns whether a driver uses the device (DRIVER_OK; virtio 1.2, section 2.1).
    #[must_use]
    pub fn is_driven(&self) -> bool {
        self.transport.status() & DRIVER_OK != 0
    }

    /// Quiesces the device until [`Self::resume`]: it completes or puts back the requests that it
    /// popped. No vCPU may be running.
    pub fn quiesce(&mut self) {
        self.transport.quiesce();
    }

    /// Resumes the device where it was quiesced.
    pub fn resume(&mut self) {
        self.transport.resume();
    }

    /// Returns the state of the window and its device, while the machine is paused.
    ///
    /// # Errors
    /// While the device is running.
    pub fn save(&self) -> Result<MmioState, RestoreError> {
        let shown = *lock(&self.shared.state);
        Ok(MmioState {
            transport: self.transport.save()?,
            features_select: self.features_select,
            accept_select: self.accept_select,
            queue_select: self.queue_select,
            needs_reset: shown.status & NEEDS_RESET != 0,
            config_changed: shown.config_changed,
        })
    }

    /// Restores the state of a saved window and its device in a paused one that no driver has used.
    /// `state` is not trusted.
    ///
    /// # Errors
    /// When the state is not valid for the window or its device; nothing has changed then.
    pub fn restore(&mut self, state: &MmioState) -> Result<(), RestoreError> {
        self.transport.restore(&state.transport)?;
        self.features_select = state.features_select;
        self.accept_select = state.accept_select;
        self.queue_select = state.queue_select;
        let needs_reset = if state.needs_reset { NEEDS_RESET } else { 0 };
        let status = self.transport.status() | needs_reset;
        self.shared.change(|shown| {
            shown.status = status;
            shown.config_changed = state.config_changed;
        });
        self.show_changing();
        Ok(())
    }

    /// Keeps the configuration space in the page up to date.
    fn show_config(&self) {
        let page = Arc::clone(&self.page);
        self.transport
            .config
            .set_watch(Box::new(move |bytes, generation| {
                let most = bytes.len().min(WINDOW_SIZE - CONFIG);
                // No field that changes is longer than 8 bytes or crosses an 8-byte boundary: a
                // driver never sees a torn field, however long this thread is stopped between two
                // stores.
                for (index, chunk) in bytes[..most].chunks(8).enumerate() {
                    let mut words = [0; 8];
                    words[..chunk.len()].copy_from_slice(chunk);
                    page.store_two(CONFIG + 8 * index, u64::from_le_bytes(words));
                }
                // Stored last: a driver that read some of the new bytes before it sees the
                // generation change.
                page.store(CONFIG_GENERATION as usize, generation);
            }));
    }

    fn register(&self, offset: u32) -> u32 {
        let transport = &self.transport;
        let queue = transport.queue(self.queue_select);
        match offset {
            MAGIC => u32::from_le_bytes(*b"virt"),
            VERSION => 2,
            DEVICE_ID => transport.id,
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => transport.offered(self.features_select),
            QUEUE_SIZE_MAX => queue.map_or(0, |queue| u32::from(queue.most)),
            QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready)),
            INTERRUPT_STATUS => lock(&self.shared.state).interrupt_status(),
            STATUS => lock(&self.shared.state).status,
            // No shared memory: lengths of -1 (section 4.2.2).
            SHM_LEN..=SHM_LAST => u32::MAX,
            CONFIG_GENERATION => transport.config.generation(),
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u32, value: u32) {
        let select = self.queue_select;
        match offset {
            DEVICE_FEATURES_SEL => self.features_select = value,
            DRIVER_FEATURES_SEL => self.accept_select = value,
            DRIVER_FEATURES => self.transport.accept(self.accept_select, value),
            QUEUE_SEL => self.queue_select = value,
            QUEUE_SIZE => self.transport.set_queue(select, |queue| queue.size = value),
            QUEUE_READY => self.transport.set_ready(select, value & 1 != 0),
            // It changes no register.
            0x050 => return self.transport.kick(value),
            0x064 => self.acknowledge(value),
            STATUS => self.set_status(value),
            QUEUE_DESC..=QUEUE_DEVICE_HIGH => self.set_address(offset, value),
            // There is no shared memory to select.
            SHM_SEL => {}
            _ => self.transport.link.fault(format_args!(
                "the driver writes to {offset:#x}, where there is no writable register"
            )),
        }
        self.show_changing();
    }

    fn show_changing(&self) {
        for offset in CHANGING {
            self.page.store(offset as usize, self.register(offset));
        }
    }

    fn set_address(&mut self, offset: u32, value: u32) {
        let high = offset & 4 != 0;
        self.transport.set_queue(self.queue_select, |queue| {
            let addresses = &mut queue.addresses;
            let address = match offset & !4 {
                QUEUE_DESC => &mut addresses.descriptors,
                QUEUE_DRIVER => &mut addresses.available,
                QUEUE_DEVICE => &mut addresses.used,
                _ => return,
            };
            let value = u64::from(value);
            *address = match high {
                true => *address & 0xffff_ffff | value << 32,
                false => *address & !0xffff_ffff | value,
            };
        });
    }

    fn acknowledge(&self, bits: u32) {
        if bits & CONFIG_CHANGED != 0 {
            self.shared.change(|state| state.config_changed = false);
        }
    }

    fn set_status(&mut self, status: u32) {
        if status == 0 {
            self.transport.set_status(0);
            self.shared.change(|state| *state = State::default());
            (self.features_select, self.accept_select) = (0, 0);
            self.queue_select = 0;
            return;
        }
        // The guest must see DRIVER_OK before the device's first interrupt.
        let new = status & !NEEDS_RESET;
        self.shared.change(|state| state.status |= new);
        self.transport.set_status(status);
        let kept = self.transport.status();
        self.shared
            .change(|state| state.status = state.status & NEEDS_RESET | kept);
    }
}

impl Device for Mmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        data.fill(0);
        let offset = offset as usize;
        if offset >= CONFIG {
            self.transport.config.read(offset - CONFIG, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.register(offset as u32).to_le_bytes();
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let offset = offset as usize;
        if offset >= CONFIG {
            self.transport.write_config(offset - CONFIG, data);
        } else if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.set_register(offset as u32, u32::from_le_bytes(data));
        } else {
            self.transport.link.fault(format_args!(
                "the driver writes {} bytes to {offset:#x}; registers take 4",
                data.len()
            ));
        }
        Action::None
    }
}

impl Registers for Mmio {
    fn kicks(&self) -> &[Arc<EventFd>] {
        self.kicks()
    }

    fn link(&self) -> Arc<Link> {
        self.link()
    }

    fn is_driven(&self) -> bool {
        self.is_driven()
    }

    fn quiesce(&mut self) {
        self.quiesce();
    }

    fn resume(&mut self) {
        self.resume();
    }

    fn save(&self) -> Result<RegistersState, RestoreError> {
        self.save().map(RegistersState::Mmio)
    }

    fn restore(&mut self, state: &RegistersState) -> Result<(), RestoreError> {
        match state {
            RegistersState::Mmio(state) => self.restore(state),
            RegistersState::Pci(_) => Err(RestoreError(
                "the state is that of virtio over PCI".to_owned(),
            )),
        }
    }
}

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod tests;
