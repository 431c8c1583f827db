//! What the guest says of its memory: statistics, hints and reports.

use super::*;

#[test]
fn reported_pages_go_back_and_the_guest_hears_when() {
    let mut bench = Bench::started(PAGE, REPORTING);
    let free = at(FREE);
    let ranges = [(free, 2 << 20), (free + (3 << 20), 1 << 20)];
    bench.report(3, &ranges);
    assert_eq!(bench.back(), [(free, 2 << 20), (free + (3 << 20), 1 << 20)]);
    assert_eq!(bench.guest.interrupts(), 1);
    assert_eq!(lock(&bench.guest.device).discarded(), 3 << 20);
}

#[test]
fn only_whole_pages_of_a_report_go_back() {
    let host = 16 * PAGE;
    let mut bench = Bench::started(host, REPORTING);
    let free = at(FREE).next_multiple_of(host);
    bench.report(3, &[(free - PAGE, (2 * host) as u32)]);
    assert_eq!(bench.back(), [(free, host)]);
    bench.report(
        3,
        &[(free + 1, host as u32), (free, host as u32 - 1), (free, 1)],
    );
    assert_eq!(bench.back(), []);
    bench.report(3, &[(free, host as u32)]);
    assert_eq!(bench.back(), [(free, host)]);
    assert_eq!(bench.guest.mmio.faults(), 0);
}

#[test]
fn pages_that_must_keep_their_filling_stay() {
    let mut bench = Bench::new(PAGE, REPORTING);
    let poisoned = FEATURE_STATISTICS | FEATURE_REPORTING | FEATURE_POISON;
    bench.guest.negotiate(poisoned);
    // Linux writes it before it starts the device.
    bench.guest.write(0x10c, 0xaaaa_aaaa);
    for queue in 0..4 {
        bench.guest.set_up_queue(queue);
    }
    bench.guest.write(0x70, 15);
    bench.report(3, &[(at(FREE), 2 << 20)]);
    assert_eq!(bench.back(), []);
    // Those in the balloon have nothing to keep.
    bench.inflate(&[FREE]);
    assert_eq!(bench.back(), [(at(FREE), PAGE)]);
    // The next driver fills them with zeros, which is what it finds.
    bench.guest.start(poisoned);
    bench.report(3, &[(at(FREE), 2 << 20)]);
    assert_eq!(bench.back(), [(at(FREE), 2 << 20)]);
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    fn entry(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
    }
    let mut bench = Bench::new(PAGE, NOTHING);
    assert!(!lock(&bench.guest.device).ask_for_statistics());
    bench.guest.start(FEATURE_STATISTICS);
    assert!(!lock(&bench.guest.device).ask_for_statistics());
    let first = [
        entry(4, 1 << 30),
        entry(5, 4 << 30),
        entry(999, 1),
        vec![4, 0, 7],
    ]
    .concat();
    bench.guest.request(2, &[&first[..7], &first[7..]], &[]);
    bench.guest.kick(2);
    assert!(bench.guest.used(2).is_empty(), "the buffer waits with us");
    let statistics = |bench: &Bench| {
        let device = lock(&bench.guest.device);
        let known = device.statistics().expect("statistics");
        known.iter().collect::<Vec<_>>()
    };
    assert_eq!(statistics(&bench), [("free", 1 << 30), ("total", 4 << 30)]);
    assert!(lock(&bench.guest.device).ask_for_statistics());
    assert_eq!(bench.guest.used(2).len(), 1);
    assert_eq!(bench.guest.interrupts(), 1);
    assert!(
        !lock(&bench.guest.device).ask_for_statistics(),
        "asked already"
    );
    bench.guest.request(2, &[&entry(15, 3)], &[]);
    bench.guest.kick(2);
    assert_eq!(statistics(&bench), [("direct-reclaimed", 3)]);
    // A driver that sends more than one buffer gets the first back.
    bench.guest.request(2, &[&entry(6, 4)], &[]);
    bench.guest.kick(2);
    assert_eq!(bench.guest.used(2).len(), 1);
    bench.guest.write(0x70, 0);
    assert_eq!(lock(&bench.guest.device).statistics(), None);
}

#[test]
fn any_number_of_unknown_statistics_is_passed_over() {
    let mut bench = Bench::new(PAGE, NOTHING);
    bench.guest.start(FEATURE_STATISTICS);
    let entry = |tag: u16| [&tag.to_le_bytes()[..], &[1, 0, 0, 0, 0, 0, 0, 0]].concat();
    let mut all: Vec<u8> = (1000..1000 + 70).flat_map(entry).collect();
    all.extend(entry(4));
    bench.guest.request(2, &[&all], &[]);
    bench.guest.kick(2);
    let device = lock(&bench.guest.device);
    let known: Vec<_> = device.statistics().expect("statistics").iter().collect();
    assert_eq!(known, [("free", 1)]);
}

/// As Linux does it: the round's command, free pages, and the end.
#[test]
fn hints_are_collected_and_nothing_goes_back() {
    let mut bench = Bench::started(PAGE, ALL);
    let say = |bench: &mut Bench, command: u32| {
        bench.guest.request(3, &[&command.to_le_bytes()], &[]);
        bench.guest.kick(3);
        assert_eq!(bench.guest.used(3).len(), 1);
    };
    // Nobody asked.
    say(&mut bench, 2);
    bench.report(3, &[(at(FREE), 1 << 20)]);
    say(&mut bench, STOP);
    assert_eq!(*lock(&bench.guest.device).hints(), Hints::default());
    assert_eq!(bench.config(COMMAND), STOP);

    assert!(lock(&bench.guest.device).ask_for_hints());
    assert!(bench.told());
    let round = bench.config(COMMAND);
    assert!(round > DONE);
    // What belongs to an earlier round is not in this one.
    bench.report(3, &[(at(FREE), 1 << 20)]);
    say(&mut bench, round + 1);
    bench.report(3, &[(at(FREE), 1 << 20)]);
    say(&mut bench, round);
    bench.report(3, &[(at(FREE), 1 << 20)]);
    bench.report(3, &[(at(FREE) + (1 << 20), 1 << 20)]);
    bench.report(3, &[(at(FREE) + (3 << 20), PAGE as u32)]);
    let ranges = vec![(at(FREE), 2 << 20), (at(FREE) + (3 << 20), PAGE)];
    let mut expected = Hints {
        ranges,
        bytes: (2 << 20) + PAGE,
        complete: false,
    };
    assert_eq!(*lock(&bench.guest.device).hints(), expected);
    assert!(!bench.told());
    say(&mut bench, STOP);
    expected.complete = true;
    assert!(bench.told(), "the guest may use them again");
    assert_eq!(bench.config(COMMAND), DONE);
    bench.report(3, &[(at(FREE), 1 << 20)]);
    assert_eq!(*lock(&bench.guest.device).hints(), expected);
    assert_eq!(bench.back(), []);
    assert!(lock(&bench.guest.device).ask_for_hints());
    assert_eq!(bench.config(COMMAND), round + 1);
    assert_eq!(*lock(&bench.guest.device).hints(), Hints::default());
}

#[test]
fn hints_of_the_round_before_a_reset_are_not_taken() {
    let mut bench = Bench::started(PAGE, ALL);
    assert!(lock(&bench.guest.device).ask_for_hints());
    let round = bench.config(COMMAND);
    let features = lock(&bench.guest.device).features();
    bench.guest.start(features);
    assert_eq!(bench.config(COMMAND), STOP);
    bench.guest.request(3, &[&round.to_le_bytes()], &[]);
    bench.guest.kick(3);
    bench.report(3, &[(at(FREE), 1 << 20)]);
    assert_eq!(*lock(&bench.guest.device).hints(), Hints::default());
}

#[test]
fn hints_need_a_driver_that_gives_them() {
    let mut bench = Bench::new(PAGE, ALL);
    assert!(!lock(&bench.guest.device).ask_for_hints());
    bench.guest.start(FEATURE_STATISTICS);
    assert!(!lock(&bench.guest.device).ask_for_hints());
    assert_eq!(bench.config(COMMAND), STOP);
}

#[test]
fn what_the_guest_said_holds_and_its_buffer_for_statistics_is_there() {
    for moves in [false, true] {
        let mut bench = Bench::started(PAGE, ALL);
        let statistic = [&[4, 0][..], &77_u64.to_le_bytes()].concat();
        let head = bench.guest.request(2, &[&statistic], &[]);
        bench.guest.kick(2);
        lock(&bench.guest.device).set_target(8 << 20);
        bench.guest.write(0x104, 5);
        assert!(lock(&bench.guest.device).ask_for_hints());
        let round = bench.guest.read(0x108);
        bench.guest.request(3, &[&round.to_le_bytes()], &[]);
        bench.guest.request(3, &[], &[64]);
        bench.guest.kick(3);
        assert_eq!(bench.guest.used(3).len(), 2);
        let hints = lock(&bench.guest.device).hints().clone();
        assert_eq!((hints.bytes, hints.complete), (64, false));
        bench.hold(moves);
        assert_eq!(bench.guest.used(2).len(), 0, "the buffer is kept");
        {
            let mut device = lock(&bench.guest.device);
            assert_eq!((device.target(), device.actual()), (8 << 20, 5 * PAGE));
            assert_eq!(*device.hints(), hints);
            let said = device.statistics().expect("it said something");
            assert_eq!(said.iter().collect::<Vec<_>>(), [("free", 77)]);
            assert!(device.ask_for_statistics());
            assert!(!device.ask_for_statistics(), "it was asked");
        }
        assert_eq!(bench.guest.used(2)[0].0, head);
        // The round goes on.
        bench.guest.request(3, &[], &[64]);
        bench.guest.request(3, &[&STOP.to_le_bytes()], &[]);
        bench.guest.kick(3);
        let device = lock(&bench.guest.device);
        assert_eq!((device.hints().bytes, device.hints().complete), (128, true));
    }
}

#[test]
fn hints_that_cannot_be_are_refused() {
    let bench = Bench::new(PAGE, ALL);
    let mut device = lock(&bench.guest.device);
    let DeviceState::Balloon(good) = device.save() else {
        panic!("it is a balloon");
    };
    for (ranges, bytes) in [
        (vec![(0, 0); MOST_HINTS + 1], 0),
        (vec![(u64::MAX, 1)], 1),
        (Vec::new(), u64::MAX),
    ] {
        let mut state = good.clone();
        state.hints.ranges = ranges;
        state.hints.bytes = bytes;
        let refused = device.restore(&DeviceState::Balloon(state));
        assert!(refused.is_err());
    }
    device
        .restore(&DeviceState::Balloon(good))
        .expect("it can be");
}
