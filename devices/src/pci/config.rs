//! The configuration space of a function of type 0 (PCI Express Base 5.0, section 7.5.1).

use std::ops::Range;

use crate::persist::RestoreError;

/// Bytes of the part that has registers here; those of the extended space read as zeros.
pub const SIZE: usize = 256;

/// Command: memory space enable.
pub const MEMORY: u16 = 1 << 1;
/// Command: bus master enable.
pub const MASTER: u16 = 1 << 2;
/// Command: INTx disable.
pub const NO_INTX: u16 = 1 << 10;

/// Offset of Command in bytes.
pub const COMMAND: usize = 0x04;
/// Offset of Status.
pub const STATUS: usize = 0x06;
/// Offset of the first BAR.
pub const BAR: usize = 0x10;
/// Offset of Subsystem Vendor ID.
const SUBSYSTEM: usize = 0x2c;
/// Offset of the Capabilities Pointer.
const CAPABILITIES: usize = 0x34;
/// Offset of Interrupt Line, which only the guest uses, and of Interrupt Pin.
const INTERRUPT_LINE: usize = 0x3c;
/// Status: INTx is asserted.
const INTX_STATUS: u8 = 1 << 3;
/// Status: there are capabilities.
const HAS_CAPABILITIES: u8 = 1 << 4;
/// A 64-bit memory BAR, not prefetchable.
const BAR_64_BIT: u8 = 0b100;
/// Offset of the first capability.
const FIRST_CAPABILITY: usize = 0x40;

/// What a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code: base class, subclass, programming interface.
    pub class: u32,
    /// Subsystem Vendor ID and Subsystem ID.
    pub subsystem: (u16, u16),
}

/// The registers. An access of any size to any place is harmless: only bits that the guest may change
/// do change.
#[derive(Clone, Debug)]
pub struct Config {
    bytes: [u8; SIZE],
    /// The bits that the guest changes by writing them.
    writable: [u8; SIZE],
    /// Where the next capability goes, and where the pointer to it does.
    next: usize,
    pointer: usize,
}

impl Config {
    /// Creates the registers of a function without BARs and capabilities.
    #[must_use]
    pub fn new(identity: Identity) -> Config {
        let mut config = Config {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            next: FIRST_CAPABILITY,
            pointer: CAPABILITIES,
        };
        let Identity {
            vendor,
            device,
            revision,
            class,
            subsystem,
        } = identity;
        config.set(0, &vendor.to_le_bytes());
        config.set(2, &device.to_le_bytes());
        config.set(8, &(class << 8 | u32::from(revision)).to_le_bytes());
        config.set(SUBSYSTEM, &subsystem.0.to_le_bytes());
        config.set(SUBSYSTEM + 2, &subsystem.1.to_le_bytes());
        config.writable[INTERRUPT_LINE] = 0xff;
        config
    }

    /// Adds BARs 0 and 1 as one of 64 bits, for `size` bytes of memory, a power of two from 16 on,
    /// at `address`.
    pub fn add_bar(&mut self, size: u64, address: u64) {
        let mask = !(size - 1);
        self.writable[BAR..BAR + 8].copy_from_slice(&mask.to_le_bytes());
        self.set(BAR, &(address & mask).to_le_bytes());
        self.bytes[BAR] |= BAR_64_BIT;
        self.allow(COMMAND, MEMORY | MASTER);
    }

    /// Adds the interrupt pin INTA.
    pub fn add_pin(&mut self) {
        self.bytes[INTERRUPT_LINE + 1] = 1;
        self.allow(COMMAND, NO_INTX);
    }

    /// Adds a capability: its ID, the bytes behind its pointer to the next one, and the bits of those
    /// that the guest may change. Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[(usize, u8)]) -> usize {
        let at = self.next;
        self.bytes[self.pointer] = at as u8;
        self.bytes[STATUS] |= HAS_CAPABILITIES;
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        for (offset, bits) in writable {
            self.writable[at + offset] = *bits;
        }
        self.pointer = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Reads registers for the guest.
    pub fn read(&self, register: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(register + index).copied().unwrap_or(0);
        }
    }

    /// Writes registers for the guest.
    pub fn write(&mut self, register: usize, data: &[u8]) {
        let own = self.bytes.iter_mut().zip(&self.writable).skip(register);
        for ((byte, mask), new) in own.zip(data) {
            *byte = *byte & !mask | new & mask;
        }
    }

    /// Sets registers for the function.
    pub fn set(&mut self, register: usize, data: &[u8]) {
        self.bytes[register..register + data.len()].copy_from_slice(data);
    }

    fn allow(&mut self, register: usize, bits: u16) {
        for (mask, bits) in self.writable[register..].iter_mut().zip(bits.to_le_bytes()) {
            *mask |= bits;
        }
    }

    /// Returns the 16 bits of a register.
    #[must_use]
    pub fn word(&self, register: usize) -> u16 {
        u16::from_le_bytes([self.bytes[register], self.bytes[register + 1]])
    }

    /// Returns the 32 bits of a register.
    #[must_use]
    pub fn long(&self, register: usize) -> u32 {
        u32::from(self.word(register)) | u32::from(self.word(register + 2)) << 16
    }

    /// Returns where the BAR begins; `None` while the function does not decode it.
    #[must_use]
    pub fn bar(&self) -> Option<u64> {
        let address = u64::from(self.long(BAR)) | u64::from(self.long(BAR + 4)) << 32;
        (self.word(COMMAND) & MEMORY != 0).then_some(address & !0xf)
    }

    /// Shows in Status whether INTx is asserted.
    pub fn show_intx(&mut self, is_high: bool) {
        let status = self.bytes[STATUS] & !INTX_STATUS;
        self.bytes[STATUS] = status | if is_high { INTX_STATUS } else { 0 };
    }

    /// Returns all registers.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Checks that registers that were saved are those of this function, and returns a copy with them.
    ///
    /// # Errors
    /// Where they are not.
    pub fn restored(&self, bytes: &[u8]) -> Result<Config, RestoreError> {
        let mut restored = self.clone();
        restored.write(0, bytes);
        // Only the function's interrupt shows there.
        let status = |bytes: &[u8]| bytes.get(STATUS).map(|byte| byte & INTX_STATUS);
        restored.bytes[STATUS] |= status(bytes).unwrap_or(0);
        match restored.bytes == bytes {
            true => Ok(restored),
            false => Err(RestoreError(
                "the state has the PCI configuration of another function".to_owned(),
            )),
        }
    }
}

/// Returns whether an access of `len` bytes at `register` is to any of the `registers`.
#[must_use]
pub fn touches(register: usize, len: usize, registers: Range<usize>) -> bool {
    register < registers.end && registers.start < register + len
}

#[cfg(test)]
mod tests;
