//! A raw image, which is a file or a block device, and the engine that works on it one request at
//! a time.

use super::complaints::{Complaints, cancelled};
use super::growth::GrowthWatch;
use super::sys::{self, Direction, MOST_AT_ONCE, Mover};
use armlet_devices::sync::lock;
use armlet_devices::virtio::block::{Data, Engine, Operation, Outcome, Request};
use armlet_system::eintr::uninterrupted;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestMemoryMmap};

/// Bytes that go through a buffer of our own at once, where the guest's cannot be used.
const BOUNCE: usize = 256 << 10;

/// What direct I/O (O_DIRECT) asks for: powers of two, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of addresses in memory.
    pub(super) memory: usize,
    /// Of offsets in the file and of lengths.
    pub(super) offset: usize,
}

/// The image that a disk has now, for all who have to do with it.
#[derive(Clone)]
pub(super) struct Current(Arc<Mutex<Arc<Image>>>);

impl Current {
    /// A disk that has `image`.
    pub(super) fn new(image: Image) -> Current {
        Current(Arc::new(Mutex::new(Arc::new(image))))
    }

    /// The image.
    pub(super) fn get(&self) -> Arc<Image> {
        Arc::clone(&lock(&self.0))
    }

    /// The disk has another image from now on. Engines keep the one before until they are told to
    /// [turn](Engine::renew) to it.
    pub(super) fn replace(&self, image: Image) {
        *lock(&self.0) = Arc::new(image);
    }
}

/// An open image of a disk.
pub(super) struct Image {
    pub(super) file: File,
    /// Whether it is a block device and not a file.
    pub(super) is_device: bool,
    pub(super) readonly: bool,
    /// `None` where I/O goes through the host's page cache.
    pub(super) direct: Option<Alignment>,
    pub(super) complaints: Complaints,
    /// Bytes of the guest's blocks.
    block: u64,
    /// Whether the guest does not see a last block that the file has only a part of.
    hides_tail: bool,
    /// Bytes of the file, or device, when it was last looked at.
    len: AtomicU64,
    /// For an image that was empty when it was opened.
    growth: Option<GrowthWatch>,
    /// What the file system or the device refused once is not tried again.
    cannot_punch: AtomicBool,
    cannot_zero: AtomicBool,
    /// Whether writes were lost on their way from the page cache.
    lost: AtomicBool,
}

impl Image {
    /// The image in `file`; the guest has blocks of `block` bytes.
    pub(super) fn new(
        file: File,
        is_device: bool,
        readonly: bool,
        direct: Option<Alignment>,
        block: u32,
        complaints: Complaints,
    ) -> Image {
        Image {
            file,
            is_device,
            readonly,
            direct,
            complaints,
            block: block.into(),
            hides_tail: false,
            len: AtomicU64::new(0),
            growth: None,
            cannot_punch: AtomicBool::new(false),
            cannot_zero: AtomicBool::new(false),
            lost: AtomicBool::new(false),
        }
    }

    /// The image, without a last block that the file has only a part of.
    pub(super) fn without_tail(mut self) -> Image {
        self.hides_tail = true;
        self
    }

    /// Hears of it from now on when somebody has filled the image.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn watch_growth(&mut self) -> Result<(), Errno> {
        self.growth = Some(GrowthWatch::new(&self.file)?);
        Ok(())
    }

    /// The descriptor that is readable when the image may have grown, if that is watched.
    pub(super) fn growth_fd(&self) -> Option<RawFd> {
        self.growth.as_ref().map(GrowthWatch::as_raw_fd)
    }

    /// Looks how long the image is now. Returns how many bytes the guest sees, if there are more
    /// than before; of a file that was cut the reads and writes tell.
    pub(super) fn grown(&self) -> Option<u64> {
        self.growth.as_ref()?.drain();
        let len = rustix::fs::seek(&self.file, SeekFrom::End(0)).ok()?;
        (len > self.len.load(Relaxed)).then(|| self.set_len(len))
    }

    /// The file has this many bytes. Returns how many the guest sees: as with QEMU, what a file
    /// lacks in its last block reads as zeroes, and is there as soon as it is written.
    pub(super) fn set_len(&self, len: u64) -> u64 {
        let len = match self.direct {
            // What goes past the page cache goes in whole blocks. One that grew was not refused.
            Some(direct) if !self.readonly => len - len % direct.offset as u64,
            _ => len,
        };
        self.len.store(len, Relaxed);
        match self.is_device {
            true => len,
            false if self.hides_tail => len - len % self.block,
            false => len.next_multiple_of(self.block),
        }
    }

    /// Whether a range may reach behind the end of the file.
    pub(super) fn is_beyond(&self, offset: u64, len: u64) -> bool {
        offset + len > self.len.load(Relaxed)
    }

    /// Reads what is there at an offset, whatever direct I/O asks for.
    pub(super) fn peek(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        if self.direct.is_none() {
            return self.read(bytes, offset);
        }
        let len = bytes.len();
        let copy = |at: usize, from: &mut [u8]| {
            bytes[at..at + from.len()].copy_from_slice(from);
            Ok(())
        };
        self.bounce(&mut Vec::new(), Direction::Read, offset, len, copy)
    }

    /// Fills a part of a buffer; what lies behind the end of the file, as it was last looked at,
    /// is zero if it is not there.
    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let len = self.len.load(Relaxed);
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            // Direct I/O ends there with a piece that is no whole block, and cannot go on.
            let is_cut = self
                .direct
                .is_some_and(|direct| !at.is_multiple_of(direct.offset as u64));
            let count = match is_cut && at >= len {
                true => 0,
                false => uninterrupted(|| self.file.read_at(&mut bytes[done..], at))?,
            };
            match count {
                0 if at >= len => {
                    bytes[done..].fill(0);
                    return Ok(());
                }
                0 => return Err(sys::end_of(Direction::Read)),
                count => done += count,
            }
        }
        Ok(())
    }

    /// Whether the file still reaches as far as a range that is to be changed, apart from a last
    /// block that it never had whole. A file that was cut while a guest has it would grow back with
    /// zeros in the place of what it held, and nobody would hear of it.
    ///
    /// # Errors
    /// A file that ends before the range does.
    pub(super) fn check_end(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.is_device || self.readonly {
            return Ok(());
        }
        // The place in the file means nothing: all reads and writes say where.
        let size = rustix::fs::seek(&self.file, SeekFrom::End(0))?;
        let end = offset.saturating_add(len).min(self.len.load(Relaxed));
        match size >= end {
            true => Ok(()),
            false => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the file ends at byte {size}; it was longer when it was opened"),
            )),
        }
    }

    /// Brings all that was written to stable storage.
    pub(super) fn flush(&self) -> io::Result<()> {
        let result = match self.readonly {
            true => Ok(()),
            false => uninterrupted(|| rustix::fs::fdatasync(&self.file)).map_err(io::Error::from),
        };
        self.flushed(result)
    }

    /// What the guest is told of a flush that ended like this.
    pub(super) fn flushed(&self, result: io::Result<()>) -> io::Result<()> {
        // Linux drops pages that it could not write and tells of it once; what they held is gone,
        // and a later fsync that succeeds does not change that (Documentation/filesystems/vfs.rst,
        // "Handling errors during writeback").
        if result.is_err() && self.direct.is_none() {
            self.lost.store(true, Relaxed);
        }
        match self.lost.load(Relaxed) {
            true if result.is_ok() => Err(io::Error::other("writes were lost before")),
            _ => result,
        }
    }

    /// How fallocate zeroes a range; `None` where it cannot.
    pub(super) fn zero_mode(&self, unmap: bool) -> Option<FallocateFlags> {
        if unmap && !self.cannot_punch.load(Relaxed) {
            return Some(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE);
        }
        match self.cannot_zero.load(Relaxed) {
            true => None,
            false => Some(FallocateFlags::ZERO_RANGE),
        }
    }

    /// How fallocate discards a range; `None` where it cannot.
    pub(super) fn discard_mode(&self) -> Option<FallocateFlags> {
        self.zero_mode(true)
            .filter(|mode| !self.is_device && mode.contains(FallocateFlags::PUNCH_HOLE))
    }

    /// Whether fallocate said that it cannot do this here, which is kept in mind.
    pub(super) fn refuses(&self, mode: FallocateFlags, error: &io::Error) -> bool {
        let refused = match mode.contains(FallocateFlags::PUNCH_HOLE) {
            true => &self.cannot_punch,
            false => &self.cannot_zero,
        };
        match Errno::from_io_error(error) {
            Some(Errno::OPNOTSUPP | Errno::NOSYS) => {
                refused.store(true, Relaxed);
                true
            }
            // This range of it, that is: no whole blocks of a device.
            Some(Errno::INVAL) => true,
            _ => false,
        }
    }

    fn allocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        Ok(uninterrupted(|| {
            rustix::fs::fallocate(&self.file, mode, offset, len)
        })?)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let result = match self.discard_mode() {
            Some(mode) => match self.allocate(mode, offset, len) {
                Err(error) if self.refuses(mode, &error) => Ok(()),
                result => result,
            },
            None if self.is_device => sys::discard_blocks(&self.file, offset, len),
            None => Ok(()),
        };
        match &result {
            // It is advice.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            _ => result,
        }
    }

    fn zero(&self, request: &Request<'_>, unmap: bool, buffer: &mut Vec<u8>) -> io::Result<()> {
        let (offset, len) = (request.offset, request.len);
        for unmap in [unmap, false] {
            let Some(mode) = self.zero_mode(unmap) else {
                break;
            };
            match self.allocate(mode, offset, len) {
                Err(error) if self.refuses(mode, &error) => {}
                result => return result,
            }
        }
        self.bounce(
            buffer,
            Direction::Write,
            offset,
            len as usize,
            |_, bytes| {
                bytes.fill(0);
                match request.cancelled.load(Relaxed) {
                    true => Err(cancelled()),
                    false => Ok(()),
                }
            },
        )
    }

    /// Whether data that are (or are not) aligned in memory can be moved as they are.
    pub(super) fn takes(&self, offset: u64, is_aligned: impl FnOnce(Alignment) -> bool) -> bool {
        self.direct
            .is_none_or(|direct| offset.is_multiple_of(direct.offset as u64) && is_aligned(direct))
    }

    /// Whether a write of this range has to read the blocks around it first.
    pub(super) fn needs_read(&self, offset: u64, len: u64) -> bool {
        self.direct.is_some_and(|direct| {
            let block = direct.offset as u64;
            !(offset.is_multiple_of(block) && len.is_multiple_of(block))
        })
    }

    /// Moves a range by an aligned buffer, in whole blocks: `each` gets a part of it, by its
    /// distance from the beginning, after the read or before the write.
    fn bounce(
        &self,
        buffer: &mut Vec<u8>,
        direction: Direction,
        offset: u64,
        len: usize,
        mut each: impl FnMut(usize, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let align = self
            .direct
            .map_or(1, |direct| direct.offset.max(direct.memory));
        let block = self.direct.map_or(1, |direct| direct.offset);
        buffer.resize(BOUNCE + align, 0);
        let start = buffer.as_ptr().align_offset(align);
        let buffer = &mut buffer[start..start + BOUNCE];
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let first = at - at % block as u64;
            let head = (at - first) as usize;
            let count = (len - done).min(BOUNCE - head);
            let span = &mut buffer[..(head + count).next_multiple_of(block)];
            let is_whole = head == 0 && count == span.len();
            if direction == Direction::Read || !is_whole {
                self.read(span, first)?;
            }
            each(done, &mut span[head..head + count])?;
            if direction == Direction::Write {
                self.file.write_all_at(span, first)?;
            }
            done += count;
        }
        Ok(())
    }
}

/// Works on an image one request at a time.
pub(super) struct PlainEngine {
    current: Current,
    image: Arc<Image>,
    mover: Option<Mover>,
    /// For what needs an aligned buffer; empty until then.
    buffer: Vec<u8>,
}

impl PlainEngine {
    /// An engine for a disk's image.
    pub(super) fn new(current: &Current) -> PlainEngine {
        PlainEngine {
            current: current.clone(),
            image: current.get(),
            mover: None,
            buffer: Vec::new(),
        }
    }

    /// The guest memory that it works on.
    #[cfg(test)]
    pub(super) fn memory(&self) -> &GuestMemoryMmap {
        self.mover.as_ref().expect("it is started").memory()
    }

    /// Carries a request out, as far as somebody wants it.
    pub(super) fn perform(&mut self, request: &Request<'_>) -> io::Result<()> {
        if !matches!(request.operation, Operation::Read | Operation::Flush) {
            self.image.check_end(request.offset, request.len)?;
        }
        let result = request.each_part(MOST_AT_ONCE, |part| match part.cancelled.load(Relaxed) {
            true => Err(cancelled()),
            false => self.perform_part(part),
        });
        // What one request needs is not kept for ever.
        if let Some(mover) = &mut self.mover {
            mover.release();
        }
        result
    }

    fn perform_part(&mut self, request: &Request<'_>) -> io::Result<()> {
        let (offset, len) = (request.offset, request.len);
        match request.operation {
            Operation::Read => self.transfer(Direction::Read, offset, &request.data)?,
            Operation::Write => self.transfer(Direction::Write, offset, &request.data)?,
            Operation::Flush => return self.image.flush(),
            Operation::Discard => return self.image.discard(offset, len),
            Operation::WriteZeroes { unmap } => {
                self.image.zero(request, unmap, &mut self.buffer)?;
            }
        }
        match request.durable && request.operation != Operation::Read {
            true => self.image.flush(),
            false => Ok(()),
        }
    }

    fn transfer(&mut self, direction: Direction, offset: u64, data: &Data<'_>) -> io::Result<()> {
        let mover = self.mover.as_mut().ok_or(Errno::FAULT)?;
        mover.set(data)?;
        let image = &self.image;
        let is_padded = direction == Direction::Read && image.is_beyond(offset, data.len() as u64);
        let aligned = |direct: Alignment| mover.is_aligned(direct.memory, direct.offset);
        if !is_padded && image.takes(offset, aligned) {
            return mover.run(&image.file, direction, offset);
        }
        let memory = mover.memory();
        image.bounce(
            &mut self.buffer,
            direction,
            offset,
            data.len(),
            |at, bytes| copy(memory, direction, &data.slice(at, bytes.len()), bytes),
        )
    }
}

/// Copies between guest memory and a buffer of the same length.
fn copy(
    memory: &GuestMemoryMmap,
    direction: Direction,
    data: &Data<'_>,
    bytes: &mut [u8],
) -> io::Result<()> {
    let mut done = 0;
    for part in data.parts() {
        let piece = &mut bytes[done..done + part.len];
        done += part.len;
        match direction {
            Direction::Read => memory.write_slice(piece, part.address),
            Direction::Write => memory.read_slice(piece, part.address),
        }
        .map_err(|_| Errno::FAULT)?;
    }
    Ok(())
}

impl Engine for PlainEngine {
    fn start(&mut self, memory: &Arc<GuestMemoryMmap>) {
        self.mover = Some(Mover::new(memory));
    }

    fn begin(&mut self, request: &Request<'_>) -> Option<Outcome> {
        let result = self.perform(request);
        let complaints = &self.image.complaints;
        Some(complaints.outcome(request.operation, request.offset, request.len, result))
    }

    fn renew(&mut self) {
        self.image = self.current.get();
    }

    fn growth_fd(&self) -> Option<RawFd> {
        self.image.growth_fd()
    }

    fn grown(&mut self) -> Option<u64> {
        self.image.grown()
    }

    fn stop(&mut self) {
        self.mover = None;
    }
}
