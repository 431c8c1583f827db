//! A running vCPU, as other threads see it: its thread, and the requests to it.

use super::control::Control;
use crate::kvm::kick::Target;
use kvm_ioctls::VcpuFd;
use std::sync::Arc;
use std::thread::JoinHandle;

/// A running vCPU.
pub struct RunningVcpu {
    thread: JoinHandle<()>,
    target: Target,
    pub(super) control: Arc<Control<VcpuFd>>,
}

impl RunningVcpu {
    pub(super) fn new(
        thread: JoinHandle<()>,
        target: Target,
        control: Arc<Control<VcpuFd>>,
    ) -> RunningVcpu {
        RunningVcpu {
            thread,
            target,
            control,
        }
    }

    /// Makes the vCPU leave the guest soon, or not enter it.
    pub fn kick(&self) {
        self.target.kick();
    }

    /// Joins its thread.
    pub fn join(self) {
        // A panic of the thread was already reported.
        let _ = self.thread.join();
    }
}
