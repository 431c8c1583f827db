//! The host's side of a socket device: its listening socket, and the epoll instance for its
//! streams.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// The epoll token of the listening socket; connections have smaller ones.
pub(super) const LISTENER: u64 = u64::MAX;

/// Connects to the socket that stands for a port of the host. It must not block.
pub type Connect = Box<dyn FnMut(u32) -> io::Result<UnixStream> + Send>;

/// Limits on what connections may use of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The most simultaneous connections, including those that are not yet established.
    pub connections: usize,
    /// Connections' descriptors are below this number. A new descriptor gets the lowest free
    /// number, so those from here up stay available to the rest of the process.
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
    /// Creates the host's side, and starts to watch the listening socket.
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

    /// Watches a descriptor for `events`, which are reported with `token`.
    pub(super) fn watch(&self, fd: RawFd, events: EventSet, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(events, token);
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }
}
