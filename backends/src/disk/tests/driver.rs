//! A small driver for disks with their device and a real engine.

use super::*;
use crate::reactor::Reactor;
use armlet_devices::sync::lock;
use armlet_devices::virtio::FEATURE_VERSION_1;
use armlet_devices::virtio::mailbox::direct;
use armlet_devices::virtio::mmio::{Mmio, NoPage};
use armlet_devices::{Device, IrqLine};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// How long a test waits for what must come, on the slowest of hosts.
const PATIENCE: Duration = Duration::from_secs(60);
/// Entries of a queue.
const ENTRIES: u16 = 256;
/// Bytes for a queue's rings, and from where data lie.
const RINGS: u64 = 0x4000;
const DATA: u64 = BASE + (1 << 20);
/// Bytes of a request.
const BYTES: u32 = 4096;

struct NoLine;

impl IrqLine for NoLine {
    fn set(&self, _high: bool) {}

    fn pulse(&self) {}
}

/// A guest with a driver for one disk.
pub(super) struct Guest {
    pub(super) device: Arc<Mutex<dyn VirtioDevice>>,
    pub(super) mmio: Mmio,
    pub(super) memory: Arc<GuestMemoryMmap>,
    reactor: Reactor,
}

impl Guest {
    /// A guest whose driver has the disk in use with all its queues.
    pub(super) fn new(disk: &Disk) -> Guest {
        let device = disk.device().expect("a device");
        let queues = lock(&device).queue_sizes().len() as u64;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(BASE), MEMORY)]);
        let memory = Arc::new(memory.expect("memory"));
        let mmio = Mmio::new(
            disk.name(),
            direct(device.clone()),
            memory.clone(),
            Arc::new(NoLine),
            None,
            Arc::new(NoPage),
        );
        let mmio = mmio.expect("descriptors");
        let mut reactor = Reactor::new().expect("descriptors");
        reactor.add(device.clone(), mmio.kicks()).expect("watched");
        let mut guest = Guest {
            device,
            mmio,
            memory,
            reactor,
        };
        for status in [0, 1, 3] {
            guest.write(0x70, status);
        }
        guest.write(0x24, 1);
        guest.write(0x20, (FEATURE_VERSION_1 >> 32) as u32);
        guest.write(0x70, 11);
        for index in 0..queues {
            guest.write(0x30, index as u32);
            guest.write(0x38, u32::from(ENTRIES));
            let rings = BASE + RINGS * index;
            for (register, address) in [
                (0x80, rings),
                (0x90, rings + 0x1000),
                (0xa0, rings + 0x2000),
            ] {
                guest.write(register, address as u32);
            }
            guest.write(0x44, 1);
        }
        guest.write(0x70, 15);
        // The device kicks itself at its start.
        guest.reactor.turn(0).expect("a turn");
        guest
    }

    pub(super) fn write(&mut self, offset: u64, value: u32) {
        let _ = self.mmio.write(offset, &value.to_le_bytes());
    }

    /// Fills the first queue with reads, all of them the same, in an indirect table.
    pub(super) fn fill_first_queue(&mut self) {
        let put = |at: u64, bytes: &[u8]| {
            let written = self.memory.write_slice(bytes, GuestAddress(at));
            written.expect("memory");
        };
        let descriptor = |address: u64, len: u32, flags: u16, next: u16| {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            bytes
        };
        let (header, status, table) = (DATA, DATA + 16, DATA + 64);
        put(header, &[0; 16]);
        put(table, &descriptor(header, 16, 1, 1));
        put(table + 16, &descriptor(DATA + 4096, BYTES, 3, 2));
        put(table + 32, &descriptor(status, 1, 2, 0));
        for index in 0..ENTRIES {
            let entry = descriptor(table, 48, 4, 0);
            put(BASE + 16 * u64::from(index), &entry);
            let slot = BASE + 0x1000 + 4 + 2 * u64::from(index);
            put(slot, &index.to_le_bytes());
        }
        put(BASE + 0x1002, &ENTRIES.to_le_bytes());
    }

    /// Requests of the first queue that were answered.
    pub(super) fn used(&self) -> u16 {
        let index = self
            .memory
            .load(GuestAddress(BASE + 0x2002), Ordering::SeqCst);
        index.expect("the ring")
    }

    /// Calls `step` until so many requests of the first queue were answered.
    fn until(&mut self, count: u16, mut step: impl FnMut(&mut Guest)) {
        let end = Instant::now() + PATIENCE;
        while self.used() < count {
            let used = self.used();
            assert!(Instant::now() < end, "{used} of {count} requests are done");
            step(self);
        }
    }
}

#[test]
fn a_queue_goes_on_whoever_fetches_its_completions() {
    let folder = Folder::new();
    let image = folder.image();
    // Past the page cache, so that each request is under way for a while.
    for options in ["engine=io_uring,cache=none", "engine=sync"] {
        let Some(disk) = open_or_skip(&format!("path={image},queues=2,{options}")) else {
            continue;
        };
        let mut guest = Guest::new(&disk);
        let device = guest.device.clone();
        guest.fill_first_queue();
        lock(&device).kicked(0);
        // The second queue, in which there is nothing, fetches all that the engine has done.
        let depth = lock(&device).sources().len() as u16 * 128;
        guest.until(depth, |_| lock(&device).kicked(1));
        // From here on nobody is called but for what the device waits for.
        guest.until(ENTRIES, |guest| {
            guest.reactor.turn(10).expect("a turn");
        });
    }
}

#[test]
fn a_reset_ends_what_is_under_way() {
    let folder = Folder::new();
    let image = folder.image();
    for options in ["engine=io_uring,cache=none", "engine=io_uring"] {
        let Some(disk) = open_or_skip(&format!("path={image},queues=2,{options}")) else {
            continue;
        };
        let mut guest = Guest::new(&disk);
        guest.fill_first_queue();
        lock(&guest.device).kicked(0);
        guest.write(0x70, 0);
        let used = guest.used();
        guest.reactor.turn(0).expect("a turn");
        assert_eq!(guest.used(), used, "the memory is the guest's own again");
    }
}

/// The name of the test below, and what tells its second process from its first.
const LIMITED: &str = "disk::tests::driver::a_limit_of_file_sizes_is_an_io_error";
const INNER: &str = "ARMLET_TEST_WITH_A_LIMIT";

#[test]
fn a_limit_of_file_sizes_is_an_io_error() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    if std::env::var_os(INNER).is_none() {
        // The limit is of a whole process, and without care the end of it.
        let program = std::env::current_exe().expect("this program");
        let output = std::process::Command::new(program)
            .args(["--exact", LIMITED, "--nocapture"])
            .env(INNER, "1")
            .output()
            .expect("it can be run");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{}: {said}", output.status);
        assert!(said.contains("1 passed"), "{said}");
        return;
    }
    armlet_system::signals::survive_file_size_limit();
    for options in [
        "engine=sync",
        "engine=io_uring",
        "engine=io_uring,cache=none",
    ] {
        let folder = Folder::new();
        let image = folder.path("disk.img");
        let file = File::create(&image).expect("a file");
        file.set_len(SIZE as u64).expect("room");
        let Some(disk) = open_or_skip(&format!("path={image},{options}")) else {
            continue;
        };
        let mut bench = Bench::new(&disk);
        let before = getrlimit(Resource::Fsize);
        let limit = Rlimit {
            current: Some(SIZE as u64 / 2),
            ..before
        };
        setrlimit(Resource::Fsize, limit).expect("a lower limit");
        for durable in [false, true] {
            let mut bytes = vec![1; 8192];
            let start = SIZE / 2;
            let outcome = bench.run(Operation::Write, start, &mut bytes, &[], durable);
            assert_eq!(outcome, Outcome::Failed, "{options}");
            let outcome = bench.run(Operation::Write, 0, &mut bytes, &[], durable);
            assert_eq!(outcome, Outcome::Done, "{options}");
        }
        setrlimit(Resource::Fsize, before).expect("the limit that was");
    }
}
