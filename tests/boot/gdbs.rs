use crate::gdb::{self, CONSTANT, Debugged, Meets};
use crate::guest::Armlet;
use crate::rig;
use crate::software::Program;

/// The numbers of X0 and PC, and the bytes of BRK.
const X0: u32 = 0;
const PC: u32 = 32;
const BRK: u64 = 4;
const MEETS: Meets = Meets {
    instructions: true,
    watchpoints: true,
};
/// Memory that no program uses.
const ELSEWHERE: u64 = 0x4100_0000;

/// NOP; NOP; MOVZ and MOVK W0, the constant; MOVZ X1, the address; STR W0, [X1]; NOP; NOP, behind the
/// branch in the kernel's header.
fn debugged() -> Debugged {
    let nop = 0xd503_201f;
    let (low, high) = (CONSTANT & 0xffff, CONSTANT >> 16);
    let code = vec![
        nop,
        nop,
        0x5280_0000 | low << 5,
        0x72a0_0000 | high << 5,
        0xd2a0_0001 | (ELSEWHERE as u32 >> 16) << 5,
        0xb900_0020,
        nop,
        nop,
    ];
    let program = Program::of(code).print("one\n").power_off();
    Debugged {
        armlet: Armlet::program(&program),
        first: X0,
        pc: PC,
        kind: BRK,
        second: 4,
        write: [0x114, 0x118],
        written: ELSEWHERE,
        stops_before: true,
        nothing: 0x11c,
        meets: MEETS,
    }
}

#[test]
fn a_guest_is_debugged_from_its_first_instruction() {
    if rig::any().is_some() {
        gdb::a_guest_is_debugged_from_its_first_instruction(debugged());
    }
}

#[test]
fn gdb_itself_debugs_a_guest() {
    if rig::any().is_some() {
        gdb::gdb_itself_debugs_a_guest(debugged());
    }
}

#[test]
fn no_client_of_gdbs_socket_harms_a_guest() {
    if rig::any().is_some() {
        let program = Program::default().print("tick\n").wait(10_000).again();
        gdb::no_client_harms_a_guest(Armlet::program(&program), "tick\n", PC, Some(BRK));
    }
}

#[test]
fn a_reset_keeps_gdbs_session() {
    if rig::any().is_some() {
        let program = Program::default().print("again\n").reset();
        gdb::a_reset_keeps_the_session(Armlet::program(&program), PC, BRK);
    }
}

#[test]
fn the_guests_own_brk_is_its_own() {
    if rig::any().is_some() {
        let handler = Program::default().print("own\n").power_off();
        let program = Program::of(vec![0xd420_0020]).on_exception(handler);
        gdb::the_guests_own_breakpoints_are_its_own(Armlet::program(&program), ELSEWHERE, BRK, &[]);
    }
}

#[test]
fn gdbs_threads_are_vcpus() {
    if rig::any().is_some() {
        let two = Program::default().print("two\n").stay();
        let program = Program::default().cpu_on(1, &two).stay();
        gdb::threads_are_vcpus(Armlet::program(&program), PC);
    }
}

#[test]
fn linux_stops_at_start_kernel() {
    if let Some(rig) = rig::main() {
        let armlet = Armlet::script(rig, "Image", gdb::SYMBOLS).cmdline("nokaslr");
        gdb::linux_stops_at_start_kernel(armlet, PC, BRK, MEETS);
    }
}
