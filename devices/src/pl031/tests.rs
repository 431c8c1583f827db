//! A PL031 as drivers use it, and its saving and restoring.

use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;
use crate::fake::FakeLine;
use crate::persist::tests::{Access, accesses, goes_on, refuses};
use crate::primecell::tests::{assert_invalid, assert_read_only, identification};

struct Bench {
    clock: Pl031,
    line: Arc<FakeLine>,
    calls: Arc<AtomicUsize>,
}

impl Bench {
    fn new() -> Bench {
        let line = FakeLine::new();
        let calls = Arc::new(AtomicUsize::new(0));
        let counter = calls.clone();
        let clock = Pl031::new(
            line.clone(),
            Box::new(move || {
                counter.fetch_add(1, Ordering::Relaxed);
            }),
        );
        Bench { clock, line, calls }
    }

    fn read(&mut self, offset: u16) -> u32 {
        let mut data = [0xff; 4];
        assert_eq!(self.clock.read(u64::from(offset), &mut data), Action::None);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u16, value: u32) {
        assert_eq!(
            self.clock.write(u64::from(offset), &value.to_le_bytes()),
            Action::None
        );
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }

    /// Pretends that the clock was last compared `seconds` ago.
    fn sleep(&mut self, seconds: u32) {
        self.clock.compared = self.clock.compared.wrapping_sub(seconds);
    }
}

fn host_seconds() -> u32 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("after 1970");
    u32::try_from(since.as_secs()).expect("before 2106")
}

#[test]
fn it_starts_with_the_hosts_time_and_a_masked_alarm() {
    let mut bench = Bench::new();
    assert!(bench.read(offset::DR) - host_seconds() <= 1);
    for register in [
        offset::MR,
        offset::LR,
        offset::IMSC,
        offset::RIS,
        offset::MIS,
    ] {
        assert_eq!(bench.read(register), 0, "{register:#x}");
    }
    assert_eq!(bench.read(offset::CR), 1);
    assert_eq!(bench.clock.deadline(), None);
    assert_eq!(bench.clock.faults(), 0);
    assert_eq!(bench.line.history(), []);
}

#[test]
fn a_loaded_time_goes_on_and_survives_the_control_register() {
    let mut bench = Bench::new();
    bench.write(offset::LR, 1000);
    assert_eq!(bench.read(offset::LR), 1000);
    // rtc-pl031.c, pl031_probe.
    let control = bench.read(offset::CR);
    bench.write(offset::CR, control | 1);
    assert!((1000..1010).contains(&bench.read(offset::DR)));
}

#[test]
fn identification_is_what_linux_matches() {
    let mut bench = Bench::new();
    let ids = identification(&mut bench.clock);
    assert_eq!(ids, [0x31, 0x10, 0x14, 0, 0x0d, 0xf0, 0x05, 0xb1]);
}

#[test]
fn linux_sets_an_alarm_and_gets_its_interrupt() {
    let mut bench = Bench::new();
    bench.write(offset::LR, 5000);
    // pl031_set_alarm, pl031_alarm_irq_enable.
    let calls = bench.calls();
    bench.write(offset::MR, 5100);
    bench.write(offset::ICR, 1);
    bench.write(offset::IMSC, 1);
    assert_eq!(bench.calls(), calls + 3);
    let deadline = bench.clock.deadline().expect("an alarm is set");
    assert!((90..=100).contains(&deadline.as_secs()), "{deadline:?}");

    bench.clock.poll();
    assert!(!bench.line.is_high());
    // The hundred seconds pass: the clock is past 5100 and was last compared before it.
    bench.write(offset::LR, 5101);
    bench.sleep(5);
    bench.clock.poll();
    assert!(bench.line.is_high());
    assert_eq!(bench.clock.deadline(), None);
    // pl031_interrupt.
    assert_eq!(bench.read(offset::MIS), 1);
    bench.write(offset::ICR, 1);
    assert_eq!(bench.read(offset::RIS), 0);
    assert_eq!(bench.line.history(), [true, false]);
}

#[test]
fn a_real_second_passes() {
    let mut bench = Bench::new();
    let now = bench.read(offset::DR);
    bench.write(offset::MR, now + 1);
    bench.write(offset::IMSC, 1);
    while let Some(deadline) = bench.clock.deadline() {
        assert!(deadline <= Duration::from_secs(1));
        std::thread::sleep(deadline);
        bench.clock.poll();
    }
    assert!(bench.line.is_high());
    assert!(bench.read(offset::DR) > now);
}

#[test]
fn a_match_at_once_is_a_match() {
    let mut bench = Bench::new();
    bench.write(offset::MR, 100_000);
    bench.write(offset::LR, 100_000);
    assert_eq!(bench.read(offset::RIS), 1);
    assert_eq!(bench.read(offset::MIS), 0);
    assert!(!bench.line.is_high());
    bench.write(offset::IMSC, 1);
    assert!(bench.line.is_high());
    bench.write(offset::IMSC, 0);
    assert!(!bench.line.is_high());
}

#[test]
fn only_time_that_passes_matches() {
    let mut bench = Bench::new();
    bench.write(offset::LR, 1000);
    bench.write(offset::MR, 2000);
    // The guest sets the time to after the alarm.
    bench.write(offset::LR, 3000);
    assert_eq!(bench.read(offset::RIS), 0);
    // The host's clock is set back: the time last compared lies in the future.
    bench.clock.compared = 9000;
    assert_eq!(bench.read(offset::RIS), 0);
    // An alarm in the past waits for the clock to wrap.
    bench.write(offset::IMSC, 1);
    let deadline = bench.clock.deadline().expect("an alarm is set");
    assert!(deadline > Duration::from_secs(u64::from(u32::MAX) - 2000));
}

#[test]
fn the_clock_wraps() {
    let mut bench = Bench::new();
    bench.write(offset::MR, 1);
    bench.write(offset::LR, 3);
    bench.sleep(10);
    assert_eq!(bench.read(offset::RIS), 1);
}

#[test]
fn invalid_accesses_read_as_zero_are_ignored_and_counted() {
    let mut bench = Bench::new();
    for size in [1, 2, 8] {
        assert_invalid(&mut bench.clock, Pl031::faults, u64::from(offset::MR), size);
    }
    assert_eq!(bench.read(offset::MR), 0);
    for offset in [0x20, 0x02, 0xfdc, 0x1000, 0x1_0000] {
        assert_invalid(&mut bench.clock, Pl031::faults, offset, 4);
    }
    for offset in [offset::RIS, offset::MIS, 0xfe0] {
        assert_read_only(&mut bench.clock, Pl031::faults, u64::from(offset));
    }
    let before = bench.clock.faults();
    bench.write(offset::DR, 1);
    assert_eq!(bench.read(offset::ICR), 0);
    assert_eq!(bench.clock.faults(), before + 2);
}

#[test]
fn reset_clears_the_alarm_and_keeps_the_time() {
    let mut bench = Bench::new();
    bench.write(offset::MR, 7000);
    bench.write(offset::LR, 7000);
    bench.write(offset::IMSC, 1);
    assert!(bench.line.is_high());
    bench.clock.reset();
    assert!(!bench.line.is_high());
    for register in [offset::MR, offset::IMSC, offset::RIS] {
        assert_eq!(bench.read(register), 0);
    }
    assert!((7000..7010).contains(&bench.read(offset::DR)));
}

#[test]
fn a_cleared_match_is_no_deadline() {
    let mut bench = Bench::new();
    bench.write(offset::IMSC, 1);
    bench.write(offset::MR, 100_000);
    bench.write(offset::LR, 100_000);
    bench.write(offset::ICR, 1);
    assert!(!bench.line.is_high());
    // There is no deadline, or a distant one if a new second has just begun.
    let year = Duration::from_secs(365 * 24 * 3600);
    assert!(bench.clock.deadline().is_none_or(|wait| wait > year));
}

proptest! {
    #[test]
    fn nothing_a_guest_does_panics_or_leaves_the_line_wrong(
        events in prop::collection::vec(
            (
                prop_oneof![8 => (0u64..9).prop_map(|i| i * 4), 1 => any::<u64>()],
                prop_oneof![1 => Just(1usize), 1 => Just(2), 8 => Just(4), 1 => Just(8)],
                prop_oneof![Just(None), any::<u64>().prop_map(Some), (0u64..2).prop_map(Some)],
                0u32..3,
            ),
            0..200,
        ),
    ) {
        let mut bench = Bench::new();
        for (offset, size, value, sleep) in events {
            bench.sleep(sleep);
            let action = match value {
                Some(value) => bench.clock.write(offset, &value.to_le_bytes()[..size]),
                None => bench.clock.read(offset, &mut vec![0; size]),
            };
            prop_assert_eq!(action, Action::None);
            bench.clock.deadline();
            bench.clock.poll();
            let asserted = bench.read(offset::RIS) & bench.read(offset::IMSC);
            prop_assert_eq!(bench.line.is_high(), asserted != 0);
        }
    }
}

#[test]
fn a_state_that_no_guest_can_cause_is_refused() {
    let mut clock = Bench::new().clock;
    let state = clock.save();
    refuses(&mut clock, &Pl031State { mask: 2, ..state }, "RTCIMSC 0x2");
    let ahead = i64::MIN;
    refuses(&mut clock, &Pl031State { ahead, ..state }, "s ahead");
}

#[test]
fn an_alarm_that_fell_due_while_saved_is_raised_by_the_restore() {
    let mut bench = Bench::new();
    let now = bench.read(offset::DR);
    bench.write(offset::IMSC, 1);
    let state = Pl031State {
        alarm: now - 50,
        compared: now - 100,
        ..bench.clock.save()
    };
    let mut other = Bench::new();
    other
        .clock
        .restore(&state)
        .expect("a state like a saved one");
    assert!(other.line.is_high());
    assert_eq!(other.calls(), 1, "the deadline is asked for anew");
    assert_eq!(other.read(offset::MIS), 1);
}

#[derive(Clone, Debug)]
enum Event {
    Access(Access),
    /// A write of a value close to the current time.
    SetNear(u16, u32),
    Poll,
}

const REGISTERS: &[u64] = &[0x00, 0x04, 0x08, 0x0c, 0x10, 0x14, 0x18, 0x1c, 0xfe0];

fn events() -> impl Strategy<Value = Vec<Event>> {
    let near = prop::sample::select(&[offset::MR, offset::LR][..]);
    let event = prop_oneof![
        3 => accesses(REGISTERS, &[4]).prop_map(Event::Access),
        1 => (near, 0_u32..5).prop_map(|(register, near)| Event::SetNear(register, near)),
        1 => Just(Event::Poll),
    ];
    prop::collection::vec(event, 0..40)
}

proptest! {
    #[test]
    fn it_goes_on_where_it_was_saved(before in events(), after in events()) {
        let make = || {
            let line = FakeLine::new();
            (Pl031::new(line.clone(), Box::new(|| {})), line)
        };
        let act = |clock: &mut Pl031, event: &Event| match event {
            Event::Access(access) => access.make(clock),
            Event::SetNear(register, near) => {
                let value = clock.now().wrapping_add(*near);
                Access::Write(u64::from(*register), value.to_le_bytes().to_vec()).make(clock)
            }
            Event::Poll => {
                clock.poll();
                (Vec::new(), Action::None)
            }
        };
        // Both read the host's clock, one after the other: a run in which a new second begins
        // proves nothing.
        loop {
            let second = host_seconds();
            let result = std::panic::catch_unwind(|| goes_on(make, act, &before, &after));
            match result {
                Ok(()) => break,
                Err(_) if host_seconds() != second => {}
                Err(cause) => std::panic::resume_unwind(cause),
            }
        }
    }

    #[test]
    fn nothing_restored_panics(
        state in (any::<u32>(), any::<i64>(), any::<u32>(), 0_u32..2, any::<bool>(), any::<u32>()),
    ) {
        let (load, ahead, alarm, mask, matched, compared) = state;
        let mut bench = Bench::new();
        for ahead in [ahead, ahead % MOST_AHEAD] {
            let state = Pl031State { load, ahead, alarm, mask, matched, compared };
            let valid = (-MOST_AHEAD..=MOST_AHEAD).contains(&ahead);
            prop_assert_eq!(bench.clock.restore(&state).is_ok(), valid);
            bench.clock.deadline();
            let asserted = bench.read(offset::RIS) & bench.read(offset::IMSC);
            prop_assert_eq!(bench.line.is_high(), asserted != 0);
        }
    }
}
