//! Machines that are held: armlet in a process of the tests', commanded by lines through a FIFO, as
//! no option of armlet's commands it yet.

use crate::guest::{Armlet, GLANCE, Guest, noise, section};
use crate::interpreter::{BOARD, image as image_of};
use crate::steps::{Disk, Driver, QUEUE, Steps, slots};
use armlet::cli::{self, Command, Parsed};
use armlet::commands;
use armlet::kvm::{HostArch, KvmArch};
use armlet::run::Commands;
use armlet::run::command::{self as asked, By, Reply};
use armlet_system::messages;
use rustix::fs::{CWD, Mode};
use rustix::pipe::PipeFlags;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc::channel;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Arguments, one a line, and the FIFO's path.
const ARGUMENTS: &str = "COMMANDED_ARGUMENTS";
const FIFO: &str = "COMMANDED_FIFO";
/// Longer than any answer takes, which has a deadline of its own.
const LONG: Duration = Duration::from_secs(60);
/// What the guests here print again and again, each after this word.
pub(crate) const TICKS: &str = "0123456789";
pub(crate) const FIRST: &str = "ticks:";
/// What the threads of vCPUs are called here, before the number: what some who look for them expect.
const VCPUS: &str = "fc_vcpu ";

/// Armlet itself, for the tests below: it ends as armlet does.
#[test]
#[ignore = "run by others"]
fn armlet_in_this_process() {
    let (Ok(arguments), Ok(fifo)) = (std::env::var(ARGUMENTS), std::env::var(FIFO)) else {
        return;
    };
    messages::install();
    let mut arguments: Vec<String> = arguments.lines().map(str::to_owned).collect();
    // A shell cuts what is empty at the end, so there is a last one that is not.
    arguments.pop();
    let Parsed::Cli(cli, devices) = cli::parse(&arguments) else {
        panic!("no command: {arguments:?}");
    };
    let Some(Command::Run(args)) = cli.command else {
        panic!("another command: {arguments:?}");
    };
    let mut options = commands::run_options(&args, &devices).expect("a machine");
    options.vcpu_names = VCPUS;
    options.commander = Some(Box::new(move |commands| {
        std::thread::spawn(move || serve(&commands, &fifo));
    }));
    let status = armlet::run::run(options).expect("a guest that runs");
    messages::finish();
    std::process::exit(status.code().into());
}

/// Sends the commands that come through the FIFO, and says what came of each.
fn serve(commands: &Commands, fifo: &str) {
    let lines = BufReader::new(File::open(fifo).expect("a FIFO")).lines();
    for line in lines {
        let line = line.expect("text");
        let words: Vec<&str> = line.split(' ').collect();
        let said = match words[..] {
            ["pause"] => pause(commands),
            ["resume"] => resume(commands),
            ["where", vcpu] => position(commands, vcpu.parse().expect("a number")),
            ["again", times] => {
                let times: u32 = times.parse().expect("a number");
                let each = (0..times).map(|_| [pause(commands), resume(commands)].concat());
                let good = each.filter(|said| said == "held.goes on.").count();
                format!("{good} of {times}.")
            }
            ["look", name] => {
                let look = |reply| asked::Command::LookAtDisk(name.to_owned(), reply);
                match answer(commands, look) {
                    Ok(bytes) => format!("{name} has {bytes} bytes."),
                    Err(why) => format!("there is no {name}: {why}."),
                }
            }
            ["change", name, path] => {
                let change =
                    |reply| asked::Command::ChangeDisk((*name).to_owned(), path.into(), reply);
                match answer(commands, change) {
                    Ok(bytes) => format!("{name} has {bytes} bytes now."),
                    Err(why) => format!("{name} keeps its image: {why}."),
                }
            }
            ["balloon", bytes] => {
                let bytes = bytes.parse().expect("a number");
                match answer(commands, |reply| asked::Command::SetBalloon(bytes, reply)) {
                    Ok(()) => "the balloon knows.".to_owned(),
                    Err(why) => format!("no balloon: {why}."),
                }
            }
            ["clone"] => match answer(commands, asked::Command::NewGeneration) {
                Ok(()) => "it is another.".to_owned(),
                Err(why) => format!("it stays what it is: {why}."),
            },
            ["stop"] => {
                let _ = commands.send(asked::Command::Stop(By::Key));
                return;
            }
            _ => panic!("no command: {line}"),
        };
        messages::say(&said);
    }
}

/// What comes of a command.
fn answer<T>(commands: &Commands, command: impl FnOnce(Reply<T>) -> asked::Command) -> T {
    let (reply, answer) = Reply::channel();
    assert!(commands.send(command(reply)).is_ok(), "nobody takes it");
    answer.recv_timeout(LONG).expect("an answer")
}

fn pause(commands: &Commands) -> String {
    let (reply, answer) = Reply::channel();
    if commands.send(asked::Command::Pause(reply)).is_err() {
        return "not taken.".to_owned();
    }
    match answer.recv_timeout(LONG).expect("an answer") {
        Ok(()) => "held.".to_owned(),
        Err(why) => format!("not held: {why}."),
    }
}

fn resume(commands: &Commands) -> String {
    let (reply, answer) = Reply::channel();
    if commands.send(asked::Command::Resume(reply)).is_err() {
        return "not taken.".to_owned();
    }
    answer
        .recv_timeout(LONG)
        .expect("an answer")
        .expect("it goes on");
    "goes on.".to_owned()
}

fn position(commands: &Commands, vcpu: usize) -> String {
    let (answer, answered) = channel();
    let task = Box::new(move |vcpu: &mut kvm_ioctls::VcpuFd| {
        let _ = answer.send(HostArch::position(vcpu));
    });
    let sent = commands.send(asked::Command::WithVcpu(vcpu, task));
    match (sent.is_ok(), answered.recv_timeout(LONG)) {
        (true, Ok(position)) => format!("vCPU {vcpu} is at {position}."),
        _ => format!("there is no vCPU {vcpu}."),
    }
}

/// A guest and what commands it.
struct Commanded {
    guest: Guest,
    fifo: File,
}

impl Commanded {
    /// Starts a guest, with `output` as its standard output where the test looks after it.
    fn start(armlet: Armlet, output: Option<OwnedFd>) -> Commanded {
        // Whatever is in the folder lives as long as the guest.
        let fifo = armlet.file("commands", b"");
        fs::remove_file(&fifo).expect("a file of ours");
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mkfifoat(CWD, &fifo, mode).expect("a FIFO");
        let this = std::env::current_exe().expect("this program");
        let test = "--exact --ignored --nocapture commanded::armlet_in_this_process";
        let script = format!(
            "shift; {ARGUMENTS}=\"$(printf '%s\\n' \"$@\" .)\" {FIFO}={} exec {} {test}",
            fifo.display(),
            this.display()
        );
        let words = ["sh", "-c", &script, "sh"].map(OsStr::new);
        let guest = armlet.through(&words).start_with(output);
        // Opened for both, it waits for nobody (fifo(7)).
        let fifo = File::options().read(true).write(true).open(&fifo);
        let fifo = fifo.expect("a FIFO");
        Commanded { guest, fifo }
    }

    fn command(&mut self, line: &str, said: &str) {
        writeln!(self.fifo, "{line}").expect("armlet reads it");
        self.guest.expect_error(said);
    }

    /// The names of armlet's threads, a line each.
    fn threads(&self) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.guest.pid()));
        let tasks = tasks.expect("a running process");
        let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).ok();
        tasks.flatten().filter_map(name).collect()
    }

    /// The ticks so far, none of which is missing or twice.
    fn ticks(&self) -> usize {
        let said = self.guest.said();
        let (_, ticks) = said.split_once(FIRST).expect("the first word");
        let wanted = TICKS.bytes().cycle();
        assert!(
            ticks
                .bytes()
                .zip(wanted)
                .all(|(tick, wanted)| tick == wanted)
        );
        ticks.len()
    }

    /// Waits until there are more ticks than these.
    fn goes_on(&mut self, ticks: usize) {
        while self.ticks() <= ticks {
            // Which fails when it takes too long.
            self.guest.expect("0");
        }
    }
}

/// A guest that prints [`FIRST`] and then [`TICKS`] for ever. Its first vCPU is told of as `position`;
/// of its `vcpus` the others do not run.
pub(crate) fn is_held_and_goes_on(armlet: Armlet, vcpus: usize, position: &str) {
    let mut commanded = Commanded::start(armlet.cpus(vcpus), None);
    commanded.guest.expect(FIRST);
    for _ in 0..3 {
        let before = commanded.ticks();
        commanded.goes_on(before);
        commanded.command("pause", "held.\n");
        let threads = commanded.threads();
        let named = |vcpu: usize| threads.contains(&format!("{VCPUS}{vcpu}\n"));
        assert!((0..vcpus).all(named), "{threads:?}");
        // What was collected, and what is in the pipe.
        sleep(Duration::from_millis(300));
        let held = commanded.ticks();
        for vcpu in 0..vcpus {
            let said = match vcpu {
                0 => format!("vCPU 0 is at {position}"),
                _ => format!("vCPU {vcpu} is at "),
            };
            commanded.command(&format!("where {vcpu}"), &said);
        }
        commanded.command(&format!("where {vcpus}"), "there is no vCPU");
        sleep(Duration::from_millis(500));
        assert_eq!(commanded.ticks(), held, "it does not stand still");
        // Twice is as good as once.
        commanded.command("pause", "held.\n");
        commanded.command("resume", "goes on.\n");
        commanded.goes_on(held);
        commanded.command("where 0", &format!("vCPU 0 is at {position}"));
    }
    commanded.command("again 100", "100 of 100.\n");
    let after = commanded.ticks();
    commanded.goes_on(after);
    // A machine that is held can be stopped.
    commanded.command("pause", "held.\n");
    writeln!(commanded.fifo, "stop").expect("armlet reads it");
    commanded.guest.end().assert_status(6);
}

/// A guest whose disk always has requests under way is held: its image is as it is by then, and nothing
/// is lost when it goes on.
pub(crate) fn a_busy_disk_is_held_and_goes_on() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("disk");
    fs::write(&path, vec![0; 4 << 20]).expect("an image");
    let options = [("--disk", path.to_string_lossy().into_owned())];
    let (_, base) = &slots(&options)[0];
    let mut steps = Steps::default();
    let mut disk = Disk::new(Driver::new(*base, 0));
    let pattern = noise(14, Disk::MOST as usize >> 4);
    steps.place(disk.data(), &pattern);
    steps.print(FIRST);
    let again = steps.position();
    disk.driver.start(&mut steps, 0, &[QUEUE]);
    for tick in TICKS.split_inclusive(|_| true) {
        // Three descriptors each, of the queue's.
        for request in 0..u64::from(QUEUE) / 3 {
            let chain = disk.chain(&mut steps, Disk::WRITE, 128 * request, Disk::MOST);
            disk.driver.offer(&mut steps, 0, &chain);
        }
        disk.driver.kick(&mut steps, 0);
        steps.print(tick);
        disk.driver.finish(&mut steps, 0);
    }
    steps.jump(again);
    let mut armlet = Armlet::image(&image_of(&steps)).option("--board", BOARD);
    for (name, value) in &options {
        armlet = armlet.option(name, value);
    }
    let changed = || {
        let about = fs::metadata(&path).expect("an image");
        about.modified().expect("a time")
    };
    let mut commanded = Commanded::start(armlet, None);
    commanded.guest.expect(FIRST);
    for _ in 0..10 {
        let before = commanded.ticks();
        commanded.goes_on(before);
        commanded.command("pause", "held.\n");
        let held = changed();
        sleep(Duration::from_millis(300));
        assert_eq!(changed(), held, "its disk does not stand still");
        let ticks = commanded.ticks();
        commanded.command("resume", "goes on.\n");
        // The second tick is printed when the requests offered before the first are answered.
        commanded.goes_on(ticks + 1);
        assert!(changed() > held, "its disk does not go on");
    }
    commanded.command("again 100", "100 of 100.\n");
    let after = commanded.ticks();
    commanded.goes_on(after);
    writeln!(commanded.fifo, "stop").expect("armlet reads it");
    commanded.guest.end().assert_status(6);
    let image = fs::read(&path).expect("an image");
    let written = u64::from(QUEUE) as usize / 3 * Disk::MOST as usize;
    let mut blocks = image[..written].chunks(Disk::MOST as usize);
    assert!(blocks.all(|block| block.starts_with(&pattern)));
}

/// A guest that is held after it said `first`, says `then` when it goes on, and powers off.
#[allow(dead_code, reason = "tests of one architecture use it")]
pub(crate) fn is_held_until(armlet: Armlet, first: &str, then: &str) {
    let mut commanded = Commanded::start(armlet, None);
    commanded.guest.expect(first);
    commanded.command("pause", "held.\n");
    commanded.command("resume", "goes on.\n");
    commanded.guest.expect(then);
    let outcome = commanded.guest.end();
    outcome.assert_status(0);
    assert!(!outcome.text().contains('!'), "{}", outcome.text());
}

/// Such a guest, whose output nobody reads: its vCPU waits for a reader, and is told of.
pub(crate) fn is_not_held_while_nobody_reads(armlet: Armlet) {
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
    rustix::pipe::fcntl_setpipe_size(&writer, 4096).expect("a page");
    let mut commanded = Commanded::start(armlet, Some(writer));
    // Until the pipe has not got fuller for a second.
    let waiting = || rustix::io::ioctl_fionread(&reader).expect("a pipe");
    let (mut last, mut same) = (0, 0);
    let deadline = Instant::now() + LONG;
    while last < 1024 || same < 50 {
        sleep(GLANCE);
        assert!(
            Instant::now() < deadline,
            "the pipe does not fill: {last} bytes"
        );
        let now = waiting();
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    let said = "not held: vCPU 0 does not pause within 5000 ms.\n";
    commanded.command("pause", said);
    let mut reader = File::from(reader);
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while reader.read(&mut bytes).is_ok_and(|count| count > 0) {}
    });
    commanded.command("pause", "held.\n");
    commanded.command("resume", "goes on.\n");
    writeln!(commanded.fifo, "stop").expect("armlet reads it");
    commanded.guest.end().assert_status(6);
}

/// A guest that reads from its disk again and again, and at last from another image, which it is told of
/// by an interrupt and by the new size; it is written to there.
pub(crate) fn a_disk_gets_another_image_while_the_guest_runs() {
    const SIZE: u64 = 64 << 10;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let image = |name: &str, size| {
        let path = folder.path().join(name);
        fs::write(&path, vec![0; size as usize]).expect("an image");
        path
    };
    // As Kata and firecracker-containerd start theirs: nothing, until there is something.
    let (first, second) = (image("first", 0), image("second", SIZE));
    let options = [("--disk", first.to_string_lossy().into_owned())];
    let (_, base) = &slots(&options)[0];
    let config = base + 0x100;
    let mut steps = Steps::default();
    let mut disk = Disk::new(Driver::new(*base, 0));
    let pattern = noise(15, Disk::MOST as usize >> 4);
    steps.place(disk.data(), &pattern);
    disk.driver.start(&mut steps, 0, &[QUEUE]);
    steps.print(FIRST);
    // Bit 1 of InterruptStatus: the configuration has changed (virtio 1.2, section 4.2.2).
    steps.wait(base + 0x60, 2, 2);
    steps.write(4, base + 0x64, 2);
    steps.wait(config, u32::MAX, (SIZE / 512) as u32);
    let chain = disk.chain(&mut steps, Disk::WRITE, 0, Disk::MOST);
    disk.driver.offer(&mut steps, 0, &chain);
    disk.driver.kick(&mut steps, 0);
    disk.driver.finish(&mut steps, 0);
    steps.print("written\n");
    steps.wait(base + 0x60, 2, 2);
    steps.print("told again\n");
    steps.power_off();
    let mut armlet = Armlet::image(&image_of(&steps)).option("--board", BOARD);
    for (name, value) in &options {
        armlet = armlet.option(name, value);
    }
    let mut commanded = Commanded::start(armlet, None);
    commanded.guest.expect(FIRST);
    let change = |path: &std::path::Path| format!("change disk0 {}", path.display());
    let missing = folder.path().join("missing");
    commanded.command(
        &change(&missing),
        "disk0 keeps its image: cannot open disk image ",
    );
    commanded.command(&change(&second), &format!("disk0 has {SIZE} bytes now.\n"));
    commanded.guest.expect("written\n");
    assert!(fs::read(&second).expect("an image").starts_with(&pattern));
    commanded.command(&change(&first), "disk0 has 0 bytes now.\n");
    commanded.guest.expect("told again\n");
    let outcome = commanded.guest.end();
    outcome.assert_status(0);
    assert!(!outcome.text().contains('!'), "{}", outcome.text());
}

/// A guest that sees its disk grow and its balloon's target change, as somebody asks for both while it
/// runs.
pub(crate) fn a_disk_and_a_balloon_are_changed_while_the_guest_runs() {
    const SIZE: u64 = 3 << 20;
    const TARGET: u64 = 16 << 20;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("disk");
    fs::write(&path, vec![0; 1 << 20]).expect("an image");
    let disk = path.to_string_lossy().into_owned();
    let options = [("--disk", disk), ("--balloon", "on".to_owned())];
    // Where each device's configuration space begins.
    let config = |wanted: &str| {
        let slots = slots(&options);
        let slot = slots.iter().find(|(name, _)| name == wanted);
        slot.expect("a slot").1 + 0x100
    };
    let mut steps = Steps::default();
    steps.print(FIRST);
    steps.wait(config("disk0"), u32::MAX, (SIZE / 512) as u32);
    steps.print("larger\n");
    steps.wait(config("balloon"), u32::MAX, (TARGET / 4096) as u32);
    steps.print("asked for memory\n");
    steps.power_off();
    let mut armlet = Armlet::image(&image_of(&steps)).option("--board", BOARD);
    for (name, value) in &options {
        armlet = armlet.option(name, value);
    }
    let mut commanded = Commanded::start(armlet, None);
    commanded.guest.expect(FIRST);
    let file = File::options().write(true).open(&path);
    file.expect("an image").set_len(SIZE).expect("room");
    commanded.command(
        "look disk1",
        "there is no disk1: the guest has no disk called disk1.\n",
    );
    commanded.command("look disk0", &format!("disk0 has {SIZE} bytes.\n"));
    commanded.guest.expect("larger\n");
    let most = format!("balloon {}", u64::MAX);
    commanded.command(&most, "no balloon: a balloon of ");
    commanded.command(&format!("balloon {TARGET}"), "the balloon knows.\n");
    commanded.guest.expect("asked for memory\n");
    let outcome = commanded.guest.end();
    outcome.assert_status(0);
    assert!(!outcome.text().contains('!'), "{}", outcome.text());
}

/// What a guest of Linux says of VMGenID and VMClock, before and after it is told that it was cloned.
const GENERATIONS: &str = "
mount -t devtmpfs none /dev 2>/dev/null
clock() { [ -c /dev/vmclock0 ] && od -A n -v -t x1 -N 112 /dev/vmclock0; }
echo '== driver'; ls /sys/bus/platform/drivers/vmgenid
echo '== clock'; clock
echo '== ready'; echo 'ready to be cloned'
told='crng reseeded due to virtual machine fork'
for second in $(seq 60); do dmesg | grep -q \"$told\" && break; sleep 1; done
echo '== told'; dmesg | grep \"$told\"
echo '== cloned clock'; clock
echo '== interrupts'; grep -E 'vmgenid|ACPI:Ged' /proc/interrupts
echo '== dmesg'; dmesg -r | grep -E -i 'vmgenid|vmclock|ioremap'
echo '== end'
";

/// Linux, which has a driver for VMGenID, reseeds its random numbers when it is told that it was cloned.
/// Returns what it said.
pub(crate) fn linux_is_told_that_it_was_cloned(start: impl FnOnce(&str) -> Armlet) -> String {
    let armlet = start(GENERATIONS).option("--vmgenid", "on");
    let mut commanded = Commanded::start(armlet, None);
    commanded.guest.expect("ready to be cloned");
    commanded.command("clone", "it is another.\n");
    let script = commanded.guest.end().script();
    println!("{script}");
    let told = section(&script, "told");
    assert_eq!(told.lines().count(), 1, "{told}");
    script
}

/// Tells a guest that it was cloned once it has said `ready`, and returns all that it says until it powers
/// off.
#[allow(dead_code, reason = "tests of one architecture use it")]
pub(crate) fn is_cloned_after(armlet: Armlet, ready: &str) -> String {
    let mut commanded = Commanded::start(armlet, None);
    commanded.guest.expect(ready);
    commanded.command("clone", "it is another.\n");
    let outcome = commanded.guest.end();
    outcome.assert_status(0);
    outcome.text().to_owned()
}

/// A machine without VMGenID is not told, and whoever wants that is answered.
pub(crate) fn a_machine_without_vmgenid_is_not_told(armlet: Armlet) {
    let mut commanded = Commanded::start(armlet.option("--vmgenid", "off"), None);
    commanded.guest.expect(FIRST);
    let said = "it stays what it is: this machine has no VMGenID; give it one by --vmgenid on.\n";
    commanded.command("clone", said);
    writeln!(commanded.fifo, "stop").expect("armlet reads it");
    commanded.guest.end().assert_status(6);
}
