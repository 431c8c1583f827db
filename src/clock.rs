//! Reports changes of the host's clock: an alarm by wall-clock time is then due at another moment.

use anyhow::{Context, Result};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// A timer that never expires, and that the kernel cancels when the clock is set (timerfd_create(2),
/// TFD_TIMER_CANCEL_ON_SET).
pub struct ClockWatch(OwnedFd);

impl ClockWatch {
    /// Creates a watch that reports changes from now on.
    ///
    /// # Errors
    /// A process without room for more descriptors.
    pub fn new() -> Result<ClockWatch> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer =
            timerfd_create(TimerfdClockId::Realtime, flags).context("cannot make a timer")?;
        let watch = ClockWatch(timer);
        watch.arm()?;
        Ok(watch)
    }

    fn arm(&self) -> Result<()> {
        let never = Timespec {
            tv_sec: i32::MAX.into(),
            tv_nsec: 0,
        };
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: never,
        };
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        timerfd_settime(&self.0, flags, &once).context("cannot set a timer")?;
        Ok(())
    }

    /// Returns the descriptor that becomes readable when the clock is set.
    #[must_use]
    pub fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Rearms the watch after its descriptor was readable.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn again(&self) -> Result<()> {
        // It fails with ECANCELED, once for each change of the clock.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
        self.arm()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    #[test]
    fn a_clock_that_goes_as_it_should_says_nothing() {
        let watch = ClockWatch::new().expect("a timer");
        let epoll = Epoll::new().expect("a descriptor");
        let event = EpollEvent::new(EventSet::IN, 0);
        let added = epoll.ctl(ControlOperation::Add, watch.as_raw_fd(), event);
        added.expect("it can be waited for");
        watch.again().expect("a timer");
        let count = epoll.wait(0, &mut [EpollEvent::default()]);
        assert_eq!(count.expect("a wait"), 0);
    }
}
