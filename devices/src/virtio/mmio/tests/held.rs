//! A machine that is paused, saved, and resumed or restored in another.

use super::*;
use crate::virtio::mailbox::direct;
use crate::virtio::{DeviceState, Position, RestoreError};

fn kept(guest: &Guest<Keeper>) -> usize {
    lock(&guest.device).kept.len()
}

#[test]
fn requests_in_flight_are_processed_again_in_order() {
    for moves in [false, true] {
        let mut guest = Guest::started(Keeper::new(), OFFERED);
        let first = guest.request(0, &[b"one"], &[6]);
        guest.kick(0);
        lock(&guest.device).answer_all();
        assert_eq!(guest.used(0)[0].0, first);
        let heads = [guest.request(0, &[], &[6]), guest.request(0, &[], &[6])];
        guest.kick(0);
        assert_eq!(kept(&guest), 2);
        match moves {
            false => guest.pause(),
            true => {
                let state = guest.move_to(Keeper::new());
                let wanted = Position {
                    next_available: 1,
                    next_used: 1,
                    broken: false,
                };
                assert_eq!(state.transport.queues[0].position, wanted);
                assert_eq!(state.transport.queues[1].position, Position::default());
            }
        }
        assert_eq!(kept(&guest), 2);
        lock(&guest.device).answer_all();
        let used = guest.used(0);
        let answered: Vec<u16> = used.iter().map(|(head, _)| *head).collect();
        assert_eq!(answered, heads);
        assert!(used.iter().all(|(_, data)| data == b"answer"));
        assert_eq!(lock(&guest.device).stops, 0, "it is not reset");
    }
}

#[test]
fn registers_read_as_before() {
    let page = Arc::new(RecordingPage::default());
    let mut guest = Guest::started(Keeper::new(), OFFERED);
    for (offset, value) in [(0x14, 1), (0x24, 1), (0x30, 1)] {
        guest.write(offset, value);
    }
    let link = lock(&guest.device).link.clone().expect("it works");
    link.config_changed();
    link.broken(format_args!("it is tried"));
    let all = |mmio: &mut Mmio| -> Vec<[u8; 4]> {
        let read = |offset| {
            let mut data = [0; 4];
            let _ = mmio.read(offset, &mut data);
            data
        };
        (0..WINDOW_SIZE as u64).step_by(4).map(read).collect()
    };
    let before = all(&mut guest.mmio);
    guest.mmio.quiesce();
    let state = guest.mmio.save().expect("it is held");
    let mut other = Mmio::new(
        "other".to_owned(),
        direct(Arc::new(Mutex::new(Keeper::new()))),
        guest.memory.clone(),
        FakeLine::new(),
        None,
        page.clone(),
    )
    .expect("descriptors");
    other.quiesce();
    other.restore(&state).expect("it can be");
    assert_eq!(other.save().as_ref(), Ok(&state));
    assert_eq!(all(&mut other), before);
    for (offset, word) in (0..).step_by(4).zip(&before) {
        assert_eq!(page.load(offset).to_le_bytes(), *word, "{offset:#x}");
    }
    assert_eq!(other.save(), Ok(state));
}

#[test]
fn a_changed_configuration_interrupts_and_changes_the_generation() {
    let mut guest = Guest::started(Keeper::new(), OFFERED);
    let before = guest.read(0xfc);
    let other = Keeper {
        config: ConfigSpace::new(vec![9; 10]),
        ..Keeper::new()
    };
    guest.move_to(other);
    assert_ne!(guest.read(0xfc), before);
    assert_eq!(guest.read(0x60), 3, "used, and configuration changed");
    assert_eq!(guest.interrupts(), 1);
    let before = guest.read(0xfc);
    guest.pause();
    assert_eq!((guest.read(0xfc), guest.interrupts()), (before, 1));
}

#[test]
fn a_driver_that_starts_while_the_machine_is_paused_is_served_on_resume() {
    let mut guest = guest();
    guest.mmio.quiesce();
    guest.start(OFFERED);
    guest.request(0, &[], &[6]);
    assert!(lock(&guest.device).features.is_empty());
    guest.stop_queue(1);
    guest.pause();
    assert_eq!(kept(&guest), 1);
    assert!(lock(&guest.device).queues[1].is_none());
    // So is a driver that goes away meanwhile.
    guest.mmio.quiesce();
    guest.write(0x70, 0);
    guest.mmio.resume();
    let device = lock(&guest.device);
    assert_eq!((device.features.len(), device.stops), (1, 1));
}

#[test]
fn a_device_that_cannot_resume_asks_for_a_reset() {
    let mut guest = Guest::started(Keeper::new(), OFFERED);
    guest.mmio.quiesce();
    lock(&guest.device).refuses = true;
    guest.mmio.resume();
    assert!(guest.is_broken());
    lock(&guest.device).refuses = false;
    guest.start(OFFERED);
    assert!(!guest.is_broken());
}

#[test]
fn a_device_that_did_not_start_is_restored_with_any_queues() {
    let mut guest = guest();
    lock(&guest.device).refuses = true;
    guest.negotiate(OFFERED);
    guest.set_up_queue(0);
    guest.write(STATUS.into(), 15);
    assert!(guest.is_broken());
    guest.write(QUEUE_SEL.into(), 0);
    guest.write(QUEUE_READY.into(), 0);
    guest.mmio.quiesce();
    let state = guest.mmio.save().expect("it is held");
    let mut other = self::guest();
    other.mmio.quiesce();
    other.mmio.restore(&state).expect("it is what it was");
    assert_eq!(other.mmio.save(), Ok(state));
}

#[test]
fn a_running_device_is_not_saved_and_a_used_one_is_not_restored() {
    let mut guest = Guest::started(Keeper::new(), OFFERED);
    let error = guest.mmio.save().expect_err("it works");
    assert_eq!(error.0, "a running device cannot be saved");
    guest.mmio.quiesce();
    let state = guest.mmio.save().expect("it is held");
    let error = guest.mmio.restore(&state).expect_err("it is in use");
    assert_eq!(error.0, "a driver has the device in use already");
}

/// Returns a fresh window's error for a state modified by `change`, and checks that the window is
/// unchanged.
#[track_caller]
fn refused(change: impl FnOnce(&mut MmioState)) -> String {
    let mut guest = Guest::started(Keeper::new(), OFFERED);
    guest.mmio.quiesce();
    let mut state = guest.mmio.save().expect("it is held");
    change(&mut state);
    let mut other = self::guest();
    other.mmio.quiesce();
    let before = other.mmio.save();
    let RestoreError(error) = other.mmio.restore(&state).expect_err("refused");
    assert_eq!(other.mmio.save(), before);
    other.mmio.resume();
    other.start(OFFERED);
    assert!(!error.contains('\n'));
    error
}

#[test]
fn an_invalid_state_is_refused() {
    let error = refused(|state| state.transport.id = 1);
    assert_eq!(error, "the state is that of device ID 1; this is 42");
    let error = refused(|state| state.transport.queues.truncate(1));
    assert_eq!(error, "the state has 1 queues; the device 2");
    let error = refused(|state| state.transport.config.truncate(9));
    assert_eq!(
        error,
        "the state has 9 bytes of configuration; the device 10"
    );
    let error = refused(|state| state.transport.accepted |= NOT_OFFERED);
    assert!(error.contains("0x40"), "{error}");
    let changes: [fn(&mut MmioState); 4] = [
        |state| state.transport.status = 0,
        |state| state.transport.status |= NEEDS_RESET,
        |state| state.transport.started = false,
        |state| state.transport.queues[0].ready = false,
    ];
    for change in changes {
        let error = refused(change);
        assert!(error.contains("does not go with"), "{error}");
    }
    let error = refused(|state| state.transport.queues[0].size = 128);
    assert!(error.contains("takes up to 64"), "{error}");
    let error = refused(|state| state.transport.queues[0].addresses.used = 0);
    assert!(error.contains("used ring"), "{error}");
    let other = crate::virtio::fs::FsState { served: None };
    let error = refused(|state| state.transport.device = DeviceState::Fs(other));
    assert_eq!(error, "the state is that of a shared folder");
}

proptest! {
    /// Positions of a saved state are untrusted numbers.
    #[test]
    fn no_position_does_harm(next_available: u16, next_used: u16, broken: bool, offers in 0..64_u16) {
        let mut guest = Guest::started(Keeper::new(), OFFERED);
        guest.mmio.quiesce();
        let mut state = guest.mmio.save().expect("it is held");
        state.transport.queues[0].position = Position { next_available, next_used, broken };
        for _ in 0..offers {
            guest.request(0, &[], &[6]);
        }
        let mut other = self::guest();
        // On the same memory.
        other.memory = guest.memory.clone();
        other.mmio = Mmio::new(
            "other".to_owned(),
            direct(other.device.clone()),
            guest.memory.clone(),
            FakeLine::new(),
            None,
            Arc::new(NoPage),
        ).expect("descriptors");
        other.mmio.quiesce();
        other.mmio.restore(&state).expect("it can be");
        other.mmio.resume();
        other.kick(0);
        let fits = offers.wrapping_sub(next_available) <= 64;
        prop_assert_eq!(kept(&other), if broken || !fits { 0 } else {
            usize::from(offers.wrapping_sub(next_available))
        });
        lock(&other.device).answer_all();
    }
}
