//! Pure planning of virtual machines: everything about a guest that can be decided without KVM.
//!
//! A [`Board`] (the machine's map), a [`Request`] (what the user asked for) and an [`Arch::Host`]
//! (what KVM offers) make a [`Plan`]: address map, address width, interrupt controller, vCPUs and
//! the blobs that the guest reads at start. Both architectures are compiled and tested on every
//! host; nothing here does I/O or knows which machine it was compiled for.

pub mod aarch64;
mod arch;
mod architecture;
pub mod backing;
pub mod board;
pub mod cores;
pub mod debug;
mod error;
pub mod image;
pub mod irq;
pub mod machine;
pub mod midr;
pub mod pci;
pub mod plan;
pub mod range;
pub mod size;
pub mod switch;
pub mod width;
pub mod words;
pub mod x86_64;

pub use arch::{Arch, FeatureOptions, Layout, Plan, Request, Seeds};
pub use architecture::Architecture;
pub use board::{Board, PortKind};
pub use error::PlanError;
pub use machine::{Blob, DeviceKind, Payload, Placed, PlacedGeneration, PlacedPorts};
pub use plan::plan;
pub use range::{Range, Region};
pub use width::{Width, WidthPolicy};
