//! A disk whose storage is replaced while a guest has it, and one that brings nothing to stable storage.

use super::*;

fn change(guest: &Guest<Block>, size: u64) {
    assert!(lock(&guest.device).change(Change::DiskStorage(size)));
}

#[test]
fn other_storage_comes_after_what_is_under_way_and_the_driver_is_told() {
    let (mut guest, fake) = start(ALL);
    fake.store().holds = true;
    for sector in 0..6 {
        guest.request(0, &[&header(IN, sector)], &[512, 1]);
    }
    guest.kick(0);
    let before = guest.interrupts();
    change(&guest, 100 * 512);
    assert_eq!(fake.store().renewals, [false]);
    assert_eq!(fake.store().waits, 4, "those under way, and no others");
    assert_eq!(guest.used(0).len(), 4);
    assert_eq!(fake.store().held.len(), 2, "the others go to the new one");
    assert_eq!(config(&mut guest, 0, 8), 100);
    assert_eq!(guest.read(0x60) & 2, 2, "a configuration change");
    assert!(guest.interrupts() > before);
    // It is told of one of the same size, too.
    guest.write(0x64, 3);
    change(&guest, 100 * 512);
    assert_eq!(guest.read(0x60) & 2, 2);
}

#[test]
fn a_driver_that_was_held_meanwhile_is_told_when_it_goes_on() {
    let (mut guest, fake) = start(ALL);
    guest.mmio.quiesce();
    change(&guest, 7 * 512);
    lock(&guest.device).set_size(8 * 512);
    assert_eq!(fake.store().renewals, [false]);
    assert_eq!(guest.read(0x60) & 2, 0);
    guest.mmio.resume();
    assert_eq!(guest.read(0x60) & 2, 2);
    assert_eq!(config(&mut guest, 0, 8), 8);
    guest.write(0x64, 3);
    // Once is enough.
    guest.mmio.quiesce();
    guest.mmio.resume();
    assert_eq!(guest.read(0x60) & 2, 0);
}

#[test]
fn a_disk_that_does_not_flush_offers_none_and_does_none() {
    let shape = Shape {
        flushes: false,
        ..shape()
    };
    let offered = features(&shape);
    assert_eq!(offered & (FEATURE_FLUSH | FEATURE_CONFIG_WCE), 0);
    let (mut guest, fake) = start_as(&shape, offered);
    let write = [header(OUT, 0), vec![0; 512]].concat();
    assert_eq!(ask(&mut guest, &write, 1), OK);
    // A driver that tries it all the same.
    assert_eq!(ask(&mut guest, &header(FLUSH, 0), 1), OK);
    let seen = fake.store().seen.clone();
    assert_eq!(seen, [(Operation::Write, 0, 512, false)]);
}
