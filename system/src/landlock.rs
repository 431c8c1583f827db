//! Access to files, TCP, abstract sockets and other processes, restricted by Landlock
//! (Documentation/userspace-api/landlock.rst).

use rustix::io::Errno;
use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// What Landlock restricts by the version that is asked for, which is that of Linux 6.12.
const ASKED: u32 = 6;

/// How many rights to files each version has, from the first.
const FILE_RIGHTS: [u32; 6] = [13, 14, 15, 15, 16, 16];
/// To bind and to connect by TCP, from version 4.
const TCP: u64 = 3;
/// To connect to abstract sockets, and to send signals, outside: from version 6.
const SCOPES: u64 = 3;

/// A right to what lies at or below a path (include/uapi/linux/landlock.h: LANDLOCK_ACCESS_FS): to write a
/// file.
pub const WRITE: u64 = 1 << 1;
/// To read a file.
pub const READ: u64 = 1 << 2;
/// To list a folder.
pub const LIST: u64 = 1 << 3;
/// To make folders and files.
pub const MAKE: u64 = 1 << 7 | 1 << 8;
/// To remove a file from a folder.
pub const REMOVE: u64 = 1 << 5;
/// To change the size of a file, also for whoever is given its descriptor.
pub const TRUNCATE: u64 = 1 << 14;
/// To make requests of a device, also for whoever is given its descriptor.
pub const REQUESTS: u64 = 1 << 15;

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
pub fn lack() -> Option<Lack> {
    match version() {
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

/// Restricts the calling thread, and those that it starts, to what is open and what is `allowed` below some
/// paths: without other files, TCP, abstract sockets of others, and signals to others. Says what the host
/// lacks of it.
///
/// # Errors
/// What Landlock refuses; a host that lacks it is none.
pub fn restrict(allowed: &[(BorrowedFd<'_>, u64)]) -> Result<Option<Lack>, Errno> {
    let Some(version) = version() else {
        return Ok(Some(Lack::All));
    };
    let (handled, size) = handled(version);
    let rules = Ruleset::new(handled, size)?;
    for (path, rights) in allowed {
        rules.allow(*path, rights & handled.files)?;
    }
    rules.enter()?;
    Ok((version < ASKED).then_some(Lack::Newer(version)))
}

/// What Landlock is to restrict (include/uapi/linux/landlock.h: struct landlock_ruleset_attr).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
struct Handled {
    files: u64,
    net: u64,
    scopes: u64,
}

/// LANDLOCK_CREATE_RULESET_VERSION.
const VERSION: libc::c_ulong = 1;

/// The version of Landlock that the kernel has; `None` if there is none, or it is switched off.
fn version() -> Option<u32> {
    let none = std::ptr::null::<Handled>();
    // SAFETY: with this flag the call reads no memory.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, VERSION) };
    u32::try_from(version).ok().filter(|version| *version > 0)
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct PathBeneath {
    rights: u64,
    path: i32,
}

/// A set of rules of Landlock, for what it handles.
struct Ruleset(OwnedFd);

impl Ruleset {
    /// Makes one without rules, of which the kernel knows the first `size` bytes.
    ///
    /// # Errors
    /// What the kernel says.
    fn new(handled: Handled, size: usize) -> Result<Ruleset, Errno> {
        // SAFETY: the kernel reads up to `size` bytes, which are no more than there are.
        let made = unsafe {
            let size = size.min(size_of::<Handled>());
            libc::syscall(
                libc::SYS_landlock_create_ruleset,
                &raw const handled,
                size,
                0,
            )
        };
        // SAFETY: the descriptor is new.
        result(made).map(|fd| Ruleset(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Allows something to what lies at or below a path.
    ///
    /// # Errors
    /// What the kernel says.
    fn allow(&self, path: BorrowedFd<'_>, rights: u64) -> Result<(), Errno> {
        const PATH_BENEATH: libc::c_int = 1;
        let rule = PathBeneath {
            rights,
            path: path.as_raw_fd(),
        };
        // SAFETY: the kernel reads the structure, which has the size of its own.
        let added = unsafe {
            let (rules, kind) = (self.0.as_raw_fd(), PATH_BENEATH);
            libc::syscall(libc::SYS_landlock_add_rule, rules, kind, &raw const rule, 0)
        };
        result(added).map(drop)
    }

    /// Binds the calling thread, and those that it starts, to the rules.
    ///
    /// # Errors
    /// What the kernel says.
    fn enter(self) -> Result<(), Errno> {
        // SAFETY: the call takes no pointer.
        let entered =
            unsafe { libc::syscall(libc::SYS_landlock_restrict_self, self.0.as_raw_fd(), 0) };
        result(entered).map(drop)
    }
}

fn result(returned: libc::c_long) -> Result<i32, Errno> {
    match i32::try_from(returned) {
        Ok(done @ 0..) => Ok(done),
        _ => {
            let error = std::io::Error::last_os_error();
            Err(Errno::from_io_error(&error).unwrap_or(Errno::INVAL))
        }
    }
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
