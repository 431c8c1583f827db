//! Room in this process's table of file descriptors, made before there are threads.
//!
//! A table has 64 places at first, and doubles when they are taken. With more than one thread, each
//! time waits for a grace period of RCU (`expand_fdtable` in the kernel's fs/file.c), which is some
//! ten milliseconds of a guest's start.

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, getrlimit};
use rustix::stdio::stdin;

/// The places that every process has.
const AT_FIRST: u32 = 64;
/// The most descriptors of a machine without virtio devices and vCPUs, of a device, and of a vCPU.
const BASE: u32 = 32;
const DEVICE: u32 = 9;
const VCPU: u32 = 1;

/// Returns how many descriptors a machine may take, for one with more than the usual number of
/// queues not quite all.
#[must_use]
pub fn of_machine(devices: u32, vcpus: u32) -> u32 {
    BASE.saturating_add(DEVICE.saturating_mul(devices))
        .saturating_add(VCPU.saturating_mul(vcpus))
}

/// Has the table grow to `count` places at once, as far as the limit of this process
/// (RLIMIT_NOFILE) allows. Without room the table grows later, as it is needed.
pub fn make_room(count: u32) {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let highest = u64::from(count).min(limit).saturating_sub(1);
    if highest < u64::from(AT_FIRST) {
        return;
    }
    let highest = i32::try_from(highest).unwrap_or(i32::MAX);
    // The copy takes the next free place from there on, and is closed at once: the table stays
    // large. Every Rust program has a standard input.
    if let Err(error) = fcntl_dupfd_cloexec(stdin(), highest) {
        log::debug!("no room for {count} descriptors ahead of time: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the places in the table of this process: `FDSize` in its status.
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
        // More than the usual limit, which is no error.
        make_room(5000);
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(5000);
        assert!(u64::from(places()) >= limit.min(5000));
    }
}
