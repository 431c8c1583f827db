//! What stands behind virtio devices on the host: files, sockets, other processes and the kernel.
//!
//! A [`Backend`](backend::Backend) is opened once and lives as long as armlet: a disk stays locked, a
//! network connection open. At each start of the guest it makes a device. Nothing here knows KVM, the
//! plan of a machine or the command line.

#[cfg(test)]
mod alone;
pub mod backend;
pub mod balloon;
pub mod broker;
pub mod console;
pub mod disk;
pub mod drafts;
pub mod habits;
pub mod kind;
pub mod locks;
pub mod net;
pub mod open;
pub mod options;
pub mod pages;
pub mod pmem;
pub mod reactor;
pub mod rng;
pub mod root;
pub mod share;
mod timer;
pub mod vhost;
pub mod vhost_user;
pub mod vsock;
