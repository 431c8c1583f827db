use crate::guest::{Armlet, Guest};
use crate::interpreter::{BOARD, image};
use crate::rig;
use crate::steps::{Disk, Driver, QUEUE, Steps, slots};
use rustix::process::Signal;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// How often each image is cut off, where this variable says nothing else.
const VARIABLE: &str = "ARMLET_CUTS";
const USUALLY: usize = 6;

/// A disk, the blocks of 4 KiB that a guest writes, and how far apart they are: further than the
/// clusters of a qcow2 image.
const SIZE: u64 = 512 << 20;
const BLOCKS: u64 = 1000;
const BLOCK: u32 = 0x1000;
const APART: u64 = 0x5_1000;
/// Rounds with one image. Each writes blocks that none before it has reached, so that a qcow2 image
/// grows in all of them.
const ON_ONE_IMAGE: usize = 3;
/// What a round reaches at most before it is cut off, about.
const REACH: u64 = BLOCKS / ON_ONE_IMAGE as u64;

/// Where the block that a round writes as the `number`th is, in an order that goes back and forth.
fn place(round: usize, number: u64) -> u64 {
    let first = (round % ON_ONE_IMAGE) as u64 * REACH;
    (first + number) * 701 % BLOCKS * APART
}

/// What stands at the begin and at the end of a block.
fn stamp(round: usize, number: u64) -> u64 {
    (round as u64 + 1) << 32 | number
}

/// Writes all blocks, each with a flush behind it, and says each number when both are done.
fn writer(round: usize, base: u64) -> Steps {
    let mut steps = Steps::default();
    let mut disk = Disk::new(Driver::new(base, 0));
    // VIRTIO_BLK_F_FLUSH (virtio 1.2, section 5.2.3): without it each write would be one through.
    disk.driver.start(&mut steps, 1 << 9, &[QUEUE]);
    for number in 0..BLOCKS {
        for at in [disk.data(), disk.data() + u64::from(BLOCK) - 8] {
            steps.write(8, at, stamp(round, number));
        }
        disk.request(&mut steps, Disk::WRITE, place(round, number) / 512, BLOCK);
        disk.request(&mut steps, Disk::FLUSH, 0, 0);
        steps.print(&format!("{number}\n"));
    }
    steps.power_off();
    steps
}

/// The kinds of image.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Raw,
    Qcow2,
}

/// Runs a program, which has to succeed.
fn run(program: &Path, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("cannot run {program:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program:?} {arguments:?}: {errors}"
    );
}

fn create(kind: Kind, path: &str, qemu_img: Option<&Path>) {
    match (kind, qemu_img) {
        (Kind::Qcow2, Some(qemu_img)) => {
            let size = SIZE.to_string();
            run(qemu_img, &["create", "-q", "-f", "qcow2", path, &size]);
        }
        _ => File::create(path)
            .and_then(|file| file.set_len(SIZE))
            .expect("an image"),
    }
}

/// Fails unless every block up to `last` is there, of an image in good order. Returns how many
/// clusters of it nobody refers to.
fn check(kind: Kind, path: &str, qemu_img: Option<&Path>, round: usize, last: u64) -> u64 {
    let converted = format!("{path}.raw");
    let mut file = path;
    let mut leaked = 0;
    if let (Kind::Qcow2, Some(qemu_img)) = (kind, qemu_img) {
        let output = Command::new(qemu_img).args(["check", path]).output();
        let output = output.expect("qemu-img can be run");
        // 3 tells of clusters that nobody refers to, which cost room and no data.
        assert!(
            matches!(output.status.code(), Some(0 | 3)),
            "round {round}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        let said = String::from_utf8_lossy(&output.stdout);
        let line = said.lines().find(|line| line.contains(" leaked clusters"));
        let count = line.and_then(|line| line.split_whitespace().next());
        leaked = count.map_or(0, |count| count.parse().expect("a number"));
        assert_eq!(leaked > 0, output.status.code() == Some(3), "{said}");
        run(
            qemu_img,
            &["convert", "-f", "qcow2", "-O", "raw", path, &converted],
        );
        file = &converted;
    }
    let file = File::open(file).expect("an image");
    for number in 0..=last {
        let place = place(round, number);
        for at in [place, place + u64::from(BLOCK) - 8] {
            let mut word = [0; 8];
            file.read_exact_at(&mut word, at).expect("a block");
            assert_eq!(
                u64::from_le_bytes(word),
                stamp(round, number),
                "round {round}: block {number} of {last} at {at:#x} is lost"
            );
        }
    }
    let _ = fs::remove_file(converted);
    leaked
}

/// Counts the rounds that left clusters in a qcow2 image that nobody refers to.
#[derive(Default)]
struct Leaks {
    /// In the image so far.
    clusters: u64,
    rounds: usize,
}

impl Leaks {
    fn add(&mut self, kind: Kind, round: usize, last: u64, leaked: u64) {
        if round.is_multiple_of(ON_ONE_IMAGE) {
            self.clusters = 0;
        }
        let new = leaked.saturating_sub(self.clusters);
        self.clusters = leaked;
        self.rounds += usize::from(new > 0);
        println!(
            "{kind:?}, round {round}: {last} writes were acknowledged, {new} clusters leaked; so did {} of {} rounds",
            self.rounds,
            round + 1
        );
    }
}

/// The guest of a round, which has done some of its work, a different part in each round.
fn started(round: usize, path: &str, kind: Kind) -> Guest {
    let format = match kind {
        Kind::Raw => "raw",
        Kind::Qcow2 => "qcow2",
    };
    let options = [("--disk", format!("path={path},format={format}"))];
    let slots = slots(&options);
    let base = slots.iter().find(|(name, _)| name == "disk0");
    let steps = writer(round, base.expect("a disk").1);
    let [(name, value)] = &options;
    let armlet = Armlet::image(&image(&steps)).option("--board", BOARD);
    let mut guest = armlet.option(name, value).start();
    let wanted = 1 + (round as u64 * 97 + 61) % 250;
    guest.expect(&format!("\n{wanted}\n"));
    guest
}

/// The last number that the guest said in full before it could not go on.
fn acknowledged(text: &str) -> u64 {
    let good = text.split('!').next().unwrap_or_default();
    let (lines, _) = good.rsplit_once('\n').expect("lines");
    let last = lines.lines().next_back().expect("a line");
    last.parse().expect("a number")
}

fn rounds() -> usize {
    std::env::var(VARIABLE).map_or(USUALLY, |number| number.parse().expect(VARIABLE))
}

/// Kills armlet over and over while its guest writes to the same image.
fn killed(kind: Kind, qemu_img: Option<&Path>) {
    // A kill takes nothing from the host's page cache: memory will do.
    let folder = tempfile::tempdir_in("/dev/shm").expect("a temporary folder");
    let path = folder.path().join("disk").to_string_lossy().into_owned();
    let mut leaks = Leaks::default();
    for round in 0..rounds() {
        if round.is_multiple_of(ON_ONE_IMAGE) {
            create(kind, &path, qemu_img);
        }
        let guest = started(round, &path, kind);
        guest.signal(Signal::KILL);
        let outcome = guest.end();
        outcome.assert_signal(Signal::KILL);
        let last = acknowledged(&outcome.text());
        let leaked = check(kind, &path, qemu_img, round, last);
        leaks.add(kind, round, last, leaked);
    }
}

#[test]
fn what_a_guest_flushed_to_a_raw_image_survives_a_kill() {
    if rig::small() {
        killed(Kind::Raw, None);
    }
}

#[test]
fn what_a_guest_flushed_to_a_qcow2_image_survives_a_kill() {
    if !rig::small() {
        return;
    }
    if let Some(qemu_img) = rig::program("qemu-img") {
        killed(Kind::Qcow2, Some(&qemu_img));
    }
}

/// A file system of the host on a disk of its own, whose power can be cut.
struct Cuttable {
    folder: TempDir,
    device: PathBuf,
}

impl Cuttable {
    /// `None` where there are not the programs and rights for it; this was said then.
    fn new() -> Option<Cuttable> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (mke2fs, _) = (rig::program("mke2fs")?, rig::program("perl")?);
        let device = folder.path().join("device");
        let file = File::create(&device).expect("a file");
        file.set_len(1 << 30).expect("a sparse file");
        let options = ["-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1"];
        let path = device.to_string_lossy();
        run(&mke2fs, &[&options[..], &[&path]].concat());
        fs::create_dir(folder.path().join("mounted")).expect("a folder");
        let this = Cuttable { folder, device };
        if this.mount() {
            return Some(this);
        }
        println!("skipped: this host mounts no file");
        None
    }

    fn mounted(&self) -> PathBuf {
        self.folder.path().join("mounted")
    }

    fn mount(&self) -> bool {
        let mut mount = Command::new("mount");
        mount.args(["-t", "ext4", "-o", "loop"]);
        let status = mount.args([&self.device, &self.mounted()]).status();
        status.is_ok_and(|status| status.success())
    }

    /// Lets the file system forget what it has not written, in the middle of everything that is
    /// under way (Linux, fs/ext4/ioctl.c: `ext4_force_shutdown`, EXT4_GOING_FLAGS_NOLOGFLUSH).
    fn cut(&self) {
        let perl = rig::program("perl").expect("it was there");
        let file = self.mounted().join("anything");
        let code = "open(F, '<', $ARGV[0]) or die $!; my $how = pack('L', 2); \
                    ioctl(F, 0x8004587d, $how) or die $!";
        run(&perl, &["-e", code, &file.to_string_lossy()]);
    }

    /// Mounts it anew, as after the power has come back.
    fn mend(&self) {
        run(Path::new("umount"), &[&self.mounted().to_string_lossy()]);
        assert!(self.mount(), "the file system is gone");
    }
}

impl Drop for Cuttable {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.mounted())
            .status();
    }
}

/// Cuts the power of the host's file system over and over while a guest writes to an image on it.
fn cut(kind: Kind, qemu_img: Option<&Path>) {
    let Some(host) = Cuttable::new() else { return };
    File::create(host.mounted().join("anything")).expect("a file");
    let path = host.mounted().join("disk").to_string_lossy().into_owned();
    let mut leaks = Leaks::default();
    for round in 0..rounds() {
        if round.is_multiple_of(ON_ONE_IMAGE) {
            create(kind, &path, qemu_img);
            run(Path::new("sync"), &[]);
        }
        let guest = started(round, &path, kind);
        // What is being flushed at the moment of the cut does not count: ext4 keeps quiet of extents
        // that it then cannot mark as written, and fdatasync(2) returns 0 (Linux 6.12,
        // fs/ext4/page-io.c: `ext4_end_io_end` under `ext4_forced_shutdown`).
        let last = acknowledged(&guest.said());
        host.cut();
        guest.signal(Signal::KILL);
        guest.end();
        host.mend();
        let leaked = check(kind, &path, qemu_img, round, last);
        leaks.add(kind, round, last, leaked);
    }
}

#[test]
fn what_a_guest_flushed_to_a_raw_image_survives_a_power_cut() {
    if rig::main().is_some() {
        cut(Kind::Raw, None);
    }
}

#[test]
fn what_a_guest_flushed_to_a_qcow2_image_survives_a_power_cut() {
    if rig::main().is_none() {
        return;
    }
    if let Some(qemu_img) = rig::program("qemu-img") {
        cut(Kind::Qcow2, Some(&qemu_img));
    }
}
