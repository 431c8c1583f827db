//! The size of huge pages.

/// Bytes of a huge page of anonymous memory on a host with pages of `page` bytes: what one page of
/// page tables maps. 2 MiB on 4 KiB pages, 32 MiB on 16 KiB, 512 MiB on 64 KiB.
#[must_use]
pub const fn huge_page(page: usize) -> usize {
    page / 8 * page
}
