//! The debugger's end of a guest: gdb connects to a socket, and stops, reads and changes vCPUs and memory.
//!
//! `address` is where it listens, `server` its thread, `target` what gdb can do to the guest, by `guest`,
//! which asks the event loop and vCPUs, `patches` the breakpoint instructions in the guest's memory. The
//! protocol is gdbstub's.

mod address;
#[cfg(feature = "gdb")]
mod description;
#[cfg(feature = "gdb")]
mod guest;
#[cfg(feature = "gdb")]
mod patches;
#[cfg(feature = "gdb")]
mod server;
#[cfg(feature = "gdb")]
mod target;

#[cfg(not(feature = "gdb"))]
mod absent;

#[cfg(not(feature = "gdb"))]
pub use absent::Debugger;
pub use address::{Address, Place};
#[cfg(feature = "gdb")]
pub use server::Debugger;
