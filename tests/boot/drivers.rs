//! A guest without an operating system, whose drivers are those of the crate `virtio-drivers`.
//!
//! It is this very program: its file as it lies in memory, with a kernel's header before it and a few
//! instructions behind it that turn the MMU on, by which it lies where it was linked for, and call
//! [`exercise`]. Nothing of it may make a system call there, so memory comes from an arena.

use crate::guest::{Armlet, Input, Outcome};
use crate::net::outside;
use crate::rig;
use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::device::socket::{
    VMADDR_CID_HOST, VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEventType,
};
use virtio_drivers::transport::mmio::{MmioTransport, VirtIOHeader};
use virtio_drivers::transport::{DeviceType, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// How often each driver is made, used and dropped: then it stops its queues and waits until each
/// QueueReady reads as 0.
const ROUNDS: usize = 20;
/// The host's port that the guest connects to.
const PORT: u32 = 1234;
/// What the disk holds at first.
const FILLING: u8 = 0xa5;
/// Its sectors.
const SECTORS: usize = 64;

// ------------------------------------------------------------------------------------ the guest

/// Where the first of the board's windows is, and how far from one to the next.
const WINDOWS: usize = 0x0a00_0000;
const WINDOW: usize = 0x200;
/// The PL011's data register.
const UARTDR: usize = 0x0900_0000;

/// Where the next piece of memory comes from in the guest; 0 outside of it.
static ARENA: AtomicUsize = AtomicUsize::new(0);

/// The system's memory, or the guest's.
struct Heap;

#[global_allocator]
static HEAP: Heap = Heap;

// SAFETY: outside of the guest all is the system's; in it each piece is given once and never again.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match ARENA.load(Ordering::Relaxed) {
            // SAFETY: what the caller promised is what the system wants.
            0 => unsafe { System.alloc(layout) },
            _ => piece(layout.size(), layout.align()),
        }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if ARENA.load(Ordering::Relaxed) == 0 {
            // SAFETY: as above.
            unsafe { System.dealloc(pointer, layout) };
        }
    }
}

/// Zeroed memory of the guest's, which nobody had before.
fn piece(size: usize, align: usize) -> *mut u8 {
    let start = ARENA.load(Ordering::Relaxed).next_multiple_of(align);
    ARENA.store(start + size, Ordering::Relaxed);
    start as *mut u8
}

/// The guest's memory, which devices see where the guest does, but for the program itself.
struct Memory;

// SAFETY: addresses are what the guest's tables say, and each piece is given once.
unsafe impl Hal for Memory {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let start = piece(pages * PAGE_SIZE, PAGE_SIZE);
        (start as PhysAddr, NonNull::new(start).expect("memory"))
    }

    unsafe fn dma_dealloc(_address: PhysAddr, _pointer: NonNull<u8>, _pages: usize) -> i32 {
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _size: usize) -> NonNull<u8> {
        NonNull::new(address as *mut u8).expect("an address")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        match buffer.cast::<u8>().as_ptr() as PhysAddr {
            address if address < PROGRAM => LOAD + address,
            address => address,
        }
    }

    unsafe fn unshare(_address: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}

fn print(text: &str) {
    for byte in text.bytes() {
        // SAFETY: the register is mapped as device memory, and takes words.
        unsafe { (UARTDR as *mut u32).write_volatile(u32::from(byte)) };
    }
}

/// The device in a window; `None` where there is none.
fn device(slot: usize) -> Option<MmioTransport<'static>> {
    let header = NonNull::new((WINDOWS + slot * WINDOW) as *mut VirtIOHeader)?;
    // SAFETY: the window is mapped as device memory and nobody else uses it.
    unsafe { MmioTransport::new(header, WINDOW) }.ok()
}

/// What the guest does: each device's driver is made, used and dropped, again and again.
extern "C" fn exercise(arena: usize) {
    ARENA.store(arena, Ordering::Relaxed);
    let mut console = None;
    for slot in 0..8 {
        let Some(kind) = device(slot).map(|device| device.device_type()) else {
            continue;
        };
        let (name, work): (&str, fn(MmioTransport<'static>, usize) -> bool) = match kind {
            DeviceType::Block => ("block", block),
            DeviceType::EntropySource => ("rng", rng),
            DeviceType::Network => ("net", net),
            DeviceType::Socket => ("vsock", vsock),
            DeviceType::Console => {
                console = Some(slot);
                continue;
            }
            _ => continue,
        };
        let works = (0..ROUNDS).all(|round| device(slot).is_some_and(|this| work(this, round)));
        print(name);
        print(if works {
            ": all rounds\n"
        } else {
            ": FAILED\n"
        });
    }
    if let Some(slot) = console {
        for round in 0..ROUNDS {
            if let Some(device) = device(slot) {
                talk(device, round);
            }
        }
    }
}

fn block(device: MmioTransport<'static>, round: usize) -> bool {
    let Ok(mut disk) = VirtIOBlk::<Memory, _>::new(device) else {
        return false;
    };
    let mut first = [0; SECTOR_SIZE];
    let written = [round as u8 + 1; SECTOR_SIZE];
    let mut back = [0; SECTOR_SIZE];
    disk.capacity() == SECTORS as u64
        && disk.read_blocks(0, &mut first).is_ok()
        && first == [FILLING; SECTOR_SIZE]
        && disk.write_blocks(round + 1, &written).is_ok()
        && disk.flush().is_ok()
        && disk.read_blocks(round + 1, &mut back).is_ok()
        && back == written
}

fn rng(device: MmioTransport<'static>, _round: usize) -> bool {
    let Ok(mut rng) = VirtIORng::<Memory, _>::new(device) else {
        return false;
    };
    let mut bytes = [0; 32];
    rng.request_entropy(&mut bytes)
        .is_ok_and(|count| count == bytes.len())
        && bytes != [0; 32]
}

/// Asks who has an address of the network, and waits for the answer.
fn net(device: MmioTransport<'static>, _round: usize) -> bool {
    const ARP: [u8; 2] = [0x08, 0x06];
    let Ok(mut card) = VirtIONetRaw::<Memory, _, 16>::new(device) else {
        return false;
    };
    let mac = card.mac_address();
    let mut request = [0_u8; 60];
    request[..6].fill(0xff);
    request[6..12].copy_from_slice(&mac);
    request[12..14].copy_from_slice(&ARP);
    // Ethernet, IPv4, lengths, a request (RFC 826).
    request[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    request[22..28].copy_from_slice(&mac);
    request[28..32].copy_from_slice(&[10, 0, 2, 15]);
    request[38..42].copy_from_slice(&[10, 0, 2, 2]);
    if card.send(&request).is_err() {
        return false;
    }
    let mut frame = [0; 2048];
    // What else comes meanwhile is of no interest.
    for _ in 0..100 {
        let Ok((header, _)) = card.receive_wait(&mut frame) else {
            return false;
        };
        let answer = &frame[header..];
        if answer[..6] == mac && answer[12..14] == ARP && answer[20..22] == [0, 2] {
            return true;
        }
    }
    false
}

/// Sends a few bytes to the host and wants them back.
fn vsock(device: MmioTransport<'static>, round: usize) -> bool {
    let Ok(driver) = VirtIOSocket::<Memory, _, 512>::new(device) else {
        return false;
    };
    let mut socket = VsockConnectionManager::new(driver);
    let host = VsockAddr {
        cid: VMADDR_CID_HOST,
        port: PORT,
    };
    let sent = [round as u8; 5];
    let mut back = [0; 5];
    if socket.connect(host, 1000).is_err() {
        return false;
    }
    loop {
        match socket.wait_for_event().map(|event| event.event_type) {
            Ok(VsockEventType::Connected) if socket.send(host, 1000, &sent).is_ok() => {}
            Ok(VsockEventType::Received { .. }) => {
                let got = socket.recv(host, 1000, &mut back);
                // Dropped with the connection open.
                return got.is_ok_and(|count| count == 5) && back == sent;
            }
            Ok(VsockEventType::CreditUpdate) => {}
            _ => return false,
        }
    }
}

/// Says the round's letter, and waits for it to come back.
fn talk(device: MmioTransport<'static>, round: usize) {
    let Ok(mut console) = VirtIOConsole::<Memory, _>::new(device) else {
        return;
    };
    let letter = b'a' + round as u8;
    let said = [b'r', b'o', b'u', b'n', b'd', b' ', letter, b'\n'];
    if console.send_bytes(&said).is_err() {
        return;
    }
    loop {
        match console.recv(true) {
            Ok(Some(got)) if got == letter => return,
            Ok(_) => {}
            Err(_) => return,
        }
    }
}

// ------------------------------------------------------------------------------------ its kernel

/// Where the board `virt` has its memory, and kernels that may lie anywhere.
const LOAD: u64 = 0x4000_0000;
/// The program has the addresses below this one, which are in memory from [`LOAD`] on.
const PROGRAM: u64 = 0x0800_0000;
/// Bytes of stack and of memory to take pieces from.
const STACK: u64 = 1 << 20;
const HEAP_BYTES: u64 = 16 << 20;

/// Turns the MMU on with the table behind this page, and floating point; takes exceptions in this
/// page; calls the function in the second of the three words at the end of it with the third as its
/// stack and its argument; powers the machine off. (Encodings: Arm DDI 0487, section C6.2.)
const START: [u32; 28] = [
    0x1000_0014, // adr x20, .
    0x9140_0682, // add x2, x20, #0x1000
    0xd518_2002, // msr ttbr0_el1, x2
    0xd280_1fe3, // mov x3, #0xff: write-back memory, and device memory
    0xd518_a203, // msr mair_el1, x3
    0x5800_02e3, // ldr x3, the first word
    0xd518_2043, // msr tcr_el1, x3
    0xd2a0_0603, // mov x3, #0x300000
    0xd518_1043, // msr cpacr_el1, x3
    0x9120_0283, // add x3, x20, #0x800
    0xd518_c003, // msr vbar_el1, x3
    0xd503_3fdf, // isb
    0xd508_871f, // tlbi vmalle1
    0xd503_379f, // dsb nsh
    0xd503_3fdf, // isb
    0xd538_1003, // mrs x3, sctlr_el1
    0xd282_00a4, // mov x4, #0x1005: MMU, caches
    0xaa04_0063, // orr x3, x3, x4
    0xd518_1003, // msr sctlr_el1, x3
    0xd503_3fdf, // isb
    0x5800_0145, // ldr x5, the second word
    0x5800_0160, // ldr x0, the third word
    0x9100_001f, // mov sp, x0
    0xd63f_00a0, // blr x5
    0x5280_0100, // mov w0, #8: SYSTEM_OFF
    0x72b0_8000, // movk w0, #0x8400, lsl #16
    0xd400_0002, // hvc #0
    0x1400_0000, // b .
];
/// An exception: prints '!' and powers the machine off.
const EXCEPTION: [u32; 7] = [
    0xd2a1_2001, // mov x1, #0x9000000
    0x5280_0422, // mov w2, #'!'
    0xb900_0022, // str w2, [x1]
    0x5280_0100,
    0x72b0_8000,
    0xd400_0002,
    0x1400_0000,
];
/// Where in the page it is: taken from EL1 with EL1's stack pointer.
const EXCEPTION_AT: usize = 0x800 + 0x200;
/// 39 bits of addresses in pages of 4 KiB, walked through the caches; 40 bits of physical ones; no
/// TTBR1 (TCR_EL1).
const TRANSLATION: u64 = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2 << 32;
/// Blocks that were accessed: of devices, not to be executed, and of memory, shareable.
const DEVICES: u64 = 1 | 1 << 2 | 1 << 10 | 3 << 53;
const SHAREABLE: u64 = 1 | 3 << 8 | 1 << 10;
/// A table of the next level.
const TABLE: u64 = 3;
/// Bytes of a block in it.
const BLOCK: u64 = 2 << 20;

fn number<const N: usize>(bytes: &[u8], at: u64) -> [u8; N] {
    let at = at as usize;
    bytes[at..at + N].try_into().expect("so many bytes")
}

fn u64_at(bytes: &[u8], at: u64) -> u64 {
    u64::from_le_bytes(number(bytes, at))
}

/// This program as a kernel (an Image: Linux, Documentation/arch/arm64/booting.rst, section 4).
fn kernel() -> Vec<u8> {
    let file = fs::read("/proc/self/exe").expect("this program");
    let mut image = laid_out(&file);
    image.resize(image.len().next_multiple_of(PAGE_SIZE), 0);
    let start = image.len() as u64;
    let tables = LOAD + start + PAGE_SIZE as u64;
    let top = tables + 2 * PAGE_SIZE as u64 + STACK;
    let mut page: Vec<u8> = START.iter().flat_map(|word| word.to_le_bytes()).collect();
    let entry = exercise as *const () as u64 - base(&file);
    page.extend(
        [TRANSLATION, entry, top]
            .iter()
            .flat_map(|word| word.to_le_bytes()),
    );
    page.resize(EXCEPTION_AT, 0);
    page.extend(EXCEPTION.iter().flat_map(|word| word.to_le_bytes()));
    page.resize(PAGE_SIZE, 0);
    // The first GiB by blocks, the second at once.
    let first = [(tables + PAGE_SIZE as u64) | TABLE, LOAD | SHAREABLE];
    page.extend(first.iter().flat_map(|word| word.to_le_bytes()));
    page.resize(2 * PAGE_SIZE, 0);
    for address in (0..1_u64 << 30).step_by(BLOCK as usize) {
        let entry = match address < PROGRAM {
            true => (LOAD + address) | SHAREABLE,
            false => address | DEVICES,
        };
        page.extend(entry.to_le_bytes());
    }
    image.extend(page);
    let size = image.len() as u64 + STACK + HEAP_BYTES;
    // At address 0, where nothing but the ELF header can be: NOP, B to the start, size, that it may
    // lie anywhere.
    image[..64].fill(0);
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x00, &0xd503_201f_u32.to_le_bytes());
    put(
        0x04,
        &(0x1400_0000 | ((start as u32 - 4) / 4)).to_le_bytes(),
    );
    put(0x10, &size.to_le_bytes());
    put(0x18, &0xa_u64.to_le_bytes());
    put(0x38, b"ARM\x64");
    image
}

/// A program as it lies in memory from address 0 on (the ELF specification of System V, chapter 5;
/// "ELF for the Arm 64-bit Architecture").
fn laid_out(file: &[u8]) -> Vec<u8> {
    const LOADED: u32 = 1;
    const DYNAMIC: u32 = 2;
    const RELA: u64 = 7;
    const RELA_BYTES: u64 = 8;
    const RELATIVE: u64 = 1027;
    let headers = u64_at(file, 0x20);
    let count = u16::from_le_bytes(number(file, 0x38));
    let mut memory: Vec<u8> = Vec::new();
    let mut dynamic = 0..0;
    for index in 0..u64::from(count) {
        let header = headers + 56 * index;
        let kind = u32::from_le_bytes(number(file, header));
        let [offset, address, _, in_file, size] =
            [8, 16, 24, 32, 40].map(|field| u64_at(file, header + field));
        if kind == DYNAMIC {
            dynamic = address..address + size;
        }
        if kind == LOADED {
            memory.resize(memory.len().max((address + size) as usize), 0);
            let (to, from) = (address as usize, offset as usize);
            let size = in_file as usize;
            memory[to..to + size].copy_from_slice(&file[from..from + size]);
        }
    }
    let entries = dynamic
        .step_by(16)
        .map(|at| (u64_at(&memory, at), u64_at(&memory, at + 8)));
    let entries: Vec<(u64, u64)> = entries.collect();
    let find = |tag| {
        entries
            .iter()
            .find(|(known, _)| *known == tag)
            .map(|(_, value)| *value)
    };
    // One that is linked for a fixed address has none.
    let (table, bytes) = (find(RELA).unwrap_or(0), find(RELA_BYTES).unwrap_or(0));
    for at in (table..table + bytes).step_by(24) {
        let [place, kind, addend] = [0, 8, 16].map(|field| u64_at(&memory, at + field));
        assert_eq!(kind, RELATIVE, "a relocation that was not thought of");
        let place = place as usize;
        memory[place..place + 8].copy_from_slice(&addend.to_le_bytes());
    }
    let bytes = memory.len();
    assert!((bytes as u64) < PROGRAM, "a program of {bytes} bytes");
    memory
}

/// How far from where it was linked for this program lies in this process.
fn base(file: &[u8]) -> u64 {
    const FIXED: u16 = 2;
    if u16::from_le_bytes(number(file, 0x10)) == FIXED {
        return 0;
    }
    let maps = fs::read_to_string("/proc/self/maps").expect("this process");
    let name = fs::read_link("/proc/self/exe").expect("this program");
    let name = name.to_str().expect("a name in UTF-8");
    let line = maps.lines().find(|line| line.ends_with(name));
    let (start, _) = line
        .and_then(|line| line.split_once('-'))
        .expect("its first mapping");
    u64::from_str_radix(start, 16).expect("an address")
}

// ------------------------------------------------------------------------------------- the tests

/// A machine whose kernel is this program.
fn machine() -> Armlet {
    let kernel = kernel();
    let armlet = Armlet::image(&kernel);
    let path = armlet.file("copy", &kernel);
    let plan = Command::new(env!("CARGO_BIN_EXE_armlet"))
        .args([
            "plan", "--json", "--board", "virt", "--host", "virt", "--kernel",
        ])
        .arg(path)
        .output()
        .expect("armlet can be run");
    let plan: serde_json::Value = serde_json::from_slice(&plan.stdout).expect("a plan");
    assert_eq!(plan["entry"], LOAD, "the guest is made for another address");
    armlet.option("--board", "virt")
}

fn assert_works(outcome: &Outcome, devices: &[&str]) {
    outcome.assert_status(0);
    let text = outcome.text();
    let expected: String = devices
        .iter()
        .map(|name| format!("{name}: all rounds\n"))
        .collect();
    assert_eq!(text, expected);
    let faults = outcome.errors.contains("of this device");
    assert!(!faults, "{}", outcome.errors);
}

#[test]
fn drivers_that_are_not_linux_stop_their_queues_again_and_again() {
    let Some(_) = rig::any() else { return };
    let armlet = machine();
    let disk = armlet.file("disk", &[FILLING; SECTORS * SECTOR_SIZE]);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("vsock");
    let listener = UnixListener::bind(folder.path().join(format!("vsock_{PORT}")));
    let listener = listener.expect("a socket");
    let host = thread::spawn(move || {
        for _ in 0..ROUNDS {
            let (mut stream, _) = listener.accept().expect("a guest");
            let mut bytes = [0; 5];
            stream.read_exact(&mut bytes).expect("what it sends");
            stream.write_all(&bytes).expect("room");
            // It goes without a word.
            assert_eq!(stream.read(&mut bytes).expect("its end"), 0);
        }
    });
    let outcome = armlet
        .option("--disk", format!("path={},format=raw", disk.display()))
        .option("--vsock", format!("cid=3,uds={}", path.display()))
        .run();
    assert_works(&outcome, &["block", "vsock", "rng"]);
    host.join().expect("each round's connection");
}

#[test]
fn a_network_driver_that_is_not_linux_stops_its_queues_again_and_again() {
    let Some(_) = rig::main() else { return };
    if rig::program("passt").is_none() {
        return;
    }
    outside();
    let outcome = machine().option("--net", "user").run();
    assert_works(&outcome, &["net", "rng"]);
}

#[test]
fn a_console_driver_that_is_not_linux_stops_its_queues_again_and_again() {
    let Some(_) = rig::any() else { return };
    let mut guest = machine()
        .option("--console", "virtio")
        .option("--rng", "off")
        .input(Input::Pipe)
        .start();
    for round in 0..ROUNDS {
        let letter = char::from(b'a' + round as u8);
        guest.expect(&format!("round {letter}\n"));
        guest.send(letter.to_string().as_bytes());
    }
    guest.end().assert_status(0);
}
