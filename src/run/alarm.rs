//! The alarm of the guest's clock: when it is due, even if the host's clock is set.

use crate::clock::ClockWatch;
use anyhow::{Context, Result};
use armlet_devices::pl031::Pl031;
use armlet_devices::sync::lock;
use std::sync::Mutex;
use std::time::Instant;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// The alarm.
pub(super) struct Alarm {
    /// The epoll token of the watch on the host's clock.
    token: u64,
    /// When it may be due.
    due: Option<Instant>,
    /// The watch on the host's clock, once the guest has set an alarm.
    clock_set: Option<ClockWatch>,
}

impl Alarm {
    /// Creates an unset alarm; `token` is the epoll token of the watch on the host's clock.
    pub(super) fn new(token: u64) -> Alarm {
        Alarm {
            token,
            due: None,
            clock_set: None,
        }
    }

    /// Begins a new life of the guest.
    pub(super) fn begin_life(&mut self) {
        self.due = None;
    }

    /// Returns when to call [`Self::set`] again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.due
    }

    /// Raises an alarm that is due, and determines the next deadline.
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
            // The host's clock may have been set before the watch existed, so ask again.
            return self.set(epoll, clock);
        }
        Ok(())
    }

    /// Recomputes the deadline after the host's clock was set.
    ///
    /// # Errors
    /// The kernel's error.
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
