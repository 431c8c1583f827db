#!/usr/bin/env bash
# /proc/PID/pagemap says of anonymous memory that it is a file's, where the huge page of zeros is mapped.
#
# Bit 61 is "page is file-page or shared-anon" (Documentation/admin-guide/mm/pagemap.rst). A read of private
# anonymous memory that was never written maps a page of zeros that all share. The small one has the bit clear;
# the huge one, which transparent huge pages bring, has it set, as it is no anonymous folio. So who takes pages
# with the bit clear for those that a process has of its own, and the others for pages of the file that was
# mapped there once, loses the zeros that took the file's place. The guess before it was run: both pages of
# zeros look the same.
#
# Needs cargo, and a kernel with transparent huge pages (enabled: always or madvise, use_zero_page: 1). Ends with
# another status than 0 if the behaviour changes. Seen with Linux 6.18.44.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uname -r
cat /sys/kernel/mm/transparent_hugepage/{enabled,use_zero_page}

mkdir src
cat > Cargo.toml << 'END'
[package]
name = "zeros"
version = "0.0.0"
edition = "2021"
[dependencies]
libc = "=0.2.177"
procfs = { version = "=0.18.0", default-features = false }
END
cat > src/main.rs << 'END'
use procfs::process::{MemoryPageFlags, PageInfo, Process};

const HUGE: usize = 2 << 20;

fn is_of_file(address: usize) -> bool {
    let page = address / procfs::page_size() as usize;
    let mut pagemap = Process::myself().unwrap().pagemap().unwrap();
    match pagemap.get_info(page).unwrap() {
        PageInfo::MemoryPage(flags) => {
            assert!(flags.contains(MemoryPageFlags::PRESENT), "no page: {flags:?}");
            flags.contains(MemoryPageFlags::FILE)
        }
        other => panic!("{other:?}"),
    }
}

fn main() {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    for (name, advice) in [("small", libc::MADV_NOHUGEPAGE), ("huge", libc::MADV_HUGEPAGE)] {
        unsafe {
            let base = libc::mmap(std::ptr::null_mut(), 2 * HUGE, prot, flags, -1, 0) as usize;
            let start = base.next_multiple_of(HUGE);
            assert_eq!(libc::madvise(start as *mut _, HUGE, advice), 0);
            assert_eq!((start as *const u8).read_volatile(), 0);
            println!("{name} page of zeros, read only: of a file {}", is_of_file(start));
            (start as *mut u8).write_volatile(1);
            println!("{name} page, written: of a file {}", is_of_file(start));
        }
    }
}
END
cargo run -q > output
cat output
diff output - << 'END'
small page of zeros, read only: of a file false
small page, written: of a file false
huge page of zeros, read only: of a file true
huge page, written: of a file false
END
