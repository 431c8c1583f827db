//! How the host's scheduler treats a thread when it wakes.

use libc::{SCHED_BATCH, SCHED_OTHER};

/// The calling thread's policy, as far as this program changes it.
pub struct Policy {
    /// Whether it is one that this program may change.
    is_ours: bool,
    batch: bool,
}

impl Policy {
    /// The policy that the calling thread has. Whoever gave the process one of real time, or another
    /// than the common one, keeps it.
    #[must_use]
    pub fn of_this_thread() -> Policy {
        // SAFETY: the call takes a number and changes nothing. musl's function of this name only fails.
        let policy = unsafe { libc::syscall(libc::SYS_sched_getscheduler, 0) };
        Policy {
            is_ours: policy == libc::c_long::from(SCHED_OTHER),
            batch: false,
        }
    }

    /// Chooses whether the calling thread preempts another of the common policy when it wakes, as it
    /// does unless told otherwise, or waits for the CPU until that one sleeps or has had its time
    /// (sched(7): SCHED_BATCH). On a CPU that idles it runs at once either way; its nice value stays.
    /// Where the host forbids it, all stays as it is.
    pub fn set_batch(&mut self, batch: bool) {
        if !self.is_ours || self.batch == batch {
            return;
        }
        let policy = match batch {
            true => SCHED_BATCH,
            false => SCHED_OTHER,
        };
        let priority: libc::c_int = 0;
        // SAFETY: the call reads one number from `priority` (struct sched_param, as the kernel has
        // it) and concerns the calling thread alone.
        let done =
            unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &raw const priority) };
        match done {
            0 => self.batch = batch,
            _ => self.is_ours = self.batch,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> libc::c_long {
        // SAFETY: as above.
        unsafe { libc::syscall(libc::SYS_sched_getscheduler, 0) }
    }

    #[test]
    fn the_policy_of_a_thread_is_changed_and_restored() {
        let mut own = Policy::of_this_thread();
        for batch in [true, true, false] {
            own.set_batch(batch);
            let expected = if batch { SCHED_BATCH } else { SCHED_OTHER };
            assert_eq!(policy(), libc::c_long::from(expected));
        }
    }

    #[test]
    fn another_policy_is_left_alone() {
        let priority: libc::c_int = 0;
        // SAFETY: as above.
        let done = unsafe {
            libc::syscall(
                libc::SYS_sched_setscheduler,
                0,
                libc::SCHED_IDLE,
                &raw const priority,
            )
        };
        assert_eq!(done, 0);
        Policy::of_this_thread().set_batch(true);
        assert_eq!(policy(), libc::c_long::from(libc::SCHED_IDLE));
    }
}
