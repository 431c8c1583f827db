//! Waits for the kicks and the event sources of virtio devices, and calls the devices.
//!
//! Light devices share the event loop's thread, which watches the reactor's own descriptor; a busy
//! device has a [`Worker`].

use anyhow::{Context, Result};
use armlet_devices::sync::{lock, ring};
use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::mailbox::{Command, Mailbox, Owner};
use armlet_system::eintr::events;
use armlet_system::scheduling::Policy;
use armlet_system::signals;
use batching::Batching;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

mod batching;

/// The most events that one turn handles; further ones wait for the next.
const EVENTS: usize = 8;
/// The bit of an epoll token that tells a kick from a source.
const KICK: u64 = 1 << 31;
/// The token of a worker's bell.
const BELL: u64 = u64::MAX;

/// Devices, and one descriptor to wait for all of them.
pub struct Reactor {
    epoll: Epoll,
    devices: Vec<Watched>,
}

struct Watched {
    device: Arc<Mutex<dyn VirtioDevice>>,
    /// They stay open for as long as they are waited for.
    _kicks: Vec<Arc<EventFd>>,
}

impl Reactor {
    /// A reactor without devices.
    ///
    /// # Errors
    /// A process without room for more descriptors.
    pub fn new() -> Result<Reactor> {
        Ok(Reactor {
            epoll: Epoll::new().context("cannot make an epoll instance")?,
            devices: Vec::new(),
        })
    }

    /// Has `device` called for its kicks (descriptors by queue) and its sources.
    ///
    /// # Errors
    /// A descriptor that cannot be waited for.
    pub fn add(
        &mut self,
        device: Arc<Mutex<dyn VirtioDevice>>,
        kicks: &[Arc<EventFd>],
    ) -> Result<()> {
        let index = (self.devices.len() as u64) << 32;
        let (sources, takes_kicks) = {
            let device = lock(&device);
            (device.sources(), device.takes_kicks())
        };
        for (source, token) in sources.iter().zip(index..) {
            let mut events = EventSet::IN;
            if source.output {
                events |= EventSet::OUT;
            }
            if source.edge {
                events |= EventSet::EDGE_TRIGGERED;
            }
            self.watch(source.fd, events, token)?;
        }
        let kicks = match takes_kicks {
            true => kicks.to_vec(),
            false => Vec::new(),
        };
        for (kick, queue) in kicks.iter().zip(0..) {
            // Each kick is told of once, so that nobody has to read it away. Its counter only grows,
            // and will not run over.
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            self.watch(kick.as_raw_fd(), events, index | KICK | queue)?;
        }
        self.devices.push(Watched {
            device,
            _kicks: kicks,
        });
        Ok(())
    }

    fn watch(&self, fd: RawFd, events: EventSet, token: u64) -> Result<()> {
        let event = EpollEvent::new(events, token);
        self.epoll
            .ctl(ControlOperation::Add, fd, event)
            .with_context(|| format!("cannot wait for descriptor {fd} of a device"))
    }

    /// Returns the descriptor that is readable when a turn has something to do.
    #[must_use]
    pub fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Serves what is ready, after waiting up to `timeout` ms for it (-1: without limit).
    ///
    /// # Errors
    /// What the system says of the wait.
    pub fn turn(&self, timeout: i32) -> Result<()> {
        let mut ready = [EpollEvent::default(); EVENTS];
        let count = events(&self.epoll, timeout, &mut ready).context("cannot wait for devices")?;
        for event in &ready[..count] {
            if let Some((watched, of)) = self.find(event.data()) {
                of.call(&mut *lock(&watched.device));
            }
        }
        Ok(())
    }

    /// As [`Self::turn`], with no end to the wait, for the thread that owns the one device. It looks
    /// for commands after each event.
    fn work(&self, owner: &mut Owner<'_>, ready: &mut [EpollEvent; EVENTS]) -> Result<()> {
        let count = events(&self.epoll, -1, ready).context("cannot wait for devices")?;
        for event in &ready[..count] {
            if let Some((_, of)) = self.find(event.data()) {
                owner.before_request();
                of.call(owner.device());
            }
        }
        owner.run_commands();
        Ok(())
    }

    /// The device of a token, and what it is called for; `None` for a bell.
    fn find(&self, token: u64) -> Option<(&Watched, Event)> {
        if token == BELL {
            return None;
        }
        let watched = self.devices.get((token >> 32) as usize)?;
        let index = (token as u32 & !(KICK as u32)) as usize;
        if token & KICK == 0 {
            return Some((watched, Event::Source(index)));
        }
        Some((watched, Event::Kick(index)))
    }
}

/// What a device is called for.
#[derive(Clone, Copy)]
enum Event {
    Source(usize),
    Kick(usize),
}

impl Event {
    fn call(self, device: &mut dyn VirtioDevice) {
        match self {
            Event::Source(index) => device.ready(index),
            Event::Kick(queue) => device.kicked(queue),
        }
    }
}

/// A thread that owns a device until it is dropped.
pub struct Worker {
    name: String,
    thread: Option<JoinHandle<()>>,
    stopping: Arc<AtomicBool>,
    mailbox: Arc<Mailbox>,
}

impl Worker {
    /// Starts the thread, called `name` (up to 15 bytes). It owns the device of `mailbox`, which is
    /// the one of `reactor`, and does nothing for it unless `begin` succeeds there.
    ///
    /// # Errors
    /// A host without room for another thread.
    pub fn start(
        name: String,
        reactor: Reactor,
        mailbox: Arc<Mailbox>,
        begin: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<Worker> {
        reactor.watch(mailbox.wakeup().as_raw_fd(), EventSet::IN, BELL)?;
        let owned = Arc::clone(&mailbox);
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopping);
        let what = format!("cannot start the thread {name}");
        let kept = name.clone();
        let thread = std::thread::Builder::new()
            .name(name)
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let mut owner = owned.own();
                if let Err(error) = begin() {
                    log::error!("a device does not start to work: {error:#}");
                    return;
                }
                let mut ready = [EpollEvent::default(); EVENTS];
                let mut policy = Policy::of_this_thread();
                let mut batching = Batching::new();
                let (begun, mut counted) = (Instant::now(), 0);
                while !stop.load(Ordering::Acquire) {
                    if let Err(error) = reactor.work(&mut owner, &mut ready) {
                        log::error!("a device stops working: {error:#}");
                        return;
                    }
                    let count = owner.device().requests();
                    let requests = count.wrapping_sub(std::mem::replace(&mut counted, count));
                    policy.set_batch(batching.observe(requests, || begun.elapsed()));
                }
            })
            .context(what)?;
        Ok(Worker {
            name: kept,
            thread: Some(thread),
            stopping,
            mailbox,
        })
    }
}

impl Worker {
    /// Returns what the thread is called, as its device.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Has the thread do something with its device.
    pub fn post(&self, command: Command) {
        self.mailbox.post(command);
    }
}

/// Small, so that a huge page never backs it.
const STACK_BYTES: usize = 128 << 10;

impl Drop for Worker {
    fn drop(&mut self) {
        signals::waiting_for(format_args!("{} to stop", self.name));
        self.stopping.store(true, Ordering::Release);
        ring(self.mailbox.wakeup());
        if let Some(thread) = self.thread.take() {
            // A panic in it has been reported where it happened.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use armlet_devices::virtio::mailbox::Access;
    use armlet_devices::virtio::{ConfigSpace, Driver, Positions, Source, StartError, Virtqueue};
    use std::sync::mpsc::{Sender, channel};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    /// A device that tells what it is called for.
    struct Told {
        tell: Sender<String>,
        source: EventFd,
        takes_kicks: bool,
    }

    impl VirtioDevice for Told {
        fn id(&self) -> u32 {
            0
        }

        fn queue_sizes(&self) -> Vec<u16> {
            vec![1, 1]
        }

        fn config(&self) -> Arc<ConfigSpace> {
            ConfigSpace::new(Vec::new())
        }

        fn start(&mut self, _driver: Driver) -> Result<(), StartError> {
            Ok(())
        }

        fn quiesce(&mut self) -> Positions {
            Positions::new()
        }

        fn reset(&mut self) {}

        fn stop_queue(&mut self, _queue: usize) {}

        fn start_queue(&mut self, _queue: Virtqueue) -> Result<(), StartError> {
            Ok(())
        }

        fn kicked(&mut self, queue: usize) {
            let _ = self.tell.send(format!("kick {queue}"));
        }

        fn takes_kicks(&self) -> bool {
            self.takes_kicks
        }

        fn sources(&self) -> Vec<Source> {
            vec![Source {
                fd: self.source.as_raw_fd(),
                output: false,
                edge: true,
            }]
        }

        fn ready(&mut self, source: usize) {
            let _ = self.tell.send(format!("source {source}"));
        }
    }

    fn event() -> EventFd {
        EventFd::new(EFD_NONBLOCK).expect("a descriptor")
    }

    #[test]
    fn a_worker_calls_its_device_for_kicks_and_sources_and_ends_when_dropped() {
        let (tell, told) = channel();
        let source = event();
        let device = Told {
            tell,
            source: source.try_clone().expect("a descriptor"),
            takes_kicks: true,
        };
        let kicks = [Arc::new(event()), Arc::new(event())];
        let mut reactor = Reactor::new().expect("a reactor");
        let device: Arc<Mutex<dyn VirtioDevice>> = Arc::new(Mutex::new(device));
        reactor.add(Arc::clone(&device), &kicks).expect("watched");
        let mailbox = Mailbox::new(Arc::clone(&device)).expect("a descriptor");
        let mailbox = Arc::new(mailbox);
        let worker = Worker::start(
            "worker".to_owned(),
            reactor,
            Arc::clone(&mailbox),
            || Ok(()),
        );
        let worker = worker.expect("a thread");
        kicks[1].write(1).expect("a kick");
        assert_eq!(told.recv().expect("a call"), "kick 1");
        source.write(1).expect("ready");
        assert_eq!(told.recv().expect("a call"), "source 0");
        kicks[0].write(1).expect("a kick");
        assert_eq!(told.recv().expect("a call"), "kick 0");
        // The thread that owns the device runs it.
        let (answer, answered) = channel();
        let command = move |_: &mut dyn VirtioDevice| {
            let name = std::thread::current().name().map(str::to_owned);
            answer.send(name).expect("the test listens");
        };
        mailbox.run(format_args!("a test"), Box::new(command));
        assert_eq!(answered.recv(), Ok(Some("worker".to_owned())));
        drop(worker);
        drop(mailbox);
        drop(device);
        assert!(told.recv().is_err(), "nobody calls any more");
    }

    #[test]
    fn kicks_are_told_of_until_they_were_heard() {
        let (tell, told) = channel();
        let device = Told {
            tell,
            source: event(),
            takes_kicks: true,
        };
        let kicks = [Arc::new(event())];
        // One that came before anybody listened counts.
        kicks[0].write(1).expect("a kick");
        let mut reactor = Reactor::new().expect("a reactor");
        reactor
            .add(Arc::new(Mutex::new(device)), &kicks)
            .expect("watched");
        for kicked in [0, 2, 1] {
            for _ in 0..kicked {
                kicks[0].write(1).expect("a kick");
            }
            reactor.turn(0).expect("a turn");
            assert_eq!(told.try_recv().expect("a call"), "kick 0");
            reactor.turn(0).expect("a turn");
            assert!(told.try_recv().is_err(), "nothing is new");
        }
    }

    #[test]
    fn kicks_that_another_takes_are_left_alone() {
        let (tell, told) = channel();
        let device = Told {
            tell,
            source: event(),
            takes_kicks: false,
        };
        let kicks = [Arc::new(event()), Arc::new(event())];
        let mut reactor = Reactor::new().expect("a reactor");
        reactor
            .add(Arc::new(Mutex::new(device)), &kicks)
            .expect("watched");
        kicks[0].write(1).expect("a kick");
        reactor.turn(0).expect("a turn");
        assert!(told.try_recv().is_err());
        assert_eq!(kicks[0].read().expect("still there"), 1);
    }
}
