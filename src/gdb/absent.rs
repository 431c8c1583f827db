//! In place of the debugger, where it is not built in.

use super::Address;
use crate::run::Command;
use crate::vcpu::Traps;
use anyhow::{Result, bail};
use kvm_ioctls::Kvm;
use std::convert::Infallible;
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;

/// There is none.
pub struct Debugger(Infallible);

impl Debugger {
    /// Refuses.
    ///
    /// # Errors
    /// Always.
    pub fn listen(_: &Address, _: &Kvm) -> Result<Debugger> {
        bail!("--gdb: this armlet was built without it (cargo's feature gdb)")
    }

    /// As where there is one.
    #[must_use]
    pub fn traps(&self) -> &Arc<Traps> {
        match self.0 {}
    }

    /// As where there is one.
    ///
    /// # Errors
    /// None: there is none.
    pub fn start(
        self,
        _: impl FnOnce() -> Result<()> + Send + 'static,
        _: impl Fn(Command) -> Result<(), Command> + Send + 'static,
        _: Arc<GuestMemoryMmap>,
        _: usize,
    ) -> Result<()> {
        match self.0 {}
    }
}
