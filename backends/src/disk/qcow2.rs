//! Images in QEMU's qcow2 format, by the library imago. One request at a time.

mod chain;
mod clusters;
mod extended;
pub mod header;
pub mod mend;
mod order;
mod storage;
mod zstd;

use super::complaints::{Complaints, cancelled};
use super::sys::MOST_AT_ONCE;
use anyhow::{Context, Result};
use armlet_devices::sync::lock;
use armlet_devices::virtio::block::{Data, Engine, Operation, Outcome, Request};
use armlet_system::messages::shell_word;
use chain::open_chain;
pub(super) use chain::{Behind, look_at_header};
use header::{Compression, Header};
use imago::file::File as Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::{FormatAccess, Mapping, StorageExt as _};
use mend::{Repair, survey};
use order::Below;
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use storage::Layer;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// The most pieces of memory that imago hands to the kernel in one call (UIO_MAXIOV).
const MOST_PIECES: usize = 1024;
/// Zeroes that are written at once where the format has no better way.
const ZEROES: usize = 64 << 10;

/// An open qcow2 image.
pub(super) struct Image {
    access: Mutex<Access>,
    size: u64,
    readonly: bool,
    complaints: Complaints,
}

struct Access {
    disk: FormatAccess<Layer>,
    layer: Layer,
    /// What the first change needs, of an image that may be changed and was not yet.
    unchanged: Option<Unchanged>,
    /// Bytes of the disk, of a cluster, and of the disk that one L2 table maps.
    size: u64,
    cluster: u64,
    span: u64,
    compression: Compression,
}

/// An image to which nothing was written yet. What writes to it makes its counts good first: a start
/// that is refused, or a guest that only reads, leaves it as it was. (Its autoclear features are the
/// layer's affair.)
struct Unchanged {
    path: PathBuf,
    file: File,
    found: Found,
}

/// An image that is open and locked, of which nothing but the header was read.
pub(super) struct Unread {
    path: PathBuf,
    file: File,
    below: Storage,
    header: Header,
    readonly: bool,
    /// What stands behind it, in order.
    backing: Vec<Behind>,
    complaints: Complaints,
}

impl Unread {
    /// The image in `file`, which is open and locked, as is what stands behind it, and has this header.
    ///
    /// # Errors
    /// What the system says of the file.
    pub(super) fn new(
        path: &Path,
        file: File,
        header: Header,
        readonly: bool,
        backing: Vec<Behind>,
        complaints: Complaints,
    ) -> Result<Unread> {
        Ok(Unread {
            header,
            path: path.to_owned(),
            file: file.try_clone()?,
            below: Storage::try_from(file)?,
            readonly,
            backing,
            complaints,
        })
    }

    /// The disk's size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.header.size
    }

    /// Reads its tables, and the headers of what stands behind it. Nothing is written before the guest
    /// does.
    ///
    /// # Errors
    /// One that is damaged, or that names other files than the user did.
    pub(super) fn read(self) -> Result<Image> {
        let (path, readonly) = (&self.path, self.readonly);
        let found = around_cache(&self.file, || {
            look_at_tables(path, &self.file, &self.header, readonly)
        })?;
        let below = Arc::new(self.below);
        let backing = &mut self.backing.into_iter();
        let image = Image::on(
            path,
            below,
            &self.header,
            readonly,
            backing,
            self.complaints,
        )?;
        if !readonly {
            lock(&image.access).unchanged = Some(Unchanged {
                path: self.path,
                file: self.file,
                found,
            });
        }
        Ok(image)
    }
}

/// Does something with a file whose reads go through the host's page cache meanwhile: in bytes, where direct
/// I/O is in blocks.
fn around_cache<T>(file: &File, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    if !flags.contains(OFlags::DIRECT) {
        return act();
    }
    rustix::fs::fcntl_setfl(file, flags - OFlags::DIRECT)?;
    let done = act();
    rustix::fs::fcntl_setfl(file, flags)?;
    done
}

impl Image {
    /// The image that lies in `below`, which need not be a file, and is in order.
    fn on(
        path: &Path,
        below: Arc<dyn Below>,
        header: &Header,
        readonly: bool,
        backing: &mut dyn Iterator<Item = Behind>,
        complaints: Complaints,
    ) -> Result<Image> {
        let layer = Layer::qcow2(below, header, readonly);
        let layer = layer.with_context(|| format!("cannot open qcow2 image {}", path.display()))?;
        let disk = open_chain(path, layer.clone(), header, readonly, backing)?;
        let access = Access {
            disk,
            layer,
            unchanged: None,
            size: header.size,
            cluster: header.cluster_size(),
            span: header.span(),
            compression: header.compression,
        };
        Ok(Image {
            size: header.size,
            access: Mutex::new(access),
            readonly,
            complaints,
        })
    }

    /// The disk's size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Reads what the disk holds at an offset.
    pub(super) fn peek(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        lock(&self.access).disk.read(bytes, offset)
    }

    fn perform(&self, memory: &GuestMemoryMmap, request: &Request<'_>) -> io::Result<()> {
        let mut access = lock(&self.access);
        let (offset, len) = (request.offset, request.len);
        if !matches!(request.operation, Operation::Read | Operation::Flush) {
            access.prepare()?;
        }
        match request.operation {
            Operation::Read => {
                return each_piece(memory, &request.data, |slices, at| {
                    let (vector, _guard) = IoVectorMut::from_volatile_slice(slices);
                    access.disk.readv(vector, offset + at)
                });
            }
            Operation::Flush if self.readonly || access.unchanged.is_some() => return Ok(()),
            Operation::Flush => return access.sync(),
            Operation::Write => each_piece(memory, &request.data, |slices, at| {
                let (vector, _guard) = IoVector::from_volatile_slice(slices);
                access.write(vector, offset + at)
            })?,
            Operation::Discard => {
                return access.each_part(offset, len, |access, part| match part {
                    // It is advice; images of version 2 do not take it.
                    Part::Whole { at, len } => {
                        or_else_unsupported(access.disk.discard_to_any(at, len), || Ok(()))
                    }
                    Part::Some { .. } => Ok(()),
                });
            }
            Operation::WriteZeroes { unmap } => access.each_part(offset, len, |access, part| {
                let (at, len) = match part {
                    Part::Some { at, len } => return access.zero_some(at, len),
                    Part::Whole { at, len } => (at, len),
                };
                let zeroed = match unmap {
                    true => access.disk.discard_to_zero(at, len),
                    false => access.disk.write_zeroes(at, len),
                };
                let len = len.min(access.size - at);
                or_else_unsupported(zeroed, || access.write_zeroes(at, len))
            })?,
        }
        match request.durable {
            true => access.sync(),
            false => Ok(()),
        }
    }
}

impl Access {
    /// Sees to it that the image can be changed.
    fn prepare(&mut self) -> io::Result<()> {
        if let Some(Unchanged { path, file, found }) = &self.unchanged {
            let repaired = found.repair(path, file);
            repaired.map_err(|error| io::Error::other(format!("{error:#}")))?;
            self.unchanged = None;
        }
        Ok(())
    }

    /// Brings all to stable storage.
    fn sync(&mut self) -> io::Result<()> {
        self.disk.flush()?;
        self.disk.sync()?;
        self.layer.forget_freed();
        Ok(())
    }

    /// Has all on stable storage before clusters are taken, where some were given back.
    ///
    /// A cluster that was given back may be used anew at once, before the file has it that it was
    /// given back: after a power cut it would have two users.
    fn settle(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let in_place = |(mapping, count): (Mapping<'_, Layer>, u64)| {
            matches!(mapping, Mapping::Raw { writable: true, .. }) && count >= len
        };
        let is_urgent =
            self.layer.has_freed() && !self.disk.get_mapping(offset, len).is_ok_and(in_place);
        match is_urgent || self.layer.is_full() {
            true => self.sync(),
            false => Ok(()),
        }
    }

    fn write(&mut self, vector: IoVector<'_>, offset: u64) -> io::Result<()> {
        self.unpack(offset, vector.len())?;
        self.write_unpacked(vector, offset)
    }

    /// Writes whole clusters for those that are compressed, that imago cannot decompress, and of
    /// which this range is only a part.
    fn unpack(&mut self, offset: u64, len: u64) -> io::Result<()> {
        if self.compression == Compression::Deflate || len == 0 {
            return Ok(());
        }
        let end = offset + len;
        let first = offset - offset % self.cluster;
        let last = (end - 1) - (end - 1) % self.cluster;
        let count = 1 + usize::from(last != first);
        for start in [first, last].into_iter().take(count) {
            let is_part = start < offset || start + self.cluster > end;
            let packed = |mapping: &Mapping<'_, Layer>| matches!(mapping, Mapping::Special { .. });
            if is_part && packed(&self.disk.get_mapping(start, self.cluster)?.0) {
                let mut bytes = vec![0; self.cluster as usize];
                self.disk.read(&mut bytes, start)?;
                self.write_unpacked(IoVector::from(&bytes), start)?;
            }
        }
        Ok(())
    }

    fn write_unpacked(&mut self, mut vector: IoVector<'_>, mut offset: u64) -> io::Result<()> {
        while !vector.is_empty() {
            self.settle(offset, vector.len())?;
            let mapping = self.disk.prepare_data_mapping(offset, vector.len(), true)?;
            let (part, rest) = vector.split_at(mapping.length());
            mapping.storage().writev(part, mapping.offset())?;
            offset += mapping.length();
            self.disk.commit_data_mapping(mapping)?;
            vector = rest;
        }
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let zeroes = [0; ZEROES];
        let mut done = 0;
        while done < len {
            let count = (len - done).min(ZEROES as u64);
            self.write(IoVector::from(&zeroes[..count as usize]), offset + done)?;
            done += count;
        }
        Ok(())
    }

    /// Zeroes a part of a cluster.
    fn zero_some(&mut self, at: u64, len: u64) -> io::Result<()> {
        let is_zero = |(mapping, count): (Mapping<'_, Layer>, u64)| {
            matches!(mapping, Mapping::Zero { .. }) && count >= len
        };
        match self.disk.get_mapping(at, len).is_ok_and(is_zero) {
            true => Ok(()),
            false => self.write_zeroes(at, len),
        }
    }

    /// Calls `change` for parts of a range that give clusters back or take some, not one after the
    /// other.
    fn each_part(
        &mut self,
        offset: u64,
        len: u64,
        mut change: impl FnMut(&mut Access, Part) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let left = end - at;
            let within = at % self.cluster;
            let is_last = end == self.size;
            if within != 0 || (left < self.cluster && !is_last) {
                let len = left.min(self.cluster - within);
                change(self, Part::Some { at, len })?;
                at += len;
                continue;
            }
            // The last cluster is whole though the disk ends in it, and imago takes the disk for
            // as large as it is or up to the end of that cluster.
            let len = match is_last {
                true => self.disk.size() - at,
                false => left - left % self.cluster,
            };
            let len = len.min(self.span - at % self.span);
            // Nothing is taken but the L2 table.
            match self.layer.has_l2(at / self.span) {
                true if self.layer.is_full() => self.sync()?,
                true => {}
                false => self.settle(at, len)?,
            }
            change(self, Part::Whole { at, len })?;
            at += len;
        }
        Ok(())
    }
}

/// A part of a range of the disk: whole clusters of one L2 table, or some bytes of a cluster.
#[derive(Clone, Copy)]
enum Part {
    Whole { at: u64, len: u64 },
    Some { at: u64, len: u64 },
}

/// An image without a guest, a backing file or a name, as fuzzing has them.
pub struct Anonymous(Image);

impl Anonymous {
    /// Looks at the image in `file` and opens it.
    ///
    /// # Errors
    /// As for an image of a disk.
    pub fn open(file: File, readonly: bool) -> Result<Anonymous> {
        let path = Path::new("image");
        let complaints = Complaints::new("disk".to_owned(), path.to_owned());
        let header = look_at_header(path, &file, readonly)?;
        let image = Unread::new(path, file, header, readonly, Vec::new(), complaints)?;
        Ok(Anonymous(image.read()?))
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.0.size()
    }

    /// Carries a request of a guest out.
    ///
    /// # Errors
    /// What the guest would get an I/O error for.
    pub fn perform(&self, memory: &GuestMemoryMmap, request: &Request<'_>) -> io::Result<()> {
        self.0.perform(memory, request)
    }
}

fn or_else_unsupported(
    result: io::Result<()>,
    other: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => other(),
        result => result,
    }
}

/// An image that was looked at before it is opened.
pub(super) struct Found {
    header: Header,
    repair: Repair,
}

/// Looks at an image's tables. Nothing is written.
///
/// # Errors
/// One that is damaged.
fn look_at_tables(path: &Path, file: &File, header: &Header, readonly: bool) -> Result<Found> {
    let repair = match readonly {
        true => Repair::default(),
        false => survey(file, header).with_context(|| {
            format!(
                "qcow2 image {} is damaged ('qemu-img convert --salvage -O qcow2 {} NEW' saves what can be read)",
                path.display(),
                shell_word(path)
            )
        })?,
    };
    Ok(Found {
        header: header.clone(),
        repair,
    })
}

/// Looks at an image before it is opened. Nothing is written.
///
/// # Errors
/// One that is damaged, or that armlet cannot work with.
#[cfg(test)]
pub(super) fn look(path: &Path, file: &File, readonly: bool) -> Result<Found> {
    let header = look_at_header(path, file, readonly)?;
    look_at_tables(path, file, &header, readonly)
}

impl Found {
    /// Makes good an image that is to be written to and was not closed in order.
    ///
    /// # Errors
    /// One that cannot be written.
    pub(super) fn repair(&self, path: &Path, file: &File) -> Result<()> {
        let path = path.display();
        let repaired = self.repair.apply(file, &self.header);
        repaired.with_context(|| format!("cannot repair qcow2 image {path}"))?;
        if self.repair.count() > 0 {
            let count = self.repair.count();
            log::info!("{path} was not closed in order; {count} clusters of it are counted again");
        }
        Ok(())
    }
}

/// Calls `each` with the pieces of memory, as many as fit one call, and their distance from the
/// first.
fn each_piece(
    memory: &GuestMemoryMmap,
    data: &Data<'_>,
    mut each: impl FnMut(&[VolatileSlice<'_>], u64) -> io::Result<()>,
) -> io::Result<()> {
    let slices = data.parts().map(|part| {
        let slice = memory.get_slice(part.address, part.len);
        slice.map_err(|_| io::Error::from(Errno::FAULT))
    });
    let slices = slices.collect::<io::Result<Vec<_>>>()?;
    let mut at = 0;
    for chunk in slices.chunks(MOST_PIECES) {
        each(chunk, at)?;
        at += chunk.iter().map(VolatileSlice::len).sum::<usize>() as u64;
    }
    Ok(())
}

/// Works on a qcow2 image.
pub(super) struct Qcow2Engine {
    image: Arc<Image>,
    memory: Option<Arc<GuestMemoryMmap>>,
}

impl Qcow2Engine {
    /// An engine for `image`.
    pub(super) fn new(image: Arc<Image>) -> Qcow2Engine {
        Qcow2Engine {
            image,
            memory: None,
        }
    }
}

impl Engine for Qcow2Engine {
    fn start(&mut self, memory: &Arc<GuestMemoryMmap>) {
        self.memory = Some(Arc::clone(memory));
    }

    fn begin(&mut self, request: &Request<'_>) -> Option<Outcome> {
        let result = match &self.memory {
            // In parts, so that a reset does not wait for all of it.
            Some(memory) => request.each_part(MOST_AT_ONCE, |part| {
                match part.cancelled.load(Ordering::Relaxed) {
                    true => Err(cancelled()),
                    false => self.image.perform(memory, part),
                }
            }),
            None => Err(Errno::FAULT.into()),
        };
        let complaints = &self.image.complaints;
        Some(complaints.outcome(request.operation, request.offset, request.len, result))
    }

    fn stop(&mut self) {
        self.memory = None;
        if self.image.readonly {
            return;
        }
        // What a guest leaves behind is an image that needs no repair, even if armlet is killed
        // before the next one.
        let mut access = lock(&self.image.access);
        if access.unchanged.is_some() {
            return;
        }
        let result = access.sync();
        let complaints = &self.image.complaints;
        let _ = complaints.outcome(Operation::Flush, 0, 0, result);
    }
}

#[cfg(test)]
mod tests;
