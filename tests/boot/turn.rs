use std::sync::{Condvar, Mutex, OnceLock, PoisonError};

/// Who may load the host.
struct Queue {
    /// CPUs that no guest of a test has.
    free: usize,
    /// How many turns were asked for.
    asked: u64,
    /// How many were given, in the order of asking.
    given: u64,
}

static QUEUE: OnceLock<(Mutex<Queue>, Condvar)> = OnceLock::new();

/// The right to load some of the host's CPUs, until it is dropped.
pub(crate) struct Turn {
    cpus: usize,
}

impl Turn {
    /// Waits until `cpus` of the host's CPUs are free, or all of them where there are not so many.
    ///
    /// A test that holds one must not wait for another.
    pub(crate) fn of(cpus: usize) -> Turn {
        let all = std::thread::available_parallelism().map_or(1, usize::from);
        let queue = Queue {
            free: all,
            asked: 0,
            given: 0,
        };
        let (queue, changed) = QUEUE.get_or_init(|| (Mutex::new(queue), Condvar::new()));
        let cpus = cpus.min(all);
        let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = queue.asked;
        queue.asked += 1;
        while queue.given < ours || queue.free < cpus {
            queue = changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        queue.given += 1;
        queue.free -= cpus;
        changed.notify_all();
        Turn { cpus }
    }

    /// Waits until no guest runs.
    pub(crate) fn alone() -> Turn {
        Turn::of(usize::MAX)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some((queue, changed)) = QUEUE.get() {
            queue.lock().unwrap_or_else(PoisonError::into_inner).free += self.cpus;
            changed.notify_all();
        }
    }
}
