//! Decides whether a worker's thread preempts the vCPU that wakes it by a kick.
//!
//! Where the two have one CPU between them, a thread that does so serves one request, although the
//! guest was about to make more: each then costs a kick, an interrupt and two switches. A thread
//! that lets the vCPU go on (SCHED_BATCH) finds all of them when that has nothing more to do. But
//! if it has enough to do without them, or somebody else computes on that CPU, requests wait for a
//! time slice of the scheduler's. None of this can be seen beforehand, so it is tried now and then,
//! for one wake-up, and kept for as long as it pays.

use std::time::Duration;

/// The wake-ups after which it is looked what to do.
const WINDOW: u16 = 16;
/// A window that takes longer has a pause in it: what was found before may not hold any more.
const PAUSE: Duration = Duration::from_millis(50);
/// The most windows from one trial to the next.
const MOST_WINDOWS: u16 = 256;
/// Fewer requests at a wake-up are not worth a wait.
const FEW: u32 = 4;
/// How long it takes a guest to make one of many requests, at most. It is reckoned with many of
/// them up to [`SLICE`].
const EACH: Duration = Duration::from_micros(100);
/// A time slice of the scheduler's takes longer.
const SLICE: Duration = Duration::from_micros(2500);
/// It is given up when that many wake-ups more did not pay than did, of the last ones.
const CREDIT: u8 = 4;

/// Whether wake-ups wait for whoever runs, and how that has gone.
#[derive(Debug)]
pub(super) struct Batching {
    is_on: bool,
    /// When the last window, or wake-up while it is on, ended.
    since: Duration,
    /// Wake-ups of this window.
    seen: u16,
    /// Windows until the next trial, and what they are after a trial that fails.
    left: u16,
    interval: u16,
    /// What was earned since it is on.
    credit: u8,
    /// Whether it has been worth it this time.
    paid: bool,
}

impl Batching {
    /// Off.
    pub(super) fn new() -> Batching {
        Batching {
            is_on: false,
            since: Duration::ZERO,
            seen: 0,
            left: 1,
            interval: 1,
            credit: 0,
            paid: false,
        }
    }

    /// Returns whether the next wake-up shall wait for whoever runs, after one at which so many
    /// requests were there; `now` says the time since some moment.
    pub(super) fn observe(&mut self, requests: u32, now: impl FnOnce() -> Duration) -> bool {
        match (self.is_on, requests) {
            (_, 0) => {}
            (true, _) => self.judge(requests, now()),
            (false, _) => {
                self.seen += 1;
                if self.seen == WINDOW {
                    self.seen = 0;
                    self.look(now());
                }
            }
        }
        self.is_on
    }

    /// At the end of a window.
    fn look(&mut self, now: Duration) {
        if self.took(now) > PAUSE {
            (self.left, self.interval) = (1, 1);
            return;
        }
        self.left -= 1;
        if self.left == 0 {
            (self.is_on, self.credit, self.paid) = (true, 0, false);
        }
    }

    /// After a wake-up that may have waited.
    fn judge(&mut self, requests: u32, now: Duration) {
        let took = self.took(now);
        if requests >= FEW && took <= SLICE.min(EACH * requests) {
            self.paid |= self.credit == CREDIT;
            self.credit = CREDIT.min(self.credit + 1);
            return;
        }
        if self.credit > 0 {
            self.credit -= 1;
            return;
        }
        self.is_on = false;
        self.interval = match self.paid {
            true => 1,
            false => MOST_WINDOWS.min(self.interval * 2),
        };
        self.left = self.interval;
    }

    /// How long it is since it was last looked at the time.
    fn took(&mut self, now: Duration) -> Duration {
        now.saturating_sub(std::mem::replace(&mut self.since, now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Wake-ups of a guest, of which each takes `took` and has as many requests as `of` says, by
    /// whether it waited. Returns how many of them waited.
    fn waits(
        batching: &mut Batching,
        clock: &mut Duration,
        count: usize,
        took: Duration,
        of: impl Fn(bool) -> u32,
    ) -> usize {
        let mut waited = 0;
        for _ in 0..count {
            let is_on = batching.is_on;
            waited += usize::from(is_on);
            *clock += took;
            assert_eq!(batching.observe(of(is_on), || *clock), batching.is_on);
        }
        waited
    }

    const SHORT: Duration = Duration::from_micros(50);

    #[test]
    fn a_guest_with_many_requests_has_them_taken_together() {
        let (mut batching, mut clock) = (Batching::new(), Duration::from_secs(100));
        let many = |is_on| if is_on { 32 } else { 1 };
        // The first window begins with the pause before it.
        let took = Duration::from_micros(800);
        let waited = waits(&mut batching, &mut clock, 100, took, many);
        assert_eq!(waited, 100 - 2 * usize::from(WINDOW));
        // A timer that ends the vCPU's turn now and then changes nothing.
        for _ in 0..100 {
            let waited = waits(&mut batching, &mut clock, 1, SHORT, |_| 2);
            assert_eq!(waited, 1);
            assert_eq!(waits(&mut batching, &mut clock, 2, took, many), 2);
        }
    }

    #[test]
    fn a_guest_with_one_request_at_a_time_waits_ever_more_rarely() {
        let (mut batching, mut clock) = (Batching::new(), Duration::from_secs(100));
        let most = waits(&mut batching, &mut clock, 100_000, SHORT, |_| 1);
        assert!((8..=40).contains(&most), "{most} of 100,000");
        let more = waits(&mut batching, &mut clock, 100_000, SHORT, |_| 1);
        assert!((20..=25).contains(&more), "{more} of 100,000");
        // After a pause it may be another program that runs.
        clock += Duration::from_secs(1);
        let many = |is_on| if is_on { 32 } else { 1 };
        let waited = waits(&mut batching, &mut clock, 1000, SHORT, many);
        assert!(waited >= 1000 - 3 * usize::from(WINDOW), "{waited}");
    }

    #[test]
    fn where_somebody_else_computes_on_the_cpu_nobody_waits() {
        let (mut batching, mut clock) = (Batching::new(), Duration::from_secs(100));
        let mut waited = 0;
        for _ in 0..100_000 {
            let is_on = batching.is_on;
            waited += u32::from(is_on);
            // A wake-up that waits does so until the tick.
            clock += if is_on { SLICE * 2 } else { SHORT };
            batching.observe(if is_on { 100 } else { 1 }, || clock);
        }
        assert!((1..=40).contains(&waited), "{waited} of 100,000");
    }

    #[test]
    fn a_guest_that_asks_slowly_never_waits() {
        let (mut batching, mut clock) = (Batching::new(), Duration::from_secs(100));
        let slow = Duration::from_millis(10);
        assert_eq!(
            waits(&mut batching, &mut clock, 10_000, slow, |_| 1),
            0,
            "each window has pauses"
        );
    }

    #[test]
    fn completions_that_come_by_themselves_say_nothing() {
        let mut batching = Batching::new();
        for _ in 0..1000 {
            assert!(!batching.observe(0, || unreachable!("nobody asks for the time")));
        }
    }
}
