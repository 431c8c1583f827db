//! Saving a PL011, and restoring it into another.

use proptest::prelude::*;

use super::*;
use crate::console;
use crate::console::tests::{Event, Shown, act};
use crate::persist::Persist;
use crate::persist::tests::{goes_on, refuses};

const REGISTERS: &[u64] = &[
    offset::DR,
    offset::RSR_ECR,
    offset::FR,
    offset::ILPR,
    offset::IBRD,
    offset::FBRD,
    offset::LCR_H,
    offset::CR,
    offset::IFLS,
    offset::IMSC,
    offset::RIS,
    offset::MIS,
    offset::ICR,
    offset::DMACR,
    0xfe0,
];

fn events() -> impl Strategy<Value = Vec<Event>> {
    console::tests::events(REGISTERS, &[1, 2, 4], 80)
}

fn make() -> (Pl011, Arc<FakeLine>) {
    let line = FakeLine::new();
    let uart = Pl011::new(line.clone(), Box::new(Shown), Box::new(|| {}));
    (uart, line)
}

#[test]
fn restoring_a_listening_guest_reports_room() {
    let mut bench = Bench::new();
    bench.write(offset::IMSC, interrupt::RX | interrupt::RT);
    let state = bench.uart.save();
    let mut other = Bench::new();
    other.uart.restore(&state).expect("a state that was saved");
    assert_eq!(other.uart.listening(), Some(1));
    assert_eq!(other.rooms(), 1);
}

#[test]
fn a_state_that_no_guest_can_cause_is_refused() {
    let (mut uart, _) = make();
    let saved = uart.save();
    let mut state = saved.clone();
    state.registers.cr = 0x1_0000;
    refuses(&mut uart, &state, "UARTCR 0x10000");
    state = saved.clone();
    state.received = vec![0; FIFO_DEPTH + 1];
    refuses(&mut uart, &state, "17 received characters");
    state = saved.clone();
    state.received = vec![0x800];
    refuses(&mut uart, &state, "0x800");
}

proptest! {
    #[test]
    fn it_goes_on_where_it_was_saved(before in events(), after in events()) {
        goes_on(make, act, &before, &after);
    }

    #[test]
    fn nothing_restored_panics(
        registers in any::<[u32; 10]>(),
        received in prop::collection::vec(0_u16..0x800, 0..=FIFO_DEPTH),
        (overrun, polls) in any::<(bool, u8)>(),
        after in events(),
    ) {
        let [rsr, ilpr, ibrd, fbrd, lcr_h, cr, ifls, imsc, ris, dmacr] = registers;
        let registers = Pl011Registers {
            rsr: rsr & mask::RSR,
            ilpr: ilpr & mask::ILPR,
            ibrd: ibrd & mask::IBRD,
            fbrd: fbrd & mask::FBRD,
            lcr_h: lcr_h & mask::LCR_H,
            cr: cr & mask::CR,
            ifls: ifls & mask::IFLS,
            imsc: imsc & mask::INTERRUPTS,
            ris: ris & mask::INTERRUPTS,
            dmacr: dmacr & mask::DMACR,
        };
        let (mut uart, line) = make();
        let state = Pl011State { registers, received, overrun, polls };
        prop_assert_eq!(uart.restore(&state), Ok(()));
        prop_assert_eq!(line.is_high(), registers.ris & registers.imsc != 0);
        for event in &after {
            let _ = act(&mut uart, event);
        }
    }
}
