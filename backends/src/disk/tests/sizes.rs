//! Images of any size, and blocks of any size.

use super::*;
use std::process::Command;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

const ENGINES: [&str; 2] = ["engine=sync", "engine=io_uring"];

fn len(path: &str) -> usize {
    std::fs::metadata(path).expect("a file").len() as usize
}

#[test]
fn the_last_sector_of_a_file_is_filled_up() {
    let folder = Folder::new();
    let cases = ENGINES.map(|engine| {
        let readonly = format!("{engine},readonly");
        let direct = format!("{readonly},cache=none");
        [engine.to_owned(), readonly, direct]
    });
    for options in cases.concat() {
        for size in [1, 511, 513, 1000, 4097, 70_000] {
            let bytes = &pattern()[..size];
            let image = folder.with("odd.img", bytes);
            let Some(disk) = open_or_skip(&format!("{image},{options}")) else {
                continue;
            };
            let padded = size.next_multiple_of(512);
            assert_eq!(disk.shape.size, padded as u64);
            let mut bench = Bench::new(&disk);
            let mut expected = bytes.to_vec();
            expected.resize(padded, 0);
            assert!(bench.read(0, padded) == expected, "{options}, {size}");
            let last = padded - 512;
            assert!(
                bench.read(last, 512) == expected[last..],
                "{options}, {size}"
            );
            assert_eq!(len(&image), size, "a read changes nothing");
            if options.contains("readonly") {
                continue;
            }
            let pieces = [100, 200];
            let outcome = bench.run(Operation::Write, last, &mut [5; 512], &pieces, true);
            assert_eq!(outcome, Outcome::Done);
            expected[last..].fill(5);
            assert!(bench.read(0, padded) == expected, "{options}, {size}");
            assert_eq!(len(&image), padded, "the sector is there");
            drop(bench);
            drop(disk);
            let disk = open(&format!("{image},{options}")).expect("opens again");
            assert!(Bench::new(&disk).read(0, padded) == expected);
        }
    }
}

#[test]
fn zeroes_and_discards_reach_into_the_last_sector() {
    for engine in ENGINES {
        for operation in [
            Operation::WriteZeroes { unmap: true },
            Operation::WriteZeroes { unmap: false },
            Operation::Discard,
        ] {
            let folder = Folder::new();
            let image = folder.with("odd.img", &pattern()[..70_000]);
            let Some(disk) = open_or_skip(&format!("{image},{engine}")) else {
                return;
            };
            let mut bench = Bench::new(&disk);
            let outcome = bench.run(operation, 69_632, &mut [0; 512], &[], false);
            assert_eq!(outcome, Outcome::Done);
            assert!(bench.read(0, 69_632) == pattern()[..69_632]);
            let last = bench.read(69_632, 512);
            assert!(operation == Operation::Discard || last == [0; 512]);
        }
    }
}

#[test]
fn an_odd_file_that_is_cut_is_an_io_error() {
    for engine in ENGINES {
        let folder = Folder::new();
        let image = folder.with("odd.img", &pattern()[..70_000]);
        let Some(disk) = open_or_skip(&format!("{image},{engine},readonly")) else {
            return;
        };
        let mut bench = Bench::new(&disk);
        let file = File::options().write(true).open(&image).expect("a file");
        file.set_len(69_700).expect("cut off");
        let outcome = bench.run(Operation::Read, 69_632, &mut [0; 512], &[], false);
        assert_eq!(outcome, Outcome::Failed, "{engine}");
        assert!(bench.read(0, 69_632) == pattern()[..69_632]);
    }
}

#[test]
fn qemu_sees_the_same_size() {
    let folder = Folder::new();
    for size in [0, 1, 511, 512, 513, 1000, 70_000] {
        let image = folder.with("odd.img", &pattern()[..size]);
        let words = ["info", "-f", "raw", "--output=json", &image];
        let Ok(output) = Command::new("qemu-img").args(words).output() else {
            println!("skipped: qemu-img (Debian: qemu-utils) is not here");
            return;
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let ours = open(&image).expect("opens").shape.size;
        let wanted = format!("\"virtual-size\": {ours},");
        assert!(text.contains(&wanted), "{size}: no {wanted} in {text}");
    }
}

#[test]
fn an_empty_image_that_is_filled_grows_under_its_guest() {
    let folder = Folder::new();
    for options in ["engine=sync", "engine=io_uring", "readonly", "cache=none"] {
        let image = folder.with("empty.img", b"");
        let Some(disk) = open_or_skip(&format!("{image},{options}")) else {
            continue;
        };
        let capacity = |device: &Arc<Mutex<dyn VirtioDevice>>| {
            let mut bytes = [0; 8];
            device.lock().expect("sound").config().read(0, &mut bytes);
            u64::from_le_bytes(bytes) * 512
        };
        let first = disk.device().expect("a device");
        assert_eq!(capacity(&first), 0);
        let sources = first.lock().expect("sound").sources();
        let index = sources.len().checked_sub(1).expect("one for growth");
        let epoll = Epoll::new().expect("a descriptor");
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll
            .ctl(ControlOperation::Add, sources[index].fd, event)
            .expect("it can be waited for");
        let ready = || {
            let count = epoll.wait(0, &mut [EpollEvent::default()]);
            count.expect("a wait") == 1
        };
        assert!(!ready());
        std::fs::write(&image, pattern()).expect("room");
        assert!(ready(), "{options}");
        first.lock().expect("sound").ready(index);
        assert!(!ready());
        assert_eq!(capacity(&first), SIZE as u64);
        let mut bench = Bench::new(&disk);
        assert!(bench.read(0, SIZE) == pattern());
        if options != "readonly" {
            bench.write(0, &[7; 4096]);
            assert!(!ready(), "a guest's write is none of it");
        }
        // It goes on growing, and what is cut is told by reads and writes.
        for (size, seen) in [(SIZE + 4096, SIZE + 4096), (4096, SIZE + 4096)] {
            let file = File::options().write(true).open(&image).expect("a file");
            file.set_len(size as u64).expect("room");
            drop(file);
            first.lock().expect("sound").ready(index);
            assert_eq!(capacity(&first), seen as u64);
        }
        // The guest that starts next has what there is.
        assert_eq!(capacity(&disk.device().expect("a device")), 4096);
    }
}

#[test]
fn an_empty_qcow2_image_is_a_disk_too() {
    if !cfg!(feature = "qcow2") {
        return;
    }
    let folder = Folder::new();
    let image = folder.path("empty.qcow2");
    let words = ["create", "-q", "-f", "qcow2", &image, "0"];
    let Ok(output) = Command::new("qemu-img").args(words).output() else {
        println!("skipped: qemu-img (Debian: qemu-utils) is not here");
        return;
    };
    assert!(output.status.success());
    let disk = open(&format!("{image},format=qcow2")).expect("opens");
    assert_eq!(disk.shape.size, 0);
    assert_eq!(Bench::new(&disk).flush(), Outcome::Done);
}

#[test]
fn blocks_are_those_that_were_asked_for() {
    for size in [512, 1024, 4096] {
        for options in ["engine=sync", "engine=io_uring", "cache=none"] {
            let folder = Folder::new();
            let image = folder.with("odd.img", &pattern()[..70_144]);
            let text = format!("{image},block-size={size},{options}");
            if options == "cache=none" {
                // It could not be filled up there.
                std::fs::write(&image, &pattern()[..65_536]).expect("a file");
            }
            let Some(disk) = open_or_skip(&text) else {
                continue;
            };
            let shape = disk.shape.clone();
            assert_eq!(shape.block_size, size);
            assert!(shape.physical_block_size >= size && shape.discard_granularity >= size);
            assert!(shape.size.is_multiple_of(u64::from(size)));
            // Drivers may still ask for less.
            let mut bench = Bench::new(&disk);
            bench.write(512, &[9; 512]);
            let mut expected = pattern()[..2048].to_vec();
            expected[512..1024].fill(9);
            assert!(bench.read(0, 2048) == expected, "{text}");
        }
    }
}

/// A block device with sectors of 4096 bytes, made of a file.
struct Loop(String);

impl Loop {
    /// `None` where the host does not let us; this was said then.
    fn new(file: &str) -> Option<Loop> {
        let words = ["--find", "--show", "--sector-size=4096", file];
        let output = Command::new("losetup").args(words).output();
        match output {
            Ok(output) if output.status.success() => {
                let name = String::from_utf8(output.stdout).expect("a path");
                Some(Loop(name.trim().to_owned()))
            }
            _ => {
                println!("skipped: losetup makes no device here: {output:?}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_device_of_large_sectors_has_small_blocks_where_they_are_asked_for() {
    let folder = Folder::new();
    let image = folder.image();
    let Some(device) = Loop::new(&image) else {
        return;
    };
    let path = &device.0;
    let disk = open(path).expect("opens");
    assert_eq!(
        (disk.shape.block_size, disk.shape.size),
        (4096, SIZE as u64)
    );
    drop(disk);
    let mut model = pattern();
    let engines = ENGINES.map(|engine| [engine.to_owned(), format!("{engine},cache=none")]);
    for (options, fill) in engines.concat().iter().zip(1..) {
        let Some(disk) = open_or_skip(&format!("{path},block-size=512,{options}")) else {
            continue;
        };
        let shape = &disk.shape;
        let blocks = (
            shape.block_size,
            shape.physical_block_size,
            shape.discard_granularity,
        );
        assert_eq!((blocks.0, blocks.1), (512, 4096), "{options}");
        assert!(blocks.2 >= 4096, "{options}: a discard takes whole sectors");
        let mut bench = Bench::new(&disk);
        for (operation, sector, sectors) in [
            (Operation::Write, 9, 1),
            (Operation::Write, 15, 2),
            (Operation::WriteZeroes { unmap: false }, 23, 1),
            (Operation::WriteZeroes { unmap: true }, 31, 10),
            (Operation::Read, 30, 13),
        ] {
            let range = sector * 512..(sector + sectors) * 512;
            let mut bytes = vec![fill; range.len()];
            let outcome = bench.run(operation, range.start, &mut bytes, &[], false);
            assert_eq!(outcome, Outcome::Done, "{options}: {operation:?}");
            match operation {
                Operation::Read => assert!(bytes == model[range], "{options}"),
                Operation::Write => model[range].fill(fill),
                _ => model[range].fill(0),
            }
        }
        assert!(bench.read(0, SIZE) == model, "{options}");
        // A discard of a part of a sector is advice that the device does not take.
        let outcome = bench.run(Operation::Discard, 512, &mut [0; 512], &[], false);
        assert_eq!(outcome, Outcome::Done, "{options}");
        assert!(bench.read(0, SIZE) == model, "{options}");
    }
}

#[test]
fn an_odd_raw_image_stands_behind_an_overlay() {
    if !cfg!(feature = "qcow2") {
        return;
    }
    let folder = Folder::new();
    let bytes = &pattern()[..70_000];
    let base = folder.with("odd.img", bytes);
    let image = folder.path("over.qcow2");
    let words = [
        "create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &image,
    ];
    let Ok(output) = Command::new("qemu-img").args(words).output() else {
        println!("skipped: qemu-img (Debian: qemu-utils) is not here");
        return;
    };
    assert!(output.status.success());
    let disk = open(&format!("{image},format=qcow2,backing={base}")).expect("opens");
    let mut expected = bytes.to_vec();
    expected.resize(70_144, 0);
    let mut bench = Bench::new(&disk);
    assert!(bench.read(0, 70_144) == expected);
    bench.write(69_632, &[3; 512]);
    expected[69_632..].fill(3);
    assert!(bench.read(0, 70_144) == expected);
    drop(bench);
    assert_eq!(len(&base), 70_000);
}
