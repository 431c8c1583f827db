//! Pages of the host beneath the guest's memory: giving them back, having those of a file in their
//! place, and locks on such files.

use anyhow::{Context, Result};
use armlet_system::eintr::uninterrupted;
use armlet_system::huge::huge_page;
use armlet_system::page_size::page_size;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::FileExt;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

/// Gives `len` bytes of guest memory from `address` back to the host: they read as zero from then
/// on, also for processes that share them. Parts of the host's pages at either end stay.
///
/// # Errors
/// What is not guest memory, and memory that the host keeps (locked in RAM, of huge pages; small pieces of
/// what a snapshot's file is mapped for).
pub fn discard(memory: &GuestMemoryMmap, address: GuestAddress, len: u64) -> io::Result<()> {
    let page = page_size() as u64;
    let (mut at, mut left) = (address, len);
    while left > 0 {
        let Some((region, offset)) = memory.to_region_addr(at) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let count = left.min(region.len() - offset.0);
        let end = offset.0 + count;
        let first = offset.0.next_multiple_of(page);
        // A region begins at a page's start.
        let whole = (end - end % page).saturating_sub(first);
        if whole > 0 {
            match region.file_offset() {
                Some(file) => {
                    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    let start = file.start() + first;
                    uninterrupted(|| rustix::fs::fallocate(file.file(), flags, start, whole))?;
                }
                None if is_copied(region) => replace(region, first, whole)?,
                None => {
                    let advice = match region.flags() & libc::MAP_SHARED {
                        0 => Advice::LinuxDontNeed,
                        _ => Advice::LinuxRemove,
                    };
                    let start = region.as_ptr().wrapping_add(first as usize);
                    // SAFETY: the range lies in the region's mapping. It is the guest's memory, of
                    // which nobody here relies on what is in it.
                    unsafe { rustix::mm::madvise(start.cast::<c_void>(), whole as usize, advice) }?;
                    keep_small(region, first, whole);
                }
            }
        }
        left -= count;
        at = GuestAddress(at.0.wrapping_add(count));
    }
    Ok(())
}

/// Whether a region is a private mapping of a file, in which pages that are given back would be those of
/// the file again.
fn is_copied(region: &GuestRegionMmap) -> bool {
    region.flags() & (libc::MAP_SHARED | libc::MAP_ANONYMOUS) == 0
}

/// Maps zeros in place of `len` bytes from `offset` of a private mapping of a file.
///
/// A page of zeros is mapped for each, all of them the same one. So who reads from the pagemap what was
/// changed since the file was mapped (`armlet_snapshot::pages`) sees pages there, and does not take the
/// file's for them.
fn replace(region: &GuestRegionMmap, offset: u64, len: u64) -> io::Result<()> {
    /// Mappings are few (vm.max_map_count is 65530): a guest cannot use them up.
    const SMALLEST: u64 = 16 << 10;
    const MOST: usize = 16384;
    static REPLACED: AtomicUsize = AtomicUsize::new(0);
    let add = |count: usize| (count < MOST).then_some(count + 1);
    let relaxed = Ordering::Relaxed;
    if len < SMALLEST || REPLACED.fetch_update(relaxed, relaxed, add).is_err() {
        return Err(Errno::NOBUFS.into());
    }
    let page = page_size();
    let start = region
        .as_ptr()
        .wrapping_add(offset as usize)
        .cast::<c_void>();
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: the range lies in the region's mapping. It is the guest's memory, of which nobody here relies
    // on what is in it, and there is memory all the time.
    unsafe {
        // Locked memory stays, and says so.
        rustix::mm::madvise(start, len as usize, Advice::LinuxDontNeed)?;
        rustix::mm::mmap_anonymous(start, len as usize, prot, flags)?;
        // The kernel takes the huge page of zeros for that of a file, in the pagemap.
        let _ = rustix::mm::madvise(start, len as usize, Advice::LinuxNoHugepage);
        let _ = rustix::mm::madvise(start, len as usize, Advice::LinuxDontDump);
    }
    let slice = region.as_volatile_slice().map_err(io::Error::other)?;
    for at in (offset as usize..(offset + len) as usize).step_by(page) {
        let _: u8 = slice.read_obj(at).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Has the kernel make no huge page of those of which `len` bytes from `offset` are a part: within
/// seconds it would fill up what was given back (mm/khugepaged.c: max_ptes_none).
///
/// On hosts with 4 KiB pages guests report whole huge pages, and what a balloon takes piece by piece
/// stays as Linux has it: such pages never became huge again when the balloon shrinks.
fn keep_small(region: &GuestRegionMmap, offset: u64, len: u64) {
    const REPORTED: u64 = 2 << 20;
    let block = huge_page(page_size()) as u64;
    if block <= REPORTED {
        return;
    }
    let base = region.as_ptr() as u64;
    let (start, end) = (base + offset, base + offset + len);
    let cut = |edge: u64| (!edge.is_multiple_of(block)).then_some(edge - edge % block);
    let (at_start, at_end) = (cut(start), cut(end));
    let at_end = at_end.filter(|_| at_end != at_start);
    for huge in [at_start, at_end].into_iter().flatten() {
        let first = huge.max(base);
        let last = (huge + block).min(base + region.len());
        // SAFETY: the range lies in the region's mapping, and what is in it stays. Without huge pages
        // in the kernel there is nothing to do.
        let _ = unsafe {
            let (start, len) = (first as *mut c_void, (last - first) as usize);
            rustix::mm::madvise(start, len, Advice::LinuxNoHugepage)
        };
    }
}

/// Maps the first `size` bytes of a file, shared, and for reading only where `readonly`. The
/// mapping stays until the process ends. Returns its address, which is aligned so that KVM can map
/// the file in huge blocks where the guest's address is as well.
///
/// # Errors
/// What the host says: no room in the address space, a file system without mappings.
pub fn map_file(file: &File, size: usize, readonly: bool) -> Result<*mut u8> {
    let block = huge_page(page_size());
    let reserved = size.checked_add(block).context("it is too large")?;
    let nothing = ProtFlags::empty();
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new anonymous mapping at an address that the kernel chooses. What is left of it
    // around the file stays: it cannot be touched, and takes no memory.
    let start = unsafe { rustix::mm::mmap_anonymous(null_mut(), reserved, nothing, flags) }?;
    let base = (start as usize).next_multiple_of(block) as *mut c_void;
    let prot = match readonly {
        true => ProtFlags::READ,
        false => ProtFlags::READ | ProtFlags::WRITE,
    };
    let flags = MapFlags::SHARED | MapFlags::FIXED;
    // SAFETY: the range lies in the mapping made above, which nobody uses.
    unsafe { rustix::mm::mmap(base, size, prot, flags, file, 0) }?;
    // SAFETY: the range is the mapping made above. Without it a core dump of armlet would hold
    // the file.
    let _ = unsafe { rustix::mm::madvise(base, size, Advice::LinuxDontDump) };
    Ok(base.cast())
}

/// The first `size` bytes of a file, which [`map_file`] has mapped at `address`, as a part of guest
/// memory.
///
/// # Errors
/// A size or place that cannot be.
pub fn region(
    start: GuestAddress,
    address: usize,
    size: usize,
    file: File,
    readonly: bool,
) -> Result<GuestRegionMmap> {
    let prot = match readonly {
        true => libc::PROT_READ,
        false => libc::PROT_READ | libc::PROT_WRITE,
    };
    let builder = MmapRegionBuilder::new(size)
        .with_mmap_prot(prot)
        .with_mmap_flags(libc::MAP_SHARED)
        .with_file_offset(FileOffset::new(file, 0));
    // SAFETY: such mappings stay until the process ends.
    let region = unsafe { builder.with_raw_mmap_pointer(address as *mut u8) }.build()?;
    GuestRegionMmap::new(region, start).context("it ends past 2^64")
}

/// Whether a part of guest memory is persistent memory: RAM takes no room before it is used
/// (`memory::map`), and a file needs none.
#[must_use]
pub fn is_persistent(region: &GuestRegionMmap) -> bool {
    region.flags() & libc::MAP_NORESERVE == 0
}

/// A mapping by [`map_file`] in which devices read and write, for the handler of SIGBUS.
struct Mapping {
    address: AtomicUsize,
    /// Bytes; set last.
    size: AtomicUsize,
    fd: AtomicI32,
    readonly: AtomicBool,
    lost: AtomicBool,
}

impl Mapping {
    const fn none() -> Mapping {
        Mapping {
            address: AtomicUsize::new(0),
            size: AtomicUsize::new(0),
            fd: AtomicI32::new(-1),
            readonly: AtomicBool::new(false),
            lost: AtomicBool::new(false),
        }
    }
}

/// More than a machine has slots for devices.
const MOST_MAPPINGS: usize = 64;
static MAPPINGS: [Mapping; MOST_MAPPINGS] = [const { Mapping::none() }; MOST_MAPPINGS];
static MAPPINGS_USED: AtomicUsize = AtomicUsize::new(0);
/// For a mapping beyond those.
static NEVER_LOST: AtomicBool = AtomicBool::new(false);

/// Has memory take the place of what a mapping by [`map_file`] lacks when a thread of this process
/// touches it: where the file was cut, or has no room. Without that armlet would die of SIGBUS.
/// (Where a vCPU touches it, KVM says so.) Returns what becomes true then: what was written there is
/// lost.
pub fn survive_missing(
    address: usize,
    size: usize,
    file: &File,
    readonly: bool,
) -> &'static AtomicBool {
    let index = MAPPINGS_USED.fetch_add(1, Ordering::Relaxed);
    let Some(mapping) = MAPPINGS.get(index) else {
        return &NEVER_LOST;
    };
    mapping.address.store(address, Ordering::Relaxed);
    // For as long as the mapping stays; without one, page after page is replaced.
    let fd = file.try_clone().map_or(-1, IntoRawFd::into_raw_fd);
    mapping.fd.store(fd, Ordering::Relaxed);
    mapping.readonly.store(readonly, Ordering::Relaxed);
    mapping.size.store(size, Ordering::Release);
    // SAFETY: all fields are numbers or sets of them, for which zero is a value; the handler has the
    // type that SA_SIGINFO asks for, and calls nothing that a signal handler may not.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &raw const action, null_mut());
    }
    &mapping.lost
}

/// The page at `si_addr` is not there.
extern "C" fn on_bus_error(_: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel gives a valid siginfo_t, which has an address for SIGBUS.
    let touched = unsafe { (*info).si_addr() } as usize;
    let is_there = MAPPINGS.iter().find(|mapping| {
        let size = mapping.size.load(Ordering::Acquire);
        touched.wrapping_sub(mapping.address.load(Ordering::Relaxed)) < size
    });
    let is_replaced = is_there.is_some_and(|mapping| {
        let page = page_size();
        let address = mapping.address.load(Ordering::Relaxed);
        let size = mapping.size.load(Ordering::Relaxed);
        // SAFETY: all fields are numbers, and the call writes to nothing else.
        let end = unsafe {
            let mut found: libc::stat = std::mem::zeroed();
            let done = libc::fstat(mapping.fd.load(Ordering::Relaxed), &raw mut found);
            (done == 0).then_some(found.st_size as usize)
        };
        // All that was cut off, or a page for which the host has no room.
        let offset = (touched - address) / page * page;
        let (start, len) = match end.map(|end| end.next_multiple_of(page)) {
            Some(end) if end <= offset => (end, size - end),
            _ => (offset, page),
        };
        let prot = match mapping.readonly.load(Ordering::Relaxed) {
            true => libc::PROT_READ,
            false => libc::PROT_READ | libc::PROT_WRITE,
        };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the range lies in a mapping of a file that stays until the process ends, in which
        // nobody holds a reference: it is the guest's memory.
        let new = unsafe { libc::mmap((address + start) as *mut c_void, len, prot, flags, -1, 0) };
        mapping.lost.store(true, Ordering::Relaxed);
        new != libc::MAP_FAILED
    });
    if !is_replaced {
        // The access is made again, and ends the process as it would have without this handler.
        // SAFETY: the default action is one of the kernel's.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
}

/// The next page's start, unless `offset` is one.
#[must_use]
pub fn whole(offset: u64) -> u64 {
    offset.next_multiple_of(page_size() as u64)
}

/// Whether the host has a page for what a mapping by [`map_file`] has at `offset`. It gets one by
/// this question. Hosts before Linux 5.14 cannot be asked: they have none.
#[must_use]
pub fn has_page(address: usize, offset: u64, to_write: bool) -> bool {
    let page = page_size();
    let start = (address + offset as usize) / page * page;
    let advice = match to_write {
        true => Advice::LinuxPopulateWrite,
        false => Advice::LinuxPopulateRead,
    };
    // SAFETY: the page lies in the mapping of a file, and keeps what it holds.
    unsafe { rustix::mm::madvise(start as *mut c_void, page, advice) }.is_ok()
}

/// Puts memory in the place of what a mapping by [`map_file`] has from `start` to `end`, with what
/// can be read of the file there: where the host has no page for it. What is written to it goes
/// nowhere.
///
/// # Errors
/// What the host says: no memory.
pub fn detach(address: usize, file: &File, start: u64, end: u64, readonly: bool) -> io::Result<()> {
    let page = page_size() as u64;
    let (first, end) = (start - start % page, whole(end));
    let size = (end - first) as usize;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new anonymous mapping at an address that the kernel chooses.
    let new = unsafe {
        rustix::mm::mmap_anonymous(
            null_mut(),
            size,
            prot,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }?;
    // Only pages at either end can hold anything.
    for at in [first, end - page] {
        // SAFETY: the page lies in the mapping made above, which nobody else uses yet.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(
                new.cast::<u8>().add((at - first) as usize),
                page as usize,
            )
        };
        let _ = uninterrupted(|| file.read_at(bytes, at));
    }
    if readonly {
        // SAFETY: as above.
        unsafe { rustix::mm::mprotect(new, size, rustix::mm::MprotectFlags::READ) }?;
    }
    let to = (address + first as usize) as *mut c_void;
    let flags = rustix::mm::MremapFlags::MAYMOVE;
    // SAFETY: the range lies in a mapping of a file, in which nobody here holds a reference: it is
    // the guest's memory.
    unsafe { rustix::mm::mremap_fixed(new, size, size, flags, to) }?;
    Ok(())
}

/// Takes a shared lock on one byte of a file for this opening of it, or gives it back. It goes when
/// the file is closed.
///
/// # Errors
/// `WouldBlock` where another has it alone, whatever else the system says.
pub fn lock_byte(file: &File, offset: u64, held: bool) -> io::Result<()> {
    let kind = match held {
        true => libc::F_RDLCK,
        false => libc::F_UNLCK,
    };
    byte_lock(file, libc::F_OFD_SETLK, kind, offset).map(drop)
}

/// Whether another opening of a file has any lock on one byte of it.
///
/// # Errors
/// What the system says.
pub fn is_byte_locked(file: &File, offset: u64) -> io::Result<bool> {
    let found = byte_lock(file, libc::F_OFD_GETLK, libc::F_WRLCK, offset)?;
    Ok(found != libc::F_UNLCK)
}

/// Calls fcntl for a lock on one byte. Returns the kind of lock that it says.
fn byte_lock(file: &File, command: i32, kind: i32, offset: u64) -> io::Result<i32> {
    // SAFETY: all fields are numbers, for which zero is a value; the process has to be zero.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as _;
    lock.l_whence = libc::SEEK_SET as _;
    lock.l_start = offset as _;
    lock.l_len = 1;
    uninterrupted(|| {
        // SAFETY: the descriptor is open, and the call reads and writes `lock` and keeps nothing of
        // it.
        let done = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
        if done == 0 {
            return Ok(i32::from(lock.l_type));
        }
        let error = io::Error::last_os_error();
        match Errno::from_io_error(&error) {
            Some(Errno::ACCESS | Errno::AGAIN) => Err(io::ErrorKind::WouldBlock.into()),
            _ => Err(error),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::MemfdFlags;
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::unix::fs::MetadataExt;

    const BASE: u64 = 0x4000_0000;

    fn page() -> u64 {
        page_size() as u64
    }

    fn zeros(memory: &GuestMemoryMmap) -> Vec<bool> {
        let mut bytes = vec![0; 16 * page() as usize];
        memory
            .read_slice(&mut bytes, GuestAddress(BASE))
            .expect("memory");
        let pages = bytes.chunks(page() as usize);
        pages
            .map(|page| page.iter().all(|byte| *byte == 0))
            .collect()
    }

    /// Memory of two banks that meet, eight pages each, with something in each page.
    fn memory(files: Option<[File; 2]>) -> GuestMemoryMmap {
        let size = 8 * page() as usize;
        let [first, second] = match files {
            Some(files) => files.map(|file| Some(FileOffset::new(file, page()))),
            None => [None, None],
        };
        let banks = [
            (GuestAddress(BASE), size, first),
            (GuestAddress(BASE + size as u64), size, second),
        ];
        let memory = GuestMemoryMmap::from_ranges_with_files(&banks).expect("memory");
        let full = vec![0xaa; 2 * size];
        memory
            .write_slice(&full, GuestAddress(BASE))
            .expect("memory");
        memory
    }

    /// Gives pages 2 to 12, the first and the last of them for a part only; those stay.
    fn discard_some(memory: &GuestMemoryMmap) {
        let start = GuestAddress(BASE + 2 * page() + 1);
        discard(memory, start, 10 * page()).expect("it goes back");
    }

    fn assert_some_is_gone(memory: &GuestMemoryMmap) {
        let expected: Vec<bool> = (0..16).map(|page| (3..12).contains(&page)).collect();
        assert_eq!(zeros(memory), expected);
    }

    #[test]
    fn private_pages_go_back() {
        let memory = memory(None);
        discard_some(&memory);
        assert_some_is_gone(&memory);
    }

    #[test]
    fn shared_pages_go_back_for_all_who_share_them() {
        let files = [0; 2].map(|_| {
            let file = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC);
            let file = File::from(file.expect("a file"));
            file.set_len(9 * page()).expect("room");
            file
        });
        let others = files
            .each_ref()
            .map(|file| file.try_clone().expect("a file"));
        let memory = memory(Some(files));
        discard_some(&memory);
        // Before anybody reads, which would take them again: a file's first page was never there.
        let taken = others
            .each_ref()
            .map(|file| file.metadata().expect("a file").blocks() * 512 / page());
        assert_eq!(taken, [3, 4]);
        assert_some_is_gone(&memory);
        let [_, mut second] = others;
        let mut bytes = Vec::new();
        second.seek(SeekFrom::Start(page())).expect("a file");
        second.read_to_end(&mut bytes).expect("a file");
        let gone = bytes.iter().take_while(|byte| **byte == 0).count() as u64;
        assert_eq!(gone, 4 * page());
    }

    #[test]
    fn private_pages_of_a_file_go_back_and_are_zero() {
        let size = 16 * page();
        let file = tempfile::tempfile().expect("a file");
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![0xaa; size as usize], 0)
            .expect("room");
        let offset = Some(FileOffset::new(file.try_clone().expect("a file"), 0));
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let mapping = vm_memory::MmapRegion::<()>::build(offset, size as usize, 3, flags);
        let mapping = mapping.expect("memory");
        // As memory of a snapshot is: whoever gives pages back does not punch holes into its file.
        let builder = MmapRegionBuilder::new(size as usize).with_mmap_flags(flags);
        // SAFETY: the mapping lives until the end of this test.
        let region = unsafe { builder.with_raw_mmap_pointer(mapping.as_ptr()) };
        let region = region.build().expect("a region");
        let region = GuestRegionMmap::new(region, GuestAddress(BASE)).expect("a region");
        let memory = GuestMemoryMmap::from_regions(vec![region]).expect("memory");
        memory
            .write_obj(1_u8, GuestAddress(BASE + 5 * page()))
            .expect("memory");
        discard_some(&memory);
        assert_some_is_gone(&memory);
        // What is too small stays as it is, and that is said.
        let start = GuestAddress(BASE + 14 * page());
        if page() < 16 << 10 {
            assert!(discard(&memory, start, page()).is_err());
            assert!(!zeros(&memory)[14]);
        }
        let mut bytes = vec![0; size as usize];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).expect("a file");
        assert!(
            bytes.iter().all(|byte| *byte == 0xaa),
            "the file is as it was"
        );
    }

    #[test]
    fn what_is_no_guest_memory_is_refused() {
        let memory = memory(None);
        for start in [0, BASE - page(), BASE + 16 * page(), u64::MAX] {
            assert!(discard(&memory, GuestAddress(start), page()).is_err());
        }
        let end = GuestAddress(BASE + 15 * page());
        assert!(discard(&memory, end, 2 * page()).is_err());
        // Less than a page is nothing, and no error.
        discard(&memory, GuestAddress(BASE), page() - 1).expect("nothing to do");
        assert!(!zeros(&memory)[0]);
    }

    #[test]
    fn a_mapped_file_is_the_file() {
        let mut file = tempfile::tempfile().expect("a file");
        file.set_len(4 << 20).expect("room");
        file.write_all(b"before").expect("room");
        let address = map_file(&file, 4 << 20, false).expect("a mapping");
        assert_eq!(address as usize % (2 << 20), 0);
        // SAFETY: the mapping lives until the process ends, and nobody else writes it.
        let bytes = unsafe { std::slice::from_raw_parts_mut(address, 4 << 20) };
        assert_eq!(&bytes[..6], b"before");
        bytes[..6].copy_from_slice(b"behind");
        let mut found = [0; 6];
        file.seek(SeekFrom::Start(0)).expect("a file");
        file.read_exact(&mut found).expect("a file");
        assert_eq!(&found, b"behind");
    }

    #[test]
    fn a_lock_on_a_byte_is_seen_by_other_openings() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let (first, second) = (
            file.reopen().expect("a file"),
            file.reopen().expect("a file"),
        );
        let seen = |file: &File, offset| is_byte_locked(file, offset).expect("locks");
        lock_byte(&first, 100, true).expect("nobody has it");
        lock_byte(&second, 100, true).expect("it is shared");
        assert!(seen(&first, 100) && seen(&second, 100));
        lock_byte(&second, 100, false).expect("it goes back");
        assert!(!seen(&first, 100) && seen(&second, 100));
        assert!(!seen(&second, 99) && !seen(&second, 101));
        drop(first);
        assert!(!seen(&second, 100));
    }
}
