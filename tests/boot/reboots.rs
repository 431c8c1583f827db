use crate::guest::{Armlet, Guest};
use crate::interpreter::{BOARD, RINGS, image};
use crate::rig;
use crate::steps::{Disk, Driver, QUEUE, Steps, slots};
use rustix::process::Signal;
use std::fs;

/// How often a guest is reset, where this variable says nothing else: a few dozen find a fault that
/// is there each time.
const VARIABLE: &str = "ARMLET_REBOOTS";
const USUALLY: usize = 48;

/// The guest's frame: a question of ARP for 192.0.2.1 (RFC 826), behind the header of virtio 1.2,
/// section 5.1.6.
fn frame() -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0xff; 6]);
    frame.extend([2, 0, 0, 0, 0, 1, 8, 6]);
    frame.extend([0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 192, 0, 2, 2]);
    frame.extend([0, 0, 0, 0, 0, 0, 192, 0, 2, 1]);
    frame.resize(12 + 60, 0);
    frame
}

/// FUSE_INIT with the number 1 (Linux, include/uapi/linux/fuse.h: `fuse_in_header`, `fuse_init_in`).
fn fuse_init() -> Vec<u8> {
    let words = [56, 26, 1, 0, 0, 0, 0, 0, 0, 0, 7, 31, 0x2_0000, 0];
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// A request to connect to a port of the host (virtio 1.2, section 5.10.6).
fn connect() -> Vec<u8> {
    let words = [3, 0, 2, 0, 1024, 7777, 0, 1 | 1 << 16, 0, 0x1_0000, 0_u32];
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// Uses the device called `name`, as far as it can be without a peer.
fn touch(steps: &mut Steps, name: &str, mut driver: Driver) {
    let room = driver.buffers();
    match name {
        "net0" => {
            driver.start(steps, 0, &[QUEUE; 2]);
            for buffer in 0..4 {
                driver.offer(steps, 0, &[(room + 0x1_0000 + 0x800 * buffer, 0x800, true)]);
            }
            driver.kick(steps, 0);
            let frame = frame();
            steps.place(room, &frame);
            driver.request(steps, 1, &[(room, frame.len() as u32, false)]);
        }
        "share0" => {
            driver.start(steps, 0, &[QUEUE; 2]);
            let init = fuse_init();
            steps.place(room, &init);
            let answer = (room + 0x1000, 0x1000, true);
            driver.request(steps, 1, &[(room, init.len() as u32, false), answer]);
        }
        "vsock" => {
            driver.start(steps, 0, &[QUEUE, QUEUE, 8]);
            driver.offer(steps, 0, &[(room + 0x1000, 0x1000, true)]);
            driver.kick(steps, 0);
            let connect = connect();
            steps.place(room, &connect);
            driver.request(steps, 1, &[(room, connect.len() as u32, false)]);
            // Nobody listens there, which the guest is told.
            driver.finish(steps, 0);
        }
        "balloon" => {
            driver.start(steps, 0, &[QUEUE; 2]);
            let page = (RINGS + (32 << 20)) >> 12;
            steps.write(4, room, page);
            driver.request(steps, 0, &[(room, 4, false)]);
        }
        _ => {}
    }
}

/// A life: each device is used, and of the disk's requests some are under way when the machine is
/// reset.
fn life(slots: &[(String, u64)]) -> Steps {
    let mut steps = Steps::default();
    let mut disks = Vec::new();
    for (index, (name, base)) in (0..).zip(slots) {
        let driver = Driver::new(*base, index);
        if name.starts_with("disk") {
            let mut disk = Disk::new(driver);
            // VIRTIO_BLK_F_FLUSH (virtio 1.2, section 5.2.3).
            disk.driver.start(&mut steps, 1 << 9, &[QUEUE]);
            disk.request(&mut steps, Disk::WRITE, 8, 0x1000);
            disk.request(&mut steps, Disk::FLUSH, 0, 0);
            disk.request(&mut steps, Disk::READ, 0, 0x1000);
            disks.push(disk);
        } else {
            touch(&mut steps, name, driver);
        }
        steps.print(name);
        steps.print(" ");
    }
    steps.print("again\n");
    for disk in &mut disks {
        for request in 0..12 {
            let chain = disk.chain(&mut steps, Disk::READ, 128 * request, Disk::MOST);
            disk.driver.offer(&mut steps, 0, &chain);
        }
        let write = disk.chain(&mut steps, Disk::WRITE, 64, 0x1000);
        disk.driver.offer(&mut steps, 0, &write);
        let flush = disk.chain(&mut steps, Disk::FLUSH, 0, 0);
        disk.driver.offer(&mut steps, 0, &flush);
        disk.driver.kick(&mut steps, 0);
    }
    steps.reset();
    steps
}

/// Descriptors, threads and resident KiB of armlet's process.
fn holdings(guest: &Guest) -> [usize; 3] {
    let folder = format!("/proc/{}", guest.pid());
    let count = |what: &str| {
        let entries = fs::read_dir(format!("{folder}/{what}"));
        entries.expect("a running process").count()
    };
    let status = fs::read_to_string(format!("{folder}/status")).expect("a running process");
    let resident = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let resident = resident.and_then(|line| line.split_whitespace().next()?.parse().ok());
    [count("fd"), count("task"), resident.expect("a size")]
}

/// Reboots a guest with these devices, as often as it was asked for.
fn reboots(options: &[(&str, String)]) {
    let slots = slots(options);
    println!("{slots:x?}");
    let mut armlet = Armlet::image(&image(&life(&slots))).option("--board", BOARD);
    for (name, value) in options {
        armlet = armlet.option(name, value);
    }
    let lives = std::env::var(VARIABLE).map_or(USUALLY, |number| number.parse().expect(VARIABLE));
    let mut guest = armlet.start();
    let (mut most, mut least) = ([0; 3], [usize::MAX; 3]);
    for life in 0..lives {
        guest.expect("again\n");
        // The machine of this life may be there still, or gone, or the next one's be there: what
        // counts is that all of many moments late in a guest's life saw more than any early one.
        let holdings = holdings(&guest);
        if life < lives / 4 {
            most = std::array::from_fn(|what| most[what].max(holdings[what]));
        } else if life >= lives - lives / 4 {
            least = std::array::from_fn(|what| least[what].min(holdings[what]));
        }
        if life % 100 == 99 {
            let seconds = guest.age().as_secs_f32();
            println!("{} lives after {seconds:.1} s", life + 1);
        }
    }
    println!("at most {most:?}, then at least {least:?}");
    guest.signal(Signal::INT);
    let outcome = guest.end();
    outcome.assert_status(6);
    let text = outcome.text();
    assert!(!text.contains('!'), "a device did not answer: {text:.200}");
    // What programs that work for devices say is theirs, and much of it is held back.
    let theirs = [" passt: ", " virtiofsd: ", " messages were held back"];
    let is_ours = |line: &&str| !theirs.iter().any(|words| line.contains(words));
    let ours: Vec<&str> = outcome.errors.lines().filter(is_ours).collect();
    assert_eq!(ours, ["armlet: stopped by a signal"]);
    // What a life holds comes and goes.
    let kinds = [("descriptors", 0), ("threads", 0), ("KiB of memory", 1024)];
    for (index, (what, slack)) in kinds.into_iter().enumerate() {
        let (most, least) = (most[index], least[index]);
        assert!(
            least <= most + slack,
            "{what}: at most {most}, then at least {least}"
        );
    }
}

/// The completion of a disk's requests is work of the thread that submitted them, which looks like a
/// signal to what that thread does next: making the new machine.
#[test]
fn reboots_with_requests_of_a_disk_under_way_go_on() {
    if !rig::small() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("disk");
    fs::write(&path, vec![0x5a; 2 << 20]).expect("an image");
    reboots(&[("--disk", path.to_string_lossy().into_owned())]);
}

#[test]
fn reboots_with_every_device_go_on_and_leak_nothing() {
    if !rig::small() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    fs::write(path("disk"), vec![0x5a; 2 << 20]).expect("an image");
    fs::create_dir(path("share")).expect("a folder");
    let mut options = vec![
        ("--disk", path("disk")),
        ("--vsock", format!("cid=3,uds={}", path("vsock"))),
        ("--balloon", "on".to_owned()),
    ];
    if rig::program("passt").is_some() {
        options.push(("--net", "user".to_owned()));
    }
    if rig::program("virtiofsd").is_some() {
        options.push(("--share", format!("tag=share,path={}", path("share"))));
    }
    reboots(&options);
}
