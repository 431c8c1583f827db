//! Edges that arrive, and that wait while they are masked.

use proptest::prelude::*;

use super::*;
use crate::pci::fake::Machine;
use crate::sync::lock;

const SOURCES: usize = 3;

fn made() -> (Msix, Arc<Machine>) {
    let machine = Machine::new();
    (Msix::new(SOURCES, machine.clone()), machine)
}

/// Writes an entry as drivers do: address, data, Vector Control.
fn set(msix: &mut Msix, entry: usize, data: u32, control: u32) {
    let at = entry * ENTRY;
    for (offset, value) in [(0, 0xfee0_1000), (4, 1), (8, data), (12, control)] {
        let written = msix.write_table(at + offset, &u32::to_le_bytes(value));
        written.expect("the machine takes it");
    }
}

fn started() -> (Msix, Arc<Machine>) {
    let (mut msix, machine) = made();
    msix.control(ENABLE, true).expect("taken");
    for entry in 0..SOURCES {
        set(&mut msix, entry, 0x20 + entry as u32, 0);
        msix.map(entry, entry as u16).expect("there is room");
    }
    (msix, machine)
}

fn pending(msix: &Msix) -> u8 {
    let mut bits = [0xff; 8];
    msix.read_pending(0, &mut bits);
    assert_eq!(bits[1..], [0; 7]);
    bits[0]
}

fn data(machine: &Machine) -> Vec<u32> {
    let messages = machine.messages();
    assert!(
        messages
            .iter()
            .all(|message| message.address == 0x1_fee0_1000)
    );
    messages.iter().map(|message| message.data).collect()
}

#[test]
fn each_source_sends_its_entry_s_message() {
    let (msix, machine) = started();
    for source in 0..SOURCES {
        assert!(msix.calls().signal(source));
        assert_eq!(data(&machine), [0x20 + source as u32]);
    }
    assert_eq!(pending(&msix), 0);
    assert!(!made().0.calls().signal(0), "not enabled");
}

#[test]
fn an_edge_is_kept_while_it_is_masked_and_sent_at_the_unmask() {
    let (mut msix, machine) = started();
    for mask in 0..3 {
        match mask {
            0 => set(&mut msix, 1, 0x21, MASKED),
            1 => msix.control(ENABLE | MASK_ALL, true).expect("taken"),
            _ => msix.control(ENABLE, false).expect("taken"),
        }
        // By whoever has the eventfd: vhost does not hear of masks.
        ring(&msix.call(1).expect("it is mapped"));
        assert!(msix.calls().signal(1));
        assert_eq!(data(&machine), [0; 0]);
        assert_eq!(pending(&msix), 1 << 1);
        assert_eq!(pending(&msix), 1 << 1, "a look changes nothing");
        set(&mut msix, 1, 0x30, 0);
        msix.control(ENABLE, true).expect("taken");
        assert_eq!(data(&machine), [0x30], "mask {mask}");
        assert_eq!(pending(&msix), 0);
        set(&mut msix, 1, 0x21, 0);
        assert_eq!(data(&machine), [0; 0], "once");
    }
}

#[test]
fn a_message_that_changes_is_used_from_the_next_edge_on() {
    let (mut msix, machine) = started();
    let call = msix.call(2).expect("it is mapped");
    set(&mut msix, 2, 0x99, 0);
    ring(&call);
    assert_eq!(data(&machine), [0x99]);
    msix.map(2, 0).expect("taken");
    ring(&call);
    assert_eq!(data(&machine), [0x20], "the same eventfd, another entry");
    assert_eq!(msix.mapped(2), 0);
}

#[test]
fn a_source_that_is_mapped_to_nothing_sends_nothing() {
    let (mut msix, machine) = started();
    msix.map(1, NO_VECTOR).expect("taken");
    assert!(msix.calls().signal(1));
    assert_eq!((data(&machine), pending(&msix)), (vec![], 0));
    msix.map(1, 1).expect("taken");
    assert_eq!(data(&machine), [0; 0], "nobody wanted to hear of it");
    msix.unmap().expect("taken");
    assert_eq!([0, 1, 2].map(|source| msix.mapped(source)), [NO_VECTOR; 3]);
    msix.map(1, SOURCES as u16).expect("there is no such entry");
    assert_eq!(msix.mapped(1), NO_VECTOR);
}

#[test]
fn vectors_are_made_when_they_are_mapped_and_their_lack_is_told() {
    let (mut msix, machine) = made();
    assert_eq!(machine.made(), 0);
    *lock(&machine.room) = Some(1);
    for _ in 0..3 {
        msix.map(0, 0).expect("there is room");
    }
    assert_eq!(machine.made(), 1);
    assert_eq!(msix.map(1, 1), Err("no room".to_owned()));
    assert_eq!([msix.mapped(0), msix.mapped(1)], [0, NO_VECTOR]);
}

#[test]
fn a_message_that_the_machine_refuses_leaves_the_others() {
    let (mut msix, machine) = started();
    let refused = Machine::REFUSED.to_le_bytes();
    assert!(msix.write_table(ENTRY + 8, &refused).is_err());
    assert!(msix.control(ENABLE | MASK_ALL, true).is_ok());
    assert!(msix.control(ENABLE, true).is_err());
    for source in 0..SOURCES {
        msix.calls().signal(source);
    }
    assert_eq!(data(&machine), [0x20, 0x22]);
}

#[test]
fn a_restored_state_goes_on_with_its_pending_edges() {
    let (mut msix, _) = started();
    set(&mut msix, 1, 0x21, MASKED);
    msix.calls().signal(1);
    msix.map(2, NO_VECTOR).expect("taken");
    let state = msix.save();
    assert_eq!(state.pending, [1]);
    let (mut fresh, machine) = made();
    fresh.check(&state).expect("its own");
    fresh
        .restore(&state, (ENABLE, true))
        .expect("there is room");
    assert_eq!(data(&machine), [0x20], "for one that was on its way");
    assert_eq!(pending(&fresh), 1 << 1);
    assert_eq!(fresh.save(), state);
    set(&mut fresh, 1, 0x21, 0);
    assert_eq!(data(&machine), [0x21]);
}

#[test]
fn invalid_states_are_refused() {
    let (msix, _) = started();
    let state = msix.save();
    let wrongs: [fn(&mut MsixState); 6] = [
        |state| state.table.truncate(2),
        |state| state.table[0].address = 1,
        |state| state.mapped[0] = SOURCES as u16,
        |state| state.mapped.push(0),
        |state| state.pending.push(SOURCES as u16),
        |state| state.table.push(state.table[0]),
    ];
    for wrong in wrongs {
        let mut wrong_state = state.clone();
        wrong(&mut wrong_state);
        let error = msix
            .check(&wrong_state)
            .expect_err("it is wrong")
            .to_string();
        assert!(error.contains("3 entries for 3 sources"), "{error}");
    }
    msix.check(&state).expect("its own");
}

/// What a guest and its devices do.
#[derive(Clone, Debug)]
enum Step {
    Write(usize, Vec<u8>),
    Map(usize, u16),
    Control(bool, bool, bool),
    Signal(usize),
    Unmap,
}

fn step() -> impl Strategy<Value = Step> {
    let entry = prop_oneof![0_u16..5, Just(NO_VECTOR)];
    prop_oneof![
        (0_usize..80, prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(offset, data)| Step::Write(offset, data)),
        (0_usize..4, 0..3_usize, 0_u32..2).prop_map(|(entry, word, value)| Step::Write(
            entry * ENTRY + 4 + 4 * word,
            value.to_le_bytes().to_vec()
        )),
        (0_usize..4, entry).prop_map(|(source, entry)| Step::Map(source, entry)),
        (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(a, b, c)| Step::Control(a, b, c)),
        (0_usize..4).prop_map(Step::Signal),
        Just(Step::Unmap),
    ]
}

proptest! {
    #[test]
    fn no_edge_is_lost_whatever_the_driver_does(steps in prop::collection::vec(step(), 0..128)) {
        let (mut msix, machine) = made();
        // Whether a source owes the guest an interrupt.
        let mut owed = [false; SOURCES];
        for step in steps {
            match step {
                Step::Write(offset, data) => {
                    let _ = msix.write_table(offset, &data);
                }
                Step::Map(source, entry) => {
                    let before = msix.mapped(source);
                    let _ = msix.map(source, entry);
                    let none = before == NO_VECTOR || msix.mapped(source) == NO_VECTOR;
                    if none && source < SOURCES {
                        owed[source] = false;
                    }
                }
                Step::Control(enable, mask, master) => {
                    let control = if enable { ENABLE } else { 0 } | if mask { MASK_ALL } else { 0 };
                    let _ = msix.control(control, master);
                }
                Step::Signal(source) => {
                    let is_heard = msix.calls().signal(source);
                    if is_heard && msix.mapped(source) != NO_VECTOR && source < SOURCES {
                        owed[source] = true;
                    }
                }
                Step::Unmap => {
                    let _ = msix.unmap();
                    owed = [false; SOURCES];
                }
            }
            // What is sent now, KVM has read.
            for (own, owed) in msix.sources.iter().zip(&mut owed) {
                if own.routed.is_some() {
                    let sent = own.vector.as_ref().is_some_and(|own| own.call().read().is_ok());
                    prop_assert!(sent || !*owed, "an edge was lost");
                    *owed = false;
                } else if *owed {
                    prop_assert!(own.is_pending(), "an edge was lost");
                }
            }
            msix.check(&msix.save()).expect("its own state");
        }
        prop_assert!(machine.made() <= SOURCES);
    }
}
