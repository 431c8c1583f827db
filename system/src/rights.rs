//! The rights that a process has beyond those of its user: capabilities, groups, set-user-ID programs.

use rustix::io::Errno;
use rustix::thread::{self, CapabilitySet, CapabilitySets, set_capabilities};

/// Gives up, for the calling thread and those that it starts, what a program could gain by being
/// executed, all capabilities but those that are `kept`, and, where it may, the groups beside its first
/// and what capabilities programs could get (the bounding set).
///
/// # Errors
/// What the kernel says.
pub fn give_up(kept: CapabilitySet) -> rustix::io::Result<()> {
    thread::set_no_new_privs(true)?;
    let mine = thread::capabilities(None)?;
    let none = CapabilitySet::empty();
    if mine.effective.contains(CapabilitySet::SETPCAP) {
        leave_bounding_set()?;
    }
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
    let left = mine.permitted & kept;
    let wanted = CapabilitySets {
        effective: left,
        permitted: left,
        inheritable: none,
    };
    match mine == wanted {
        true => Ok(()),
        false => set_capabilities(None, wanted),
    }
}

/// Takes all capabilities of this kernel out of the bounding set, one by one, as there is no other way.
fn leave_bounding_set() -> rustix::io::Result<()> {
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The one before was the last.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
