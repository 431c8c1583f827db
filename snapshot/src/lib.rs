//! The files of a snapshot: `state`, what a machine is besides its memory, and `memory`, its banks one
//! after another. Nothing here knows machines or KVM.
//!
//! [`State`] is the first file, [`pages`] fills the second from a guest's memory. [`Draft`] has both
//! under temporary names until they replace an earlier snapshot in one step, and [`Snapshot`] opens
//! what is there, as a pair. [`merge`] applies a diff to its base. [`prefetch`] keeps the list of
//! pages that a restored guest needs first; [`faults`] has another process give all of them.
//!
//! What is read here may come from anyone: its size is bounded before it is believed, and what is
//! wrong with it is said in a sentence.

mod content;
mod copy;
mod draft;
pub mod faults;
pub mod merge;
mod open;
pub mod pages;
mod paths;
pub mod prefetch;
mod runs;
mod state;

pub use draft::Draft;
pub use open::Snapshot;
pub use paths::Paths;
pub use runs::Runs;
pub use state::{Bank, Error, Id, State, VERSION};

/// The unit of lists of pages and of comparisons in bytes, whatever pages the host has: so a snapshot
/// of a host of one page size is read on one of another.
pub const PAGE: u64 = 4096;

#[cfg(test)]
mod tests;
