//! A vCPU that runs, as others see it: its thread, and what the thread is asked.

use super::control::Control;
use crate::kvm::kick;
use kvm_ioctls::VcpuFd;
use std::sync::Arc;
use std::thread::JoinHandle;

/// A running vCPU.
pub struct RunningVcpu {
    thread: JoinHandle<()>,
    pub(super) control: Arc<Control<VcpuFd>>,
}

impl RunningVcpu {
    pub(super) fn new(thread: JoinHandle<()>, control: Arc<Control<VcpuFd>>) -> RunningVcpu {
        RunningVcpu { thread, control }
    }

    /// Makes the vCPU leave the guest soon, wherever it is.
    pub fn kick(&self) {
        kick::kick(&self.thread);
    }

    /// Waits for the end of its thread.
    pub fn join(self) {
        // A panic in it has been reported where it happened.
        let _ = self.thread.join();
    }
}
