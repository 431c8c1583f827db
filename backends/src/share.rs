//! Folders of the host for the guest (`--share`): virtio-fs by `virtiofsd`, which is started for
//! each driver that takes the device into use.
//!
//! A virtiofsd knows one session of one driver, and its end is the one sure way to have it out of
//! guest memory. So each start of the device has its own, and a reset ends it; the next is started
//! ahead when a guest starts. It ends by itself when its connection closes, and is killed if it does
//! not; the broker sees to that when armlet ends in whatever way.

mod daemon;
mod options;

pub use options::{Cache, KIND, Sandbox, ShareOptions};

use crate::backend::Backend;
use crate::broker::Broker;
use anyhow::{Context, Result, bail};
use armlet_devices::limit::RateLimit;
use armlet_devices::sync::lock;
use armlet_devices::virtio::fs::{Fs, Server};
use armlet_devices::virtio::{Link, StartError, VirtioDevice, Virtqueue};
use armlet_system::deadline::Deadline;
use armlet_system::eintr::events;
use armlet_system::messages::LINES;
use daemon::{Daemon, Launch, REQUESTS};
use std::fs;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// How long it may take until a virtiofsd is at work.
const PATIENCE: Duration = Duration::from_secs(10);

impl ShareOptions {
    /// Starts virtiofsd; the device is called `name` in messages ("share0").
    ///
    /// # Errors
    /// No such folder; no virtiofsd, or one that does not start, with what it said and what would
    /// work.
    pub fn open(&self, name: &str, broker: &Arc<Broker>) -> Result<Box<dyn Backend>> {
        let program = daemon::find(std::env::var_os("PATH").as_deref())?;
        Ok(Box::new(self.open_with(name, broker, program)?))
    }

    fn open_with(&self, name: &str, broker: &Arc<Broker>, program: PathBuf) -> Result<Share> {
        self.check()
            .with_context(|| format!("--share {}", self.path.display()))?;
        let shown = self.path.display();
        let path = fs::canonicalize(&self.path).with_context(|| format!("cannot share {shown}"))?;
        if !path.is_dir() {
            bail!("cannot share {shown}: it is no folder; give path= the folder that it is in");
        }
        let launch = Launch::new(broker, program, self, path)?;
        let first = launch.start(name, Deadline::after(PATIENCE))?;
        Ok(Share {
            name: name.to_owned(),
            tag: self.tag.clone(),
            launch: Arc::new(launch),
            next: Arc::new(Mutex::new(Some(first))),
            said: Arc::new(RateLimit::new(LINES)),
        })
    }
}

/// A shared folder, for guest after guest.
struct Share {
    name: String,
    tag: String,
    launch: Arc<Launch>,
    /// The virtiofsd for the next driver, if it was started ahead.
    next: Next,
    said: Arc<RateLimit>,
}

type Next = Arc<Mutex<Option<Daemon>>>;

impl Backend for Share {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
        let mut next = lock(&self.next);
        if next.is_none() {
            *next = Some(self.launch.start(&self.name, Deadline::after(PATIENCE))?);
        }
        drop(next);
        let server = Virtiofsd {
            name: self.name.clone(),
            launch: Arc::clone(&self.launch),
            next: Arc::clone(&self.next),
            said: Arc::clone(&self.said),
            epoll: Epoll::new().context("cannot make an epoll instance")?,
            running: None,
        };
        let device = Fs::new(&self.tag, REQUESTS, Box::new(server));
        let device = device.context("cannot make the file system device")?;
        Ok(Arc::new(Mutex::new(device)))
    }

    fn shares_memory(&self) -> bool {
        true
    }
}

/// What serves one guest's device: one virtiofsd after another.
struct Virtiofsd {
    name: String,
    launch: Arc<Launch>,
    next: Next,
    /// Lines that it said: a guest may have it say what it wants.
    said: Arc<RateLimit>,
    /// Waits for the one that runs now.
    epoll: Epoll,
    running: Option<Daemon>,
}

impl Virtiofsd {
    fn run(&self, features: u64, queues: &[Virtqueue], link: &Link) -> Result<Daemon> {
        // The guest's CPU waits meanwhile, so there is one for both of them.
        let deadline = Deadline::after(PATIENCE);
        let kept = lock(&self.next).take();
        // One that died while it waited is not missed.
        if let Some(daemon) = kept
            && self
                .put_to_work(&daemon, features, queues, link, deadline)
                .is_ok()
        {
            return Ok(daemon);
        }
        let daemon = self.launch.start(&self.name, deadline)?;
        self.put_to_work(&daemon, features, queues, link, deadline)?;
        Ok(daemon)
    }

    fn put_to_work(
        &self,
        daemon: &Daemon,
        features: u64,
        queues: &[Virtqueue],
        link: &Link,
        deadline: Deadline,
    ) -> Result<()> {
        let calls = calls(queues, link)?;
        let rings: Vec<_> = queues
            .iter()
            .zip(calls.iter().map(|call| &**call))
            .collect();
        let memory = queues.first().context("no queues")?.memory();
        daemon
            .connection()
            .start(features, memory, &rings, deadline)?;
        for fd in daemon.watched() {
            // By edges: a pipe that ended says so once.
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
            self.epoll.ctl(ControlOperation::Add, fd, event)?;
        }
        Ok(())
    }
}

/// What interrupts the guest for each queue.
fn calls(queues: &[Virtqueue], link: &Link) -> Result<Vec<Arc<EventFd>>> {
    let call = |queue: &Virtqueue| {
        let call = link.call(queue.index());
        call.context("virtiofsd has no way to interrupt the guest")
    };
    queues.iter().map(call).collect()
}

impl Server for Virtiofsd {
    fn start(
        &mut self,
        features: u64,
        queues: &[Virtqueue],
        link: &Link,
    ) -> Result<(), StartError> {
        let daemon = self.run(features, queues, link);
        self.running = Some(daemon.map_err(|error| {
            StartError(format!("virtiofsd does not take up its work: {error:#}"))
        })?);
        Ok(())
    }

    fn pause(&mut self, queues: &[Virtqueue]) -> Result<Vec<(u16, u16)>, String> {
        let Some(daemon) = &self.running else {
            return Err("virtiofsd ended".to_owned());
        };
        let indexes: Vec<u16> = queues.iter().map(Virtqueue::index).collect();
        let paused = daemon
            .connection()
            .pause(&indexes, Deadline::after(PATIENCE));
        match paused {
            Ok(bases) => Ok(indexes.into_iter().zip(bases).collect()),
            Err(error) => {
                // It is out of guest memory when it is gone.
                self.running = None;
                Err(format!(
                    "virtiofsd does not let go of its queues: {error:#}"
                ))
            }
        }
    }

    fn resume(&mut self, queues: &[Virtqueue], link: &Link) -> Result<(), StartError> {
        let resume = || -> Result<()> {
            let daemon = self.running.as_ref().context("it ended")?;
            let calls = calls(queues, link)?;
            let rings: Vec<_> = queues
                .iter()
                .zip(calls.iter().map(|call| &**call))
                .collect();
            daemon
                .connection()
                .resume(&rings, Deadline::after(PATIENCE))
        };
        resume().map_err(|error| {
            self.running = None;
            StartError(format!("virtiofsd does not go on with its work: {error:#}"))
        })
    }

    fn stop(&mut self) {
        // It is out of guest memory when it is gone.
        self.running = None;
    }

    fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    fn look(&mut self) -> Result<(), String> {
        // What is ready is looked at in any case.
        let _ = events(&self.epoll, 0, &mut [EpollEvent::default(); 2]);
        let Some(daemon) = &mut self.running else {
            return Ok(());
        };
        for line in daemon.hear() {
            self.said.log(log::Level::Warn, |held| {
                format!("{}: virtiofsd: {line}{held}", self.name)
            });
        }
        if daemon.is_alive() {
            return Ok(());
        }
        let how = daemon.end();
        // Its descriptors are closed, and so they are not waited for any more.
        self.running = None;
        Err(format!("virtiofsd ended ({how})"))
    }
}

#[cfg(test)]
mod tests;
