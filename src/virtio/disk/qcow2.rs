//! Images in QEMU's qcow2 format, by the library imago. One request at a time.

pub mod header;
pub mod mend;
mod order;
mod storage;

use super::QCOW2;
use super::complaints::Complaints;
use anyhow::{Context, Result, bail};
use armlet_devices::virtio::block::{Data, Engine, Operation, Outcome, Request};
use header::Header;
use imago::file::File as Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, Mapping, StorageExt as _};
use mend::{Repair, survey};
use order::Below;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
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
    /// Bytes of a cluster, and of the disk that one L2 table maps.
    cluster: u64,
    span: u64,
}

/// An image to which nothing was written yet. What writes to it makes its counts good first: a start
/// that is refused, or a guest that only reads, leaves it as it was. (Its autoclear features are the
/// layer's affair.)
struct Unchanged {
    path: PathBuf,
    file: File,
    found: Found,
}

impl Image {
    /// The image in `file`, which is open and locked, as are those that stand behind it in this
    /// order; [`look`] found it in order. Nothing is written before the guest does.
    ///
    /// # Errors
    /// No image, or one that names other files than the user did.
    pub(super) fn open(
        path: &Path,
        file: File,
        found: Found,
        readonly: bool,
        backing: Vec<(&Path, File)>,
        complaints: Complaints,
    ) -> Result<Image> {
        let header = found.header.clone();
        let unchanged = match readonly {
            true => None,
            false => Some(Unchanged {
                path: path.to_owned(),
                file: file.try_clone()?,
                found,
            }),
        };
        let below = Arc::new(Storage::try_from(file)?);
        let backing = &mut backing.into_iter();
        let image = Image::on(path, below, &header, readonly, backing, complaints)?;
        super::lock(&image.access).unchanged = unchanged;
        Ok(image)
    }

    /// As [`Image::open`], for what is in order and need not be a file.
    fn on(
        path: &Path,
        below: Arc<dyn Below>,
        header: &Header,
        readonly: bool,
        backing: &mut dyn Iterator<Item = (&Path, File)>,
        complaints: Complaints,
    ) -> Result<Image> {
        let layer = Layer::qcow2(below, header, readonly);
        let layer = layer.with_context(|| format!("cannot open qcow2 image {}", path.display()))?;
        let disk = open_chain(path, layer.clone(), readonly, backing)?;
        let size = disk.size();
        let access = Access {
            disk,
            layer,
            unchanged: None,
            cluster: header.cluster_size(),
            span: header.span(),
        };
        Ok(Image {
            size,
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
        super::lock(&self.access).disk.read(bytes, offset)
    }

    fn perform(&self, memory: &GuestMemoryMmap, request: &Request<'_>) -> io::Result<()> {
        let mut access = super::lock(&self.access);
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
                return access.each_part(offset, len, |access, at, count| {
                    // It is advice; images of version 2 do not take it.
                    or_else_unsupported(access.disk.discard_to_any(at, count), || Ok(()))
                });
            }
            Operation::WriteZeroes { unmap } => {
                access.each_part(offset, len, |access, at, count| {
                    let zeroed = match unmap {
                        true => access.disk.discard_to_zero(at, count),
                        false => access.disk.write_zeroes(at, count),
                    };
                    or_else_unsupported(zeroed, || access.write_zeroes(at, count))
                })?
            }
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

    fn write(&mut self, mut vector: IoVector<'_>, mut offset: u64) -> io::Result<()> {
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

    /// Calls `change` for parts of a range that give clusters back or take some, not one after the
    /// other: whole clusters of one L2 table, and parts of clusters.
    fn each_part(
        &mut self,
        offset: u64,
        len: u64,
        mut change: impl FnMut(&mut Access, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let left = end - at;
            let within = at % self.cluster;
            let is_whole = within == 0 && left >= self.cluster;
            let count = match is_whole {
                true => (left - left % self.cluster).min(self.span - at % self.span),
                false => left.min(self.cluster - within),
            };
            // For whole clusters nothing is taken but the L2 table.
            match is_whole && self.layer.has_l2(at / self.span) {
                true if self.layer.is_full() => self.sync()?,
                true => {}
                false => self.settle(at, count)?,
            }
            change(self, at, count)?;
            at += count;
        }
        Ok(())
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

/// Looks at an image before it is opened. Nothing is written.
///
/// # Errors
/// One that is damaged, or that armlet cannot work with.
pub(super) fn look(path: &Path, file: &File, readonly: bool) -> Result<Found> {
    let header = look_at_header(path, file, readonly)?;
    let repair = match readonly {
        true => Repair::default(),
        false => survey(file, &header).with_context(|| {
            let path = path.display();
            format!(
                "qcow2 image {path} is damaged ('qemu-img check -r all {path}' may repair it; 'qemu-img convert -O qcow2 {path} NEW' saves what can be read)"
            )
        })?,
    };
    Ok(Found { header, repair })
}

fn look_at_header(path: &Path, file: &File, readonly: bool) -> Result<Header> {
    let shown = path.display().to_string();
    let header = Header::read(file).and_then(|header| {
        header.check_features(&shown, readonly)?;
        Ok(header)
    });
    header.with_context(|| format!("cannot open qcow2 image {shown}"))
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

/// Opens an image with all that stands behind it.
fn open_chain(
    path: &Path,
    layer: Layer,
    readonly: bool,
    backing: &mut dyn Iterator<Item = (&Path, File)>,
) -> Result<FormatAccess<Layer>> {
    let shown = path.display();
    let image = Qcow2::<Layer>::open_image(layer, !readonly);
    let mut image = image.with_context(|| format!("cannot open qcow2 image {shown}"))?;
    let wanted = image.implicit_backing_file().cloned();
    let format = image.implicit_backing_format().cloned();
    match (wanted, backing.next()) {
        (None, None) => {}
        (None, Some((other, _))) => bail!(
            "qcow2 image {shown} stands alone; leave backing={} out",
            other.display()
        ),
        // The image is not trusted to name files of the host.
        (Some(wanted), None) => bail!(
            "qcow2 image {shown} needs '{wanted}' behind it; if that is right, say so: backing=PATH"
        ),
        (Some(_), Some((other, file))) => {
            let behind = match format.as_deref() {
                Some("qcow2") => {
                    let header = look_at_header(other, &file, true)?;
                    let below = Arc::new(Storage::try_from(file)?);
                    open_chain(other, Layer::qcow2(below, &header, true)?, true, backing)?
                }
                Some("raw") => open_raw(other, file, backing)?,
                None if !begins_like_qcow2(&file) => open_raw(other, file, backing)?,
                _ => bail!(
                    "qcow2 image {shown} does not say that {} is raw or qcow2; 'qemu-img rebase -u -F FORMAT -b FILE {shown}' does",
                    other.display()
                ),
            };
            image.set_backing(Some(behind));
        }
    }
    Ok(FormatAccess::new(image))
}

fn open_raw(
    path: &Path,
    file: File,
    backing: &mut dyn Iterator<Item = (&Path, File)>,
) -> Result<FormatAccess<Layer>> {
    if let Some((other, _)) = backing.next() {
        bail!(
            "{} is a raw image, which stands alone; leave backing={} out",
            path.display(),
            other.display()
        );
    }
    let storage = Storage::try_from(file);
    let raw = storage.and_then(|file| Raw::open_image(Layer::raw(Arc::new(file)), false));
    let raw = raw.with_context(|| format!("cannot open backing file {}", path.display()))?;
    Ok(FormatAccess::new(raw))
}

fn begins_like_qcow2(file: &File) -> bool {
    let mut magic = [0; QCOW2.len()];
    file.read_exact_at(&mut magic, 0).is_ok() && magic == QCOW2
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
            Some(memory) => self.image.perform(memory, request),
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
        let mut access = super::lock(&self.image.access);
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
