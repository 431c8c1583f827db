//! The system calls that a disk makes on guest memory, and those that no safe library has: reads
//! and writes of many pieces at once, io_uring, discards of block devices.
//!
//! Guest memory is shared with the guest anyway, so nothing here makes references to it; the
//! kernel gets addresses. [`Mover`] and [`Ring`] keep the memory alive as long as it has them.

use armlet_devices::virtio::block::{Data, Place};
use armlet_system::deadline::wait_once;
use armlet_system::eintr::{CallError, uninterrupted};
use io_uring::register::Restriction;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, Probe, opcode, squeue};
use rustix::event::PollFlags;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

/// The most pieces that one call takes (UIO_MAXIOV, include/uapi/linux/uio.h).
const MOST_PIECES: usize = 1024;
/// The most bytes that one call or one entry of a ring moves. A request of more goes in parts, so
/// that nobody waits for long for the end of what nobody wants any more. Linux makes requests of
/// 1.25 MiB at most, unless told otherwise (block/blk-settings.c: BLK_DEF_MAX_SECTORS_CAP).
pub(super) const MOST_AT_ONCE: usize = 4 << 20;
/// Pieces whose place is kept from one request to the next.
const KEPT_PIECES: usize = 64;
/// The user data of an entry that takes another one back.
const CANCELS: u64 = u64::MAX;
/// RWF_DSYNC (include/uapi/linux/fs.h): a write is done when its data are on stable storage.
const RWF_DSYNC: i32 = 2;
/// RWF_NOWAIT: EAGAIN instead of a wait.
const RWF_NOWAIT: i32 = 8;
/// BLKDISCARD (include/uapi/linux/fs.h): _IO(0x12, 119), without a size, as old as it is.
const BLKDISCARD: u32 = 0x1277;

/// Which way data go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the file to memory.
    Read,
    /// From memory to the file.
    Write,
}

const _: () = assert!(size_of::<Place>() == size_of::<libc::iovec>());

/// Pieces of guest memory, of which the first ones are done with.
#[derive(Debug, Default)]
struct Pieces {
    list: Vec<Place>,
    first: usize,
    /// Bytes that are left.
    left: usize,
}

impl Pieces {
    fn set(&mut self, memory: &GuestMemoryMmap, data: &Data<'_>) -> io::Result<()> {
        self.list.clear();
        self.first = 0;
        let bytes = data.places(memory, MOST_AT_ONCE, &mut self.list);
        self.left = bytes.ok_or(Errno::FAULT)?;
        Ok(())
    }

    /// As many as one call takes; none is longer than [`MOST_AT_ONCE`].
    fn next(&self) -> &[Place] {
        let left = &self.list[self.first..];
        if self.left <= MOST_AT_ONCE && left.len() <= MOST_PIECES {
            return left;
        }
        let left = &left[..left.len().min(MOST_PIECES)];
        let mut bytes = 0;
        let mut fits = |piece: &Place| {
            bytes += piece.len;
            bytes <= MOST_AT_ONCE
        };
        let count = left.iter().position(|piece| !fits(piece));
        &left[..count.unwrap_or(left.len())]
    }

    /// Keeps no more memory than most requests need.
    fn release(&mut self) {
        self.first = 0;
        self.left = 0;
        self.list.clear();
        if self.list.capacity() > KEPT_PIECES {
            self.list.shrink_to(KEPT_PIECES);
        }
    }

    fn advance(&mut self, mut done: usize) {
        self.left = self.left.saturating_sub(done);
        if self.left == 0 {
            self.first = self.list.len();
            return;
        }
        for piece in &mut self.list[self.first..] {
            if done < piece.len {
                piece.address += done;
                piece.len -= done;
                return;
            }
            done -= piece.len;
            self.first += 1;
        }
    }

    fn is_aligned(&self, address: usize, len: usize) -> bool {
        let aligned =
            |piece: &Place| piece.address.is_multiple_of(address) && piece.len.is_multiple_of(len);
        self.list.iter().all(aligned)
    }

    /// Moves all that is left, to or from `offset` bytes in the file.
    fn run(&mut self, file: &File, direction: Direction, mut offset: u64) -> io::Result<()> {
        loop {
            let pieces = self.next();
            if pieces.is_empty() {
                return Ok(());
            }
            match uninterrupted(|| move_once(file.as_raw_fd(), pieces, direction, offset, 0))? {
                0 => return Err(end_of(direction)),
                done => {
                    self.advance(done);
                    if self.left == 0 {
                        return Ok(());
                    }
                    offset += done as u64;
                }
            }
        }
    }
}

/// Why nothing was moved where something should have been.
pub(super) fn end_of(direction: Direction) -> io::Error {
    match direction {
        Direction::Read => io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the file ends before; it was longer when it was opened",
        ),
        Direction::Write => io::ErrorKind::WriteZero.into(),
    }
}

/// One call: returns the bytes that it moved.
fn move_once(
    fd: RawFd,
    pieces: &[Place],
    direction: Direction,
    offset: u64,
    flags: i32,
) -> io::Result<usize> {
    let list = pieces.as_ptr().cast::<libc::iovec>();
    let count = pieces.len();
    let call = match direction {
        Direction::Read => libc::SYS_preadv2,
        Direction::Write => libc::SYS_pwritev2,
    };
    // SAFETY: the pieces have the layout of iovec and lie in guest memory, which whoever made
    // them keeps alive; no reference to that memory exists. The number after the offset is its
    // upper half where registers have 32 bits.
    let done = unsafe { libc::syscall(call, fd, list, count, offset, 0, flags) };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// Moves data between guest memory and files while the caller waits.
#[derive(Debug)]
pub(super) struct Mover {
    memory: Arc<GuestMemoryMmap>,
    pieces: Pieces,
}

impl Mover {
    /// A mover to and from `memory`.
    pub(super) fn new(memory: &Arc<GuestMemoryMmap>) -> Mover {
        Mover {
            memory: Arc::clone(memory),
            pieces: Pieces::default(),
        }
    }

    /// The memory.
    pub(super) fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The next move is of these data.
    ///
    /// # Errors
    /// Data that are not in memory.
    pub(super) fn set(&mut self, data: &Data<'_>) -> io::Result<()> {
        self.pieces.set(&self.memory, data)
    }

    /// The data are done with; memory that many pieces took is given back.
    pub(super) fn release(&mut self) {
        self.pieces.release();
    }

    /// Whether the data's addresses and lengths are multiples of these.
    pub(super) fn is_aligned(&self, address: usize, len: usize) -> bool {
        self.pieces.is_aligned(address, len)
    }

    /// Moves the data to or from `offset` bytes in the file, all of them.
    ///
    /// # Errors
    /// What the system says; a file that ends before.
    pub(super) fn run(&mut self, file: &File, direction: Direction, offset: u64) -> io::Result<()> {
        self.pieces.run(file, direction, offset)
    }
}

/// What a ring has to do.
const NEEDED: [u8; 7] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::AsyncCancel::CODE,
];

/// An io_uring for one file, with numbered slots of which each holds one request.
pub(super) struct Ring {
    ring: IoUring,
    file: Fd,
    memory: Option<Arc<GuestMemoryMmap>>,
    slots: Vec<Slot>,
    /// Requests that the kernel has, or gets at the next submission.
    under_way: usize,
}

#[derive(Default)]
struct Slot {
    pieces: Pieces,
    is_under_way: bool,
}

impl Ring {
    /// A ring for `slots` requests on `file`.
    ///
    /// # Errors
    /// A kernel without io_uring or without what is needed of it, or one that does not let this
    /// process have it.
    pub(super) fn new(file: &File, slots: u16) -> io::Result<Ring> {
        let entries = u32::from(slots);
        // Which does nothing before it is told what it may be asked for.
        let disabled = IoUring::builder()
            .setup_coop_taskrun()
            .setup_submit_all()
            .setup_r_disabled()
            .build(entries)
            // Before Linux 5.19.
            .or_else(|_| IoUring::builder().setup_r_disabled().build(entries));
        let is_disabled = disabled.is_ok();
        // Before Linux 5.10.
        let ring = disabled.or_else(|_| IoUring::new(entries))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if is_disabled {
            // No filter of system calls sees what a ring is asked for.
            let mut only = NEEDED.map(Restriction::sqe_op);
            ring.submitter().register_restrictions(&mut only)?;
            ring.submitter().register_enable_rings()?;
        }
        if !NEEDED.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this kernel's io_uring is older than Linux 5.6",
            ));
        }
        let mut list = Vec::new();
        list.resize_with(usize::from(slots), Slot::default);
        // It is not registered with the ring, which would be faster by a bit: the kernel takes
        // rings apart some time after the process has closed them or is dead, and until then the
        // file would stay locked.
        Ok(Ring {
            ring,
            file: Fd(file.as_raw_fd()),
            memory: None,
            slots: list,
            under_way: 0,
        })
    }

    /// The descriptor that is readable when a request is done.
    pub(super) fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// Requests are for `file` from now on; none is under way.
    pub(super) fn turn_to(&mut self, file: &File) {
        assert!(
            self.under_way == 0,
            "the kernel has requests for another file"
        );
        self.file = Fd(file.as_raw_fd());
    }

    /// Requests come, with data in this memory.
    pub(super) fn start(&mut self, memory: &Arc<GuestMemoryMmap>) {
        self.stop();
        self.memory = Some(Arc::clone(memory));
    }

    /// Waits for all requests, and lets memory go.
    pub(super) fn stop(&mut self) {
        while self.under_way > 0 {
            self.submit();
            self.wait(Duration::MAX);
            while self.next().is_some() {}
        }
        self.memory = None;
    }

    /// Takes back what is under way, as far as the kernel has not begun it; each request is still
    /// heard of.
    pub(super) fn cancel(&mut self) {
        let tags = 0..self.slots.len();
        for tag in tags
            .filter(|tag| self.slots[*tag].is_under_way)
            .collect::<Vec<_>>()
        {
            let entry = opcode::AsyncCancel::new(tag as u64).build();
            self.add(&entry.user_data(CANCELS));
        }
        self.submit();
    }

    /// The slot's data are done with; memory that many pieces took is given back.
    pub(super) fn release(&mut self, slot: u16) {
        let slot = &mut self.slots[usize::from(slot)];
        assert!(!slot.is_under_way, "the kernel has the pieces of this slot");
        slot.pieces.release();
    }

    /// The next request in this slot is about these data.
    ///
    /// # Errors
    /// Data that are not in memory.
    pub(super) fn set(&mut self, slot: u16, data: &Data<'_>) -> io::Result<()> {
        let slot = &mut self.slots[usize::from(slot)];
        assert!(!slot.is_under_way, "the kernel has the pieces of this slot");
        let memory = self.memory.as_ref().ok_or(Errno::FAULT)?;
        slot.pieces.set(memory, data)
    }

    /// Whether the addresses and lengths of a slot's data are multiples of these.
    pub(super) fn is_aligned(&self, slot: u16, address: usize, len: usize) -> bool {
        self.slots[usize::from(slot)]
            .pieces
            .is_aligned(address, len)
    }

    /// That many bytes of the slot's data are done with.
    pub(super) fn advance(&mut self, slot: u16, done: usize) {
        let slot = &mut self.slots[usize::from(slot)];
        assert!(!slot.is_under_way, "the kernel has the pieces of this slot");
        slot.pieces.advance(done);
    }

    /// Whether all of the slot's data are done with.
    pub(super) fn is_moved(&self, slot: u16) -> bool {
        self.slots[usize::from(slot)].pieces.next().is_empty()
    }

    /// Moves of what is left of the slot's data as much as goes without a wait. Returns the bytes
    /// that it moved.
    ///
    /// # Errors
    /// EAGAIN where nothing goes without a wait, EOPNOTSUPP where that cannot be asked for, else
    /// what the system says.
    pub(super) fn try_now(
        &mut self,
        slot: u16,
        file: &File,
        direction: Direction,
        offset: u64,
    ) -> io::Result<usize> {
        let slot = &mut self.slots[usize::from(slot)];
        assert!(!slot.is_under_way, "the kernel has the pieces of this slot");
        let pieces = slot.pieces.next();
        let done = move_once(file.as_raw_fd(), pieces, direction, offset, RWF_NOWAIT)?;
        slot.pieces.advance(done);
        Ok(done)
    }

    /// Moves of what is left of the slot's data as much as one call takes, while the caller waits.
    /// Returns the bytes that it moved; 0 where the file ends.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn move_now(
        &mut self,
        slot: u16,
        file: &File,
        direction: Direction,
        offset: u64,
    ) -> io::Result<usize> {
        let slot = &mut self.slots[usize::from(slot)];
        assert!(!slot.is_under_way, "the kernel has the pieces of this slot");
        let pieces = slot.pieces.next();
        let done = uninterrupted(|| move_once(file.as_raw_fd(), pieces, direction, offset, 0))?;
        slot.pieces.advance(done);
        Ok(done)
    }

    /// Begins to move what is left of the slot's data.
    pub(super) fn push_move(
        &mut self,
        slot: u16,
        direction: Direction,
        offset: u64,
        durable: bool,
    ) {
        let pieces = self.slots[usize::from(slot)].pieces.next();
        let flags = match durable {
            true => RWF_DSYNC,
            false => 0,
        };
        let one = match pieces {
            [one] => u32::try_from(one.len).ok().map(|len| (one.address, len)),
            _ => None,
        };
        let list = pieces.as_ptr().cast::<libc::iovec>();
        let count = pieces.len() as u32;
        let entry = match (direction, one) {
            (Direction::Read, Some((address, len))) => {
                opcode::Read::new(self.file, address as *mut u8, len)
                    .offset(offset)
                    .build()
            }
            (Direction::Write, Some((address, len))) => {
                opcode::Write::new(self.file, address as *const u8, len)
                    .offset(offset)
                    .rw_flags(flags)
                    .build()
            }
            (Direction::Read, None) => opcode::Readv::new(self.file, list, count)
                .offset(offset)
                .build(),
            (Direction::Write, None) => opcode::Writev::new(self.file, list, count)
                .offset(offset)
                .rw_flags(flags)
                .build(),
        };
        self.push(slot, entry);
    }

    /// Begins to bring the file's data to stable storage.
    pub(super) fn push_sync(&mut self, slot: u16) {
        let entry = opcode::Fsync::new(self.file).flags(FsyncFlags::DATASYNC);
        self.push(slot, entry.build());
    }

    /// Begins a fallocate of this mode.
    pub(super) fn push_fallocate(&mut self, slot: u16, mode: i32, offset: u64, len: u64) {
        let entry = opcode::Fallocate::new(self.file, len)
            .offset(offset)
            .mode(mode);
        self.push(slot, entry.build());
    }

    fn push(&mut self, slot: u16, entry: squeue::Entry) {
        let entry = entry.user_data(u64::from(slot));
        let place = &mut self.slots[usize::from(slot)];
        assert!(!place.is_under_way, "one request a slot");
        place.is_under_way = true;
        self.under_way += 1;
        self.add(&entry);
    }

    /// Puts an entry into the ring: one of no memory, or one of which `is_under_way` was set.
    fn add(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: addresses and list, if it has any, are those of a slot's pieces. Until `next`
            // returns the slot they do not change, `memory` is not let go, and the list stays where
            // it is on the heap; so it is when this ring is dropped.
            let pushed = unsafe { self.ring.submission().push(entry) };
            if pushed.is_ok() {
                return;
            }
            self.submit();
        }
    }

    /// Hands the kernel what was begun. Returns whether there was something.
    pub(super) fn submit(&mut self) -> bool {
        let mut any = false;
        while !self.ring.submission().is_empty() {
            self.enter(0);
            any = true;
        }
        any
    }

    /// Waits until a request is done, if one is under way, but not for longer than `most`.
    pub(super) fn wait(&mut self, most: Duration) {
        if self.under_way == 0 || !self.ring.completion().is_empty() {
            return;
        }
        // SAFETY: the ring is open for as long as `self` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        // Interrupted, it is called again; and completions that had no room yet are in the kernel.
        let _ = wait_once(fd, PollFlags::IN, Some(most));
        self.enter(0);
    }

    fn enter(&mut self, want: usize) {
        match self.ring.submit_and_wait(want) {
            Ok(_) => {}
            // It is asked again, or what there is suffices.
            Err(error) if error.is_interrupted() => {}
            // The host is out of memory, or slow to take up completions (EBUSY); nothing else can
            // happen to a ring that works. What was begun must be handed over some time.
            Err(error) => {
                log::warn!("io_uring takes no requests now: {error}");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// A slot whose request is done, and what the kernel says of it.
    pub(super) fn next(&mut self) -> Option<(u16, io::Result<usize>)> {
        let entry = loop {
            let entry = self.ring.completion().next()?;
            if entry.user_data() != CANCELS {
                break entry;
            }
        };
        let slot = entry.user_data() as u16;
        self.slots[usize::from(slot)].is_under_way = false;
        self.under_way -= 1;
        let result = entry.result();
        let result = usize::try_from(result)
            .map_err(|_| io::Error::from_raw_os_error(result.wrapping_neg()));
        Some((slot, result))
    }

    /// Has the kernel do nothing, as an entry of the ring; returns what it says to that.
    #[cfg(test)]
    pub(super) fn try_nop(&mut self) -> i32 {
        self.add(&opcode::Nop::new().build());
        self.ring.submit_and_wait(1).expect("an entry");
        self.ring.completion().next().expect("its end").result()
    }

    /// Pieces for which a slot has room.
    #[cfg(test)]
    pub(super) fn kept_pieces(&self, slot: u16) -> usize {
        self.slots[usize::from(slot)].pieces.list.capacity()
    }

    /// Requests under way.
    pub(super) fn under_way(&self) -> usize {
        self.under_way
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Tells a block device that the contents of a range do not matter any more.
///
/// # Errors
/// What the device says; `Unsupported` where it cannot.
pub(super) fn discard_blocks(device: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    uninterrupted(|| {
        // SAFETY: the call reads two numbers from `range` (block/ioctl.c: blk_ioctl_discard).
        let done = unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD as _, range.as_ptr()) };
        match done {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    })
}
