//! Access to files, TCP, abstract sockets and other processes, restricted by Landlock
//! (Documentation/userspace-api/landlock.rst).

use super::sys::{self, Handled, Ruleset};
use rustix::io::Errno;
use std::fmt;

/// What Landlock restricts by the version that is asked for, which is that of Linux 6.12.
const ASKED: u32 = 6;

/// How many rights to files each version has, from the first.
const FILE_RIGHTS: [u32; 6] = [13, 14, 15, 15, 16, 16];
/// To bind and to connect by TCP, from version 4.
const TCP: u64 = 3;
/// To connect to abstract sockets, and to send signals, outside: from version 6.
const SCOPES: u64 = 3;

/// What a host's Landlock lacks of what is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// All: there is none, or it is switched off.
    All,
    /// What versions after this one have.
    Newer(u32),
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lack::All => f.write_str("this host's kernel has no Landlock, or it is switched off"),
            Lack::Newer(version) => write!(
                f,
                "this host's kernel has version {version} of Landlock; {ASKED} (Linux 6.12) restricts more"
            ),
        }
    }
}

/// What this host's Landlock lacks, as `armlet probe` says it; `None` for nothing.
#[must_use]
pub fn landlock() -> Option<Lack> {
    match sys::landlock() {
        None => Some(Lack::All),
        Some(version) if version < ASKED => Some(Lack::Newer(version)),
        Some(_) => None,
    }
}

/// What a version restricts, and the bytes of it that the version knows.
fn handled(version: u32) -> (Handled, usize) {
    let newest = version.clamp(1, ASKED);
    let rights = FILE_RIGHTS.get(newest as usize - 1).copied().unwrap_or(0);
    let all = Handled {
        files: (1 << rights) - 1,
        net: if version >= 4 { TCP } else { 0 },
        scopes: if version >= 6 { SCOPES } else { 0 },
    };
    let size = match version {
        ..=3 => 8,
        4..=5 => 16,
        _ => 24,
    };
    (all, size)
}

/// Restricts the calling thread, and those that it starts, to what is open: without other files, TCP,
/// abstract sockets of others, and signals to others. Says what the host lacks of it.
///
/// # Errors
/// What Landlock refuses; a host that lacks it is none.
pub(super) fn restrict() -> Result<Option<Lack>, Errno> {
    let Some(version) = sys::landlock() else {
        return Ok(Some(Lack::All));
    };
    let (handled, size) = handled(version);
    let rules = Ruleset::new(handled, size)?;
    rules.enter()?;
    Ok((version < ASKED).then_some(Lack::Newer(version)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_versions_are_asked_for_what_they_know() {
        let rights = |version| handled(version).0.files.count_ones();
        assert_eq!(
            [1, 2, 3, 4, 5, 6, 7].map(rights),
            [13, 14, 15, 15, 16, 16, 16]
        );
        assert_eq!((handled(3).0.net, handled(3).1), (0, 8));
        assert_eq!((handled(5).0.scopes, handled(5).1), (0, 16));
        assert_eq!(handled(9), handled(6));
    }
}
