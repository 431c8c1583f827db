//! `prefetch`: the pages that a restored guest needs first. They are recorded when a snapshot is first
//! restored; later restores bring them into memory in few steps, before the guest asks for them one by one.
//!
//! The list is advice. One that is missing, damaged or another snapshot's is as good as none.

use crate::PAGE;
use crate::content::Piece;
use crate::paths::Paths;
use crate::runs::Runs;
use crate::state::Id;
use anyhow::{Context, Result};
use armlet_system::eintr::uninterrupted;
use armlet_system::page_size::page_size;
use rustix::fs::{CWD, FileType, FlockOperation, Mode, OFlags, flock, fstat, openat};
use rustix::mm::{Advice, madvise};
use std::ffi::c_void;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// How a list begins: magic and version.
const MAGIC: [u8; 8] = *b"armletP\x01";
/// Magic, id, the lengths of the two lists.
const HEADER: usize = 24;
/// The most bytes of a list.
const MOST: usize = 1 << 20;
/// The most pages that are recorded and brought: those that are read, and those that take memory of their
/// own, 256 and 64 MiB.
const MOST_READ: u64 = 65536;
const MOST_WRITTEN: u64 = 16384;
/// Pages of a file that lie no further apart are brought together.
const NEAR: u64 = 16;

/// Pages, by number from the beginning of the memory file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prefetch {
    /// Those that the guest only read.
    pub read: Runs,
    /// Those that it wrote.
    pub written: Runs,
}

impl Prefetch {
    /// Returns the pages that a guest has used up to now, which was restored into these pieces.
    ///
    /// # Errors
    /// What the system says.
    pub fn of(pieces: &[Piece], pagemap: &File) -> Result<Prefetch> {
        let mut found = Prefetch::default();
        let mut start = 0;
        for piece in pieces {
            piece.each_touched(pagemap, |part, is_own| {
                let (list, most) = match is_own {
                    true => (&mut found.written, MOST_WRITTEN),
                    false => (&mut found.read, MOST_READ),
                };
                let first = (start + part.start) / PAGE;
                let count = ((part.end - part.start) / PAGE).min(most - list.pages());
                // The lists of a large guest are cut, and still read again.
                if list.bytes().len() < MOST / 2 - HEADER {
                    list.push(first..first + count);
                }
                Ok(())
            })?;
            start += piece.size();
        }
        Ok(found)
    }

    /// Reads the list of a snapshot whose memory has `size` bytes, if there is one.
    #[must_use]
    pub fn read(paths: &Paths, id: Id, size: u64) -> Option<Prefetch> {
        let (file, _) = armlet_system::files::open_regular(&paths.prefetch).ok()?;
        Prefetch::read_from(&file, id, size)
    }

    fn read_from(file: &File, id: Id, size: u64) -> Option<Prefetch> {
        let mut bytes = Vec::new();
        file.take(MOST as u64 + 1).read_to_end(&mut bytes).ok()?;
        Prefetch::from_bytes(&bytes, id, size)
    }

    /// Reads a list of a snapshot whose memory has `size` bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8], id: Id, size: u64) -> Option<Prefetch> {
        let (body, sum) = bytes.split_last_chunk()?;
        let (header, lists) = body.split_at_checked(HEADER)?;
        let number = |at: usize| header[at..at + 4].try_into().map(u32::from_le_bytes).ok();
        let is_ours = bytes.len() <= MOST
            && header[..8] == MAGIC
            && header[8..16] == id.to_bytes()
            && crc32fast::hash(body) == u32::from_le_bytes(*sum);
        if !is_ours || lists.len() != number(16)? as usize + number(20)? as usize {
            return None;
        }
        let (read, written) = lists.split_at_checked(number(16)? as usize)?;
        Some(Prefetch {
            read: Runs::from_bytes(read, size / PAGE)?,
            written: Runs::from_bytes(written, size / PAGE)?,
        })
    }

    /// Returns the list as a file has it.
    #[must_use]
    pub fn to_bytes(&self, id: Id) -> Vec<u8> {
        let lists = [self.read.bytes(), self.written.bytes()];
        let mut bytes = MAGIC.to_vec();
        bytes.extend(id.to_bytes());
        bytes.extend(
            lists
                .iter()
                .flat_map(|list| (list.len() as u32).to_le_bytes()),
        );
        bytes.extend(lists.concat());
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    /// Writes the list to the file of [`recorder`].
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self, file: &File, id: Id) -> Result<()> {
        let written = file.write_all_at(&self.to_bytes(id), 0);
        written.context("cannot write the list of the pages that a guest needs first")
    }

    /// Brings the pages into the pieces that a snapshot is restored into, which map the memory file. Those
    /// that the guest will write get memory of their own. On kernels before 5.14 nothing happens.
    ///
    /// # Errors
    /// What the system says about pages that could not be brought, such as those of a truncated file.
    pub fn bring(&self, pieces: &[Piece]) -> Result<()> {
        let mut start = 0;
        for piece in pieces {
            let bank = start..start + piece.size();
            let read = near(self.read.iter());
            populate(piece, &bank, read, MOST_READ, Advice::LinuxPopulateRead)?;
            let written = self.written.iter();
            populate(
                piece,
                &bank,
                written,
                MOST_WRITTEN,
                Advice::LinuxPopulateWrite,
            )?;
            start = bank.end;
        }
        Ok(())
    }
}

/// Opens the file for a list of a snapshot whose memory has `size` bytes, if one is to be recorded: there
/// is none yet, nobody else records one now, and files can be made beside the snapshot.
#[must_use]
pub fn recorder(paths: &Paths, id: Id, size: u64) -> Option<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let mode = Mode::RUSR | Mode::WUSR;
    let open = || openat(CWD, &paths.prefetch, flags | OFlags::CLOEXEC, mode);
    let file = File::from(uninterrupted(open).ok()?);
    let is_file = FileType::from_raw_mode(fstat(&file).ok()?.st_mode) == FileType::RegularFile;
    let is_alone = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
    if !is_file || !is_alone || Prefetch::read_from(&file, id, size).is_some() {
        return None;
    }
    file.set_len(0).ok()?;
    Some(file)
}

/// Joins runs that lie near one another.
fn near(runs: impl Iterator<Item = Range<u64>>) -> impl Iterator<Item = Range<u64>> {
    let mut runs = runs.peekable();
    std::iter::from_fn(move || {
        let mut run = runs.next()?;
        while let Some(next) = runs.next_if(|next| next.start <= run.end + NEAR) {
            run.end = next.end;
        }
        Some(run)
    })
}

/// Has the kernel map the pages of `runs` that lie in `bank`, which is this piece.
fn populate(
    piece: &Piece,
    bank: &Range<u64>,
    runs: impl Iterator<Item = Range<u64>>,
    most: u64,
    advice: Advice,
) -> Result<()> {
    let page = page_size() as u64;
    let mut left = most * PAGE;
    for run in runs {
        let start = (run.start * PAGE).max(bank.start);
        let end = (run.end * PAGE).min(bank.end);
        if start >= end || left == 0 {
            continue;
        }
        let start = (start - bank.start) / page * page;
        let end = (end - bank.start).next_multiple_of(page).min(piece.size());
        let size = (end - start).min(left.next_multiple_of(page));
        left -= size.min(left);
        let address = piece.address().wrapping_add(start as usize);
        let advise = || {
            // SAFETY: the range lies in the piece, which is mapped, and what its bytes are stays as it is.
            unsafe { madvise(address as *mut c_void, size as usize, advice) }
        };
        match uninterrupted(advise) {
            Err(rustix::io::Errno::INVAL) => return Ok(()),
            result => result.context("cannot bring in the pages that the guest needs first")?,
        }
    }
    Ok(())
}
