//! A queue that goes on in another one, made where the first one stood.

use super::*;

impl Bench {
    /// The work goes on in a new queue on the same rings, as after a pause or in another process.
    fn move_on(&mut self, event_idx: bool) -> Position {
        let position = self.queue.quiesce();
        let queue = Virtqueue::new(
            0,
            (SIZE, SIZE),
            (RINGS, position),
            event_idx,
            Arc::clone(&self.memory),
            Arc::clone(&self.link),
            Arc::clone(&self.kick),
        );
        self.queue = queue.expect("a queue");
        position
    }

    /// Heads in the used ring in order; `most` of the last ones.
    fn answered(&self, most: u16) -> Vec<u32> {
        let index = self.used();
        let slots = (0..most).map(|back| index.wrapping_sub(most - back) % SIZE);
        let entries = slots.map(|slot| RINGS.used + 4 + 8 * u64::from(slot));
        let read = |at: u64| self.memory.read_obj(GuestAddress(at)).expect("memory");
        entries.map(read).collect()
    }
}

#[test]
fn requests_that_are_handed_back_come_again_in_order() {
    let mut bench = Bench::new();
    for _ in 0..5 {
        bench.offer_plain();
    }
    let first = bench.queue.pop().expect("a request");
    bench.queue.complete(first, 0);
    let held: Vec<Chain> = std::iter::from_fn(|| bench.queue.pop()).collect();
    assert_eq!(held.len(), 4);
    bench.queue.hand_back(held);
    let position = bench.move_on(false);
    let wanted = Position {
        next_available: 1,
        next_used: 1,
        broken: false,
    };
    assert_eq!(position, wanted);
    assert_eq!(bench.interrupts(), 1, "the driver hears what was completed");
    let again = std::iter::from_fn(|| bench.queue.pop());
    let heads: Vec<u16> = again.map(|chain| chain.head()).collect();
    assert_eq!(heads, [1, 2, 3, 4]);
}

#[test]
fn a_ring_that_was_broken_stays_so_where_it_goes_on() {
    let mut bench = Bench::new();
    bench.offer(SIZE);
    bench.offer_plain();
    assert!(bench.queue.pop().is_none());
    assert!(bench.move_on(false).broken);
    assert!(bench.queue.pop().is_none() && bench.queue.is_broken());
    let resets = bench.heard.resets.load(Ordering::Relaxed);
    assert_eq!(resets, 1, "once is enough");
}

/// What driver and device do in turn.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The driver makes so many requests, as far as it has descriptors.
    Offer(u8),
    /// The device takes so many.
    Pop(u8),
    /// It completes so many of those it has, from the oldest on.
    Complete(u8),
    /// It hands back what it has; the work goes on in another queue.
    Move,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (1..6_u8).prop_map(Step::Offer),
        (1..6_u8).prop_map(Step::Pop),
        (1..6_u8).prop_map(Step::Complete),
        Just(Step::Move),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    /// Wherever the work goes on in another queue, and however often: each request is answered
    /// once and in order, from any index on, and the driver is interrupted for what it has not
    /// seen.
    #[test]
    fn no_request_is_lost_or_repeated_where_a_queue_goes_on(
        steps in steps(),
        from: u16,
        event_idx: bool,
    ) {
        let mut bench = Bench::with(event_idx);
        // As if so many requests had been served before.
        bench.set_available(from);
        bench.put(RINGS.used + 2, &from.to_le_bytes());
        bench.queue.adopt(None);
        // The next interrupt is wanted for what is completed next.
        let used_event = RINGS.available + 4 + 2 * u64::from(SIZE);
        let mut held = std::collections::VecDeque::new();
        let (mut offered, mut answered) = (from, from);
        for step in steps {
            match step {
                Step::Offer(count) => {
                    for _ in 0..count {
                        if offered.wrapping_sub(answered) < SIZE {
                            bench.offer_plain();
                            offered = offered.wrapping_add(1);
                        }
                    }
                }
                Step::Pop(count) => {
                    held.extend((0..count).map_while(|_| bench.queue.pop()));
                }
                Step::Complete(count) => {
                    for _ in 0..count {
                        let Some(chain) = held.pop_front() else { break };
                        let chain: Chain = chain;
                        let wanted = answered % SIZE;
                        prop_assert_eq!(chain.head(), wanted);
                        bench.queue.complete(chain, 4);
                        answered = answered.wrapping_add(1);
                        prop_assert_eq!(bench.answered(1), [u32::from(wanted)]);
                    }
                }
                Step::Move => {
                    let before = bench.interrupts();
                    let heard = bench.queue.unsignalled;
                    bench.put(used_event, &answered.wrapping_sub(1).to_le_bytes());
                    bench.queue.hand_back(held.drain(..));
                    let position = bench.move_on(event_idx);
                    prop_assert_eq!(position.next_available, answered);
                    prop_assert_eq!(position.next_used, answered);
                    prop_assert_eq!(bench.interrupts() - before, usize::from(heard));
                }
            }
            prop_assert_eq!(bench.used(), answered);
        }
        prop_assert!(!bench.queue.is_broken());
    }
}
