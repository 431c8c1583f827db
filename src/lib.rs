//! Armlet, a small virtual machine monitor for ARM64 Linux hosts with KVM.
//!
//! Data flows one way and never turns back:
//!
//! ```text
//! cli -> config -> armlet_arch::plan -> machine -> run
//! text   request   decision             objects    life
//! ```
//!
//! `docs/ARCHITECTURE.md` has the map and the invariants.

mod abort;
pub mod affinity;
pub mod api;
pub mod asked;
pub mod boards;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod config;
pub mod console;
pub mod control;
pub mod decide;
pub mod descriptors;
pub mod gdb;
pub mod heap;
pub mod host;
pub mod jail;
pub mod kernel;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod probe;
pub mod report;
pub mod run;
pub mod sandbox;
pub mod serial;
pub mod settings;
pub mod shutdown;
pub mod slots;
pub mod snapshot;
pub mod stats;
pub mod table;
#[cfg(any(target_env = "musl", test))]
mod thread_name;
pub mod vcpu;
