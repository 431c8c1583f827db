//! Waits for descriptors, none of them longer than until a deadline.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// When something is waited for no longer. What consists of several waits has one of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    end: Instant,
    patience: Duration,
}

impl Deadline {
    /// The moment that comes `patience` from now.
    #[must_use]
    pub fn after(patience: Duration) -> Deadline {
        Deadline {
            end: Instant::now() + patience,
            patience,
        }
    }

    /// How long it was away at first, for messages.
    #[must_use]
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// How long it is away still; zero once it has passed.
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
        let mut fds = [PollFd::new(&fd, events)];
        loop {
            let left = self.left();
            let timeout = Timespec {
                tv_sec: left.as_secs().cast_signed(),
                tv_nsec: left.subsec_nanos().into(),
            };
            match poll(&mut fds, Some(&timeout)) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
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
