//! Rings and descriptors with anything in them.

use super::*;

/// Numbers that look random, the same for each seed.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Addresses: most of them in memory or near its edges.
fn addresses() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0x1_0000..0x2_8000_u64,
        2 => 0x4_0000..0x4_8000_u64,
        1 => 0x2_7ff0..0x2_8010_u64,
        1 => 0x4_7ff0..0x4_8010_u64,
        1 => Just(TABLE),
        1 => any::<u64>(),
        1 => (u64::MAX - 16)..=u64::MAX,
    ]
}

fn lengths() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0..64_u32,
        2 => (0..8_u32).prop_map(|count| count * 16),
        1 => 0..0x2_0000_u32,
        1 => any::<u32>(),
    ]
}

pub(super) type Entry = ((u64, u32), u16, u16);

pub(super) fn entries() -> impl Strategy<Value = Vec<Entry>> {
    let entry = ((addresses(), lengths()), 0..8_u16, 0..SIZE + 2);
    prop::collection::vec(entry, usize::from(SIZE))
}

/// Takes all there is, writes to all writable buffers and completes. Checks that nothing else was
/// touched.
fn exhaust(bench: &mut Bench) -> Result<(), TestCaseError> {
    let before = bench.dump();
    let mut touched = vec![(RINGS.used, 6 + 8 * usize::from(SIZE))];
    let mut taken = 0;
    // What it writes may be the ring itself, and look like ever more requests.
    while taken < 64
        && let Some(chain) = bench.queue.pop()
    {
        taken += 1;
        let memory = &bench.memory;
        for segment in chain.readable().iter().chain(chain.writable()) {
            prop_assert!(segment.len > 0);
            prop_assert!(memory.check_range(segment.address, segment.len));
        }
        let readable = chain.readable_len();
        let mut data = vec![0; readable.min(1 << 20) + 1];
        prop_assert_eq!(chain.read(memory, 0, &mut data), readable.min(data.len()));
        let writable = chain.writable_len();
        let data = vec![0xa5; writable.min(1 << 20) + 1];
        prop_assert_eq!(chain.write(memory, 0, &data), writable.min(data.len()));
        let written = chain.writable().iter();
        touched.extend(written.map(|segment| (segment.address.0, segment.len)));
        bench.queue.complete(chain, u32::MAX);
    }
    bench.queue.signal();
    let is_touched = |address: u64| {
        touched
            .iter()
            .any(|(start, len)| address >= *start && address - start < *len as u64)
    };
    for ((start, _), (before, after)) in BANKS.into_iter().zip(before.iter().zip(bench.dump())) {
        for (offset, (old, new)) in before.iter().zip(after).enumerate() {
            let address = start + offset as u64;
            prop_assert!(
                *old == new || is_touched(address),
                "{:#x} was written",
                address
            );
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn no_descriptors_do_harm(
        direct in entries(),
        indirect in entries(),
        heads in prop::collection::vec(0..SIZE + 1, 1..usize::from(SIZE)),
        event_idx: bool,
    ) {
        let mut bench = Bench::with(event_idx);
        for (table, entries) in [(RINGS.descriptors, direct), (TABLE, indirect)] {
            for (index, (buffer, flags, next)) in (0..).zip(entries) {
                bench.descriptor(table, index, buffer, flags, next);
            }
        }
        for head in heads {
            bench.offer(head);
        }
        exhaust(&mut bench)?;
    }

    #[test]
    fn no_bytes_do_harm(seed in 1..u64::MAX, available in prop::option::of(0..=SIZE), event_idx: bool) {
        let mut bench = Bench::with(event_idx);
        let mut noise = Noise(seed);
        for (start, size) in BANKS {
            let mut bytes = vec![0; size];
            noise.fill(&mut bytes);
            bench.put(start, &bytes);
        }
        if let Some(available) = available {
            bench.set_available(available);
        }
        exhaust(&mut bench)?;
    }

    #[test]
    fn parts_are_what_slicing_would_give(
        lens in prop::collection::vec(1..9_usize, 0..6),
        offset in 0..60_usize,
        len in 0..60_usize,
    ) {
        let mut segments = Vec::new();
        let mut all = Vec::new();
        for (index, len) in lens.into_iter().enumerate() {
            let start = 0x100 * index as u64;
            segments.push(segment(start, len));
            all.extend(start..start + len as u64);
        }
        let wanted: Vec<u64> = all.into_iter().skip(offset).take(len).collect();
        let found = parts(&segments, offset, len)
            .flat_map(|part| part.address.0..part.address.0 + part.len as u64);
        prop_assert_eq!(found.collect::<Vec<_>>(), wanted);
    }
}
