//! MSI-X vectors of PCI functions, as irqfds.

use super::interrupts::{Edge, Interrupts, Lead, Route};
use anyhow::{Result, ensure};
use armlet_arch::irq::Spi;
use armlet_arch::pci::{Function, Msi};
use armlet_devices::gicv2m::DOORBELL;
use armlet_devices::pci::{Message, MsiVector, MsiVectors};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// How messages come to vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// KVM knows the address, and the sender by its DeviceID where there is an ITS.
    Kvm {
        /// The DeviceID.
        device: Option<u32>,
    },
    /// KVM knows only SPIs: the data of a message to this address is an INTID.
    Frame {
        /// The address that messages are written to.
        doorbell: u64,
        /// The first SPI.
        first: u32,
        /// How many there are.
        count: u32,
    },
}

impl Way {
    fn of(msi: Msi, function: &Function) -> Way {
        match msi {
            Msi::Its { .. } => Way::Kvm {
                device: Some(function.requester()),
            },
            Msi::LocalApics => Way::Kvm { device: None },
            Msi::V2m {
                window,
                first,
                count,
            } => Way::Frame {
                doorbell: window.start() + DOORBELL,
                first: first.0,
                count,
            },
        }
    }

    /// Returns the SPI that a message to a frame is.
    fn spi(doorbell: u64, first: u32, count: u32, message: Message) -> Result<u32> {
        let Message { address, data } = message;
        let spi = data.wrapping_sub(Spi(0).intid());
        ensure!(
            address == doorbell,
            "a message to {address:#x} goes nowhere: messages are for {doorbell:#x}"
        );
        ensure!(
            spi.wrapping_sub(first) < count,
            "a message of {data} is none of the frame's INTIDs, {} to {}",
            Spi(first).intid(),
            Spi(first).intid() + count - 1
        );
        Ok(spi)
    }
}

/// The vectors of one function.
pub struct Vectors {
    interrupts: Arc<Interrupts>,
    way: Way,
}

impl Vectors {
    /// Creates those of a function in a machine whose MSIs go to `msi`.
    #[must_use]
    pub fn new(interrupts: &Arc<Interrupts>, msi: Msi, function: &Function) -> Vectors {
        Vectors {
            interrupts: Arc::clone(interrupts),
            way: Way::of(msi, function),
        }
    }
}

impl MsiVectors for Vectors {
    fn make(&self) -> Result<Box<dyn MsiVector>, String> {
        let lead = match self.way {
            Way::Kvm { .. } => Lead::Msi,
            Way::Frame { .. } => Lead::AnyPin,
        };
        let edge = self.interrupts.edge(lead);
        let edge = edge.map_err(|error| format!("{error:#}"))?;
        let way = self.way;
        Ok(Box::new(Vector { edge, way }))
    }
}

/// A vector: an irqfd.
struct Vector {
    edge: Edge,
    way: Way,
}

impl Vector {
    fn lead(&self, message: Option<Message>) -> Result<()> {
        match self.way {
            Way::Kvm { device } => {
                let route = message.map(|message| Route { message, device });
                self.edge.send(route)
            }
            Way::Frame {
                doorbell,
                first,
                count,
            } => {
                let spi = message.map(|message| Way::spi(doorbell, first, count, message));
                self.edge.lead_to(spi.transpose()?)
            }
        }
    }
}

impl MsiVector for Vector {
    fn call(&self) -> Arc<EventFd> {
        self.edge.call()
    }

    fn route(&self, message: Option<Message>) -> Result<(), String> {
        self.lead(message).map_err(|error| format!("{error:#}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_takes_its_own_messages_alone() {
        let spi = |address, data| {
            let message = Message { address, data };
            Way::spi(0x3ff0_0040, 48, 16, message).map_err(|error| error.to_string())
        };
        assert_eq!(spi(0x3ff0_0040, 80), Ok(48));
        assert_eq!(spi(0x3ff0_0040, 95), Ok(63));
        for data in [0, 79, 96, u32::MAX] {
            let error = spi(0x3ff0_0040, data).expect_err("another INTID");
            assert!(error.contains("80 to 95"), "{error}");
        }
        let error = spi(0x4000_0000, 80).expect_err("RAM");
        assert!(error.contains("0x40000000"), "{error}");
    }
}
