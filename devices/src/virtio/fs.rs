//! The file system device (virtio 1.2, section 5.11), whose requests another process serves.
//!
//! When that process ends, the device takes over and answers each request with an I/O error, so
//! that nothing in the guest hangs.

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
/// Entries of each queue. Linux limits a request's pages to the number of entries
/// (fs/fuse/virtio_fs.c: max_pages_limit), and would send up to 256.
const ENTRIES: u16 = 1024;
/// The most bytes of a tag.
pub const TAG: usize = 36;

/// Bytes of struct fuse_in_header (include/uapi/linux/fuse.h); the request's unique ID is at offset
/// 8.
const FUSE_IN: usize = 40;
const FUSE_UNIQUE: std::ops::Range<usize> = 8..16;
/// Bytes of struct fuse_out_header.
const FUSE_OUT: usize = 16;
/// EIO, as FUSE writes errors.
const FUSE_EIO: i32 = -5;

/// The consequence of a server's end, for messages.
const CONSEQUENCE: &str = "the guest gets I/O errors until its driver starts again";

/// Sources: the server, and the kicks of the queues that it no longer serves.
const SERVER: usize = 0;
const KICKS: usize = 1;

/// Another process that serves the requests, in ring order.
pub trait Server: Send {
    /// Starts serving these queues with these features. The server receives kicks and interrupts
    /// the guest itself.
    ///
    /// # Errors
    /// What went wrong.
    fn start(&mut self, features: u64, queues: &[Virtqueue], link: &Link)
    -> Result<(), StartError>;

    /// Pauses it; it keeps its session with the guest, but does not access guest memory from here
    /// on. Returns for each queue its index and the next available request.
    ///
    /// # Errors
    /// What went wrong; it has stopped then.
    fn pause(&mut self, queues: &[Virtqueue]) -> Result<Vec<(u16, u16)>, String>;

    /// Resumes serving these queues, each from its position.
    ///
    /// # Errors
    /// What went wrong.
    fn resume(&mut self, queues: &[Virtqueue], link: &Link) -> Result<(), StartError>;

    /// Stops it; it does not access guest memory from here on.
    fn stop(&mut self);

    /// Returns a descriptor that is readable when [`Self::look`] has something to check; it never
    /// changes.
    fn fd(&self) -> RawFd;

    /// Checks whether it still serves the queues; returns why not, if it has ended.
    fn look(&mut self) -> Result<(), String>;
}

/// A file system device.
pub struct Fs {
    config: Arc<ConfigSpace>,
    requests: u16,
    server: Box<dyn Server>,
    running: Option<Running>,
    /// While the machine is paused: who answered requests, and whether the server has been replaced
    /// since.
    paused: Option<Paused>,
    /// Waits for the kicks of the queues of a server that has ended.
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
    /// Creates the file system that guests mount by `tag` (up to [`TAG`] bytes), with `requests`
    /// request queues.
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

    /// Takes over the queues of a server that has ended.
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

    /// Continues where a server stopped: the requests that it did not complete are popped first.
    fn take_over(&mut self) {
        for queue in self.running.iter_mut().flat_map(|now| &mut now.queues) {
            queue.adopt(None);
        }
    }

    /// Starts to answer all requests with errors.
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

    /// Resumes where this device, or the one it replaces, was quiesced.
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
                "its server has no session of the guest that was saved".to_owned(),
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
        // One more, for the high-priority queue.
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

    /// Stops a queue. Ending the server is the only reliable way to keep it off a queue, so it
    /// ends, and requests in the other queues fail until the driver has set all of them up again.
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
            // The server's session is gone.
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
                // The kick is consumed before the queue is checked: a later one signals again.
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
    // It fails only if the descriptor is not being watched.
    let _ = kicks.ctl(ControlOperation::Delete, fd, EpollEvent::default());
}

/// Fails every pending request of a queue.
fn refuse_all(queue: &mut Virtqueue) {
    queue.serve(|queue, chain| {
        let written = refuse(queue, &chain);
        queue.complete(chain, written as u32);
    });
}

/// Answers a request with an I/O error; returns the number of bytes written. Some requests have no
/// answer, and no room for one.
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
