//! Exit statuses, and errors that carry one.

use std::fmt;
use std::process::ExitCode;

/// Armlet's exit statuses, as a script sees them. `docs/options.md` lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// 0: the guest powered off, or the command did its work.
    Success,
    /// 1: armlet itself failed, for instance to write a file.
    Failure,
    /// 2: the command line, a board file or an input file is wrong.
    Usage,
    /// 3: this host cannot run the machine.
    Host,
    /// 4: the guest crashed, or did something that KVM cannot continue from.
    GuestFailed,
    /// 5: the guest asked for a reset and `--on-reset exit` was given.
    GuestReset,
    /// 6: the guest was stopped before it powered off (Ctrl-A x, SIGINT, a second SIGTERM).
    Stopped,
    /// 7: armlet made a system call that its sandbox forbids.
    Forbidden,
    /// 8: the process that gives guest memory ended before the guest.
    NoMemory,
}

impl Status {
    /// Returns the number that the shell sees.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Status::Success => 0,
            Status::Failure => 1,
            Status::Usage => 2,
            Status::Host => 3,
            Status::GuestFailed => 4,
            Status::GuestReset => 5,
            Status::Stopped => 6,
            Status::Forbidden => 7,
            Status::NoMemory => 8,
        }
    }
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        ExitCode::from(status.code())
    }
}

/// A status attached to an error by [`Fault::fault`]; it adds no text of its own.
#[derive(Debug)]
struct Tagged {
    status: Status,
    error: anyhow::Error,
}

impl fmt::Display for Tagged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

impl std::error::Error for Tagged {}

/// Attaches exit statuses to errors.
pub trait Fault<T> {
    /// Attaches `status` to the error, if it is one.
    ///
    /// # Errors
    /// The same error, with the status.
    fn fault(self, status: Status) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> Fault<T> for Result<T, E> {
    fn fault(self, status: Status) -> anyhow::Result<T> {
        self.map_err(|error| {
            anyhow::Error::new(Tagged {
                status,
                error: error.into(),
            })
        })
    }
}

/// Returns the status of an error: the outermost one attached to it, else [`Status::Failure`].
#[must_use]
pub fn status_of(error: &anyhow::Error) -> Status {
    error
        .chain()
        .find_map(|cause| cause.downcast_ref::<Tagged>())
        .map_or(Status::Failure, |tagged| tagged.status)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};

    #[test]
    fn a_status_survives_context_and_adds_no_words() {
        let error = Err::<(), _>(anyhow!("cause"))
            .context("act")
            .fault(Status::Host)
            .context("outer")
            .expect_err("an error");
        assert_eq!(status_of(&error), Status::Host);
        assert_eq!(format!("{error:#}"), "outer: act: cause");
        assert_eq!(status_of(&anyhow!("plain")), Status::Failure);
    }
}
