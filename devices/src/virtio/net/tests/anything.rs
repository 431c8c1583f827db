//! Frames in any pieces, and any descriptors.

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn each_frame_that_is_sent_leaves_whole_and_in_order(
        frames in prop::collection::vec(
            prop::collection::vec(prop::collection::vec(any::<u8>(), 1..400), 1..8),
            1..40,
        ),
        bare: bool,
        waits in prop::collection::vec(any::<bool>(), 40),
    ) {
        let network = FakeNetwork::new(Wire { bare, ..Wire::default() });
        let mut guest = started(&network, 0);
        let mut expected = Vec::new();
        for (pieces, wait) in frames.iter().zip(waits) {
            network.change(|wire| wire.refuse = wait.then_some(FrameError::Wait));
            let whole = pieces.concat();
            let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            guest.request(TX, &pieces, &[]);
            guest.kick(TX);
            if whole.len() >= HEADER + LEAST_FRAME {
                expected.push((0, whole[if bare { HEADER } else { 0 }..].to_vec()));
            }
            network.change(|wire| wire.refuse = None);
            wake(&guest, 0);
        }
        prop_assert_eq!(guest.used(TX).len(), frames.len());
        prop_assert_eq!(network.sent(), expected);
    }

    #[test]
    fn no_descriptor_makes_the_card_do_more_than_count(
        chains in prop::collection::vec(
            (
                0..3_usize,
                prop::collection::vec(
                    (
                        prop_oneof![
                            (0x10_0000..0x90_0000_u64),
                            any::<u64>(),
                            Just(0x8f_fff0_u64),
                        ],
                        prop_oneof![0..64_u32, 0..0x1_0000_u32, any::<u32>()],
                        prop_oneof![Just(0_u16), Just(2), any::<u16>().prop_map(|flags| flags & !1)],
                    ),
                    1..6,
                ),
            ),
            1..20,
        ),
        sizes in prop::collection::vec(0..=MOST_BYTES - HEADER, 0..8),
        features in any::<u64>(),
        bare: bool,
    ) {
        let network = FakeNetwork::new(Wire {
            bare,
            offloads: GUEST_OFFLOADS | HOST_OFFLOADS,
            ..Wire::default()
        });
        let device = card(&network);
        let features = features & (device.features() | FEATURE_EVENT_IDX);
        let mut guest = Guest::started(device, features);
        for size in sizes {
            network.come(0, &vec![7; size + if bare { 0 } else { HEADER }]);
        }
        for (queue, parts) in chains {
            guest.chain(queue, &parts);
            guest.kick(queue);
            wake(&guest, 0);
            for (_, sent) in network.sent() {
                prop_assert!(sent.len() <= MOST_BYTES);
            }
        }
        // The card is still one that a driver can use.
        network.change(|wire| wire.incoming[0].clear());
        guest.start(MRG_RXBUF);
        guest.request(RX, &[], &[100]);
        network.come(0, &if bare { b"a good frame".to_vec() } else { frame(b"a good frame") });
        wake(&guest, 0);
        prop_assert_eq!(&guest.used(RX)[0].1, &seen(b"a good frame", 1));
    }
}
