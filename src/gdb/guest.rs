//! The guest, as the debugger's thread reaches it: by commands to the event loop.

use super::patches::Memory;
use crate::kvm::debug;
use crate::run::{By, Command, Reply};
use anyhow::{Result, anyhow, bail};
use armlet_system::deadline::Deadline;
use kvm_ioctls::VcpuFd;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// How long a command may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The pause after the event loop had no room for a command.
const PAUSE: Duration = Duration::from_millis(5);

/// Sends a command to the event loop, and gives back what it does not take.
pub(super) type Send = Box<dyn Fn(Command) -> Result<(), Command> + std::marker::Send>;

/// The guest.
pub(super) struct Guest {
    pub(super) send: Send,
    pub(super) memory: Arc<GuestMemoryMmap>,
    /// Number of vCPUs.
    pub(super) vcpus: usize,
}

impl Guest {
    fn tell(&self, mut command: Command) -> Result<()> {
        let deadline = Deadline::after(PATIENCE);
        loop {
            command = match (self.send)(command) {
                Ok(()) => return Ok(()),
                Err(command) => command,
            };
            if deadline.left().is_zero() {
                bail!("the guest has ended, or has too much to do");
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Has a vCPU's thread run `task` between two instructions of the guest; returns its answer.
    ///
    /// # Errors
    /// What it answers, or that the vCPU has ended.
    pub(super) fn with<T: std::marker::Send + 'static>(
        &self,
        index: usize,
        task: impl FnOnce(&mut VcpuFd) -> Result<T> + std::marker::Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = channel();
        let task = move |vcpu: &mut VcpuFd| {
            // The receiver may have given up.
            let _ = answer.send(task(vcpu));
        };
        self.tell(Command::WithVcpu(index, Box::new(task)))?;
        let answer = answered.recv_timeout(PATIENCE);
        answer.map_err(|_| anyhow!("vCPU {index} does not answer"))?
    }

    /// Holds all vCPUs.
    ///
    /// # Errors
    /// Why they do not stand still.
    pub(super) fn hold(&self, patience: Duration) -> Result<()> {
        let (reply, answer) = Reply::channel();
        self.tell(Command::Hold(reply))?;
        match answer.recv_timeout(patience) {
            Ok(held) => held.map_err(anyhow::Error::msg),
            Err(_) => bail!("the guest does not stand still"),
        }
    }

    /// Releases a vCPU, or all.
    ///
    /// # Errors
    /// A guest that has ended.
    pub(super) fn release(&self, only: Option<usize>) -> Result<()> {
        self.tell(Command::Release(only))
    }

    /// Ends the guest.
    ///
    /// # Errors
    /// One that has ended.
    pub(super) fn stop(&self) -> Result<()> {
        self.tell(Command::Stop(By::Debugger))
    }

    /// Returns the guest-physical address of a virtual one of a vCPU, and how many bytes follow it; `None`
    /// where nothing is mapped.
    ///
    /// # Errors
    /// What KVM says.
    pub(super) fn translate(&self, index: usize, address: u64) -> Result<Option<(u64, u64)>> {
        let memory = Arc::clone(&self.memory);
        self.with(index, move |vcpu| debug::translate(vcpu, address, &memory))
    }
}

impl Memory for Guest {
    fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        self.memory.read_slice(bytes, GuestAddress(address)).is_ok()
    }

    fn write(&self, address: u64, bytes: &[u8]) -> bool {
        debug::write_code(&self.memory, address, bytes)
    }
}
