//! Requests to a vCPU's thread: run, pause, run a task on its vCPU, stop.
//!
//! The thread checks for requests before it first enters the guest, and after that only when it was
//! kicked, that is, when KVM_RUN fails with EINTR: a running guest pays nothing for it. A kick
//! cannot be lost: one that comes before KVM_RUN makes it return at once ([`crate::kvm::kick`]).
//! KVM_RUN has then completed the last MMIO or port access (Documentation/virt/kvm/api.rst, section
//! 5: immediate_exit), so the vCPU's registers are consistent, between two instructions of the
//! guest.

use armlet_devices::sync::lock;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// The requested mode of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Run,
    Pause,
    Stop,
}

/// The state of a vCPU's thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stand {
    /// It runs the guest, or handles an exit.
    Running,
    /// It waits to be resumed, and runs tasks meanwhile.
    Paused,
    /// It has ended.
    Ended,
}

/// A task to run on a vCPU's thread.
type Task<V> = Box<dyn FnOnce(&mut V) + Send>;

struct Asked<V> {
    mode: Mode,
    /// Whether the debugger holds it, whatever the mode but [`Mode::Stop`].
    held: bool,
    tasks: VecDeque<Task<V>>,
    stand: Stand,
}

/// The requests to one vCPU's thread. Whoever makes a request also kicks the thread.
pub(super) struct Control<V> {
    asked: Mutex<Asked<V>>,
    /// Notified of a new request, or when the thread's state has changed.
    changed: Condvar,
}

impl<V> Default for Control<V> {
    fn default() -> Control<V> {
        Control {
            asked: Mutex::new(Asked {
                mode: Mode::Run,
                held: false,
                tasks: VecDeque::new(),
                stand: Stand::Running,
            }),
            changed: Condvar::new(),
        }
    }
}

impl<V> Control<V> {
    /// Requests that the thread run the guest.
    pub(super) fn run(&self) {
        self.set(Mode::Run);
    }

    /// Requests that the thread pause, outside the guest.
    pub(super) fn pause(&self) {
        self.set(Mode::Pause);
    }

    /// Requests that the thread end.
    pub(super) fn stop(&self) {
        self.set(Mode::Stop);
    }

    /// Requests that the thread wait outside the guest, as if paused, until it is released: what the
    /// debugger does, beside pauses.
    pub(super) fn hold(&self) {
        self.set_held(true);
    }

    /// Ends a hold.
    pub(super) fn release(&self) {
        self.set_held(false);
    }

    fn set_held(&self, held: bool) {
        lock(&self.asked).held = held;
        self.changed.notify_all();
    }

    fn set(&self, mode: Mode) {
        lock(&self.asked).mode = mode;
        self.changed.notify_all();
    }

    /// Has the thread run `task` on its vCPU, between two instructions of the guest, whether it is
    /// paused or not. Returns false, and drops the task, if the thread has ended; a thread that
    /// ends first drops it too.
    #[must_use]
    pub(super) fn ask(&self, task: impl FnOnce(&mut V) + Send + 'static) -> bool {
        let mut asked = lock(&self.asked);
        if asked.stand == Stand::Ended {
            return false;
        }
        asked.tasks.push_back(Box::new(task));
        self.changed.notify_all();
        true
    }

    /// Returns the thread's state.
    #[must_use]
    pub(super) fn stand(&self) -> Stand {
        lock(&self.asked).stand
    }

    /// Waits up to `limit` for the thread to leave the state `stand`.
    pub(super) fn wait_while(&self, stand: Stand, limit: Duration) {
        let asked = lock(&self.asked);
        let waited = self
            .changed
            .wait_timeout_while(asked, limit, |asked| asked.stand == stand);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Carries out pending requests; called by the thread, outside the guest. Returns whether to
    /// run the guest.
    #[must_use]
    pub(super) fn obey(&self, vcpu: &mut V) -> bool {
        let mut asked = lock(&self.asked);
        loop {
            if let Some(task) = asked.tasks.pop_front() {
                // A task may take long, and make requests itself.
                drop(asked);
                task(vcpu);
                asked = lock(&self.asked);
                continue;
            }
            match asked.mode {
                Mode::Run if !asked.held => {
                    asked.stand = Stand::Running;
                    return true;
                }
                Mode::Stop => return false,
                Mode::Run | Mode::Pause => {
                    if asked.stand != Stand::Paused {
                        asked.stand = Stand::Paused;
                        self.changed.notify_all();
                    }
                    let waited = self.changed.wait(asked);
                    asked = waited.unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Marks the thread as ended when it is dropped.
    #[must_use]
    pub(super) fn until_end(&self) -> UntilEnd<'_, V> {
        UntilEnd(self)
    }
}

/// See [`Control::until_end`].
pub(super) struct UntilEnd<'a, V>(&'a Control<V>);

impl<V> Drop for UntilEnd<'_, V> {
    fn drop(&mut self) {
        let mut asked = lock(&self.0.asked);
        asked.stand = Stand::Ended;
        let dropped = std::mem::take(&mut asked.tasks);
        self.0.changed.notify_all();
        // Tasks are dropped without the lock, because that notifies those who wait for them.
        drop(asked);
        drop(dropped);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::mpsc::{RecvError, channel};
    use std::thread::JoinHandle;

    const LONG: Duration = Duration::from_secs(60);

    /// Starts a thread that counts in a guest's stead, and checks its control after each count.
    fn start(control: &Arc<Control<u64>>) -> (JoinHandle<u64>, Arc<AtomicU64>) {
        let control = Arc::clone(control);
        let count = Arc::new(AtomicU64::new(0));
        let shown = Arc::clone(&count);
        let run = move || {
            let _end = control.until_end();
            let mut vcpu = 0;
            while control.obey(&mut vcpu) {
                vcpu += 1;
                shown.store(vcpu, Ordering::Relaxed);
                std::thread::yield_now();
            }
            vcpu
        };
        (std::thread::spawn(run), count)
    }

    fn read(control: &Control<u64>) -> u64 {
        let (answer, answered) = channel();
        assert!(control.ask(move |vcpu| answer.send(*vcpu).expect("who asks waits")));
        answered.recv().expect("an answer")
    }

    #[test]
    fn a_paused_thread_stands_still_answers_and_goes_on() {
        let control = Arc::new(Control::default());
        let (thread, count) = start(&control);
        while count.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        for _ in 0..50 {
            control.pause();
            control.wait_while(Stand::Running, LONG);
            assert_eq!(control.stand(), Stand::Paused);
            let held = read(&control);
            std::thread::yield_now();
            assert_eq!(count.load(Ordering::Relaxed), held);
            assert_eq!(read(&control), held, "and it is paused still");
            assert_eq!(control.stand(), Stand::Paused);
            control.run();
            while count.load(Ordering::Relaxed) == held {
                std::thread::yield_now();
            }
        }
        control.stop();
        let end = thread.join().expect("no panic");
        assert_eq!(end, count.load(Ordering::Relaxed));
        assert_eq!(control.stand(), Stand::Ended);
    }

    #[test]
    fn a_hold_outlasts_pauses_and_a_stop_ends_it() {
        let control = Arc::new(Control::default());
        control.hold();
        let (thread, count) = start(&control);
        control.wait_while(Stand::Running, LONG);
        assert_eq!(control.stand(), Stand::Paused, "held before it began");
        control.pause();
        control.run();
        assert_eq!((read(&control), control.stand()), (0, Stand::Paused));
        control.release();
        while count.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        control.hold();
        control.wait_while(Stand::Running, LONG);
        assert_eq!(control.stand(), Stand::Paused);
        control.stop();
        thread.join().expect("no panic");
    }

    #[test]
    fn a_running_thread_answers_and_a_paused_one_stops() {
        let control = Arc::new(Control::default());
        let (thread, count) = start(&control);
        let first = read(&control);
        while count.load(Ordering::Relaxed) <= first {
            std::thread::yield_now();
        }
        assert!(control.ask(|vcpu| *vcpu += 1_000_000));
        assert!(read(&control) > 1_000_000);
        control.pause();
        control.wait_while(Stand::Running, LONG);
        control.stop();
        control.wait_while(Stand::Paused, LONG);
        assert_eq!(control.stand(), Stand::Ended);
        thread.join().expect("no panic");
    }

    #[test]
    fn who_asks_a_thread_that_ends_hears_that_there_is_no_answer() {
        let control: Control<u64> = Control::default();
        let (answer, answered) = channel();
        let end = control.until_end();
        assert!(control.ask(move |vcpu| answer.send(*vcpu).expect("who asks waits")));
        drop(end);
        assert_eq!(answered.recv(), Err(RecvError));
        assert!(!control.ask(|_| unreachable!()));
    }

    #[test]
    fn a_wait_for_a_thread_has_an_end() {
        let control: Control<u64> = Control::default();
        control.pause();
        control.wait_while(Stand::Running, Duration::from_millis(1));
        assert_eq!(control.stand(), Stand::Running);
    }
}
