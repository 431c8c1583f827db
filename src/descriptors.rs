//! Grows this process's file descriptor table before there are threads.
//!
//! The table has 64 entries at first, and doubles when they are used up. With more than one thread,
//! each growth waits for an RCU grace period (`expand_fdtable` in the kernel's fs/file.c), which
//! adds some ten milliseconds to a guest's start.

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, getrlimit};
use rustix::stdio::stdin;

/// The initial size of the table.
const AT_FIRST: u32 = 64;
/// The most descriptors of a machine without virtio devices and vCPUs, of a device, and of a vCPU.
const BASE: u32 = 32;
const DEVICE: u32 = 9;
const VCPU: u32 = 1;

/// Returns how many descriptors a machine may use; an underestimate for devices with more than the
/// usual number of queues.
#[must_use]
pub fn of_machine(devices: u32, vcpus: u32) -> u32 {
    BASE.saturating_add(DEVICE.saturating_mul(devices))
        .saturating_add(VCPU.saturating_mul(vcpus))
}

/// Grows the table to `count` entries at once, as far as RLIMIT_NOFILE allows. If that fails, the
/// table grows later, as needed.
pub fn make_room(count: u32) {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let highest = u64::from(count).min(limit).saturating_sub(1);
    if highest < u64::from(AT_FIRST) {
        return;
    }
    let highest = i32::try_from(highest).unwrap_or(i32::MAX);
    // The duplicate takes a high number and is closed at once: the table stays large. Every Rust
    // program has a standard input.
    if let Err(error) = fcntl_dupfd_cloexec(stdin(), highest) {
        log::debug!("cannot reserve {count} descriptors in advance: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the size of this process's table: `FDSize` in its status.
    fn places() -> u32 {
        let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
        let line = status.lines().find_map(|line| line.strip_prefix("FDSize:"));
        line.expect("FDSize").trim().parse().expect("a number")
    }

    #[test]
    fn the_table_grows_to_what_is_needed_and_not_beyond_the_limit() {
        make_room(of_machine(0, 1));
        let before = places();
        make_room(before + 1);
        assert!(places() > before);
        // More than the usual limit, which is not an error.
        make_room(5000);
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(5000);
        assert!(u64::from(places()) >= limit.min(5000));
    }
}
