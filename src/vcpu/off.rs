//! Detects that all vCPUs of a guest are off, so that none is left to turn another one on.
//!
//! KVM turns vCPUs on by itself and does not report it. So when a vCPU goes off, the others are
//! asked one after another, until one is on: each checks its own state, on its own thread. They are
//! asked at no other time, so an idle guest is not disturbed.

use super::event::VcpuEvent;
use armlet_devices::sync::lock;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

const NOBODY: usize = usize::MAX;

/// The check whether all vCPUs of a machine are off.
///
/// Only answers given after the last vCPU went off count: a vCPU that goes off restarts the round.
/// So a vCPU that answered "off" cannot have been turned on since: only a vCPU that was on could do
/// that, and it would either answer that it is on, or restart the round by going off.
#[derive(Debug)]
pub struct OffCheck {
    vcpus: usize,
    /// The vCPU that is being asked. It changes only while `last` is locked.
    asked: AtomicUsize,
    /// The vCPU that went off last.
    last: Mutex<usize>,
}

impl OffCheck {
    /// Creates the check for a machine with `vcpus` vCPUs.
    #[must_use]
    pub fn new(vcpus: usize) -> OffCheck {
        OffCheck {
            vcpus,
            asked: AtomicUsize::new(NOBODY),
            last: Mutex::new(NOBODY),
        }
    }

    /// Starts a round, because vCPU `index` is off now. Returns the event to report.
    #[must_use]
    pub fn begin(&self, index: usize) -> VcpuEvent {
        let mut last = lock(&self.last);
        *last = index;
        self.ask(0, index)
    }

    /// Returns the vCPU that is being asked, if any, which must be kicked.
    #[must_use]
    pub fn asked(&self) -> Option<usize> {
        let asked = self.asked.load(Ordering::Acquire);
        (asked != NOBODY).then_some(asked)
    }

    /// Answers for vCPU `index`, if it is the one being asked; `is_off` checks its state. Returns
    /// the event to report.
    #[must_use]
    pub fn answer(&self, index: usize, is_off: impl FnOnce() -> bool) -> Option<VcpuEvent> {
        // Called after each kick: without the lock, because there is usually nothing to answer.
        if self.asked() != Some(index) {
            return None;
        }
        let last = lock(&self.last);
        if self.asked() != Some(index) {
            return None;
        }
        // With the lock, so that the answer is not older than the round.
        if is_off() {
            return Some(self.ask(index + 1, *last));
        }
        self.asked.store(NOBODY, Ordering::Release);
        None
    }

    /// Asks the first vCPU from `from` on that is not `last`. The caller has the lock.
    fn ask(&self, from: usize, last: usize) -> VcpuEvent {
        let next = (from..self.vcpus).find(|index| *index != last);
        self.asked.store(next.unwrap_or(NOBODY), Ordering::Release);
        match next {
            Some(_) => VcpuEvent::Asked,
            None => VcpuEvent::AllOff,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_only_vcpu_that_is_off_is_all() {
        let check = OffCheck::new(1);
        assert_eq!(check.begin(0), VcpuEvent::AllOff);
        assert_eq!(check.asked(), None);
    }

    #[test]
    fn all_others_are_asked_until_one_is_on() {
        let check = OffCheck::new(4);
        assert_eq!(check.begin(1), VcpuEvent::Asked);
        assert_eq!(check.asked(), Some(0));
        assert_eq!(check.answer(0, || true), Some(VcpuEvent::Asked));
        // The one that went off is not asked.
        assert_eq!(check.asked(), Some(2));
        assert_eq!(check.answer(2, || false), None);
        assert_eq!(check.asked(), None);
        assert_eq!(check.answer(3, || true), None);

        assert_eq!(check.begin(2), VcpuEvent::Asked);
        for (index, told) in [
            (0, VcpuEvent::Asked),
            (1, VcpuEvent::Asked),
            (3, VcpuEvent::AllOff),
        ] {
            assert_eq!(check.asked(), Some(index));
            assert_eq!(check.answer(index, || true), Some(told));
        }
        assert_eq!(check.asked(), None);
    }

    #[test]
    fn who_is_not_asked_looks_at_nothing() {
        let check = OffCheck::new(3);
        assert_eq!(check.answer(1, || unreachable!()), None);
        assert_eq!(check.begin(0), VcpuEvent::Asked);
        assert_eq!(check.asked(), Some(1));
        assert_eq!(check.answer(2, || unreachable!()), None);
    }

    #[test]
    fn an_answer_from_before_another_went_off_does_not_count() {
        let check = OffCheck::new(3);
        // vCPU 1 is off when it is asked; then vCPU 2 turns it on and goes off itself.
        assert_eq!(check.begin(0), VcpuEvent::Asked);
        assert_eq!(check.answer(1, || true), Some(VcpuEvent::Asked));
        assert_eq!(check.asked(), Some(2));
        assert_eq!(check.begin(2), VcpuEvent::Asked);
        assert_eq!(check.answer(2, || true), None);
        assert_eq!(check.answer(0, || true), Some(VcpuEvent::Asked));
        assert_eq!(check.answer(1, || false), None);
        assert_eq!(check.asked(), None);
    }
}
