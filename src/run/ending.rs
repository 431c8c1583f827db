//! How a life of the guest ends, and what comes of it.

use armlet_system::messages;
use armlet_system::status::Status;

/// What to do when the guest asks for a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnReset {
    /// Start the machine anew.
    Restart,
    /// Leave, with [`Status::GuestReset`].
    Exit,
}

/// What to do when the guest's kernel panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnPanic {
    /// Say so; the guest goes on as it likes (to a crash kernel, a reset, or nowhere).
    Report,
    /// Leave, with [`Status::GuestFailed`].
    Exit,
}

/// How one life of the guest, from start to reset or end, ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest cannot go on, or its kernel panicked: what happened.
    Failed(String),
    /// Somebody stopped it, by a key, a signal or a command.
    Stopped,
}

impl Ending {
    /// Returns the status that armlet ends with; what happened is said.
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
