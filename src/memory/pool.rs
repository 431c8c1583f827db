//! The host's pools of huge pages (Documentation/admin-guide/mm/hugetlbpage.rst), for the advice
//! that is given when one is too small.

use armlet_arch::size::show_size;
use std::path::{Path, PathBuf};

/// The directory with a pool for each size.
const POOLS: &str = "/sys/kernel/mm/hugepages";

/// Returns why a pool cannot provide `bytes` more in pages of `size` bytes, and what would help.
pub(super) fn shortage(size: u64, bytes: u64) -> String {
    shortage_at(Path::new(POOLS), size, bytes, available())
}

/// Like [`shortage`], for the pools in `pools`, on a host with `available` bytes for more pages.
fn shortage_at(pools: &Path, size: u64, bytes: u64, available: Option<u64>) -> String {
    let folder = pools.join(format!("hugepages-{}kB", size >> 10));
    let number = |file: &str| {
        let text = std::fs::read_to_string(folder.join(file)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let Some(all) = number("nr_hugepages") else {
        return match sizes(pools).as_slice() {
            [] => "this kernel has no pools of huge pages; use --hugepages thp".to_owned(),
            known => format!(
                "this kernel has no pages of that size; use {}",
                known.join(", ")
            ),
        };
    };
    // Pages that are reserved for other mappings but not touched yet count as free.
    let reserved = number("resv_hugepages").unwrap_or(0);
    let free = number("free_hugepages").unwrap_or(0);
    let free = free.saturating_sub(reserved);
    let wanted = bytes / size;
    let what = format!("{wanted} pages are needed, and {free} of {all} in the pool are free");
    let missing = wanted.saturating_sub(free);
    match available {
        Some(bytes) if bytes / size < missing => format!(
            "{what}; this host has {} MiB left to make pages of: use less --memory, or --hugepages thp",
            bytes >> 20
        ),
        _ => format!(
            "{what}; as root, 'echo {} > {}' makes it large enough, if as many show up in that file",
            all + missing,
            folder.join("nr_hugepages").display()
        ),
    }
}

/// Returns the sizes that this kernel has pools of, in the form that `--hugepages` takes.
fn sizes(pools: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(pools).into_iter().flatten().flatten();
    let mut sizes: Vec<u64> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let size = name.to_str()?.strip_prefix("hugepages-")?;
            size.strip_suffix("kB")?.parse().ok()
        })
        .collect();
    sizes.sort_unstable();
    sizes.iter().map(|size| show_size(size << 10)).collect()
}

/// Returns how many bytes the host could allocate without swapping (proc_meminfo(5): MemAvailable).
fn available() -> Option<u64> {
    let text = std::fs::read_to_string(PathBuf::from("/proc/meminfo")).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 = line?.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 2 << 20;

    fn pool(all: u64, free: u64, reserved: u64) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        let pool = folder.path().join("hugepages-2048kB");
        std::fs::create_dir(&pool).expect("a folder");
        for (file, value) in [
            ("nr_hugepages", all),
            ("free_hugepages", free),
            ("resv_hugepages", reserved),
        ] {
            std::fs::write(pool.join(file), format!("{value}\n")).expect("a file");
        }
        folder
    }

    /// Returns the number that the advice writes to the pool's file.
    fn advised(text: &str) -> u64 {
        let number = text
            .split_once("'echo ")
            .and_then(|(_, rest)| rest.split(' ').next());
        number.and_then(|number| number.parse().ok()).expect(text)
    }

    #[test]
    fn the_advice_makes_room_beside_pages_that_are_in_use_or_promised() {
        // All, free, reserved, wanted.
        for (all, free, reserved, wanted) in [
            (100, 70, 40, 64),
            (64, 0, 0, 64),
            (0, 0, 0, 16),
            (10, 10, 10, 1),
            (100, 63, 0, 64),
        ] {
            let folder = pool(all, free, reserved);
            let text = shortage_at(folder.path(), PAGE, wanted * PAGE, None);
            let advised = advised(&text);
            assert!(advised >= all, "{text}");
            // What the pool then has for a new mapping.
            assert_eq!(advised - (all - free) - reserved, wanted, "{text}");
            assert!(text.contains(&format!("and {} of {all} in the pool", free - reserved)));
        }
    }

    #[test]
    fn a_host_with_too_little_memory_is_not_told_to_enlarge_its_pool() {
        let folder = pool(0, 0, 0);
        let text = shortage_at(folder.path(), PAGE, 64 * PAGE, Some(63 * PAGE));
        assert!(
            text.contains("126 MiB left") && !text.contains("echo"),
            "{text}"
        );
        let text = shortage_at(folder.path(), PAGE, 64 * PAGE, Some(64 * PAGE));
        assert_eq!(advised(&text), 64);
    }

    #[test]
    fn the_sizes_that_are_there_are_named() {
        let folder = pool(0, 0, 0);
        std::fs::create_dir(folder.path().join("hugepages-1048576kB")).expect("a folder");
        let text = shortage_at(folder.path(), 512 << 10, 1 << 20, None);
        assert!(text.ends_with("use 2M, 1G"), "{text}");
        let none = tempfile::tempdir().expect("a folder");
        let text = shortage_at(none.path(), PAGE, PAGE, None);
        assert!(text.ends_with("use --hugepages thp"), "{text}");
    }
}
