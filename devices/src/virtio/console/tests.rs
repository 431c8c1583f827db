//! A console with a reader as slow as a test wants it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::Device;
use crate::virtio::fake::Guest;
use crate::virtio::lock;

mod at_once;

/// What the reader got, and how much more it has room for.
#[derive(Default)]
struct Reader {
    got: Vec<u8>,
    room: usize,
}

struct FakeSink(Arc<Mutex<Reader>>);

impl Sink for FakeSink {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut reader = lock(&self.0);
        let taken = bytes.len().min(reader.room);
        reader.room -= taken;
        reader.got.extend(&bytes[..taken]);
        taken
    }

    fn room(&self) -> Option<RawFd> {
        Some(99)
    }
}

struct Bench {
    guest: Guest<Console>,
    reader: Arc<Mutex<Reader>>,
    rooms: Arc<AtomicUsize>,
}

impl Bench {
    /// A guest that has not looked at the console, and a reader with room for so many bytes.
    fn new(room: usize) -> Bench {
        let reader = Arc::new(Mutex::new(Reader {
            got: Vec::new(),
            room,
        }));
        let rooms = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&rooms);
        let on_room = move || {
            counted.fetch_add(1, Ordering::Relaxed);
        };
        let sink = Box::new(FakeSink(Arc::clone(&reader)));
        let console = Console::new(sink, Box::new(on_room), Some((80, 25)));
        Bench {
            guest: Guest::new(console),
            reader,
            rooms,
        }
    }

    fn started(room: usize) -> Bench {
        let mut bench = Bench::new(room);
        bench.guest.start(FEATURE_SIZE);
        bench
    }

    /// The machine is held and goes on, with another console in the stead of this one if it `moves`.
    fn hold(&mut self, moves: bool) {
        if !moves {
            self.guest.pause();
            return;
        }
        let sink = Box::new(FakeSink(Arc::clone(&self.reader)));
        let rooms = Arc::clone(&self.rooms);
        let on_room = move || {
            rooms.fetch_add(1, Ordering::Relaxed);
        };
        let console = Console::new(sink, Box::new(on_room), Some((80, 25)));
        self.guest.move_to(console);
    }

    fn print(&mut self, parts: &[&[u8]]) {
        self.guest.request(TRANSMIT, parts, &[]);
        self.guest.kick(TRANSMIT);
    }

    /// The reader reads, and the event loop says so.
    fn read(&mut self, room: usize) {
        lock(&self.reader).room += room;
        lock(&self.guest.device).ready(0);
        while self.guest.mmio.kicks()[TRANSMIT].read().is_ok() {
            lock(&self.guest.device).kicked(TRANSMIT);
        }
    }

    fn got(&self) -> Vec<u8> {
        lock(&self.reader).got.clone()
    }

    /// Requests to print that are completed.
    fn printed(&mut self) -> usize {
        self.guest.used(TRANSMIT).len()
    }

    fn give_buffers(&mut self, sizes: &[usize]) {
        for size in sizes {
            self.guest.request(RECEIVE, &[], &[*size]);
        }
        self.guest.kick(RECEIVE);
    }

    fn type_in(&mut self, input: &[u8]) -> (usize, bool) {
        lock(&self.guest.device).receive(input)
    }

    fn typed(&mut self) -> Vec<Vec<u8>> {
        let used = self.guest.used(RECEIVE).into_iter();
        used.map(|(_, data)| data).collect()
    }

    fn rooms(&self) -> usize {
        self.rooms.load(Ordering::Relaxed)
    }

    /// Config-change interrupts since the last look.
    fn told(&mut self) -> bool {
        let told = self.guest.read(0x60) & 2 != 0;
        self.guest.write(0x64, 2);
        told
    }
}

#[test]
fn output_reaches_the_reader() {
    let mut bench = Bench::started(usize::MAX);
    bench.print(&[b"hello, ", b"", b"world"]);
    bench.print(&[b"\n"]);
    bench.print(&[]);
    assert_eq!(bench.got(), b"hello, world\n");
    assert_eq!(bench.printed(), 3);
    let long = vec![b'x'; 3 * CHUNK + 5];
    bench.print(&[&long]);
    assert_eq!(bench.got().len(), 13 + long.len());
    assert_eq!(
        bench.guest.interrupts(),
        6,
        "four requests, and the size twice"
    );
}

#[test]
fn a_slow_reader_gets_every_byte_and_holds_up_nobody() {
    let mut bench = Bench::started(3);
    bench.print(&[b"abcd", b"efgh"]);
    bench.print(&[b"ijkl"]);
    assert_eq!(bench.got(), b"abc");
    assert_eq!(bench.printed(), 0, "the guest keeps the rest");
    bench.read(3);
    assert_eq!(bench.got(), b"abcdef");
    assert_eq!(bench.printed(), 0);
    // Meanwhile the guest can be typed at, and takes no harm from kicking.
    bench.give_buffers(&[16]);
    assert_eq!(bench.type_in(b"ls"), (2, false));
    assert_eq!(bench.typed(), [b"ls"]);
    bench.guest.kick(TRANSMIT);
    bench.read(0);
    assert_eq!(bench.got(), b"abcdef");
    bench.read(4);
    assert_eq!(bench.printed(), 1);
    bench.read(100);
    assert_eq!(bench.printed(), 1);
    assert_eq!(bench.got(), b"abcdefghijkl");
}

#[test]
fn a_guest_that_prints_without_end_does_not_keep_the_thread() {
    let mut bench = Bench::started(usize::MAX);
    let megabyte = vec![b'x'; 1 << 20];
    let parts: Vec<&[u8]> = vec![&megabyte; 4];
    bench.guest.request(TRANSMIT, &parts, &[]);
    lock(&bench.guest.device).kicked(TRANSMIT);
    let first = bench.got().len();
    assert!(
        first > 0 && first <= MOST_AT_ONCE,
        "{first} bytes in one go"
    );
    assert_eq!(bench.printed(), 0);
    // It kicked itself.
    bench.read(0);
    assert_eq!(bench.got().len(), 4 << 20);
    assert_eq!(bench.printed(), 1);
    // Requests with nothing in them end too.
    for _ in 0..ENTRIES {
        bench.guest.request(TRANSMIT, &[], &[]);
    }
    bench.guest.kick(TRANSMIT);
    assert_eq!(bench.printed(), usize::from(ENTRIES));
}

#[test]
fn a_guest_that_never_rests_does_not_keep_the_thread() {
    /// Another vCPU of the guest, which makes the next request while one is sent.
    struct Restless {
        sent: Arc<AtomicUsize>,
        memory: Arc<Mutex<Option<Arc<GuestMemoryMmap>>>>,
        available: Arc<Mutex<u64>>,
    }
    impl Sink for Restless {
        fn write(&mut self, bytes: &[u8]) -> usize {
            let sent = self.sent.fetch_add(1, Ordering::Relaxed) + 1;
            assert!(sent < 100_000, "it sends for ever");
            if let Some(memory) = &*lock(&self.memory) {
                let index = GuestAddress(*lock(&self.available) + 2);
                memory.write_obj(sent as u16 + 1, index).expect("memory");
            }
            bytes.len()
        }

        fn room(&self) -> Option<RawFd> {
            None
        }
    }
    let (sent, memory, available) = (Arc::default(), Arc::default(), Arc::default());
    let sink = Restless {
        sent: Arc::clone(&sent),
        memory: Arc::clone(&memory),
        available: Arc::clone(&available),
    };
    let console = Console::new(Box::new(sink), Box::new(|| {}), None);
    let mut guest = Guest::started(console, 0);
    *lock(&memory) = Some(guest.memory.clone());
    *lock(&available) = guest.rings(TRANSMIT)[1];
    guest.request(TRANSMIT, &[b"x"], &[]);
    lock(&guest.device).kicked(TRANSMIT);
    let first = sent.load(Ordering::Relaxed);
    assert!(
        first <= MOST_AT_ONCE / REQUEST_COST + 1,
        "{first} in one go"
    );
    assert!(
        guest.mmio.kicks()[TRANSMIT].read().is_ok(),
        "it kicks itself"
    );
}

#[test]
fn input_waits_until_the_guest_listens() {
    let mut bench = Bench::new(0);
    assert_eq!(bench.type_in(b"early"), (0, false));
    assert_eq!(lock(&bench.guest.device).listening(), None);
    bench.guest.start(0);
    assert_eq!(bench.type_in(b"early"), (0, false));
    assert_eq!(lock(&bench.guest.device).listening(), None);
    assert_eq!(bench.rooms(), 0);
    bench.give_buffers(&[4, 4, 4]);
    assert_eq!(bench.rooms(), 1);
    assert_eq!(lock(&bench.guest.device).listening(), Some(1));
    assert_eq!(bench.type_in(b"early"), (5, true));
    assert_eq!(bench.typed(), [&b"earl"[..], b"y"]);
    assert_eq!(bench.type_in(b"123456"), (4, false));
    assert_eq!(bench.type_in(b"56"), (0, false));
    bench.give_buffers(&[4, 4]);
    assert_eq!(bench.rooms(), 2);
    assert_eq!(bench.type_in(b"56"), (2, true));
    assert_eq!(bench.typed(), [&b"1234"[..], b"56"]);
    // It was told already.
    bench.give_buffers(&[4]);
    assert_eq!(bench.rooms(), 2);
}

#[test]
fn buffers_that_were_there_at_the_start_count() {
    let mut bench = Bench::new(usize::MAX);
    bench.guest.negotiate(0);
    for queue in [0, 1] {
        bench.guest.set_up_queue(queue);
    }
    bench.guest.request(RECEIVE, &[], &[8]);
    bench.guest.request(TRANSMIT, &[b"early"], &[]);
    bench.guest.write(0x70, 15);
    assert_eq!(bench.rooms(), 1);
    assert_eq!(bench.got(), b"early");
}

#[test]
fn each_driver_begins_anew() {
    let mut bench = Bench::started(2);
    bench.give_buffers(&[8]);
    bench.print(&[b"abcd"]);
    bench.guest.write(0x70, 0);
    assert_eq!(lock(&bench.guest.device).listening(), None);
    assert_eq!(bench.type_in(b"x"), (0, false));
    bench.read(100);
    assert_eq!(
        bench.got(),
        b"ab",
        "what the driver took back is not printed"
    );
    bench.guest.start(0);
    bench.print(&[b"new"]);
    assert_eq!(bench.got(), b"abnew");
    bench.give_buffers(&[8]);
    assert_eq!(lock(&bench.guest.device).listening(), Some(2));
}

#[test]
fn the_size_is_told_when_it_changes() {
    let mut bench = Bench::new(usize::MAX);
    assert_eq!(bench.guest.read(0x100), 25 << 16 | 80);
    lock(&bench.guest.device).resize((100, 40));
    assert_eq!(bench.guest.read(0x100), 40 << 16 | 100);
    assert!(!bench.told(), "nobody is there");
    bench.guest.start(FEATURE_SIZE);
    assert!(bench.told());
    lock(&bench.guest.device).resize((100, 40));
    assert!(!bench.told(), "it is the same");
    lock(&bench.guest.device).resize((132, 43));
    assert!(bench.told());
    assert_eq!(bench.guest.read(0x100), 43 << 16 | 132);

    bench.guest.start(0);
    lock(&bench.guest.device).resize((1, 1));
    assert!(!bench.told(), "this driver does not want to know");
}

#[test]
fn the_size_is_told_again_when_the_terminal_comes_into_use() {
    let mut bench = Bench::started(usize::MAX);
    assert!(bench.told());
    bench.print(&[b"[    0.000000] B"]);
    assert!(!bench.told(), "that was the kernel");
    bench.print(&[b"Debian GNU/Linux "]);
    assert!(bench.told());
    bench.print(&[b"login: this is more than 16 bytes"]);
    assert!(!bench.told());
    bench.give_buffers(&[8, 8]);
    bench.type_in(b"r");
    assert!(bench.told());
    bench.type_in(b"o");
    assert!(!bench.told());
}

#[test]
fn a_size_that_is_not_known_is_not_told() {
    let sink = Box::new(FakeSink(Arc::default()));
    let console = Console::new(sink, Box::new(|| {}), None);
    let mut guest = Guest::started(console, FEATURE_SIZE);
    assert_eq!(guest.read(0x100), 0);
    assert_eq!(guest.interrupts(), 0);
}

#[test]
fn emergency_characters_need_no_driver() {
    let mut bench = Bench::new(2);
    for byte in b"oops" {
        bench.guest.write(0x108, u32::from(*byte));
    }
    assert_eq!(bench.got(), b"oo");
    bench.read(100);
    assert_eq!(bench.got(), b"oops");
    // They come before what is printed later.
    lock(&bench.reader).room = 0;
    let _ = bench.guest.mmio.write(0x108, b"!");
    bench.guest.start(0);
    bench.print(&[b"late"]);
    bench.read(100);
    assert_eq!(bench.got(), b"oops!late");
    // Without end and without a reader they are lost at some time.
    lock(&bench.reader).room = 0;
    for _ in 0..2 * MOST_LATE {
        bench.guest.write(0x108, 0x78);
    }
    bench.read(usize::MAX / 2);
    assert_eq!(bench.got().len(), 9 + MOST_LATE);
}

#[test]
fn other_writes_to_the_configuration_change_nothing() {
    let mut bench = Bench::started(100);
    let generation = bench.guest.read(0xfc);
    for (offset, data) in [(0, &b"aaaa"[..]), (4, b"a"), (9, b"a"), (12, b"aaaa")] {
        let _ = bench.guest.mmio.write(0x100 + offset, data);
    }
    let _ = bench.guest.mmio.write(0x108, b"");
    assert_eq!(bench.guest.read(0x100), 25 << 16 | 80);
    assert_eq!(bench.guest.read(0xfc), generation);
    assert_eq!(bench.got(), b"");
    assert_eq!(bench.guest.mmio.faults(), 5);
}

#[test]
fn a_buffer_for_input_that_nothing_fits_into_breaks_the_queue() {
    let mut bench = Bench::started(100);
    bench.guest.request(RECEIVE, &[b"read me"], &[]);
    bench.guest.kick(RECEIVE);
    assert_eq!(bench.type_in(b"x"), (0, false));
    assert!(bench.guest.is_broken());
    // The output goes on.
    bench.print(&[b"still here"]);
    assert_eq!(bench.got(), b"still here");
}

#[test]
fn a_driver_that_leaves_out_queues_does_no_harm() {
    for queue in [0, 1] {
        let mut bench = Bench::new(100);
        bench.guest.negotiate(FEATURE_SIZE);
        bench.guest.set_up_queue(queue);
        bench.guest.write(0x70, 15);
        bench.give_buffers(&[8]);
        bench.print(&[b"x"]);
        bench.type_in(b"y");
        bench.read(1);
        assert!(!bench.guest.is_broken());
    }
}

/// What happens to a console.
#[derive(Clone, Debug)]
enum Act {
    Print(Vec<u8>),
    Read(usize),
    Buffer(usize),
    Type(Vec<u8>),
    Hold(bool),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..40);
    let act = prop_oneof![
        bytes().prop_map(Act::Print),
        (0..30_usize).prop_map(Act::Read),
        (1..30_usize).prop_map(Act::Buffer),
        bytes().prop_map(Act::Type),
        any::<bool>().prop_map(Act::Hold),
    ];
    prop::collection::vec(act, 0..60)
}

#[test]
fn a_buffer_outside_memory_fails_its_request_only() {
    let mut bench = Bench::started(usize::MAX);
    let answers = |bench: &mut Bench, queue: usize, count: usize| {
        assert_eq!(bench.guest.used(queue).len(), count);
        assert!(!bench.guest.is_broken());
    };
    bench.guest.request_outside(TRANSMIT, &[false, false], 1);
    answers(&mut bench, TRANSMIT, 1);
    assert!(bench.got().is_empty());
    bench.print(&[b"next"]);
    assert_eq!(bench.got(), b"next");
    bench.type_in(b"x");
    for count in 1..=40 {
        bench.guest.request_outside(RECEIVE, &[true], 0);
        answers(&mut bench, RECEIVE, 1);
        assert_eq!(bench.guest.mmio.faults(), 1 + count);
    }
    for _ in 0..16 {
        bench
            .guest
            .chain(RECEIVE, &[(Guest::<Console>::OUTSIDE, 8, 2)]);
    }
    bench.guest.kick(RECEIVE);
    answers(&mut bench, RECEIVE, 16);
    bench.give_buffers(&[8]);
    assert_eq!(bench.type_in(b"x"), (1, false));
    assert_eq!(bench.typed(), [b"x"]);
}

proptest! {
    #[test]
    fn nothing_is_lost_in_either_direction(acts in acts(), event_idx: bool) {
        let mut bench = Bench::new(0);
        let features = if event_idx { crate::virtio::FEATURE_EVENT_IDX } else { 0 };
        bench.guest.start(features);
        let (mut printed, mut typed) = (Vec::new(), Vec::new());
        // Typed and not yet taken; and what the guest got.
        let (mut pending, mut got) = (Vec::new(), Vec::new());
        let (mut requests, mut completed) = (0, 0);
        let mut buffers = 0;
        for act in acts {
            match act {
                // A driver has no more under way than there are entries.
                Act::Print(_) if requests - completed == usize::from(ENTRIES) => {}
                Act::Print(bytes) => {
                    bench.print(&[&bytes]);
                    printed.extend(bytes);
                    requests += 1;
                }
                Act::Read(room) => bench.read(room),
                Act::Buffer(_) if buffers == ENTRIES => {}
                Act::Buffer(size) => {
                    bench.give_buffers(&[size]);
                    buffers += 1;
                }
                Act::Type(bytes) => {
                    typed.extend(&bytes);
                    pending.extend(bytes);
                }
                Act::Hold(moves) => {
                    let session = lock(&bench.guest.device).listening();
                    bench.hold(moves);
                    if !moves && session.is_some() {
                        let now = lock(&bench.guest.device).listening();
                        prop_assert!(now.is_none() || now == session, "it is the same driver");
                    }
                }
            }
            let (taken, _) = bench.type_in(&pending);
            pending.drain(..taken);
            let filled = bench.typed();
            buffers -= filled.len() as u16;
            got.extend(filled.concat());
            completed += bench.printed();
        }
        prop_assert!(typed.starts_with(&got));
        prop_assert_eq!(typed.len(), got.len() + pending.len());
        bench.read(1 << 20);
        prop_assert_eq!(bench.got(), printed);
        prop_assert_eq!(completed + bench.printed(), requests);
        prop_assert!(!bench.guest.is_broken());
    }
}

#[test]
fn output_goes_on_in_the_middle_of_a_request() {
    for moves in [false, true] {
        let mut bench = Bench::started(3);
        bench.print(&[b"stuck in the middle"]);
        bench.print(&[b", and more"]);
        let _ = bench.guest.mmio.write(0x108, b"!");
        bench.hold(moves);
        assert_eq!((bench.got(), bench.printed()), (b"stu".to_vec(), 0));
        bench.read(100);
        assert_eq!(bench.got(), b"stu!ck in the middle, and more");
        assert_eq!(bench.printed(), 2);
    }
}

#[test]
fn a_state_with_more_than_a_console_keeps_is_refused() {
    let state = DeviceState::Console(ConsoleState {
        late: vec![b'x'; MOST_LATE + 1],
        ..ConsoleState::default()
    });
    let device = Arc::clone(&Bench::new(0).guest.device);
    let error = lock(&device).restore(&state).expect_err("refused");
    assert_eq!(
        error.0,
        "4097 emergency characters wait, of which 4096 are kept"
    );
}

#[test]
fn a_queue_that_is_stopped_loses_what_it_held_and_the_other_goes_on() {
    let mut bench = Bench::started(3);
    bench.give_buffers(&[10, 10]);
    bench.print(&[b"stuck in the middle"]);
    assert_eq!(bench.got(), b"stu");
    bench.guest.stop_queue(TRANSMIT as u32);
    bench.read(100);
    assert_eq!(bench.got(), b"stu");
    assert_eq!(bench.printed(), 0);
    assert_eq!(bench.type_in(b"keys"), (4, true));
    assert_eq!(bench.typed(), [b"keys"]);
    bench.guest.set_up_queue(TRANSMIT as u32);
    bench.print(&[b"anew"]);
    assert_eq!(bench.got(), b"stuanew");
    assert_eq!(bench.printed(), 1);
    // A driver that stopped to listen gets nothing, and is another when it listens again.
    let before = lock(&bench.guest.device).listening();
    bench.guest.stop_queue(RECEIVE as u32);
    assert_eq!(lock(&bench.guest.device).listening(), None);
    assert_eq!(bench.type_in(b"lost"), (0, false));
    bench.guest.set_up_queue(RECEIVE as u32);
    let rooms = bench.rooms();
    bench.give_buffers(&[10]);
    assert_eq!(bench.rooms(), rooms + 1, "who has input hears of it");
    assert_eq!(bench.type_in(b"more"), (4, false));
    assert_eq!(bench.typed(), [b"more"]);
    assert_ne!(lock(&bench.guest.device).listening(), before);
    assert_eq!(bench.guest.mmio.faults(), 0);
}
