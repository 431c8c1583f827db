mod driver;

use super::*;
use armlet_devices::rate::{Bucket, Limits};
use armlet_devices::virtio::block::{Data, Operation, Outcome, Request};
use armlet_devices::virtio::queue::Segment;
use proptest::prelude::*;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Where guest memory begins, and its size.
const BASE: u64 = 0x4000_0000;
const MEMORY: usize = 4 << 20;
/// Bytes of the disks here.
const SIZE: usize = 256 << 10;

/// A folder with an image of a few bytes that are easy to tell apart.
struct Folder {
    folder: TempDir,
}

impl Folder {
    fn new() -> Folder {
        let folder = TempDir::new().expect("a folder");
        Folder { folder }
    }

    fn path(&self, name: &str) -> String {
        let path = self.folder.path().join(name);
        path.to_str().expect("UTF-8").to_owned()
    }

    fn with(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.path(name);
        std::fs::write(&path, bytes).expect("a file");
        path
    }

    fn image(&self) -> String {
        self.with("disk.img", &pattern())
    }
}

fn pattern() -> Vec<u8> {
    (0..SIZE).map(|at| (at / 512 * 7 + at) as u8).collect()
}

fn open(text: &str) -> Result<Disk> {
    let mut disk = DiskOptions::parse(text)?.open(0)?;
    disk.examine()?;
    Ok(disk)
}

/// The disk, unless the host lacks what it needs; says so then.
fn open_or_skip(text: &str) -> Option<Disk> {
    match open(text) {
        Ok(disk) => Some(disk),
        Err(error) => {
            let error = format!("{error:#}");
            let lacks = error.contains("io_uring") || error.contains("cache=none");
            assert!(lacks, "{error}");
            println!("skipped: {error}");
            None
        }
    }
}

fn fails(text: &str) -> String {
    match open(text) {
        Ok(_) => panic!("{text} works"),
        Err(error) => format!("{error:#}"),
    }
}

/// An engine at work, without its device.
struct Bench {
    engine: Box<dyn Engine>,
    memory: Arc<GuestMemoryMmap>,
    next: u16,
    cancelled: Arc<AtomicBool>,
}

impl Bench {
    fn new(disk: &Disk) -> Bench {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(BASE), MEMORY)]);
        let memory = Arc::new(memory.expect("memory"));
        let mut engine = disk.engine().expect("an engine");
        engine.start(&memory);
        Bench {
            engine,
            memory,
            next: 0,
            cancelled: Arc::default(),
        }
    }

    /// Does one request; its data are in pieces of these sizes, one after the other with gaps.
    fn run(
        &mut self,
        operation: Operation,
        offset: usize,
        bytes: &mut [u8],
        pieces: &[usize],
        durable: bool,
    ) -> Outcome {
        let is_data = matches!(operation, Operation::Read | Operation::Write);
        let segments = lay_out(if is_data { bytes.len() } else { 0 }, pieces);
        let mut at = 0;
        for segment in &segments {
            let piece = &bytes[at..at + segment.len];
            at += segment.len;
            self.memory
                .write_slice(piece, segment.address)
                .expect("memory");
        }
        self.next = (self.next + 1) % self.engine.depth();
        let begun = self.engine.begin(&Request {
            tag: self.next,
            operation,
            offset: offset as u64,
            len: bytes.len() as u64,
            data: Data::new(&segments, 0, at),
            durable,
            cancelled: &self.cancelled,
        });
        let outcome = begun.unwrap_or_else(|| {
            self.engine.submit();
            loop {
                match self.engine.finished() {
                    Some((tag, outcome)) => {
                        assert_eq!(tag, self.next);
                        break outcome;
                    }
                    None => self.engine.wait(Duration::MAX),
                }
            }
        });
        let mut at = 0;
        for segment in &segments {
            let piece = &mut bytes[at..at + segment.len];
            at += segment.len;
            self.memory
                .read_slice(piece, segment.address)
                .expect("memory");
        }
        outcome
    }

    fn read(&mut self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let outcome = self.run(Operation::Read, offset, &mut bytes, &[], false);
        assert_eq!(outcome, Outcome::Done);
        bytes
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        let outcome = self.run(Operation::Write, offset, &mut bytes.to_vec(), &[], false);
        assert_eq!(outcome, Outcome::Done);
    }

    fn flush(&mut self) -> Outcome {
        self.run(Operation::Flush, 0, &mut [], &[], false)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.engine.stop();
    }
}

/// Segments of these sizes, the last of what is left.
fn lay_out(total: usize, pieces: &[usize]) -> Vec<Segment> {
    let mut left = total;
    let mut address = BASE;
    let mut segments = Vec::new();
    for len in pieces.iter().copied().chain([total]) {
        let len = len.min(left);
        if len > 0 {
            segments.push(Segment {
                address: GuestAddress(address),
                len,
            });
        }
        left -= len;
        // Odd sizes make odd addresses.
        address += len as u64 + if pieces.is_empty() { 0 } else { 512 };
    }
    segments
}

#[derive(Clone, Debug)]
struct Step {
    operation: Operation,
    sector: usize,
    sectors: usize,
    fill: u8,
    pieces: Vec<usize>,
    durable: bool,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let operation = prop::sample::select(vec![
        Operation::Read,
        Operation::Read,
        Operation::Write,
        Operation::Write,
        Operation::Flush,
        Operation::WriteZeroes { unmap: false },
        Operation::WriteZeroes { unmap: true },
    ]);
    let sectors = SIZE / 512;
    let piece = prop_oneof![Just(512_usize), Just(4096), 1_usize..3000];
    let pieces = prop_oneof![Just(Vec::new()), prop::collection::vec(piece, 0..12)];
    let step = (
        operation,
        0..sectors,
        1..sectors,
        any::<u8>(),
        pieces,
        prop::bool::weighted(0.1),
    );
    let step = step.prop_map(
        move |(operation, sector, count, fill, pieces, durable)| Step {
            operation,
            sector,
            // Mostly small ones.
            sectors: (count % if fill < 200 { 20 } else { sectors }).clamp(1, sectors - sector),
            fill,
            pieces,
            durable,
        },
    );
    prop::collection::vec(step, 1..40)
}

/// Does the steps on a disk and on bytes in memory; what is read must be the same.
fn compare(text: &str, model: &mut [u8], steps: &[Step]) {
    let Some(disk) = open_or_skip(text) else {
        return;
    };
    let mut bench = Bench::new(&disk);
    for step in steps {
        let (start, len) = (step.sector * 512, step.sectors * 512);
        let old = &mut model[start..start + len];
        let mut bytes: Vec<u8> = (0..len).map(|at| (at / 3) as u8 ^ step.fill).collect();
        let (operation, pieces) = (step.operation, &step.pieces);
        let outcome = match operation {
            Operation::Flush => bench.flush(),
            _ => bench.run(operation, start, &mut bytes, pieces, step.durable),
        };
        assert_eq!(outcome, Outcome::Done, "{text}: {step:?}");
        match operation {
            Operation::Read => assert!(bytes == old, "{text}: {step:?} reads something else"),
            Operation::Write => old.copy_from_slice(&bytes),
            Operation::WriteZeroes { .. } => old.fill(0),
            Operation::Flush | Operation::Discard => {}
        }
    }
    assert!(
        bench.read(0, SIZE) == model,
        "{text}: the disk is not as it was written"
    );
    // What a discard leaves is not known, but it leaves the rest alone.
    let mut range = vec![0; 8192];
    bench.run(Operation::Discard, 4096, &mut range, &[], false);
    assert!(bench.read(0, 4096) == model[..4096]);
    assert!(bench.read(12288, SIZE - 12288) == model[12288..]);
    assert_eq!(bench.flush(), Outcome::Done);
    // And so it is for who opens it next.
    drop(bench);
    drop(disk);
    let disk = open(text).expect("opens again");
    assert!(Bench::new(&disk).read(12288, SIZE - 12288) == model[12288..]);
}

/// Has a raw image go through the steps.
fn compare_raw(options: &str, steps: &[Step]) {
    let folder = Folder::new();
    let image = folder.image();
    let mut model = pattern();
    compare(&format!("path={image},{options}"), &mut model, steps);
    assert_eq!(
        std::fs::metadata(&image).expect("a file").len(),
        SIZE as u64,
        "the image kept its size"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_raw_image_is_what_was_written_to_it(steps in steps()) {
        compare_raw("engine=sync", &steps);
    }

    #[test]
    fn so_it_is_by_io_uring(steps in steps()) {
        compare_raw("engine=io_uring", &steps);
    }

    #[test]
    fn so_it_is_without_the_page_cache(steps in steps()) {
        compare_raw("cache=none,engine=sync", &steps);
        compare_raw("cache=none,engine=io_uring", &steps);
    }
}

#[test]
fn many_requests_go_on_at_once() {
    for options in ["engine=io_uring", "engine=io_uring,cache=none"] {
        let folder = Folder::new();
        let text = format!("path={},{options}", folder.image());
        let Some(disk) = open_or_skip(&text) else {
            return;
        };
        let mut bench = Bench::new(&disk);
        let count = bench.engine.depth().min((SIZE / 4096) as u16);
        let mut under_way = Vec::new();
        for tag in 0..count {
            let place = u64::from(tag) * 4096;
            let segments = [Segment {
                address: GuestAddress(BASE + place),
                len: 4096,
            }];
            let begun = bench.engine.begin(&Request {
                tag,
                operation: Operation::Read,
                offset: SIZE as u64 - 4096 - place,
                len: 4096,
                data: Data::new(&segments, 0, 4096),
                durable: false,
                cancelled: &Arc::default(),
            });
            match begun {
                Some(outcome) => assert_eq!(outcome, Outcome::Done),
                None => under_way.push(tag),
            }
        }
        bench.engine.submit();
        while !under_way.is_empty() {
            match bench.engine.finished() {
                Some((tag, outcome)) => {
                    assert_eq!(outcome, Outcome::Done);
                    let at = under_way.iter().position(|known| *known == tag);
                    under_way.remove(at.expect("under way"));
                }
                None => bench.engine.wait(Duration::MAX),
            }
        }
        let pattern = pattern();
        for tag in 0..usize::from(count) {
            let mut data = vec![0; 4096];
            let address = GuestAddress(BASE + tag as u64 * 4096);
            bench.memory.read_slice(&mut data, address).expect("memory");
            let from = SIZE - 4096 - tag * 4096;
            assert!(data == pattern[from..from + 4096], "request {tag}");
        }
    }
}

#[test]
fn a_request_may_have_more_pieces_than_a_system_call() {
    // UIO_MAXIOV is 1024.
    let pieces = vec![64; 3000];
    let len = 3000 * 64 / 512 * 512;
    for options in [
        "engine=sync",
        "engine=io_uring",
        "engine=io_uring,cache=none",
    ] {
        let folder = Folder::new();
        let text = format!("path={},{options}", folder.image());
        let Some(disk) = open_or_skip(&text) else {
            continue;
        };
        let mut bench = Bench::new(&disk);
        let mut bytes = vec![0; len];
        let outcome = bench.run(Operation::Read, 512, &mut bytes, &pieces, false);
        assert_eq!(outcome, Outcome::Done);
        assert!(bytes == pattern()[512..512 + len], "{options} reads");
        bytes.reverse();
        for durable in [false, true] {
            bytes.rotate_left(1);
            let mut copy = bytes.clone();
            let outcome = bench.run(Operation::Write, 1024, &mut copy, &pieces, durable);
            assert_eq!(outcome, Outcome::Done);
            assert!(bench.read(1024, len) == bytes, "{options} writes");
        }
    }
}

/// Has `check` look at a disk of each engine whose file was cut in half after it was opened: its
/// options, and the file.
fn cut_in_half(check: impl Fn(&str, Bench, File)) {
    for options in [
        "engine=sync",
        "engine=io_uring",
        "engine=sync,cache=none",
        "engine=io_uring,cache=none",
    ] {
        let folder = Folder::new();
        let image = folder.image();
        let Some(disk) = open_or_skip(&format!("path={image},{options}")) else {
            continue;
        };
        let bench = Bench::new(&disk);
        let file = File::options().write(true).open(&image).expect("a file");
        file.set_len(SIZE as u64 / 2).expect("cut off");
        check(options, bench, file);
    }
}

#[test]
fn a_file_that_was_cut_off_is_an_io_error() {
    cut_in_half(|options, mut bench, _| {
        for offset in [SIZE / 2, SIZE / 2 - 4096] {
            let mut bytes = vec![0; 8192];
            let outcome = bench.run(Operation::Read, offset, &mut bytes, &[], false);
            assert_eq!(outcome, Outcome::Failed, "{options} at {offset}");
        }
        assert!(bench.read(0, SIZE / 2) == pattern()[..SIZE / 2]);
    });
}

#[test]
fn a_file_that_was_cut_off_does_not_grow_back() {
    cut_in_half(|options, mut bench, file| {
        let half = SIZE / 2;
        let operations = [
            Operation::Write,
            Operation::WriteZeroes { unmap: false },
            Operation::WriteZeroes { unmap: true },
            Operation::Discard,
        ];
        for (operation, durable) in operations
            .into_iter()
            .flat_map(|op| [(op, false), (op, true)])
        {
            for offset in [half, half - 4096, SIZE - 8192] {
                let mut bytes = vec![1; 8192];
                let outcome = bench.run(operation, offset, &mut bytes, &[], durable);
                let about = format!("{options}: {operation:?} at {offset}");
                assert_eq!(outcome, Outcome::Failed, "{about}");
                let size = file.metadata().expect("a size").len();
                assert_eq!(size, half as u64, "{about}");
            }
        }
        // What is still there works as before.
        bench.write(half - 4096, &[7; 4096]);
        assert_eq!(bench.read(half - 4096, 4096), [7; 4096]);
        assert_eq!(bench.flush(), Outcome::Done);
        file.set_len(SIZE as u64).expect("it grows again");
        bench.write(SIZE - 4096, &[8; 4096]);
    });
}

#[test]
fn what_nobody_wants_any_more_is_not_done() {
    for options in [
        "engine=sync",
        "engine=io_uring",
        "engine=io_uring,cache=none",
    ] {
        let folder = Folder::new();
        let Some(disk) = open_or_skip(&format!("path={},{options}", folder.image())) else {
            continue;
        };
        let mut bench = Bench::new(&disk);
        bench.cancelled.store(true, Ordering::Relaxed);
        bench.engine.cancel();
        let mut bytes = vec![0; SIZE];
        let outcome = bench.run(Operation::Read, 0, &mut bytes, &[], false);
        // A ring's request is known to it, and may be done already.
        if options == "engine=sync" {
            assert_eq!((outcome, &bytes[..]), (Outcome::Failed, &[0; SIZE][..]));
        }
    }
}

/// A request of `len` bytes whose data are 2 MiB of memory again and again.
fn repeat(len: usize) -> Vec<Segment> {
    let segment = Segment {
        address: GuestAddress(BASE),
        len: 2 << 20,
    };
    vec![segment; len / segment.len]
}

#[test]
fn a_request_is_carried_out_in_parts() {
    const LEN: usize = 256 << 20;
    for options in ["engine=io_uring", "engine=io_uring,cache=none"] {
        let folder = Folder::new();
        let image = folder.path("sparse.img");
        let file = File::create(&image).expect("a file");
        file.set_len(LEN as u64).expect("room");
        let Some(disk) = open_or_skip(&format!("path={image},{options}")) else {
            continue;
        };
        let mut bench = Bench::new(&disk);
        let segments = repeat(LEN);
        for (index, byte) in [1_u8, 2].into_iter().enumerate() {
            let marks = [[byte; 512]; 1].concat();
            file.write_all_at(&marks, (index * (LEN - 512)) as u64)
                .expect("room");
        }
        let request = Request {
            tag: 0,
            operation: Operation::Read,
            offset: 0,
            len: LEN as u64,
            data: Data::new(&segments, 0, LEN),
            durable: false,
            cancelled: &Arc::default(),
        };
        let end = GuestAddress(BASE + (2 << 20) - 512);
        let last = |bench: &Bench| -> [u8; 512] {
            let mut bytes = [0; 512];
            bench.memory.read_slice(&mut bytes, end).expect("memory");
            bytes
        };
        // As a reset finds it: the first part is done at most.
        assert_eq!(bench.engine.begin(&request), None, "{options}");
        bench.engine.cancel();
        let finished = |bench: &mut Bench| loop {
            match bench.engine.finished() {
                Some(done) => break done,
                None => bench.engine.wait(Duration::MAX),
            }
        };
        assert_eq!(finished(&mut bench), (0, Outcome::Failed));
        assert_ne!(last(&bench), [2; 512], "{options}: all of it was read");
        // The next driver's requests are done whole.
        bench.engine.stop();
        let memory = bench.memory.clone();
        bench.engine.start(&memory);
        if bench.engine.begin(&request).is_none() {
            bench.engine.submit();
            assert_eq!(finished(&mut bench), (0, Outcome::Done));
        }
        assert_eq!(last(&bench), [2; 512], "{options}");
    }
}

#[test]
fn once_lost_writes_stay_lost() {
    let folder = Folder::new();
    let image = Image::new(
        File::create(folder.path("x")).expect("a file"),
        false,
        false,
        None,
        512,
        Complaints::new("disk0".to_owned(), PathBuf::new()),
    );
    image.flush().expect("nothing was written");
    let failed = Err(io::Error::from(rustix::io::Errno::IO));
    assert!(image.flushed(failed).is_err());
    assert!(
        image.flush().is_err(),
        "the pages are gone, whatever fsync says now"
    );
}

#[test]
fn an_image_has_one_writer_or_readers() {
    let folder = Folder::new();
    let image = folder.image();
    let writer = open(&image).expect("opens");
    for options in ["", ",readonly"] {
        let message = fails(&format!("{image}{options}"));
        assert!(message.contains("is in use by another"), "{message}");
    }
    drop(writer);
    let readers = [(); 2].map(|()| open(&format!("{image},readonly")).expect("opens"));
    assert!(fails(&image).contains("add readonly"));
    drop(readers);
    // No guest of it is there any more either.
    let disk = open(&image).expect("opens");
    let mut bench = Bench::new(&disk);
    bench.write(0, &[1; 512]);
    drop(bench);
    drop(disk);
    open(&image).expect("opens");
}

#[test]
fn what_is_no_disk_is_refused() {
    let folder = Folder::new();
    let missing = folder.path("missing.img");
    assert!(fails(&missing).contains(&format!("cannot open disk image {missing}: No such file")));
    let here = folder.path(".");
    assert!(fails(&here).contains("is a directory"));
    assert!(fails("/dev/null").contains("neither a file nor a block device"));
}

#[test]
fn a_format_is_never_guessed() {
    let folder = Folder::new();
    let mut bytes = pattern();
    bytes[..4].copy_from_slice(&QCOW2);
    let image = folder.with("x.img", &bytes);
    assert!(fails(&image).contains("say format=qcow2, or format=raw"));
    let disk = open(&format!("{image},format=raw")).expect("opens");
    assert!(Bench::new(&disk).read(0, SIZE) == bytes);
    let raw = folder.image();
    assert!(fails(&format!("{raw},format=qcow2")).contains("is no qcow2 image"));
}

#[test]
fn options_are_read() {
    let parse = |text: &str| DiskOptions::parse(text).expect(text);
    assert_eq!(parse("a.img"), parse("path=a.img"));
    assert_eq!(parse("a.img,readonly"), parse("readonly,path=a.img"));
    assert_eq!(parse("path=a=b.img").path, Path::new("a=b.img"));
    assert_eq!(parse("a,,b.img").path, Path::new("a,b.img"));
    let all = parse(
        "path=x,readonly,id=s-1,format=qcow2,backing=y,backing=z,cache=none,queues=4,engine=sync,block-size=1024,bps=20M,iops=300",
    );
    let wanted = DiskOptions {
        path: "x".into(),
        readonly: true,
        id: Some("s-1".to_owned()),
        format: Format::Qcow2,
        backing: vec!["y".into(), "z".into()],
        cache: Cache::None,
        queues: 4,
        engine: EngineChoice::Sync,
        tail: Tail::Filled,
        limits: Limits {
            bandwidth: Some(Bucket::per_second(20 << 20)),
            ops: Some(Bucket::per_second(300)),
        },
        block_size: Some(1024),
    };
    assert_eq!(all, wanted);
    let wrong = |text: &str| format!("{:#}", DiskOptions::parse(text).expect_err(text));
    assert!(wrong("readonly").contains("lacks path="));
    assert!(wrong("a.img,id=123456789012345678901").contains("up to 20"));
    assert!(wrong("a.img,id=a b").contains("without blanks"));
    assert!(wrong("a.img,block-size=8192").contains("from 512 to 4096"));
    assert!(wrong("a.img,bps=0").contains("use 20M or another number of bytes"));
    assert!(wrong("a.img,bps=-1").contains("bps=-1 is no number a second"));
    assert!(wrong("a.img,bps=99999999999T").contains("no number a second"));
    assert!(wrong("a.img,iops=1K").contains("iops=1K is no number a second; use 1 or more"));
    assert_eq!(parse("a.img,cache=unsafe").cache, Cache::Unsafe);
    assert!(wrong("a.img,block-size=1000").contains("no power of two"));
    assert!(wrong("a.img,queues=0").contains("from 1 to 16"));
    assert!(wrong("a.img,cache=writethrough").contains("use writeback or none"));
    assert!(wrong("a.img,format=vmdk").contains("auto or raw or qcow2"));
    assert!(wrong("a.img,backing=b.img").contains("only format=qcow2"));
    assert!(wrong("a.img,format=qcow2,engine=io_uring").contains("engine=sync"));
    assert!(wrong("a.img,b.img").contains("b.img is not known"));
}

#[test]
fn each_guest_gets_a_device_on_the_same_image() {
    let folder = Folder::new();
    let image = folder.image();
    let disk = open(&image).expect("opens");
    assert!(disk.is_busy());
    for size in [SIZE, 2 * SIZE] {
        let file = File::options().append(true).open(&image);
        let mut file = file.expect("a file");
        let device = disk.device().expect("a device");
        let capacity = || {
            let config = device.lock().expect("sound").config();
            let mut bytes = [0; 8];
            config.read(0, &mut bytes);
            u64::from_le_bytes(bytes) * 512
        };
        assert_eq!(capacity(), size as u64);
        // Only images that are empty at first are watched.
        file.write_all(&vec![0; SIZE]).expect("room");
        assert_eq!(capacity(), size as u64);
    }
}

#[test]
fn blocks_of_a_file_are_told() {
    let folder = Folder::new();
    let disk = open(&format!("{},id=root,queues=3", folder.image())).expect("opens");
    let shape = &disk.shape;
    assert_eq!(
        (shape.size, shape.block_size, shape.queues),
        (SIZE as u64, 512, 3)
    );
    assert_eq!((shape.readonly, shape.serial.as_str()), (false, "root"));
    assert!((512..=4096).contains(&shape.physical_block_size));
    assert!(shape.discard_granularity.is_multiple_of(512));
}

mod changes;
#[cfg(feature = "qcow2")]
mod features;
mod sizes;
#[cfg(feature = "qcow2")]
mod start;
mod waits;

#[cfg(feature = "qcow2")]
mod qcow2 {
    use super::*;
    use imago::file::File as Storage;
    use imago::qcow2::{Qcow2, Qcow2CreateBuilder};
    use imago::{FormatCreateBuilder, Storage as _, StorageCreateOptions};

    /// Makes an empty image, with something behind it.
    fn create(path: &str, backing: Option<(&str, &str)>) {
        let mut builder = builder(path);
        if let Some((name, format)) = backing {
            builder = builder.backing(name.to_owned(), format.to_owned());
        }
        builder.create().expect("an image");
    }

    fn builder(path: &str) -> Qcow2CreateBuilder<Storage> {
        let options = StorageCreateOptions::new().filename(path);
        let storage = Storage::create_open(options).expect("a file");
        Qcow2::<Storage>::create_builder(storage).size(SIZE as u64)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn a_qcow2_image_is_what_was_written_to_it(steps in steps()) {
            let folder = Folder::new();
            let image = folder.path("x.qcow2");
            create(&image, None);
            let mut model = vec![0; SIZE];
            compare(&format!("{image},format=qcow2"), &mut model, &steps);
        }

        #[test]
        fn so_it_is_with_a_raw_image_behind_it(steps in steps()) {
            let folder = Folder::new();
            let (image, base) = (folder.path("x.qcow2"), folder.image());
            create(&image, Some(("wherever.img", "raw")));
            let text = format!("{image},format=qcow2,backing={base},cache=none");
            compare(&text, &mut pattern(), &steps);
            prop_assert!(std::fs::read(base).expect("a file") == pattern(), "the base is as it was");
        }
    }

    #[test]
    fn images_behind_it_are_opened_when_they_are_named() {
        let folder = Folder::new();
        let (top, middle) = (folder.path("top.qcow2"), folder.path("middle.qcow2"));
        let base = folder.image();
        create(&middle, Some((&base, "raw")));
        create(&top, Some((&middle, "qcow2")));
        let message = fails(&format!("{top},format=qcow2"));
        assert!(
            message.contains(&format!("needs '{middle}' behind it")),
            "{message}"
        );
        let message = fails(&format!("{top},format=qcow2,backing={middle}"));
        assert!(
            message.contains(&format!("needs '{base}' behind it")),
            "{message}"
        );
        let text = format!("{top},format=qcow2,backing={middle},backing={base}");
        let message = fails(&format!("{text},backing={}", folder.with("y", &[0; 512])));
        assert!(message.contains("which stands alone"), "{message}");
        let disk = open(&text).expect("opens");
        assert!(Bench::new(&disk).read(0, SIZE) == pattern());
        // They are locked: nobody may write to what stands behind.
        assert!(fails(&base).contains("is in use"));
        drop(disk);
        let alone = folder.path("alone.qcow2");
        create(&alone, None);
        let message = fails(&format!("{alone},format=qcow2,backing={base}"));
        assert!(
            message.contains("stands alone; leave backing="),
            "{message}"
        );
    }

    /// Does the steps on an image of very small clusters, so that it has many tables. `kills`
    /// says after which of them armlet is killed: what the file holds then is what is found.
    fn survive(steps: &[(Step, bool)], refcount_bits: usize) {
        let folder = Folder::new();
        let mut image = folder.path("0.qcow2");
        let small = builder(&image)
            .cluster_size(512)
            .refcount_width(refcount_bits);
        small.create().expect("an image");
        // What must be there: `None` where the last write was not flushed.
        let mut model = vec![Some(0); SIZE];
        let mut written = vec![0; SIZE];
        let mut disk = open(&format!("{image},format=qcow2")).expect("opens");
        let mut bench = Bench::new(&disk);
        for (index, (step, kill)) in steps.iter().enumerate() {
            let range = step.sector * 512..(step.sector + step.sectors) * 512;
            let mut bytes = vec![step.fill; range.len()];
            let outcome = match step.operation {
                Operation::Flush => bench.flush(),
                operation => bench.run(operation, range.start, &mut bytes, &[], step.durable),
            };
            assert_eq!(outcome, Outcome::Done);
            match step.operation {
                Operation::Read => continue,
                Operation::Write => written[range.clone()].fill(step.fill),
                Operation::WriteZeroes { .. } => written[range.clone()].fill(0),
                Operation::Flush | Operation::Discard => {}
            }
            let flushed = step.operation == Operation::Flush || step.durable;
            match flushed {
                true => model = written.iter().copied().map(Some).collect(),
                false => model[range].fill(None),
            }
            if !kill {
                continue;
            }
            let next = folder.path(&format!("{}.qcow2", index + 1));
            std::fs::copy(&image, &next).expect("a copy");
            drop(bench);
            drop(disk);
            image = next;
            disk = open(&format!("{image},format=qcow2")).expect("opens after a kill");
            bench = Bench::new(&disk);
            written = bench.read(0, SIZE);
            let lost = written
                .iter()
                .zip(&model)
                .position(|(is, was)| was.is_some_and(|was| was != *is));
            assert_eq!(lost, None, "a byte that was flushed is lost");
            model = written.iter().copied().map(Some).collect();
        }
        assert_eq!(bench.flush(), Outcome::Done);
        assert!(bench.read(0, SIZE) == written);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn what_was_flushed_survives_kills(
            steps in steps(),
            kills in prop::collection::vec(prop::bool::weighted(0.3), 40),
            order in 0_u32..7,
        ) {
            let steps: Vec<(Step, bool)> = steps.into_iter().zip(kills).collect();
            survive(&steps, 1 << order);
        }
    }

    #[test]
    fn a_cluster_that_was_not_counted_has_one_user() {
        let write = |sector, fill| Step {
            operation: Operation::Write,
            sector,
            sectors: 8,
            fill,
            pieces: Vec::new(),
            durable: false,
        };
        let flush = Step {
            operation: Operation::Flush,
            ..write(0, 0)
        };
        // The first write makes a table of clusters; the kill comes before it is counted.
        let steps = [
            (write(0, 1), true),
            (write(0, 2), false),
            (write(256, 3), false),
            (write(100, 4), false),
            (flush, true),
        ];
        survive(&steps, 16);
    }

    #[test]
    fn damage_is_told() {
        let folder = Folder::new();
        let image = folder.path("x.qcow2");
        create(&image, None);
        let disk = open(&format!("{image},format=qcow2")).expect("opens");
        let mut bench = Bench::new(&disk);
        bench.write(0, &[1; 65536]);
        bench.write(65536, &[2; 65536]);
        bench.flush();
        drop(bench);
        drop(disk);
        let bytes = std::fs::read(&image).expect("a file");
        let long = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let l1 = long(40) as usize;
        let l2 = (long(l1) & 0x00ff_ffff_ffff_fe00) as usize;
        let message = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = bytes.clone();
            change(&mut bytes);
            let damaged = folder.with("damaged.qcow2", &bytes);
            fails(&format!("{damaged},format=qcow2"))
        };
        // Two parts of the disk in one cluster; a table in the middle of one; one that is nowhere.
        let twice = message(&|bytes| bytes.copy_within(l2..l2 + 8, l2 + 8));
        assert!(
            twice.contains("one cluster twice") && twice.contains("qemu-img convert"),
            "{twice}"
        );
        assert!(message(&|bytes| bytes[l1 + 6] = 2).contains("middle of a cluster"));
        assert!(message(&|bytes| bytes[l1 + 1] = 0x40).contains("points behind its end"));
        // Read only, it is the guest's affair.
        let damaged = folder.path("damaged.qcow2");
        let text = format!("{damaged},format=qcow2,readonly");
        assert!(open(&text).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn no_image_does_harm(changes in prop::collection::vec((0_usize..2000, any::<u8>()), 1..8)) {
            let folder = Folder::new();
            let image = folder.path("x.qcow2");
            builder(&image).cluster_size(512).create().expect("an image");
            let file = File::options().read(true).write(true).open(&image).expect("a file");
            let size = file.metadata().expect("a size").len();
            for (at, byte) in changes {
                file.write_all_at(&[byte], (4 + at as u64) % size).expect("room");
            }
            // It can be mended or it cannot.
            let found = super::super::qcow2::look(Path::new(&image), &file, false);
            let _ = found.and_then(|found| found.repair(Path::new(&image), &file));
            prop_assert!(file.metadata().expect("a size").len() <= size.max(1 << 20));
        }
    }
}

#[test]
fn options_without_text_are_held_to_the_same_rules() {
    let folder = Folder::new();
    let image = folder.image();
    let options = DiskOptions::new(&image);
    assert_eq!(options, DiskOptions::parse(&image).expect("valid"));
    type Change = fn(&mut DiskOptions);
    let cases: [(&str, Change); 5] = [
        ("id=a b", |disk| disk.id = Some("a b".to_owned())),
        ("queues=0", |disk| disk.queues = 0),
        ("block-size=8192", |disk| disk.block_size = Some(8192)),
        ("only format=qcow2", |disk| disk.backing = vec!["b".into()]),
        ("engine=sync", |disk| {
            disk.format = Format::Qcow2;
            disk.engine = EngineChoice::IoUring;
        }),
    ];
    for (words, change) in cases {
        let mut wrong = options.clone();
        change(&mut wrong);
        let Err(error) = wrong.open(0) else {
            panic!("{words}: it is not refused");
        };
        assert!(format!("{error:#}").contains(words), "{error:#}");
    }
    options.open(0).expect("nothing is wrong with it");
}
