//! Requirements of the specification for all devices, tested with each of them:
//! docs/virtio-conformance.md lists the clauses.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use crate::virtio::balloon::{Balloon, Discard, Offer};
use crate::virtio::block::{Block, Engine, Outcome, Request, Shape};
use crate::virtio::console::{Console, Sink};
use crate::virtio::fake::Guest;
use crate::virtio::fs::{Fs, Server};
use crate::virtio::net::feature as net;
use crate::virtio::net::{Frame, FrameError, Frames, Net, Network, Room, SourceEvent};
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Limits, Vsock};
use crate::virtio::{Link, Source, StartError, VirtioDevice, Virtqueue, block};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Backends that grant everything they are asked for and do nothing else.
struct World {
    offloads: u64,
}

impl Engine for World {
    fn start(&mut self, _memory: &Arc<GuestMemoryMmap>) {}

    fn begin(&mut self, _request: &Request<'_>) -> Option<Outcome> {
        Some(Outcome::Done)
    }

    fn stop(&mut self) {}
}

impl Sink for World {
    fn write(&mut self, bytes: &[u8]) -> usize {
        bytes.len()
    }

    fn room(&self) -> Option<std::os::fd::RawFd> {
        None
    }
}

impl Discard for World {
    fn page_size(&self) -> u64 {
        0x4000
    }

    fn discard(&self, _memory: &GuestMemoryMmap, _address: GuestAddress, _len: u64) -> bool {
        true
    }
}

impl Network for World {
    fn offloads(&self) -> u64 {
        self.offloads
    }

    fn pairs(&self) -> u16 {
        2
    }

    fn mtu(&self) -> Option<u16> {
        Some(9000)
    }

    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    fn woken(&mut self, _source: usize) -> SourceEvent {
        SourceEvent::Nothing
    }

    fn configure(&mut self, _pairs: u16, _offloads: u64) -> Result<(), String> {
        Ok(())
    }
}

impl Frames for World {
    fn has_header(&self) -> bool {
        false
    }

    fn send(&mut self, _pair: usize, _frame: Frame<'_>) -> Result<(), FrameError> {
        Ok(())
    }

    fn receive(&mut self, _pair: usize, room: Room<'_>) -> Result<usize, FrameError> {
        Ok(room.fill(&[0x55; 60]))
    }
}

impl Server for World {
    fn start(
        &mut self,
        _features: u64,
        _queues: &[Virtqueue],
        _link: &Link,
    ) -> Result<(), StartError> {
        Ok(())
    }

    fn pause(&mut self, _queues: &[Virtqueue]) -> Result<Vec<(u16, u16)>, String> {
        Ok(Vec::new())
    }

    fn resume(&mut self, _queues: &[Virtqueue], _link: &Link) -> Result<(), StartError> {
        Ok(())
    }

    fn stop(&mut self) {}

    fn fd(&self) -> std::os::fd::RawFd {
        -1
    }

    fn look(&mut self) -> Result<(), String> {
        Ok(())
    }
}

const ALL_OFFLOADS: u64 = net::GUEST_OFFLOADS | net::HOST_OFFLOADS;

/// A test that runs with each kind of device.
trait Trial {
    fn of<D: VirtioDevice + 'static>(&mut self, device: D);
}

fn each(trial: &mut impl Trial) {
    let world = |offloads| World { offloads };
    for readonly in [false, true] {
        let shape = Shape {
            size: 1 << 20,
            readonly,
            serial: "disk".to_owned(),
            queues: 2,
            flushes: true,
            block_size: 512,
            physical_block_size: 4096,
            optimal_io_size: 0,
            discard_granularity: 4096,
        };
        trial.of(Block::new(&shape, Box::new(world(0))));
    }
    for offloads in [0, ALL_OFFLOADS] {
        trial.of(Net::new(world(offloads), [2, 0, 0, 0, 0, 1]));
    }
    trial.of(Console::new(
        Box::new(world(0)),
        Box::new(|| {}),
        Some((80, 25)),
    ));
    trial.of(Rng::new(Box::new(|bytes| {
        bytes.fill(1);
        true
    })));
    trial.of(Fs::new("share", 1, Box::new(world(0))).expect("descriptors"));
    trial.of(Pmem::new(0x1_0000_0000, 1 << 20, Box::new(|| true)));
    let offer = Offer {
        reporting: true,
        hinting: true,
        deflate_on_oom: true,
    };
    trial.of(Balloon::new(1 << 20, offer, Box::new(world(0))));
    // Tests run in parallel.
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("armlet-conformance-{}-{number}", std::process::id());
    let name = SocketAddr::from_abstract_name(name).expect("a short name");
    let listener = UnixListener::bind_addr(&name).expect("a socket");
    let nobody = |_| UnixStream::connect("/nobody/listens/here");
    let limits = Limits {
        connections: 10,
        descriptors: 1000,
    };
    trial.of(Vsock::new(3, listener, Box::new(nobody), limits).expect("descriptors"));
}

#[test]
fn no_device_touches_its_queues_before_driver_ok() {
    struct Before;
    impl Trial for Before {
        fn of<D: VirtioDevice + 'static>(&mut self, device: D) {
            let queues = device.queue_sizes().len();
            let mut guest = Guest::new(device);
            guest.negotiate(0);
            for queue in 0..queues {
                guest.set_up_queue(queue as u32);
                guest.request(queue, &[&[0; 64]], &[64]);
                guest.kick(queue);
            }
            for queue in 0..queues {
                assert!(guest.used(queue).is_empty(), "queue {queue}");
            }
            assert_eq!(guest.interrupts(), 0);
            assert_eq!(guest.mmio.faults(), 0);
        }
    }
    each(&mut Before);
}

#[test]
fn no_device_touches_a_queue_that_is_not_ready() {
    struct Stopped;
    impl Trial for Stopped {
        fn of<D: VirtioDevice + 'static>(&mut self, device: D) {
            let queues = device.queue_sizes().len();
            let mut guest = Guest::started(device, 0);
            for queue in 0..queues {
                guest.stop_queue(queue as u32);
                guest.request(queue, &[&[0; 64]], &[64]);
            }
            let before = guest.interrupts();
            for queue in 0..queues {
                guest.kick(queue);
                assert!(guest.used(queue).is_empty(), "queue {queue}");
            }
            assert_eq!(guest.interrupts(), before);
            assert_eq!(guest.mmio.faults(), 0);
            // Sets all of them up again.
            for queue in 0..queues {
                guest.set_up_queue(queue as u32);
            }
            assert_eq!(guest.read(0x70), 15);
        }
    }
    each(&mut Stopped);
}

#[test]
fn no_device_offers_a_feature_without_those_that_it_requires() {
    struct Required;
    impl Trial for Required {
        fn of<D: VirtioDevice + 'static>(&mut self, device: D) {
            // Sections 5.1.3.1, 5.2.3 (CONFIG_WCE, by section 5.2.5.2) and 5.5.3.
            let required: &[(u64, u64)] = match device.id() {
                1 => &[
                    (net::GUEST_TSO4, net::GUEST_CSUM),
                    (net::GUEST_TSO6, net::GUEST_CSUM),
                    (net::GUEST_ECN, net::GUEST_TSO4 | net::GUEST_TSO6),
                    (net::GUEST_USO4, net::GUEST_CSUM),
                    (net::GUEST_USO6, net::GUEST_CSUM),
                    (net::HOST_TSO4, net::CSUM),
                    (net::HOST_TSO6, net::CSUM),
                    (net::HOST_ECN, net::HOST_TSO4 | net::HOST_TSO6),
                    (net::HOST_USO, net::CSUM),
                    (net::CTRL_GUEST_OFFLOADS, net::CTRL_VQ),
                    (net::CTRL_MAC_ADDR, net::CTRL_VQ),
                    (net::MQ, net::CTRL_VQ),
                ],
                2 => &[(block::FEATURE_CONFIG_WCE, block::FEATURE_FLUSH)],
                _ => &[],
            };
            let offered = device.features();
            for (feature, needs) in required {
                let is_there = offered & feature != 0;
                assert!(
                    !is_there || offered & needs != 0,
                    "{feature:#x} in {offered:#x}"
                );
            }
        }
    }
    each(&mut Required);
}

#[test]
fn each_subset_of_a_devices_features_is_accepted() {
    struct Subsets;
    impl Trial for Subsets {
        fn of<D: VirtioDevice + 'static>(&mut self, device: D) {
            let offered = device.features();
            let bits = (0..64).map(|bit| offered & 1 << bit);
            let bits: Vec<u64> = bits.filter(|bit| *bit != 0).collect();
            let mut guest = Guest::new(device);
            guest.negotiate(0);
            for bit in bits {
                // This checks that FEATURES_OK stays set.
                guest.negotiate(bit);
                guest.negotiate(offered & !bit);
            }
            assert_eq!(guest.mmio.faults(), 0);
        }
    }
    each(&mut Subsets);
}

#[test]
fn each_configuration_is_read_before_features_ok() {
    struct Early;
    impl Trial for Early {
        fn of<D: VirtioDevice + 'static>(&mut self, device: D) {
            let (config, features) = (device.config(), device.features());
            let mut guest = Guest::new(device);
            let early: Vec<u32> = (0..config.size())
                .step_by(4)
                .map(|at| guest.read(0x100 + at as u64))
                .collect();
            guest.negotiate(features);
            let late: Vec<u32> = (0..config.size())
                .step_by(4)
                .map(|at| guest.read(0x100 + at as u64))
                .collect();
            assert_eq!(early, late);
            assert!(config.size() == 0 || early.iter().any(|word| *word != 0));
        }
    }
    each(&mut Early);
}
