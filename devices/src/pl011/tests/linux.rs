//! Linux's drivers, the early console and amba-pl011.c, as sequences of accesses.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

#[test]
fn early_console_prints_before_anything_is_enabled() {
    // amba-pl011.c, pl011_putc: poll TXFF by word, write a byte, poll BUSY.
    let mut bench = Bench::new();
    bench.write(offset::CR, 0);
    for &byte in b"Booting Linux\r\n" {
        assert_eq!(bench.read(offset::FR) & 0x20, 0);
        assert_eq!(bench.uart.write(offset::DR, &[byte]), Action::None);
        assert_eq!(bench.read(offset::FR) & 0x08, 0);
    }
    assert_eq!(bench.output(), b"Booting Linux\r\n");
    assert!(!bench.line.is_high());
}

/// The accesses of Linux's driver in its order: `pl011_hwinit`, `pl011_startup`,
/// `pl011_set_termios`, with a byte typed too early.
pub(super) fn linux_opens(bench: &mut Bench) {
    bench.write16(offset::ICR, 0x7d0);
    let im = bench.read16(offset::IMSC);
    // Unmasked only briefly: the VMM does not react in time (see `Pl011::wanted`).
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

/// `pl011_unthrottle_rx`, since a fix of November 2022; before that, it drained the FIFO as opening
/// does.
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
fn linux_discards_input_from_before_it_opened_and_receives_what_follows() {
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
        assert_eq!(bench.uart.write(offset::DR, &[byte]), Action::None);
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
        assert_eq!(bench.uart.write_data(&[byte]), Action::None);
        assert_eq!(bench.uart.wanted(), 0);
    }
    assert_eq!(bench.rooms(), 0);
}

#[test]
fn nothing_is_wanted_while_linux_drains_the_fifo() {
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
fn linux_seems_to_listen_for_a_moment_before_it_opens() {
    // The window that the documentation of `wanted` describes: pl011_hwinit unmasks,
    // pl011_allocate_irq masks.
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

/// Linux's driver, and what its users received.
#[derive(Default)]
struct Linux {
    is_open: bool,
    is_throttled: bool,
    got: Vec<u8>,
    /// What the device accepted, without what was in its FIFO at a close.
    expected: Vec<u8>,
    /// How much of what the device accepted is accounted for in `expected`.
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

    /// Adds what was accepted to `expected`, but for the last `lost` bytes.
    fn account(&mut self, bench: &Bench, lost: usize) {
        let taken = &bench.input.taken;
        self.expected
            .extend(&taken[self.accounted..taken.len() - lost]);
        self.accounted = taken.len();
    }
}

proptest! {
    #[test]
    fn what_is_fed_as_wanted_is_lost_only_in_the_fifo_at_a_close(
        steps in prop::collection::vec(step(), 0..80),
        pace in prop::collection::vec(prop_oneof![2 => Just(0), 1 => 1usize..24], 0..600),
        input in prop::collection::vec(any::<u8>(), 0..400),
        leftovers in 0..FIFO_DEPTH,
    ) {
        let (mut bench, mut linux) = (Bench::with_fifos(), Linux::default());
        // Left over from firmware; Linux discards them.
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
            // A full FIFO does not stall as long as its interrupt is raised.
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
