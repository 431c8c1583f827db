//! The size of huge pages.

/// Returns the size of a transparent huge page in bytes on a host with pages of `page` bytes: what
/// one page of page-table entries maps. 2 MiB on 4 KiB pages, 32 MiB on 16 KiB, 512 MiB on 64 KiB.
#[must_use]
pub const fn huge_page(page: usize) -> usize {
    page / 8 * page
}
