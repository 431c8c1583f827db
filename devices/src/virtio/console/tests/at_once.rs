//! Output on the thread that kicks.

use super::*;

#[test]
fn output_is_taken_by_whoever_kicks() {
    let mut bench = Bench::started(usize::MAX);
    bench.guest.request(TRANSMIT, &[b"hello"], &[]);
    bench.guest.write(0x50, TRANSMIT as u32);
    assert_eq!(bench.printed(), 1, "it is answered when the write returns");
    assert_eq!(bench.got(), b"hello");
    let kicks = bench.guest.mmio.kicks();
    assert!(kicks[TRANSMIT].read().is_err(), "no thread was woken");
    // Buffers for input are for the thread that has the input.
    bench.guest.request(RECEIVE, &[], &[8]);
    bench.guest.write(0x50, RECEIVE as u32);
    assert_eq!(bench.rooms(), 0);
    assert!(bench.guest.mmio.kicks()[RECEIVE].read().is_ok());
}

#[test]
fn a_reader_that_stopped_holds_no_vcpu_up() {
    let mut bench = Bench::started(0);
    bench.guest.request(TRANSMIT, &[b"abcd"], &[]);
    // The writes return, though nobody reads.
    for _ in 0..3 {
        bench.guest.write(0x50, TRANSMIT as u32);
    }
    assert_eq!((bench.printed(), bench.got()), (0, Vec::new()));
    bench.read(100);
    assert_eq!((bench.printed(), bench.got()), (1, b"abcd".to_vec()));
}

#[test]
fn a_vcpu_does_not_wait_for_the_thread_that_has_the_console() {
    let mut bench = Bench::started(usize::MAX);
    bench.guest.request(TRANSMIT, &[b"abcd"], &[]);
    let device = Arc::clone(&bench.guest.device);
    let taken = lock(&device);
    bench.guest.write(0x50, TRANSMIT as u32);
    drop(taken);
    assert!(bench.got().is_empty());
    // That thread hears of it instead.
    bench.read(0);
    assert_eq!((bench.printed(), bench.got()), (1, b"abcd".to_vec()));
}

#[test]
fn a_console_that_is_held_takes_nothing_until_it_goes_on() {
    let mut bench = Bench::started(usize::MAX);
    bench.guest.mmio.quiesce();
    bench.guest.request(TRANSMIT, &[b"abcd"], &[]);
    bench.guest.write(0x50, TRANSMIT as u32);
    assert!(bench.got().is_empty());
    bench.guest.mmio.resume();
    bench.read(0);
    assert_eq!((bench.printed(), bench.got()), (1, b"abcd".to_vec()));
    // Nor does one that no driver uses, or one whose driver stopped the queue.
    bench.guest.stop_queue(TRANSMIT as u32);
    bench.guest.request(TRANSMIT, &[b"efgh"], &[]);
    bench.guest.write(0x50, TRANSMIT as u32);
    bench.guest.write(0x70, 0);
    bench.guest.write(0x50, TRANSMIT as u32);
    assert_eq!(bench.got(), b"abcd");
}
