//! How long a vCPU waits that configures or resets a disk at work. A measurement, on an emulated host
//! that counts instructions, with one CPU for vCPU and disk:
//!
//! ```sh
//! ARMLET_RIG_ICOUNT=1 ARMLET_RIG_SMP=1 ARMLET_RIG_MEMORY=2G cargo test -p armlet-backends --lib \
//!     --target aarch64-unknown-linux-musl -- --ignored --nocapture a_vcpu_waits
//! ```

use super::*;
use crate::reactor::{Reactor, Worker};
use armlet_devices::virtio::FEATURE_VERSION_1;
use armlet_devices::virtio::mailbox::Mailbox;
use armlet_devices::virtio::mmio::{Mmio, NoPage};
use armlet_devices::{Device, IrqLine};
use std::time::Instant;

/// Entries of the queue; a request takes three.
const ENTRIES: u16 = 256;
const REQUESTS: u16 = ENTRIES / 3;
/// From where headers and data lie.
const DATA: u64 = BASE + (1 << 20);
/// Bytes of the image, and of guest memory.
const IMAGE: usize = 64 << 20;
const MEMORY_BYTES: usize = 16 << 20;
/// How often a disk is interrupted in its work.
const ROUNDS: u64 = 150;

struct NoLine;

impl IrqLine for NoLine {
    fn set(&self, _high: bool) {}

    fn pulse(&self) {}
}

/// A guest whose disk has a thread of its own.
struct Guest {
    mmio: Mmio,
    memory: Arc<GuestMemoryMmap>,
}

impl Guest {
    fn write(&mut self, offset: u64, value: u32) {
        let _ = self.mmio.write(offset, &value.to_le_bytes());
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let written = self.memory.write_slice(bytes, GuestAddress(at));
        written.expect("memory");
    }

    /// Has the disk in use with its first queue, where reads of so many bytes wait.
    fn start(&mut self, bytes: u32, round: u64) {
        for status in [0, 1, 3] {
            self.write(0x70, status);
        }
        self.write(0x24, 1);
        self.write(0x20, (FEATURE_VERSION_1 >> 32) as u32);
        self.write(0x24, 0);
        // VIRTIO_BLK_F_CONFIG_WCE and FLUSH: there is a field to write.
        self.write(0x20, 1 << 11 | 1 << 9);
        self.write(0x70, 11);
        self.write(0x30, 0);
        self.write(0x38, u32::from(ENTRIES));
        for (register, at) in [(0x80, 0), (0x90, 0x1000), (0xa0, 0x2000)] {
            self.write(register, (BASE + at) as u32);
        }
        self.write(0x44, 1);
        self.write(0x70, 15);
        self.put(BASE + 0x2002, &[0; 2]);
        for index in 0..REQUESTS {
            let number = u64::from(index);
            let (header, table) = (DATA + 16 * number, BASE + 48 * number);
            let sector = (number * 7919 + round * 104_729) % 1000 * 128;
            self.put(header, &[[0; 8], sector.to_le_bytes()].concat());
            let data = DATA + (64 << 10) * (1 + number);
            let status = DATA + (8 << 10) + number;
            let first = 3 * index;
            for (at, address, len, flags, next) in [
                (table, header, 16, 1_u16, first + 1),
                (table + 16, data, bytes, 3, first + 2),
                (table + 32, status, 1, 2, 0),
            ] {
                let mut entry = address.to_le_bytes().to_vec();
                entry.extend(len.to_le_bytes());
                entry.extend(flags.to_le_bytes());
                entry.extend(next.to_le_bytes());
                self.put(at, &entry);
            }
            self.put(BASE + 0x1004 + 2 * number, &first.to_le_bytes());
        }
        self.put(BASE + 0x1002, &REQUESTS.to_le_bytes());
    }
}

#[test]
#[ignore = "a measurement"]
fn a_vcpu_waits_for_a_disk_at_work() {
    let folder = TempDir::new().expect("a folder");
    let image = folder.path().join("image");
    std::fs::write(&image, vec![1; IMAGE]).expect("room");
    for (options, bytes) in [
        ("engine=io_uring", 4 << 10),
        ("engine=io_uring,cache=none", 4 << 10),
        ("engine=sync", 4 << 10),
        ("engine=sync", 64 << 10),
        ("engine=sync,cache=none", 64 << 10),
        ("engine=io_uring,cache=none", 64 << 10),
    ] {
        let Some(disk) = open_or_skip(&format!("path={},{options}", image.display())) else {
            continue;
        };
        let device = disk.device().expect("a device");
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(BASE), MEMORY_BYTES)]);
        let memory = Arc::new(memory.expect("memory"));
        let mailbox = Arc::new(Mailbox::new(Arc::clone(&device)).expect("a descriptor"));
        let access = Arc::clone(&mailbox);
        let line = Arc::new(NoLine);
        let mmio = Mmio::new(
            disk.name(),
            access,
            memory.clone(),
            line,
            None,
            Arc::new(NoPage),
        );
        let mmio = mmio.expect("descriptors");
        let mut reactor = Reactor::new().expect("a descriptor");
        reactor.add(device, mmio.kicks()).expect("watched");
        let worker = Worker::start(disk.name(), reactor, mailbox, || Ok(())).expect("a thread");
        let mut guest = Guest { mmio, memory };
        let (mut configured, mut reset) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            guest.start(bytes, round);
            guest.write(0x50, 0);
            let busy = Instant::now();
            while busy.elapsed() < Duration::from_micros(20 + round % 10 * 20) {
                std::hint::spin_loop();
            }
            // The field writeback.
            let begun = Instant::now();
            let _ = guest.mmio.write(0x120, &[(round % 2) as u8]);
            configured.push(begun.elapsed());
            let begun = Instant::now();
            guest.write(0x70, 0);
            reset.push(begun.elapsed());
        }
        drop((guest, worker));
        let show = |mut waits: Vec<Duration>| {
            waits.sort_unstable();
            let [half, most, all] = [50, 90, 100].map(|part| waits[waits.len() * part / 100 - 1]);
            format!("p50 {half:?}, p90 {most:?}, at most {all:?}")
        };
        let (configured, reset) = (show(configured), show(reset));
        println!("{options}, {bytes} bytes: configured {configured}; reset {reset}");
    }
}
