//! Disks that get another image, and images without a whole last sector.

use super::*;
use crate::broker::{Broker, Service};
use armlet_devices::virtio::Change;
use std::os::fd::AsRawFd;

const ENGINES: [&str; 2] = ["engine=sync", "engine=io_uring"];

fn change(disk: &Disk, path: &str) -> Result<(u64, Change)> {
    disk.handle().change(Path::new(path))
}

fn refused(disk: &Disk, path: &str) -> String {
    format!("{:#}", change(disk, path).expect_err(path))
}

#[test]
fn an_engine_turns_to_another_image_when_it_is_told_to() {
    let folder = Folder::new();
    for options in ENGINES {
        let image = folder.image();
        let other = folder.with("other.img", &[9; SIZE / 2]);
        let Some(disk) = open_or_skip(&format!("{image},{options}")) else {
            continue;
        };
        let mut bench = Bench::new(&disk);
        let half = SIZE as u64 / 2;
        let told = change(&disk, &other).expect("another");
        assert_eq!(told, (half, Change::DiskStorage(half)));
        // What comes before that is for the image that it had.
        assert_eq!(bench.read(512, 512), pattern()[512..1024]);
        bench.engine.renew();
        assert_eq!(bench.read(512, 512), [9; 512]);
        bench.write(512, &[5; 512]);
        assert_eq!(std::fs::read(&other).expect("a file")[512..1024], [5; 512]);
        assert_eq!(std::fs::read(&image).expect("a file"), pattern());
        // The next life has it, too.
        drop(bench);
        assert_eq!(Bench::new(&disk).read(0, 512), [9; 512]);
        assert_eq!(disk.handle().look().expect("a size"), half);
    }
}

#[test]
fn an_image_is_replaced_by_what_can_replace_it() {
    let folder = Folder::new();
    let image = folder.image();
    let disk = open(&image).expect("opens");
    assert!(refused(&disk, &folder.path("none")).contains("No such file"));
    assert!(refused(&disk, "/dev/null").contains("neither a file nor a block device"));
    let qcow2 = folder.with("a.qcow2", &[&QCOW2[..], &[0; 508]].concat());
    assert!(refused(&disk, &qcow2).contains("say format=qcow2"));
    let taken = folder.with("taken.img", &[1; 512]);
    let other = open(&taken).expect("opens");
    assert!(refused(&disk, &taken).contains("is in use"));
    let readers = open(&format!("{taken},readonly"));
    assert!(readers.is_err(), "the other one writes");
    drop(other);
    // Read-only stays so.
    let readonly = open(&format!("{},readonly", folder.image())).err();
    assert!(readonly.is_some(), "this one writes");
    assert_eq!(change(&disk, &taken).expect("free").0, 512);
    // The one before is given back with the last engine that had it, and it had none.
    let before = open(&format!("{image},readonly")).expect("free");
    change(&before, &image).expect("the same one");
    let mut bench = Bench::new(&before);
    let outcome = bench.run(Operation::Write, 0, &mut [0; 512], &[512], false);
    assert_eq!(outcome, Outcome::Failed);
}

/// As a client says that a file has grown whose disk it does not know.
#[test]
fn the_same_file_is_looked_at_again() {
    let folder = Folder::new();
    let image = folder.image();
    let disk = open(&image).expect("opens");
    let file = File::options().append(true).open(&image).expect("a file");
    file.set_len(2 * SIZE as u64).expect("room");
    let size = 2 * SIZE as u64;
    assert_eq!(
        change(&disk, &image).expect("ours"),
        (size, Change::DiskSize(size))
    );
}

#[test]
fn what_a_file_has_of_a_last_sector_may_be_hidden() {
    let folder = Folder::new();
    for (len, seen) in [(0, 0), (511, 0), (512, 512), (1023, 512), (70_000, 69_632)] {
        let image = folder.with("odd.img", &pattern()[..len]);
        let mut options = DiskOptions::new(&image);
        options.tail = Tail::Hidden;
        let disk = options.open(0).expect("opens");
        assert_eq!(disk.shape.size, seen, "{len}");
        assert_eq!(disk.handle().look().expect("a size"), seen);
        // It needs no inotify(7) of the user's few.
        let device = disk.device().expect("a device");
        let sources = armlet_devices::sync::lock(&device).sources();
        let Storage::Raw { image, .. } = &disk.storage else {
            panic!("it is raw");
        };
        assert_eq!(image.get().growth_fd(), None);
        assert!(
            sources
                .iter()
                .all(|source| source.fd != image.get().file.as_raw_fd())
        );
    }
}

#[test]
fn nothing_is_flushed_of_a_disk_that_is_not_safe() {
    let folder = Folder::new();
    let image = folder.image();
    let disk = open(&format!("{image},cache=unsafe")).expect("opens");
    assert!(!disk.shape.flushes);
    let disk = open(&format!("{image},readonly"));
    assert!(disk.is_err(), "it is locked as others");
}

#[test]
fn the_broker_opens_images_and_nothing_else_for_a_disk() {
    let folder = Folder::new();
    let image = folder.image();
    let broker = Broker::fork(Some(&crate::broker::tests::native())).expect("a process");
    let offer = |writable| {
        broker
            .offer(Service::Images { writable })
            .expect("a service")
    };
    let [to_read, to_write] = [false, true].map(offer);
    broker.seal().expect("a broker");
    let kind = |path: &str| {
        broker
            .open(to_write, Path::new(path))
            .err()
            .map(|error| error.raw_os_error())
    };
    let is = |error: rustix::io::Errno| Some(Some(error.raw_os_error()));
    assert_eq!(kind(&folder.path("none")), is(rustix::io::Errno::NOENT));
    assert_eq!(kind("/dev/null"), is(rustix::io::Errno::NOTBLK));
    assert_eq!(kind("/"), is(rustix::io::Errno::ISDIR));
    assert_eq!(kind(&"x".repeat(5000)), is(rustix::io::Errno::NAMETOOLONG));
    let mut file: File = broker
        .open(to_read, Path::new(&image))
        .expect("a file")
        .into();
    assert!(file.write_all(&[0]).is_err(), "it is only read");
    let mut file: File = broker
        .open(to_write, Path::new(&image))
        .expect("a file")
        .into();
    file.write_all(&pattern()[..1]).expect("it is written, too");
    drop(file);
    // A disk does so by it, from any folder.
    let here = std::env::current_dir().expect("a folder");
    let disk = DiskOptions::new(&image);
    let disk = disk
        .open_as(0, Opener::Broker(broker, to_write, here), true)
        .expect("opens");
    let other = folder.with("other.img", &[1; 1024]);
    assert_eq!(change(&disk, &other).expect("another").0, 1024);
    assert!(refused(&disk, &folder.path("none")).contains("none: No such file"));
    let nobody = DiskOptions::new(&image)
        .open_as(1, Opener::Nobody, false)
        .expect("opens");
    assert!(refused(&nobody, &other).contains("no client was to change"));
}
