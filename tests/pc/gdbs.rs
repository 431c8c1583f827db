use crate::gdb::{self, CONSTANT, Debugged};
use crate::guest::Armlet;
use crate::rig;
use crate::software::{BASE, Program};

/// The numbers of RAX and RIP, and the bytes of INT3.
const RAX: u32 = 0;
const RIP: u32 = 16;
const INT3: u64 = 1;

/// NOP; NOP; MOV EAX, the constant; MOV [address], EAX; NOP; NOP.
fn debugged() -> Debugged {
    let written = BASE + 0x8000;
    let program = Program::default().bytes(&[0x90, 0x90, 0xb8]);
    let program = program.bytes(&CONSTANT.to_le_bytes());
    let program = program.bytes(&[0x89, 0x04, 0x25]);
    let program = program.bytes(&(written as u32).to_le_bytes());
    let program = program.bytes(&[0x90, 0x90]).print("one\n").power_off();
    Debugged {
        armlet: Armlet::program(&program),
        first: RAX,
        pc: RIP,
        kind: INT3,
        second: 1,
        write: [7, 14],
        written,
        stops_before: false,
        nothing: 15,
        meets: rig::meets(),
    }
}

#[test]
fn a_guest_is_debugged_from_its_first_instruction() {
    if rig::small() {
        gdb::a_guest_is_debugged_from_its_first_instruction(debugged());
    }
}

#[test]
fn gdb_itself_debugs_a_guest() {
    if rig::small() {
        gdb::gdb_itself_debugs_a_guest(debugged());
    }
}

#[test]
fn no_client_of_gdbs_socket_harms_a_guest() {
    if rig::small() {
        let program = Program::default()
            .print("tick\n")
            .wait_awake(100_000)
            .again();
        let kind = rig::meets().instructions.then_some(INT3);
        gdb::no_client_harms_a_guest(Armlet::program(&program), "tick\n", RIP, kind);
    }
}

#[test]
fn a_reset_keeps_gdbs_session() {
    if rig::small() {
        let program = Program::default()
            .print("again\n")
            .out(crate::software::RESET_CONTROL, 6);
        gdb::a_reset_keeps_the_session(Armlet::program(&program.stay()), RIP, INT3);
    }
}

/// The gate of the interrupt that the program takes is copied to that of INT3.
#[test]
fn the_guests_own_int3_is_its_own() {
    if rig::small() && rig::meets().instructions {
        let handler = Program::default().print("own\n").power_off();
        let program = Program::default()
            .on_interrupt(&handler)
            .bytes(&[0xcc])
            .stay();
        let table = BASE + 0x3000;
        let gate = [(table + 0x40 * 16, table + 3 * 16, 16)];
        gdb::the_guests_own_breakpoints_are_its_own(
            Armlet::program(&program),
            BASE + 0x3f00,
            INT3,
            &gate,
        );
    }
}

#[test]
fn gdbs_threads_are_vcpus() {
    if rig::small() {
        let program = Program::default().start_second("two\n").stay();
        gdb::threads_are_vcpus(Armlet::program(&program), RIP);
    }
}

#[test]
fn linux_stops_at_start_kernel() {
    if let Some(rig) = rig::main() {
        let armlet = Armlet::script(rig, "bzImage", gdb::SYMBOLS).cmdline("nokaslr");
        gdb::linux_stops_at_start_kernel(armlet, RIP, INT3, rig::meets());
    }
}
