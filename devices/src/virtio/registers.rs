//! What every transport's registers are to the machine that holds them.

use serde::{Deserialize, Serialize};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::transport::TransportState;
use super::{Link, RestoreError};
use crate::Device;
use crate::pci::msix::MsixState;

/// The registers of a virtio device: a window of MMIO, or a PCI function.
pub trait Registers: Device {
    /// Returns the eventfds that kicks arrive by, by queue: for ioeventfds.
    fn kicks(&self) -> &[Arc<EventFd>];

    /// Returns the device's connection to its driver, which counts the driver's faults.
    fn link(&self) -> Arc<Link>;

    /// Returns whether a driver uses the device (DRIVER_OK; virtio 1.2, section 2.1).
    fn is_driven(&self) -> bool;

    /// Quiesces the device until [`Self::resume`]: it completes or puts back the requests that it
    /// popped. No vCPU may be running.
    fn quiesce(&mut self);

    /// Resumes the device where it was quiesced.
    fn resume(&mut self);

    /// Returns the state of registers and device, while the machine is paused.
    ///
    /// # Errors
    /// While the device is running.
    fn save(&self) -> Result<RegistersState, RestoreError>;

    /// Restores a saved state in a paused device that no driver has used. `state` is not trusted.
    ///
    /// # Errors
    /// When the state is not valid for the registers or their device; nothing has changed then.
    fn restore(&mut self, state: &RegistersState) -> Result<(), RestoreError>;
}

/// The state of a device and its registers while the machine is paused, as plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RegistersState {
    /// Over MMIO.
    Mmio(MmioState),
    /// Over PCI.
    Pci(Box<PciState>),
}

impl RegistersState {
    /// Returns the state of the transport, which every kind has.
    #[must_use]
    pub fn transport(&self) -> &TransportState {
        match self {
            RegistersState::Mmio(state) => &state.transport,
            RegistersState::Pci(state) => &state.transport,
        }
    }
}

/// The state of a window and its device while the machine is paused, as plain data from which
/// another one can resume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    /// The transport's state.
    pub transport: TransportState,
    /// DeviceFeaturesSel.
    pub features_select: u32,
    /// DriverFeaturesSel.
    pub accept_select: u32,
    /// QueueSel.
    pub queue_select: u32,
    /// Whether Status shows DEVICE_NEEDS_RESET.
    pub needs_reset: bool,
    /// Whether InterruptStatus shows a configuration change.
    pub config_changed: bool,
}

/// The state of a function and its device while the machine is paused, as plain data from which another
/// one can resume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    /// The transport's state.
    pub transport: TransportState,
    /// The configuration space.
    pub config: Vec<u8>,
    /// MSI-X, where the function has it.
    pub msix: Option<MsixState>,
    /// The common configuration's device_feature_select.
    pub features_select: u32,
    /// Its driver_feature_select.
    pub accept_select: u32,
    /// Its queue_select.
    pub queue_select: u16,
    /// Whether the status shows DEVICE_NEEDS_RESET.
    pub needs_reset: bool,
    /// ISR status.
    pub isr: u8,
}
