//! What procfs tells about a process that is being measured.

use std::fs;

use anyhow::{Context, Result};

/// Mappings of at least this many KiB are the guest's memory: it has 256 MiB, and no VMM maps
/// anything of its own that is as large.
const GUEST_KIB: u64 = 200 << 10;

/// Memory in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// In memory now.
    pub(crate) resident: u64,
    /// Of that, not of a file.
    pub(crate) anonymous: u64,
    /// Of that, in huge pages.
    pub(crate) huge: u64,
}

/// A VMM's memory, told apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mappings {
    /// The guest's memory.
    pub(crate) guest: Memory,
    /// Everything else.
    pub(crate) vmm: Memory,
}

impl Mappings {
    /// Those of a process.
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps");
        let bytes = fs::read(&path).with_context(|| format!("cannot read {path}"))?;
        Ok(Self::parse(&String::from_utf8_lossy(&bytes)))
    }

    fn parse(text: &str) -> Self {
        let mut all = Self::default();
        let mut is_guest = false;
        for line in text.lines() {
            let first = line.split_whitespace().next().unwrap_or_default();
            if let Some(size) = span(first) {
                is_guest = size >> 10 >= GUEST_KIB;
                continue;
            }
            let memory = if is_guest {
                &mut all.guest
            } else {
                &mut all.vmm
            };
            let sum = match first {
                "Rss:" => &mut memory.resident,
                "Anonymous:" => &mut memory.anonymous,
                "AnonHugePages:" => &mut memory.huge,
                _ => continue,
            };
            *sum += number(line).unwrap_or(0);
        }
        all
    }
}

/// Returns the bytes in `start-end`, both hexadecimal.
fn span(word: &str) -> Option<u64> {
    let (start, end) = word.split_once('-')?;
    let hexadecimal = |text| u64::from_str_radix(text, 16).ok();
    hexadecimal(end)?.checked_sub(hexadecimal(start)?)
}

/// Returns the number in `Name:   123 kB`.
fn number(line: &str) -> Option<u64> {
    line.split_whitespace().nth(1)?.parse().ok()
}

/// A thread of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Thread {
    /// Its number.
    pub(crate) id: u32,
    /// Its name, with no spaces.
    pub(crate) name: String,
    /// The time it has run, a guest in it included.
    pub(crate) nanos: u64,
    /// How often it began to wait.
    pub(crate) switches: u64,
}

/// Returns the threads of a process.
pub(crate) fn threads(pid: u32) -> Result<Vec<Thread>> {
    let folder = format!("/proc/{pid}/task");
    let mut threads = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {folder}"))? {
        let path = entry
            .with_context(|| format!("cannot list {folder}"))?
            .path();
        let read = |file| fs::read_to_string(path.join(file)).unwrap_or_default();
        let id = path
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok());
        let status = read("status");
        let switches = status
            .lines()
            .find(|line| line.starts_with("voluntary_ctxt_switches"));
        let schedstat = read("schedstat");
        let nanos = schedstat
            .split(' ')
            .next()
            .and_then(|nanos| nanos.parse().ok());
        threads.push(Thread {
            id: id.with_context(|| format!("{path:?} is no thread"))?,
            name: read("comm").trim().replace(' ', "_"),
            nanos: nanos.unwrap_or(0),
            switches: switches.and_then(number).unwrap_or(0),
        });
    }
    Ok(threads)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_guest_s_memory_is_told_from_the_vmm_s() {
        let text = "00400000-00402000 r-xp 00000000 00:01 17 /armlet\nRss:  8 kB\n\
            Anonymous:  4 kB\nAnonHugePages: 0 kB\nVmFlags: rd ex\n\
            ffff80000000-ffff90000000 rw-p 00000000 00:00 0\nRss:   4096 kB\n\
            Anonymous:   4096 kB\nAnonHugePages:   2048 kB\n\
            ffff90000000-ffff90001000 rw-p 00000000 00:00 0 [stack]\nRss:  4 kB\nAnonymous: 4 kB\n";
        let mappings = Mappings::parse(text);
        let guest = Memory {
            resident: 4096,
            anonymous: 4096,
            huge: 2048,
        };
        let vmm = Memory {
            resident: 12,
            anonymous: 8,
            huge: 0,
        };
        assert_eq!(mappings, Mappings { guest, vmm });
    }

    #[test]
    fn this_process_has_a_thread_that_ran() {
        let threads = threads(std::process::id()).unwrap();
        assert!(threads.iter().any(|thread| thread.nanos > 0));
        assert!(threads.iter().all(|thread| !thread.name.is_empty()));
    }
}
