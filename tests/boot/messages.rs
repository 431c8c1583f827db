use crate::guest::Armlet;
use crate::rig;
use crate::software::Program;
use rustix::pipe::PipeFlags;
use rustix::process::Signal;
use std::ffi::OsStr;
use std::os::fd::AsRawFd;

/// A guest that prints 700 lines that look like those of a kernel that panics, then "up".
fn panicking() -> Program {
    let lines = "Kernel panic - not syncing: x\x1b[2J\n".repeat(700);
    Program::default().print(&lines).print("up\n")
}

#[test]
fn a_guest_panics_once_in_a_life() {
    let Some(_) = rig::any() else { return };
    let outcome = Armlet::program(&panicking().power_off()).run();
    outcome.assert_status(0);
    let errors = &outcome.errors;
    assert_eq!(errors.lines().count(), 1, "{errors}");
    assert!(errors.ends_with("x\\x1b[2J\n"), "{errors}");
}

#[test]
fn signals_act_though_nobody_reads_standard_error() {
    let Some(_) = rig::any() else { return };
    // A full pipe: nothing more goes in before somebody reads.
    let (_reader, writer) = rustix::pipe::pipe_with(PipeFlags::NONBLOCK).expect("a pipe");
    while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
    let (here, number) = (std::process::id(), writer.as_raw_fd());
    let script = format!("exec \"$@\" 2>/proc/{here}/fd/{number}");
    let words = ["sh", "-c", &script, "sh"].map(OsStr::new);
    let mut guest = Armlet::program(&panicking().stay()).through(&words).start();
    guest.expect("up\n");
    // The power key, which it does not hear, and the end.
    guest.signal(Signal::TERM);
    guest.signal(Signal::HUP);
    guest.end().assert_status(6);
}
