//! All vCPUs of a machine: paused, resumed and stopped together.

use super::control::Stand;
use super::off::OffCheck;
use super::running::RunningVcpu;
use armlet_system::deadline::Deadline;
use kvm_ioctls::VcpuFd;
use std::fmt::{self, Display};
use std::sync::Arc;
use std::time::Duration;

/// The first interval after which vCPUs that have not reacted are kicked again; it doubles each
/// time.
const FIRST_KICK: Duration = Duration::from_micros(50);
/// The longest such interval.
const LONGEST_TO_KICK: Duration = Duration::from_millis(10);

/// The running vCPUs of a machine.
#[derive(Default)]
pub struct Vcpus {
    running: Vec<RunningVcpu>,
    off: Option<Arc<OffCheck>>,
}

/// Why vCPUs could not be paused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotHeld {
    /// This one did not pause within this time.
    Busy(usize, Duration),
    /// This one has ended, because the guest requested a power-off or reset.
    Ended(usize),
}

impl Display for NotHeld {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotHeld::Busy(index, limit) => {
                let limit = limit.as_millis();
                write!(f, "vCPU {index} does not pause within {limit} ms")
            }
            NotHeld::Ended(index) => {
                write!(f, "vCPU {index} has ended, as the guest ends or is reset")
            }
        }
    }
}

impl Vcpus {
    /// Adds the next vCPU. All vCPUs of a machine share one `off`.
    pub fn add(&mut self, vcpu: RunningVcpu, off: &Arc<OffCheck>) {
        self.running.push(vcpu);
        self.off = Some(Arc::clone(off));
    }

    /// Returns the number of vCPUs.
    #[must_use]
    pub fn count(&self) -> usize {
        self.running.len()
    }

    /// Kicks the vCPU that is being asked whether it is off, if any.
    pub fn kick_asked(&self) {
        let asked = self.off.as_ref().and_then(|off| off.asked());
        if let Some(vcpu) = asked.and_then(|index| self.running.get(index)) {
            vcpu.kick();
        }
    }

    /// Has vCPU `index` run `task` on its own thread, outside the guest. Returns false if there is
    /// no such vCPU, or it has ended.
    #[must_use]
    pub fn ask(&self, index: usize, task: impl FnOnce(&mut VcpuFd) + Send + 'static) -> bool {
        let Some(vcpu) = self.running.get(index) else {
            return false;
        };
        let asked = vcpu.control.ask(task);
        vcpu.kick();
        asked
    }

    /// Pauses all of them between two instructions of the guest, until [`Self::resume`]. Those that
    /// idle in the guest, or are off, are paused too.
    ///
    /// # Errors
    /// The vCPU that could not be paused: its access waits longer than `limit` for a device or for
    /// a reader of the console, or it has ended. All vCPUs then resume.
    pub fn pause(&self, limit: Duration) -> Result<(), NotHeld> {
        for vcpu in &self.running {
            vcpu.control.pause();
        }
        let held = self.kick_until_paused(limit);
        if held.is_err() {
            self.resume();
        }
        held
    }

    /// Holds all of them between two instructions of the guest, for a debugger: until [`Self::release`],
    /// beside any pause.
    ///
    /// # Errors
    /// As [`Self::pause`]; all are then released.
    pub fn hold(&self, limit: Duration) -> Result<(), NotHeld> {
        for vcpu in &self.running {
            vcpu.control.hold();
        }
        let held = self.kick_until_paused(limit);
        if held.is_err() {
            self.release(None);
        }
        held
    }

    /// Ends the hold of one of them, or of all.
    pub fn release(&self, only: Option<usize>) {
        for (index, vcpu) in self.running.iter().enumerate() {
            if only.is_none_or(|only| only == index) {
                vcpu.control.release();
            }
        }
    }

    /// Resumes all of them.
    pub fn resume(&self) {
        for vcpu in &self.running {
            vcpu.control.run();
        }
    }

    fn kick_until_paused(&self, limit: Duration) -> Result<(), NotHeld> {
        if let Err(index) = self.kick_while(Stand::Running, limit) {
            return Err(NotHeld::Busy(index, limit));
        }
        let mut stands = self.running.iter().map(|vcpu| vcpu.control.stand());
        match stands.position(|stand| stand == Stand::Ended) {
            Some(index) => Err(NotHeld::Ended(index)),
            None => Ok(()),
        }
    }

    /// Stops all of them, whether paused or not.
    ///
    /// # Errors
    /// The first that has not ended after `limit`. The request stands: call again to wait longer.
    pub fn stop(&self, limit: Duration) -> Result<(), usize> {
        for vcpu in &self.running {
            vcpu.control.stop();
        }
        // A paused one counts as running until it has ended.
        self.kick_while(Stand::Paused, limit)?;
        self.kick_while(Stand::Running, limit)
    }

    /// Kicks the threads in state `stand` until there are none. A kick may come just before a
    /// thread blocks on something other than the guest, so it is repeated, at first quickly: most
    /// threads need one.
    ///
    /// # Errors
    /// The first that is still in that state after `limit`.
    fn kick_while(&self, stand: Stand, limit: Duration) -> Result<(), usize> {
        let deadline = Deadline::after(limit);
        let mut pause = FIRST_KICK;
        loop {
            let standing = (0..).zip(&self.running);
            let mut standing = standing.filter(|(_, vcpu)| vcpu.control.stand() == stand);
            let Some((index, first)) = standing.next() else {
                return Ok(());
            };
            if deadline.left().is_zero() {
                return Err(index);
            }
            first.kick();
            for (_, vcpu) in standing {
                vcpu.kick();
            }
            first.control.wait_while(stand, pause.min(deadline.left()));
            pause = (2 * pause).min(LONGEST_TO_KICK);
        }
    }

    /// Joins all threads, which have been stopped.
    pub fn join(&mut self) {
        for vcpu in self.running.drain(..) {
            vcpu.join();
        }
    }
}
