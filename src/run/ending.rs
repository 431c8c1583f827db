//! How a life of the guest ends, and the resulting exit status.

use armlet_system::messages;
use armlet_system::status::Status;

/// What to do when the guest asks for a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnReset {
    /// Start the guest again on a new machine.
    Restart,
    /// Exit with [`Status::GuestReset`].
    Exit,
}

/// What to do when the guest's kernel panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnPanic {
    /// Report it and let the guest continue (with a crash kernel, a reset, or not at all).
    Report,
    /// Exit with [`Status::GuestFailed`].
    Exit,
}

/// How one life of the guest, from a start to the next reset or its end, ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest cannot continue, or its kernel panicked: what happened.
    Failed(String),
    /// It was stopped by a key, a signal or a command.
    Stopped,
}

impl Ending {
    /// Reports what happened, and returns armlet's exit status.
    pub(super) fn status(self) -> Status {
        match self {
            Ending::PowerOff => Status::Success,
            Ending::Reset => Status::GuestReset,
            Ending::Stopped => Status::Stopped,
            Ending::Failed(what) => {
                messages::say(&what);
                Status::GuestFailed
            }
        }
    }
}
