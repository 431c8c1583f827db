//! The socket device (virtio 1.2, section 5.10) with its host side over Unix sockets.
//!
//! A guest that connects to port P of the host reaches the listening Unix socket that the given
//! closure connects to for P. A process of the host that wants port P of the guest connects to
//! the device's own listening socket and writes `CONNECT P` and a newline; it reads `OK` and the
//! port that it has on the host's side, and from there on what the guest sends. (Both as
//! Firecracker does it: docs/vsock.md there.)
//!
//! Nothing here blocks, and what a connection takes is bounded: of the guest's data at most
//! `connection::BUFFER` bytes while the host does not read, and nothing of the host's.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use vmm_sys_util::epoll::EpollEvent;

use self::host::Host;
use self::packet::{HEADER, Header};
use self::traffic::{MOST_RESETS, Traffic};
use super::{
    ConfigSpace, DeviceState, Driver, Positions, RestoreError, Source, StartError, VirtioDevice,
    Virtqueue, quiesced,
};

mod connection;
mod events;
mod host;
pub(super) mod packet;
mod traffic;

pub use super::state::VsockState;
pub use events::{EVENTS, Events};
pub use host::{Connect, Limits};

/// Device ID.
const ID: u32 = 19;
/// VIRTIO_VSOCK_F_STREAM.
const FEATURE_STREAM: u64 = 1;
/// Entries of the queues to and from the guest, and of the one for events, which has none.
const ENTRIES: [u16; 3] = [256, 256, 8];
/// Index of the queue to the guest, and of that from it.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// The most events of descriptors that are looked at in one turn.
const WAKES: usize = 64;
/// A socket device.
pub struct Vsock {
    cid: u32,
    config: Arc<ConfigSpace>,
    host: Host,
    running: Option<Traffic>,
    /// The queue to the guest and that from it, where the driver stopped one of them: there are no
    /// connections then.
    parked: [Option<Virtqueue>; 2],
    /// Whether a driver has the device in use.
    in_use: bool,
    held: Held,
    events: Events,
}

/// What a driver's use of the device left, while the machine is held.
enum Held {
    /// Nothing: the device works, or nobody uses it.
    No,
    /// Connections, unless one of the queues was stopped.
    Here(Option<Box<Traffic>>),
    /// What another device left, whose connections are not here.
    Moved(VsockState),
}

impl Vsock {
    /// The device of the guest with the address `cid`. Who connects to `listener` gets to the
    /// guest; `connect` makes the guest's connections to the host. What is beyond the `limits` is
    /// refused.
    ///
    /// # Errors
    /// A process without room for more descriptors.
    pub fn new(
        cid: u32,
        listener: UnixListener,
        connect: Connect,
        limits: Limits,
    ) -> io::Result<Vsock> {
        Ok(Vsock {
            cid,
            config: ConfigSpace::new(u64::from(cid).to_le_bytes().to_vec()),
            host: Host::new(listener, connect, limits)?,
            running: None,
            parked: [None, None],
            in_use: false,
            held: Held::No,
            events: Events::default(),
        })
    }

    /// Connections that there are now.
    #[must_use]
    pub fn connections(&self) -> usize {
        let running = self.running.as_ref();
        running.map_or(0, |running| running.connections.len())
    }

    /// Begins to work on both queues, with these packets to be sent first.
    fn run(
        &mut self,
        to_guest: Virtqueue,
        from_guest: Virtqueue,
        packets: impl IntoIterator<Item = Header>,
    ) {
        let traffic = Traffic::new(self.cid, to_guest, from_guest, packets);
        let running = self.running.insert(traffic);
        running.turn(&mut self.host);
    }

    /// Takes up the queues that there are, when the machine goes on.
    fn go_on(&mut self, queues: [Option<Virtqueue>; 2], held: Held) {
        let (running, packets) = match held {
            Held::No => (None, Vec::new()),
            Held::Here(running) => (running, Vec::new()),
            Held::Moved(state) => (None, state.packets),
        };
        match queues {
            [Some(to_guest), Some(from_guest)] => match running {
                Some(mut running) => {
                    running.link = Arc::clone(to_guest.link());
                    (running.to_guest, running.from_guest) = (to_guest, from_guest);
                    self.running.insert(*running).turn(&mut self.host);
                }
                None => {
                    let packets = packets.iter().map(Header::from_bytes);
                    self.run(to_guest, from_guest, packets);
                }
            },
            parked => self.parked = parked,
        }
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM
    }

    fn queue_sizes(&self) -> Vec<u16> {
        ENTRIES.to_vec()
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn start(&mut self, mut driver: Driver) -> Result<(), StartError> {
        self.events.set_queue(driver.take(EVENTS));
        self.events.tell();
        let (to_guest, from_guest) = (driver.take(RECEIVE), driver.take(TRANSMIT));
        self.in_use = true;
        let held = std::mem::replace(&mut self.held, Held::No);
        if !matches!(held, Held::No) {
            self.go_on([to_guest, from_guest], held);
            return Ok(());
        }
        let (Some(to_guest), Some(from_guest)) = (to_guest, from_guest) else {
            self.reset();
            return Err(StartError("a socket device needs both queues".to_owned()));
        };
        self.run(to_guest, from_guest, []);
        Ok(())
    }

    fn quiesce(&mut self) -> Positions {
        if !std::mem::take(&mut self.in_use) {
            return Positions::new();
        }
        let mut positions = quiesced(self.parked.iter_mut().flatten());
        self.parked = [None, None];
        positions.extend(self.events.quiesce());
        let mut running = self.running.take();
        if let Some(Traffic {
            to_guest,
            from_guest,
            ..
        }) = &mut running
        {
            positions.extend(quiesced([to_guest, from_guest]));
        }
        self.held = Held::Here(running.map(Box::new));
        positions
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(match &self.held {
            Held::No => VsockState::default(),
            Held::Moved(state) => state.clone(),
            Held::Here(running) => {
                let running = running.as_ref();
                let packets = running.map(|running| running.resets.iter());
                VsockState {
                    in_use: true,
                    had_connections: self.events.owes_reset()
                        || running.is_some_and(|running| !running.connections.is_empty()),
                    packets: packets
                        .into_iter()
                        .flatten()
                        .map(|packet| packet.to_bytes())
                        .collect(),
                }
            }
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Vsock(state) = state else {
            return Err(RestoreError::kind(state));
        };
        let most = MOST_RESETS + self.host.limits.connections;
        let has_data = |packet: &[u8; HEADER]| Header::from_bytes(packet).len != 0;
        if state.packets.len() > most || state.packets.iter().any(has_data) {
            return Err(RestoreError(format!(
                "more than {most} packets wait for the guest, or some that have data"
            )));
        }
        if state.in_use {
            self.events.owe_reset(state.had_connections);
            self.held = Held::Moved(state.clone());
        }
        Ok(())
    }

    fn reset(&mut self) {
        // The host's ends see their connections close.
        self.running = None;
        self.held = Held::No;
        self.parked = [None, None];
        self.events = Events::default();
        self.in_use = false;
    }

    fn stop_queue(&mut self, queue: usize) {
        if queue > TRANSMIT {
            self.events.set_queue(None);
            return;
        }
        if let Some(running) = self.running.take() {
            self.parked = [Some(running.to_guest), Some(running.from_guest)];
        }
        self.parked[queue] = None;
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Result<(), StartError> {
        let index = usize::from(queue.index());
        match self.parked.get_mut(index) {
            Some(place) => *place = Some(queue),
            None => {
                self.events.set_queue(Some(queue));
                self.events.tell();
            }
        }
        if self.parked.iter().all(Option::is_some)
            && let [Some(to_guest), Some(from_guest)] = std::mem::take(&mut self.parked)
        {
            self.run(to_guest, from_guest, []);
        }
        Ok(())
    }

    fn kicked(&mut self, queue: usize) {
        if queue == EVENTS {
            self.events.tell();
        }
        if let Some(running) = &mut self.running {
            running.turn(&mut self.host);
        }
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source {
            fd: self.host.epoll.as_raw_fd(),
            output: false,
            edge: false,
        }]
    }

    fn ready(&mut self, _source: usize) {
        let mut events = [EpollEvent::default(); WAKES];
        // An error is a signal that came in between: what is ready stays so.
        let count = self.host.epoll.wait(0, &mut events).unwrap_or(0);
        let running = match (&mut self.running, &mut self.held) {
            (Some(running), _) => running,
            (None, Held::Here(Some(running))) => &mut **running,
            _ => return,
        };
        for event in &events[..count] {
            running.note(event.data(), event.event_set());
        }
        if let Some(running) = &mut self.running {
            running.turn(&mut self.host);
        }
    }
}

#[cfg(test)]
mod tests;
