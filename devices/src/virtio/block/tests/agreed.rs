//! What a driver agreed to and what it set before it starts the device (virtio 1.2, sections 3.1.1,
//! 5.2.5.2 and 5.2.6.2).

use super::*;

/// The cache's mode in the configuration space.
const WRITEBACK: u64 = 0x100 + 32;

fn guest() -> (Guest<Block>, Fake) {
    let fake = Fake::new();
    let device = Block::new(&shape(), Box::new(fake.clone()));
    (Guest::new(device), fake)
}

/// Sets queue and DRIVER_OK, and writes: whether that was durable.
fn writes_durably(guest: &mut Guest<Block>, fake: &Fake) -> bool {
    guest.set_up_queue(0);
    guest.write(0x70, 15);
    ask(guest, &[header(OUT, 0), vec![0; 512]].concat(), 1);
    fake.store().seen.last().expect("a write").3
}

#[test]
fn the_mode_of_the_cache_is_there_once_features_are_agreed_on() {
    for (features, writeback) in [
        (ALL | FEATURE_CONFIG_WCE, 1),
        (ALL & !FEATURE_FLUSH | FEATURE_CONFIG_WCE, 0),
    ] {
        let (mut guest, fake) = guest();
        guest.negotiate(features);
        assert_eq!(config(&mut guest, 32, 1), writeback);
        assert_eq!(writes_durably(&mut guest, &fake), writeback == 0);
        // One that never started leaves nothing behind either.
        guest.negotiate(features);
        guest.write(0x70, 0);
        assert_eq!(config(&mut guest, 32, 1), 1);
    }
}

#[test]
fn a_driver_may_choose_the_mode_of_the_cache_before_it_starts() {
    let (mut guest, fake) = guest();
    let set = |guest: &mut Guest<Block>, mode: u8| {
        let _ = crate::Device::write(&mut guest.mmio, WRITEBACK, &[mode]);
        config(guest, 32, 1)
    };
    guest.negotiate(ALL | FEATURE_CONFIG_WCE);
    assert_eq!(set(&mut guest, 0), 0);
    assert!(writes_durably(&mut guest, &fake));
    assert_eq!(set(&mut guest, 1), 1);
    guest.negotiate(ALL & !FEATURE_FLUSH | FEATURE_CONFIG_WCE);
    assert_eq!(set(&mut guest, 1), 1);
    assert!(!writes_durably(&mut guest, &fake));
    // Not before it agreed to do so, and not without.
    guest.write(0x70, 0);
    assert_eq!(set(&mut guest, 0), 1);
    guest.negotiate(ALL);
    assert_eq!(set(&mut guest, 0), 1);
    assert!(!writes_durably(&mut guest, &fake));
    assert_eq!(guest.mmio.faults(), 0);
}

#[test]
fn bytes_between_fields_are_zero() {
    let (mut guest, _) = guest();
    assert_eq!(config(&mut guest, 33, 1), 0, "unused0");
    for at in 57..60 {
        assert_eq!(config(&mut guest, at, 1), 0, "unused1");
    }
}
