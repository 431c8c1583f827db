use crate::guest::Armlet;
use crate::software::Program;
use crate::{lives, rig};

/// A guest that prints 20 lines that look like those of a kernel that panics, then "up".
fn panicking() -> Program {
    Program::default()
        .print(&lives::panics_20_times())
        .print("up\n")
}

#[test]
fn a_guest_panics_once_in_a_life() {
    let Some(_) = rig::any() else { return };
    lives::panics_once(Armlet::program(&panicking().power_off()));
}

#[test]
fn signals_act_though_nobody_reads_standard_error() {
    let Some(_) = rig::any() else { return };
    lives::heeds_signals_though_nobody_reads(Armlet::program(&panicking().stay()));
}

#[test]
fn a_panic_in_a_burst_just_before_a_reset_is_heard() {
    let Some(_) = rig::any() else { return };
    let program = Program::default().print(&lives::burst_of_last_words());
    lives::panics_just_before_a_reset(Armlet::program(&program.reset()));
}
