//! The alarm of a device: a timer of the kernel's.

use armlet_devices::rate::{Alarm, Bucket, Limits, Throttle};
use armlet_system::eintr::uninterrupted;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// A timer.
pub(crate) struct Timer(OwnedFd);

/// The longest wait: a change of the limits ends it early anyway.
const LONGEST: Duration = Duration::from_secs(1 << 30);

impl Timer {
    /// A timer that is not set.
    ///
    /// # Errors
    /// A process without room for another descriptor.
    pub(crate) fn new() -> io::Result<Timer> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Timer(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }
}

impl Alarm for Timer {
    fn set(&self, after: Duration) {
        // No time at all would stop it.
        let after = after.clamp(Duration::from_nanos(1), LONGEST);
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: after.as_secs() as _,
                tv_nsec: after.subsec_nanos().into(),
            },
        };
        // A timer of ours takes any time.
        let _ = timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once);
    }

    fn heard(&self) {
        let _ = uninterrupted(|| rustix::io::read(&self.0, &mut [0; 8]));
    }

    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// What holds a device to these limits; `None` where there are none, and none will come (`changes`).
///
/// # Errors
/// A process without room for another descriptor.
pub(crate) fn throttle(limits: &Limits, changes: bool) -> io::Result<Option<Arc<Throttle>>> {
    let buckets = [&limits.bandwidth, &limits.ops];
    if !changes && !buckets.into_iter().flatten().any(Bucket::is_limit) {
        return Ok(None);
    }
    Ok(Some(Arc::new(Throttle::new(
        limits,
        Box::new(Timer::new()?),
    ))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    #[test]
    fn whoever_waits_as_long_as_the_alarm_says_passes() {
        let per_second = Limits {
            bandwidth: None,
            ops: Some(Bucket::per_second(50)),
        };
        assert!(throttle(&Limits::default(), false).expect("room").is_none());
        let throttle = throttle(&per_second, false).expect("room").expect("limits");
        let epoll = Epoll::new().expect("a descriptor");
        let event = EpollEvent::new(EventSet::IN, 0);
        let fd = throttle.source().fd;
        epoll
            .ctl(ControlOperation::Add, fd, event)
            .expect("it can be waited for");
        throttle.heard();
        let begun = Instant::now();
        let mut passed = 0;
        while passed < 15 {
            if throttle.admits(0) {
                passed += 1;
                continue;
            }
            let rings = epoll.wait(60_000, &mut [EpollEvent::default()]);
            assert_eq!(rings.expect("a wait"), 1, "it never rings");
            throttle.heard();
        }
        // Five are there, and 20 ms bring one.
        assert!(begun.elapsed() >= Duration::from_millis(199));
    }
}
