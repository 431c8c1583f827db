use crate::guest::{Armlet, GLANCE, Guest, Input};
use crate::interpreter::{BOARD, RINGS, SECOND, image, strike};
use crate::rig;
use crate::steps::{Driver, Part, QUEUE, Steps, register, slots};
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

/// How long guests attack, in seconds, and the first seed: what a guest does hangs on its seed
/// alone.
const TIME: &str = "ARMLET_ATTACK_SECONDS";
const SEED: &str = "ARMLET_ATTACK_SEED";
const USUALLY: u64 = 20;

/// How often a guest does all of its steps.
const ROUNDS: u32 = 5;

/// What the guest says at the end of each, when no device has anything to do, and then it waits.
const MARK: &str = "\nall devices are at rest\n";
/// How often armlet is looked at while it does: what comes and goes by itself does not count.
const LOOKS: usize = 10;
/// By how many KiB memory may grow between the second round and the last: less than a page for each
/// request of a disk, of which there are a few in each round.
const SLACK: usize = 16;

/// The device that is attacked, and by which the guest speaks between rounds.
const CONSOLE: &str = "console";

/// Bytes of the host's memory that are set aside for rings and buffers: devices write nowhere else,
/// or they would change the guest's own steps.
const ROOM: u64 = 16 << 20;

/// Where the guest counts its rounds.
const COUNTER: u64 = RINGS + (64 << 20);

/// Which piece of memory the driver has by which the guest speaks: behind the room of the others.
const SPEAKER: u64 = 32;

/// Numbers without a pattern, always the same for one seed: xorshift64*.
pub(crate) struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        random.next();
        random
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }

    /// One of these.
    pub(crate) fn of<T: Copy>(&mut self, these: &[T]) -> T {
        these[self.below(these.len() as u64) as usize]
    }

    pub(crate) fn width(&mut self) -> u8 {
        self.of(&[1, 2, 4, 4, 4, 8])
    }

    /// A value for a register or a field of a ring, which leads nowhere in RAM but into the room set
    /// aside.
    pub(crate) fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << self.below(31),
            3 | 4 => self.below(2 * u64::from(QUEUE)),
            5 => RINGS + self.below(ROOM),
            6 => RINGS + (self.below(ROOM) & !0xfff),
            _ => self.next() | 0x8000_0000,
        }
    }

    /// Where a descriptor or a ring may say that it leads: mostly into the room set aside, else where
    /// no memory is.
    fn address(&mut self) -> u64 {
        match self.below(8) {
            0 => self.next() | 1 << 63,
            1 => u64::MAX - self.below(0x1000),
            2 => 0x8000_0000 | self.below(1 << 32),
            _ => RINGS + self.below(ROOM),
        }
    }

    /// What a device may read: random words, none of which is the number of a page of the guest's
    /// own steps.
    fn content(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let word = match self.below(4) {
                0 => self.below(256) as u32,
                1 => ((RINGS + self.below(ROOM)) >> 12) as u32,
                2 => self.value() as u32 & 0xffff | 0xffff_0000,
                _ => self.next() as u32 | 0x8000_0000,
            };
            bytes.extend(word.to_le_bytes());
        }
        bytes
    }
}

/// Accesses of all widths to a slot's registers, mostly where there are some.
fn registers(steps: &mut Steps, random: &mut Random, base: u64, count: usize) {
    for _ in 0..count {
        let offset = match random.below(4) {
            0 => random.below(0x200),
            1 => register::CONFIG + random.below(0x40),
            _ => 4 * random.below(0x40),
        };
        let width = random.width();
        if random.below(2) == 0 {
            steps.read(width, base + offset);
        } else {
            let value = random.value();
            steps.write(width, base + offset, value);
        }
    }
}

/// A chain that may be broken: too long, in a circle, out of memory, the wrong way round. A console
/// would print one that is long and in memory, so that it gets none.
fn chain(random: &mut Random, is_console: bool) -> Vec<Part> {
    let length = match random.below(16) {
        0 => 1 + random.below(2 * u64::from(QUEUE)),
        _ => 1 + random.below(4),
    };
    let mut chain = Vec::new();
    for index in 0..length {
        let size = match random.below(6) {
            0 => 0,
            1 if is_console => random.next() as u32 | 1 << 30,
            1 => random.next() as u32,
            2 => 16,
            3 => 44,
            _ => random.below(0x4000) as u32,
        };
        // By the rules what the device writes comes last.
        let writable = match random.below(4) {
            0 => random.below(2) == 0,
            _ => index > length / 2,
        };
        chain.push((random.address(), size, writable));
    }
    chain
}

/// Starts a device, by the rules or nearly, and gives it rings that are right, wrong, or become so.
fn rings(steps: &mut Steps, random: &mut Random, driver: &mut Driver, is_console: bool) {
    let queues = 1 + random.below(3) as usize;
    // Some devices take fewer entries.
    let size = random.of(&[QUEUE, QUEUE, 8]);
    let features = match random.below(2) {
        0 => 0,
        // What is not offered makes a device refuse.
        _ => random.next() & 0x0000_0000_3000_ffff,
    };
    driver.start(steps, features, &vec![size; queues]);
    if random.below(4) == 0 {
        // The queue is moved while the device has it, or it is refused.
        let registers = [
            register::QUEUE_DESC,
            register::QUEUE_DRIVER,
            register::QUEUE_DEVICE,
        ];
        let address = random.address();
        steps.write(4, driver.base + register::QUEUE_READY, random.below(2));
        steps.write(4, driver.base + random.of(&registers), address);
        steps.write(4, driver.base + register::QUEUE_READY, 1);
    }
    for _ in 0..4 + random.below(12) {
        let queue = random.below(queues as u64) as usize;
        let [descriptors, available, used] = driver.rings(queue);
        let content = random.content(64);
        let at = driver.buffers() + (random.below(0x7_0000) & !7);
        steps.place(at, &content);
        let mut chain = chain(random, is_console);
        if random.below(2) == 0 {
            // A header that says something, where devices look for it.
            chain.insert(0, (at, random.of(&[4, 12, 16, 40, 44, 64]), false));
        }
        driver.offer(steps, queue, &chain);
        match random.below(8) {
            0 => {
                let index = random.next() & 0xffff;
                steps.write(2, available + 2, index);
            }
            1 => {
                let field = random.below(16 * u64::from(QUEUE));
                let value = random.value();
                steps.write(random.width(), descriptors + field, value);
            }
            2 => {
                let entry = random.below(u64::from(QUEUE));
                steps.write(2, available + 4 + 2 * entry, random.next() & 0xffff);
            }
            3 => steps.write(4, used, random.next() & 0xffff_ffff),
            _ => {}
        }
        driver.kick(steps, queue);
        if random.below(4) == 0 {
            steps.write_many(driver.base + register::QUEUE_NOTIFY, queue as u32, 200);
        }
        steps.write(4, driver.base + register::INTERRUPT_ACK, 3);
    }
}

/// Resets a device over and over, with requests under way.
fn resets(steps: &mut Steps, random: &mut Random, driver: &mut Driver) {
    for _ in 0..4 {
        driver.start(steps, 0, &[8; 2]);
        for queue in 0..2 {
            let part = (RINGS + random.below(ROOM), 0x1000, queue == 0);
            driver.offer(steps, queue, &[part]);
            driver.kick(steps, queue);
        }
        steps.write(
            4,
            driver.base + register::STATUS,
            random.of(&[0, 0, 0x80, 1]),
        );
    }
}

/// One round: each kind of attack, in an order that hangs on the seed.
fn round(steps: &mut Steps, random: &mut Random, slots: &[(String, u64)]) {
    for _ in 0..3 * slots.len() {
        let index = random.below(slots.len() as u64);
        let (name, base) = &slots[index as usize];
        let (base, is_console) = (*base, name == CONSOLE);
        let mut driver = Driver::new(base, index).hasty();
        match random.below(6) {
            0 => registers(steps, random, base, 200),
            // Slots that nothing is in.
            1 => {
                let other = base + 0x200 * random.below(32);
                registers(steps, random, other, 50);
            }
            2 => resets(steps, random, &mut driver),
            3 => strike(steps, random, 200),
            _ => rings(steps, random, &mut driver, is_console),
        }
    }
}

/// Has all devices rest, says so by the console, and waits for a byte from the host.
fn rest(steps: &mut Steps, slots: &[(String, u64)]) {
    for &(_, base) in slots {
        steps.write(4, base + register::STATUS, 0);
    }
    let (input, output) = (0, 1);
    let mut speaker = Driver::new(console(slots), SPEAKER);
    speaker.start(steps, 0, &[8; 2]);
    let text = speaker.buffers();
    steps.place(text, MARK.as_bytes());
    speaker.request(steps, output, &[(text, MARK.len() as u32, false)]);
    speaker.request(steps, input, &[(text + 0x1000, 1, true)]);
}

/// The virtio console's first register.
fn console(slots: &[(String, u64)]) -> u64 {
    let found = slots.iter().find(|(name, _)| name == CONSOLE);
    found.expect("a virtio console").1
}

/// What guests of this seed do, [`ROUNDS`] times, until they power off.
fn attack(seed: u64, slots: &[(String, u64)]) -> Steps {
    let mut random = Random::new(seed);
    let mut steps = Steps::default();
    // To be replaced when it is known where the second one's end.
    let begin = steps.position();
    steps.jump(begin);
    let theirs = steps.position();
    // It goes on for ever, and does not interrupt the first one when that speaks.
    let others = slots.iter().filter(|(name, _)| name != CONSOLE);
    let others: Vec<u64> = others.map(|(_, base)| *base).collect();
    for _ in 0..8 {
        let base = random.of(&others);
        registers(&mut steps, &mut random, base, 100);
    }
    steps.jump(theirs);
    let end = steps.position();
    steps.replace(begin, |steps| steps.jump(end));
    steps.start_cpu(SECOND, theirs);
    steps.write(4, COUNTER, u64::from(ROUNDS));
    let start = steps.position();
    round(&mut steps, &mut random, slots);
    rest(&mut steps, slots);
    steps.repeat(COUNTER, start);
    // No request is under way any more, and the machine ends in order.
    for &(_, base) in slots {
        steps.write(4, base + register::STATUS, 0);
    }
    steps.power_off();
    steps
}

/// Descriptors, threads and KiB of anonymous memory of a process; `None` once it has ended.
fn holdings(pid: u32) -> Option<[usize; 3]> {
    let folder = format!("/proc/{pid}");
    let count = |what: &str| Some(fs::read_dir(format!("{folder}/{what}")).ok()?.count());
    let status = fs::read_to_string(format!("{folder}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))?;
    let resident = line.split_whitespace().next()?.parse().ok()?;
    Some([count("fd")?, count("task")?, resident])
}

/// What armlet holds while its guest's devices rest: the least of some looks.
fn at_rest(guest: &Guest) -> [usize; 3] {
    let mut least = [usize::MAX; 3];
    for _ in 0..LOOKS {
        if let Some(now) = holdings(guest.pid()) {
            least = [0, 1, 2].map(|index| least[index].min(now[index]));
        }
        sleep(GLANCE);
    }
    least
}

/// Whether there is more of something after each round. The first may be the first use of a device.
fn grows(rounds: &[[usize; 3]], what: usize, slack: usize) -> bool {
    let counts: Vec<usize> = rounds.iter().skip(1).map(|round| round[what]).collect();
    let (first, last) = (counts[0], counts[counts.len() - 1]);
    counts.is_sorted_by(|before, after| before < after) && last > first + slack
}

#[test]
fn what_grows_after_each_round_is_told_from_what_comes_and_goes() {
    let rounds = |counts: [usize; 5]| counts.map(|count| [count, 0, 10 * count]);
    assert!(grows(&rounds([9, 5, 6, 7, 8]), 0, 0));
    assert!(!grows(&rounds([9, 5, 6, 6, 8]), 0, 0));
    assert!(!grows(&rounds([1, 7, 7, 7, 7]), 0, 0));
    assert!(!grows(&rounds([1, 7, 8, 9, 10]), 1, 0));
    assert!(grows(&rounds([1, 7, 8, 9, 10]), 2, 29));
    assert!(!grows(&rounds([1, 7, 8, 9, 10]), 2, 30));
}

/// Runs the guest of one seed to its end.
fn survives(seed: u64, options: &[(&str, String)], slots: &[(String, u64)]) {
    let steps = attack(seed, slots);
    println!(
        "seed {seed}: {} steps, {ROUNDS} times",
        steps.bytes().len() / 32
    );
    let mut armlet = Armlet::image(&image(&steps))
        .option("--board", BOARD)
        .input(Input::Pipe)
        .cpus(2);
    for (name, value) in options {
        armlet = armlet.option(name, value);
    }
    let mut guest = armlet.start();
    let most = [const { AtomicUsize::new(0) }; 3];
    let is_over = AtomicBool::new(false);
    let pid = guest.pid();
    let mut rounds = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                for (most, now) in most.iter().zip(holdings(pid).unwrap_or_default()) {
                    most.fetch_max(now, Ordering::Relaxed);
                }
                sleep(GLANCE);
            }
        });
        let _ends = Ends(&is_over);
        for _ in 0..ROUNDS {
            guest.expect(MARK);
            rounds.push(at_rest(&guest));
            guest.send(b"g");
        }
    });
    let outcome = guest.end();
    let [descriptors, threads, kib] = most.map(AtomicUsize::into_inner);
    println!(
        "seed {seed}: at most {:?}, at rest {rounds:?}; {} bytes of output, {} of messages",
        [descriptors, threads, kib],
        outcome.bytes.len(),
        outcome.errors.len()
    );
    outcome.assert_status(0);
    assert!(descriptors < 200, "seed {seed}: {descriptors} descriptors");
    assert!(threads < 50, "seed {seed}: {threads} threads");
    // All of the guest's 256 MiB are among it where nobody shares them.
    assert!(kib < (256 + 64) << 10, "seed {seed}: {kib} KiB of memory");
    for (what, slack) in [(0, 0), (1, 0), (2, SLACK)] {
        let name = ["descriptors", "threads", "KiB of memory"][what];
        assert!(
            !grows(&rounds, what, slack),
            "seed {seed}: more {name} after each round: {rounds:?}"
        );
    }
    let messages = outcome.errors.lines().count();
    assert!(messages < 1000, "seed {seed}: {messages} messages");
    // How a panic of armlet's own begins; programs that work for devices have theirs.
    let panicked = outcome
        .errors
        .lines()
        .any(|line| line.starts_with("thread '"));
    assert!(!panicked, "seed {seed}: {}", outcome.errors);
}

/// Says that it is over, also where a check fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn no_seed_of_attacks_hurts_armlet() {
    if !rig::small() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    for name in ["disk", "read", "pmem"] {
        fs::write(path(name), vec![0x5a; 2 << 20]).expect("an image");
    }
    fs::create_dir(path("share")).expect("a folder");
    let mut options = vec![
        ("--disk", format!("path={},queues=2", path("disk"))),
        (
            "--disk",
            format!("path={},engine=sync,readonly", path("read")),
        ),
        ("--pmem", format!("path={}", path("pmem"))),
        ("--vsock", format!("cid=3,uds={}", path("vsock"))),
        ("--balloon", "reporting=on".to_owned()),
        ("--console", "virtio".to_owned()),
    ];
    if rig::program("passt").is_some() {
        options.push(("--net", "user".to_owned()));
    }
    if rig::program("virtiofsd").is_some() {
        options.push(("--share", format!("tag=share,path={}", path("share"))));
    }
    let slots = slots(&options);
    println!("{slots:x?}");
    let number = |name: &str, usually: u64| {
        std::env::var(name).map_or(usually, |number| number.parse().expect("a number"))
    };
    let end = Instant::now() + Duration::from_secs(number(TIME, USUALLY));
    let mut seed = number(SEED, 1);
    while Instant::now() < end {
        survives(seed, &options, &slots);
        seed += 1;
    }
}
