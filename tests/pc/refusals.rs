use crate::bad::{Bad, assert_refused};
use crate::rig;
use crate::software::Program;

fn kernels() -> Bad {
    let image = Program::default().print("up\n").power_off().image();
    Bad::kernels(&image)
}

fn options() -> Bad {
    Bad::options(&Program::default().power_off().image())
}

fn unknown_boards() -> Bad {
    Bad::unknown_boards(&Program::default().power_off().image())
}

#[test]
fn what_is_no_good_on_arm64_is_no_good_here_in_the_same_words() {
    kernels().assert_refused_by(&["plan", "--board", "pc"]);
    options().assert_refused_by(&["plan", "--board", "pc"]);
}

#[test]
fn run_refuses_what_plan_refuses() {
    if !rig::small() {
        return;
    }
    kernels().assert_refused_by(&["run"]);
    options().assert_refused_by(&["run"]);
    unknown_boards().assert_refused_by(&["run"]);
}

#[test]
fn vcpus_beyond_the_interrupt_controller_are_refused() {
    assert_refused(
        &["plan", "--board", "pc", "--cpus", "1025"],
        2,
        &["1025 vCPUs", "--cpus 1024 or fewer"],
    );
}

#[test]
fn what_only_arm64_has_is_refused() {
    assert_refused(
        &["plan", "--board", "pc", "--gic", "3"],
        2,
        &["--gic is for aarch64 guests; leave it out"],
    );
}
