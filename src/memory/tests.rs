//! Guest memory is what was asked for, on this host.

use super::*;
use rustix::fs::FallocateFlags;
use vm_memory::Bytes;

#[test]
fn memory_is_aligned_with_the_guests_addresses() {
    let bank = Range::new(0x4000_0000, 6 << 20).expect("a bank");
    let odd = Range::new(0x8000_0000 + 0x1_0000, 1 << 20).expect("a bank");
    let memory = map(&[bank, odd], Sharing::Private, Backing::default(), None).expect("7 MiB");
    let block = page_size() / 8 * page_size();
    for (region, bank) in memory.iter().zip([bank, odd]) {
        let (guest, host) = (region.start_addr().0, region.as_ptr() as u64);
        assert_eq!(guest % block as u64, host % block as u64);
        // SAFETY: the memory is this test's own.
        let mut idle = unsafe { IdleMemory::new(&memory, &mut []) };
        let bytes = idle.slice_mut(bank).expect("all of it");
        assert!(bytes.iter().all(|byte| *byte == 0));
        bytes[bank.size() as usize - 1] = 1;
    }
}

#[test]
fn shared_memory_has_a_descriptor_by_which_another_process_sees_it() {
    let bank = Range::new(0x4000_0000, 4 << 20).expect("a bank");
    let memory = map(&[bank], Sharing::Shared, Backing::default(), None).expect("4 MiB");
    let at = GuestAddress(bank.last());
    memory.write_slice(b"x", at).expect("memory");
    let region = memory.iter().next().expect("a bank");
    let file = region.file_offset().expect("a file");
    let mut byte = [0];
    rustix::io::pread(file.file(), &mut byte, bank.size() - 1).expect("a byte");
    assert_eq!(&byte, b"x");
    let block = page_size() / 8 * page_size();
    assert_eq!(region.as_ptr() as usize % block, 0x4000_0000 % block);
}

#[test]
fn whoever_has_the_descriptor_of_shared_memory_cannot_change_its_size() {
    let bank = Range::new(0x4000_0000, 4 << 20).expect("a bank");
    for pages in ["thp", "2M"] {
        let backing = Backing {
            pages: pages.parse().expect("valid"),
            ..Backing::default()
        };
        let memory = match map(&[bank], Sharing::Shared, backing, None) {
            Ok(memory) => memory,
            Err(error) => {
                assert_eq!(pages, "2M", "{error:#}");
                println!("skipped: {error:#}");
                continue;
            }
        };
        let region = memory.iter().next().expect("a bank");
        let file = region.file_offset().expect("a file").file();
        for size in [0, bank.size() - (2 << 20), bank.size() + (2 << 20)] {
            let changed = rustix::fs::ftruncate(file, size);
            assert_eq!(changed, Err(Errno::PERM), "{pages}: {size} bytes");
        }
        let seals = rustix::fs::fcntl_add_seals(file, SealFlags::WRITE);
        assert_eq!(seals, Err(Errno::PERM), "{pages}: another seal");
        // What a balloon does with memory that the guest returns.
        let start = GuestAddress(bank.start());
        memory.write_slice(b"x", start).expect("memory");
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(file, hole, 0, 2 << 20).expect("a hole");
        assert_eq!(memory.read_obj::<u8>(start).expect("memory"), 0);
    }
}

/// Returns the value of `key` in /proc/self/smaps for the mapping that contains `address`.
fn smaps(address: usize, key: &str) -> String {
    let text = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let holds = |line: &str| {
        let range = line
            .split(' ')
            .next()
            .and_then(|range| range.split_once('-'));
        let number = |text: &str| usize::from_str_radix(text, 16).ok();
        range.is_some_and(|(start, end)| {
            number(start).is_some_and(|start| start <= address)
                && number(end).is_some_and(|end| address < end)
        })
    };
    let mut lines = text.lines().skip_while(|line| !holds(line));
    let line = lines.find(|line| line.starts_with(key));
    line.unwrap_or_else(|| panic!("no {key} at {address:x}"))
        .to_owned()
}

#[test]
fn memory_is_what_was_asked_for() {
    let bank = Range::new(0x4000_0000, 4 << 20).expect("a bank");
    let flags_of = |backing| {
        let memory = map(&[bank], Sharing::Private, backing, None).expect("4 MiB");
        let start = memory.iter().next().expect("a bank").as_ptr() as usize;
        (smaps(start, "VmFlags"), smaps(start, "Rss"))
    };
    let (flags, _) = flags_of(Backing::default());
    assert!(flags.contains(" hg") && !flags.contains(" mg"), "{flags}");
    let (flags, rss) = flags_of(Backing {
        pages: HugePages::None,
        prefault: true,
        ..Backing::default()
    });
    assert!(flags.contains(" nh"), "{flags}");
    let taken = rss
        .split_whitespace()
        .nth(1)
        .and_then(|size| size.parse().ok());
    assert!(taken.is_some_and(|taken: u64| taken >= 4096), "{rss}");
    if std::path::Path::new("/sys/kernel/mm/ksm").exists() {
        let (flags, _) = flags_of(Backing {
            mergeable: true,
            ..Backing::default()
        });
        assert!(flags.contains(" mg"), "{flags}");
    }
}

#[test]
fn what_does_not_go_together_or_is_not_there_is_refused() {
    let bank = Range::new(0x4000_0000, 5 << 20).expect("a bank");
    let refused = |pages: &str, mergeable, sharing| {
        let backing = Backing {
            pages: pages.parse().expect("valid"),
            mergeable,
            ..Backing::default()
        };
        format!(
            "{:#}",
            map(&[bank], sharing, backing, None).expect_err(pages)
        )
    };
    for (pages, mergeable, sharing, words) in [
        ("2M", false, Sharing::Private, "with 5M is no whole number"),
        ("1T", false, Sharing::Private, "no whole number"),
        ("2M", true, Sharing::Private, "never merged"),
        ("thp", true, Sharing::Shared, "one process"),
    ] {
        let error = refused(pages, mergeable, sharing);
        assert!(error.contains(words), "{pages}: {error}");
    }
    // No kernel has pages of 512K in a pool.
    let whole = Range::new(0x4000_0000, 1 << 20).expect("a bank");
    for sharing in [Sharing::Private, Sharing::Shared] {
        let backing = Backing {
            pages: HugePages::Of(512 << 10),
            ..Backing::default()
        };
        let error = format!(
            "{:#}",
            map(&[whole], sharing, backing, None).expect_err("none")
        );
        assert!(error.contains("no pages of that size"), "{error}");
    }
}

#[test]
fn advice_about_a_limit_is_for_the_limit_that_there_is() {
    const M: u64 = 1 << 20;
    for (limit, advice) in [
        (Some((Some(8 * M), Some(8 * M))), "prlimit"),
        (Some((Some(8 * M), Some(128 * M))), "ulimit -l 131072"),
        (Some((Some(8 * M), None)), "ulimit -l unlimited"),
        (Some((None, None)), "use less --memory"),
        (None, "use less --memory"),
    ] {
        let text = advice_on_lock(64 * M, limit);
        assert!(text.contains(advice), "{limit:?}: {text}");
    }
}

#[test]
fn more_than_the_address_space_is_an_error() {
    let bank = Range::new(0, 1 << 60).expect("a range");
    let error = map(&[bank], Sharing::Private, Backing::default(), None).expect_err("an exbibyte");
    assert!(format!("{error:#}").contains("guest memory"), "{error:#}");
}

#[test]
fn a_range_across_banks_is_no_slice() {
    let bank = Range::new(0x4000_0000, 1 << 20).expect("a bank");
    let memory = map(&[bank], Sharing::Private, Backing::default(), None).expect("1 MiB");
    let beyond = Range::new(0x4000_0000, 2 << 20).expect("a range");
    // SAFETY: the memory is this test's own.
    let mut idle = unsafe { IdleMemory::new(&memory, &mut []) };
    assert!(idle.slice_mut(beyond).is_err());
}
