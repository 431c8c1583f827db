//! Requests that are taken as buffers.

use super::anything::{Entry, entries};
use super::*;

/// A queue whose table has these entries, each of which begins a request.
fn bench(entries: &[Entry]) -> Bench {
    let mut bench = Bench::new();
    for (index, (buffer, flags, next)) in (0..).zip(entries) {
        bench.descriptor(RINGS.descriptors, index, *buffer, *flags, *next);
        bench.offer(index);
    }
    bench
}

#[test]
fn what_is_completed_together_is_in_the_ring_in_order() {
    let mut bench = Bench::with(true);
    // Twice, so that the second time goes over the ring's end.
    for round in 0..2_u16 {
        for _ in 0..6 {
            bench.offer_plain();
        }
        let (mut segments, mut buffers) = (Vec::new(), Vec::new());
        while let Some(Ok(buffer)) = bench.queue.pop_buffer(Way::In, &mut segments) {
            buffers.push(buffer);
        }
        assert_eq!((buffers.len(), segments.len()), (6, 6));
        let last = 4 + 2 * u64::from(SIZE);
        bench.put(RINGS.available + last, &(6 * round + 5).to_le_bytes());
        assert_eq!(bench.used(), 6 * round);
        bench.queue.complete_buffers(&buffers, 21);
        assert_eq!(bench.used(), 6 * round + 6);
        bench.queue.signal();
        assert_eq!(bench.interrupts(), usize::from(round) + 1);
        for (offset, written) in (0..).zip([4, 4, 4, 4, 4, 1]) {
            let slot = (6 * u64::from(round) + offset) % u64::from(SIZE);
            let at = GuestAddress(RINGS.used + 4 + 8 * slot);
            let entry: [u32; 2] = bench.memory.read_obj(at).expect("memory");
            let head = (6 * u32::from(round) + offset as u32) % u32::from(SIZE);
            assert_eq!(entry, [head, written]);
        }
    }
}

#[test]
fn buffers_that_are_handed_back_come_again() {
    let mut bench = Bench::new();
    for _ in 0..3 {
        bench.offer_plain();
    }
    let mut segments = Vec::new();
    while let Some(Ok(_)) = bench.queue.pop_buffer(Way::In, &mut segments) {}
    bench.queue.hand_back_buffers(2);
    let mut again = Vec::new();
    while let Some(Ok(_)) = bench.queue.pop_buffer(Way::In, &mut again) {}
    assert_eq!(again, segments[1..]);
    assert_eq!(bench.queue.next_available(), 3);
}

#[test]
fn pieces_are_where_this_process_has_the_segments() {
    let bench = Bench::new();
    let data: Vec<u8> = (0..=255).collect();
    // In the region of the rings, in another one, and over the edge between neighbours.
    for start in [0x1_8000, 0x4_0000, 0x1_ff80_u64] {
        bench.put(start, &data);
        let segments = [segment(start, 3), segment(start + 3, 253)];
        let mut vector = Vec::new();
        bench.queue.add_pieces(&segments, 5, &mut vector);
        let total: usize = vector.iter().map(|[_, len]| len).sum();
        assert_eq!(total, 251);
        let first = bench.memory.get_host_address(GuestAddress(start + 5));
        assert_eq!(vector[0][0], first.expect("memory") as usize);
    }
}

proptest! {
    #[test]
    fn a_buffer_is_what_the_request_is(entries in entries(), is_in: bool) {
        let way = if is_in { Way::In } else { Way::Out };
        let (mut one, mut other) = (bench(&entries), bench(&entries));
        loop {
            let mut segments = Vec::new();
            let buffer = other.queue.pop_buffer(way, &mut segments);
            let Some(chain) = one.queue.pop() else {
                prop_assert!(buffer.is_none());
                break;
            };
            match buffer {
                Some(Ok(buffer)) => {
                    prop_assert!(chain.is_whole());
                    let (list, room) = match way {
                        Way::Out => (chain.readable(), chain.readable_len()),
                        Way::In => (chain.writable(), chain.writable_len()),
                    };
                    prop_assert_eq!(list, &segments[..]);
                    prop_assert_eq!(usize::from(buffer.pieces), segments.len());
                    prop_assert_eq!(buffer.room, room);
                    one.queue.complete(chain, 7);
                    other.queue.complete_buffers(&[buffer], 7.min(buffer.room));
                }
                Some(Err(())) => {
                    prop_assert!(!chain.is_whole());
                    one.queue.complete(chain, 0);
                }
                None => prop_assert!(false, "the request is not there"),
            }
            prop_assert_eq!(one.used(), other.used());
        }
        prop_assert_eq!(one.queue.is_broken(), other.queue.is_broken());
        prop_assert_eq!(one.queue.next_available(), other.queue.next_available());
    }
}
