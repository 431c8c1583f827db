//! Sockets between guest and host (`--vsock`): over Unix sockets of this process, or by the
//! host's kernel, where host and guest see each other as AF_VSOCK addresses.

mod kernel;
mod options;

pub use options::{KIND, VsockOptions};

use crate::backend::Backend;
use crate::broker::{Broker, Service, ServiceId};
use anyhow::{Context, Result};
use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::vsock::{Limits, Vsock};
use armlet_system::sockets::{self, Access};
use kernel::KernelVsock;
use rustix::process::{Resource, getrlimit};
use std::os::fd::RawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// The most connections at a time.
const MOST_CONNECTIONS: usize = 1024;
/// Descriptors that connections leave for the rest of the process, where it may have enough.
const KEPT_DESCRIPTORS: u64 = 256;

impl VsockOptions {
    /// Opens what stands behind them.
    ///
    /// # Errors
    /// A path that cannot be listened at, a kernel without vhost-vsock, an address that another
    /// guest has; with what would work.
    pub fn open(&self, broker: &Arc<Broker>) -> Result<Box<dyn Backend>> {
        self.check().context("--vsock")?;
        Ok(match &self.uds {
            Some(path) => Box::new(UnixVsock::open(self.cid, path, self.stays, broker)?),
            None => Box::new(KernelVsock::open(self.cid, broker)?),
        })
    }
}

/// The host's side over Unix sockets: who connects to the path gets to the guest, and the guest
/// gets to the paths that have `_` and a port behind.
#[derive(Debug)]
struct UnixVsock {
    cid: u32,
    listener: UnixListener,
    broker: Arc<Broker>,
    /// The broker's: connects to the paths of ports.
    ports: ServiceId,
    /// Descriptors that the process may have: a confined one cannot ask.
    most: Option<u64>,
}

impl UnixVsock {
    fn open(cid: u32, path: &Path, stays: bool, broker: &Arc<Broker>) -> Result<UnixVsock> {
        let listener = sockets::listen(path, Access::Umask)
            .with_context(|| format!("cannot listen at {}", path.display()))?;
        if !stays {
            // The socket is ours to remove, and a broker is there when armlet was killed, too.
            broker.offer_removal(path)?;
        }
        Ok(UnixVsock {
            cid,
            listener,
            broker: Arc::clone(broker),
            ports: broker.offer(Service::Sockets(path.to_owned()))?,
            most: getrlimit(Resource::Nofile).current,
        })
    }
}

impl Backend for UnixVsock {
    fn name(&self) -> String {
        "vsock".to_owned()
    }

    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
        let (broker, ports) = (Arc::clone(&self.broker), self.ports);
        let connect = move |port| Ok(UnixStream::from(broker.get(ports, port)?));
        let limits = limits(self.most);
        let listener = self.listener.try_clone();
        let device =
            listener.and_then(|listener| Vsock::new(self.cid, listener, Box::new(connect), limits));
        let device = device.context("cannot make the socket device")?;
        Ok(Arc::new(Mutex::new(device)))
    }

    fn is_busy(&self) -> bool {
        true
    }
}

/// What connections may take where this process may have `most` descriptors (no number: as many as
/// it likes). The guest and programs of the host decide how many there are, and a reset, a daemon
/// that is started anew and a disk's engine need some too.
fn limits(most: Option<u64>) -> Limits {
    let descriptors = most.map_or(RawFd::MAX, |most| {
        let kept = (most / 4).min(KEPT_DESCRIPTORS);
        RawFd::try_from(most - kept).unwrap_or(RawFd::MAX)
    });
    Limits {
        connections: MOST_CONNECTIONS,
        descriptors,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alone::in_own_process;
    use armlet_devices::virtio::mailbox::direct;
    use armlet_devices::virtio::mmio::{Mmio, NoPage};
    use armlet_devices::{Device, IrqLine};
    use rustix::process::{Rlimit, setrlimit};
    use std::fs;
    use std::io::{self, ErrorKind, Read};
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    fn open_at(path: &Path) -> Result<UnixVsock> {
        UnixVsock::open(
            3,
            path,
            false,
            &Broker::fork(Some(&crate::broker::tests::native()))?,
        )
    }

    fn wrong(text: &str) -> String {
        VsockOptions::parse(text).expect_err(text).to_string()
    }

    #[test]
    fn options_are_read() {
        let options = VsockOptions::parse("cid=3,uds=/tmp/v.sock").expect("right");
        assert_eq!(options.cid, 3);
        assert_eq!(options.uds, Some("/tmp/v.sock".into()));
        let kernels = VsockOptions::parse("cid=4294967294").expect("right");
        assert_eq!(kernels.uds, None);
        assert_eq!(
            VsockOptions::parse("cid=4294967294,vhost=on").expect("right"),
            kernels
        );
    }

    #[test]
    fn wrong_options_are_refused_with_what_would_work() {
        assert!(wrong("uds=/tmp/v").contains("lacks cid="));
        assert!(wrong("cid=2").contains("from 3 to 4294967294"));
        assert!(wrong("cid=4294967295").contains("from 3 to 4294967294"));
        assert!(wrong("cid=3,uds=/tmp/v,vhost=on").contains("use one of them"));
        assert!(wrong("cid=3,vhost=off").contains("needs uds=PATH"));
        assert!(wrong("cid=3,path=/tmp/v").contains("path is not known"));
    }

    #[test]
    fn the_socket_is_there_while_it_is_open() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("v.sock");
        let open = open_at(&path).expect("a free path");
        let stream = UnixStream::connect(&path).expect("it listens");
        drop(stream);
        let again = open_at(&path).expect_err("it is in use");
        assert!(format!("{again:#}").contains("another process listens"));
        // The guest may start again and again.
        for _ in 0..2 {
            drop(open.device().expect("a device"));
        }
        drop(open);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_that_nobody_listens_at_is_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("v.sock");
        drop(UnixListener::bind(&path).expect("a free path"));
        assert!(path.exists());
        let _open = open_at(&path).expect("a stale socket");
        UnixStream::connect(&path).expect("it listens");
    }

    #[test]
    fn what_is_no_socket_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("letter");
        fs::write(&path, "dear").expect("a file");
        let error = open_at(&path).expect_err("a file");
        assert!(format!("{error:#}").contains("choose another path"));
        assert_eq!(fs::read(&path).expect("the file"), b"dear");
        let error = open_at(&folder.path().join("none/v")).expect_err("no folder");
        assert!(format!("{error:#}").contains("cannot listen at"));
        let long = "v".repeat(options::LONGEST_PATH + 1);
        let error = VsockOptions::parse(&format!("cid=3,uds={long}")).expect_err("a long path");
        assert!(format!("{error:#}").contains("use up to 96"), "{error:#}");
    }

    #[test]
    fn a_socket_that_took_the_place_is_not_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("v.sock");
        let open = open_at(&path).expect("a free path");
        fs::rename(&path, folder.path().join("old")).expect("moved");
        let _other = UnixListener::bind(&path).expect("a free path");
        drop(open);
        assert!(path.exists());
    }

    #[test]
    fn a_quarter_of_few_descriptors_is_left() {
        let descriptors = |most| limits(most).descriptors;
        assert_eq!(descriptors(Some(64)), 48);
        assert_eq!(descriptors(Some(1024)), 768);
        assert_eq!(descriptors(Some(524_288)), 524_032);
        assert_eq!(descriptors(Some(u64::MAX - 1)), RawFd::MAX);
        assert_eq!(descriptors(None), RawFd::MAX);
    }

    #[test]
    fn connections_cannot_use_up_this_processs_descriptors() {
        const MOST: u64 = 160;
        const NAME: &str = "vsock::tests::connections_cannot_use_up_this_processs_descriptors";
        if !in_own_process(NAME) {
            return;
        }
        let few = Rlimit {
            current: Some(MOST),
            maximum: getrlimit(Resource::Nofile).maximum,
        };
        setrlimit(Resource::Nofile, few).expect("less than before");
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("v.sock");
        let open = open_at(&path).expect("a free path");
        let device = open.device().expect("a device");
        let _mmio = started(&open, &device);
        // Both ends of each connection are here.
        let mut streams = Vec::new();
        loop {
            let stream = UnixStream::connect(&path).expect("a descriptor is left");
            device.lock().expect("no test panics here").ready(0);
            stream.set_nonblocking(true).expect("a socket");
            match (&stream).read(&mut [0]) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => streams.push(stream),
                _ => break,
            }
        }
        assert!(streams.len() > 40, "{} connections", streams.len());
        let spare: Vec<_> = (0..20).map(|_| fs::File::open("/dev/null")).collect();
        assert!(spare.iter().all(io::Result::is_ok), "{spare:?}");
        // And when some end there is room again.
        streams.truncate(20);
        drop(spare);
        device.lock().expect("no test panics here").ready(0);
        let stream = UnixStream::connect(&path).expect("a descriptor is left");
        device.lock().expect("no test panics here").ready(0);
        stream.set_nonblocking(true).expect("a socket");
        let error = (&stream).read(&mut [0]).expect_err("it waits to be asked");
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    }

    /// A driver that has the device in use, and gives it nothing.
    fn started(open: &UnixVsock, device: &Arc<Mutex<dyn VirtioDevice>>) -> Mmio {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]);
        let mut mmio = Mmio::new(
            open.name(),
            direct(Arc::clone(device)),
            Arc::new(memory.expect("memory")),
            Arc::new(NoLine),
            None,
            Arc::new(NoPage),
        )
        .expect("a window");
        let mut write = |offset, value: u32| {
            let _ = mmio.write(offset, &value.to_le_bytes());
        };
        for status in [0, 1, 3] {
            write(0x70, status);
        }
        // VERSION_1 and nothing else.
        write(0x24, 1);
        write(0x20, 1);
        write(0x70, 11);
        for queue in 0..3 {
            let rings = 0x1_0000 * (1 + queue);
            write(0x30, queue);
            write(0x38, 8);
            write(0x80, rings);
            write(0x90, rings + 0x1000);
            write(0xa0, rings + 0x2000);
            write(0x44, 1);
        }
        write(0x70, 15);
        mmio
    }

    struct NoLine;

    impl IrqLine for NoLine {
        fn set(&self, _high: bool) {}
        fn pulse(&self) {}
    }

    #[test]
    fn who_connects_is_kept_waiting_until_the_guest_is_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("v.sock");
        let open = open_at(&path).expect("a free path");
        let mut stream = UnixStream::connect(&path).expect("it listens");
        stream.set_nonblocking(true).expect("a socket");
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]);
        let device = open.device().expect("a device");
        let mut mmio = Mmio::new(
            open.name(),
            direct(device),
            Arc::new(memory.expect("memory")),
            Arc::new(NoLine),
            None,
            Arc::new(NoPage),
        )
        .expect("a window");
        let mut id = [0; 4];
        let _ = mmio.read(0x8, &mut id);
        assert_eq!(id, [19, 0, 0, 0]);
        let mut cid = [0; 4];
        let _ = mmio.read(0x100, &mut cid);
        assert_eq!(cid, [3, 0, 0, 0]);
        let error = stream.read(&mut [0]).expect_err("no guest yet");
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    }
}
