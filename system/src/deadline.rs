//! Waits for descriptors: once, or until a deadline.

use crate::eintr::uninterrupted;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Waits until `fd` is ready for one of `events` or its other end is closed, up to `limit`, or
/// without an end. Returns whether it is.
///
/// # Errors
/// What poll(2) says; EINTR where a signal came in between.
pub fn wait_once(fd: impl AsFd, events: PollFlags, limit: Option<Duration>) -> Result<bool, Errno> {
    // One that is too long for the kernel has no end.
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    let ready = poll(&mut [PollFd::new(&fd, events)], limit.as_ref())?;
    Ok(ready > 0)
}

/// When something is waited for no longer. What consists of several waits has one of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    end: Instant,
    patience: Duration,
}

impl Deadline {
    /// Returns the moment that comes `patience` from now.
    #[must_use]
    pub fn after(patience: Duration) -> Deadline {
        Deadline {
            end: Instant::now() + patience,
            patience,
        }
    }

    /// Returns how long it was away at first, for messages.
    #[must_use]
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Returns how long it is away still; zero once it has passed.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    /// Waits until `fd` is ready for one of `events`, or its other end is closed. Returns whether
    /// it is; if not, the deadline has passed.
    ///
    /// # Errors
    /// What poll(2) says, but for a signal that came in between.
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
