//! The register state machine, driven correctly and incorrectly.

use crate::virtio::VirtioDevice;
use std::collections::BTreeMap;

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::*;
use crate::fake::FakeLine;
use crate::virtio::fake::kept::{Keeper, NOT_OFFERED, OFFERED};
use crate::virtio::fake::{BASE, Guest};
use crate::virtio::transport::FEATURES_OK;
use crate::virtio::{ConfigSpace, FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1};

/// A page that records what is stored.
#[derive(Default)]
struct RecordingPage(Mutex<BTreeMap<usize, u32>>);

impl RegisterPage for RecordingPage {
    fn store(&self, offset: usize, value: u32) {
        lock(&self.0).insert(offset, value);
    }
}

impl RecordingPage {
    fn load(&self, offset: usize) -> u32 {
        lock(&self.0).get(&offset).copied().unwrap_or(0)
    }
}

mod held;
mod page;
mod queues;

fn guest() -> Guest<Keeper> {
    Guest::new(Keeper::new())
}

/// Writes the driver's features; returns whether FEATURES_OK stays set.
fn negotiate(guest: &mut Guest<Keeper>, features: u64) -> bool {
    guest.write(STATUS.into(), 0);
    guest.write(STATUS.into(), 3);
    for half in [0, 1] {
        guest.write(DRIVER_FEATURES_SEL.into(), half);
        let bits = (features >> (32 * half)) as u32;
        guest.write(DRIVER_FEATURES.into(), bits);
    }
    guest.write(STATUS.into(), 3 | FEATURES_OK);
    guest.read(STATUS.into()) & FEATURES_OK != 0
}

#[test]
fn the_window_identifies_itself() {
    let mut guest = guest();
    assert_eq!(guest.read(MAGIC.into()), 0x7472_6976);
    assert_eq!(guest.read(VERSION.into()), 2);
    assert_eq!(guest.read(DEVICE_ID.into()), 42);
    assert_eq!(guest.read(STATUS.into()), 0);
    // No shared memory, whichever is asked for.
    guest.write(SHM_SEL.into(), 1);
    assert_eq!(guest.read(SHM_LEN.into()), u32::MAX);
    assert_eq!(guest.mmio.faults(), 0);
}

#[test]
fn features_come_in_halves() {
    let mut guest = guest();
    let mut offered = |half| {
        guest.write(DEVICE_FEATURES_SEL.into(), half);
        guest.read(DEVICE_FEATURES.into())
    };
    let all = OFFERED | FEATURE_VERSION_1 | FEATURE_INDIRECT | FEATURE_EVENT_IDX;
    assert_eq!(offered(1), (all >> 32) as u32);
    assert_eq!(offered(0), all as u32);
    assert_eq!(offered(2), 0);
    assert_eq!(offered(u32::MAX), 0);
}

#[test]
fn queues_show_their_maximum_size() {
    let mut guest = guest();
    for (queue, size) in [(0, 64), (1, 4), (2, 0), (u32::MAX, 0)] {
        guest.write(QUEUE_SEL.into(), queue);
        assert_eq!(guest.read(QUEUE_SIZE_MAX.into()), size);
        assert_eq!(guest.read(QUEUE_READY.into()), 0);
        guest.write(QUEUE_READY.into(), 1);
        assert_eq!(guest.read(QUEUE_READY.into()), u32::from(size > 0));
    }
}

#[test]
fn the_device_gets_the_negotiated_features() {
    let mut guest = guest();
    guest.start(OFFERED | FEATURE_EVENT_IDX);
    let agreed = OFFERED | FEATURE_EVENT_IDX | FEATURE_VERSION_1;
    assert_eq!(lock(&guest.device).features, [agreed]);
    assert_eq!(guest.mmio.faults(), 0);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let mut guest = guest();
    assert!(!negotiate(&mut guest, FEATURE_VERSION_1 | NOT_OFFERED));
    assert!(!negotiate(&mut guest, FEATURE_VERSION_1 | 1 << 63));
    // A legacy driver.
    assert!(!negotiate(&mut guest, OFFERED));
    // It may try again without a reset.
    guest.write(DRIVER_FEATURES_SEL.into(), 1);
    guest.write(DRIVER_FEATURES.into(), (FEATURE_VERSION_1 >> 32) as u32);
    guest.write(STATUS.into(), 3 | FEATURES_OK);
    assert_eq!(guest.read(STATUS.into()), 3 | FEATURES_OK);
}

#[test]
fn features_are_fixed_once_negotiated() {
    let mut guest = guest();
    assert!(negotiate(&mut guest, FEATURE_VERSION_1));
    guest.write(DRIVER_FEATURES_SEL.into(), 0);
    guest.write(DRIVER_FEATURES.into(), OFFERED as u32);
    assert_eq!(guest.mmio.faults(), 1);
    for queue in 0..2 {
        guest.set_up_queue(queue);
    }
    guest.write(STATUS.into(), 3 | FEATURES_OK | DRIVER_OK);
    assert_eq!(lock(&guest.device).features, [FEATURE_VERSION_1]);
}

#[test]
fn without_features_ok_nothing_starts() {
    let mut guest = guest();
    for queue in 0..2 {
        guest.set_up_queue(queue);
    }
    guest.write(STATUS.into(), 3 | DRIVER_OK);
    assert!(guest.is_broken());
    assert!(lock(&guest.device).features.is_empty());
    assert_eq!(guest.mmio.faults(), 1);
    // It is too late now.
    guest.write(DRIVER_FEATURES_SEL.into(), 1);
    guest.write(DRIVER_FEATURES.into(), (FEATURE_VERSION_1 >> 32) as u32);
    guest.write(STATUS.into(), 3 | FEATURES_OK | DRIVER_OK);
    assert!(guest.is_broken());
    assert!(lock(&guest.device).features.is_empty());
    // After a reset it works.
    guest.start(0);
    assert!(!guest.is_broken());
}

#[test]
fn a_device_starts_with_the_queues_that_are_ready() {
    let mut guest = guest();
    guest.negotiate(0);
    guest.set_up_queue(1);
    guest.write(STATUS.into(), 15);
    let device = lock(&guest.device);
    assert!(device.queues[0].is_none());
    assert_eq!(device.queues[1].as_ref().expect("a queue").size(), 4);
    drop(device);
    guest.request(1, &[b"x"], &[8]);
    guest.kick(1);
    guest.kick(0);
    lock(&guest.device).answer_all();
    assert_eq!(guest.used(1)[0].1, b"answer");
}

#[test]
fn an_invalid_queue_asks_for_a_reset() {
    let wrong: [(u32, u32); 7] = [
        (QUEUE_SIZE, 0),
        (QUEUE_SIZE, 3),
        (QUEUE_SIZE, 128),
        (QUEUE_SIZE, 0x1_0040),
        (QUEUE_DESC, 0),
        (QUEUE_DRIVER, 0x10_0001),
        (QUEUE_DEVICE + 4, 0x8000),
    ];
    for (register, value) in wrong {
        let mut guest = guest();
        guest.negotiate(0);
        guest.set_up_queue(0);
        guest.write(register.into(), value);
        guest.write(STATUS.into(), 15);
        assert!(guest.is_broken(), "{register:#x} is {value:#x}");
        assert!(lock(&guest.device).features.is_empty());
        assert_eq!(guest.read(INTERRUPT_STATUS.into()) & CONFIG_CHANGED, 2);
        assert_eq!(guest.interrupts(), 1);
        guest.start(0);
        assert!(!guest.is_broken());
    }
}

#[test]
fn a_device_that_does_not_start_asks_for_a_reset() {
    let mut guest = guest();
    lock(&guest.device).refuses = true;
    guest.negotiate(0);
    guest.write(STATUS.into(), 15);
    assert!(guest.is_broken());
    guest.write(STATUS.into(), 0);
    assert_eq!(lock(&guest.device).stops, 1, "what it began ends");
    assert_eq!(guest.read(STATUS.into()), 0);
}

#[test]
fn registers_of_a_running_device_are_fixed() {
    let mut guest = guest();
    guest.start(0);
    guest.write(QUEUE_SEL.into(), 0);
    let mut faults = 0;
    for register in [
        QUEUE_SIZE,
        QUEUE_DESC,
        QUEUE_DESC + 4,
        QUEUE_DRIVER,
        QUEUE_DEVICE,
        DRIVER_FEATURES,
    ] {
        guest.write(register.into(), 0);
        faults += 1;
        assert_eq!(guest.mmio.faults(), faults, "{register:#x}");
    }
    assert_eq!(guest.read(QUEUE_READY.into()), 1);
    assert!(!guest.is_broken());
    guest.request(0, &[b"x"], &[8]);
    guest.kick(0);
    lock(&guest.device).answer_all();
    assert_eq!(guest.used(0)[0].1, b"answer");
}

#[test]
fn status_bits_stay_until_a_reset() {
    let mut guest = guest();
    guest.start(0);
    // Fewer bits than are set, and one that only the device sets.
    guest.write(STATUS.into(), 1);
    guest.write(STATUS.into(), NEEDS_RESET);
    assert_eq!(guest.read(STATUS.into()), 15);
    // FAILED.
    guest.write(STATUS.into(), 128);
    assert_eq!(guest.read(STATUS.into()), 143);
    assert_eq!(lock(&guest.device).features.len(), 1, "it starts once");
}

#[test]
fn a_reset_ends_all_work() {
    let mut guest = guest();
    guest.start(0);
    guest.request(0, &[b"x"], &[8]);
    guest.kick(0);
    assert_eq!(lock(&guest.device).kept.len(), 1);
    // A kick that is still pending.
    guest.write(QUEUE_NOTIFY, 0);
    for select in [QUEUE_SEL, DEVICE_FEATURES_SEL, DRIVER_FEATURES_SEL] {
        guest.write(select.into(), 1);
    }
    guest.write(STATUS.into(), 0);
    assert_eq!(lock(&guest.device).stops, 1);
    assert!(guest.mmio.kicks()[0].read().is_err(), "it led nowhere");
    assert_eq!(guest.read(STATUS.into()), 0);
    assert_eq!(guest.read(INTERRUPT_STATUS.into()), 0);
    assert_eq!(guest.read(QUEUE_READY.into()), 0);
    assert_eq!(guest.read(QUEUE_SIZE_MAX.into()), 64, "queue 0 is selected");
    let interrupts = guest.interrupts();
    lock(&guest.device).answer_all();
    assert!(guest.used(0).is_empty());
    assert_eq!(guest.interrupts(), interrupts);
    // A second reset has nothing to end.
    guest.write(STATUS.into(), 0);
    assert_eq!(lock(&guest.device).stops, 1);
    // Selectors and features are reset.
    let low = guest.read(DEVICE_FEATURES.into());
    assert_eq!(u64::from(low) & OFFERED, OFFERED);
    guest.write(STATUS.into(), 3 | FEATURES_OK);
    assert_eq!(guest.read(STATUS.into()), 3);
    guest.write(DRIVER_FEATURES.into(), OFFERED as u32);
    guest.write(DRIVER_FEATURES_SEL.into(), 1);
    guest.write(DRIVER_FEATURES.into(), 1);
    guest.write(STATUS.into(), 3 | FEATURES_OK);
    assert_eq!(guest.read(STATUS.into()), 3 | FEATURES_OK);
}

#[test]
fn a_device_can_be_started_again_and_again() {
    let mut guest = guest();
    for round in 0..300 {
        let features = if round % 2 == 0 { 0 } else { FEATURE_EVENT_IDX };
        guest.start(features);
        for queue in [0, 1] {
            guest.request(queue, &[b"x"], &[6]);
            guest.kick(queue);
        }
        // Some rounds end with requests in flight.
        if round % 3 > 0 {
            lock(&guest.device).answer_all();
            assert_eq!(guest.used(0)[0].1, b"answer");
            assert_eq!(guest.used(1)[0].1, b"answer");
        }
    }
    assert_eq!(guest.mmio.faults(), 0);
    assert_eq!(lock(&guest.device).stops, 299);
}

#[test]
fn dropping_a_window_ends_all_work() {
    let mut guest = guest();
    guest.start(0);
    let device = Arc::clone(&guest.device);
    drop(guest);
    assert_eq!(lock(&device).stops, 1);
}

#[test]
fn kicks_reach_their_queue() {
    let mut guest = guest();
    guest.start(0);
    guest.write(QUEUE_NOTIFY, 1);
    assert!(guest.mmio.kicks()[0].read().is_err());
    assert_eq!(guest.mmio.kicks()[1].read().expect("a kick"), 1);
    for queue in [2, 0xffff, u32::MAX] {
        let before = guest.mmio.faults();
        guest.write(QUEUE_NOTIFY, queue);
        assert_eq!(guest.mmio.faults(), before + 1);
    }
    assert!(!guest.is_broken());
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_recovers() {
    let mut guest = guest();
    guest.start(0);
    guest.make_available(0, 9999);
    guest.kick(0);
    assert!(guest.is_broken());
    assert_eq!(guest.read(STATUS.into()), 15 | NEEDS_RESET);
    assert_eq!(guest.read(INTERRUPT_STATUS.into()), USED | CONFIG_CHANGED);
    assert_eq!(guest.interrupts(), 1);
    // The other queue works on.
    guest.request(1, &[], &[6]);
    guest.kick(1);
    lock(&guest.device).answer_all();
    assert_eq!(guest.used(1).len(), 1);
    // Only a reset clears the bit.
    guest.write(STATUS.into(), 15);
    assert!(guest.is_broken());
    guest.start(0);
    assert_eq!(guest.read(INTERRUPT_STATUS.into()), USED);
    guest.request(0, &[], &[6]);
    guest.kick(0);
    lock(&guest.device).answer_all();
    assert_eq!(guest.used(0)[0].1, b"answer");
}

#[test]
fn a_configuration_change_interrupts_and_is_acknowledged() {
    let mut guest = guest();
    guest.start(0);
    let before = guest.read(CONFIG_GENERATION.into());
    let (config, link) = {
        let device = lock(&guest.device);
        (device.config(), device.link.clone().expect("a link"))
    };
    config.change(|bytes| bytes[1] = 99);
    link.config_changed();
    assert_ne!(guest.read(CONFIG_GENERATION.into()), before);
    assert_eq!(guest.read(CONFIG as u64), 0x0403_6301);
    assert_eq!(guest.read(INTERRUPT_STATUS.into()), USED | CONFIG_CHANGED);
    assert_eq!(guest.interrupts(), 1);
    // Acknowledging the other bit does not clear this one.
    guest.write(INTERRUPT_ACK, USED);
    assert_eq!(guest.read(INTERRUPT_STATUS.into()), USED | CONFIG_CHANGED);
    guest.write(INTERRUPT_ACK, CONFIG_CHANGED);
    assert_eq!(guest.read(INTERRUPT_STATUS.into()), USED);
}

#[test]
fn the_configuration_is_read_and_written_in_any_width() {
    let mut guest = guest();
    for (offset, len, expected) in [
        (0, 1, vec![1]),
        (3, 2, vec![4, 5]),
        (8, 4, vec![9, 10, 0, 0]),
        (2, 8, vec![3, 4, 5, 6, 7, 8, 9, 10]),
        (200, 4, vec![0; 4]),
    ] {
        let mut data = vec![0xff; len];
        let _ = guest.mmio.read(CONFIG as u64 + offset, &mut data);
        assert_eq!(data, expected);
    }
    let _ = guest.mmio.write(CONFIG as u64 + 5, &[7, 8]);
    let _ = guest.mmio.write(CONFIG as u64 + 250, &[9]);
    let writes = lock(&guest.device).writes.clone();
    assert_eq!(writes, [(5, vec![7, 8]), (250, vec![9])]);
    // The device decides what it accepts.
    assert_eq!(guest.read(CONFIG as u64 + 4), 0x0807_0605);
}

#[test]
fn invalid_accesses_are_counted() {
    let mut guest = guest();
    for offset in [MAGIC, DEVICE_FEATURES, QUEUE_SIZE_MAX, 0x0f8, 0x001] {
        guest.write(offset.into(), 1);
    }
    assert_eq!(guest.mmio.faults(), 5);
    for data in [&[1][..], &[1, 0], &[1; 8], &[]] {
        let _ = guest.mmio.write(STATUS.into(), data);
    }
    assert_eq!(guest.mmio.faults(), 9);
    assert_eq!(guest.read(STATUS.into()), 0);
    let mut wide = [0xff; 8];
    let _ = guest.mmio.read(MAGIC.into(), &mut wide);
    assert_eq!(wide, [0; 8]);
}

#[test]
fn a_driver_without_event_indexes_is_always_interrupted_and_one_with_them_as_it_asks() {
    for (features, expected) in [(0, 3), (FEATURE_EVENT_IDX, 1)] {
        let mut guest = guest();
        guest.start(features);
        // used_event stays 0: the first request only.
        for _ in 0..3 {
            guest.request(0, &[], &[6]);
            guest.kick(0);
            lock(&guest.device).answer_all();
        }
        assert_eq!(guest.interrupts(), expected);
        assert_eq!(guest.used(0).len(), 3);
    }
}

#[test]
fn ring_addresses_take_effect_at_the_start() {
    let mut guest = guest();
    guest.negotiate(0);
    guest.write(QUEUE_SEL.into(), 0);
    guest.write(QUEUE_DESC.into(), 0xffff_fff0);
    guest.set_up_queue(0);
    guest.write(STATUS.into(), 15);
    assert!(!guest.is_broken());
}
