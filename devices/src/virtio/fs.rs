//! The file system device (virtio 1.2, section 5.11), whose requests another process serves.
//!
//! When that process ends, the device goes on by itself: each request gets an I/O error, so that
//! nothing in the guest waits for ever.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    Chain, ConfigSpace, DeviceState, Driver, Link, Positions, RestoreError, Source, StartError,
    VirtioDevice, Virtqueue, quiesced,
};

pub use super::state::{FsState, Served};

/// Device ID.
const ID: u32 = 26;
/// Entries of each queue. Linux has no request of more pages than there are entries
/// (fs/fuse/virtio_fs.c: max_pages_limit), and would have up to 256.
const ENTRIES: u16 = 1024;
/// The most bytes of a tag.
pub const TAG: usize = 36;

/// Bytes of struct fuse_in_header (include/uapi/linux/fuse.h), with the request's number at 8.
const FUSE_IN: usize = 40;
const FUSE_UNIQUE: std::ops::Range<usize> = 8..16;
/// Bytes of struct fuse_out_header.
const FUSE_OUT: usize = 16;
/// EIO, as FUSE writes errors.
const FUSE_EIO: i32 = -5;

/// What the end of a server means.
const CONSEQUENCE: &str = "the guest gets I/O errors until its driver starts again";

/// Sources: the server, and the kicks that it does not take any more.
const SERVER: usize = 0;
const KICKS: usize = 1;

/// Another process that serves the requests, in the order of the ring.
pub trait Server: Send {
    /// Starts its work on these queues with these features. It takes the kicks and interrupts the
    /// guest itself.
    ///
    /// # Errors
    /// What went wrong.
    fn start(&mut self, features: u64, queues: &[Virtqueue], link: &Link)
    -> Result<(), StartError>;

    /// Stops its work on these queues, and has it keep what it knows of the guest; it does not touch
    /// guest memory from here on. Returns for each queue, by its index, which request it would have
    /// taken next.
    ///
    /// # Errors
    /// What went wrong; it has stopped then.
    fn pause(&mut self, queues: &[Virtqueue]) -> Result<Vec<(u16, u16)>, String>;

    /// Resumes its work on these queues, each from where it stands.
    ///
    /// # Errors
    /// What went wrong.
    fn resume(&mut self, queues: &[Virtqueue], link: &Link) -> Result<(), StartError>;

    /// Stops it; it does not touch guest memory from here on.
    fn stop(&mut self);

    /// A descriptor that is ready to be read when [`Self::look`] has something to look at; the
    /// same all the time.
    fn fd(&self) -> RawFd;

    /// Looks whether it still works on the queues; why not, where it ended.
    fn look(&mut self) -> Result<(), String>;
}

/// A file system device.
pub struct Fs {
    config: Arc<ConfigSpace>,
    requests: u16,
    server: Box<dyn Server>,
    running: Option<Running>,
    /// Who answered, while the machine is held; and whether the server is another one than then.
    paused: Option<Paused>,
    /// Waits for the kicks of the queues of a server that ended.
    kicks: Epoll,
}

struct Running {
    queues: Vec<Virtqueue>,
    link: Arc<Link>,
    features: u64,
    served: Served,
}

#[derive(Clone, Copy, Debug)]
struct Paused {
    served: Served,
    is_other: bool,
}

impl Fs {
    /// The file system that guests mount by `tag` (up to [`TAG`] bytes), with so many queues for
    /// requests.
    ///
    /// # Errors
    /// A process without room for more descriptors.
    pub fn new(tag: &str, requests: u16, server: Box<dyn Server>) -> std::io::Result<Fs> {
        let mut config = vec![0; TAG];
        let len = tag.len().min(TAG);
        config[..len].copy_from_slice(&tag.as_bytes()[..len]);
        config.extend(u32::from(requests).to_le_bytes());
        Ok(Fs {
            config: ConfigSpace::new(config),
            requests,
            server,
            running: None,
            paused: None,
            kicks: Epoll::new()?,
        })
    }

    /// Takes over the queues of a server that ended.
    fn adopt(&mut self, why: &str) {
        let Some(running) = self.running.as_mut() else {
            return;
        };
        if running.served != Served::Well {
            return;
        }
        log::error!("{}: {why}; {CONSEQUENCE}", running.link.name());
        self.take_over();
        self.serve_alone();
    }

    /// Continues where a server stopped: what it did not complete is the first that is taken next.
    fn take_over(&mut self) {
        for queue in self.running.iter_mut().flat_map(|now| &mut now.queues) {
            queue.adopt(None);
        }
    }

    /// Answers all requests with errors from here on.
    fn serve_alone(&mut self) {
        let Some(running) = &mut self.running else {
            return;
        };
        running.served = Served::Alone;
        for queue in &mut running.queues {
            watch(&self.kicks, queue);
            refuse_all(queue);
        }
    }

    /// Resumes where the device was held, or another one in its stead.
    fn go_on(&mut self, driver: Driver, paused: Paused) {
        let running = self.running.insert(Running {
            queues: driver.queues.into_iter().flatten().collect(),
            link: driver.link,
            features: driver.features,
            served: paused.served,
        });
        let resumed = match paused {
            Paused {
                served: Served::Well,
                is_other: true,
            } => Err(StartError(
                "its server knows nothing of the guest that was saved".to_owned(),
            )),
            Paused {
                served: Served::Well,
                ..
            } => self.server.resume(&running.queues, &running.link),
            Paused {
                served: Served::Alone,
                ..
            } => return self.serve_alone(),
            _ => return,
        };
        if let Err(why) = resumed {
            log::error!("{}: {why}; {CONSEQUENCE}", running.link.name());
            self.serve_alone();
        }
    }

    fn queue_count(&self) -> usize {
        // One more, for what goes before all else.
        usize::from(self.requests) + 1
    }
}

impl VirtioDevice for Fs {
    fn id(&self) -> u32 {
        ID
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![ENTRIES; self.queue_count()]
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn start(&mut self, driver: Driver) -> Result<(), StartError> {
        if let Some(paused) = self.paused.take() {
            self.go_on(driver, paused);
            return Ok(());
        }
        let queues: Option<Vec<Virtqueue>> = driver.queues.into_iter().collect();
        let Some(queues) = queues else {
            return Err(StartError("the driver left a queue out".to_owned()));
        };
        let started = self.server.start(driver.features, &queues, &driver.link);
        self.running = Some(Running {
            queues,
            link: driver.link,
            features: driver.features,
            served: Served::Well,
        });
        if let Err(error) = started {
            self.adopt(&error.to_string());
        }
        Ok(())
    }

    fn quiesce(&mut self) -> Positions {
        let Some(mut running) = self.running.take() else {
            return Positions::new();
        };
        match running.served {
            Served::Well => match self.server.pause(&running.queues) {
                Ok(bases) => {
                    for queue in &mut running.queues {
                        let base = bases.iter().find(|(index, _)| *index == queue.index());
                        queue.adopt(base.map(|(_, base)| *base));
                    }
                }
                Err(why) => {
                    let name = running.link.name();
                    log::error!("{name}: {why}; {CONSEQUENCE}");
                    running.served = Served::Alone;
                    running
                        .queues
                        .iter_mut()
                        .for_each(|queue| queue.adopt(None));
                }
            },
            Served::Alone => {
                for queue in &running.queues {
                    unwatch(&self.kicks, queue);
                }
            }
            Served::Later => {}
        }
        self.paused = Some(Paused {
            served: running.served,
            is_other: false,
        });
        quiesced(&mut running.queues)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Fs(FsState {
            served: self.paused.map(|paused| paused.served),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Fs(state) = state else {
            return Err(RestoreError::kind(state));
        };
        let is_other = true;
        self.paused = state.served.map(|served| Paused { served, is_other });
        Ok(())
    }

    fn reset(&mut self) {
        if self.paused.take().is_some() {
            self.server.stop();
        }
        let Some(running) = self.running.take() else {
            return;
        };
        self.server.stop();
        if running.served == Served::Alone {
            for queue in &running.queues {
                unwatch(&self.kicks, queue);
            }
        }
    }

    /// A server's end is the one sure way to have it out of a queue, so it ends, and what comes in
    /// the other queues gets errors until the driver has set up all of them again.
    fn stop_queue(&mut self, queue: usize) {
        let Some(running) = &mut self.running else {
            return;
        };
        let is_it = |ring: &Virtqueue| usize::from(ring.index()) == queue;
        let Some(at) = running.queues.iter().position(is_it) else {
            return;
        };
        let ring = running.queues.remove(at);
        match running.served {
            Served::Well => {
                self.server.stop();
                self.take_over();
                self.serve_alone();
            }
            Served::Alone => unwatch(&self.kicks, &ring),
            Served::Later => {}
        }
        if let Some(running) = self.running.as_mut()
            && running.queues.is_empty()
        {
            // Nothing is left of the session that the server had.
            running.served = Served::Later;
        }
    }

    fn start_queue(&mut self, mut queue: Virtqueue) -> Result<(), StartError> {
        let all = self.queue_count();
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        if running.served == Served::Alone {
            watch(&self.kicks, &mut queue);
        }
        running.queues.push(queue);
        if running.served != Served::Later || running.queues.len() < all {
            return Ok(());
        }
        running.queues.sort_by_key(Virtqueue::index);
        running.served = Served::Well;
        let started = self
            .server
            .start(running.features, &running.queues, &running.link);
        if let Err(error) = started {
            self.adopt(&error.to_string());
        }
        Ok(())
    }

    fn kicked(&mut self, _queue: usize) {}

    fn takes_kicks(&self) -> bool {
        false
    }

    fn sources(&self) -> Vec<Source> {
        let source = |fd| Source {
            fd,
            output: false,
            edge: false,
        };
        vec![source(self.server.fd()), source(self.kicks.as_raw_fd())]
    }

    fn ready(&mut self, source: usize) {
        if source == SERVER
            && let Err(why) = self.server.look()
        {
            self.adopt(&why);
        }
        let alone = |running: &&mut Running| running.served == Served::Alone;
        let running = self.running.as_mut().filter(alone);
        if let Some(running) = running.filter(|_| source == KICKS) {
            for queue in &mut running.queues {
                // A kick is taken before the queue is looked at: one that comes later rings again.
                let _ = queue.kick().read();
                refuse_all(queue);
            }
        }
    }
}

/// Waits for the kicks of a queue.
fn watch(kicks: &Epoll, queue: &mut Virtqueue) {
    let event = EpollEvent::new(EventSet::IN, queue.index().into());
    let fd = queue.kick().as_raw_fd();
    if let Err(error) = kicks.ctl(ControlOperation::Add, fd, event) {
        queue.break_ring(format_args!("cannot wait for its kicks: {error}"));
    }
}

fn unwatch(kicks: &Epoll, queue: &Virtqueue) {
    let fd = queue.kick().as_raw_fd();
    // What is not waited for cannot be taken out.
    let _ = kicks.ctl(ControlOperation::Delete, fd, EpollEvent::default());
}

/// Fails every pending request of a queue.
fn refuse_all(queue: &mut Virtqueue) {
    queue.serve(|queue, chain| {
        let written = refuse(queue, &chain);
        queue.complete(chain, written as u32);
    });
}

/// Writes an I/O error as a request's answer; returns how many bytes. Some requests have no answer,
/// and no room for one.
fn refuse(queue: &Virtqueue, chain: &Chain) -> usize {
    let mut request = [0; FUSE_IN];
    chain.read(queue.memory(), 0, &mut request);
    if chain.writable_len() < FUSE_OUT {
        return 0;
    }
    let mut answer = [0; FUSE_OUT];
    answer[..4].copy_from_slice(&(FUSE_OUT as u32).to_le_bytes());
    answer[4..8].copy_from_slice(&FUSE_EIO.to_le_bytes());
    answer[8..].copy_from_slice(&request[FUSE_UNIQUE]);
    chain.write(queue.memory(), 0, &answer)
}

#[cfg(test)]
mod tests;
