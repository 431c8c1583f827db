//! Structures of KVM's interface as bytes, to be kept in files.

use anyhow::{Result, anyhow};
use armlet_system::status::{Fault, Status};
use kvm_bindings::{
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs2,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::KvmNestedStateBuffer;
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// A structure that consists of bytes: it has no padding, and any bytes are a value.
///
/// # Safety
/// Both are so.
pub(super) unsafe trait Plain: Copy + Default {}

// SAFETY: the kernel's interface pads them by fields, and they consist of integers
// (include/uapi/asm/kvm.h, which the bindings follow).
unsafe impl Plain for kvm_regs {}
// SAFETY: as above.
unsafe impl Plain for kvm_sregs2 {}
// SAFETY: as above.
unsafe impl Plain for kvm_xcrs {}
// SAFETY: as above.
unsafe impl Plain for kvm_debugregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_lapic_state {}
// SAFETY: as above.
unsafe impl Plain for kvm_vcpu_events {}
// SAFETY: as above.
unsafe impl Plain for kvm_mp_state {}
// SAFETY: as above; its union has a member that covers all of it, and KVM fills in all of it.
unsafe impl Plain for kvm_irqchip {}
// SAFETY: as above.
unsafe impl Plain for KvmNestedStateBuffer {}

/// Checks what is the same on every host.
///
/// # Errors
/// What was said, with the status of input that is not valid.
pub(super) fn check(is_valid: bool, said: impl FnOnce() -> String) -> Result<()> {
    match is_valid {
        true => Ok(()),
        false => Err(anyhow!(said())).fault(Status::Usage),
    }
}

/// Bytes whose meaning is KVM's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Raw(pub(super) Vec<u8>);

impl Raw {
    /// The bytes of a structure.
    pub(super) fn of<T: Plain>(value: &T) -> Raw {
        let start = std::ptr::from_ref(value).cast::<u8>();
        // SAFETY: it is one initialised object of this size without padding (`Plain`).
        Raw(unsafe { std::slice::from_raw_parts(start, size_of::<T>()) }.to_vec())
    }

    /// The structure that these bytes are; `what` names it.
    ///
    /// # Errors
    /// Too few or too many bytes.
    pub(super) fn read<T: Plain>(&self, what: &str) -> Result<T> {
        let (bytes, size) = (self.0.len(), size_of::<T>());
        check(bytes == size, || {
            format!("the state of its {what} has {bytes} bytes, not {size}")
        })?;
        // SAFETY: there are as many bytes, and any are a value of the type (`Plain`).
        Ok(unsafe { self.0.as_ptr().cast::<T>().read_unaligned() })
    }
}

impl Serialize for Raw {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Raw, D::Error> {
        struct Bytes;

        impl<'de> Visitor<'de> for Bytes {
            type Value = Raw;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Raw, E> {
                Ok(Raw(bytes.to_vec()))
            }

            /// As texts have them.
            fn visit_seq<A: SeqAccess<'de>>(self, mut all: A) -> Result<Raw, A::Error> {
                let mut bytes = Vec::new();
                while let Some(byte) = all.next_element()? {
                    bytes.push(byte);
                }
                Ok(Raw(bytes))
            }
        }
        deserializer.deserialize_bytes(Bytes)
    }
}
