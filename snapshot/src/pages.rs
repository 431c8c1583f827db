//! `memory`: a guest's banks one after another, with holes for zeros. A diff has only the pages that
//! are others than its base's, and those that became zero as zeros.
//!
//! The guest stands still meanwhile. Each of its pages is read at most once, and none that it never
//! used: that is what the kernel says by pagemap and by the holes of files.

pub use crate::content::{Backing, Piece};

use crate::PAGE;
use crate::content::{Content, each_extent};
use crate::copy::{CHUNK, Output, is_same, read};
use crate::runs::Runs;
use anyhow::{Result, ensure};
use rustix::fs::fstat;
use std::fs::File;
use std::ops::Range;

/// How far writing has come, in bytes of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Those that are done.
    pub done: u64,
    /// All of them.
    pub total: u64,
}

/// Hears how writing goes on, after each mebibyte or so. An error of it ends the writing with that
/// error.
pub type Listener<'a> = &'a mut dyn FnMut(Progress) -> Result<()>;

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the file that are no holes.
    pub bytes: u64,
    /// For a diff, its pages.
    pub changed: Runs,
}

/// Writes memory to an empty file: the pieces of all banks, in order.
///
/// `pagemap` is /proc/self/pagemap, opened by this process. Without it all memory of this process alone
/// is read, which takes pages for what the guest never used.
///
/// # Errors
/// What the system says, with how far it came; what `listener` says.
pub fn write(
    pieces: &[Piece],
    pagemap: Option<&File>,
    file: &File,
    listener: Listener,
) -> Result<Written> {
    let total = total(pieces)?;
    let mut output = Output::new(file, total)?;
    let mut meter = Meter::new(total, listener);
    let mut buffer = vec![0; CHUNK];
    let mut start = 0;
    for piece in pieces {
        piece.each_part(pagemap, |part, content| {
            for some in chunks(part) {
                let (offset, size) = (start + some.start, some.end - some.start);
                match (content, piece.file()) {
                    (Content::Zero, _) => {}
                    (Content::OfFile, Some((from, at))) => {
                        output.copy(from, at + some.start, offset, size)?;
                    }
                    (Content::OfFile | Content::Mapped, _) => {
                        let bytes = &mut buffer[..size as usize];
                        piece.read(some.start, bytes)?;
                        output.write_sparse(bytes, offset)?;
                    }
                }
                meter.tell(offset + size)?;
            }
            Ok(())
        })?;
        start += piece.size();
    }
    meter.finish()?;
    Ok(Written {
        bytes: output.written(),
        changed: Runs::default(),
    })
}

/// Writes what is not as in `base` to an empty file: as [`write()`] does.
///
/// # Errors
/// As for [`write()`]; a base of another size.
pub fn write_diff(
    pieces: &[Piece],
    pagemap: Option<&File>,
    base: &Base,
    file: &File,
    listener: Listener,
) -> Result<Written> {
    let total = total(pieces)?;
    let known = fstat(base.whole)?;
    let size = known.st_size.unsigned_abs();
    ensure!(
        size == total,
        "the memory of the last snapshot has {size} bytes, and that of the guest {total}; make a whole snapshot, without --diff"
    );
    let before = Before::new(base);
    let mut output = Output::new(file, total)?;
    let mut changed = Runs::default();
    let mut meter = Meter::new(total, listener);
    let (mut now, mut then) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut start = 0;
    for piece in pieces {
        // Pages of the base itself that were never written are as they were.
        let is_base = match piece.file() {
            Some((file, at)) => {
                let file = fstat(file)?;
                (file.st_dev, file.st_ino, at) == (known.st_dev, known.st_ino, start)
            }
            None => false,
        };
        piece.each_part(pagemap, |part, content| {
            let range = start + part.start..start + part.end;
            let is_known = content == Content::OfFile && is_base;
            before.each_part(range, is_known, |range, is_data| {
                let Some(is_data) = is_data else {
                    return meter.tell(range.end);
                };
                for some in chunks(range) {
                    let size = (some.end - some.start) as usize;
                    let (now, then) = (&mut now[..size], &mut then[..size]);
                    let at = some.start - start;
                    match (content, piece.file()) {
                        (Content::Zero, _) if !is_data => {
                            meter.tell(some.end)?;
                            continue;
                        }
                        (Content::Zero, _) => now.fill(0),
                        (Content::OfFile, Some((from, offset))) => read(from, now, offset + at)?,
                        (Content::OfFile | Content::Mapped, _) => piece.read(at, now)?,
                    }
                    match is_data {
                        true => before.read(then, some.start)?,
                        false => then.fill(0),
                    }
                    for pages in differences(now, then) {
                        let offset = some.start + pages.start as u64 * PAGE;
                        let first = offset / PAGE;
                        let bytes = pages.start * PAGE as usize..pages.end * PAGE as usize;
                        output.write(&now[bytes], offset)?;
                        changed.push(first..first + pages.len() as u64);
                    }
                    meter.tell(some.end)?;
                }
                Ok(())
            })
        })?;
        start += piece.size();
    }
    meter.finish()?;
    Ok(Written {
        bytes: output.written(),
        changed,
    })
}

/// The memory that a diff is to: that of a whole snapshot, and the diffs since.
#[derive(Clone, Debug)]
pub struct Base<'a> {
    /// The memory file of the whole snapshot.
    pub whole: &'a File,
    /// The memory files of the diffs, each to the one before, and their pages.
    pub later: Vec<(&'a File, &'a Runs)>,
}

/// A base, with runs in the form in which they are searched, in bytes.
struct Before<'a> {
    whole: &'a File,
    later: Vec<(&'a File, Vec<Range<u64>>)>,
    /// What any of the diffs has.
    changed: Vec<Range<u64>>,
}

impl<'a> Before<'a> {
    fn new(base: &Base<'a>) -> Before<'a> {
        let bytes = |runs: &Runs| -> Vec<Range<u64>> {
            let runs = runs.iter();
            runs.map(|run| run.start * PAGE..run.end * PAGE).collect()
        };
        let later = base.later.iter();
        let all = later
            .clone()
            .fold(Runs::default(), |all, (_, runs)| all.union(runs));
        Before {
            whole: base.whole,
            later: later.map(|(file, runs)| (*file, bytes(runs))).collect(),
            changed: bytes(&all),
        }
    }

    /// Calls `each` for the parts of a range: whether there is data in one, or `None` if it is as it was.
    /// `is_known` says that the range is as in the whole snapshot.
    fn each_part(
        &self,
        range: Range<u64>,
        is_known: bool,
        mut each: impl FnMut(Range<u64>, Option<bool>) -> Result<()>,
    ) -> Result<()> {
        let of_whole =
            |range: Range<u64>, each: &mut dyn FnMut(Range<u64>, Option<bool>) -> Result<()>| {
                if range.is_empty() {
                    return Ok(());
                }
                match is_known {
                    true => each(range, None),
                    false => each_extent(self.whole, 0, range, |range, is_data| {
                        each(range, Some(is_data))
                    }),
                }
            };
        let mut at = range.start;
        for run in within(&self.changed, &range) {
            of_whole(at..run.start, &mut each)?;
            each(run.clone(), Some(true))?;
            at = run.end;
        }
        of_whole(at..range.end, &mut each)
    }

    /// Reads what there was at an offset.
    fn read(&self, into: &mut [u8], offset: u64) -> Result<()> {
        read(self.whole, into, offset)?;
        let range = offset..offset + into.len() as u64;
        for (file, runs) in &self.later {
            for run in within(runs, &range) {
                let part = (run.start - offset) as usize..(run.end - offset) as usize;
                read(file, &mut into[part], run.start)?;
            }
        }
        Ok(())
    }
}

/// Returns the parts of runs that lie in a range.
fn within<'a>(
    runs: &'a [Range<u64>],
    range: &Range<u64>,
) -> impl Iterator<Item = Range<u64>> + use<'a> {
    let (start, end) = (range.start, range.end);
    let first = runs.partition_point(|run| run.end <= start);
    let runs = runs[first..].iter().take_while(move |run| run.start < end);
    runs.map(move |run| run.start.max(start)..run.end.min(end))
}

/// Says how far writing has come, at most once each [`CHUNK`].
struct Meter<'a> {
    listener: Listener<'a>,
    total: u64,
    told: u64,
}

impl<'a> Meter<'a> {
    fn new(total: u64, listener: Listener<'a>) -> Meter<'a> {
        Meter {
            listener,
            total,
            told: 0,
        }
    }

    fn tell(&mut self, done: u64) -> Result<()> {
        if done - self.told < CHUNK as u64 {
            return Ok(());
        }
        self.told = done;
        let total = self.total;
        (self.listener)(Progress { done, total })
    }

    fn finish(&mut self) -> Result<()> {
        let total = self.total;
        (self.listener)(Progress { done: total, total })
    }
}

/// Adds up the sizes of pieces, which consist of whole pages.
fn total(pieces: &[Piece]) -> Result<u64> {
    let mut total = 0_u64;
    for piece in pieces {
        let size = piece.size();
        ensure!(
            size % PAGE == 0,
            "a piece of the guest's memory has {size} bytes, no whole number of pages of 4 KiB"
        );
        total += size;
    }
    Ok(total)
}

/// Cuts a range into parts that fit into a buffer.
fn chunks(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    let starts = range.step_by(CHUNK);
    starts.map(move |start| start..end.min(start + CHUNK as u64))
}

/// Returns the runs of pages in which two buffers differ.
fn differences<'a>(now: &'a [u8], then: &'a [u8]) -> impl Iterator<Item = Range<usize>> + use<'a> {
    let page = PAGE as usize;
    let pages = now.chunks(page).zip(then.chunks(page));
    let mut differ = pages
        .map(|(now, then)| !is_same(now, then))
        .enumerate()
        .peekable();
    std::iter::from_fn(move || {
        let start = differ.find(|(_, differ)| *differ)?.0;
        let mut end = start + 1;
        while differ.next_if(|(_, differ)| *differ).is_some() {
            end += 1;
        }
        Some(start..end)
    })
}
