//! Power cuts: an image is written to, and what its file holds is looked at for every moment in
//! between, with any part of what was not on stable storage yet.

use super::*;
use armlet_devices::virtio::queue::Segment;
use imago::qcow2::Qcow2;
use imago::qcow2::Qcow2CreateBuilder;
use imago::{FormatCreateBuilder, Storage as _, StorageCreateOptions};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng};
use std::process::Command;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

/// Bytes of the disks here, and where guest memory begins.
const SIZE: usize = 256 << 10;
const BASE: GuestAddress = GuestAddress(0x4000_0000);
/// What reaches stable storage as a whole.
const SECTOR: usize = 512;

/// What was done to a file.
#[derive(Clone, Debug)]
enum Event {
    Write(u64, Vec<u8>),
    Sync,
}

/// A file in memory that takes note of what is done to it.
#[derive(Debug)]
struct Recorder {
    bytes: Mutex<Vec<u8>>,
    events: Mutex<Vec<Event>>,
}

fn apply(bytes: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let start = offset as usize;
    let end = start + data.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[start..end].copy_from_slice(data);
}

impl Recorder {
    fn new(bytes: Vec<u8>) -> Recorder {
        Recorder {
            bytes: Mutex::new(bytes),
            events: Mutex::default(),
        }
    }

    fn write(&self, offset: u64, data: Vec<u8>) {
        apply(&mut self.bytes.lock().expect("sound"), offset, &data);
        let mut events = self.events.lock().expect("sound");
        events.push(Event::Write(offset, data));
    }

    fn count(&self) -> usize {
        self.events.lock().expect("sound").len()
    }
}

impl Below for Recorder {
    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().expect("sound").len() as u64)
    }

    fn readv(&self, mut vector: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let bytes = self.bytes.lock().expect("sound");
        let mut data = vec![0; vector.len() as usize];
        let there = bytes.get(offset as usize..).unwrap_or_default();
        let count = there.len().min(data.len());
        data[..count].copy_from_slice(&there[..count]);
        vector.copy_from_slice(&data);
        Ok(())
    }

    fn writev(&self, vector: IoVector<'_>, offset: u64) -> io::Result<()> {
        let mut data = vec![0; vector.len() as usize];
        vector.copy_into_slice(&mut data);
        self.write(offset, data);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _allocate: bool) -> io::Result<()> {
        self.write(offset, vec![0; len as usize]);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.events.lock().expect("sound").push(Event::Sync);
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
struct Step {
    operation: Operation,
    sector: usize,
    sectors: usize,
    fill: u8,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let operation = prop::sample::select(vec![
        Operation::Write,
        Operation::Write,
        Operation::Write,
        Operation::Flush,
        Operation::Discard,
        Operation::WriteZeroes { unmap: false },
        Operation::WriteZeroes { unmap: true },
    ]);
    let sectors = SIZE / SECTOR;
    let step = (operation, 0..sectors, 1..40_usize, 1..=u8::MAX);
    let step = step.prop_map(move |(operation, sector, count, fill)| Step {
        operation,
        sector,
        sectors: count.min(sectors - sector),
        fill,
    });
    prop::collection::vec(step, 1..30)
}

/// What was done to an image, and what it has to hold.
struct History {
    first: Vec<u8>,
    events: Vec<Event>,
    /// After each flush: how many events there were, and what was on the disk; `None` for what was
    /// discarded.
    flushed: Vec<(usize, Vec<Option<u8>>)>,
    /// What was changed when: from this event on.
    changed: Vec<(usize, std::ops::Range<usize>)>,
}

/// Does the steps on an image, whose file holds `first` and whose disk holds `disk`.
fn record(first: Vec<u8>, disk: &[u8], steps: &[Step]) -> History {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("x.qcow2");
    let file = write(&path, &first);
    let found = look(&path, &file, false).expect("in order");
    let recorder = Arc::new(Recorder::new(first.clone()));
    let below = Arc::clone(&recorder) as Arc<dyn Below>;
    let complaints = Complaints::new("disk0".to_owned(), path.clone());
    let none = &mut std::iter::empty();
    let image = Image::on(&path, below, &found.header, false, none, complaints).expect("opens");
    let memory = GuestMemoryMmap::from_ranges(&[(BASE, SIZE)]).expect("memory");
    let mut now: Vec<Option<u8>> = disk.iter().copied().map(Some).collect();
    let mut history = History {
        first,
        events: Vec::new(),
        flushed: vec![(0, now.clone())],
        changed: Vec::new(),
    };
    let last = Step {
        operation: Operation::Flush,
        sector: 0,
        sectors: 0,
        fill: 0,
    };
    for step in steps.iter().chain([&last]) {
        let range = step.sector * SECTOR..(step.sector + step.sectors) * SECTOR;
        history.changed.push((recorder.count(), range.clone()));
        let bytes = vec![step.fill; range.len()];
        memory.write_slice(&bytes, BASE).expect("memory");
        let segments = [Segment {
            address: BASE,
            len: range.len(),
        }];
        let is_write = step.operation == Operation::Write;
        let request = Request {
            cancelled: &Arc::default(),
            tag: 0,
            operation: step.operation,
            offset: range.start as u64,
            len: range.len() as u64,
            data: match is_write {
                true => Data::new(&segments, 0, range.len()),
                false => Data::new(&[], 0, 0),
            },
            durable: false,
        };
        image.perform(&memory, &request).expect("it works");
        match step.operation {
            Operation::Write => now[range].fill(Some(step.fill)),
            Operation::WriteZeroes { .. } => now[range].fill(Some(0)),
            Operation::Discard => now[range].fill(None),
            Operation::Flush => history.flushed.push((recorder.count(), now.clone())),
            Operation::Read => {}
        }
    }
    history
        .events
        .clone_from(&recorder.events.lock().expect("sound"));
    history
}

fn write(path: &Path, bytes: &[u8]) -> File {
    std::fs::write(path, bytes).expect("a file");
    let file = File::options().read(true).write(true).open(path);
    file.expect("a file")
}

impl History {
    /// What the file holds where the power is cut before this event. Of what is not on stable
    /// storage by then, `choose` says which sectors got there.
    fn cut(&self, at: usize, mut choose: impl FnMut() -> bool) -> Vec<u8> {
        let events = &self.events[..at];
        let is_sync = |event: &Event| matches!(event, Event::Sync);
        let synced = events.iter().rposition(is_sync).unwrap_or(0);
        let mut bytes = self.first.clone();
        for (index, event) in events.iter().enumerate() {
            let Event::Write(offset, data) = event else {
                continue;
            };
            let mut from = 0;
            while from < data.len() {
                let place = *offset as usize + from;
                let count = (SECTOR - place % SECTOR).min(data.len() - from);
                if index < synced || choose() {
                    apply(&mut bytes, place as u64, &data[from..from + count]);
                }
                from += count;
            }
        }
        bytes
    }

    /// Checks an image after a cut: its tables, and that all is there that was flushed.
    fn check(&self, at: usize, bytes: &[u8], qemu: bool) {
        let folder = TempDir::new().expect("a folder");
        let path = folder.path().join("x.qcow2");
        let file = write(&path, bytes);
        let header = Header::read(&file).expect("a header");
        let repair = survey(&file, &header).expect("tables in order");
        assert_eq!(repair.count(), 0, "clusters in use and not counted");
        if qemu {
            let words = ["check", "-f", "qcow2"];
            let output = Command::new("qemu-img").args(words).arg(&path).output();
            let output = output.expect("it runs");
            // 3: nothing but clusters that are counted and not in use.
            let code = output.status.code();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(matches!(code, Some(0 | 3)), "cut at {at}: {code:?}: {said}");
        }
        let header = look(&path, &file, true).expect("in order").header;
        let complaints = Complaints::new("disk0".to_owned(), path.clone());
        let image = Unread::new(&path, file, header, true, Vec::new(), complaints);
        let image = image.and_then(Unread::read);
        let access = image.expect("opens").access.into_inner().expect("sound");
        let mut is = vec![0; SIZE];
        access.disk.read(&mut is, 0).expect("it can be read");
        let flushed = self.flushed.iter().rfind(|(count, _)| *count <= at);
        let (since, was) = flushed.expect("the first");
        let mut was = was.clone();
        for (count, range) in &self.changed {
            if (*since..at).contains(count) {
                was[range.clone()].fill(None);
            }
        }
        let lost = is
            .iter()
            .zip(&was)
            .position(|(is, was)| was.is_some_and(|was| was != *is));
        assert_eq!(lost, None, "cut at {at}: a byte that was flushed is lost");
    }

    /// Cuts the power before each event, in several ways.
    fn check_all(&self, qemu: bool) {
        let mut rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        for at in 0..=self.events.len() {
            // A kill: what was written is there.
            self.check(at, &self.cut(at, || true), false);
            let cut = self.cut(at, || rng.random());
            self.check(at, &cut, qemu);
        }
    }
}

/// An empty image of small clusters, so that it has many tables.
fn empty(cluster: usize, refcount_bits: usize) -> Vec<u8> {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("x.qcow2");
    let options = StorageCreateOptions::new().filename(&path);
    let storage = Storage::create_open(options).expect("a file");
    let builder: Qcow2CreateBuilder<Storage> = Qcow2::<Storage>::create_builder(storage);
    let builder = builder.size(SIZE as u64).cluster_size(cluster);
    let made = builder.refcount_width(refcount_bits).create();
    made.expect("an image");
    std::fs::read(path).expect("a file")
}

fn has_qemu() -> bool {
    let there = Command::new("qemu-img").arg("--version").output().is_ok();
    if !there {
        println!("skipped: qemu-img (package qemu-utils)");
    }
    there
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5))]

    #[test]
    fn no_power_cut_harms_a_qcow2_image(
        steps in steps(),
        order in 0_u32..7,
        cluster in prop::sample::select(vec![512, 512, 4096]),
    ) {
        let first = empty(cluster, 1 << order);
        record(first, &[0; SIZE], &steps).check_all(false);
    }
}

/// Writes all over the disk, with flushes, discards and zeros.
fn busy() -> Vec<Step> {
    let step = |operation, sector, sectors, fill| Step {
        operation,
        sector,
        sectors,
        fill,
    };
    let unmap = Operation::WriteZeroes { unmap: true };
    vec![
        step(Operation::Write, 0, 8, 1),
        step(Operation::Write, 300, 8, 2),
        step(Operation::Flush, 0, 0, 0),
        step(Operation::Write, 100, 33, 3),
        step(Operation::Discard, 0, 8, 0),
        step(Operation::Write, 200, 20, 4),
        step(Operation::Flush, 0, 0, 0),
        step(unmap, 290, 30, 0),
        step(Operation::Write, 300, 17, 5),
        step(Operation::Write, 0, 200, 6),
        step(Operation::Flush, 0, 0, 0),
        step(Operation::Write, 400, 100, 7),
    ]
}

#[test]
fn qemu_finds_no_error_after_any_power_cut() {
    if !has_qemu() {
        return;
    }
    for (cluster, bits) in [(512, 16), (512, 64), (65536, 16)] {
        record(empty(cluster, bits), &[0; SIZE], &busy()).check_all(true);
    }
}

#[test]
fn qemu_finds_no_error_after_any_power_cut_of_an_image_of_its_own() {
    if !has_qemu() {
        return;
    }
    let folder = TempDir::new().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let disk: Vec<u8> = (0..SIZE).map(|at| (at / 700) as u8).collect();
    std::fs::write(path("raw"), &disk).expect("a file");
    for (kind, more) in [
        ("-c -o cluster_size=4096", None),
        ("-o cluster_size=512", Some("snapshot -c one")),
        ("-o compat=0.10,cluster_size=4096", Some("snapshot -c one")),
        (
            "-c -o cluster_size=1024,refcount_bits=64",
            Some("snapshot -c one"),
        ),
        (
            "-o lazy_refcounts=on,cluster_size=1024",
            Some("bitmap --add"),
        ),
    ] {
        let image = path("image");
        let run = |words: String| {
            let done = Command::new("qemu-img").args(words.split(' ')).output();
            let done = done.expect("it runs");
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            assert!(done.status.success(), "{words}: {said}");
        };
        run(format!(
            "convert -f raw -O qcow2 {kind} {} {image}",
            path("raw")
        ));
        if let Some(more) = more {
            run(format!(
                "{more} {image}{}",
                if more.contains("bitmap") { " b" } else { "" }
            ));
        }
        let first = std::fs::read(&image).expect("a file");
        record(first, &disk, &busy()).check_all(true);
    }
}
