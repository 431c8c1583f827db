//! The system calls of Landlock.

use rustix::io::Errno;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// What Landlock is to restrict (include/uapi/linux/landlock.h: struct landlock_ruleset_attr).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Handled {
    pub(super) files: u64,
    pub(super) net: u64,
    pub(super) scopes: u64,
}

/// LANDLOCK_CREATE_RULESET_VERSION.
const VERSION: libc::c_ulong = 1;

/// The version of Landlock that the kernel has; `None` if there is none, or it is switched off.
pub(super) fn landlock() -> Option<u32> {
    let none = std::ptr::null::<Handled>();
    // SAFETY: with this flag the call reads no memory.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, VERSION) };
    u32::try_from(version).ok().filter(|version| *version > 0)
}

/// A set of rules of Landlock, for what it handles.
pub(super) struct Ruleset(OwnedFd);

impl Ruleset {
    /// Makes one without rules, of which the kernel knows the first `size` bytes.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn new(handled: Handled, size: usize) -> Result<Ruleset, Errno> {
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

    /// Binds the calling thread, and those that it starts, to the rules.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn enter(self) -> Result<(), Errno> {
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
