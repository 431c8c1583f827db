//! The events that vCPUs report to the event loop.

use armlet_devices::action::{Action, Panic};

/// An event that a vCPU reports to the event loop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuEvent {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU cannot continue: which one, where and why, as a sentence.
    Failed(String),
    /// The guest's kernel printed that it panicked: which vCPU, where and why, as a sentence.
    Panicked(String),
    /// A vCPU is to be asked whether it is off: [`OffCheck::asked`](super::OffCheck::asked) says
    /// which.
    Asked,
    /// All vCPUs are off, for good.
    AllOff,
}

impl VcpuEvent {
    /// Returns the event for an action that comes from no vCPU's access: coalesced output is
    /// flushed by other threads, too.
    #[must_use]
    pub fn by(action: Action) -> Option<VcpuEvent> {
        match action {
            Action::None => None,
            Action::Reset => Some(VcpuEvent::Reset),
            Action::PowerOff => Some(VcpuEvent::PowerOff),
            Action::Panicked(panic) => Some(VcpuEvent::panicked(&panic, "")),
        }
    }

    /// Returns the event for a panic; `place` says where, with a leading space.
    pub(super) fn panicked(panic: &Panic, place: &str) -> VcpuEvent {
        let reason = &panic.reason;
        VcpuEvent::Panicked(format!("the guest's kernel panicked{place}: {reason}"))
    }
}
