//! A handler of page faults as Firecracker's example is one: it takes the list and the userfaultfd, checks
//! the size of the memory file, and copies pages from it.

use super::{Kind, bytes, content, pagemap, read_pages, region, take, unused};
use crate::faults::{Handler, Mapping};
use crate::pages::{Backing, Piece, write};
use crate::{PAGE, Paths, Snapshot};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::ioctl::{Updater, ioctl, opcode};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::Value;
use std::fs::File;
use std::io::{IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::JoinHandle;
use vm_memory::{Bytes, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

/// Pages of memory in these tests.
const PAGES: usize = 40;

/// struct uffdio_copy.
#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    size: u64,
    mode: u64,
    copied: i64,
}

/// struct uffdio_zeropage.
#[repr(C)]
struct Zero {
    start: u64,
    size: u64,
    mode: u64,
    zeroed: i64,
}

/// Takes what a message has.
fn receive(stream: &UnixStream) -> (Vec<Value>, OwnedFd) {
    let mut bytes = [0; 1024];
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
    let list = list.as_array().expect("a list").clone();
    (list, descriptor.expect("a userfaultfd"))
}

/// Serves faults until the guest's end of the connection goes; returns how many it served.
fn serve(listener: &UnixListener, memory: &Path) -> usize {
    let (stream, _) = listener.accept().expect("a connection");
    let (list, faults) = receive(&stream);
    let number = |value: &Value, name: &str| value[name].as_u64().expect("a number");
    let total: u64 = list.iter().map(|bank| number(bank, "size")).sum();
    let data = std::fs::read(memory).expect("a memory file");
    assert_eq!(total, data.len() as u64, "as Firecracker's handler asserts");
    let mut file = File::from(faults);
    let (mut served, mut removed) = (0, Vec::new());
    loop {
        let mut waits = [
            PollFd::new(&file, PollFlags::IN),
            PollFd::new(&stream, PollFlags::IN),
        ];
        poll(&mut waits, None).expect("events");
        let is_fault = waits[0].revents().contains(PollFlags::IN);
        if !is_fault {
            return served;
        }
        let mut message = [0; 32];
        file.read_exact(&mut message).expect("an event");
        let field = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().expect("8"));
        match message[0] {
            // UFFD_EVENT_PAGEFAULT.
            0x12 => {
                let at = field(16) / PAGE * PAGE;
                let bank = list.iter().find(|bank| {
                    let start = number(bank, "base_host_virt_addr");
                    (start..start + number(bank, "size")).contains(&at)
                });
                let bank = bank.expect("a bank");
                assert_eq!(number(bank, "page_size"), number(bank, "page_size_kib"));
                let offset = number(bank, "offset") + at - number(bank, "base_host_virt_addr");
                if removed
                    .iter()
                    .any(|(start, end)| (*start..*end).contains(&at))
                {
                    let mut zero = Zero {
                        start: at,
                        size: PAGE,
                        mode: 0,
                        zeroed: 0,
                    };
                    const ZERO: u32 = opcode::read_write::<Zero>(0xaa, 0x04);
                    // SAFETY: the structure is the ioctl's, and the page is one that waits for this.
                    unsafe { ioctl(&file, Updater::<ZERO, Zero>::new(&mut zero)) }.expect("a page");
                } else {
                    let from = data[offset as usize..].as_ptr() as u64;
                    let mut copy = Copy {
                        to: at,
                        from,
                        size: PAGE,
                        mode: 0,
                        copied: 0,
                    };
                    const COPY: u32 = opcode::read_write::<Copy>(0xaa, 0x03);
                    // SAFETY: the structure is the ioctl's, and the page is one that waits for this.
                    unsafe { ioctl(&file, Updater::<COPY, Copy>::new(&mut copy)) }.expect("a page");
                }
                served += 1;
            }
            // UFFD_EVENT_REMOVE.
            0x15 => removed.push((field(8), field(16))),
            other => panic!("event {other:#x}"),
        }
    }
}

/// A snapshot of memory of this content, and its handler.
fn start(folder: &Path, before: &[u8]) -> (Paths, JoinHandle<usize>) {
    let paths = Paths::folder(&folder.join("snapshot"));
    take(
        &region(Kind::Private, &content(before)),
        &paths,
        None,
        b"{}",
    )
    .expect("a snapshot");
    let listener = UnixListener::bind(folder.join("socket")).expect("a socket");
    let memory = paths.memory.clone();
    (paths, std::thread::spawn(move || serve(&listener, &memory)))
}

fn ask(folder: &Path, memory: &GuestRegionMmap) -> anyhow::Result<Handler> {
    let mapping = Mapping {
        address: memory.as_ptr() as u64,
        size: memory.len(),
        offset: 0,
        page_size: PAGE,
    };
    Handler::ask(&folder.join("socket"), &[mapping])
}

#[test]
fn a_handler_made_for_firecracker_gives_each_page_once() {
    if armlet_system::page_size::page_size() as u64 != PAGE {
        println!("skipped: the handler of this test knows pages of 4 KiB");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let before: Vec<u8> = (0..PAGES as u8).collect();
    let (paths, handler) = start(folder.path(), &before);
    let memory = unused(PAGES * PAGE as usize);
    let asked = match ask(folder.path(), &memory) {
        Ok(asked) => asked,
        Err(error) if format!("{error:#}").contains("this user may not") => {
            println!("skipped: {error:#}");
            return;
        }
        Err(error) => panic!("{error:#}"),
    };
    // Of some pages the first use is a write, and what is beside it is the snapshot's.
    memory
        .write_obj(99_u8, MemoryRegionAddress(7 * PAGE + 5))
        .expect("memory");
    assert_eq!(read_pages(&memory), before);
    let there: u8 = memory
        .read_obj(MemoryRegionAddress(7 * PAGE + 5))
        .expect("memory");
    assert_eq!(there, 99);
    // What is given back is zero then.
    let given = memory.as_ptr().wrapping_add(3 * PAGE as usize);
    let advice = rustix::mm::Advice::LinuxDontNeed;
    // SAFETY: nobody refers to the bytes of this page.
    unsafe { rustix::mm::madvise(given.cast(), PAGE as usize, advice) }.expect("given back");
    let mut now = before;
    now[3] = 0;
    assert_eq!(read_pages(&memory), now);
    drop(asked);
    assert_eq!(handler.join().expect("a handler"), PAGES + 1);
    drop(paths);
}

#[test]
fn a_snapshot_of_memory_with_a_handler_has_what_was_never_used() {
    if armlet_system::page_size::page_size() as u64 != PAGE {
        println!("skipped: the handler of this test knows pages of 4 KiB");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let before: Vec<u8> = (1..=PAGES as u8).collect();
    let (paths, handler) = start(folder.path(), &before);
    let memory = unused(PAGES * PAGE as usize);
    let Ok(asked) = ask(folder.path(), &memory) else {
        println!("skipped: no userfaultfd");
        return;
    };
    memory
        .write_obj(99_u8, MemoryRegionAddress(0))
        .expect("memory");
    let into = tempfile::tempfile().expect("a file");
    let slice = memory.as_volatile_slice().expect("mapped");
    let piece = Piece::new(slice, Backing::Handled);
    write(&[piece], Some(&pagemap()), &into, &mut |_| Ok(())).expect("written");
    let mut expected = bytes(&Snapshot::open(&paths).expect("a snapshot").memory);
    expected[0] = 99;
    assert!(bytes(&into) == expected);
    drop(asked);
    assert_eq!(handler.join().expect("a handler"), PAGES);
}

#[test]
fn what_keeps_a_handler_from_working_is_said() {
    let folder = tempfile::tempdir().expect("a folder");
    let refused = |kind, path: &str| {
        let memory = region(kind, &content(&[1; PAGES]));
        let mapping = Mapping {
            address: memory.as_ptr() as u64,
            size: memory.len(),
            offset: 0,
            page_size: PAGE,
        };
        let asked = Handler::ask(&folder.path().join(path), &[mapping]);
        format!("{:#}", asked.expect_err("refused"))
    };
    let text = refused(Kind::Private, "nobody");
    assert!(text.contains("start it first"), "{text}");
    let _listener = UnixListener::bind(folder.path().join("socket")).expect("a socket");
    let text = refused(Kind::Copied, "socket");
    let known = [
        "is not memory without pages yet",
        "this user may not",
        "cannot fill",
    ];
    assert!(known.iter().any(|known| text.contains(known)), "{text}");
}
