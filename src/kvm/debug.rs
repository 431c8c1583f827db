//! Debugging vCPUs: what every architecture has of it. The functions are those of the host's architecture.

use super::host_debug::publish;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

pub use super::host_debug::{
    ARCHITECTURE, BREAK, FEATURES, apply, begin_step, end_step, hit, is_possible, limits, pass_on,
    position, registers, set_registers, translate,
};
pub use super::stops::{Masked, Stops};

/// Writes to guest memory, and has vCPUs execute what was written; returns whether there is memory.
pub fn write_code(memory: &GuestMemoryMmap, address: u64, bytes: &[u8]) -> bool {
    let Ok(slice) = memory.get_slice(GuestAddress(address), bytes.len()) else {
        return false;
    };
    slice.copy_from(bytes);
    // SAFETY: the slice is mapped as long as the memory is.
    unsafe { publish(slice.ptr_guard().as_ptr(), bytes.len()) };
    true
}
