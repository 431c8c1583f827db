//! Virtio over PCI, modern (virtio 1.2, section 4.1): a function of type 0 whose only BAR holds the
//! common configuration, ISR, device configuration, notifications, and MSI-X table and pending bits.

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

pub use self::space::{BAR_SIZE, NOTIFY, NOTIFY_STEP};
use self::space::{
    CAP_BAR, CAP_DATA, CAP_LENGTH, CAP_OFFSET, COMMON_SIZE, DEVICE, DEVICE_END, ISR, PENDING, TABLE,
};
pub use self::wires::Wires;
use self::wires::{ISR_CONFIG, ISR_QUEUE, Shared, Wire};
use super::mailbox::{Access, ask};
use super::transport::{DRIVER_OK, NEEDS_RESET, Transport};
use super::{Link, PciState, Registers, RegistersState, RestoreError, lock};
use crate::Device;
use crate::action::Action;
use crate::pci::config::{self, Config};
use crate::pci::msix::{Msix, NO_VECTOR};
use crate::pci::{Function, Placement};

mod fields;
mod space;
mod wires;

/// A virtio device as a function of a PCI bus. As a [`Device`], it is the window of its BAR.
pub struct Pci {
    transport: Transport,
    shared: Arc<Shared>,
    config: Config,
    /// The offset of the MSI-X capability, where there is one.
    msix_at: usize,
    /// The offset of the capability for access by the configuration space.
    access_at: usize,
    placement: Option<Box<dyn Placement>>,
    /// Where the BAR is decoded now.
    placed: Option<u64>,
    features_select: u32,
    accept_select: u32,
    queue_select: u16,
}

impl Pci {
    /// Creates the function of `device`, called `name` in messages, with its BAR at `bar`, not yet
    /// decoded.
    ///
    /// # Errors
    /// A process without room for more descriptors.
    pub fn new(
        name: String,
        device: Arc<dyn Access>,
        memory: Arc<GuestMemoryMmap>,
        wires: Wires,
        bar: u64,
    ) -> std::io::Result<Pci> {
        // The link comes first, and interrupts for each of the device's queues.
        let what = format_args!("{name}: reading its queues");
        let queues = ask(&*device, what, |device| device.queue_sizes().len());
        let shared = Arc::new(Shared::new(wires, queues));
        let link = Arc::new(Link::new(name, Box::new(Wire(Arc::clone(&shared)))));
        let transport = Transport::new(device, memory, link)?;
        let entries = shared.msix.as_ref().map(|msix| lock(msix).entries());
        let (config, [msix_at, access_at]) = space::make(transport.id, queues, entries, bar);
        Ok(Pci {
            transport,
            shared,
            config,
            msix_at,
            access_at,
            placement: None,
            placed: None,
            features_select: 0,
            accept_select: 0,
            queue_select: 0,
        })
    }

    /// Has `placement` follow the BAR from now on.
    pub fn follow(&mut self, placement: Box<dyn Placement>) {
        self.placement = Some(placement);
        self.placed = None;
        self.place();
    }

    /// Places the BAR where the driver has it.
    fn place(&mut self) {
        let bar = self.config.bar();
        if bar == self.placed {
            return;
        }
        self.placed = bar;
        if let Some(placement) = &self.placement
            && let Err(error) = placement.moved(bar)
        {
            self.transport
                .link
                .fault(format_args!("the driver moves its BAR: {error}"));
        }
    }

    /// Does something with MSI-X; what the machine refuses is a fault of the driver, who wants too much.
    fn with_msix(&self, work: impl FnOnce(&mut Msix) -> Result<(), String>) {
        if let Some(msix) = &self.shared.msix
            && let Err(error) = work(&mut lock(msix))
        {
            self.transport.link.fault(format_args!("MSI-X: {error}"));
        }
    }

    /// Returns Message Control and whether the function is a bus master.
    fn control(&self) -> (u16, bool) {
        let control = self.config.word(self.msix_at + 2);
        let command = self.config.word(config::COMMAND);
        (control, command & config::MASTER != 0)
    }

    /// Follows what Command, the BAR and Message Control say now.
    fn follow_config(&mut self) {
        let no_intx = self.config.word(config::COMMAND) & config::NO_INTX != 0;
        {
            let mut state = lock(&self.shared.state);
            state.no_intx = no_intx;
            self.shared.drive(*state);
        }
        let (control, is_master) = self.control();
        self.with_msix(|msix| msix.control(control, is_master));
        self.place();
    }

    /// Returns what the capability for access by the configuration space selects in the BAR: an offset
    /// and a length (section 4.1.4.9).
    fn selected(&self) -> Option<(u64, usize)> {
        let at = self.access_at;
        let offset = u64::from(self.config.long(at + CAP_OFFSET));
        let length = self.config.long(at + CAP_LENGTH);
        let is_valid = self.config.word(at + CAP_BAR) as u8 == 0
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(u64::from(length))
            && offset < BAR_SIZE;
        is_valid.then_some((offset, length as usize))
    }

    /// Returns the entry that a source is mapped to.
    fn mapped(&self, source: usize) -> u16 {
        let msix = self.shared.msix.as_ref();
        msix.map_or(NO_VECTOR, |msix| lock(msix).mapped(source))
    }
}

impl Device for Pci {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        data.fill(0);
        match offset {
            ..ISR => {
                let common = self.common();
                let shown = common.get(offset as usize..).unwrap_or_default();
                for (byte, value) in data.iter_mut().zip(shown) {
                    *byte = *value;
                }
            }
            ISR => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.shared.take_isr();
                }
            }
            DEVICE..DEVICE_END => self.transport.config.read((offset - DEVICE) as usize, data),
            TABLE..PENDING => self.with_msix(|msix| {
                msix.read_table((offset - TABLE) as usize, data);
                Ok(())
            }),
            PENDING..BAR_SIZE => self.with_msix(|msix| {
                msix.read_pending((offset - PENDING) as usize, data);
                Ok(())
            }),
            _ => {}
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        match offset {
            ..COMMON_SIZE => self.write_common(offset as usize, data),
            DEVICE..DEVICE_END => {
                self.transport
                    .write_config((offset - DEVICE) as usize, data);
            }
            // Which queue it is, the address says as well as the value.
            NOTIFY..TABLE => self
                .transport
                .kick(((offset - NOTIFY) / NOTIFY_STEP) as u32),
            TABLE..PENDING => {
                self.with_msix(|msix| msix.write_table((offset - TABLE) as usize, data));
            }
            _ => self.transport.link.fault(format_args!(
                "the driver writes to {offset:#x} of its BAR, where there is no writable register"
            )),
        }
        Action::None
    }
}

impl Function for Pci {
    fn read_config(&mut self, register: usize, data: &mut [u8]) {
        let window = self.access_at + CAP_DATA;
        if config::touches(register, data.len(), window..window + 4) {
            let mut value = [0; 4];
            if let Some((offset, length)) = self.selected() {
                let _ = self.read(offset, &mut value[..length]);
            }
            self.config.set(window, &value);
        }
        if config::touches(register, data.len(), config::STATUS..config::STATUS + 2) {
            let state = *lock(&self.shared.state);
            let has_pin = self.shared.msix.is_none();
            self.config.show_intx(has_pin && state.isr != 0);
        }
        self.config.read(register, data);
    }

    fn write_config(&mut self, register: usize, data: &[u8]) {
        let window = self.access_at + CAP_DATA;
        if register == window
            && let Some((offset, length)) = self.selected()
        {
            let mut value = [0; 4];
            for (byte, new) in value.iter_mut().zip(data) {
                *byte = *new;
            }
            self.config.set(window, &value);
            let _ = self.write(offset, &value[..length]);
            return;
        }
        self.config.write(register, data);
        self.follow_config();
    }
}

impl Registers for Pci {
    fn kicks(&self) -> &[Arc<EventFd>] {
        self.transport.kicks()
    }

    fn link(&self) -> Arc<Link> {
        Arc::clone(&self.transport.link)
    }

    fn is_driven(&self) -> bool {
        self.transport.status() & DRIVER_OK != 0
    }

    fn quiesce(&mut self) {
        self.transport.quiesce();
    }

    fn resume(&mut self) {
        self.transport.resume();
    }

    fn save(&self) -> Result<RegistersState, RestoreError> {
        let transport = self.transport.save()?;
        let shown = *lock(&self.shared.state);
        Ok(RegistersState::Pci(Box::new(PciState {
            transport,
            config: self.config.save(),
            msix: self.shared.msix.as_ref().map(|msix| lock(msix).save()),
            features_select: self.features_select,
            accept_select: self.accept_select,
            queue_select: self.queue_select,
            needs_reset: shown.status & NEEDS_RESET != 0,
            isr: shown.isr,
        })))
    }

    fn restore(&mut self, state: &RegistersState) -> Result<(), RestoreError> {
        let RegistersState::Pci(state) = state else {
            return Err(RestoreError(
                "the state is that of virtio over MMIO".to_owned(),
            ));
        };
        let config = self.config.restored(&state.config)?;
        RestoreError::check("function", "ISR status", state.isr, ISR_QUEUE | ISR_CONFIG)?;
        match (&self.shared.msix, &state.msix) {
            (Some(msix), Some(state)) => lock(msix).check(state)?,
            (None, None) => {}
            _ => {
                let other = "the state is that of a function with another kind of interrupt";
                return Err(RestoreError(other.to_owned()));
            }
        }
        self.transport.restore(&state.transport)?;
        self.config = config;
        self.features_select = state.features_select;
        self.accept_select = state.accept_select;
        self.queue_select = state.queue_select;
        let needs_reset = if state.needs_reset { NEEDS_RESET } else { 0 };
        {
            let mut shown = lock(&self.shared.state);
            shown.status = self.transport.status() | needs_reset;
            shown.isr = state.isr;
        }
        if let Some(state) = &state.msix {
            let control = self.control();
            self.with_msix(|msix| msix.restore(state, control));
        }
        self.follow_config();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
