//! The rights that a process has beyond those of its user: capabilities, groups, set-user-ID programs.

use rustix::io::Errno;
use rustix::thread::{self, CapabilitySet, CapabilitySets, set_capabilities};

/// Gives up, for the calling thread and those that it starts, what a program could gain by being
/// executed, and all capabilities with, where it may, the groups beside its first. What capabilities
/// programs could get (the bounding set) stays as it is, as no program is executed.
///
/// # Errors
/// What the kernel says.
pub(super) fn give_up() -> rustix::io::Result<()> {
    thread::set_no_new_privs(true)?;
    let mine = thread::capabilities(None)?;
    let none = CapabilitySet::empty();
    if mine.effective.contains(CapabilitySet::SETGID) {
        thread::set_thread_groups(&[])?;
    }
    if mine.inheritable != none {
        // Kernels before 4.3 have no ambient set; what is in it is inheritable.
        match thread::clear_ambient_capability_set() {
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => return Err(error),
        }
    }
    if (mine.effective, mine.permitted, mine.inheritable) == (none, none, none) {
        return Ok(());
    }
    set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )
}
