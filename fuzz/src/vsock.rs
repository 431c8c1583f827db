//! The socket device, with processes of the host that come, talk and go.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::vsock::{Limits, Vsock};

use super::guest::{Guest, Subject, lock};
use super::input::Input;

const CID: u32 = 7;
/// The most ends of the host at a time, and ports of each side.
const PEERS: usize = 12;
const PORTS: usize = 5;

thread_local! {
    /// Where the device listens: one socket for all inputs.
    static LISTENER: (UnixListener, SocketAddr) = {
        let name = format!("armlet-fuzz-{}-{:?}", std::process::id(), std::thread::current().id());
        let address = SocketAddr::from_abstract_name(name).expect("a short name");
        let listener = UnixListener::bind_addr(&address).expect("a new name");
        listener.set_nonblocking(true).expect("a socket");
        (listener, address)
    };
}

type Peers = Arc<Mutex<Vec<UnixStream>>>;

struct Host {
    peers: Peers,
    address: SocketAddr,
    listener: UnixListener,
}

impl Host {
    fn device(&self) -> Vsock {
        let made = Arc::clone(&self.peers);
        let connect = move |port: u32| {
            let mut made = lock(&made);
            if port % 5 == 4 || made.len() >= PEERS {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            let (ours, theirs) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            made.push(ours);
            Ok(theirs)
        };
        let limits = Limits {
            connections: 1024,
            descriptors: i32::MAX,
        };
        let listener = self.listener.try_clone().expect("descriptors");
        Vsock::new(CID, listener, Box::new(connect), limits).expect("descriptors")
    }

    fn dial(&mut self, input: &mut Input<'_>) {
        let mut peers = lock(&self.peers);
        if peers.len() >= PEERS {
            return;
        }
        let Ok(mut stream) = UnixStream::connect_addr(&self.address) else {
            return;
        };
        stream.set_nonblocking(true).expect("a socket");
        let port = input.below(PORTS);
        let line = match input.u8() {
            0..=191 => format!("CONNECT {port}\n").into_bytes(),
            192..=207 => format!("CONNECT {port}\r\n and more").into_bytes(),
            208..=223 => b"CONNECT 4294967296\n".to_vec(),
            224..=231 => b"CONN".to_vec(),
            _ => input.bytes(32).to_vec(),
        };
        let _ = stream.write(&line);
        peers.push(stream);
    }
}

impl Subject for Host {
    type Device = Vsock;

    fn payload(&mut self, queue: usize, input: &mut Input<'_>) -> Vec<u8> {
        if queue != 1 {
            return Vec::new();
        }
        let host_port = match input.u8() {
            0..=127 => input.below(PORTS) as u32,
            128..=239 => (1 << 30) + input.below(PORTS) as u32,
            _ => input.u32(),
        };
        let guest_port = input.below(PORTS) as u32;
        let op = match input.u8() {
            choice @ 0..=251 => u16::from(choice % 7) + 1,
            _ => input.u16(),
        };
        let len = match op {
            5 => match input.rarely(8) {
                true => usize::from(input.u16()) % 0x3000,
                false => input.below(200),
            },
            _ => 0,
        };
        let odd = input.u8();
        let stated = if odd & 0x1f == 0x1f {
            input.number()
        } else {
            len as u32
        };
        let src_cid = if odd == 0xe0 { input.u64() } else { CID.into() };
        let dst_cid = if odd == 0xc0 { input.u64() } else { 2 };
        let kind = if odd == 0xa0 { input.u16() } else { 1 };
        let alloc = match input.u8() {
            0..=127 => 1 << 20,
            128..=191 => u32::from(input.u8()),
            _ => input.number(),
        };
        let forwarded = if input.rarely(4) { input.number() } else { 0 };
        let mut bytes = [src_cid, dst_cid].map(u64::to_le_bytes).concat();
        for word in [guest_port, host_port, stated] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(kind.to_le_bytes());
        bytes.extend(op.to_le_bytes());
        let flags = if op == 4 {
            u32::from(input.u8() & 3)
        } else {
            0
        };
        for word in [flags, alloc, forwarded] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.resize(bytes.len() + len, 0x42);
        bytes
    }

    fn event(&mut self, device: &Mutex<Vsock>, input: &mut Input<'_>) {
        let choice = input.u8();
        let peer = input.u8();
        if choice < 64 {
            self.dial(input);
        } else {
            let mut peers = lock(&self.peers);
            let count = peers.len();
            if count > 0 {
                let index = usize::from(peer) % count;
                let stream = &mut peers[index];
                match choice {
                    64..=127 => {
                        let len = match input.rarely(4) {
                            true => usize::from(input.u16()),
                            false => input.below(100),
                        };
                        let _ = stream.write(&vec![0x24; len]);
                    }
                    128..=191 => {
                        let len = input.number().min(1 << 16) as usize;
                        let _ = stream.read(&mut vec![0; len]);
                    }
                    192..=215 => {
                        let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both];
                        let _ = stream.shutdown(input.pick(&how));
                    }
                    _ => drop(peers.swap_remove(index)),
                }
            }
        }
        if choice & 7 != 7 {
            lock(device).ready(0);
        }
    }

    fn fresh(&mut self) -> Option<Vsock> {
        Some(self.device())
    }

    fn finish(&mut self, device: &Mutex<Vsock>) {
        lock(device).ready(0);
        assert!(lock(device).connections() <= 1024);
    }

    fn is_drained(&self, _queue: usize) -> bool {
        // Answers for which the guest makes no room hold its packets up.
        false
    }
}

/// The socket device.
pub fn vsock(data: &[u8]) {
    let (listener, address) = LISTENER.with(|(listener, address)| {
        // Those who wait since the last input.
        while listener.accept().is_ok() {}
        (listener.try_clone().expect("descriptors"), address.clone())
    });
    let host = Host {
        peers: Peers::default(),
        address,
        listener,
    };
    let device = Arc::new(Mutex::new(host.device()));
    Guest::new(host, device).run(&mut Input::new(data));
}
