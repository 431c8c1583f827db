//! A function's configuration space: header and capabilities (virtio 1.2, section 4.1.4).

use crate::pci::config::{Config, Identity};
use crate::pci::msix;

/// Bytes of the BAR.
pub const BAR_SIZE: u64 = 0x4000;
/// Offset of the notifications in the BAR: queue n's is [`NOTIFY_STEP`] * n behind it.
pub const NOTIFY: u64 = 0x1000;
/// Bytes from one queue's notification to the next one's (the notify_off_multiplier).
pub const NOTIFY_STEP: u64 = 4;

/// Offsets in the BAR.
pub(super) const ISR: u64 = 0x400;
pub(super) const DEVICE: u64 = 0x800;
pub(super) const TABLE: u64 = 0x2000;
pub(super) const PENDING: u64 = 0x3000;
/// Bytes of the common configuration as of virtio 1.1: no feature that needs the fields behind it is
/// offered.
pub(super) const COMMON_SIZE: u64 = 0x38;
/// Bytes of the device configuration, as over MMIO, and its end.
const DEVICE_SIZE: u64 = 0x100;
pub(super) const DEVICE_END: u64 = DEVICE + DEVICE_SIZE;

/// Virtio's PCI vendor ID, and the device ID of its device 0.
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;

/// The ID of a vendor-specific capability, and the types of virtio's (section 4.1.4).
const VENDOR_SPECIFIC: u8 = 0x09;
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_ACCESS: u8 = 5;
/// Offsets in such a capability.
pub(super) const CAP_BAR: usize = 4;
pub(super) const CAP_OFFSET: usize = 8;
pub(super) const CAP_LENGTH: usize = 12;
pub(super) const CAP_DATA: usize = 16;

/// Returns the class code of a virtio device: what lists and firmware go by.
fn class(id: u32) -> u32 {
    match id {
        1 => 0x02_0000,
        2 => 0x01_0000,
        3 | 19 => 0x07_8000,
        26 => 0x01_8000,
        _ => 0xff_0000,
    }
}

/// Makes the configuration space of a device with this ID and so many queues, whose BAR lies at `bar`:
/// with an MSI-X table of so many entries, or INTA. Returns it with the offsets of the MSI-X capability
/// (0 without one) and of the one for access by the configuration space.
pub(super) fn make(
    id: u32,
    queues: usize,
    entries: Option<usize>,
    bar: u64,
) -> (Config, [usize; 2]) {
    let device = FIRST_DEVICE + id as u16;
    let mut config = Config::new(Identity {
        vendor: VENDOR,
        device,
        revision: 1,
        class: class(id),
        subsystem: (VENDOR, device),
    });
    config.add_bar(BAR_SIZE, bar);
    let msix_at = match entries {
        Some(entries) => add_msix(&mut config, entries),
        None => {
            config.add_pin();
            0
        }
    };
    add_part(&mut config, (TYPE_COMMON, 0, COMMON_SIZE));
    add_part(&mut config, (TYPE_ISR, ISR, 1));
    add_part(&mut config, (TYPE_DEVICE, DEVICE, DEVICE_SIZE));
    let notify = NOTIFY_STEP * queues as u64;
    add_part(&mut config, (TYPE_NOTIFY, NOTIFY, notify));
    let access_at = add_part(&mut config, (TYPE_ACCESS, 0, 0));
    (config, [msix_at, access_at])
}

/// Adds the MSI-X capability; returns its offset.
fn add_msix(config: &mut Config, entries: usize) -> usize {
    let mut body = [0; 10];
    body[..2].copy_from_slice(&(entries as u16 - 1).to_le_bytes());
    body[2..6].copy_from_slice(&(TABLE as u32).to_le_bytes());
    body[6..].copy_from_slice(&(PENDING as u32).to_le_bytes());
    let [_, writable] = (msix::ENABLE | msix::MASK_ALL).to_le_bytes();
    config.add_capability(msix::CAPABILITY, &body, &[(3, writable)])
}

/// Adds one of virtio's capabilities: type, and offset and length in the BAR. Returns its offset.
fn add_part(config: &mut Config, (part, offset, length): (u8, u64, u64)) -> usize {
    let mut body = [0; CAP_DATA + 2];
    let size = match part {
        TYPE_NOTIFY => {
            body[CAP_DATA - 2..].copy_from_slice(&(NOTIFY_STEP as u32).to_le_bytes());
            CAP_DATA + 4
        }
        TYPE_ACCESS => CAP_DATA + 4,
        _ => CAP_DATA,
    };
    (body[0], body[1]) = (size as u8, part);
    body[CAP_OFFSET - 2..][..4].copy_from_slice(&(offset as u32).to_le_bytes());
    body[CAP_LENGTH - 2..][..4].copy_from_slice(&(length as u32).to_le_bytes());
    // The driver selects a BAR, an offset and a length in it.
    let selects = (CAP_OFFSET..CAP_DATA + 4).chain([CAP_BAR]);
    let writable: Vec<(usize, u8)> = match part {
        TYPE_ACCESS => selects.map(|at| (at, 0xff)).collect(),
        _ => Vec::new(),
    };
    config.add_capability(VENDOR_SPECIFIC, &body[..size - 2], &writable)
}
