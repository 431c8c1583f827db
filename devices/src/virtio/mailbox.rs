//! How a transport reaches its device: by a lock, or by the mailbox of the thread that owns it.
//!
//! A vCPU that resets or configures a device needs it for a moment, while the thread that works with
//! a busy one may be in the middle of a request for long. So that thread owns the device; others submit
//! commands to it and wait until they are done, and the thread looks for commands between two requests.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::VirtioDevice;
use crate::sync::{bell, lock, ring};

/// How long someone waits for a device before a warning is logged.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long the owner of a device pauses for callers whose commands it has completed, beside the
/// slack of the host's timers.
const COURTESY: Duration = Duration::from_micros(20);
/// How often a lock that is taken is tried again.
const POLL_INTERVAL: Duration = Duration::from_micros(100);

/// Something to be done with a device.
pub type Command = Box<dyn FnOnce(&mut dyn VirtioDevice) + Send>;

/// Access to a device, whether it is behind a lock or owned by a thread.
pub trait Access: Send + Sync {
    /// Runs a command on the device, and returns when it is done. `what` names command and device
    /// for the warning about a long wait. The wait has no deadline, because a driver may reuse its
    /// memory as soon as its write to a register returns.
    fn run(&self, what: fmt::Arguments<'_>, command: Command);

    /// Has the device serve a queue that was kicked on this thread, if it [answers at
    /// once](VirtioDevice::answers_at_once) and nobody has it just now. Returns whether it did.
    fn answer(&self, queue: usize) -> bool {
        let _ = queue;
        false
    }
}

/// Logs that a wait takes long, at increasing intervals.
struct Patience {
    begun: Instant,
    warned: Duration,
}

impl Patience {
    fn new() -> Patience {
        Patience {
            begun: Instant::now(),
            warned: PATIENCE,
        }
    }

    /// Logs a warning if one is due; returns the time until the next one.
    fn look(&mut self, what: fmt::Arguments<'_>) -> Duration {
        let waited = self.begun.elapsed();
        if waited >= self.warned {
            self.warned *= 2;
            log::warn!(
                "{what} has waited {} s for a request that the host is processing",
                waited.as_secs()
            );
        }
        self.warned.saturating_sub(waited)
    }
}

/// Returns the access to a device behind a lock that nobody holds for long.
#[must_use]
pub fn direct(device: Arc<Mutex<dyn VirtioDevice>>) -> Arc<dyn Access> {
    Arc::new(Direct(device))
}

/// Access to a device behind a lock, which nobody holds for long.
struct Direct(Arc<Mutex<dyn VirtioDevice>>);

impl Access for Direct {
    fn run(&self, what: fmt::Arguments<'_>, command: Command) {
        let mut patience = Patience::new();
        let mut device = loop {
            match self.0.try_lock() {
                Ok(device) => break device,
                Err(TryLockError::Poisoned(device)) => break device.into_inner(),
                Err(TryLockError::WouldBlock) => {}
            }
            patience.look(what);
            std::thread::sleep(POLL_INTERVAL);
        };
        command(&mut *device);
    }

    fn answer(&self, queue: usize) -> bool {
        let Ok(mut device) = self.0.try_lock() else {
            return false;
        };
        let answers = device.answers_at_once(queue);
        if answers {
            device.kicked(queue);
        }
        answers
    }
}

/// Runs a command on a device, and returns its result.
pub(crate) fn ask<T: Send + 'static>(
    device: &dyn Access,
    what: std::fmt::Arguments<'_>,
    work: impl FnOnce(&mut dyn VirtioDevice) -> T + Send + 'static,
) -> T {
    let answer = Arc::new(Mutex::new(None));
    let place = Arc::clone(&answer);
    let command = move |device: &mut dyn VirtioDevice| *lock(&place) = Some(work(device));
    device.run(what, Box::new(command));
    let answer = lock(&answer).take();
    answer.expect("a command that returned was run")
}

/// The mailbox of a device that a thread owns.
pub struct Mailbox {
    device: Arc<Mutex<dyn VirtioDevice>>,
    /// Whether commands are pending.
    is_pending: AtomicBool,
    /// Readable while commands are pending.
    wakeup: EventFd,
    queue: Mutex<Commands>,
    completed: Condvar,
}

#[derive(Default)]
struct Commands {
    /// Whether a thread owns the device; without an owner, each caller runs its own command.
    is_owned: bool,
    commands: VecDeque<Command>,
    /// The number of commands submitted and completed so far.
    submitted: u64,
    completed: u64,
    /// The number of callers that wait, or have not noticed yet that their commands are completed.
    callers: usize,
}

impl Mailbox {
    /// Creates the mailbox of a device that has no owner yet.
    ///
    /// # Errors
    /// A process without room for another descriptor.
    pub fn new(device: Arc<Mutex<dyn VirtioDevice>>) -> io::Result<Mailbox> {
        Ok(Mailbox {
            device,
            is_pending: AtomicBool::new(false),
            wakeup: bell()?,
            queue: Mutex::default(),
            completed: Condvar::new(),
        })
    }

    /// Returns the eventfd that is readable while commands are pending, or when the owner is to
    /// stop waiting.
    #[must_use]
    pub fn wakeup(&self) -> &EventFd {
        &self.wakeup
    }

    /// Makes the calling thread the device's owner, until the returned value is dropped.
    #[must_use]
    pub fn own(&self) -> Owner<'_> {
        // In this order: a caller that runs its own command holds both.
        let mut queue = lock(&self.queue);
        let device = lock(&self.device);
        queue.is_owned = true;
        Owner {
            mailbox: self,
            device,
            has_answered: false,
        }
    }
}

impl Mailbox {
    /// Submits a command that nobody waits for: it answers by itself, if it is to. It is run also if
    /// the thread that owns the device ends.
    pub fn post(&self, command: Command) {
        let _ = self.submit(command);
    }

    /// Submits a command, or runs it where nobody owns the device; returns its number if it waits.
    fn submit(&self, command: Command) -> Option<(MutexGuard<'_, Commands>, u64)> {
        let mut queue = lock(&self.queue);
        if !queue.is_owned {
            command(&mut *lock(&self.device));
            return None;
        }
        let number = queue.submitted;
        queue.submitted += 1;
        queue.commands.push_back(command);
        self.is_pending.store(true, Ordering::Release);
        ring(&self.wakeup);
        Some((queue, number))
    }
}

impl Access for Mailbox {
    fn run(&self, what: fmt::Arguments<'_>, command: Command) {
        let Some((mut queue, number)) = self.submit(command) else {
            return;
        };
        queue.callers += 1;
        let mut patience = Patience::new();
        while queue.completed <= number {
            let most = patience.look(what).max(POLL_INTERVAL);
            let waited = self.completed.wait_timeout(queue, most);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        queue.callers -= 1;
    }
}

/// The owner's access to its device.
pub struct Owner<'a> {
    mailbox: &'a Mailbox,
    device: MutexGuard<'a, dyn VirtioDevice + 'static>,
    /// Whether commands were completed since the last request.
    has_answered: bool,
}

impl Owner<'_> {
    /// Returns the device.
    #[must_use]
    pub fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut *self.device
    }

    /// Runs the commands submitted so far, if any; to be called between two requests. Commands
    /// submitted meanwhile wait for the next call, so that a caller that keeps submitting does not
    /// starve the owner's work.
    pub fn run_commands(&mut self) {
        if !self.mailbox.is_pending.load(Ordering::Acquire) {
            return;
        }
        // Commands submitted later signal it again.
        let _ = self.mailbox.wakeup.read();
        self.mailbox.is_pending.store(false, Ordering::Release);
        let count = lock(&self.mailbox.queue).commands.len();
        for _ in 0..count {
            self.run_one();
        }
        self.has_answered |= count > 0;
    }

    /// Runs the commands submitted so far, and pauses for callers that have not noticed yet that their
    /// commands are completed; to be called before a request. On this CPU the scheduler would let a
    /// caller go on when this thread has had its share, which is many requests.
    pub fn before_request(&mut self) {
        self.run_commands();
        if std::mem::take(&mut self.has_answered) && lock(&self.mailbox.queue).callers > 0 {
            std::thread::sleep(COURTESY);
        }
    }

    fn run_one(&mut self) -> bool {
        let command = lock(&self.mailbox.queue).commands.pop_front();
        let Some(command) = command else {
            return false;
        };
        command(&mut *self.device);
        lock(&self.mailbox.queue).completed += 1;
        self.mailbox.completed.notify_all();
        true
    }
}

impl Drop for Owner<'_> {
    /// Runs what is pending, so that nobody waits for an owner that has ended.
    fn drop(&mut self) {
        loop {
            while self.run_one() {}
            let mut queue = lock(&self.mailbox.queue);
            if queue.commands.is_empty() {
                queue.is_owned = false;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::rng::Rng;
    use std::sync::mpsc::channel;

    fn mailbox() -> Arc<Mailbox> {
        let device = Rng::new(Box::new(|_| true));
        Arc::new(Mailbox::new(Arc::new(Mutex::new(device))).expect("a descriptor"))
    }

    fn note(notes: &Arc<Mutex<Vec<u32>>>, number: u32) -> Command {
        let notes = Arc::clone(notes);
        Box::new(move |device| {
            assert_eq!(device.id(), 4);
            lock(&notes).push(number);
        })
    }

    #[test]
    fn without_an_owner_callers_run_their_own_commands() {
        let (mailbox, notes) = (mailbox(), Arc::default());
        mailbox.run(format_args!("a test"), note(&notes, 1));
        assert_eq!(*lock(&notes), [1]);
        drop(mailbox.own());
        mailbox.run(format_args!("a test"), note(&notes, 2));
        assert_eq!(*lock(&notes), [1, 2]);
        assert!(
            mailbox.wakeup().read().is_err(),
            "nobody had to be notified"
        );
    }

    #[test]
    fn commands_run_between_two_requests_and_the_caller_waits() {
        let (mailbox, notes) = (mailbox(), Arc::default());
        let mut owner = mailbox.own();
        let (done, is_done) = channel();
        let (sender, submitted) = (Arc::clone(&mailbox), Arc::clone(&notes));
        let thread = std::thread::spawn(move || {
            for number in 0..1000 {
                sender.run(format_args!("a test"), note(&submitted, number));
                done.send(number).expect("the test listens");
            }
        });
        for number in 0..1000 {
            // Works on a request until a command is pending.
            while !mailbox.is_pending.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            assert!(is_done.try_recv().is_err(), "it does not wait");
            owner.run_commands();
            assert_eq!(is_done.recv(), Ok(number));
        }
        thread.join().expect("it did not panic");
        assert!(lock(&notes).iter().copied().eq(0..1000));
    }

    #[test]
    fn what_is_posted_is_done_in_order_and_nobody_waits_for_it() {
        let (mailbox, notes) = (mailbox(), Arc::default());
        mailbox.post(note(&notes, 1));
        assert_eq!(*lock(&notes), [1]);
        let mut owner = mailbox.own();
        mailbox.post(note(&notes, 2));
        mailbox.post(note(&notes, 3));
        assert_eq!(*lock(&notes), [1], "the owner is at work");
        owner.run_commands();
        assert_eq!(*lock(&notes), [1, 2, 3]);
        mailbox.post(note(&notes, 4));
        drop(owner);
        assert_eq!(*lock(&notes), [1, 2, 3, 4]);
    }

    #[test]
    fn nobody_waits_for_an_owner_that_has_ended() {
        let (mailbox, notes) = (mailbox(), Arc::default());
        let owner = mailbox.own();
        let sender = Arc::clone(&mailbox);
        let command = note(&notes, 1);
        let thread = std::thread::spawn(move || sender.run(format_args!("a test"), command));
        while !mailbox.is_pending.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        drop(owner);
        thread.join().expect("it did not panic");
        mailbox.run(format_args!("a test"), note(&notes, 2));
        assert_eq!(*lock(&notes), [1, 2]);
    }
}
