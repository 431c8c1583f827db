//! Snapshots of memory of all kinds, written, replaced, cut off and read again.

mod crash;
mod faults;
mod speed;

use crate::copy::is_zero;
use crate::merge::{Merged, Pair};
use crate::pages::{Backing, Base, Piece, Written, write, write_diff};
use crate::prefetch::{Prefetch, recorder};
use crate::state::{Bank, State};
use crate::{Draft, Id, PAGE, Paths, Runs, Snapshot};
use anyhow::{Result, bail};
use proptest::prelude::*;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestRegionMmap, MemoryRegionAddress, MmapRegion,
};

/// Address of the one bank in these tests.
const START: u64 = 0x4000_0000;

/// /proc/self/pagemap.
pub(crate) fn pagemap() -> File {
    File::open("/proc/self/pagemap").expect("a pagemap")
}

/// The kinds of memory that a guest may have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    Private,
    Shared,
    Copied,
}

const KINDS: [Kind; 3] = [Kind::Private, Kind::Shared, Kind::Copied];

/// Memory of a kind with this content; that of a file has it in its file.
pub(crate) fn region(kind: Kind, content: &[u8]) -> GuestRegionMmap {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(content.len() as u64).expect("room");
    let place = || Some(FileOffset::new(file.try_clone().expect("a file"), 0));
    let own = libc_flags::PRIVATE | libc_flags::NORESERVE;
    let (place, flags) = match kind {
        Kind::Private => (None, own | libc_flags::ANONYMOUS),
        Kind::Shared => (place(), libc_flags::SHARED),
        Kind::Copied => {
            write_pages(&file, content);
            (place(), own)
        }
    };
    let mapping = MmapRegion::build(place, content.len(), 3, flags).expect("memory");
    let region = GuestRegionMmap::new(mapping, GuestAddress(START)).expect("a region");
    if kind != Kind::Copied {
        fill(&region, content);
    }
    region
}

/// Memory of this process that was never used.
pub(crate) fn unused(size: usize) -> GuestRegionMmap {
    let flags = libc_flags::PRIVATE | libc_flags::NORESERVE | libc_flags::ANONYMOUS;
    let mapping = MmapRegion::build(None, size, 3, flags).expect("memory");
    GuestRegionMmap::new(mapping, GuestAddress(START)).expect("a region")
}

/// Flags of mmap(2), which vm-memory takes as numbers.
mod libc_flags {
    pub(super) const SHARED: i32 = 1;
    pub(super) const PRIVATE: i32 = 2;
    pub(super) const ANONYMOUS: i32 = 0x20;
    pub(super) const NORESERVE: i32 = 0x4000;
}

/// Writes pages that are not zero to a file.
fn write_pages(file: &File, content: &[u8]) {
    for (index, page) in content.chunks(PAGE as usize).enumerate() {
        if !is_zero(page) {
            file.write_all_at(page, index as u64 * PAGE).expect("room");
        }
    }
}

/// Writes pages to memory that are others there.
pub(crate) fn fill(region: &GuestRegionMmap, content: &[u8]) {
    let mut there = vec![0; PAGE as usize];
    for (index, page) in content.chunks(PAGE as usize).enumerate() {
        let at = MemoryRegionAddress(index as u64 * PAGE);
        // Zeros that are written are pages, too.
        if !is_zero(page) {
            region.write_slice(page, at).expect("memory");
        } else if index % 2 == 0 {
            region.read_slice(&mut there, at).expect("memory");
            if there != page {
                region.write_slice(page, at).expect("memory");
            }
        }
    }
}

/// Memory of these pages, each full of a byte.
pub(crate) fn content(pages: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for byte in pages {
        bytes.resize(bytes.len() + PAGE as usize, *byte);
    }
    bytes
}

fn whole(region: &GuestRegionMmap, pagemap: Option<&File>, into: &File) -> Written {
    let piece = Piece::of(region).expect("mapped");
    write(&[piece], pagemap, into, &mut |_| Ok(())).expect("written")
}

pub(crate) fn bytes(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().expect("a file").size() as usize];
    file.read_exact_at(&mut bytes, 0).expect("all of it");
    bytes
}

/// Takes a snapshot, or a diff to a whole one.
pub(crate) fn take(
    region: &GuestRegionMmap,
    paths: &Paths,
    base: Option<&Snapshot>,
    head: &[u8],
) -> Result<Id> {
    let base = base.map(|base| (base.state.id, to(&base.memory)));
    take_to(region, paths, base, head)
}

/// Takes a snapshot, or a diff to the one with this id, which has this memory.
fn take_to(
    region: &GuestRegionMmap,
    paths: &Paths,
    base: Option<(Id, Base<'_>)>,
    head: &[u8],
) -> Result<Id> {
    let draft = Draft::create(paths)?;
    let pieces = [Piece::of(region)?];
    let (map, into) = (pagemap(), draft.memory());
    let written = match &base {
        Some((_, base)) => write_diff(&pieces, Some(&map), base, into, &mut |_| Ok(()))?,
        None => write(&pieces, Some(&map), into, &mut |_| Ok(()))?,
    };
    let state = State {
        id: draft.id(),
        base: base.map(|(id, _)| id),
        banks: vec![Bank {
            start: START,
            size: vm_memory::GuestMemoryRegion::len(region),
        }],
        changed: written.changed,
        head: head.to_vec(),
        body: head.repeat(100),
    };
    state.write(draft.state())?;
    let id = draft.id();
    draft.commit()?;
    Ok(id)
}

/// The memory of a whole snapshot alone.
pub(crate) fn to(whole: &File) -> Base<'_> {
    Base {
        whole,
        later: Vec::new(),
    }
}

/// The names in a folder, in order.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).expect("a folder");
    let mut names: Vec<_> = names
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .into_string()
                .expect("UTF-8")
        })
        .collect();
    names.sort();
    names
}

/// Merges a diff into its base.
pub(crate) fn merged(base: &Paths, diff: &Paths) -> Result<Merged> {
    Pair::open(base, diff)?.apply()
}

/// The one run of a list.
fn only(runs: &Runs) -> Range<u64> {
    assert_eq!(runs.iter().count(), 1, "{runs:?}");
    runs.iter().next().expect("a run")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn memory_is_read_as_it_was_written(
        before in prop::collection::vec(0..3_u8, 1..400),
        seed: u64,
    ) {
        // Some pages are written once more, as those of a guest that was restored.
        let now: Vec<u8> = before.iter().enumerate().map(|(index, byte)| {
            match (seed >> (index % 64)) & 1 { 0 => *byte, _ => (index % 5) as u8 }
        }).collect();
        let map = pagemap();
        for kind in KINDS {
            for pagemap in [Some(&map), None] {
                let region = region(kind, &content(&before));
                fill(&region, &content(&now));
                let expected = content(&read_pages(&region));
                let file = tempfile::tempfile().expect("a file");
                let written = whole(&region, pagemap, &file);
                prop_assert!(bytes(&file) == expected, "{kind:?}");
                prop_assert!(written.bytes <= expected.len() as u64);
            }
        }
    }

    #[test]
    fn a_base_and_a_diff_are_the_memory(
        first in prop::collection::vec(0..3_u8, 100),
        second in prop::collection::vec((0..100_usize, 0..3_u8), 0..40),
        third in prop::collection::vec((0..100_usize, 0..3_u8), 0..40),
        kind in prop::sample::select(&KINDS[..]),
        is_merged_first: bool,
    ) {
        let folder = tempfile::tempdir().expect("a folder");
        let paths = |name| Paths::folder(&folder.path().join(name));
        let region = region(kind, &content(&first));
        let [base, one, two] = ["base", "one", "two"].map(paths);
        take(&region, &base, None, b"0").expect("a snapshot");
        let mut memories: Vec<(Vec<u8>, Id)> = Vec::new();
        for (paths, changes) in [(&one, second), (&two, third)] {
            let mut now = read_pages(&region);
            for (page, byte) in changes {
                now[page] = byte;
                let at = MemoryRegionAddress(page as u64 * PAGE);
                region.write_slice(&content(&[byte]), at).expect("memory");
            }
            // The first diff is to the base, the second to both together.
            let whole = Snapshot::open(&base).expect("a snapshot");
            let first = Snapshot::open(&one).ok();
            let later = first.iter().map(|it| (&it.memory, &it.state.changed)).collect();
            let to = first.as_ref().map_or(whole.state.id, |first| first.state.id);
            let before = Base { whole: &whole.memory, later };
            let id = take_to(&region, paths, Some((to, before)), b"1").expect("a diff");
            let diff = Snapshot::open(paths).expect("a diff");
            prop_assert!(Snapshot::check_whole(&diff.state).is_err());
            memories.push((now, id));
        }
        if is_merged_first {
            merged(&one, &two).expect("two diffs");
            merged(&base, &one).expect("the diff of both");
        } else {
            for (diff, (memory, id)) in [&one, &two].into_iter().zip(&memories) {
                let outcome = merged(&base, diff).expect("the next diff");
                prop_assert_eq!(outcome.id, *id);
                let there = Snapshot::open(&base).expect("a snapshot");
                prop_assert!(bytes(&there.memory) == content(memory));
                // Once more does nothing.
                prop_assert_eq!(merged(&base, diff).expect("done").pages, 0);
            }
        }
        let there = Snapshot::open(&base).expect("a snapshot");
        Snapshot::check_whole(&there.state).expect("whole");
        prop_assert!(bytes(&there.memory) == content(&memories[1].0));
        prop_assert_eq!(there.state.id, memories[1].1);
        prop_assert_eq!(&there.state.head, b"1");
        prop_assert_eq!(names(&folder.path().join("base")), ["memory", "state"]);
    }

    #[test]
    fn a_list_of_pages_is_read_or_refused(bytes: Vec<u8>, damage: (prop::sample::Index, u8)) {
        let id: Id = "00000000000000ab".parse().expect("an id");
        prop_assert_eq!(Prefetch::from_bytes(&bytes, id, 1 << 20), None);
        let mut list = Prefetch::default();
        list.read.push(3..40);
        list.written.push(0..1);
        list.written.push(256..257);
        let mut bytes = list.to_bytes(id);
        let size = 257 * PAGE;
        prop_assert_eq!(Prefetch::from_bytes(&bytes, id, size), Some(list));
        prop_assert_eq!(Prefetch::from_bytes(&bytes, id, size - PAGE), None);
        let other = "00000000000000ac".parse().expect("an id");
        prop_assert_eq!(Prefetch::from_bytes(&bytes, other, size), None);
        let at = damage.0.index(bytes.len());
        if bytes[at] != damage.1 {
            bytes[at] = damage.1;
            prop_assert_eq!(Prefetch::from_bytes(&bytes, id, size), None);
        }
    }
}

/// The first byte of each page.
pub(crate) fn read_pages(region: &GuestRegionMmap) -> Vec<u8> {
    let pages = vm_memory::GuestMemoryRegion::len(region) / PAGE;
    let at = |page| MemoryRegionAddress(page * PAGE);
    (0..pages)
        .map(|page| region.read_obj(at(page)).expect("memory"))
        .collect()
}

/// Bytes of memory that a file or a mapping takes.
fn taken(file: &File) -> u64 {
    file.metadata().expect("a file").blocks() * 512
}

#[test]
fn what_a_guest_never_used_is_neither_read_nor_written() {
    const SIZE: usize = 64 << 20;
    let map = pagemap();
    for kind in KINDS {
        let region = region(kind, &vec![0; SIZE]);
        region
            .write_slice(&[1; 100], MemoryRegionAddress(SIZE as u64 / 2))
            .expect("memory");
        let before = resident();
        let file = tempfile::tempfile().expect("a file");
        let written = whole(&region, Some(&map), &file);
        assert_eq!(written.bytes, PAGE, "{kind:?}");
        assert!(taken(&file) <= 64 << 10, "{kind:?}: {} bytes", taken(&file));
        assert_eq!(file.metadata().expect("a file").size(), SIZE as u64);
        // The buffer is the most that it takes.
        let more = resident().saturating_sub(before);
        assert!(more <= 8 << 20, "{kind:?}: {more} bytes");
    }
}

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").expect("statm");
    let pages = text.split(' ').nth(1).expect("a second number");
    let pages: u64 = pages.parse().expect("a number");
    pages * armlet_system::page_size::page_size() as u64
}

#[test]
fn a_page_that_becomes_zero_is_told_from_one_that_did_not_change() {
    let folder = tempfile::tempdir().expect("a folder");
    let [base, diff] = ["base", "diff"].map(|name| Paths::folder(&folder.path().join(name)));
    for kind in KINDS {
        let region = region(kind, &content(&[1, 1, 1, 0]));
        take(&region, &base, None, b"0").expect("a snapshot");
        let zeros = content(&[0]);
        region
            .write_slice(&zeros, MemoryRegionAddress(PAGE))
            .expect("memory");
        region
            .write_slice(&zeros, MemoryRegionAddress(3 * PAGE))
            .expect("memory");
        let from = Snapshot::open(&base).expect("a snapshot");
        take(&region, &diff, Some(&from), b"1").expect("a diff");
        let there = Snapshot::open(&diff).expect("a diff");
        assert_eq!(only(&there.state.changed), 1..2, "{kind:?}");
        // Tools for Firecracker's diffs take what is no hole.
        assert_eq!(taken(&there.memory), PAGE, "{kind:?}");
        // Those that dig holes do no harm.
        let copied = tempfile::tempfile().expect("a file");
        copied.set_len(4 * PAGE).expect("room");
        fs::write(&diff.memory, bytes(&copied)).expect("a file");
        merged(&base, &diff).expect("merged");
        let there = Snapshot::open(&base).expect("a snapshot");
        assert_eq!(bytes(&there.memory), content(&[1, 0, 1, 0]), "{kind:?}");
    }
}

#[test]
fn a_page_that_becomes_what_it_was_before_the_last_diff_is_in_the_next_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let of = |name: &str| Paths::folder(&folder.path().join(name));
    let [base, one, two] = ["base", "one", "two"].map(of);
    for kind in KINDS {
        let region = region(kind, &content(&[0, 1, 2]));
        take(&region, &base, None, b"0").expect("a snapshot");
        let whole = Snapshot::open(&base).expect("a snapshot");
        let at = |page| MemoryRegionAddress(page * PAGE);
        region.write_slice(&content(&[7]), at(0)).expect("memory");
        region.write_slice(&content(&[7]), at(1)).expect("memory");
        take(&region, &one, Some(&whole), b"1").expect("a diff");
        region.write_slice(&content(&[0]), at(0)).expect("memory");
        region.write_slice(&content(&[1]), at(1)).expect("memory");
        let first = Snapshot::open(&one).expect("a diff");
        let before = Base {
            whole: &whole.memory,
            later: vec![(&first.memory, &first.state.changed)],
        };
        let to = first.state.id;
        take_to(&region, &two, Some((to, before)), b"2").expect("a diff");
        let second = Snapshot::open(&two).expect("a diff").state;
        assert_eq!(only(&second.changed), 0..2, "{kind:?}");
        assert!(merged(&base, &two).is_err(), "{kind:?}: one is missing");
        merged(&base, &one).expect("the first");
        merged(&base, &two).expect("the second");
        let there = Snapshot::open(&base).expect("a snapshot");
        assert_eq!(bytes(&there.memory), content(&[0, 1, 2]), "{kind:?}");
    }
}

#[test]
fn pages_of_the_base_itself_are_not_compared() {
    let folder = tempfile::tempdir().expect("a folder");
    let base = Paths::folder(folder.path());
    let first = region(Kind::Private, &content(&[1; 600]));
    take(&first, &base, None, b"0").expect("a snapshot");
    let snapshot = Snapshot::open(&base).expect("a snapshot");
    // As it is restored.
    let place = FileOffset::new(snapshot.memory.try_clone().expect("a file"), 0);
    let flags = libc_flags::PRIVATE | libc_flags::NORESERVE;
    let mapping = MmapRegion::build(Some(place), 600 * PAGE as usize, 3, flags);
    let region = GuestRegionMmap::new(mapping.expect("memory"), GuestAddress(START));
    let region = region.expect("a region");
    region
        .write_obj(9_u8, MemoryRegionAddress(77 * PAGE))
        .expect("memory");
    // Which would be noticed if they were.
    let writable = File::options().write(true).open(&base.memory);
    let writable = writable.expect("a file");
    let file = tempfile::tempfile().expect("a file");
    let piece = Piece::of(&region).expect("mapped");
    let map = pagemap();
    let written = write_diff(
        &[piece],
        Some(&map),
        &to(&snapshot.memory),
        &file,
        &mut |_| Ok(()),
    );
    assert_eq!(only(&written.expect("a diff").changed), 77..78);
    // A file that lost its end while a guest used it is an error here, and no signal.
    writable.set_len(300 * PAGE).expect("shorter");
    let error = write(&[piece], Some(&map), &file, &mut |_| Ok(())).expect_err("truncated");
    assert!(format!("{error:#}").contains("memory file"), "{error:#}");
}

#[test]
fn a_listener_hears_of_progress_and_can_end_it() {
    let region = region(Kind::Private, &content(&[1; 1024]));
    let piece = Piece::of(&region).expect("mapped");
    let file = tempfile::tempfile().expect("a file");
    let mut heard = Vec::new();
    let map = pagemap();
    write(&[piece], Some(&map), &file, &mut |progress| {
        heard.push(progress.done);
        assert_eq!(progress.total, 1024 * PAGE);
        Ok(())
    })
    .expect("written");
    assert_eq!(heard.last(), Some(&(1024 * PAGE)));
    assert!(heard.is_sorted() && heard.len() >= 4, "{heard:?}");
    let stopped = write(
        &[piece],
        Some(&map),
        &file,
        &mut |progress| match progress.done > 2 << 20 {
            true => bail!("enough"),
            false => Ok(()),
        },
    );
    assert_eq!(stopped.expect_err("ended").to_string(), "enough");
}

#[test]
fn files_that_do_not_belong_together_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let [one, two] = ["one", "two"].map(|name| Paths::folder(&folder.path().join(name)));
    let region = region(Kind::Private, &content(&[1, 2, 3]));
    let id = take(&region, &one, None, b"{}").expect("a snapshot");
    take(&region, &two, None, b"{}").expect("a snapshot");
    let error = |paths: &Paths| format!("{:#}", Snapshot::open(paths).expect_err("refused"));
    let mixed = Paths::pair(&one.state, &two.memory);
    let text = error(&mixed);
    assert!(text.contains(&format!("state is that of {id}")), "{text}");
    // Whether it was copied or not, the size is to be right.
    fs::remove_file(&two.memory).expect("a file");
    fs::copy(&one.memory, &two.memory).expect("a copy");
    Snapshot::open(&Paths::pair(&one.state, &two.memory)).expect("a copy is as good");
    let file = File::options().write(true).open(&two.memory);
    file.expect("a file").set_len(2 * PAGE).expect("shorter");
    let text = error(&Paths::pair(&one.state, &two.memory));
    assert!(text.contains("it has 8192 bytes, and the memory of this snapshot has 12288"));
    let missing = Paths::folder(&folder.path().join("three"));
    assert!(error(&missing).contains("three/state"));
    // Merges.
    let refused = |base, diff| format!("{:#}", merged(base, diff).expect_err("refused"));
    assert!(refused(&one, &one).contains("is a whole snapshot and no diff"));
    let from = Snapshot::open(&one).expect("a snapshot");
    let diff = Paths::folder(&folder.path().join("diff"));
    take(&region, &diff, Some(&from), b"{}").expect("a diff");
    assert!(refused(&diff, &diff).contains("are the same snapshot"));
    take(&region, &two, None, b"{}").expect("a snapshot");
    assert!(refused(&two, &diff).contains("in the order in which they were made"));
    assert!(refused(&missing, &diff).contains("three/state"));
    assert!(!folder.path().join("three").exists());
}

#[test]
fn a_list_of_pages_has_those_that_were_used_and_brings_them_in() {
    let folder = tempfile::tempdir().expect("a folder");
    let paths = Paths::folder(folder.path());
    let first = region(Kind::Private, &content(&[1; 2000]));
    let id = take(&first, &paths, None, b"{}").expect("a snapshot");
    let size = 2000 * PAGE;
    let restored = || {
        let snapshot = Snapshot::open(&paths).expect("a snapshot");
        let place = FileOffset::new(snapshot.memory, 0);
        let flags = libc_flags::PRIVATE | libc_flags::NORESERVE;
        let mapping = MmapRegion::build(Some(place), size as usize, 3, flags);
        GuestRegionMmap::new(mapping.expect("memory"), GuestAddress(START)).expect("a region")
    };
    let map = pagemap();
    let used = restored();
    used.write_obj(7_u8, MemoryRegionAddress(5 * PAGE))
        .expect("memory");
    let _: u8 = used
        .read_obj(MemoryRegionAddress(1000 * PAGE))
        .expect("memory");
    let list = Prefetch::of(&[Piece::of(&used).expect("mapped")], &map).expect("a list");
    assert_eq!(only(&list.written), 5..6);
    assert!(list.read.iter().any(|run| run.contains(&1000)), "{list:?}");
    // The kernel maps neighbours of a page of a file, of one that is large many.
    assert!(list.read.pages() < 1000, "{list:?}");
    // Who records first does it alone, and once.
    let file = recorder(&paths, id, size).expect("the first");
    assert!(recorder(&paths, id, size).is_none(), "another one");
    assert_eq!(Prefetch::read(&paths, id, size), None);
    list.write(&file, id).expect("written");
    drop(file);
    assert!(recorder(&paths, id, size).is_none(), "it is there");
    let known = Prefetch::read(&paths, id, size);
    assert_eq!(known.as_ref(), Some(&list));
    let next = restored();
    let piece = Piece::of(&next).expect("mapped");
    known.expect("a list").bring(&[piece]).expect("brought");
    let there = Prefetch::of(&[piece], &map).expect("a list");
    assert_eq!(there.written, list.written);
    assert!(
        there.read.iter().any(|run| run.contains(&1000)),
        "{there:?}"
    );
    assert_eq!(read_pages(&next), [1; 2000]);
    // Another snapshot has other pages.
    take(&first, &paths, None, b"{}").expect("a snapshot");
    assert_eq!(names(folder.path()), ["memory", "state"]);
    // A list that was cut short is made anew.
    let id = Snapshot::state(&paths).expect("a state").id;
    fs::write(&paths.prefetch, &list.to_bytes(id)[..20]).expect("a file");
    assert!(recorder(&paths, id, size).is_some());
}

#[test]
fn pieces_may_be_of_several_kinds() {
    let one = region(Kind::Copied, &content(&[1, 0, 3]));
    let two = region(Kind::Private, &content(&[0, 5]));
    let slice = |region| vm_memory::GuestMemoryRegion::as_volatile_slice(region).expect("mapped");
    let file = vm_memory::GuestMemoryRegion::file_offset(&one).expect("a file");
    let pieces = [
        Piece::new(slice(&one), Backing::Copied(file.file(), file.start())),
        Piece::new(slice(&two), Backing::Private),
    ];
    let into = tempfile::tempfile().expect("a file");
    let map = pagemap();
    write(&pieces, Some(&map), &into, &mut |_| Ok(())).expect("written");
    assert_eq!(bytes(&into), content(&[1, 0, 3, 0, 5]));
}
