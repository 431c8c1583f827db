//! The host's pages.

/// The size of a page in bytes. The C library was told when the program started; rustix asks the kernel.
#[must_use]
pub fn page_size() -> usize {
    // SAFETY: the call touches no memory.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}
