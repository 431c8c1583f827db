//! What xtask tells the developer while it works.

use std::io::Write;

/// Prints a line about what is being done, apart from a command's own output.
pub(crate) fn say(line: &str) {
    // A closed standard error is no reason to stop working.
    let _ = writeln!(std::io::stderr(), "xtask: {line}");
}
