//! Tests that change what all of a process shares, each in a process of its own.

use std::env;
use std::process::Command;

/// Names the test that a process is for.
const VARIABLE: &str = "ARMLET_TEST_ALONE";

/// Whether this process is one for the test `name` (with its modules) alone. If not, the test was
/// run in such a process, and succeeded.
pub(crate) fn in_own_process(name: &str) -> bool {
    if env::var_os(VARIABLE).is_some_and(|alone| alone == name) {
        return true;
    }
    let output = command(name).output().expect("this program");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("1 passed"), "{name} is no test: {said}");
    false
}

/// What runs the test `name` in a process where [`in_own_process`] says so.
pub(crate) fn command(name: &str) -> Command {
    let mut command = Command::new(env::current_exe().expect("a program"));
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]);
    command.env(VARIABLE, name);
    command
}
