//! Waits for descriptors: once, or until a deadline.

use crate::eintr::uninterrupted;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Waits until `fd` is ready for one of `events`, or its other end is closed, for at most `limit`
/// or indefinitely. Returns whether it is ready.
///
/// # Errors
/// An error of poll(2), including EINTR after a signal.
pub fn wait_once(fd: impl AsFd, events: PollFlags, limit: Option<Duration>) -> Result<bool, Errno> {
    // A limit that is too long for the kernel means an indefinite wait.
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    let ready = poll(&mut [PollFd::new(&fd, events)], limit.as_ref())?;
    Ok(ready > 0)
}

/// The end of a wait, shared by all waits of one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    end: Instant,
    patience: Duration,
}

impl Deadline {
    /// Creates the deadline `patience` from now.
    #[must_use]
    pub fn after(patience: Duration) -> Deadline {
        Deadline {
            end: Instant::now() + patience,
            patience,
        }
    }

    /// Returns the original length of the wait, for messages.
    #[must_use]
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Returns the remaining time; zero once it has passed.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    /// Waits until `fd` is ready for one of `events`, or its other end is closed. Returns whether
    /// it is ready; if not, the deadline has passed.
    ///
    /// # Errors
    /// An error of poll(2) other than EINTR.
    pub fn wait(&self, fd: impl AsFd, events: PollFlags) -> Result<bool, Errno> {
        uninterrupted(|| wait_once(&fd, events, Some(self.left())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_wait_ends_with_what_was_waited_for_or_with_the_deadline() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let past = Deadline::after(Duration::ZERO);
        assert_eq!(past.left(), Duration::ZERO);
        assert_eq!(past.wait(&ours, PollFlags::IN), Ok(false));
        assert_eq!(past.wait(&ours, PollFlags::OUT), Ok(true));
        theirs.write_all(b"x").expect("room");
        let far = Deadline::after(Duration::from_secs(600));
        assert_eq!(far.wait(&ours, PollFlags::IN), Ok(true));
        drop(theirs);
        assert_eq!(far.wait(&ours, PollFlags::IN), Ok(true));
    }
}
