//! Shared folders by a real virtiofsd, where there is one, and what is said where there is none.

use super::*;
use crate::alone::{assert_none_is_left, hold, is_alone, is_gone};
use armlet_devices::virtio::mailbox::direct;
use armlet_devices::virtio::mmio::{Mmio, NoPage};
use armlet_devices::{Device, IrqLine};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY: usize = 4 << 20;
/// Entries of each of the guest's rings, and where they lie.
const ENTRIES: u16 = 64;
const RINGS: u64 = 0x1_0000;
const REQUEST: u64 = 0x10_0000;
const ANSWER: u64 = 0x20_0000;
/// How long a test waits for what never takes long, in ms.
const LONG: i32 = 60_000;

/// FUSE_* (include/uapi/linux/fuse.h).
const LOOKUP: u32 = 1;
const OPEN: u32 = 14;
const READ: u32 = 15;
const INIT: u32 = 26;
const CREATE: u32 = 35;
/// The root folder's number.
const ROOT: u64 = 1;
const EIO: i32 = -5;

struct NoLine;

impl IrqLine for NoLine {
    fn set(&self, _high: bool) {}
    fn pulse(&self) {}
}

/// A guest with a driver that has one request under way at a time.
struct Guest {
    device: Arc<Mutex<dyn VirtioDevice>>,
    mmio: Mmio,
    memory: Arc<GuestMemoryMmap>,
    interrupts: Epoll,
    call: Arc<EventFd>,
    requests: u16,
}

impl Guest {
    fn new(share: &Share) -> Guest {
        let file = memfd_create("armlet-test", MemfdFlags::CLOEXEC).expect("a memfd");
        let file = File::from(file);
        file.set_len(MEMORY as u64).expect("room");
        let ranges = [(GuestAddress(0), MEMORY, Some(FileOffset::new(file, 0)))];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).expect("memory");
        let memory = Arc::new(memory);
        let call = Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
        let interrupts = Epoll::new().expect("an epoll instance");
        let event = EpollEvent::new(EventSet::IN, 0);
        let added = interrupts.ctl(ControlOperation::Add, call.as_raw_fd(), event);
        added.expect("a descriptor");
        let device = share.device().expect("a device");
        let mmio = Mmio::new(
            share.name(),
            direct(device.clone()),
            memory.clone(),
            Arc::new(NoLine),
            Some(call.clone()),
            Arc::new(NoPage),
        );
        Guest {
            device,
            mmio: mmio.expect("a window"),
            memory,
            interrupts,
            call,
            requests: 0,
        }
    }

    fn write(&mut self, offset: u64, value: u32) {
        let _ = self.mmio.write(offset, &value.to_le_bytes());
    }

    fn start(&mut self) {
        self.start_with(0);
    }

    /// With these features beside VERSION_1.
    fn start_with(&mut self, features: u32) {
        for status in [0, 1, 3] {
            self.write(0x70, status);
        }
        self.write(0x24, 0);
        self.write(0x20, features);
        self.write(0x24, 1);
        self.write(0x20, 1);
        self.write(0x70, 11);
        for queue in 0..2 {
            let rings = RINGS * (1 + u64::from(queue));
            let empty = vec![0; RINGS as usize];
            self.memory
                .write_slice(&empty, GuestAddress(rings))
                .expect("memory");
            self.write(0x30, queue);
            self.write(0x38, u32::from(ENTRIES));
            self.write(0x80, rings as u32);
            self.write(0x90, rings as u32 + 0x1000);
            self.write(0xa0, rings as u32 + 0x2000);
            self.write(0x44, 1);
        }
        self.write(0x70, 15);
        self.requests = 0;
        // FUSE 7.38 without any extras.
        let mut body = Vec::new();
        body.extend(7_u32.to_le_bytes());
        body.extend(38_u32.to_le_bytes());
        body.resize(64, 0);
        let (error, answer) = self.ask(INIT, 0, &body, 64);
        assert_eq!(error, 0);
        assert_eq!(answer[..4], 7_u32.to_le_bytes());
    }

    /// Makes a request and returns its error and the answer's body.
    fn ask(&mut self, opcode: u32, node: u64, body: &[u8], room: usize) -> (i32, Vec<u8>) {
        self.post(opcode, node, body, room);
        self.wait();
        self.answer()
    }

    fn post(&mut self, opcode: u32, node: u64, body: &[u8], room: usize) {
        self.requests += 1;
        let mut request = Vec::new();
        request.extend((40 + body.len() as u32).to_le_bytes());
        request.extend(opcode.to_le_bytes());
        request.extend(u64::from(self.requests).to_le_bytes());
        request.extend(node.to_le_bytes());
        request.resize(40, 0);
        request.extend(body);
        let memory = &self.memory;
        let put = |bytes: &[u8], at: u64| {
            memory.write_slice(bytes, GuestAddress(at)).expect("memory");
        };
        put(&request, REQUEST);
        let rings = 2 * RINGS;
        let descriptor = |address: u64, len: usize, flags: u16| {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend((len as u32).to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(1_u16.to_le_bytes());
            bytes
        };
        put(&descriptor(REQUEST, request.len(), 1), rings);
        put(&descriptor(ANSWER, 16 + room, 2), rings + 16);
        let available = rings + 0x1000;
        let slot = u64::from((self.requests - 1) % ENTRIES);
        put(&[0, 0], available + 4 + 2 * slot);
        // With EVENT_IDX: an interrupt for this one.
        let event = available + 4 + 2 * u64::from(ENTRIES);
        put(&(self.requests - 1).to_le_bytes(), event);
        put(&self.requests.to_le_bytes(), available + 2);
        self.write(0x50, 1);
    }

    fn used(&self) -> u16 {
        let at = GuestAddress(2 * RINGS + 0x2000 + 2);
        self.memory.read_obj(at).expect("memory")
    }

    /// Waits for the interrupt that says that the request was served.
    fn wait(&mut self) {
        while self.used() != self.requests {
            let woken = self.interrupts.wait(LONG, &mut [EpollEvent::default()]);
            assert_eq!(woken.expect("a wait"), 1, "no interrupt");
            self.call.read().expect("it was written");
        }
    }

    fn answer(&self) -> (i32, Vec<u8>) {
        let mut header = [0; 16];
        self.memory
            .read_slice(&mut header, GuestAddress(ANSWER))
            .expect("memory");
        let word = |at: usize| *header[at..].first_chunk().expect("4 bytes");
        let unique = u64::from_le_bytes(*header[8..].first_chunk().expect("8 bytes"));
        assert_eq!(unique, u64::from(self.requests));
        let mut body = vec![0; u32::from_le_bytes(word(0)) as usize - 16];
        self.memory
            .read_slice(&mut body, GuestAddress(ANSWER + 16))
            .expect("memory");
        (i32::from_le_bytes(word(4)), body)
    }

    /// Looks a name up; its number or an error.
    fn look_up(&mut self, name: &str) -> Result<u64, i32> {
        let name = format!("{name}\0");
        match self.ask(LOOKUP, ROOT, name.as_bytes(), 128) {
            (0, entry) => Ok(u64::from_le_bytes(*entry.first_chunk().expect("8"))),
            (error, _) => Err(error),
        }
    }

    /// Reads a small file of the folder.
    fn read(&mut self, name: &str) -> Vec<u8> {
        let node = self.look_up(name).expect("the file");
        let (error, opened) = self.ask(OPEN, node, &[0; 8], 16);
        assert_eq!(error, 0);
        let mut body = opened[..8].to_vec();
        body.extend(0_u64.to_le_bytes());
        body.extend(4096_u32.to_le_bytes());
        body.resize(40, 0);
        let (error, data) = self.ask(READ, node, &body, 4096);
        assert_eq!(error, 0);
        data
    }

    /// Makes a file in the folder; returns the error.
    fn create(&mut self, name: &str) -> i32 {
        let mut body = Vec::new();
        // O_WRONLY, a mode, no umask, no flags.
        for word in [1_u32, 0o100_644, 0, 0] {
            body.extend(word.to_le_bytes());
        }
        body.extend(name.as_bytes());
        body.push(0);
        self.ask(CREATE, ROOT, &body, 144).0
    }

    /// Has the device look at what became ready, as whoever runs its thread does.
    fn run_device(&mut self) {
        let mut device = self.device.lock().expect("no test panics here");
        device.ready(0);
        device.ready(1);
    }
}

/// A folder with a file in it, shared by the virtiofsd of this machine; `None` where it has none.
fn share(options: &str) -> Option<(tempfile::TempDir, Share)> {
    let program = match daemon::find(std::env::var_os("PATH").as_deref()) {
        Ok(program) => program,
        Err(error) => {
            println!("skipped: {error:#}");
            return None;
        }
    };
    let broker = Broker::fork(Some(&crate::broker::tests::native())).expect("a process");
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("letter"), "dear guest").expect("a file");
    let path = folder.path().display();
    // What works depends on who runs the test, and where.
    for sandbox in ["namespace", "none", "chroot"] {
        let text = format!("tag=home,path={path},sandbox={sandbox}{options}");
        let options = ShareOptions::parse(&text).expect("options");
        match options.open_with("share0", &broker, program.clone()) {
            Ok(share) => return Some((folder, share)),
            Err(error) => println!("skipped: {error:#}"),
        }
    }
    None
}

#[test]
fn options_are_read() {
    let options = ShareOptions::parse("tag=home,path=/home").expect("right");
    assert_eq!(options.tag, "home");
    assert!(!options.readonly && !options.xattr);
    assert_eq!(options.sandbox, Sandbox::Namespace);
    let text = "tag=x,path=/a,,b,readonly,sandbox=none,cache=never,xattr";
    let options = ShareOptions::parse(text).expect("right");
    assert_eq!(options.path, Path::new("/a,b"));
    assert!(options.readonly && options.xattr);
    let wrong = |text: &str| format!("{:#}", ShareOptions::parse(text).expect_err(text));
    assert!(wrong("path=/home").contains("lacks tag="));
    assert!(wrong("tag=x").contains("lacks path="));
    assert!(wrong("tag=x,path=/,sandbox=jail").contains("use namespace or chroot or none"));
    let long = format!("tag={},path=/", "x".repeat(37));
    assert!(wrong(&long).contains("37 bytes; use up to 36"));
}

#[test]
fn what_is_no_folder_is_refused_before_anything_starts() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    fs::write(&file, "").expect("a file");
    let broker = Broker::fork(Some(&crate::broker::tests::native())).expect("a process");
    for (path, what) in [
        (folder.path().join("none"), "cannot share"),
        (file, "is no folder"),
    ] {
        let text = format!("tag=x,path={}", path.display());
        let options = ShareOptions::parse(&text).expect("options");
        let error = options.open_with("share0", &broker, "/bin/false".into());
        let error = error.err().expect("no folder");
        assert!(format!("{error:#}").contains(what), "{error:#}");
    }
}

#[test]
fn a_host_without_it_is_told_the_package() {
    let none = daemon::find(Some(OsStr::new("/nowhere:relative")));
    // This machine may have one where distributions put it.
    let found = none.map_or_else(|error| error.to_string(), |path| path.display().to_string());
    assert!(
        found.contains("the package virtiofsd") || found.starts_with("/usr/lib"),
        "{found}"
    );
    let folder = tempfile::tempdir().expect("a folder");
    let program = folder.path().join("virtiofsd");
    fs::write(&program, "").expect("a file");
    let found = || daemon::find(Some(folder.path().as_os_str())).ok();
    assert_ne!(found().as_ref(), Some(&program), "nobody may run it");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("ours");
    assert_eq!(found(), Some(program));
}

#[test]
fn one_that_does_not_start_is_quoted() {
    let folder = tempfile::tempdir().expect("a folder");
    let text = format!("tag=x,path={}", folder.path().display());
    let options = ShareOptions::parse(&text).expect("options");
    let broker = Broker::fork(Some(&crate::broker::tests::native())).expect("a process");
    let error = |program: &str| {
        let opened = options.open_with("share0", &broker, program.into());
        format!("{:#}", opened.err().expect("it is no virtiofsd"))
    };
    assert_eq!(
        error("/bin/false"),
        "cannot start /bin/false: it ended at once (exit status: 1)"
    );
    let said = error("/bin/ls");
    assert!(said.starts_with("cannot start /bin/ls: "), "{said}");
    assert!(said.contains("ls: unrecognized option '--fd'"), "{said}");
    assert!(error("/bin/none").contains("cannot start /bin/none: No such file"));
}

#[test]
fn the_guest_reads_and_writes_the_folder() {
    let Some((folder, share)) = share("") else {
        return;
    };
    assert!(share.shares_memory());
    let mut guest = Guest::new(&share);
    guest.start();
    assert_eq!(guest.read("letter"), b"dear guest");
    assert_eq!(guest.look_up("nothing"), Err(-2));
    assert_eq!(guest.create("answer"), 0);
    assert!(folder.path().join("answer").is_file());
}

#[test]
fn a_folder_for_reading_is_not_written() {
    let Some((folder, share)) = share(",readonly") else {
        return;
    };
    let mut guest = Guest::new(&share);
    guest.start();
    assert_eq!(guest.read("letter"), b"dear guest");
    // EROFS
    assert_eq!(guest.create("answer"), -30);
    assert!(!folder.path().join("answer").exists());
}

#[test]
fn drivers_and_guests_come_and_go() {
    let Some((_folder, share)) = share("") else {
        return;
    };
    for _ in 0..2 {
        let mut guest = Guest::new(&share);
        for _ in 0..2 {
            guest.start();
            assert_eq!(guest.read("letter"), b"dear guest");
        }
    }
}

#[test]
fn a_session_goes_on_after_the_machine_was_held() {
    let Some((folder, share)) = share("") else {
        return;
    };
    let mut guest = Guest::new(&share);
    guest.start();
    assert_eq!(guest.read("letter"), b"dear guest");
    for round in 0..3 {
        guest.mmio.quiesce();
        let state = guest.mmio.save().expect("it is held");
        let mut positions = state.transport.queues.iter().map(|queue| queue.position);
        let last = positions.next_back().expect("a queue for requests");
        assert_eq!(last.next_available, guest.requests);
        assert_eq!(last.next_used, guest.requests);
        let name = format!("answer{round}");
        guest.mmio.resume();
        assert_eq!(guest.create(&name), 0);
        assert!(folder.path().join(&name).is_file());
        // The same session: it was not begun anew.
        assert_eq!(guest.look_up("nothing"), Err(-2));
    }
    let count = kill_servers(folder.path());
    assert_ne!(count, 0);
    guest.mmio.quiesce();
    guest.mmio.resume();
    guest.post(LOOKUP, ROOT, b"letter\0", 128);
    while guest.used() != guest.requests {
        guest.run_device();
    }
    assert_eq!(guest.answer().0, EIO);
}

/// Kills the processes that serve this folder, waits until they are gone, and counts them.
fn kill_servers(folder: &Path) -> usize {
    let folder = folder.as_os_str().as_encoded_bytes();
    let serves = |pid: u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        // A zombie has no command line.
        line.windows(folder.len()).any(|part| part == folder)
    };
    let mut killed = 0;
    for entry in fs::read_dir("/proc").expect("/proc") {
        let name = entry.expect("an entry").file_name();
        let pid = name.to_str().and_then(|name| name.parse::<u32>().ok());
        if let Some(pid) = pid.filter(|pid| serves(*pid)) {
            let process = Pid::from_raw(pid as i32).expect("a process");
            let _ = kill_process(process, Signal::KILL);
            killed += 1;
            // All that it had is closed when it is a zombie.
            let is_there = || {
                let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                !(stat.is_empty() || stat.contains(") Z "))
            };
            while is_there() {
                std::thread::yield_now();
            }
        }
    }
    killed
}

#[test]
fn one_that_dies_leaves_errors_and_a_device_that_can_start_again() {
    let Some((folder, share)) = share("") else {
        return;
    };
    let mut guest = Guest::new(&share);
    // The one that waits for the guest dies: nobody notices.
    assert_ne!(kill_servers(folder.path()), 0);
    guest.start();
    assert_eq!(guest.read("letter"), b"dear guest");
    assert_ne!(kill_servers(folder.path()), 0);
    guest.post(LOOKUP, ROOT, b"letter\0", 128);
    while guest.used() != guest.requests {
        guest.run_device();
    }
    assert_eq!(guest.answer().0, EIO);
    guest.post(LOOKUP, ROOT, b"letter\0", 128);
    guest.run_device();
    assert_eq!(guest.answer().0, EIO);
    guest.start();
    assert_eq!(guest.read("letter"), b"dear guest");
}

#[test]
fn none_is_left_when_the_guest_is_gone() {
    let Some((folder, share)) = share("") else {
        return;
    };
    let mut guest = Guest::new(&share);
    guest.start();
    drop(guest);
    drop(share);
    assert_eq!(kill_servers(folder.path()), 0, "one was there still");
}

/// A virtiofsd that is a shell script.
fn fake(script: &str, patience: Duration) -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder");
    let program = folder.path().join("virtiofsd");
    fs::write(&program, format!("#!/bin/sh\n{script}\n")).expect("a file");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("ours");
    let text = format!("tag=x,path={}", folder.path().display());
    let options = ShareOptions::parse(&text).expect("options");
    let broker = Broker::fork(Some(&crate::broker::tests::native())).expect("a process");
    let launch = Launch::new(&broker, program, &options, folder.path().to_owned())?;
    launch.start("share0", Deadline::after(patience)).map(drop)
}

#[test]
fn one_that_never_answers_is_not_waited_for_and_does_not_stay() {
    let folder = tempfile::tempdir().expect("a folder");
    let pids = folder.path().join("pids");
    let script = format!(
        "trap '' TERM HUP; sleep 1000 & other=$!; setsid sleep 1000 & exec 2>&-
echo $$ $other $! >{0}.new; mv {0}.new {0}; wait",
        pids.display()
    );
    let error = fake(&script, Duration::from_secs(3)).expect_err("it says nothing");
    let error = format!("{error:#}");
    assert!(
        error.contains("does not answer GetFeatures within 3000 ms"),
        "{error}"
    );
    let started = fs::read_to_string(&pids).expect("it ran");
    let started: Vec<u32> = started
        .split_whitespace()
        .map(|pid| pid.parse().expect("a number"))
        .collect();
    assert!(started.len() >= 3, "{started:?}");
    assert!(started.iter().all(|pid| is_gone(*pid)), "{started:?}");
}

/// VIRTIO_F_EVENT_IDX: virtiofsd 1.13 then looks at a ring whose index cannot be again and again, and
/// notices neither that its connection is closed nor SIGTERM.
const EVENT_IDX: u32 = 1 << 29;

/// Has a guest break its rings: indices and addresses that cannot be.
fn break_rings(guest: &mut Guest) {
    let rings = 2 * RINGS;
    let memory = &guest.memory;
    let put = |bytes: &[u8], at: u64| {
        memory.write_slice(bytes, GuestAddress(at)).expect("memory");
    };
    // A descriptor nowhere that is its own next one, and more entries than there are.
    put(&[0xff; 32], rings);
    put(&[0xff; 64], rings + 0x1000 + 4);
    put(&0x8000_u16.to_le_bytes(), rings + 0x1000 + 2);
    guest.write(0x50, 1);
    guest.write(0x50, 0);
}

#[test]
fn nothing_of_virtiofsd_is_left_when_armlet_is_killed() {
    const NAME: &str = "share::tests::nothing_of_virtiofsd_is_left_when_armlet_is_killed";
    let Some((_folder, share)) = share("") else {
        return;
    };
    if !is_alone(NAME) {
        drop(share);
        // The broker, virtiofsd and, in namespaces, its child.
        return assert_none_is_left(NAME, 2);
    }
    let mut guest = Guest::new(&share);
    guest.start_with(EVENT_IDX);
    assert_eq!(guest.read("letter"), b"dear guest");
    break_rings(&mut guest);
    // The next one is there, too.
    let _next = Guest::new(&share);
    std::thread::sleep(Duration::from_millis(300));
    hold();
}

#[test]
fn one_whose_rings_the_guest_broke_ends_with_the_guest() {
    let Some((folder, share)) = share("") else {
        return;
    };
    for _ in 0..3 {
        let mut guest = Guest::new(&share);
        guest.start_with(EVENT_IDX);
        assert_eq!(guest.read("letter"), b"dear guest");
        break_rings(&mut guest);
        // A reset, and the next driver.
        guest.start_with(EVENT_IDX);
        assert_eq!(guest.read("letter"), b"dear guest");
        break_rings(&mut guest);
    }
    drop(share);
    assert_eq!(kill_servers(folder.path()), 0, "one was there still");
}
