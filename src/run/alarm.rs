//! The alarm of the guest's clock: when it may be due, also where somebody sets the host's clock.

use crate::clock::ClockWatch;
use anyhow::{Context, Result};
use armlet_devices::pl031::Pl031;
use armlet_devices::sync::lock;
use std::sync::Mutex;
use std::time::Instant;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// The alarm.
pub(super) struct Alarm {
    /// By what epoll tells that the host's clock was set.
    token: u64,
    /// When it may be due.
    due: Option<Instant>,
    /// Tells when the host's clock is set, once there was an alarm.
    clock_set: Option<ClockWatch>,
}

impl Alarm {
    /// No alarm yet; epoll tells by `token` that the host's clock was set.
    pub(super) fn new(token: u64) -> Alarm {
        Alarm {
            token,
            due: None,
            clock_set: None,
        }
    }

    /// A new life of the guest begins.
    pub(super) fn begin_life(&mut self) {
        self.due = None;
    }

    /// When [`Self::set`] is to be called again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.due
    }

    /// Raises an alarm that is due, and finds the next.
    ///
    /// # Errors
    /// A process without room for another descriptor.
    pub(super) fn set(&mut self, epoll: &Epoll, clock: Option<&Mutex<Pl031>>) -> Result<()> {
        self.due = clock.and_then(|clock| {
            let mut clock = lock(clock);
            clock.poll();
            clock
                .deadline()
                .and_then(|left| Instant::now().checked_add(left))
        });
        if self.due.is_some() && self.clock_set.is_none() {
            let watch = ClockWatch::new()?;
            let event = EpollEvent::new(EventSet::IN, self.token);
            epoll
                .ctl(ControlOperation::Add, watch.as_raw_fd(), event)
                .context("cannot watch the host's clock")?;
            self.clock_set = Some(watch);
            // Set between the question and the watch, it would not have told.
            return self.set(epoll, clock);
        }
        Ok(())
    }

    /// Somebody set the host's clock: the alarm is due at another time.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub(super) fn clock_was_set(
        &mut self,
        epoll: &Epoll,
        clock: Option<&Mutex<Pl031>>,
    ) -> Result<()> {
        if let Some(watch) = &self.clock_set {
            watch.again()?;
        }
        self.set(epoll, clock)
    }
}
