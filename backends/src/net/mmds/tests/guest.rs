//! A guest's side: smoltcp as a client, on a link that a test plays.

use super::*;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};
use std::collections::VecDeque;

/// The guest with its connections.
pub(super) struct Peer {
    interface: Interface,
    sockets: SocketSet<'static>,
    pub(super) wire: Wire,
}

/// Frames on their way from the guest and to it.
#[derive(Default)]
pub(super) struct Wire {
    mtu: usize,
    leaves_checksums: bool,
    pub(super) sent: VecDeque<Vec<u8>>,
    pub(super) coming: VecDeque<Vec<u8>>,
}

impl Peer {
    /// A guest with this MTU in bytes, which leaves checksums to its card or does not.
    pub(super) fn new(mtu: usize, leaves_checksums: bool) -> Peer {
        let mut wire = Wire {
            mtu,
            leaves_checksums,
            ..Wire::default()
        };
        let mac = HardwareAddress::Ethernet(EthernetAddress(GUEST_MAC));
        let mut interface = Interface::new(Config::new(mac), &mut wire, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            let all = IpCidr::new(IpAddress::Ipv4(GUEST), 0);
            addresses.push(all).expect("room");
        });
        Peer {
            interface,
            sockets: SocketSet::new(Vec::new()),
            wire,
        }
    }

    /// Begins a connection from this port.
    pub(super) fn connect(&mut self, port: u16) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 8192]);
        let mut socket = Socket::new(buffer(), buffer());
        let context = self.interface.context();
        socket
            .connect(context, (IpAddress::Ipv4(ADDRESS), 80), port)
            .expect("it is new");
        self.sockets.add(socket)
    }

    pub(super) fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub(super) fn poll(&mut self, now: Duration) {
        let now = Instant::from_micros(now.as_micros() as i64);
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
    }

    pub(super) fn due(&mut self, now: Duration) -> Option<Duration> {
        let now = Instant::from_micros(now.as_micros() as i64);
        let due = self.interface.poll_at(now, &self.sockets)?;
        Some(Duration::from_micros(due.total_micros() as u64))
    }
}

impl Device for Wire {
    type RxToken<'a> = Coming;
    type TxToken<'a> = Sent<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Coming, Sent<'_>)> {
        let frame = self.coming.pop_front()?;
        Some((Coming(frame), Sent(&mut self.sent)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sent<'_>> {
        Some(Sent(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 14 + self.mtu;
        if self.leaves_checksums {
            capabilities.checksum.tcp = Checksum::Rx;
        }
        capabilities
    }
}

pub(super) struct Coming(Vec<u8>);

impl RxToken for Coming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

pub(super) struct Sent<'a>(&'a mut VecDeque<Vec<u8>>);

impl TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut frame = vec![0; len];
        let result = write(&mut frame);
        self.0.push_back(frame);
        result
    }
}
