//! Rate limits for log messages.

use crate::sync::lock;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The log target of records that passed a [`RateLimit`], so that the logger does not limit them
/// again.
pub const LIMITED: &str = "limited";

/// The first interval between two messages of a kind that keeps occurring; each further one is
/// twice as long.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest interval. A kind that did not occur for as long starts over.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// The number of messages that all limits suppressed.
static HELD_BACK: AtomicU64 = AtomicU64::new(0);

/// Limits the messages of one kind: the first few are shown, then fewer and fewer, but at least one
/// every ten minutes. A kind that was quiet for ten minutes starts over. All occurrences are
/// counted.
#[derive(Debug)]
pub struct RateLimit {
    /// How many messages are shown before intervals begin.
    burst: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Occurrences so far.
    count: u64,
    /// Occurrences since one was shown.
    held: u64,
    /// Messages shown in this burst.
    shown: u32,
    pause: Duration,
    /// When the next message is shown.
    next: Option<Instant>,
    last: Option<Instant>,
}

/// A message that may be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// Occurrences of its kind so far, this one included.
    pub count: u64,
    /// How many were suppressed since the last one that was shown.
    pub held: u64,
}

/// The suffix of a message that does not give its count: how many were suppressed, if any.
impl fmt::Display for Admitted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.held {
            0 => Ok(()),
            held => write!(f, " (and {held} more like this)"),
        }
    }
}

impl Default for RateLimit {
    fn default() -> RateLimit {
        RateLimit::new(4)
    }
}

impl RateLimit {
    /// Creates a limit that shows `burst` messages in a row before intervals begin.
    #[must_use]
    pub const fn new(burst: u32) -> RateLimit {
        RateLimit {
            burst,
            state: Mutex::new(State {
                count: 0,
                held: 0,
                shown: 0,
                pause: FIRST_PAUSE,
                next: None,
                last: None,
            }),
        }
    }

    /// Counts an occurrence; returns `None` if its message is suppressed.
    pub fn admit(&self) -> Option<Admitted> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&self, now: Instant) -> Option<Admitted> {
        let mut state = lock(&self.state);
        state.count += 1;
        let quiet = state.last.replace(now).map(|last| now - last);
        if quiet.is_some_and(|quiet| quiet >= LONGEST_PAUSE) {
            (state.shown, state.pause, state.next) = (0, FIRST_PAUSE, None);
        }
        if state.shown >= self.burst {
            if state.next.is_some_and(|next| now < next) {
                state.held += 1;
                HELD_BACK.fetch_add(1, Ordering::Relaxed);
                return None;
            }
            state.next = now.checked_add(state.pause);
            state.pause = (2 * state.pause).min(LONGEST_PAUSE);
        } else {
            state.shown += 1;
            if state.shown == self.burst {
                state.next = now.checked_add(FIRST_PAUSE);
                state.pause = 2 * FIRST_PAUSE;
            }
        }
        Some(Admitted {
            count: state.count,
            held: std::mem::take(&mut state.held),
        })
    }

    /// Counts an occurrence, and logs the message that `line` returns for its counts unless it is
    /// suppressed.
    pub fn log<T: fmt::Display>(&self, level: log::Level, line: impl FnOnce(Admitted) -> T) {
        if level > log::max_level() {
            let mut state = lock(&self.state);
            state.count += 1;
        } else if let Some(admitted) = self.admit() {
            log::log!(target: LIMITED, level, "{}", line(admitted));
        }
    }

    /// Occurrences so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        let state = lock(&self.state);
        state.count
    }
}

/// Takes the number of messages that all limits held back since it was last taken.
#[must_use]
pub fn take_held_back() -> u64 {
    HELD_BACK.swap(0, Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the times in seconds at which a kind that occurs ten times a second is shown.
    fn shown(limit: &RateLimit, start: Instant, seconds: u64) -> Vec<u64> {
        let mut shown = Vec::new();
        for tenth in 0..seconds * 10 {
            let now = start + Duration::from_millis(tenth * 100);
            if limit.admit_at(now).is_some() {
                shown.push(tenth / 10);
            }
        }
        shown
    }

    #[test]
    fn a_flood_is_shown_ever_more_rarely_and_never_falls_silent() {
        let limit = RateLimit::new(4);
        let times = shown(&limit, Instant::now(), 4000);
        assert_eq!(times[..8], [0, 0, 0, 0, 1, 3, 7, 15]);
        let last = &times[times.len() - 3..];
        assert_eq!(last[2] - last[1], 600);
        assert_eq!(last[1] - last[0], 600);
        assert_eq!(limit.count(), 40_000);
    }

    #[test]
    fn what_was_held_back_is_told_by_the_next_that_is_shown() {
        let limit = RateLimit::new(1);
        let start = Instant::now();
        let first = Admitted { count: 1, held: 0 };
        assert_eq!(limit.admit_at(start), Some(first));
        for _ in 0..9 {
            assert_eq!(limit.admit_at(start), None);
        }
        let later = limit.admit_at(start + FIRST_PAUSE);
        assert_eq!(later, Some(Admitted { count: 11, held: 9 }));
    }

    #[test]
    fn what_is_rare_is_always_shown() {
        let limit = RateLimit::new(4);
        let start = Instant::now();
        assert!((0..100).all(|nth| limit.admit_at(start + nth * LONGEST_PAUSE).is_some()));
    }

    #[test]
    fn one_flood_holds_back_none_of_another_kind() {
        let (loud, other) = (RateLimit::new(4), RateLimit::new(4));
        let start = Instant::now();
        for _ in 0..1000 {
            let _ = loud.admit_at(start);
        }
        assert!(other.admit_at(start).is_some());
    }
}
