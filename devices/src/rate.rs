//! How much a device may do in how much time: token buckets, and what has a device wait for tokens.
//!
//! A bucket holds tokens for bytes or for requests. It is full at first, is refilled at an even rate, and
//! what it was given for once is used up before. A request that needs more tokens than the bucket can hold
//! passes when nothing is owed, and is owed for: the next one waits until that is paid back.

use std::os::fd::RawFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::sync::lock;
use crate::virtio::Source;

/// What a bucket holds, and how fast it is refilled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// The most tokens that it holds; none mean that there is no limit.
    pub size: u64,
    /// How long an empty one takes to be full; no time means that there is no limit.
    pub refill_time: Duration,
    /// Tokens beside these, which are there once and are used up first.
    pub one_time_burst: u64,
}

impl Bucket {
    /// A bucket for so many tokens a second, which holds those of a tenth of one.
    #[must_use]
    pub fn per_second(tokens: u64) -> Bucket {
        let size = (tokens / 10).max(1);
        let refill_time = match tokens {
            0 => Duration::ZERO,
            _ => Duration::from_nanos((u128::from(size) * SECOND / u128::from(tokens)) as u64),
        };
        Bucket {
            size,
            refill_time,
            one_time_burst: 0,
        }
    }

    /// Whether it limits anything.
    #[must_use]
    pub fn is_limit(&self) -> bool {
        self.size > 0 && !self.refill_time.is_zero()
    }
}

/// Nanoseconds of a second.
const SECOND: u128 = 1_000_000_000;

/// The limits of a device, or of one direction of it. Where limits are changed, `None` leaves one as it
/// is, and a bucket that [is none](Bucket::is_limit) takes it away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Of bytes.
    pub bandwidth: Option<Bucket>,
    /// Of requests.
    pub ops: Option<Bucket>,
}

/// A bucket at work. Time is counted from any moment that stays the same.
///
/// Tokens are counted in parts, of which one has as many as refilling takes nanoseconds: so a nanosecond
/// brings as many parts as the bucket holds tokens, and nothing is rounded.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    size: u64,
    /// Parts of a token.
    parts: u64,
    /// What is left of what is there once, in tokens.
    burst: u64,
    /// Parts that are there, or (less than none) owed.
    level: i128,
    /// When the level was reckoned.
    at: Duration,
}

/// The longest that refilling takes: more than a century.
const LONGEST: u64 = 1 << 62;

impl TokenBucket {
    /// A full one; `None` where it limits nothing.
    #[must_use]
    pub fn new(bucket: &Bucket, now: Duration) -> Option<TokenBucket> {
        let parts =
            u64::try_from(bucket.refill_time.as_nanos()).map_or(LONGEST, |it| it.min(LONGEST));
        bucket.is_limit().then(|| TokenBucket {
            size: bucket.size,
            parts,
            burst: bucket.one_time_burst,
            level: i128::from(bucket.size) * i128::from(parts),
            at: now,
        })
    }

    fn refill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at).as_nanos();
        self.at = self.at.max(now);
        let full = i128::from(self.size) * i128::from(self.parts);
        let passed = i128::try_from(passed).unwrap_or(i128::MAX);
        let more = passed.saturating_mul(self.size.into());
        self.level = self.level.saturating_add(more).min(full);
    }

    /// How long it takes until so many tokens may be taken; no time if that is now.
    pub fn wait(&mut self, tokens: u64, now: Duration) -> Duration {
        self.refill(now);
        let tokens = tokens.saturating_sub(self.burst);
        let wanted = match tokens <= self.size {
            true => i128::from(tokens) * i128::from(self.parts),
            false => 0,
        };
        let lacking = u128::try_from(wanted.saturating_sub(self.level)).unwrap_or(0);
        // Only this much later there are as many.
        let nanoseconds = lacking.div_ceil(self.size.into());
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }

    /// Takes so many tokens, whether or not they are there.
    pub fn take(&mut self, tokens: u64) {
        let of_burst = tokens.min(self.burst);
        self.burst -= of_burst;
        let parts = i128::from(tokens - of_burst) * i128::from(self.parts);
        // More than this is never owed, and is paid back first.
        self.level = self.level.saturating_sub(parts);
    }
}

/// Tells a device when to look again.
pub trait Alarm: Send + Sync {
    /// Has the descriptor readable after this time, and not before.
    fn set(&self, after: Duration);

    /// Has it no longer readable.
    fn heard(&self);

    /// The descriptor.
    fn fd(&self) -> RawFd;
}

/// What holds a device back to its limits, in all of a guest's lives, while whoever holds it changes
/// them.
pub struct Throttle {
    /// Whether there is any limit.
    is_limited: AtomicBool,
    buckets: Mutex<Buckets>,
    alarm: Box<dyn Alarm>,
    begun: Instant,
}

#[derive(Default)]
struct Buckets {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
}

impl Throttle {
    /// One with these limits; `alarm` tells the device when there are tokens again.
    #[must_use]
    pub fn new(limits: &Limits, alarm: Box<dyn Alarm>) -> Throttle {
        let throttle = Throttle {
            is_limited: AtomicBool::new(false),
            buckets: Mutex::default(),
            alarm,
            begun: Instant::now(),
        };
        throttle.set(limits);
        throttle
    }

    /// Changes the limits that are named; their buckets are full again.
    pub fn change(&self, limits: &Limits) {
        self.set(limits);
        // What waits looks again at once.
        self.alarm.set(Duration::ZERO);
    }

    fn set(&self, limits: &Limits) {
        let now = self.begun.elapsed();
        let mut buckets = lock(&self.buckets);
        if let Some(bucket) = &limits.bandwidth {
            buckets.bandwidth = TokenBucket::new(bucket, now);
        }
        if let Some(bucket) = &limits.ops {
            buckets.ops = TokenBucket::new(bucket, now);
        }
        let is_limited = buckets.bandwidth.is_some() || buckets.ops.is_some();
        self.is_limited.store(is_limited, Ordering::Relaxed);
    }

    /// Whether one more request of so many bytes may pass now, for which tokens are taken then. If not,
    /// the alarm is set.
    pub fn admits(&self, bytes: u64) -> bool {
        !self.is_limited.load(Ordering::Relaxed) || self.look(bytes, true)
    }

    /// Whether one more request may pass now of which nobody knows yet how many bytes it has: then
    /// [`Self::charge`] says so. If not, the alarm is set.
    pub fn is_open(&self) -> bool {
        !self.is_limited.load(Ordering::Relaxed) || self.look(0, false)
    }

    /// Takes the tokens of a request that has passed.
    pub fn charge(&self, bytes: u64) {
        if self.is_limited.load(Ordering::Relaxed) {
            lock(&self.buckets).take(bytes);
        }
    }

    fn look(&self, bytes: u64, take: bool) -> bool {
        let now = self.begun.elapsed();
        let mut buckets = lock(&self.buckets);
        let wait = buckets.wait(bytes, now);
        if !wait.is_zero() {
            self.alarm.set(wait);
            return false;
        }
        if take {
            buckets.take(bytes);
        }
        true
    }

    /// The descriptor that is readable when there are tokens again: then [`Self::heard`] is to be called,
    /// and what waits looks again.
    #[must_use]
    pub fn source(&self) -> Source {
        Source {
            fd: self.alarm.fd(),
            output: false,
            edge: false,
        }
    }

    /// The alarm was heard.
    pub fn heard(&self) {
        self.alarm.heard();
    }
}

impl Buckets {
    /// How long one request of so many bytes has to wait.
    fn wait(&mut self, bytes: u64, now: Duration) -> Duration {
        let bandwidth = self.bandwidth.as_mut();
        let ops = self.ops.as_mut();
        let bandwidth = bandwidth.map_or(Duration::ZERO, |bucket| bucket.wait(bytes, now));
        bandwidth.max(ops.map_or(Duration::ZERO, |bucket| bucket.wait(1, now)))
    }

    fn take(&mut self, bytes: u64) {
        if let Some(bandwidth) = &mut self.bandwidth {
            bandwidth.take(bytes);
        }
        if let Some(ops) = &mut self.ops {
            ops.take(1);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    /// An alarm that nobody hears: what it was set to.
    #[derive(Default)]
    pub(crate) struct FakeAlarm(pub(crate) Arc<Mutex<Option<Duration>>>);

    impl Alarm for FakeAlarm {
        fn set(&self, after: Duration) {
            *lock(&self.0) = Some(after);
        }

        fn heard(&self) {
            *lock(&self.0) = None;
        }

        fn fd(&self) -> RawFd {
            -1
        }
    }

    fn bucket(size: u64, refill_ms: u64, one_time_burst: u64) -> Bucket {
        Bucket {
            size,
            refill_time: Duration::from_millis(refill_ms),
            one_time_burst,
        }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn what_holds_nothing_or_takes_no_time_is_no_limit() {
        for none in [bucket(0, 100, 5), bucket(100, 0, 5), Bucket::per_second(0)] {
            assert!(TokenBucket::new(&none, ms(0)).is_none(), "{none:?}");
        }
    }

    #[test]
    fn a_bucket_is_refilled_evenly_and_no_fuller_than_full() {
        let mut tokens = TokenBucket::new(&bucket(100, 1000, 0), ms(5000)).expect("a limit");
        tokens.take(100);
        assert_eq!(tokens.wait(1, ms(5000)), ms(10));
        assert_eq!(tokens.wait(30, ms(5100)), ms(200));
        assert_eq!(tokens.wait(30, ms(5300)), ms(0));
        tokens.take(30);
        assert_eq!(tokens.wait(100, ms(99_000)), ms(0));
        tokens.take(100);
        assert_eq!(tokens.wait(1, ms(99_000)), ms(10));
        // Time does not go back; if it did, nothing would be given twice.
        assert_eq!(tokens.wait(1, ms(98_000)), ms(10));
        assert_eq!(tokens.wait(1, ms(99_005)), ms(5));
    }

    #[test]
    fn what_is_there_once_is_used_first_and_never_again() {
        let mut tokens = TokenBucket::new(&bucket(10, 100, 25), ms(0)).expect("a limit");
        assert_eq!(tokens.wait(35, ms(0)), ms(0));
        tokens.take(35);
        assert_eq!(tokens.wait(1, ms(0)), ms(10));
        assert_eq!(tokens.wait(10, ms(60_000)), ms(0));
        tokens.take(10);
        assert_eq!(tokens.wait(10, ms(60_000)), ms(100));
    }

    #[test]
    fn more_than_a_bucket_holds_passes_and_is_paid_for() {
        let mut tokens = TokenBucket::new(&bucket(10, 100, 0), ms(0)).expect("a limit");
        assert_eq!(tokens.wait(50, ms(0)), ms(0));
        tokens.take(50);
        // 40 are owed, 10 in 100 ms.
        assert_eq!(tokens.wait(50, ms(0)), ms(400));
        assert_eq!(tokens.wait(5, ms(0)), ms(450));
        assert_eq!(tokens.wait(5, ms(450)), ms(0));
    }

    #[test]
    fn the_largest_numbers_are_numbers_too() {
        let all = Bucket {
            size: u64::MAX,
            refill_time: Duration::MAX,
            one_time_burst: u64::MAX,
        };
        let mut tokens = TokenBucket::new(&all, Duration::ZERO).expect("a limit");
        for _ in 0..4 {
            tokens.take(u64::MAX);
            tokens.wait(u64::MAX, Duration::MAX);
        }
        assert!(tokens.wait(1, Duration::MAX) > Duration::ZERO);
    }

    #[test]
    fn a_second_has_as_many_as_it_is_to_have() {
        for rate in [1, 7, 100, 1_000_003] {
            let made = Bucket::per_second(rate);
            let mut tokens = TokenBucket::new(&made, ms(0)).expect("a limit");
            let (mut now, mut passed) = (Duration::ZERO, 0);
            let piece = made.size;
            while now < ms(10_000) {
                let wait = tokens.wait(piece, now);
                if wait.is_zero() {
                    tokens.take(piece);
                    passed += piece;
                }
                now += wait;
            }
            let wanted = 10 * rate;
            assert!(
                (wanted..=wanted + 2 * piece + 1).contains(&passed),
                "{rate}: {passed}"
            );
        }
    }

    proptest! {
        /// Whatever is asked for and when: no more passes than there can be tokens for, but for what the
        /// last request has beyond what a bucket holds; and who waits as long as he is told may go on.
        #[test]
        fn no_more_passes_than_there_are_tokens(
            size in 1_u64..5000,
            refill_ms in 1_u64..2000,
            burst in 0_u64..5000,
            steps in proptest::collection::vec((0_u64..20_000, 0_u64..1_000_000_000, any::<bool>()), 1..60),
        ) {
            let mut tokens = TokenBucket::new(&bucket(size, refill_ms, burst), ms(0)).expect("a limit");
            let (mut now, mut passed) = (Duration::ZERO, 0_u64);
            for (wanted, later, waits) in steps {
                now += Duration::from_nanos(later);
                let wait = tokens.wait(wanted, now);
                if waits {
                    now += wait;
                    prop_assert_eq!(tokens.wait(wanted, now), Duration::ZERO);
                } else if !wait.is_zero() {
                    // A moment before it is not there.
                    let before = now + wait - Duration::from_nanos(1);
                    prop_assert!(!tokens.clone().wait(wanted, before).is_zero());
                    continue;
                }
                tokens.take(wanted);
                passed += wanted;
                let refilled = now.as_nanos() * u128::from(size) / u128::from(refill_ms * 1_000_000);
                // One that is larger than the bucket is owed for.
                let owed = if wanted > size { wanted } else { 0 };
                let most = u128::from(size + burst + owed) + refilled;
                prop_assert!(u128::from(passed) <= most, "{passed} of {most}");
            }
        }
    }

    #[test]
    fn whoever_is_held_back_is_called_and_a_change_calls_at_once() {
        let alarm = FakeAlarm::default();
        let set = Arc::clone(&alarm.0);
        let limits = Limits {
            bandwidth: Some(bucket(1 << 20, 3_600_000, 0)),
            ops: None,
        };
        let throttle = Throttle::new(&Limits::default(), Box::new(alarm));
        throttle.heard();
        assert!((0..1000).all(|_| throttle.admits(u64::MAX)));
        throttle.change(&limits);
        assert_eq!(lock(&set).take(), Some(Duration::ZERO));
        assert!(throttle.admits(1 << 20));
        assert!(!throttle.admits(1 << 19));
        let wait = lock(&set).take().expect("an alarm");
        assert!(
            wait > Duration::from_secs(1700) && wait <= Duration::from_secs(1800),
            "{wait:?}"
        );
        // Requests are counted for themselves.
        let ops = Limits {
            bandwidth: Some(bucket(0, 0, 0)),
            ops: Some(bucket(2, 3_600_000, 0)),
        };
        throttle.change(&ops);
        assert!(throttle.is_open());
        throttle.charge(1 << 40);
        assert!(throttle.admits(1 << 40));
        lock(&set).take();
        assert!(!throttle.is_open());
        assert!(lock(&set).is_some());
    }
}
