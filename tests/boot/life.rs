use crate::guest::{Armlet, Input};
use crate::software::Program;
use crate::{lives, rig};
use rustix::process::Signal;
use std::thread::sleep;
use std::time::Duration;

/// A guest that says that it runs, and hears nothing.
fn deaf() -> Program {
    Program::default().print("up\n").stay()
}

#[test]
fn linux_reboots_in_place_three_times_and_powers_off() {
    let Some(rig) = rig::any() else { return };
    lives::reboots_three_times(Armlet::debian(rig, "Image", "shell"));
}

#[test]
fn a_reset_is_no_leak() {
    let Some(_) = rig::any() else { return };
    let again = Program::default().print("again\n").reset();
    lives::resets_without_a_leak(Armlet::program(&again));
}

#[test]
fn a_reset_ends_armlet_if_it_was_told_so() {
    let Some(_) = rig::any() else { return };
    let program = Program::default().print("once\n").reset();
    let outcome = Armlet::program(&program).option("--on-reset", "exit").run();
    outcome.assert_status(5);
    assert_eq!(outcome.text(), "once\n");
    assert_eq!(outcome.errors, "");
}

#[test]
fn power_off_ends_armlet() {
    let Some(_) = rig::any() else { return };
    let program = Program::default().print("bye\n").power_off();
    let outcome = Armlet::program(&program).run();
    outcome.assert_status(0);
    assert_eq!(outcome.text(), "bye\n");
    assert_eq!(outcome.errors, "");
}

#[test]
fn a_panic_is_reported_and_may_end_armlet() {
    let Some(rig) = rig::main() else { return };
    for (options, status) in [
        ([("--on-reset", "exit"), ("--on-panic", "report")], 5),
        ([("--on-reset", "restart"), ("--on-panic", "exit")], 4),
    ] {
        let guest = || {
            let armlet = Armlet::debian(rig, "Image", "crash");
            let options = options.iter();
            options.fold(armlet, |armlet, (option, value)| {
                armlet.option(option, value)
            })
        };
        lives::panics(guest, status, "PC 0x");
    }
}

/// Waits for the power key as a distribution's logind does. It says so when it listens: Linux throws
/// away what a key does while nobody has its device open.
pub(crate) const LISTEN: &str = "insmod /modules/evdev.ko
insmod /modules/gpio_keys.ko
until [ -e /dev/input/event0 ]; do sleep 0.1; done
exec 3</dev/input/event0
echo POWERKEY-READY
head -c 24 <&3 >/dev/null
echo POWERKEY-PRESSED
";

#[test]
fn sigterm_presses_the_power_key_and_linux_powers_off() {
    let Some(rig) = rig::main() else { return };
    lives::powers_off_by_sigterm(Armlet::power_key(rig, LISTEN).start());
}

#[test]
fn a_guest_that_still_boots_hears_a_later_press_of_its_power_key() {
    let Some(rig) = rig::main() else { return };
    let script = format!("echo POWERKEY-LATER\nsleep 4\n{LISTEN}");
    let mut guest = Armlet::power_key(rig, &script).start();
    guest.expect("POWERKEY-LATER");
    guest.signal(Signal::TERM);
    guest.expect_error("pressed the guest's power key");
    guest.expect("POWERKEY-READY");
    guest.expect("POWERKEY-PRESSED");
    let outcome = guest.end();
    outcome.assert_status(0);
    assert_eq!(outcome.errors, lives::PRESSED);
}

#[test]
fn a_guest_that_reboots_when_it_is_to_power_off_is_not_started_again() {
    let Some(rig) = rig::main() else { return };
    let script = format!("{LISTEN}reboot -f\n");
    let mut guest = Armlet::power_key(rig, &script).start();
    guest.expect("POWERKEY-READY");
    guest.signal(Signal::TERM);
    let outcome = guest.end();
    outcome.assert_status(6);
    let said = "it is not started again";
    assert!(outcome.errors.contains(said), "{}", outcome.errors);
}

#[test]
fn a_guest_that_does_not_listen_is_given_up_in_time() {
    let Some(_) = rig::any() else { return };
    lives::is_given_up(Armlet::program(&deaf()));
}

#[test]
fn a_second_sigterm_stops_a_guest_that_does_not_listen() {
    let Some(_) = rig::any() else { return };
    for signal in [Signal::TERM, Signal::HUP] {
        lives::is_stopped_by_a_second_signal(Armlet::program(&deaf()), signal);
    }
}

#[test]
fn sigint_stops_a_guest_at_once() {
    let Some(_) = rig::any() else { return };
    let mut guest = Armlet::program(&deaf()).start();
    guest.expect("up\n");
    guest.signal(Signal::INT);
    let outcome = guest.end();
    outcome.assert_status(6);
    assert_eq!(outcome.errors, "armlet: stopped by a signal\n");
}

#[test]
fn a_guest_gone_wild_can_be_stopped() {
    let Some(_) = rig::any() else { return };
    // No code is there, and none is where the exception is taken.
    let wild = Program::default().print("up\n").jump(0x0b00_0000);
    let mut guest = Armlet::program(&wild).start();
    guest.expect("up\n");
    sleep(Duration::from_millis(300));
    guest.signal(Signal::INT);
    guest.end().assert_status(6);
}

#[test]
fn ctrl_a_x_leaves_and_the_terminal_is_as_before() {
    let Some(_) = rig::any() else { return };
    lives::is_left_by_ctrl_a_x(Armlet::program(&deaf()));
}

#[test]
fn a_crash_of_armlet_leaves_the_terminal_as_before() {
    let Some(_) = rig::any() else { return };
    for signal in [
        Signal::SEGV,
        Signal::ABORT,
        Signal::BUS,
        Signal::ILL,
        Signal::FPE,
    ] {
        let mut guest = Armlet::program(&deaf()).input(Input::Terminal).start();
        let before = guest.modes();
        guest.expect("up\n");
        assert_ne!(before, guest.modes(), "the terminal was not raw");
        guest.signal(signal);
        let outcome = guest.end();
        outcome.assert_signal(signal);
        assert_eq!(outcome.modes, Some(before), "after {signal:?}");
    }
}

#[test]
fn signals_leave_the_terminal_as_before() {
    let Some(_) = rig::any() else { return };
    let mut guest = Armlet::program(&deaf()).input(Input::Terminal).start();
    let before = guest.modes();
    guest.expect("up\n");
    guest.signal(Signal::INT);
    let outcome = guest.end();
    outcome.assert_status(6);
    assert_eq!(outcome.modes, Some(before));
}

#[test]
fn a_shell_on_a_terminal_gets_every_key() {
    let Some(rig) = rig::main() else { return };
    let mut guest = Armlet::debian(rig, "Image", "shell")
        .input(Input::Terminal)
        .start();
    let before = guest.modes();
    guest.expect("guest# ");
    guest.send(b"echo sum $((6 * 7))\r");
    guest.expect("sum 42\r\n");
    // Ctrl-C is the guest's, not ours. What says that it waits has the terminal by then: between an
    // echo of its own and the next program the shell loses a Ctrl-C.
    guest.expect("guest# ");
    guest.send(b"sh -c 'echo waiting; exec sleep 1000'\r");
    guest.expect("waiting\r\n");
    guest.send(b"\x03");
    guest.expect("guest# ");
    // Ctrl-A twice is one for the guest: in the shell it goes to the start of the line.
    guest.send(b" there\x01\x01echo here\r");
    guest.expect("here there\r\n");
    guest.expect("guest# ");
    guest.send(b"poweroff -f\r");
    let outcome = guest.end();
    outcome.assert_status(0);
    assert_eq!(outcome.modes, Some(before));
}

#[test]
fn an_access_that_cannot_be_emulated_aborts_in_the_guest() {
    let Some(_) = rig::any() else { return };
    let handler = Program::default().print("abort\n").power_off();
    for (address, what) in [(0x0b00_0000, "nothing"), (0x0900_0000, "the UART")] {
        let program = Program::default()
            .print("up\n")
            .read_pair(address)
            .print("not reached\n")
            .power_off()
            .on_exception(handler.clone());
        let outcome = Armlet::program(&program).run();
        outcome.assert_status(0);
        assert_eq!(
            outcome.text(),
            "up\nabort\n",
            "a read of two words from {what}"
        );
        let wanted = format!("got an abort for an access at {address:#x} that cannot be emulated");
        assert!(outcome.errors.contains(&wanted), "{}", outcome.errors);
        assert!(
            outcome.errors.starts_with("armlet: vCPU 0 at PC 0x"),
            "{}",
            outcome.errors
        );
    }
}

#[test]
fn accesses_to_nowhere_do_not_fill_a_log() {
    let Some(_) = rig::any() else { return };
    let mut program = Program::default();
    for word in 0..40 {
        program = program
            .read(0x0b00_0000 + 4 * word)
            .write(0x0c00_0000 + 4 * word, 0);
    }
    let outcome = Armlet::program(&program.print("on\n").power_off()).run();
    outcome.assert_status(0);
    assert_eq!(outcome.text(), "on\n");
    let reports = outcome.errors.lines().count();
    assert!(
        (4..=10).contains(&reports),
        "80 accesses: {}",
        outcome.errors
    );
    assert!(
        outcome.errors.contains("(fault 4 of this vCPU)"),
        "{}",
        outcome.errors
    );
    assert!(
        outcome.errors.contains(" messages were held back"),
        "{}",
        outcome.errors
    );
}

#[test]
fn an_armlet_that_was_stopped_makes_the_terminal_raw_again() {
    let Some(_) = rig::any() else { return };
    lives::is_raw_again_after_a_stop(Armlet::program(&deaf()));
}

#[test]
fn signals_act_while_a_program_is_waited_for() {
    let Some(_) = rig::any() else { return };
    lives::heeds_signals_at_the_start(Armlet::program(&deaf()));
}

/// Sets the host's clock forward by so many seconds, or back.
fn set_clock(seconds: i64) -> bool {
    use rustix::time::{ClockId, clock_gettime, clock_settime};
    let mut now = clock_gettime(ClockId::Realtime);
    now.tv_sec += seconds;
    clock_settime(ClockId::Realtime, now).is_ok()
}

#[test]
fn an_alarm_is_due_when_the_hosts_clock_says_so_though_it_was_set_forward() {
    let Some(rig) = rig::main() else { return };
    let script = "cd /sys/class/rtc/rtc0
count() { grep rtc /proc/interrupts | awk '{ print $2 }'; }
before=$(count)
echo $(( $(cat since_epoch) + 1000 )) >wakealarm
echo WAITS
while [ \"$(count)\" = \"$before\" ]; do sleep 1; done
echo RANG";
    let mut guest = Armlet::script(rig, "Image", script).alone().start();
    guest.expect("WAITS");
    if !set_clock(2000) {
        println!("skipped: only root may set the host's clock");
        return;
    }
    guest.expect("RANG");
    set_clock(-2000);
    guest.end().assert_status(0);
}

/// Two vCPUs that turn each other off and on; in the end the second is the only one that is on.
fn taking_turns(end: fn(Program) -> Program) -> Program {
    let third = Program::default().print("first on\n").cpu_off();
    let second = Program::default().print("second on\n").wait_for_off(0);
    let second = second.print("first off\n").cpu_on(0, &third);
    let second = end(second.wait_for_off(0).print("alone\n"));
    let once = Program::default().print("once\n").cpu_off();
    let first = Program::default().print("up\n").cpu_on(1, &once);
    first.wait_for_off(1).cpu_on(1, &second).cpu_off()
}

const TURNS: &str = "up\nonce\nsecond on\nfirst off\nfirst on\nalone\n";

/// Whether KVM tells when a vCPU goes off; if not, this was said.
fn reports_cpu_off() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel");
    let mut parts = release.split(['.', '-']).map(str::parse::<u32>);
    let version = (parts.next(), parts.next());
    let tells = matches!(version, (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (6, 4));
    if !tells {
        println!("skipped: needs Linux 6.4, where KVM tells that a vCPU goes off");
    }
    tells
}

#[test]
fn a_guest_whose_only_cpu_is_off_is_told_of_and_ends_by_one_sigterm() {
    let Some(_) = rig::any() else { return };
    if !reports_cpu_off() {
        return;
    }
    for program in [
        Program::default().print("up\n").cpu_off(),
        Program::default().print("up\n").cpu_off_by_smc(),
    ] {
        let mut guest = Armlet::program(&program).start();
        guest.expect_error("armlet: the guest's only CPU is off (PSCI CPU_OFF)");
        assert!(guest.runs(), "it ended by itself");
        guest.signal(Signal::TERM);
        let outcome = guest.end();
        outcome.assert_status(6);
        assert_eq!(outcome.text(), "up\n");
        assert_eq!(
            outcome.errors,
            "armlet: the guest's only CPU is off (PSCI CPU_OFF): nothing can turn one on again, and it ignores its power key; a signal ends it
armlet: stopped by a signal: all of its CPUs are off\n"
        );
    }
}

#[test]
fn a_guest_whose_last_cpu_went_off_is_told_of() {
    let Some(_) = rig::any() else { return };
    if !reports_cpu_off() {
        return;
    }
    let last = taking_turns(Program::cpu_off);
    let mut guest = Armlet::program(&last).cpus(2).start();
    guest.expect_error("armlet: all 2 CPUs of the guest are off");
    guest.signal(Signal::TERM);
    let outcome = guest.end();
    outcome.assert_status(6);
    assert_eq!(outcome.text(), TURNS);
    let told = outcome.errors.matches("CPUs of the guest are off").count();
    assert_eq!(told, 1, "{}", outcome.errors);
    // A vCPU that never was on counts as one that is off.
    let armlet = Armlet::program(&last).cpus(3);
    let outcome = armlet.option("--on-panic", "exit").run();
    outcome.assert_status(4);
    assert_eq!(outcome.text(), TURNS);
    let complaints = outcome.complaints();
    assert_eq!(
        complaints,
        "armlet: all 3 CPUs of the guest are off (PSCI CPU_OFF): nothing can turn one on again\n"
    );
}

#[test]
fn a_cpu_that_goes_off_and_on_again_is_no_end() {
    let Some(_) = rig::any() else { return };
    let mut guest = Armlet::program(&taking_turns(Program::sleep))
        .cpus(2)
        .start();
    guest.expect("alone\n");
    sleep(Duration::from_millis(300));
    guest.signal(Signal::INT);
    let outcome = guest.end();
    outcome.assert_status(6);
    assert_eq!(outcome.text(), TURNS);
    assert_eq!(outcome.complaints(), "armlet: stopped by a signal\n");
}

#[test]
fn armlet_is_confined_and_has_nothing_that_it_inherited() {
    let Some(_) = rig::any() else { return };
    lives::is_confined(Armlet::program(&deaf()));
}
