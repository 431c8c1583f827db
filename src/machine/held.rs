//! Quiescing the virtio devices of a paused machine: each completes or puts back the requests that
//! it popped, and does no more work until the machine resumes.
//!
//! A device may need long for that, because its storage has to respond. So a separate thread waits,
//! and the attempt is abandoned after a while: devices that are quiesced by then resume at once,
//! and the slow one resumes as soon as it is quiesced.

use anyhow::{Context, Result};
use armlet_devices::sync::lock;
use armlet_devices::virtio::Registers;
use armlet_system::deadline::Deadline;
use armlet_system::signals;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// A virtio device and its name.
pub(super) type Named = (String, Arc<Mutex<dyn Registers>>);

/// Quiesces the virtio devices of a machine, and resumes them.
#[derive(Default)]
pub(super) struct Held(Mutex<State>);

#[derive(Default)]
struct State {
    are_held: bool,
    given_up: Option<GivenUp>,
}

/// An attempt that was abandoned, because it waits for the device of this name.
struct GivenUp {
    attempt: Arc<Attempt>,
    thread: JoinHandle<()>,
    name: String,
}

/// The progress of an attempt to quiesce the devices.
#[derive(Default)]
struct Attempt {
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Default)]
struct Progress {
    /// How many devices are quiesced, from the first on.
    held: usize,
    is_over: bool,
    is_given_up: bool,
}

impl Attempt {
    /// Quiesces one device after another.
    fn run(&self, devices: &[Named]) {
        for (_, device) in devices {
            lock(device).quiesce();
            let mut progress = lock(&self.progress);
            if progress.is_given_up {
                // With the lock held, so that another attempt comes after this.
                lock(device).resume();
                break;
            }
            progress.held += 1;
        }
        lock(&self.progress).is_over = true;
        self.changed.notify_all();
    }

    /// Waits up to `limit` for it to finish; returns whether it has.
    fn wait(&self, limit: Duration) -> bool {
        let progress = lock(&self.progress);
        let waited = self
            .changed
            .wait_timeout_while(progress, limit, |progress| !progress.is_over);
        waited.unwrap_or_else(PoisonError::into_inner).0.is_over
    }

    /// Abandons the attempt, unless all of `devices` are quiesced.
    ///
    /// # Errors
    /// The name of the first that is not. All devices then resume.
    fn end(&self, devices: &[Named]) -> Result<(), String> {
        let mut progress = lock(&self.progress);
        if progress.held == devices.len() {
            return Ok(());
        }
        progress.is_given_up = true;
        for (_, device) in &devices[..progress.held] {
            lock(device).resume();
        }
        Err(devices[progress.held].0.clone())
    }
}

impl Held {
    /// Quiesces `devices`. No vCPU may be running.
    ///
    /// # Errors
    /// What took longer than `limit`, as a sentence. All devices then resume, the slow one as soon
    /// as it can.
    pub(super) fn hold(&self, devices: &[Named], limit: Duration) -> Result<(), String> {
        let mut state = lock(&self.0);
        if state.are_held || devices.is_empty() {
            return Ok(());
        }
        let busy = |name: &str| {
            let limit = limit.as_millis();
            format!("{name} has not finished its requests within {limit} ms")
        };
        let deadline = Deadline::after(limit);
        if let Some(earlier) = state.given_up.take() {
            if !earlier.attempt.wait(limit) {
                let error = busy(&earlier.name);
                state.given_up = Some(earlier);
                return Err(error);
            }
            // A panic of the thread was already reported.
            let _ = earlier.thread.join();
        }
        let attempt = Arc::new(Attempt::default());
        let (tried, owned) = (Arc::clone(&attempt), devices.to_vec());
        let thread = std::thread::Builder::new()
            .name("hold".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || tried.run(&owned))
            .context("cannot start the thread that quiesces the devices")
            .map_err(|error| format!("{error:#}"))?;
        attempt.wait(deadline.left());
        match attempt.end(devices) {
            Ok(()) => {
                state.are_held = true;
                let _ = thread.join();
                Ok(())
            }
            Err(name) => {
                let error = busy(&name);
                state.given_up = Some(GivenUp {
                    attempt,
                    thread,
                    name,
                });
                Err(error)
            }
        }
    }

    /// Notes that all devices were quiesced by whoever restored them.
    pub(super) fn are_quiesced(&self) {
        lock(&self.0).are_held = true;
    }

    /// Returns whether the devices are quiesced.
    pub(super) fn is_on(&self) -> bool {
        lock(&self.0).are_held
    }

    /// Resumes quiesced `devices`.
    pub(super) fn release(&self, devices: &[Named]) {
        if std::mem::take(&mut lock(&self.0).are_held) {
            for (_, device) in devices {
                lock(device).resume();
            }
        }
    }
}

/// Small, so that a huge page never backs it.
const STACK_BYTES: usize = 128 << 10;

impl Drop for Held {
    /// Waits for an abandoned attempt, so that no device resumes after the machine is gone.
    fn drop(&mut self) {
        let given_up = lock(&self.0).given_up.take();
        if let Some(GivenUp { thread, name, .. }) = given_up {
            signals::waiting_for(format_args!("{name} to finish its requests"));
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use armlet_devices::virtio::mailbox::direct;
    use armlet_devices::virtio::mmio::{Mmio, NoPage};
    use armlet_devices::virtio::{
        ConfigSpace, Driver, Positions, StartError, VirtioDevice, Virtqueue,
    };
    use armlet_devices::{Device, IrqLine};
    use std::sync::mpsc::{Receiver, Sender, channel};
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    const SOON: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(60);

    /// A device that reports its calls, and finishes only when the test lets it.
    struct Slow {
        name: &'static str,
        tell: Sender<String>,
        finish: Receiver<()>,
    }

    impl Slow {
        fn tell(&self, what: &str) {
            let _ = self.tell.send(format!("{} {what}", self.name));
        }
    }

    impl VirtioDevice for Slow {
        fn id(&self) -> u32 {
            4
        }

        fn queue_sizes(&self) -> Vec<u16> {
            vec![8]
        }

        fn config(&self) -> Arc<ConfigSpace> {
            ConfigSpace::new(Vec::new())
        }

        fn start(&mut self, _driver: Driver) -> Result<(), StartError> {
            self.tell("starts");
            Ok(())
        }

        fn quiesce(&mut self) -> Positions {
            self.finish.recv().expect("the test lets it");
            self.tell("is held");
            Positions::new()
        }

        fn reset(&mut self) {}

        fn stop_queue(&mut self, _queue: usize) {}

        fn start_queue(&mut self, _queue: Virtqueue) -> Result<(), StartError> {
            Ok(())
        }

        fn kicked(&mut self, _queue: usize) {}
    }

    struct NoLine;

    impl IrqLine for NoLine {
        fn set(&self, _high: bool) {}

        fn pulse(&self) {}
    }

    /// Returns a device that its driver has started, and the sender that lets it finish.
    fn started(name: &'static str, tell: &Sender<String>) -> (Named, Sender<()>) {
        let (finish, finished) = channel();
        let device = Slow {
            name,
            tell: tell.clone(),
            finish: finished,
        };
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]);
        let mut mmio = Mmio::new(
            name.to_owned(),
            direct(Arc::new(Mutex::new(device))),
            Arc::new(memory.expect("a page")),
            Arc::new(NoLine),
            None,
            Arc::new(NoPage),
        )
        .expect("descriptors");
        // Status; DriverFeaturesSel and DriverFeatures: VERSION_1.
        let writes = [(0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x70, 15)];
        for (offset, value) in writes {
            let _ = mmio.write(offset, &u32::to_le_bytes(value));
        }
        ((name.to_owned(), Arc::new(Mutex::new(mmio))), finish)
    }

    #[test]
    fn devices_are_held_once_and_go_on() {
        let (tell, told) = channel();
        let (first, first_finishes) = started("first", &tell);
        let (second, second_finishes) = started("second", &tell);
        let devices = [first, second];
        let next = || told.recv_timeout(LONG).expect("something happens");
        assert_eq!([next(), next()], ["first starts", "second starts"]);
        let held = Held::default();
        for _ in 0..2 {
            first_finishes.send(()).expect("it listens");
            second_finishes.send(()).expect("it listens");
            assert_eq!(held.hold(&devices, LONG), Ok(()));
            assert_eq!([next(), next()], ["first is held", "second is held"]);
            // A second call has no further effect.
            assert_eq!(held.hold(&devices, LONG), Ok(()));
            held.release(&devices);
            assert_eq!([next(), next()], ["first starts", "second starts"]);
            held.release(&devices);
            assert!(told.try_recv().is_err());
        }
    }

    #[test]
    fn a_device_that_does_not_finish_is_named_and_all_go_on() {
        let (tell, told) = channel();
        let (first, first_finishes) = started("first", &tell);
        let (second, second_finishes) = started("second", &tell);
        let (third, third_finishes) = started("third", &tell);
        let devices = [first, second, third];
        let next = || told.recv_timeout(LONG).expect("something happens");
        let starts = ["first starts", "second starts", "third starts"];
        assert_eq!([next(), next(), next()], starts);
        let held = Held::default();
        first_finishes.send(()).expect("it listens");
        let refused = held.hold(&devices, SOON).expect_err("it waits");
        let wanted = "second has not finished its requests within 20 ms";
        assert_eq!(refused, wanted);
        assert_eq!([next(), next()], ["first is held", "first starts"]);
        assert_eq!(held.hold(&devices, SOON), Err(wanted.to_owned()));
        second_finishes.send(()).expect("it listens");
        assert_eq!([next(), next()], ["second is held", "second starts"]);
        for finish in [&first_finishes, &second_finishes, &third_finishes] {
            finish.send(()).expect("it listens");
        }
        assert_eq!(held.hold(&devices, LONG), Ok(()));
        let held_in_order = ["first is held", "second is held", "third is held"];
        assert_eq!([next(), next(), next()], held_in_order);
        held.release(&devices);
        assert_eq!([next(), next(), next()], starts);
    }

    #[test]
    fn a_machine_that_is_taken_down_waits_for_a_device_that_was_given_up() {
        let (tell, told) = channel();
        let (device, finish) = started("disk", &tell);
        let devices = [device];
        let held = Held::default();
        held.hold(&devices, SOON).expect_err("it waits");
        let thread = std::thread::spawn(move || drop(held));
        std::thread::sleep(SOON);
        assert!(!thread.is_finished());
        finish.send(()).expect("it listens");
        thread.join().expect("no panic");
        let said: Vec<String> = told.try_iter().collect();
        assert_eq!(said, ["disk starts", "disk is held", "disk starts"]);
    }
}
