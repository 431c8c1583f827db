//! The socket device (virtio 1.2, section 5.10), with Unix sockets on the host's side.
//!
//! A guest that connects to port P of the host reaches the listening Unix socket that the given
//! closure connects to for P. A host process that wants to reach port P of the guest connects to
//! the device's own listening socket and writes `CONNECT P` and a newline; it reads `OK` and its
//! port number on the host's side, and after that what the guest sends. (Both as in Firecracker:
//! see its docs/vsock.md.)
//!
//! Nothing here blocks, and buffering is bounded: at most `connection::BUFFER` bytes of the guest's
//! data for each connection while the host does not read, and none of the host's data.

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
/// Entries of the receive, transmit and event queues.
const ENTRIES: [u16; 3] = [256, 256, 8];
/// Indexes of the receive queue (to the guest) and the transmit queue.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// The most epoll events handled in one turn.
const WAKES: usize = 64;
/// A socket device.
pub struct Vsock {
    cid: u32,
    config: Arc<ConfigSpace>,
    host: Host,
    running: Option<Traffic>,
    /// The receive and transmit queues while the driver has stopped either of them: there are no
    /// connections then.
    parked: [Option<Virtqueue>; 2],
    /// Whether a driver uses the device.
    in_use: bool,
    held: Held,
    events: Events,
}

/// What a driver's use of the device left behind, while the machine is paused.
enum Held {
    /// Nothing: the device is running, or no driver uses it.
    No,
    /// This device's connections; none if one of the queues was stopped.
    Here(Option<Box<Traffic>>),
    /// The state of another device, whose connections are lost.
    Moved(VsockState),
}

impl Vsock {
    /// Creates the device of the guest with the address `cid`. Processes that connect to `listener`
    /// reach the guest; `connect` makes the guest's connections to the host. Connections beyond the
    /// `limits` are refused.
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

    /// Returns the number of current connections.
    #[must_use]
    pub fn connections(&self) -> usize {
        let running = self.running.as_ref();
        running.map_or(0, |running| running.connections.len())
    }

    /// Starts serving both queues, with these packets to be sent first.
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

    /// Resumes with the queues that are ready.
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
        // Dropping it closes the host's ends of the connections.
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
        // The only possible error is an interruption by a signal: what is ready stays ready.
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
