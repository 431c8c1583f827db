pub(crate) use crate::guest::noise;
use crate::guest::{Armlet, GLANCE, Guest, Input, Outcome, section};
use crate::rig::{self, Rig};
use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::Duration;

const MIB: usize = 1 << 20;

/// The first half of a disk, before a guest copies it to the second.
const HALF: usize = 4 * MIB;

/// A disk image: noise, and behind it as many zeros.
fn half_full(seed: u64) -> Vec<u8> {
    let mut image = noise(seed, HALF);
    image.resize(2 * HALF, 0);
    image
}

/// What a guest with disks of every kind showed.
struct Disks {
    outcome: Outcome,
    script: String,
    /// What the images held afterwards, in the order of the options.
    images: Vec<Vec<u8>>,
}

/// The kinds: options and serial number. The last one is read-only.
const KINDS: [(&str, &str); 5] = [
    ("engine=sync,id=by-a-thread", "by-a-thread"),
    ("engine=auto,id=as-armlet-likes", "as-armlet-likes"),
    ("cache=none,id=past-the-cache", "past-the-cache"),
    ("queues=2,id=twenty-bytes-of-name", "twenty-bytes-of-name"),
    ("readonly,id=not-to-be-changed", "not-to-be-changed"),
];

/// Looks at each disk and copies the first half of each to its second, in pieces of several sizes,
/// through the guest's page cache and past it.
const COPY: &str = "
echo '== disks'
for disk in vda vdb vdc vdd vde; do
    cd /sys/block/$disk
    echo \"$disk $(cat size) $(cat ro) $(cat serial)\"
done
echo '== copies'
for disk in vda vdb vdc vdd; do
    part() { dd if=/dev/$disk of=/dev/$disk conv=notrunc,fsync status=none \"$@\" || echo bad $disk; }
    part bs=64k count=16 seek=64
    part bs=4k skip=256 count=256 seek=1280 iflag=direct oflag=direct
    part bs=1M skip=2 count=1 seek=6 iflag=direct oflag=direct
    part bs=512 skip=6144 count=2048 seek=14336
done
echo copied
echo '== readonly'
dd if=/dev/zero of=/dev/vde bs=512 count=1 2>&1 | head -n 1
dd if=/dev/vde bs=64k status=none | sha256sum
echo '== end'
";

fn disks(rig: &Rig) -> &'static Disks {
    static DISKS: OnceLock<Disks> = OnceLock::new();
    DISKS.get_or_init(|| {
        let mut armlet = Armlet::devices(rig, COPY).cpus(2);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut paths = Vec::new();
        for (index, (options, _)) in KINDS.iter().enumerate() {
            let path = folder.path().join(format!("disk{index}.img"));
            fs::write(&path, half_full(index as u64)).expect("an image");
            // tmpfs knows O_DIRECT since Linux 6.6 (mm/shmem.c: shmem_file_open).
            let options = match bypasses_the_cache(&path) {
                true => options.to_string(),
                false => options.replace("cache=none", "cache=writeback"),
            };
            armlet = armlet.option("--disk", format!("path={},{options}", path.display()));
            paths.push(path);
        }
        let outcome = armlet.run();
        let images = paths.iter().map(|path| fs::read(path).expect("an image"));
        Disks {
            script: outcome.script(),
            images: images.collect(),
            outcome,
        }
    })
}

/// Whether the file's file system reads and writes past the page cache.
fn bypasses_the_cache(path: &Path) -> bool {
    let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).is_ok()
}

#[test]
fn a_guest_reads_and_writes_its_disks() {
    let Some(rig) = rig::any() else { return };
    let disks = disks(rig);
    assert_eq!(section(&disks.script, "copies"), "copied", "what dd said");
    for (index, image) in disks.images[..4].iter().enumerate() {
        let wanted = noise(index as u64, HALF);
        let (first, second) = image.split_at(HALF);
        let about = KINDS[index].0;
        assert!(first == wanted, "the first half of the disk with {about}");
        let differs = second.iter().zip(&wanted).position(|(a, b)| a != b);
        assert_eq!(differs, None, "the copy on the disk with {about}");
    }
    assert_eq!(disks.outcome.errors, "");
}

#[test]
fn disks_are_found_in_order_by_size_and_serial_number() {
    let Some(rig) = rig::any() else { return };
    let mut wanted = String::new();
    for (index, (options, serial)) in KINDS.iter().enumerate() {
        let name = ["vda", "vdb", "vdc", "vdd", "vde"][index];
        let readonly = u8::from(options.starts_with("readonly"));
        let sectors = 2 * HALF / 512;
        wanted.push_str(&format!("{name} {sectors} {readonly} {serial}\n"));
    }
    assert_eq!(section(&disks(rig).script, "disks"), wanted.trim_end());
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let Some(rig) = rig::any() else { return };
    let disks = disks(rig);
    let said = section(&disks.script, "readonly");
    assert!(said.starts_with("dd: "), "the guest could write: {said}");
    assert!(disks.images[4] == half_full(4));
}

#[test]
fn a_guest_gives_back_what_it_discards() {
    let Some(rig) = rig::main() else { return };
    let script = "
for disk in vda vdb; do
    cat /sys/block/$disk/queue/discard_max_bytes
    blkdiscard -o 1048576 -l 4194304 /dev/$disk || echo failed
    dd if=/dev/$disk bs=1M skip=1 count=4 status=none | tr -d '\\0' | wc -c
done";
    let armlet = Armlet::devices(rig, script);
    let paths = ["sync", "auto"].map(|engine| (engine, armlet.file(engine, &noise(1, 8 * MIB))));
    let before = fs::metadata(&paths[0].1).expect("an image").blocks();
    let copies = paths.clone();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut armlet = armlet;
    let mut kept = Vec::new();
    for (engine, path) in copies {
        let image = folder.path().join(engine);
        fs::rename(path, &image).expect("an image");
        armlet = armlet.option(
            "--disk",
            format!("path={},engine={engine}", image.display()),
        );
        kept.push(image);
    }
    let outcome = armlet.run();
    let said = outcome.script();
    let said: Vec<&str> = said.lines().collect();
    for (index, image) in kept.iter().enumerate() {
        let most: u64 = said[2 * index].parse().expect("a number of bytes");
        assert!(most >= 4 * MIB as u64, "the guest may discard {most} bytes");
        assert_eq!(said[2 * index + 1], "0", "bytes left of what was discarded");
        let after = fs::metadata(image).expect("an image").blocks();
        assert!(
            after + 4 * MIB as u64 / 512 <= before + 64,
            "{before} blocks of 512 bytes before, {after} after"
        );
    }
}

#[test]
fn disks_work_on_after_reboots_in_place() {
    let Some(rig) = rig::any() else { return };
    let script = "
count=$(dd if=/dev/vda bs=512 count=1 status=none | tr -d '\\0')
count=$((${count:-0} + 1))
echo LIFE $count
printf '%s' $count | dd of=/dev/vda bs=512 conv=notrunc,sync,fsync status=none
[ $count -lt 4 ] || exit 0
reboot -f";
    let armlet = Armlet::devices(rig, script);
    let image = armlet.file("disk.img", &vec![0; MIB]);
    let outcome = armlet
        .option("--disk", format!("path={}", image.display()))
        .run();
    outcome.assert_status(0);
    let text = outcome.text();
    let lives: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("LIFE "))
        .collect();
    assert_eq!(lives, ["LIFE 1", "LIFE 2", "LIFE 3", "LIFE 4"]);
}

#[test]
fn a_disk_works_on_when_its_driver_comes_anew() {
    let Some(rig) = rig::main() else { return };
    // Each binding of the driver resets the device and starts it again.
    let script = "
device=$(basename $(readlink /sys/block/vda/device))
for time in 1 2 3 4 5; do
    echo $device >/sys/bus/virtio/drivers/virtio_blk/unbind
    [ -e /dev/vda ] && echo still there
    echo $device >/sys/bus/virtio/drivers/virtio_blk/bind
    dd if=/dev/vda bs=64k status=none | sha256sum
done | uniq -c | awk '{ print $1 }'";
    let armlet = Armlet::devices(rig, script);
    let image = armlet.file("disk.img", &half_full(7));
    let outcome = armlet
        .option("--disk", format!("path={}", image.display()))
        .run();
    assert_eq!(outcome.script().trim(), "5", "times with the same contents");
}

#[test]
fn a_disk_works_on_after_kexec() {
    let Some(rig) = rig::main() else { return };
    let Some(tools) = rig::tools_disk() else {
        return;
    };
    // The kernel that comes next lies on disks of its own, as it is.
    let script = "
dd if=/dev/vda bs=64k status=none | sha256sum
grep -q second /proc/cmdline && exit 0
mkdir -p /mnt
mount -t ext4 -o ro /dev/vdb /mnt
mount --bind /proc /mnt/proc; mount --bind /sys /mnt/sys; mount -t tmpfs tmpfs /mnt/tmp
cat /dev/vdc >/mnt/tmp/kernel; cat /dev/vdd >/mnt/tmp/initrd
chroot /mnt /usr/sbin/kexec -l /tmp/kernel --initrd=/tmp/initrd \\
    --command-line=\"$(cat /proc/cmdline) second\" || exit 1
chroot /mnt /usr/sbin/kexec -e";
    // Linux 6.12 dies in its own kexec_load where its addresses have 52 bits (trans_pgd_create_copy).
    let armlet = Armlet::devices(rig, script)
        .memory("512M")
        .cmdline("arm64.nolva");
    let whole = |mut data: Vec<u8>| {
        data.resize(data.len().next_multiple_of(4096), 0);
        data
    };
    let read = |path: &Path| fs::read(path).expect("a file");
    let image = armlet.file("disk.img", &half_full(8));
    let kernel = armlet.file("kernel.img", &whole(read(&rig.asset("Image"))));
    let initrd = armlet.initrd();
    let initrd = armlet.file("initrd.img", &whole(read(&initrd)));
    let mut armlet = armlet.option("--disk", format!("path={}", image.display()));
    for path in [tools, &kernel, &initrd] {
        armlet = armlet.option("--disk", format!("path={},readonly", path.display()));
    }
    let outcome = armlet.run();
    outcome.assert_status(0);
    let text = outcome.text();
    let sums: Vec<&str> = text.lines().filter(|line| line.ends_with("  -")).collect();
    assert_eq!(sums.len(), 2, "{text}");
    assert_eq!(sums[0], sums[1]);
}

#[test]
fn a_locked_image_is_refused() {
    let Some(rig) = rig::main() else { return };
    let mut first =
        Armlet::devices(rig, "echo HELD; read -r line </dev/console").input(Input::Pipe);
    let image = first.file("disk.img", &vec![0; MIB]);
    let option = format!("path={}", image.display());
    first = first.option("--disk", &option);
    let mut first = first.start();
    first.expect("HELD");
    // The option's path is in the folder of the first guest, which still runs.
    let second = Command::new(env!("CARGO_BIN_EXE_armlet"))
        .args(["run", "--kernel"])
        .arg(rig.asset("Image"))
        .args(["--disk", &option])
        .output()
        .expect("armlet can be run");
    let errors = String::from_utf8_lossy(&second.stderr);
    assert_eq!(errors.lines().count(), 1, "{errors}");
    assert!(errors.contains("disk.img"), "{errors}");
    assert!(
        [Some(2), Some(3)].contains(&second.status.code()),
        "{errors}"
    );
    first.send(b"\n");
    first.end().assert_status(0);
}

#[test]
fn a_truncated_image_is_an_io_error_in_the_guest() {
    let Some(rig) = rig::main() else { return };
    let script = "
echo READY
read -r line </dev/console
dd if=/dev/vda of=/dev/null bs=64k skip=32 count=1 iflag=direct 2>&1 | grep -o 'I/O error'
echo alive";
    let armlet = Armlet::devices(rig, script).input(Input::Pipe);
    let image = armlet.file("disk.img", &noise(3, 4 * MIB));
    let mut guest = armlet
        .option("--disk", format!("path={}", image.display()))
        .start();
    guest.expect("READY");
    let file = File::options().write(true).open(&image).expect("an image");
    file.set_len(MIB as u64).expect("a truncated image");
    guest.send(b"\n");
    guest.expect("I/O error");
    guest.expect("alive");
    let outcome = guest.end();
    assert_eq!(outcome.script().lines().last(), Some("alive"));
    assert!(outcome.errors.contains("disk0"), "{}", outcome.errors);
}

#[test]
fn an_empty_image_that_is_filled_grows_under_its_guest() {
    let Some(rig) = rig::main() else { return };
    let script = "
for disk in vda vdb; do
    echo EMPTY $(cat /sys/block/$disk/size)
    until [ $(cat /sys/block/$disk/size) != 0 ]; do sleep 0.1; done
    echo FILLED $(cat /sys/block/$disk/size)
    dd if=/dev/$disk bs=64k status=none | tail -n 1
done";
    let mut armlet = Armlet::devices(rig, script);
    let images = ["sync", "io_uring"].map(|engine| (engine, armlet.file(engine, b"")));
    for (engine, image) in &images {
        let option = format!("path={},engine={engine}", image.display());
        armlet = armlet.option("--disk", option);
    }
    let mut guest = armlet.start();
    for (engine, image) in &images {
        guest.expect("EMPTY 0");
        let mut contents = "some fifteen b.\n".repeat(MIB / 16 - 1);
        contents += &format!("{engine:>15}\n");
        fs::write(image, contents).expect("room");
        guest.expect("FILLED 2048");
        guest.expect(&format!(" {engine}"));
    }
    guest.end().assert_status(0);
}

/// How often armlet is killed, by each of two tests that may run at once.
const KILLS: u64 = 26;

/// Writes numbered records to a file, each with fsync, and says so of each one that is safe.
const RECORDS: &str = "
mount -t ext4 /dev/vda /mnt || exit 1
first=$(wc -c </mnt/records 2>/dev/null)
first=$((${first:-0} / 512))
echo MOUNTED $first
number=$first
while :; do
    printf '%-511d\\n' $number | dd of=/mnt/records bs=512 seek=$number conv=notrunc,fsync status=none ||
        exit 1
    echo \"SAFE $number.\"
    number=$((number + 1))
    # Metadata has to be safe as well.
    [ $((number % 7)) -ne 0 ] || { mv /mnt/a /mnt/b 2>/dev/null; echo $number >/mnt/a; sync; }
done";

/// The last record that the guest called safe on its console.
fn last_safe(console: &str) -> Option<u64> {
    let numbers = console.lines().filter_map(|line| {
        line.trim_end()
            .strip_prefix("SAFE ")?
            .strip_suffix('.')?
            .parse()
            .ok()
    });
    numbers.max()
}

/// Fails unless `image` is a clean file system after its journal was replayed.
fn check(e2fsck: &Path, image: &Path, round: u64) {
    let run = |options: [&str; 2]| {
        let output = Command::new(e2fsck).args(options).arg(image).output();
        let output = output.expect("e2fsck can be run");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code(), said)
    };
    // 1 (e2fsck(8), exit code): the superblock's counters, which ext4 writes late, were brought up to
    // date without a word. Whatever else it mends it says, a line each.
    let (status, said) = run(["-p", "-f"]);
    assert!(matches!(status, Some(0 | 1)), "round {round}: {said}");
    let expected = |line: &str| line.ends_with("recovering journal") || line.contains(" files (");
    let mended = said.lines().find(|line| !expected(line));
    assert_eq!(mended, None, "round {round}: {said}");
    let (status, said) = run(["-n", "-f"]);
    assert_eq!(status, Some(0), "round {round}: {said}");
}

/// A guest that writes until armlet is killed, `after` it called the first record safe.
fn killed(rig: &Rig, image: &Path, options: &str, after: Duration) -> String {
    let armlet = Armlet::devices(rig, &format!("mkdir -p /mnt\n{RECORDS}"));
    let mut guest: Guest = armlet
        .option("--disk", format!("path={}{options}", image.display()))
        .start();
    guest.expect("MOUNTED");
    guest.expect("SAFE ");
    sleep(after);
    guest.signal(Signal::KILL);
    let outcome = guest.end();
    outcome.assert_signal(Signal::KILL);
    outcome.text()
}

/// A guest's disk is written and armlet killed again and again; all that the guest was told is safe
/// is there.
fn nothing_is_lost(engine: &str) {
    let Some(rig) = rig::main() else { return };
    let (Some(mke2fs), Some(e2fsck)) = (rig::program("mke2fs"), rig::program("e2fsck")) else {
        return;
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let image = folder.path().join("disk.img");
    File::create(&image)
        .and_then(|file| file.set_len(32 * MIB as u64))
        .expect("an image");
    let made = Command::new(mke2fs)
        .args(["-q", "-F", "-t", "ext4"])
        .arg(&image)
        .status();
    assert!(made.expect("mke2fs can be run").success());

    let mut safe = None;
    for round in 0..KILLS {
        let cache = ["writeback", "none"][round as usize % 2];
        let options = format!(",engine={engine},cache={cache}");
        // Up to half a second, which is tens to hundreds of records.
        let random = u64::from_le_bytes(noise(round + 1, 8)[..8].try_into().expect("8 bytes"));
        let after = GLANCE + Duration::from_millis(random % 500);
        let console = killed(rig, &image, &options, after);
        safe = safe.max(last_safe(&console));
        let last = safe.expect("a record that is safe");
        println!("round {round}{options}: killed after {after:?}, {last} is safe");

        check(&e2fsck, &image, round);
        let records = read_records(&image);
        assert!(
            records.len() as u64 > last,
            "round {round}: record {last} was safe, and {} are there",
            records.len()
        );
        for (number, record) in records.iter().take(last as usize + 1).enumerate() {
            let wanted = format!("{number:<511}\n");
            assert_eq!(*record, wanted.as_bytes(), "round {round}: record {number}");
        }
    }
}

#[test]
fn nothing_acknowledged_is_lost_when_armlet_is_killed() {
    nothing_is_lost("auto");
}

#[test]
fn nothing_acknowledged_is_lost_when_armlet_is_killed_with_a_thread_for_io() {
    nothing_is_lost("sync");
}

/// The records in the file system on `image`.
fn read_records(image: &Path) -> Vec<Vec<u8>> {
    let debugfs = rig::program("debugfs").expect("it comes with e2fsck");
    let output = Command::new(debugfs)
        .args(["-R", "cat /records"])
        .arg(image)
        .output()
        .expect("debugfs can be run");
    output
        .stdout
        .chunks_exact(512)
        .map(<[u8]>::to_vec)
        .collect()
}

#[test]
fn fio_verifies_what_it_wrote() {
    let Some(rig) = rig::main() else { return };
    let Some(tools) = rig::tools_disk() else {
        return;
    };
    let script = "
mount -t ext4 -o ro /dev/vdb /mnt
mount --bind /dev /mnt/dev; mount -t tmpfs tmpfs /mnt/tmp; mount --bind /proc /mnt/proc
chroot /mnt /usr/bin/fio --aux-path=/tmp --name=verify --filename=/dev/vda --direct=1 --rw=randrw --bs=4k-64k \\
    --bsrange=512-128k --ioengine=io_uring --iodepth=16 --size=24M --io_size=24M --randseed=7 \\
    --verify=crc32c --verify_fatal=1 --do_verify=1 --output-format=terse --terse-version=3 |
    awk -F';' '{ print \"error\", $5 }'";
    let armlet = Armlet::devices(rig, &format!("mkdir -p /mnt\n{script}")).cpus(2);
    let image = armlet.file("disk.img", &vec![0; 32 * MIB]);
    let outcome = armlet
        .memory("512M")
        .option("--disk", format!("path={}", image.display()))
        .option("--disk", format!("path={},readonly", tools.display()))
        .run();
    assert_eq!(outcome.script().trim(), "error 0");
}

#[test]
fn a_qcow2_image_is_written_and_is_whole_afterwards() {
    let Some(rig) = rig::main() else { return };
    let Some(qemu_img) = rig::program("qemu-img") else {
        return;
    };
    let script = "
dd if=/dev/vda of=/dev/vda bs=64k count=64 seek=64 conv=notrunc,fsync status=none
dd if=/dev/vda bs=64k status=none | sha256sum";
    let armlet = Armlet::devices(rig, script);
    let raw = armlet.file("disk.raw", &half_full(9));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let image = folder.path().join("disk.qcow2");
    let tool = |words: &[&str], files: &[&Path]| {
        let output = Command::new(&qemu_img).args(words).args(files).output();
        let output = output.expect("qemu-img can be run");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "qemu-img {words:?}: {said}");
    };
    tool(&["convert", "-f", "raw", "-O", "qcow2"], &[&raw, &image]);
    let outcome = armlet
        .option("--disk", format!("path={},format=qcow2", image.display()))
        .run();
    outcome.script();
    tool(&["check", "-q", "-f", "qcow2"], &[&image]);
    let back = folder.path().join("back.raw");
    tool(&["convert", "-f", "qcow2", "-O", "raw"], &[&image, &back]);
    let back = File::open(back).expect("an image");
    let mut halves = [vec![0; HALF], vec![0; HALF]];
    for (index, half) in halves.iter_mut().enumerate() {
        back.read_exact_at(half, (index * HALF) as u64)
            .expect("an image");
    }
    assert!(halves[0] == noise(9, HALF), "the first half");
    assert!(halves[1] == halves[0], "the copy");
}

#[test]
fn disks_have_any_size_and_blocks_that_were_asked_for() {
    let Some(rig) = rig::any() else { return };
    let script = "
echo '== disks'
for disk in vda vdb vdc; do
    cd /sys/block/$disk
    echo \"$disk $(cat size) $(cat queue/logical_block_size)\"
done
echo '== last'
dd if=/dev/vdb bs=512 skip=136 status=none | tr '\\0' '0' | cut -c 360-380
printf tail | dd of=/dev/vdb bs=512 seek=136 conv=sync,notrunc,fsync status=none
echo '== end'
";
    const ODD: usize = 70_000;
    let armlet = Armlet::devices(rig, script);
    let empty = armlet.file("empty.img", b"");
    // The folder of the others is gone when the guest has ended.
    let folder = tempfile::tempdir().expect("a temporary folder");
    let odd = folder.path().join("odd.img");
    fs::write(&odd, [b'x'; ODD]).expect("an image");
    let mut partitioned = vec![0; MIB];
    partitioned[510..512].copy_from_slice(&[0x55, 0xaa]);
    partitioned[512..520].copy_from_slice(b"EFI PART");
    let partitioned = armlet.file("partitioned.img", &partitioned);
    let option = |path: &Path, more: &str| format!("path={}{more}", path.display());
    let outcome = armlet
        .option("--disk", option(&empty, ""))
        .option("--disk", option(&odd, ""))
        .option("--disk", option(&partitioned, ",block-size=4096"))
        .run();
    let said = outcome.script();
    assert_eq!(
        section(&said, "disks"),
        "vda 0 512\nvdb 137 512\nvdc 2048 4096"
    );
    // Byte 368 of the sector is the first that the file does not have.
    assert_eq!(section(&said, "last"), "xxxxxxxxx000000000000");
    let image = fs::read(&odd).expect("an image");
    assert_eq!(
        image.len(),
        ODD.next_multiple_of(512),
        "the last sector is there"
    );
    assert!(image[136 * 512..].starts_with(b"tail\0\0"));
    let note = "partition table of";
    assert!(outcome.errors.contains(note), "{}", outcome.errors);
    assert!(
        outcome.errors.contains("block-size=512"),
        "{}",
        outcome.errors
    );
}
