//! The common configuration (virtio 1.2, section 4.1.4.3).

use super::Pci;
use super::space::COMMON_SIZE;
use crate::pci::msix::Msix;
use crate::virtio::lock;
use crate::virtio::transport::NEEDS_RESET;

/// The common configuration's fields by their offsets (section 4.1.4.3).
mod field {
    pub(super) const DEVICE_SELECT: usize = 0x00;
    pub(super) const DEVICE_FEATURES: usize = 0x04;
    pub(super) const DRIVER_SELECT: usize = 0x08;
    pub(super) const DRIVER_FEATURES: usize = 0x0c;
    pub(super) const CONFIG_VECTOR: usize = 0x10;
    pub(super) const QUEUES: usize = 0x12;
    pub(super) const STATUS: usize = 0x14;
    pub(super) const GENERATION: usize = 0x15;
    pub(super) const QUEUE_SELECT: usize = 0x16;
    pub(super) const QUEUE_SIZE: usize = 0x18;
    pub(super) const QUEUE_VECTOR: usize = 0x1a;
    pub(super) const QUEUE_ENABLE: usize = 0x1c;
    pub(super) const QUEUE_NOTIFY: usize = 0x1e;
    pub(super) const QUEUE_DESC: usize = 0x20;
    pub(super) const QUEUE_DRIVER: usize = 0x28;
    pub(super) const QUEUE_DEVICE: usize = 0x30;
}

/// The end of the fields of the common configuration.
const COMMON_END: usize = COMMON_SIZE as usize;

impl Pci {
    /// Returns the common configuration.
    pub(super) fn common(&self) -> [u8; 0x40] {
        use field::*;
        let transport = &self.transport;
        let queue = transport.queue(self.queue_select.into());
        let mut all = [0; 0x40];
        let mut set = |at: usize, bytes: &[u8]| all[at..at + bytes.len()].copy_from_slice(bytes);
        set(DEVICE_SELECT, &self.features_select.to_le_bytes());
        let offered = transport.offered(self.features_select);
        set(DEVICE_FEATURES, &offered.to_le_bytes());
        set(DRIVER_SELECT, &self.accept_select.to_le_bytes());
        let accepted = transport.accepted(self.accept_select);
        set(DRIVER_FEATURES, &accepted.to_le_bytes());
        set(CONFIG_VECTOR, &self.mapped(0).to_le_bytes());
        let queues = transport.kicks().len() as u16;
        set(QUEUES, &queues.to_le_bytes());
        let status = lock(&self.shared.state).status as u8;
        let generation = transport.config.generation() as u8;
        set(STATUS, &[status]);
        set(GENERATION, &[generation]);
        set(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        if let Some(queue) = queue {
            set(QUEUE_SIZE, &(queue.size as u16).to_le_bytes());
            let vector = self.mapped(1 + usize::from(self.queue_select));
            set(QUEUE_VECTOR, &vector.to_le_bytes());
            set(QUEUE_ENABLE, &u16::from(queue.ready).to_le_bytes());
            set(QUEUE_NOTIFY, &self.queue_select.to_le_bytes());
            set(QUEUE_DESC, &queue.addresses.descriptors.to_le_bytes());
            set(QUEUE_DRIVER, &queue.addresses.available.to_le_bytes());
            set(QUEUE_DEVICE, &queue.addresses.used.to_le_bytes());
        }
        all
    }

    /// Writes a field of the common configuration, in its natural width.
    fn set_common(&mut self, at: usize, value: u32, width: usize) {
        use field::*;
        let queue = u32::from(self.queue_select);
        match (at, width) {
            (DEVICE_SELECT, 4) => self.features_select = value,
            (DRIVER_SELECT, 4) => self.accept_select = value,
            (DRIVER_FEATURES, 4) => self.transport.accept(self.accept_select, value),
            (CONFIG_VECTOR, 2) => self.with_msix(|msix| msix.map(0, value as u16)),
            (STATUS, 1) => self.set_status(value),
            (QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (QUEUE_SIZE, 2) => self.transport.set_queue(queue, |queue| queue.size = value),
            (QUEUE_VECTOR, 2) => {
                self.with_msix(|msix| msix.map(1 + queue as usize, value as u16));
            }
            // Only a reset disables a queue (section 4.1.4.3.2).
            (QUEUE_ENABLE, 2) if value == 1 => self.transport.set_ready(queue, true),
            (QUEUE_DESC..COMMON_END, 4) if at.is_multiple_of(4) => self.set_address(at, value),
            _ => self.transport.link.fault(format_args!(
                "the driver writes {value:#x} in {width} bytes at {at:#x} of the common \
                 configuration, where that means nothing"
            )),
        }
    }

    fn set_address(&mut self, at: usize, value: u32) {
        let is_high = at & 4 != 0;
        self.transport.set_queue(self.queue_select.into(), |queue| {
            let addresses = &mut queue.addresses;
            let address = match at & !4 {
                field::QUEUE_DESC => &mut addresses.descriptors,
                field::QUEUE_DRIVER => &mut addresses.available,
                _ => &mut addresses.used,
            };
            let value = u64::from(value);
            *address = match is_high {
                true => *address & 0xffff_ffff | value << 32,
                false => *address & !0xffff_ffff | value,
            };
        });
    }

    fn set_status(&mut self, status: u32) {
        if status == 0 {
            self.transport.set_status(0);
            {
                let mut state = lock(&self.shared.state);
                (state.status, state.isr) = (0, 0);
                self.shared.drive(*state);
            }
            self.with_msix(Msix::unmap);
            (self.features_select, self.accept_select) = (0, 0);
            self.queue_select = 0;
            return;
        }
        // The guest must see DRIVER_OK before the device's first interrupt.
        lock(&self.shared.state).status |= status & !NEEDS_RESET;
        self.transport.set_status(status);
        let kept = self.transport.status();
        let mut state = lock(&self.shared.state);
        state.status = state.status & NEEDS_RESET | kept;
    }

    pub(super) fn write_common(&mut self, at: usize, data: &[u8]) {
        let width = data.len();
        if width == 8 {
            self.write_common(at, &data[..4]);
            self.write_common(at + 4, &data[4..]);
            return;
        }
        let mut value = [0; 4];
        if let Some(low) = value.get_mut(..width) {
            low.copy_from_slice(data);
        }
        self.set_common(at, u32::from_le_bytes(value), width);
    }
}
