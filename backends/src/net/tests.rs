//! A small driver for network cards on real networks, and what the options mean.

use super::passt::Forward;
use super::*;
use crate::reactor::Reactor;
use armlet_devices::rate::Limits;
use armlet_devices::virtio::mailbox::direct;
use armlet_devices::virtio::mmio::{Mmio, NoPage};
use armlet_devices::virtio::net::HEADER;
use armlet_devices::virtio::{FEATURE_EVENT_IDX, FEATURE_VERSION_1};
use armlet_devices::{Device, IrqLine};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How long a test waits for what must come, on the slowest of hosts.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where guest memory begins.
const BASE: u64 = 0x4000_0000;
/// Bytes for a queue: its rings, then its buffers.
const QUEUE_BYTES: u64 = 1 << 20;
/// Entries of a queue; the control queue has fewer, so that all have.
const ENTRIES: u16 = 16;
/// Bytes of a buffer.
const BUFFER: u64 = 2048;
/// DRIVER_OK and what comes before it.
const STARTED: u32 = 15;

/// Counts interrupts.
#[derive(Default)]
struct Line(AtomicUsize);

impl IrqLine for Line {
    fn set(&self, _high: bool) {}

    fn pulse(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A guest with a driver for one card, on a real network.
pub(super) struct Guest {
    mmio: Mmio,
    memory: Arc<GuestMemoryMmap>,
    reactor: Reactor,
    line: Arc<Line>,
    /// Interrupts that come by descriptor.
    call: Arc<EventFd>,
    queues: Vec<Queue>,
    received: VecDeque<(usize, Vec<u8>)>,
}

#[derive(Default)]
struct Queue {
    available: u16,
    seen: u16,
}

impl Guest {
    /// A guest with the next device of `card`, in use with all the features that it has of these.
    pub(super) fn new(card: &NetworkCard, features: u64) -> Guest {
        Guest::of(card.name(), card.device().expect("a device"), features)
    }

    /// As [`Self::new`], with a device of this name.
    pub(super) fn of(name: String, device: Arc<Mutex<dyn VirtioDevice>>, features: u64) -> Guest {
        let (queues, offered) = {
            let device = device.lock().expect("no panic");
            (device.queue_sizes().len(), device.features())
        };
        let size = queues * QUEUE_BYTES as usize;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(BASE), size)]);
        let memory = Arc::new(memory.expect("memory"));
        let line = Arc::new(Line::default());
        let call = Arc::new(EventFd::new(EFD_NONBLOCK).expect("a descriptor"));
        let mmio = Mmio::new(
            name,
            direct(device.clone()),
            memory.clone(),
            line.clone(),
            Some(call.clone()),
            Arc::new(NoPage),
        );
        let mmio = mmio.expect("descriptors");
        let mut reactor = Reactor::new().expect("descriptors");
        reactor.add(device, mmio.kicks()).expect("watched");
        let mut guest = Guest {
            mmio,
            memory,
            reactor,
            line,
            call,
            queues: Vec::new(),
            received: VecDeque::new(),
        };
        guest.queues.resize_with(queues, Queue::default);
        guest.start(features & offered);
        guest
    }

    /// Takes the card into use, again if need be.
    pub(super) fn start(&mut self, features: u64) {
        for status in [0, 1, 3] {
            self.write(0x70, status);
        }
        let features = features | FEATURE_VERSION_1 | FEATURE_EVENT_IDX;
        for half in [0, 1] {
            self.write(0x24, half);
            self.write(0x20, (features >> (32 * half)) as u32);
        }
        self.write(0x70, 11);
        for index in 0..self.queues.len() {
            self.queues[index] = Queue::default();
            let empty = [0; 0x3000];
            let rings = self.rings(index);
            self.memory
                .write_slice(&empty, GuestAddress(rings))
                .expect("memory");
            self.write(0x30, index as u32);
            self.write(0x38, u32::from(ENTRIES));
            for (register, address) in [
                (0x80, rings),
                (0x90, rings + 0x1000),
                (0xa0, rings + 0x2000),
            ] {
                self.write(register, address as u32);
                self.write(register + 4, (address >> 32) as u32);
            }
            self.write(0x44, 1);
            // Queues of frames for the guest have buffers from the first.
            if index.is_multiple_of(2) && index + 1 < self.queues.len() {
                for _ in 0..ENTRIES {
                    self.offer(index, BUFFER as u32, 2);
                }
            }
        }
        self.write(0x70, STARTED);
        assert_eq!(self.read(0x70), STARTED, "the device did not start");
    }

    pub(super) fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        let _ = self.mmio.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        let _ = self.mmio.write(offset, &value.to_le_bytes());
    }

    /// Whether the link is up.
    pub(super) fn is_up(&mut self) -> bool {
        self.read(0x104) >> 16 & 1 != 0
    }

    pub(super) fn interrupts(&self) -> usize {
        let by_call = self.call.read().unwrap_or(0) as usize;
        self.line.0.swap(0, Ordering::Relaxed) + by_call
    }

    fn rings(&self, index: usize) -> u64 {
        BASE + QUEUE_BYTES * index as u64
    }

    /// Where the buffer of a descriptor lies.
    fn buffer(&self, index: usize, descriptor: u16) -> GuestAddress {
        GuestAddress(self.rings(index) + 0x4000 + BUFFER * u64::from(descriptor))
    }

    /// Makes the buffer that comes next available; a queue's go round.
    fn offer(&mut self, index: usize, size: u32, flags: u16) {
        let descriptor = self.queues[index].available % ENTRIES;
        let address = self.buffer(index, descriptor).0;
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&size.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        self.put(index, descriptor, &bytes);
    }

    /// Makes a buffer available that lies where no memory is, or any other place.
    pub(super) fn offer_at(&mut self, index: usize, address: u64) {
        let descriptor = self.queues[index].available % ENTRIES;
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8] = 64;
        self.put(index, descriptor, &bytes);
        self.kick(index);
    }

    fn put(&mut self, index: usize, descriptor: u16, bytes: &[u8; 16]) {
        let rings = self.rings(index);
        let at = |offset: u64| GuestAddress(rings + offset);
        let queue = &mut self.queues[index];
        let slot = u64::from(queue.available % ENTRIES);
        queue.available = queue.available.wrapping_add(1);
        self.memory
            .write_slice(bytes, at(16 * u64::from(descriptor)))
            .and_then(|()| self.memory.write_obj(descriptor, at(0x1000 + 4 + 2 * slot)))
            .and_then(|()| {
                self.memory
                    .store(queue.available, at(0x1002), Ordering::SeqCst)
            })
            .expect("memory");
    }

    fn kick(&mut self, index: usize) {
        self.write(0x50, index as u32);
    }

    /// What was used in a queue since the last look: descriptor and bytes.
    fn used(&mut self, index: usize) -> Vec<(u16, usize)> {
        let rings = self.rings(index);
        let count = self
            .memory
            .load::<u16>(GuestAddress(rings + 0x2002), Ordering::SeqCst);
        let count = count.expect("memory");
        let queue = &mut self.queues[index];
        let mut used = Vec::new();
        while queue.seen != count {
            let slot = u64::from(queue.seen % ENTRIES);
            queue.seen = queue.seen.wrapping_add(1);
            let at = GuestAddress(rings + 0x2000 + 4 + 8 * slot);
            let [head, size]: [u32; 2] = self.memory.read_obj(at).expect("memory");
            used.push((head as u16, size as usize));
        }
        // The driver wants to hear of the next.
        let event = GuestAddress(rings + 0x1000 + 4 + 2 * u64::from(ENTRIES));
        self.memory.write_obj(queue.seen, event).expect("memory");
        used
    }

    /// Lets the device work until `done` has something.
    pub(super) fn wait<T>(
        &mut self,
        what: &str,
        mut done: impl FnMut(&mut Guest) -> Option<T>,
    ) -> T {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(done) = done(self) {
                return done;
            }
            assert!(Instant::now() < end, "no {what}");
            // Short, as vhost works without the reactor.
            self.reactor.turn(10).expect("no error");
        }
    }

    /// Sends a frame behind a header, and waits until it is gone.
    pub(super) fn send(&mut self, pair: usize, header: [u8; HEADER], frame: &[u8]) {
        let index = 2 * pair + 1;
        let bytes = [&header[..], frame].concat();
        let descriptor = self.queues[index].available % ENTRIES;
        let buffer = self.buffer(index, descriptor);
        self.memory.write_slice(&bytes, buffer).expect("memory");
        self.offer(index, bytes.len() as u32, 0);
        self.kick(index);
        self.wait("end of sending", |guest| {
            (!guest.used(index).is_empty()).then_some(())
        });
    }

    /// Waits for a frame that `is_wanted` says yes to; the others are dropped. It gets the header
    /// too.
    pub(super) fn receive(
        &mut self,
        what: &str,
        is_wanted: impl Fn(&[u8]) -> bool,
    ) -> (usize, Vec<u8>) {
        self.wait(what, |guest| guest.poll(&is_wanted))
    }

    /// A frame that `is_wanted` says yes to, if one has come.
    pub(super) fn poll(&mut self, is_wanted: impl Fn(&[u8]) -> bool) -> Option<(usize, Vec<u8>)> {
        self.collect();
        while let Some((pair, frame)) = self.received.pop_front() {
            if is_wanted(&frame) {
                return Some((pair, frame));
            }
        }
        None
    }

    /// Takes what came from all queues, and gives the buffers back.
    fn collect(&mut self) {
        for pair in 0..self.queues.len() / 2 {
            let mut parts = Vec::new();
            let mut missing = 0;
            for (descriptor, size) in self.used(2 * pair) {
                let mut data = vec![0; size];
                let buffer = self.buffer(2 * pair, descriptor);
                self.memory.read_slice(&mut data, buffer).expect("memory");
                if missing == 0 {
                    missing = data[10];
                }
                parts.extend(data);
                missing -= 1;
                if missing == 0 {
                    let frame = std::mem::take(&mut parts);
                    self.received.push_back((pair, frame));
                }
                self.offer(2 * pair, BUFFER as u32, 2);
            }
            assert!(parts.is_empty(), "a part of a frame");
            self.kick(2 * pair);
        }
    }

    /// Sends a request by the control queue; whether it was done.
    pub(super) fn control(&mut self, index: usize, request: &[u8]) -> bool {
        let first = self.queues[index].available % ENTRIES;
        let second = (first + 1) % ENTRIES;
        let (question, answer) = (self.buffer(index, first), self.buffer(index, second));
        self.memory.write_slice(request, question).expect("memory");
        self.memory.write_obj(0xff_u8, answer).expect("memory");
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&answer.0.to_le_bytes());
        bytes[8] = 1;
        bytes[12] = 2;
        let at = GuestAddress(self.rings(index) + 16 * u64::from(second));
        self.memory.write_slice(&bytes, at).expect("memory");
        bytes[..8].copy_from_slice(&question.0.to_le_bytes());
        bytes[8] = request.len() as u8;
        bytes[12] = 1;
        bytes[14] = second as u8;
        self.put(index, first, &bytes);
        self.kick(index);
        let used = self.wait("answer", |guest| guest.used(index).pop());
        assert_eq!(used, (first, 1));
        self.memory.read_obj::<u8>(answer).expect("memory") == 0
    }
}

/// The card that `text` asks for.
pub(super) fn open(text: &str) -> Result<NetworkCard> {
    let broker = Broker::fork(Some(&crate::broker::tests::native()))?;
    NetOptions::parse(text)?.open(0, Some(&broker), false)
}

/// What is wrong with the options.
fn wrong(text: &str) -> String {
    let error = NetOptions::parse(text).expect_err(text);
    format!("{error:#}")
}

#[test]
fn options_say_what_is_meant() {
    let read = |text: &str| NetOptions::parse(text).expect("valid");
    assert_eq!(
        read("tap=tap0,queues=4,vhost=off,mac=52:54:00:12:34:56"),
        NetOptions {
            mac: Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]),
            mtu: None,
            receive: Limits::default(),
            transmit: Limits::default(),
            network: Network::Tap {
                name: "tap0".to_owned(),
                queues: 4,
                vhost: VhostChoice::Off,
            },
            mmds: None,
        }
    );
    let metadata = read("user,metadata=a,,b.json").mmds.expect("metadata");
    assert_eq!(metadata.file, Some("a,b.json".into()));
    assert_eq!(
        (metadata.address, metadata.needs_token),
        (mmds::ADDRESS, false)
    );
    read("tap=tap0,vhost=auto,metadata=a.json");
    let inherited = Network::Inherited {
        descriptors: vec![3, 7],
        vhost: VhostChoice::Auto,
    };
    assert_eq!(read("fd=3,fd=7").network, inherited);
    let forward = |udp, address: Option<&str>, host, guest| Forward {
        udp,
        address: address.map(|address| address.parse().expect("an address")),
        host,
        guest,
    };
    let user = read(
        "user,hostfwd=tcp::2222-:22,hostfwd=tcp:2200-:22,hostfwd=udp:127.0.0.1:53-:5353,hostfwd=tcp:[::1]:80-:8080",
    );
    let forwards = vec![
        forward(false, None, 2222, 22),
        forward(false, None, 2200, 22),
        forward(true, Some("127.0.0.1"), 53, 5353),
        forward(false, Some("::1"), 80, 8080),
    ];
    assert_eq!(user.network, Network::User { forwards });
}

#[test]
fn what_is_wrong_is_said_with_what_would_work() {
    for neither in [
        "mac=52:54:00:12:34:56",
        "tap=a,user",
        "tap=a,fd=3",
        "user,fd=3",
    ] {
        assert!(
            wrong(neither).contains("one of user, tap=NAME and fd=N"),
            "{neither}"
        );
    }
    assert!(wrong("user,queues=2").contains("queues is not known"));
    assert!(wrong("fd=3,queues=2").contains("queues is not known"));
    assert!(wrong("tap=a,hostfwd=tcp::1-:1").contains("hostfwd is not known"));
    assert!(wrong("tap=a,queues=17").contains("from 1 to 16"));
    assert!(wrong("tap=a,vhost=maybe").contains("auto or on or off"));
    assert!(wrong("fd=0").contains("from 3"));
    assert!(wrong("tap=a,vhost=on,metadata=f").contains("leave vhost=on out"));
    for mac in [
        "1",
        "52:54:00:12:34",
        "52:54:00:12:34:56:78",
        "52:54:00:12:34:5g",
        "+1:2:3:4:5:6",
    ] {
        assert!(
            wrong(&format!("user,mac={mac}")).contains("like 52:54:00:12:34:56"),
            "{mac}"
        );
    }
    for mac in [
        "00:00:00:00:00:00",
        "01:00:5e:00:00:01",
        "ff:ff:ff:ff:ff:ff",
    ] {
        assert!(
            wrong(&format!("user,mac={mac}")).contains("no address of one card"),
            "{mac}"
        );
    }
    let forwards = [
        "tcp",
        "tcp:",
        "tcp::2222",
        "tcp:22222222-:22",
        "tcp::0-:22",
        "tcp::2222-22",
        "icmp::1-:1",
        "tcp:host:2222-:22",
        "tcp::2222-:70000",
        "tcp::-:22",
    ];
    for forward in forwards {
        let wrong = wrong(&format!("user,hostfwd={forward}"));
        assert!(wrong.contains("hostfwd=tcp:127.0.0.1:2222-:22"), "{wrong}");
    }
    let wrong = wrong("user,hostfwd=tcp::2222-10.0.2.15:22");
    assert!(wrong.contains("leave 10.0.2.15 out"), "{wrong}");
}

#[test]
fn an_address_that_nobody_chose_is_of_one_card_and_administered_locally() {
    let parse = |text: &str| NetOptions::parse(text).expect("valid");
    let tap = parse("tap=a");
    let addresses = [
        tap.address(0).expect("random"),
        tap.address(0).expect("random"),
    ];
    assert_ne!(addresses[0], addresses[1]);
    for mac in [
        addresses[0],
        addresses[1],
        parse("user").address(0).expect("fixed"),
    ] {
        assert_eq!(mac[0] & 3, 2, "{mac:x?}");
    }
    let user = parse("user");
    assert_eq!(
        user.address(1).expect("fixed"),
        user.address(1).expect("fixed")
    );
    assert_ne!(
        user.address(0).expect("fixed"),
        user.address(1).expect("fixed")
    );
}
