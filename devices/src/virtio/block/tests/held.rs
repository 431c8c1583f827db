//! A machine that is held while requests are under way, and goes on with this disk or another one.

use super::*;
use crate::Device;
use crate::virtio::{FEATURE_EVENT_IDX, lock};

fn disk(fake: &Fake) -> Block {
    Block::new(&shape(), Box::new(fake.clone()))
}

/// Writes a sector full of `fill`; returns where the status byte will be.
fn write(guest: &mut Guest<Block>, sector: u64, fill: u8) -> u64 {
    let bytes = [header(OUT, sector), vec![fill; 512]].concat();
    let (data, status) = (guest.buffer(&bytes), guest.buffer(&[0xee]));
    guest.chain(0, &[(data, bytes.len() as u32, 0), (status, 1, 2)]);
    status
}

fn byte(guest: &Guest<Block>, at: u64) -> u8 {
    guest.memory.read_obj(GuestAddress(at)).expect("memory")
}

#[test]
fn what_is_under_way_is_answered_and_what_waits_is_done_later() {
    for moves in [false, true] {
        let (mut guest, fake) = start(ALL);
        fake.store().holds = true;
        // Four are begun, as many as the engine takes.
        let statuses: Vec<u64> = (0..6).map(|at| write(&mut guest, at, 7)).collect();
        guest.kick(0);
        assert_eq!(fake.store().held.len(), 4);
        guest.mmio.quiesce();
        assert_eq!(guest.used(0).len(), 4);
        assert_eq!(guest.interrupts(), 1);
        assert!(fake.store().memory.is_none(), "it has guest memory still");
        let bytes: Vec<u8> = statuses.iter().map(|at| byte(&guest, *at)).collect();
        assert_eq!(bytes, [OK, OK, OK, OK, 0xee, 0xee]);
        fake.store().holds = false;
        match moves {
            false => guest.pause(),
            true => drop(guest.move_to(disk(&fake))),
        }
        assert_eq!(guest.used(0).len(), 2);
        assert!(statuses.iter().all(|at| byte(&guest, *at) == OK));
        assert_eq!(fake.store().disk[..6 * 512], [7; 6 * 512]);
    }
}

#[test]
fn a_reset_while_the_machine_is_held_forgets_all() {
    let (mut guest, fake) = start(ALL | FEATURE_CONFIG_WCE);
    let _ = guest.mmio.write(0x120, &[0]);
    guest.mmio.quiesce();
    guest.write(0x70, 0);
    guest.mmio.resume();
    assert_eq!(guest.read(0x120) & 0xff, 1, "the cache is as at first");
    guest.start(ALL);
    write(&mut guest, 0, 9);
    guest.kick(0);
    assert_eq!(guest.used(0).len(), 1);
    assert_eq!(
        fake.store().seen.last(),
        Some(&(Operation::Write, 0, 512, false))
    );
}

#[test]
fn the_caches_mode_is_as_the_driver_set_it() {
    for moves in [false, true] {
        let (mut guest, fake) = start(ALL | FEATURE_CONFIG_WCE);
        let _ = guest.mmio.write(0x120, &[0]);
        match moves {
            false => guest.pause(),
            true => drop(guest.move_to(disk(&fake))),
        }
        assert_eq!(guest.read(0x120) & 0xff, 0);
        write(&mut guest, 0, 9);
        guest.kick(0);
        assert_eq!(
            fake.store().seen.last(),
            Some(&(Operation::Write, 0, 512, true))
        );
        assert_eq!(
            guest.interrupts(),
            1,
            "one request, and no news of the configuration"
        );
    }
}

/// An engine during each of whose requests somebody begins to wait for the device.
#[derive(Clone, Default)]
struct Wanting(Arc<Mutex<(usize, Option<Arc<AtomicBool>>)>>);

impl Engine for Wanting {
    fn start(&mut self, _memory: &Arc<GuestMemoryMmap>) {}

    fn begin(&mut self, _request: &Request<'_>) -> Option<Outcome> {
        let (done, wanted) = &mut *lock(&self.0);
        *done += 1;
        if let Some(wanted) = wanted {
            wanted.store(true, Ordering::Release);
        }
        Some(Outcome::Done)
    }

    fn stop(&mut self) {}
}

#[test]
fn whoever_waits_for_a_disk_waits_for_one_request() {
    let engine = Wanting::default();
    let device = Block::new(&shape(), Box::new(engine.clone()));
    let wanted = device.wanted_flag().expect("it has many requests to serve");
    let mut guest = Guest::started(device, ALL);
    guest.kick(0);
    lock(&engine.0).1 = Some(Arc::clone(&wanted));
    for sector in 0..5 {
        write(&mut guest, sector, 7);
    }
    for done in 1..=5 {
        lock(&guest.device).kicked(0);
        assert_eq!(lock(&engine.0).0, done);
        assert_eq!(guest.used(0).len(), 1, "what was done is told");
        // Whoever waited has it, and is done; then it goes on by itself.
        wanted.store(false, Ordering::Release);
        assert!(guest.mmio.kicks()[0].read().is_ok(), "it forgets the rest");
    }
    guest.kick(0);
    assert_eq!(lock(&engine.0).0, 5);
}

#[test]
fn another_image_is_refused() {
    let state = DeviceState::Block(BlockState {
        capacity: 512,
        writeback: true,
    });
    let error = disk(&Fake::new()).restore(&state).expect_err("refused");
    assert_eq!(
        error.0,
        "the disk has 65536 bytes, and had 512 when it was saved; it needs the same image"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Wherever the machine is held, whatever the engine has under way: each write is answered
    /// once, and the disk is what was written to it in the order of the answers.
    #[test]
    fn no_request_is_lost_or_repeated(
        steps in prop::collection::vec((0..6_u8, 0..SIZE as u64 / 512, 1..=255_u8), 1..120),
        event_idx: bool,
    ) {
        let features = ALL | if event_idx { FEATURE_EVENT_IDX } else { 0 };
        let (mut guest, fake) = start(features);
        let (mut made, mut answered) = (0, 0);
        let mut statuses = Vec::new();
        for (what, sector, fill) in steps {
            match what {
                0..=1 if made - answered < 16 => {
                    statuses.push(write(&mut guest, sector, fill));
                    made += 1;
                    guest.kick(0);
                }
                2 => fake.store().holds = fill & 1 == 0,
                3 => {
                    let count = fake.store().held.len();
                    if count > 0 {
                        fake.store().release(usize::from(fill) % count);
                        lock(&guest.device).ready(0);
                        guest.kick(0);
                    }
                }
                4 => guest.pause(),
                5 => drop(guest.move_to(disk(&fake))),
                _ => {}
            }
            answered += guest.used(0).len();
            prop_assert!(answered <= made);
        }
        guest.pause();
        fake.store().holds = false;
        guest.pause();
        answered += guest.used(0).len();
        prop_assert_eq!(answered, made);
        prop_assert_eq!(fake.store().seen.len(), made, "each was done once");
        prop_assert!(statuses.iter().all(|at| byte(&guest, *at) == OK));
        prop_assert!(!guest.is_broken());
    }
}
