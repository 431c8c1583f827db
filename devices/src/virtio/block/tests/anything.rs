//! Any reads and writes, cut in any way, and any descriptors.

use super::*;

/// A request as a driver makes it, with its buffers cut at random.
#[derive(Clone, Debug)]
struct Random {
    kind: u32,
    sector: u64,
    sectors: u64,
    fill: u8,
    cuts: Vec<usize>,
}

fn random() -> impl Strategy<Value = Random> {
    let kind = prop::sample::select(vec![IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES]);
    let cuts = prop::collection::vec(1_usize..900, 0..6);
    (kind, 0_u64..132, 0_u64..8, any::<u8>(), cuts).prop_map(
        |(kind, sector, sectors, fill, cuts)| Random {
            kind,
            sector,
            sectors,
            fill,
            cuts,
        },
    )
}

/// Puts buffers at the places where a number of bytes is cut.
fn cut(total: usize, cuts: &[usize]) -> Vec<usize> {
    let mut left = total;
    let mut sizes = Vec::new();
    for size in cuts {
        let size = (*size).min(left);
        if size > 0 {
            sizes.push(size);
        }
        left -= size;
    }
    if left > 0 {
        sizes.push(left);
    }
    sizes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_disk_is_what_was_written_to_it(requests in prop::collection::vec(random(), 1..40)) {
        let (mut guest, fake) = start(ALL);
        let mut model = fake.store().disk.clone();
        for request in requests {
            let bytes = request.sectors as usize * 512;
            let start = request.sector as usize * 512;
            let fits = start + bytes <= SIZE;
            let (mut readable, mut room) = (header(request.kind, request.sector), 1);
            match request.kind {
                OUT => readable.extend(vec![request.fill; bytes]),
                IN => room += bytes,
                GET_ID => room += 20,
                DISCARD | WRITE_ZEROES => {
                    readable.extend(range(request.sector, request.sectors as u32, 0));
                }
                _ => {}
            }
            let mut parts = Vec::new();
            let mut at = 0;
            for size in cut(readable.len(), &request.cuts) {
                let address = guest.buffer(&readable[at..at + size]);
                parts.push((address, size as u32, 0));
                at += size;
            }
            let rooms: Vec<(u64, usize)> = cut(room, &request.cuts)
                .into_iter()
                .map(|size| (guest.buffer(&vec![0xee; size]), size))
                .collect();
            parts.extend(rooms.iter().map(|(address, size)| (*address, *size as u32, 2)));
            guest.chain(0, &parts);
            guest.kick(0);
            prop_assert_eq!(guest.used(0).len(), 1);
            let mut data = Vec::new();
            for (address, size) in rooms {
                let mut part = vec![0; size];
                guest.memory.read_slice(&mut part, GuestAddress(address)).expect("memory");
                data.extend(part);
            }
            let whole_disk = matches!(request.kind, FLUSH | GET_ID);
            let wanted = if fits || whole_disk { OK } else { IOERR };
            prop_assert_eq!(data.pop(), Some(wanted));
            if fits {
                match request.kind {
                    OUT => model[start..start + bytes].fill(request.fill),
                    WRITE_ZEROES => model[start..start + bytes].fill(0),
                    IN => prop_assert_eq!(&data[..], &model[start..start + bytes]),
                    _ => {}
                }
            }
            prop_assert_eq!(&fake.store().disk, &model);
        }
    }

    #[test]
    fn nothing_that_a_driver_writes_does_harm(
        chains in prop::collection::vec(
            prop::collection::vec((any::<u32>(), 0_u32..70_000, 0_u16..8), 1..6),
            1..12,
        ),
        headers in prop::collection::vec((0_u32..16, any::<u64>(), any::<bool>()), 12),
        config in prop::collection::vec((0_u64..80, any::<u32>()), 0..4),
    ) {
        let (mut guest, fake) = start(ALL | FEATURE_CONFIG_WCE);
        for (chain, (kind, sector, near)) in chains.iter().zip(headers) {
            let sector = if near { sector % 130 } else { sector };
            let header = guest.buffer(&header(kind, sector));
            let parts: Vec<(u64, u32, u16)> = chain
                .iter()
                .enumerate()
                .map(|(index, (address, len, flags))| match index {
                    0 => (header, 16, 0),
                    // Mostly within memory, and never in the rings.
                    _ => (BASE + (1 << 20) + u64::from(*address) % MEMORY as u64, *len, flags & 6),
                })
                .collect();
            guest.chain(0, &parts);
            guest.kick(0);
        }
        for (offset, value) in config {
            let _ = crate::Device::write(&mut guest.mmio, 0x100 + offset, &value.to_le_bytes());
        }
        guest.used(0);
        // Whatever it was, a reset makes it good.
        guest.start(ALL);
        fake.store().disk.fill(3);
        prop_assert_eq!(guest.answer(0, &[&header(IN, 1)], &[1])[0], OK);
    }
}
