//! Snapshots: what a machine is at a moment, in two files, and machines that go on from there.
//!
//! `head` is what is known of a snapshot before anything of it is restored: how the machine was asked
//! for, its plan, and the host that it ran on. `create` writes one while the machine is paused.
//! `restore` reads one; whether this host can hold the machine is decided before KVM makes anything.
//! `inspect` is `armlet snapshot`. The crate `armlet-snapshot` has the files.

mod create;
mod head;
mod inspect;
mod restore;

pub use create::{Base, Outcome, Savers, Wanted, Written};
pub use head::Head;
pub use inspect::inspect;
pub use restore::{MemoryFrom, Restore};
