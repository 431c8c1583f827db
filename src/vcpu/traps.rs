//! vCPUs that stopped for the debugger, on their way to its thread.

use armlet_devices::sync::lock;
use kvm_bindings::kvm_debug_exit_arch;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// A vCPU that stopped, and what KVM says of it.
pub type Trap = (usize, kvm_debug_exit_arch);

/// What happened since the debugger last looked.
#[derive(Debug, Default)]
pub struct Happened {
    /// The vCPUs that stopped, each at most once: they stand still until they are released.
    pub traps: Vec<Trap>,
    /// The guest was started, or started again: its vCPUs are new.
    pub is_new_life: bool,
    /// The guest has ended, and armlet ends with this status.
    pub ended: Option<u8>,
}

/// What vCPUs and the event loop tell the debugger's thread.
#[derive(Debug)]
pub struct Traps {
    happened: Mutex<Happened>,
    /// Notified when the end was heard.
    heard: Condvar,
    /// A byte is written to the second, and read from the first, for what has happened.
    bell: [UnixStream; 2],
    holds: AtomicBool,
}

impl Traps {
    /// Nothing has happened; `holds` as [`Self::holds`] returns it.
    ///
    /// # Errors
    /// A process without room for more descriptors.
    pub fn new(holds: bool) -> std::io::Result<Traps> {
        let (heard, rung) = UnixStream::pair()?;
        heard.set_nonblocking(true)?;
        rung.set_nonblocking(true)?;
        Ok(Traps {
            happened: Mutex::default(),
            heard: Condvar::new(),
            bell: [heard, rung],
            holds: AtomicBool::new(holds),
        })
    }

    /// Readable when something has happened.
    #[must_use]
    pub fn bell(&self) -> &UnixStream {
        &self.bell[0]
    }

    fn ring(&self) {
        // One that is full is heard.
        let _ = (&self.bell[1]).write(&[0]);
    }

    /// Whether the guest is to be held before its first instruction.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.holds.load(Ordering::Acquire)
    }

    /// Sets whether the guest is to be held before its next first instruction.
    pub fn set_holds(&self, holds: bool) {
        self.holds.store(holds, Ordering::Release);
    }

    /// A vCPU has stopped, and holds itself.
    pub(super) fn tell(&self, index: usize, exit: kvm_debug_exit_arch) {
        lock(&self.happened).traps.push((index, exit));
        self.ring();
    }

    /// The guest is about to start, or to start again.
    pub fn begin_life(&self) {
        let mut happened = lock(&self.happened);
        happened.traps.clear();
        happened.is_new_life = true;
        self.ring();
    }

    /// The guest has ended; waits up to `limit` for the debugger to hear it.
    pub fn end(&self, status: u8, limit: Duration) {
        let mut happened = lock(&self.happened);
        happened.ended = Some(status);
        self.ring();
        let waited = self
            .heard
            .wait_timeout_while(happened, limit, |happened| happened.ended.is_some());
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Returns what has happened.
    pub fn take(&self) -> Happened {
        while matches!((&self.bell[0]).read(&mut [0; 16]), Ok(16)) {}
        let mut happened = lock(&self.happened);
        let ended = happened.ended;
        let taken = std::mem::take(&mut *happened);
        // Until it was told of.
        happened.ended = ended;
        taken
    }

    /// Whoever waits for the end to be heard goes on.
    pub fn end_was_told(&self) {
        lock(&self.happened).ended = None;
        self.heard.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn what_happens_is_heard_once_and_the_end_waits_for_that() {
        let traps = Arc::new(Traps::new(true).expect("a descriptor"));
        assert!(traps.holds());
        traps.tell(1, kvm_debug_exit_arch::default());
        let happened = traps.take();
        assert_eq!((happened.traps.len(), happened.is_new_life), (1, false));
        assert!(traps.take().traps.is_empty());
        // Those of another life are void.
        traps.tell(0, kvm_debug_exit_arch::default());
        traps.begin_life();
        let happened = traps.take();
        assert!(happened.traps.is_empty() && happened.is_new_life);
        let told = Arc::clone(&traps);
        let ends = std::thread::spawn(move || told.end(4, Duration::from_secs(60)));
        let status = loop {
            match traps.take().ended {
                Some(status) => break status,
                None => std::thread::yield_now(),
            }
        };
        assert_eq!(status, 4);
        traps.end_was_told();
        ends.join().expect("no panic");
        // Nobody listens, and it does not wait for ever.
        traps.end(0, Duration::from_millis(1));
    }
}
