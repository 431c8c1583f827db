//! Restored guests whose memory a handler of page faults gives, by the protocol of those that were made
//! for Firecracker.

use crate::api::Api;
use crate::commanded::{FIRST, TICKS};
use crate::control::{controlled, done};
use crate::guest::{Armlet, GLANCE};
use armlet_system::deadline::Deadline;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::Signal;
use serde_json::Value;
use std::fs::{self, File};
use std::io::{IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

/// How long what must come may take.
const LONG: Duration = Duration::from_secs(60);

/// struct uffdio_copy (include/uapi/linux/userfaultfd.h), and the ioctl that takes it.
#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    size: u64,
    mode: u64,
    copied: i64,
}
const COPY: Opcode = opcode::read_write::<Copy>(0xaa, 0x03);
/// The event of a missing page, and the bytes of an event.
const PAGEFAULT: u8 = 0x12;
const EVENT: usize = 32;

/// How often a handler looks whether it is to go away.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

/// A bank of guest memory, as armlet's message has it.
struct Bank {
    address: u64,
    size: u64,
    offset: u64,
    page: u64,
}

impl Bank {
    fn read(value: &Value) -> Bank {
        let number = |name: &str| value[name].as_u64().expect("a number");
        Bank {
            address: number("base_host_virt_addr"),
            size: number("size"),
            offset: number("offset"),
            page: number("page_size"),
        }
    }
}

/// Takes the list of banks, and the userfaultfd that comes with it.
fn receive(stream: &UnixStream) -> (Vec<Bank>, File) {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut with = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut bytes)];
    let received = recvmsg(stream, &mut into, &mut with, RecvFlags::CMSG_CLOEXEC);
    let count = received.expect("a message").bytes;
    let descriptor = with.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    let list: Value = serde_json::from_slice(&bytes[..count]).expect("JSON");
    let banks = list.as_array().expect("a list").iter().map(Bank::read);
    let faults: OwnedFd = descriptor.expect("a userfaultfd");
    (banks.collect(), faults.into())
}

/// Gives pages of `memory` to whoever connects first, until that one is gone or it `is_over`; returns how many
/// it gave.
fn serve(listener: &UnixListener, memory: &File, is_over: &AtomicBool) -> usize {
    let (stream, _) = listener.accept().expect("a connection");
    let (banks, mut faults) = receive(&stream);
    let end = banks.iter().map(|bank| bank.offset + bank.size).max();
    let size = memory.metadata().expect("a file").len();
    assert_eq!(end, Some(size), "the banks and the memory file");
    give(&banks, &mut faults, &stream, memory, is_over)
}

/// Gives pages of these banks, as [`serve`].
fn give(
    banks: &[Bank],
    faults: &mut File,
    stream: &UnixStream,
    memory: &File,
    is_over: &AtomicBool,
) -> usize {
    let mut given = 0;
    loop {
        let mut waits = [
            PollFd::new(&*faults, PollFlags::IN),
            PollFd::new(stream, PollFlags::IN),
        ];
        match poll(&mut waits, Some(&LOOK)) {
            Err(Errno::INTR) => continue,
            Ok(0) if !is_over.load(Ordering::Acquire) => continue,
            polled => polled.expect("events"),
        };
        if !waits[0].revents().contains(PollFlags::IN) {
            return given;
        }
        let mut event = [0; EVENT];
        match faults.read_exact(&mut event) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            read => read.expect("an event"),
        }
        if event[0] != PAGEFAULT {
            continue;
        }
        let at = u64::from_ne_bytes(event[16..24].try_into().expect("8 bytes"));
        let ours = |bank: &&Bank| (bank.address..bank.address + bank.size).contains(&at);
        let bank = banks.iter().find(ours).expect("a bank of the guest's");
        let at = at / bank.page * bank.page;
        let mut page = vec![0; bank.page as usize];
        let offset = bank.offset + at - bank.address;
        memory.read_exact_at(&mut page, offset).expect("a page");
        let mut copy = Copy {
            to: at,
            from: page.as_ptr() as u64,
            size: bank.page,
            mode: 0,
            copied: 0,
        };
        // SAFETY: the structure is the ioctl's, `page` outlives the call, and what is written is a page of
        // another process that waits for it.
        match unsafe { ioctl(&*faults, Updater::<COPY, Copy>::new(&mut copy)) } {
            Ok(()) => given += 1,
            // Another vCPU asked for it too; the machine has ended.
            Err(Errno::EXIST | Errno::SRCH) => {}
            Err(error) => panic!("a page is not taken: {error}"),
        }
    }
}

/// Listens at `socket`, and gives what is in `memory` until it `is_over`.
fn handler(socket: &Path, memory: &Path, is_over: &Arc<AtomicBool>) -> JoinHandle<usize> {
    let listener = UnixListener::bind(socket).expect("a socket");
    let memory = File::open(memory).expect("a memory file");
    let is_over = Arc::clone(is_over);
    std::thread::spawn(move || serve(&listener, &memory, &is_over))
}

/// The folder of memory file and socket of a handler that is a process.
const FOLDER: &str = "ARMLET_TEST_HANDLER";

/// No test: the process of a handler, which closes its connection after a while, and serves on.
#[test]
fn serves_pages_until_it_is_killed() {
    let Some(folder) = std::env::var_os(FOLDER) else {
        return;
    };
    let path = |name: &str| Path::new(&folder).join(name);
    let listener = UnixListener::bind(path("other")).expect("a socket");
    let memory = File::open(path("memory")).expect("a memory file");
    let (stream, _) = listener.accept().expect("a connection");
    let (banks, mut faults) = receive(&stream);
    let (_kept, idle) = UnixStream::pair().expect("sockets");
    let is_over = Arc::new(AtomicBool::new(false));
    let over = Arc::clone(&is_over);
    let timer = std::thread::spawn(move || {
        sleep(Duration::from_millis(500));
        over.store(true, Ordering::Release);
    });
    give(&banks, &mut faults, &stream, &memory, &is_over);
    timer.join().expect("no panic");
    drop(stream);
    fs::write(path("closed"), "").expect("written");
    give(&banks, &mut faults, &idle, &memory, &AtomicBool::new(false));
}

/// Whether this user may handle page faults of KVM on this host (userfaultfd(2)).
fn may_handle_faults() -> bool {
    let sysctl = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    let mut device = File::options();
    device.read(true).write(true);
    let may = sysctl.is_ok_and(|text| {
        text.trim() == "1"
            || rustix::process::geteuid().is_root()
            || device.open("/dev/userfaultfd").is_ok()
    });
    if !may {
        println!("skipped: this user may not handle page faults here");
    }
    may
}

/// The guest prints [`FIRST`] and then [`TICKS`] for ever.
pub(crate) fn a_guest_gets_its_memory_from_a_handler_of_page_faults(first: Armlet) {
    if !may_handle_faults() {
        return;
    }
    let saved = tempfile::tempdir().expect("a folder");
    let text = |name: &str| saved.path().join(name).display().to_string();
    let (folder, next) = (text("first"), text("next"));
    // A snapshot of it asks for each page.
    let (guest, path) = controlled(first.memory("32M"), &[]);
    done(&path, &["snapshot", &folder]);
    guest.signal(Signal::KILL);
    guest.end().assert_signal(Signal::KILL);
    // armlet itself is not to need it.
    fs::rename(Path::new(&folder).join("memory"), text("memory")).expect("a file");
    let from = format!("uffd={}", text("socket"));
    let output = Command::new(env!("CARGO_BIN_EXE_armlet"))
        .args(["run", "--restore", &folder, "--memory-from", &from])
        .output()
        .expect("armlet");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("start it first"), "{said}");
    assert!(said.contains(&text("socket")), "{said}");
    let memory = saved.path().join("memory");
    let serving = handler(&saved.path().join("socket"), &memory, &Arc::default());
    let again = Armlet::new();
    let control = again.file("control", b"");
    fs::remove_file(&control).expect("a file of ours");
    let again = again.option("--control", &control);
    let again = again
        .option("--memory-from", &from)
        .option("--sandbox", "on");
    let mut again = again.restore(Path::new(&folder));
    again.expect(TICKS);
    again.expect(TICKS);
    assert!(!again.said().contains(FIRST), "{}", again.said());
    // The next one has the pages, too, that nobody has asked for yet.
    done(&control, &["snapshot", &next]);
    again.signal(Signal::KILL);
    again.end().assert_signal(Signal::KILL);
    assert!(serving.join().expect("a handler") > 0);
    // One that closes its connection is there; once its process has ended, the guest has.
    let mut other = Command::new(std::env::current_exe().expect("a program"))
        .args(["--exact", "handler::serves_pages_until_it_is_killed"])
        .env(FOLDER, saved.path())
        .stdout(Stdio::null())
        .spawn()
        .expect("a process");
    let socket = saved.path().join("other");
    let deadline = Deadline::after(LONG);
    while !socket.exists() && !deadline.left().is_zero() {
        sleep(GLANCE);
    }
    let waiting = Armlet::new().option("--memory-from", format!("uffd={}", text("other")));
    let mut waiting = waiting.restore(Path::new(&folder));
    waiting.expect(TICKS);
    while !saved.path().join("closed").exists() && !deadline.left().is_zero() {
        sleep(GLANCE);
    }
    waiting.expect(TICKS);
    assert!(waiting.runs());
    other.kill().expect("it runs");
    other.wait().expect("a child");
    let outcome = waiting.end();
    let said = outcome.assert_status(8).complaints();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("has ended, and the guest with it"), "{said}");
    let mut third = Armlet::new().restore(Path::new(&next));
    third.expect(TICKS);
    assert!(!third.said().contains(FIRST), "{}", third.said());
}

/// `kernel` prints `first` and then `ticks` for ever.
pub(crate) fn a_load_takes_memory_from_a_handler(kernel: &[u8], first: &str, ticks: &str) {
    if !may_handle_faults() {
        return;
    }
    let api = Api::start(&[]);
    api.write("kernel", kernel);
    api.put(
        "/machine-config",
        r#"{"vcpu_count": 1, "mem_size_mib": 64}"#,
    );
    api.put("/boot-source", r#"{"kernel_image_path": "kernel"}"#);
    api.put("/actions", r#"{"action_type": "InstanceStart"}"#);
    api.expect(first);
    assert_eq!(
        api.ask("PATCH", "/vm", Some(r#"{"state": "Paused"}"#)).0,
        204
    );
    api.put(
        "/snapshot/create",
        r#"{"snapshot_path": "state", "mem_file_path": "memory"}"#,
    );
    let load = format!(
        r#"{{"snapshot_path": {:?}, "mem_backend": {{"backend_type": "Uffd", "backend_path": "socket"}},
            "resume_vm": true}}"#,
        api.path("state")
    );
    // Nobody listens: that ends it, as Firecracker.
    let mut none = Api::start(&[]);
    let (status, why) = none.ask("PUT", "/snapshot/load", Some(&load));
    assert_eq!(status, 400, "{why}");
    assert!(why.contains("Load snapshot error"), "{why}");
    assert!(why.contains("start it first"), "{why}");
    assert_eq!(none.end().code(), Some(1));
    let mut again = Api::start(&[]);
    let serving = handler(&again.path("socket"), &api.path("memory"), &Arc::default());
    again.put("/snapshot/load", &load);
    again.expect(ticks);
    assert!(!again.printed().contains(first), "{}", again.printed());
    let pid = rustix::process::Pid::from_child(&again.child);
    rustix::process::kill_process(pid, Signal::TERM).expect("it runs");
    again.end();
    assert!(serving.join().expect("a handler") > 0);
}
