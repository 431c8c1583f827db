use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;
use crate::fake::FakeLine;

/// A UART with everything around it in sight.
struct Bench {
    uart: Pl011,
    line: Arc<FakeLine>,
    /// One entry a call of the output.
    output: Arc<Mutex<Vec<Vec<u8>>>>,
    rooms: Arc<AtomicUsize>,
    input: Input,
}

/// What a VMM holds back for the guest: it hands over what is wanted, and nothing else.
#[derive(Default)]
struct Input {
    waiting: VecDeque<u8>,
    /// How many bytes the VMM is quick enough to hand over after each access; none when empty.
    pace: VecDeque<usize>,
    /// What the device took.
    taken: Vec<u8>,
}

impl Bench {
    fn new() -> Bench {
        let line = FakeLine::new();
        let output: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        let rooms = Arc::new(AtomicUsize::new(0));
        let (sink, counter) = (output.clone(), rooms.clone());
        let uart = Pl011::new(
            line.clone(),
            Box::new(move |bytes: &[u8]| {
                sink.lock().expect("sound").push(bytes.to_vec());
            }),
            Box::new(move || {
                counter.fetch_add(1, Ordering::Relaxed);
            }),
        );
        Bench {
            uart,
            line,
            output,
            rooms,
            input: Input::default(),
        }
    }

    /// As Linux leaves it: FIFOs on, trigger at half.
    fn with_fifos() -> Bench {
        let mut bench = Bench::new();
        bench.write(offset::LCR_H, 0x70);
        bench
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.uart.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// As Linux reads this port: by halfwords.
    fn read16(&mut self, offset: u64) -> u16 {
        let mut data = [0xff; 2];
        self.uart.read(offset, &mut data);
        self.feed_at_pace();
        u16::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.uart.write(offset, &value.to_le_bytes());
    }

    fn write16(&mut self, offset: u64, value: u16) {
        self.uart.write(offset, &value.to_le_bytes());
        self.feed_at_pace();
    }

    /// A VMM that runs beside the guest gets its turn between any two accesses.
    fn feed_at_pace(&mut self) {
        let most = self.input.pace.pop_front().unwrap_or(0);
        self.feed(most);
    }

    /// Hands over as much as is wanted, at most `most`.
    fn feed(&mut self, most: usize) {
        let Input { waiting, taken, .. } = &mut self.input;
        let count = self.uart.wanted().min(most).min(waiting.len());
        let bytes: Vec<u8> = waiting.drain(..count).collect();
        assert_eq!(self.uart.receive(&bytes), count, "what is wanted fits");
        taken.extend(bytes);
    }

    fn output(&self) -> Vec<u8> {
        self.output.lock().expect("sound").concat()
    }

    fn rooms(&self) -> usize {
        self.rooms.load(Ordering::Relaxed)
    }

    fn ris(&mut self) -> u32 {
        self.read(offset::RIS)
    }

    /// Reads characters until the flag says there are none.
    fn drain(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.read16(offset::FR) & 0x10 == 0 {
            bytes.push(self.read16(offset::DR) as u8);
        }
        bytes
    }
}

#[test]
fn registers_have_their_reset_values() {
    let mut bench = Bench::new();
    let values = [
        (offset::DR, 0),
        (offset::RSR_ECR, 0),
        (offset::FR, 0x97),
        (offset::ILPR, 0),
        (offset::IBRD, 0),
        (offset::FBRD, 0),
        (offset::LCR_H, 0),
        (offset::CR, 0x300),
        (offset::IFLS, 0x12),
        (offset::IMSC, 0),
        (offset::RIS, 0),
        (offset::MIS, 0),
        (offset::DMACR, 0),
    ];
    for (offset, value) in values {
        assert_eq!(bench.read(offset), value, "{offset:#x}");
    }
    assert_eq!(bench.uart.faults(), 0);
    assert_eq!(bench.line.history(), []);
}

#[test]
fn identification_is_what_linux_matches() {
    let mut bench = Bench::new();
    let ids: Vec<_> = (0xfe0..0x1000)
        .step_by(4)
        .map(|offset| bench.read(offset))
        .collect();
    assert_eq!(ids, [0x11, 0x10, 0x14, 0, 0x0d, 0xf0, 0x05, 0xb1]);
    // drivers/tty/serial/amba-pl011.c: id 0x00041011, mask 0x000fffff.
    let id = ids[0] | ids[1] << 8 | ids[2] << 16 | ids[3] << 24;
    assert_eq!(id & 0x000f_ffff, 0x0004_1011);
    // Linux: a FIFO of 16 below revision 3.
    assert!(id >> 20 & 0xf < 3);
}

#[test]
fn registers_keep_the_bits_they_have() {
    let mut bench = Bench::new();
    let masks = [
        (offset::ILPR, 0xff),
        (offset::IBRD, 0xffff),
        (offset::FBRD, 0x3f),
        (offset::LCR_H, 0xff),
        (offset::CR, 0xff87),
        (offset::IFLS, 0x3f),
        (offset::IMSC, 0x7ff),
        (offset::DMACR, 0x7),
    ];
    for (offset, mask) in masks {
        bench.write(offset, u32::MAX);
        assert_eq!(bench.read(offset), mask, "{offset:#x}");
        bench.write(offset, 0);
        assert_eq!(bench.read(offset), 0, "{offset:#x}");
    }
    assert_eq!(bench.uart.faults(), 0);
}

#[test]
fn narrow_accesses_see_the_low_bytes() {
    let mut bench = Bench::new();
    bench.uart.write(offset::IBRD, &[0x34, 0x12]);
    let mut byte = [0];
    bench.uart.read(offset::IBRD, &mut byte);
    assert_eq!(byte, [0x34]);
    assert_eq!(bench.read16(offset::IBRD), 0x1234);
    assert_eq!(bench.read(offset::IBRD), 0x1234);
    // A narrow write is a write of the register, with zeros above.
    bench.uart.write(offset::IBRD, &[0x56]);
    assert_eq!(bench.read(offset::IBRD), 0x56);
    assert_eq!(bench.uart.faults(), 0);
}

#[test]
fn wrong_accesses_are_zero_ignored_and_counted() {
    let mut bench = Bench::new();
    let mut wide = [0xff; 8];
    bench.uart.read(offset::CR, &mut wide);
    assert_eq!(wide, [0; 8]);
    bench.uart.write(offset::DR, &[b'x'; 8]);
    assert_eq!(bench.output(), b"");
    let mut inside = [0xff; 1];
    bench.uart.read(offset::CR + 1, &mut inside);
    assert_eq!(inside, [0]);
    assert_eq!(bench.uart.faults(), 3);
    for offset in [0x08, 0x14, 0x1c, 0x4c, 0x80, 0xfdc, 0x1000, u64::MAX - 3] {
        let before = bench.uart.faults();
        assert_eq!(bench.read(offset), 0);
        bench.write(offset, 1);
        assert_eq!(bench.uart.faults(), before + 2, "{offset:#x}");
    }
    // Registers of one direction.
    for offset in [offset::FR, offset::RIS, offset::MIS, 0xfe0] {
        let (before, value) = (bench.uart.faults(), bench.read(offset));
        bench.write(offset, 0xffff);
        assert_eq!(bench.read(offset), value);
        assert_eq!(bench.uart.faults(), before + 1);
    }
    let before = bench.uart.faults();
    assert_eq!(bench.read(offset::ICR), 0);
    assert_eq!(bench.uart.faults(), before + 1);
}

#[test]
fn early_console_prints_before_anything_is_enabled() {
    // amba-pl011.c, pl011_putc: poll TXFF by word, write a byte, poll BUSY.
    let mut bench = Bench::new();
    bench.write(offset::CR, 0);
    for &byte in b"Booting Linux\r\n" {
        assert_eq!(bench.read(offset::FR) & 0x20, 0);
        bench.uart.write(offset::DR, &[byte]);
        assert_eq!(bench.read(offset::FR) & 0x08, 0);
    }
    assert_eq!(bench.output(), b"Booting Linux\r\n");
    assert!(!bench.line.is_high());
}

/// The accesses of Linux's driver in its order: `pl011_hwinit`, `pl011_startup`,
/// `pl011_set_termios`, with a byte typed too early.
fn linux_opens(bench: &mut Bench) {
    bench.write16(offset::ICR, 0x7d0);
    let im = bench.read16(offset::IMSC);
    // Unmasked for a moment: the VMM is not so quick (see `Pl011::wanted`).
    bench.write(offset::IMSC, 0x50);
    bench.write16(offset::IMSC, im);
    bench.write16(offset::IFLS, 0x12);
    let cr = bench.read16(offset::CR) & 0xc00;
    bench.write16(offset::CR, cr | 0x301);
    bench.read16(offset::FR);
    bench.write16(offset::ICR, 0x50);
    for _ in 0..32 {
        if bench.read16(offset::FR) & 0x10 != 0 {
            break;
        }
        bench.read16(offset::DR);
    }
    bench.write16(offset::IMSC, 0x50);
    bench.write16(offset::CR, cr | 0x301);
    bench.write16(offset::FBRD, 1);
    bench.write16(offset::IBRD, 13);
    bench.write16(offset::LCR_H, 0x70);
    bench.write16(offset::CR, cr | 0xf01);
    assert_eq!(bench.uart.faults(), 0);
}

/// `pl011_int`: what arrives while it runs, and the bytes it still has to send.
fn linux_interrupt(bench: &mut Bench, to_send: &mut VecDeque<u8>) -> Vec<u8> {
    let mut received = Vec::new();
    let mut passes = 0;
    loop {
        let im = bench.read16(offset::IMSC);
        let status = bench.read16(offset::RIS) & im;
        if status == 0 {
            return received;
        }
        passes += 1;
        assert!(passes < 256, "the driver's pass limit");
        bench.write16(offset::ICR, status & !0x70);
        if status & 0x50 != 0 {
            received.extend(bench.drain());
        }
        if status & 0x20 != 0 {
            // At most half a FIFO, without a look at TXFF.
            for byte in to_send.drain(..to_send.len().min(FIFO_DEPTH / 2)) {
                bench.write16(offset::DR, u16::from(byte));
            }
            if to_send.is_empty() {
                bench.write16(offset::IMSC, im & !0x20);
            }
        }
    }
}

/// `pl011_console_write`: UARTCR saved, changed and restored around the bytes.
fn linux_prints(bench: &mut Bench, text: &[u8]) {
    let old = bench.read16(offset::CR);
    bench.write16(offset::CR, old & !0x8000 | 0x101);
    for &byte in text {
        assert_eq!(bench.read16(offset::FR) & 0x20, 0);
        bench.write16(offset::DR, u16::from(byte));
    }
    assert_eq!(bench.read16(offset::FR) & 0x08, 0);
    bench.write16(offset::CR, old);
}

/// `pl011_throttle_rx`, and `pl011_stop_rx` in it.
fn linux_throttles(bench: &mut Bench) {
    bench.write16(offset::IMSC, 0);
}

/// `pl011_unthrottle_rx`, since a fix of November 2022; before, it threw away as opening does.
fn linux_unthrottles(bench: &mut Bench) {
    bench.write16(offset::IMSC, 0x50);
}

/// `pl011_shutdown`. Returns how many received characters it leaves in the FIFO.
fn linux_closes(bench: &mut Bench) -> usize {
    bench.write16(offset::IMSC, 0);
    let left = bench.uart.rx.len();
    bench.write16(offset::ICR, 0xffff);
    let cr = bench.read16(offset::CR) & 0xc00;
    bench.write16(offset::CR, cr | 0x101);
    let lcr_h = bench.read16(offset::LCR_H);
    bench.write16(offset::LCR_H, lcr_h & !0x11);
    left
}

#[test]
fn linux_console_writes_with_the_port_open() {
    let mut bench = Bench::new();
    linux_opens(&mut bench);
    linux_prints(&mut bench, b"hello\r\n");
    assert_eq!(bench.output(), b"hello\r\n");
    // TXRIS is raised by the writes but masked.
    assert_eq!(bench.ris(), interrupt::TX);
    assert_eq!(bench.line.history(), []);
}

#[test]
fn linux_tty_writes_by_interrupt() {
    let mut bench = Bench::new();
    linux_opens(&mut bench);
    let text: Vec<u8> = (0..100).collect();
    let mut to_send: VecDeque<u8> = text.iter().copied().collect();
    // pl011_start_tx_pio: write first, then unmask for the rest.
    for byte in to_send.drain(..10) {
        assert_eq!(bench.read16(offset::FR) & 0x20, 0);
        bench.write16(offset::DR, u16::from(byte));
    }
    assert!(!bench.line.is_high());
    bench.write16(offset::IMSC, 0x70);
    assert!(bench.line.is_high());
    linux_interrupt(&mut bench, &mut to_send);
    assert!(to_send.is_empty());
    assert_eq!(bench.output(), text);
    assert_eq!(bench.line.history(), [true, false]);
}

#[test]
fn old_linux_primes_its_transmit_interrupt_by_looping_back() {
    // pl011_startup up to Linux 3.x: send a zero to itself, wait for BUSY to go.
    // A driver of that age never writes before it unmasks, so TXRIS must last.
    let mut bench = Bench::new();
    bench.write16(offset::CR, 0x181);
    bench.write16(offset::LCR_H, 0);
    bench.write16(offset::DR, 0);
    assert_eq!(bench.read16(offset::FR) & 0x08, 0);
    bench.write16(offset::CR, 0x301);
    bench.write16(offset::ICR, 0x7d0);
    assert_eq!(bench.drain(), [0]);
    bench.write16(offset::IMSC, 0x20);
    assert!(bench.line.is_high());
}

#[test]
fn linux_receives_by_interrupt() {
    let mut bench = Bench::new();
    linux_opens(&mut bench);
    assert_eq!(bench.uart.receive(b"l"), 1);
    // One byte is below the trigger: it comes by timeout.
    assert_eq!(bench.ris(), interrupt::RT);
    assert!(bench.line.is_high());
    assert_eq!(linux_interrupt(&mut bench, &mut VecDeque::new()), b"l");
    assert!(!bench.line.is_high());

    assert_eq!(bench.uart.receive(b"s -la /\n"), 8);
    assert_eq!(bench.ris(), interrupt::RT | interrupt::RX);
    assert_eq!(
        linux_interrupt(&mut bench, &mut VecDeque::new()),
        b"s -la /\n"
    );
    assert_eq!(bench.ris(), 0);
    assert_eq!(bench.line.history(), [true, false, true, false]);
}

#[test]
fn linux_throws_away_what_came_before_it_opened_and_hears_what_comes_after() {
    let mut bench = Bench::with_fifos();
    assert_eq!(bench.uart.receive(&[b'x'; 20]), 16);
    linux_opens(&mut bench);
    assert_eq!(bench.ris(), 0);
    assert_eq!(bench.uart.receive(b"y"), 1);
    assert!(bench.line.is_high());
    assert_eq!(linux_interrupt(&mut bench, &mut VecDeque::new()), b"y");
}

#[test]
fn nothing_is_wanted_while_linux_only_sends() {
    let mut bench = Bench::new();
    assert_eq!(bench.uart.wanted(), 0);
    // The early console reads the flags after each character too.
    for &byte in b"Booting Linux\r\n" {
        bench.read(offset::FR);
        assert_eq!(bench.uart.wanted(), 0);
        bench.uart.write(offset::DR, &[byte]);
        bench.read(offset::FR);
        assert_eq!(bench.uart.wanted(), 0);
    }
    for line in [&b"one\r\n"[..], b"", b"", b"", b"two\r\n"] {
        linux_prints(&mut bench, line);
        assert_eq!(bench.uart.wanted(), 0);
    }
    // The writes may have been collected on their way here.
    for byte in 0..10 {
        bench.read16(offset::FR);
        bench.uart.write_data(&[byte]);
        assert_eq!(bench.uart.wanted(), 0);
    }
    assert_eq!(bench.rooms(), 0);
}

#[test]
fn nothing_is_wanted_while_linux_throws_away() {
    let mut bench = Bench::with_fifos();
    assert_eq!(bench.uart.receive(&[b'x'; 20]), 16);
    bench.write16(offset::ICR, 0x50);
    for _ in 0..16 {
        assert_eq!(bench.read16(offset::FR) & 0x10, 0);
        assert_eq!(bench.uart.wanted(), 0);
        bench.read16(offset::DR);
        assert_eq!(bench.uart.wanted(), 0);
    }
    assert_eq!(bench.read16(offset::FR) & 0x10, 0x10);
    assert_eq!(bench.uart.wanted(), 0);
    assert_eq!(bench.rooms(), 0);
    bench.write16(offset::IMSC, 0x50);
    assert_eq!(bench.uart.wanted(), 16);
    assert_eq!(bench.rooms(), 1);
}

#[test]
fn linux_wants_what_fits_from_open_to_close_except_when_throttled() {
    let mut bench = Bench::new();
    linux_opens(&mut bench);
    assert_eq!(bench.uart.wanted(), 16);
    let rooms = bench.rooms();
    assert_eq!(bench.uart.receive(b"abc"), 3);
    assert_eq!(bench.uart.wanted(), 13);
    linux_throttles(&mut bench);
    assert_eq!(bench.uart.wanted(), 0);
    linux_prints(&mut bench, b"busy\r\n");
    assert_eq!(bench.uart.wanted(), 0);
    assert_eq!(bench.rooms(), rooms);
    linux_unthrottles(&mut bench);
    assert_eq!(bench.uart.wanted(), 13);
    assert_eq!(bench.rooms(), rooms + 1);
    assert_eq!(linux_interrupt(&mut bench, &mut VecDeque::new()), b"abc");
    assert_eq!(linux_closes(&mut bench), 0);
    assert_eq!(bench.uart.wanted(), 0);
    linux_prints(&mut bench, b"closed\r\n");
    assert_eq!(bench.uart.wanted(), 0);
    assert_eq!(bench.rooms(), rooms + 1);
}

#[test]
fn either_receive_interrupt_listens_and_no_other() {
    let mut bench = Bench::with_fifos();
    for unmasked in (0..11).map(|bit| 1 << bit) {
        bench.write(offset::IMSC, unmasked);
        let listens = [interrupt::RX, interrupt::RT].contains(&unmasked);
        assert_eq!(bench.uart.wanted() > 0, listens, "{unmasked:#x}");
    }
}

#[test]
fn firmware_listens_by_polling() {
    // U-Boot, serial_pl01x.c: the flags until there is a character, then the character.
    let mut bench = Bench::with_fifos();
    for _ in 0..2 {
        bench.read(offset::FR);
        assert_eq!(bench.uart.wanted(), 0);
    }
    bench.read(offset::FR);
    assert_eq!(bench.uart.wanted(), 16);
    assert_eq!(bench.rooms(), 1);
    for _ in 0..1000 {
        bench.read(offset::FR);
    }
    assert_eq!(bench.uart.wanted(), 16);
    assert_eq!(bench.uart.receive(b"ls"), 2);
    for &byte in b"ls" {
        assert_eq!(bench.read(offset::FR) & 0x10, 0);
        assert_eq!(bench.read(offset::DR), u32::from(byte));
        assert!(bench.uart.wanted() > 0);
    }
    assert_eq!(bench.read(offset::FR) & 0x10, 0x10);
    assert_eq!(bench.uart.wanted(), 16);
    assert_eq!(bench.rooms(), 1, "wanted all the time");

    // The echo ends it, until it polls again.
    bench.read(offset::FR);
    bench.write(offset::DR, u32::from(b'l'));
    assert_eq!(bench.uart.wanted(), 0);
    for _ in 0..2 {
        bench.read(offset::FR);
        assert_eq!(bench.uart.wanted(), 0);
    }
    bench.read(offset::FR);
    assert_eq!(bench.uart.wanted(), 16);
    assert_eq!(bench.rooms(), 2);
    bench.uart.reset();
    assert_eq!(bench.uart.wanted(), 0);
}

#[test]
fn firmware_that_echoes_each_character_gets_all() {
    let mut bench = Bench::new();
    let text: Vec<u8> = (0..100).collect();
    bench.input.waiting = text.iter().copied().collect();
    let (mut got, mut idle) = (Vec::new(), 0);
    while got.len() < text.len() {
        bench.feed(usize::MAX);
        if bench.read(offset::FR) & 0x10 != 0 {
            idle += 1;
            assert!(idle <= 3, "polls in vain");
            continue;
        }
        idle = 0;
        let byte = bench.read(offset::DR);
        got.push(byte as u8);
        bench.read(offset::FR);
        bench.write(offset::DR, byte);
    }
    assert_eq!(got, text);
    assert_eq!(bench.output(), text);
}

#[test]
fn firmware_that_reads_the_control_register_between_polls() {
    // EDK2, TerminalDxe and PL011UartLib: GetControl until it tells of input, then Poll, Read.
    let mut bench = Bench::with_fifos();
    for _ in 0..3 {
        assert_eq!(bench.uart.wanted(), 0);
        bench.read(offset::FR);
        bench.read(offset::CR);
    }
    assert_eq!(bench.uart.wanted(), 16);
    assert_eq!(bench.rooms(), 1);
    assert_eq!(bench.uart.receive(b"\x1b"), 1);
    for _ in 0..3 {
        assert_eq!(bench.read(offset::FR) & 0x10, 0);
    }
    assert_eq!(bench.read(offset::DR), 0x1b);
    assert_eq!(bench.uart.wanted(), 16);
}

#[test]
fn linux_seems_to_listen_for_a_moment_before_it_opens() {
    // What the doc of `wanted` warns of: pl011_hwinit unmasks, pl011_allocate_irq masks.
    let mut bench = Bench::with_fifos();
    bench.write16(offset::ICR, 0x7d0);
    bench.write16(offset::IMSC, 0x50);
    assert_eq!(bench.uart.wanted(), 16);
    bench.write16(offset::IMSC, 0);
    assert_eq!(bench.uart.wanted(), 0);
}

#[test]
fn a_long_paste_arrives_whole() {
    let mut bench = Bench::new();
    linux_opens(&mut bench);
    let paste: Vec<u8> = (0..=255).cycle().take(5000).collect();
    let mut got = Vec::new();
    let mut rest = &paste[..];
    while !rest.is_empty() {
        let rooms = bench.rooms();
        let taken = bench.uart.receive(rest);
        rest = &rest[taken..];
        assert!(bench.line.is_high());
        got.extend(linux_interrupt(&mut bench, &mut VecDeque::new()));
        if !rest.is_empty() {
            assert_eq!(bench.rooms(), rooms + 1, "told once that there is room");
        }
    }
    assert_eq!(got, paste);
}

#[test]
fn without_fifos_one_character_is_held() {
    let mut bench = Bench::new();
    bench.write(offset::IMSC, interrupt::RX);
    let rooms = bench.rooms();
    assert_eq!(bench.uart.room(), 1);
    assert_eq!(bench.uart.wanted(), 1);
    assert_eq!(bench.uart.receive(b"abc"), 1);
    assert_eq!(bench.uart.room(), 0);
    assert_eq!(bench.read(offset::FR) & 0x50, 0x40);
    assert!(bench.line.is_high());
    assert_eq!(bench.read(offset::DR), u32::from(b'a'));
    assert!(!bench.line.is_high());
    assert_eq!(bench.read(offset::FR) & 0x50, 0x10);
    assert_eq!(bench.rooms(), rooms + 1);
    assert_eq!(bench.uart.receive(b"bc"), 1);
    assert_eq!(bench.read(offset::DR), u32::from(b'b'));
}

#[test]
fn a_change_of_depth_loses_nothing() {
    let mut bench = Bench::with_fifos();
    assert_eq!(bench.uart.receive(b"abcde"), 5);
    bench.write(offset::LCR_H, 0x60);
    bench.write(offset::IMSC, interrupt::RX);
    assert_eq!(bench.uart.room(), 0);
    assert_eq!(bench.uart.wanted(), 0);
    assert_eq!(bench.uart.receive(b"f"), 0);
    assert_eq!(bench.read(offset::FR) & 0x50, 0x40);
    // Five of a depth of one: the trigger is reached by the change.
    assert_eq!(bench.ris(), interrupt::RT | interrupt::RX);
    assert_eq!(bench.read(offset::DR), u32::from(b'a'));
    assert_eq!(bench.rooms(), 0);
    bench.write(offset::LCR_H, 0x70);
    assert_eq!(bench.rooms(), 1);
    assert_eq!(bench.ris(), interrupt::RT);
    assert_eq!(bench.drain(), b"bcde");
}

#[test]
fn each_trigger_level_raises_and_lowers_the_receive_interrupt() {
    for (select, trigger) in [(0, 2), (1, 4), (2, 8), (3, 12), (4, 14), (7, 14)] {
        let mut bench = Bench::with_fifos();
        bench.write(offset::IFLS, select << 3);
        for count in 1..=FIFO_DEPTH {
            assert_eq!(bench.uart.receive(b"x"), 1);
            assert_eq!(bench.ris() & interrupt::RX != 0, count >= trigger);
        }
        assert_eq!(bench.uart.receive(b"x"), 0);
        for left in (0..FIFO_DEPTH).rev() {
            bench.read(offset::DR);
            assert_eq!(bench.ris() & interrupt::RX != 0, left >= trigger);
            assert_eq!(bench.ris() & interrupt::RT != 0, left > 0);
        }
    }
}

#[test]
fn a_lower_trigger_is_noticed() {
    let mut bench = Bench::with_fifos();
    bench.uart.receive(b"1234");
    assert_eq!(bench.ris() & interrupt::RX, 0);
    bench.write(offset::IFLS, 0);
    assert_eq!(bench.ris() & interrupt::RX, interrupt::RX);
    bench.write(offset::IFLS, 0x12);
    assert_eq!(bench.ris() & interrupt::RX, 0);
}

#[test]
fn cleared_interrupts_stay_clear_until_their_cause_comes_again() {
    let mut bench = Bench::with_fifos();
    bench.uart.receive(&[b'x'; 8]);
    bench.write(offset::DR, u32::from(b'y'));
    assert_eq!(bench.ris(), interrupt::RX | interrupt::RT | interrupt::TX);
    bench.write(offset::ICR, 0x7ff);
    assert_eq!(bench.ris(), 0);
    // Past the trigger already: only the timeout speaks.
    bench.uart.receive(b"x");
    assert_eq!(bench.ris(), interrupt::RT);
    bench.write(offset::DR, u32::from(b'y'));
    assert_eq!(bench.ris(), interrupt::RT | interrupt::TX);
}

#[test]
fn unmasking_alone_raises_no_transmit_interrupt() {
    let mut bench = Bench::new();
    bench.write(offset::IMSC, interrupt::TX);
    assert!(!bench.line.is_high());
    bench.write(offset::DR, 0);
    assert!(bench.line.is_high());
    assert_eq!(bench.read(offset::MIS), interrupt::TX);
    bench.write(offset::ICR, interrupt::TX);
    assert!(!bench.line.is_high());
}

#[test]
fn collected_writes_are_one_output() {
    let mut bench = Bench::new();
    bench.write(offset::IMSC, interrupt::TX);
    bench.uart.write_data(b"");
    assert!(!bench.line.is_high());
    bench.uart.write_data(b"many bytes");
    assert_eq!(
        *bench.output.lock().expect("sound"),
        [b"many bytes".to_vec()]
    );
    assert!(bench.line.is_high());
}

#[test]
fn looped_back_output_comes_in_and_input_waits() {
    let mut bench = Bench::with_fifos();
    bench.write(offset::CR, 0x381);
    bench.write(offset::IMSC, interrupt::RX);
    assert_eq!(bench.uart.room(), 0);
    assert_eq!(bench.uart.wanted(), 0);
    assert_eq!(bench.uart.receive(b"x"), 0);
    assert!(!bench.uart.receive_break());
    bench.uart.write_data(b"ab");
    bench.write(offset::DR, u32::from(b'c'));
    assert_eq!(bench.drain(), b"abc");
    assert_eq!(bench.rooms(), 0);
    bench.write(offset::CR, 0x301);
    assert_eq!(bench.rooms(), 1);
    assert_eq!(bench.uart.receive(b"x"), 1);
}

#[test]
fn a_guest_can_overrun_itself_when_looped_back() {
    let mut bench = Bench::with_fifos();
    bench.write(offset::CR, 0x381);
    bench.uart.write_data(&[b'x'; 17]);
    assert_ne!(bench.ris() & interrupt::OE, 0);
    assert_eq!(bench.read(offset::RSR_ECR), rsr::OVERRUN);
    assert_eq!(bench.read(offset::DR), u32::from(b'x') | dr::OVERRUN);
    bench.write(offset::DR, u32::from(b'y'));
    assert_eq!(bench.read(offset::DR), u32::from(b'x'));
    assert_eq!(bench.read(offset::RSR_ECR), rsr::OVERRUN);
    bench.write(offset::RSR_ECR, 0);
    assert_eq!(bench.read(offset::RSR_ECR), 0);
}

#[test]
fn looped_back_modem_lines_follow_the_outputs() {
    let mut bench = Bench::new();
    bench.write(offset::CR, 0x381);
    assert_eq!(bench.read(offset::FR) & 0x107, 0);
    // CTS, DCD and DSR fell.
    assert_eq!(bench.ris(), 0xe);
    bench.write(offset::ICR, 0xf);
    for (output, input, raised) in [
        (cr::RTS, fr::CTS, interrupt::CTS),
        (cr::DTR, fr::DSR, interrupt::DSR),
        (cr::OUT1, fr::DCD, interrupt::DCD),
        (cr::OUT2, fr::RI, interrupt::RI),
    ] {
        bench.write(offset::CR, cr::LBE | output);
        assert_eq!(bench.read(offset::FR) & 0x107, input);
        assert_eq!(bench.ris(), raised);
        bench.write(offset::CR, cr::LBE);
        assert_eq!(bench.ris(), raised);
        bench.write(offset::ICR, 0xf);
    }
}

#[test]
fn a_break_is_a_marked_zero() {
    let mut bench = Bench::with_fifos();
    assert!(bench.uart.receive_break());
    bench.uart.receive(b"b");
    assert_ne!(bench.ris() & interrupt::BE, 0);
    assert_eq!(bench.read(offset::DR), 0x400);
    assert_eq!(bench.read(offset::RSR_ECR), 0x4);
    assert_eq!(bench.read(offset::DR), u32::from(b'b'));
    assert_eq!(bench.read(offset::RSR_ECR), 0);

    bench.write(offset::CR, 0x381);
    bench.write(offset::LCR_H, 0x71);
    bench.write(offset::LCR_H, 0x71);
    assert_eq!(bench.read(offset::DR), 0x400);
    assert_eq!(bench.read(offset::FR) & 0x10, 0x10);
}

#[test]
fn reset_is_power_on() {
    let mut bench = Bench::new();
    linux_opens(&mut bench);
    bench.uart.write_data(b"last words");
    assert_eq!(bench.uart.receive(&[b'x'; 20]), 16);
    assert!(bench.line.is_high());
    let rooms = bench.rooms();
    bench.uart.reset();
    assert!(!bench.line.is_high());
    // There is room again, but nobody listens.
    assert_eq!(bench.rooms(), rooms);
    assert_eq!(bench.uart.wanted(), 0);
    assert_eq!(bench.output(), b"last words");
    for (offset, value) in [
        (offset::FR, 0x97),
        (offset::IBRD, 0),
        (offset::LCR_H, 0),
        (offset::CR, 0x300),
        (offset::IFLS, 0x12),
        (offset::IMSC, 0),
        (offset::RIS, 0),
        (offset::DR, 0),
    ] {
        assert_eq!(bench.read(offset), value, "{offset:#x}");
    }
    assert_eq!(bench.uart.room(), 1);
}

/// One thing that happens to a UART.
#[derive(Clone, Debug)]
enum Event {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Receive(Vec<u8>),
    WriteData(Vec<u8>),
    Break,
    Reset,
}

fn some_offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0u64..0x14).prop_map(|index| index * 4),
        4 => Just(offset::DR),
        1 => 0u64..0x1010,
        1 => any::<u64>(),
    ]
}

fn some_size() -> impl Strategy<Value = usize> {
    prop_oneof![Just(1), Just(2), Just(4), Just(8)]
}

fn event() -> impl Strategy<Value = Event> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..24);
    prop_oneof![
        8 => (some_offset(), some_size()).prop_map(|(o, s)| Event::Read(o, s)),
        8 => (some_offset(), some_size(), any::<[u8; 8]>())
            .prop_map(|(o, s, v)| Event::Write(o, v[..s].to_vec())),
        4 => bytes().prop_map(Event::Receive),
        1 => bytes().prop_map(Event::WriteData),
        1 => Just(Event::Break),
        1 => Just(Event::Reset),
    ]
}

/// What Linux and its users do with a port.
#[derive(Clone, Debug)]
enum Step {
    Open,
    Close,
    Throttle,
    Unthrottle,
    Interrupt,
    Print(usize),
    /// `pl011_get_mctrl` or `pl011_tx_empty`, as for TIOCMGET or tcdrain.
    Flags,
    Wait(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => Just(Step::Open),
        2 => Just(Step::Close),
        2 => Just(Step::Throttle),
        2 => Just(Step::Unthrottle),
        6 => Just(Step::Interrupt),
        2 => (0usize..5).prop_map(Step::Print),
        1 => Just(Step::Flags),
        4 => (0usize..24).prop_map(Step::Wait),
    ]
}

/// Linux's driver, and what its users got from it.
#[derive(Default)]
struct Linux {
    is_open: bool,
    is_throttled: bool,
    got: Vec<u8>,
    /// What the device took, without what sat in its FIFO at a close.
    expected: Vec<u8>,
    /// How much of what the device took is accounted for in `expected`.
    accounted: usize,
}

impl Linux {
    fn does(&mut self, bench: &mut Bench, step: &Step) {
        match *step {
            Step::Open if !self.is_open => {
                linux_opens(bench);
                (self.is_open, self.is_throttled) = (true, false);
            }
            Step::Close if self.is_open => {
                let left = linux_closes(bench);
                self.account(bench, left);
                self.is_open = false;
            }
            Step::Throttle if self.is_open => {
                linux_throttles(bench);
                self.is_throttled = true;
            }
            Step::Unthrottle if self.is_open && self.is_throttled => {
                linux_unthrottles(bench);
                self.is_throttled = false;
            }
            Step::Interrupt if bench.line.is_high() => {
                self.got
                    .extend(linux_interrupt(bench, &mut VecDeque::new()));
            }
            Step::Print(count) => linux_prints(bench, &vec![b'.'; count]),
            Step::Flags if self.is_open => {
                bench.read16(offset::FR);
            }
            Step::Wait(count) => bench.feed(count),
            _ => {}
        }
    }

    /// All that was taken is expected, but the last `lost` bytes.
    fn account(&mut self, bench: &Bench, lost: usize) {
        let taken = &bench.input.taken;
        self.expected
            .extend(&taken[self.accounted..taken.len() - lost]);
        self.accounted = taken.len();
    }
}

/// What must hold whatever happened.
fn check_line(bench: &Bench) -> Result<(), TestCaseError> {
    let registers = &bench.uart.registers;
    prop_assert_eq!(bench.line.is_high(), registers.ris & registers.imsc != 0);
    let history = bench.line.history();
    let alternates = history
        .iter()
        .enumerate()
        .all(|(i, &high)| high == (i % 2 == 0));
    prop_assert!(alternates, "set without a change: {:?}", history);
    prop_assert!(bench.uart.rx.len() <= FIFO_DEPTH);
    Ok(())
}

proptest! {
    #[test]
    fn nothing_a_guest_does_panics_or_leaves_the_line_wrong(
        events in prop::collection::vec(event(), 0..200),
    ) {
        let mut bench = Bench::new();
        for event in events {
            match event {
                Event::Read(offset, size) => {
                    let mut data = vec![0xff; size];
                    bench.uart.read(offset, &mut data);
                    if size == 8 {
                        prop_assert_eq!(data, vec![0; 8]);
                    }
                }
                Event::Write(offset, data) => bench.uart.write(offset, &data),
                Event::Receive(bytes) => {
                    let room = bench.uart.room();
                    prop_assert_eq!(bench.uart.receive(&bytes), bytes.len().min(room));
                }
                Event::WriteData(bytes) => bench.uart.write_data(&bytes),
                Event::Break => {
                    let room = bench.uart.room();
                    prop_assert_eq!(bench.uart.receive_break(), room > 0);
                }
                Event::Reset => bench.uart.reset(),
            }
            check_line(&bench)?;
        }
    }

    #[test]
    fn bytes_arrive_in_order_and_whole(
        events in prop::collection::vec(event(), 0..200),
        input in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut bench = Bench::new();
        let mut output = Vec::new();
        let (mut sent, mut received) = (0, Vec::new());
        for event in events {
            let rooms = bench.rooms();
            let was_wanted = bench.uart.wanted() > 0;
            match event {
                Event::Read(offset, size) => {
                    let waits = bench.uart.flags() & 0x10 == 0;
                    let mut data = vec![0; size];
                    bench.uart.read(offset, &mut data);
                    if offset == offset::DR && size != 8 && waits {
                        received.push(data[0]);
                    }
                }
                Event::Write(offset, mut data) => {
                    if offset == offset::CR {
                        // Looping back mixes the two directions: tested apart.
                        data[0] &= !0x80;
                    }
                    bench.uart.write(offset, &data);
                    if offset == offset::DR && data.len() != 8 {
                        output.push(data[0]);
                    }
                }
                Event::Receive(bytes) => {
                    let end = input.len().min(sent + bytes.len());
                    sent += bench.uart.receive(&input[sent..end]);
                }
                Event::WriteData(bytes) => {
                    bench.uart.write_data(&bytes);
                    output.extend(bytes);
                }
                // These put in what was not sent, or take out what was not read.
                Event::Break | Event::Reset => {}
            }
            let told = bench.rooms() - rooms;
            let wanted = bench.uart.wanted();
            prop_assert_eq!(told, usize::from(!was_wanted && wanted > 0));
            prop_assert!(wanted == 0 || wanted == bench.uart.room());
            check_line(&bench)?;
        }
        received.extend(bench.drain());
        prop_assert_eq!(received, &input[..sent]);
        prop_assert_eq!(bench.output(), output);
    }
    #[test]
    fn what_is_fed_as_wanted_is_lost_only_in_the_fifo_at_a_close(
        steps in prop::collection::vec(step(), 0..80),
        pace in prop::collection::vec(prop_oneof![2 => Just(0), 1 => 1usize..24], 0..600),
        input in prop::collection::vec(any::<u8>(), 0..400),
        leftovers in 0..FIFO_DEPTH,
    ) {
        let (mut bench, mut linux) = (Bench::with_fifos(), Linux::default());
        // Firmware left these behind; Linux throws them away.
        bench.uart.receive(&vec![b'x'; leftovers]);
        bench.input.waiting = input.iter().copied().collect();
        bench.input.pace = pace.into();
        for step in &steps {
            linux.does(&mut bench, step);
            check_line(&bench)?;
            prop_assert!(linux.is_open || bench.uart.wanted() == 0, "nobody listens");
        }
        // Whatever happened before, an open port takes all the rest.
        for step in [Step::Open, Step::Unthrottle, Step::Interrupt] {
            linux.does(&mut bench, &step);
        }
        while !bench.input.waiting.is_empty() {
            // A full FIFO is no dead end as long as the guest is told of it.
            prop_assert!(bench.uart.wanted() > 0 || bench.line.is_high());
            for step in [Step::Wait(usize::MAX), Step::Interrupt] {
                linux.does(&mut bench, &step);
            }
        }
        linux.does(&mut bench, &Step::Interrupt);
        linux.account(&bench, 0);
        prop_assert_eq!(&bench.input.taken, &input);
        prop_assert_eq!(linux.got, linux.expected);
    }
}
