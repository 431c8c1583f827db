//! What vCPUs tell the event loop.

use armlet_devices::action::{Action, Panic};

/// What a vCPU tells the event loop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuEvent {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU cannot go on: which, where and why, in a sentence.
    Failed(String),
    /// The guest's kernel said that it panicked: which vCPU, where and why, in a sentence.
    Panicked(String),
    /// A vCPU is asked whether it is off: [`OffCheck::asked`](super::OffCheck::asked) says which.
    Asked,
    /// All vCPUs are off, for good.
    AllOff,
}

impl VcpuEvent {
    /// Returns what an action of the guest's is told as, where no vCPU made the access: output that
    /// was collected is handed on by other threads, too.
    #[must_use]
    pub fn by(action: Action) -> Option<VcpuEvent> {
        match action {
            Action::None => None,
            Action::Reset => Some(VcpuEvent::Reset),
            Action::PowerOff => Some(VcpuEvent::PowerOff),
            Action::Panicked(panic) => Some(VcpuEvent::panicked(&panic, "")),
        }
    }

    /// `place` says where, with a space before it.
    pub(super) fn panicked(panic: &Panic, place: &str) -> VcpuEvent {
        let reason = &panic.reason;
        VcpuEvent::Panicked(format!("the guest's kernel panicked{place}: {reason}"))
    }
}
