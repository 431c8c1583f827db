//! Closes what this process inherited, and grows its file descriptor table, before there are threads.
//!
//! The table has 64 entries at first, and doubles when they are used up. With more than one thread,
//! each growth waits for an RCU grace period (`expand_fdtable` in the kernel's fs/file.c), which
//! adds some ten milliseconds to a guest's start.

use armlet_system::descriptors::close_range;
use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, getrlimit};
use rustix::stdio::stdin;
use std::collections::BTreeSet;

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

/// The descriptors from 3 on that command-line arguments name: by `fd=N`, or by a path such as
/// /dev/fd/N, which a shell makes for `<(command)`.
#[must_use]
pub fn named(arguments: &[String]) -> BTreeSet<u32> {
    let mut named = BTreeSet::new();
    for argument in arguments {
        for start in ["fd=", "fd/"] {
            for (at, _) in argument.match_indices(start) {
                let rest = &argument[at + start.len()..];
                let end = rest.find(|letter: char| !letter.is_ascii_digit());
                named.extend(rest[..end.unwrap_or(rest.len())].parse::<u32>());
            }
        }
    }
    named.retain(|number| *number >= FIRST);
    named
}

/// The first descriptor after the standard ones.
const FIRST: u32 = 3;

/// Closes all descriptors from 3 on but those that are `kept`: whoever started this process may have
/// left some open, and they are none of the guest's business.
pub fn close_others(kept: &BTreeSet<u32>) {
    let mut from = FIRST;
    for next in kept.iter().copied().chain([u32::MAX]) {
        let to = next - 1;
        if from <= to {
            // SAFETY: nothing of this process holds a descriptor yet; those that are closed are nobody's.
            unsafe { close_range(from, to) };
        }
        from = next.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the size of this process's table: `FDSize` in its status.
    #[test]
    fn descriptors_that_options_name_are_kept() {
        let arguments = |words: &[&str]| {
            let words = words.iter().map(|word| (*word).to_owned());
            let named = named(&words.collect::<Vec<_>>());
            named.into_iter().collect::<Vec<_>>()
        };
        assert_eq!(arguments(&["run", "--net", "fd=7,fd=12,mac=1"]), [7, 12]);
        assert_eq!(
            arguments(&["--kernel=/dev/fd/63", "/proc/self/fd/5"]),
            [5, 63]
        );
        assert!(arguments(&["fd=2", "fd=", "fd=x", "fd=99999999999"]).is_empty());
    }

    /// The places in the table of this process: `FDSize` in its status.
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
