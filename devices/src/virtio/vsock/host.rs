//! The host's side of a socket device: its listening socket, and what watches its streams.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Token of the listening socket; connections have smaller ones.
pub(super) const LISTENER: u64 = u64::MAX;

/// Connects to what stands for a port of the host. It must not wait for anyone.
pub type Connect = Box<dyn FnMut(u32) -> io::Result<UnixStream> + Send>;

/// What the connections may take of the process that the device runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The most connections at a time, those that wait for an answer among them.
    pub connections: usize,
    /// The first number that no connection's descriptor has. A new descriptor gets the smallest
    /// number that is free, so those from here up are left for the rest of the process.
    pub descriptors: RawFd,
}

/// The host's side.
pub(super) struct Host {
    pub(super) connect: Connect,
    pub(super) listener: UnixListener,
    pub(super) epoll: Epoll,
    pub(super) limits: Limits,
}

impl Host {
    /// The host's side, whose listening socket is watched from here on.
    ///
    /// # Errors
    /// A process without room for more descriptors.
    pub(super) fn new(
        listener: UnixListener,
        connect: Connect,
        limits: Limits,
    ) -> io::Result<Host> {
        listener.set_nonblocking(true)?;
        let host = Host {
            connect,
            listener,
            epoll: Epoll::new()?,
            limits,
        };
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        host.watch(host.listener.as_raw_fd(), edge, LISTENER)?;
        Ok(host)
    }

    /// Watches a descriptor for `events`, which come with `token`.
    pub(super) fn watch(&self, fd: RawFd, events: EventSet, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(events, token);
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }
}
