//! Images in QEMU's qcow2 format, by the library imago. One request at a time.

pub mod header;
pub mod mend;

use super::QCOW2;
use super::complaints::Complaints;
use anyhow::{Context, Result, bail};
use armlet_devices::virtio::block::{Data, Engine, Operation, Outcome, Request};
use header::Header;
use imago::FormatAccess;
use imago::file::File as Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use mend::{Repair, survey};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
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
    disk: FormatAccess<Storage>,
    /// What the first change needs, of an image that may be changed and was not yet.
    unchanged: Option<Unchanged>,
    /// Whether clusters were given back since the last flush.
    freed: bool,
    /// Bytes of the disk that one L2 table maps.
    span: u64,
    /// Whether something was changed in each of these spans, so that it has its table.
    touched: Vec<bool>,
}

/// An image to which nothing was written yet. What writes to it says with its first write that it
/// does not keep bitmaps and the like up to date (autoclear features), and makes its counts good: a
/// start that is refused, or a guest that only reads, leaves it as it was.
struct Unchanged {
    path: PathBuf,
    file: File,
    found: Found,
    backing: Vec<(PathBuf, File)>,
}

impl Unchanged {
    /// Opens it anew, to be written.
    fn open(&self) -> Result<FormatAccess<Storage>> {
        self.found.repair(&self.path, &self.file)?;
        let mut backing = Vec::new();
        for (path, file) in &self.backing {
            backing.push((path.as_path(), file.try_clone()?));
        }
        let file = self.file.try_clone()?;
        let disk = open_chain(&self.path, file, false, &mut backing.into_iter())?;
        // Before the guest's data: else a power cut could leave those, and a bitmap that does not
        // know of them.
        self.file.sync_data()?;
        Ok(disk)
    }
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
        let span = found.header.span();
        let mut unchanged = None;
        if !readonly {
            let backing = backing.iter();
            let backing = backing.map(|(path, file)| Ok((path.to_path_buf(), file.try_clone()?)));
            unchanged = Some(Unchanged {
                path: path.to_owned(),
                file: file.try_clone()?,
                found,
                backing: backing.collect::<io::Result<_>>()?,
            });
        }
        let disk = open_chain(path, file, true, &mut backing.into_iter())?;
        let size = disk.size();
        let access = Access {
            disk,
            unchanged,
            freed: false,
            span,
            touched: vec![false; size.div_ceil(span) as usize],
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
            Operation::Write => access.each_span(offset, len, |access, at, count| {
                let data = request.data.slice((at - offset) as usize, count as usize);
                each_piece(memory, &data, |slices, piece| {
                    let (vector, _guard) = IoVector::from_volatile_slice(slices);
                    access.disk.writev(vector, at + piece)
                })
            })?,
            Operation::Discard => {
                return access.each_span(offset, len, |access, at, count| {
                    access.freed = true;
                    // It is advice; images of version 2 do not take it.
                    or_else_unsupported(access.disk.discard_to_any(at, count), || Ok(()))
                });
            }
            Operation::WriteZeroes { unmap } => {
                access.each_span(offset, len, |access, at, count| {
                    access.freed |= unmap;
                    let zeroed = match unmap {
                        true => access.disk.discard_to_zero(at, count),
                        false => access.disk.write_zeroes(at, count),
                    };
                    or_else_unsupported(zeroed, || write_zeroes(&access.disk, at, count))
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
        if let Some(unchanged) = &self.unchanged {
            let disk = unchanged.open();
            self.disk = disk.map_err(|error| io::Error::other(format!("{error:#}")))?;
            self.unchanged = None;
        }
        Ok(())
    }

    /// Brings all to stable storage.
    fn sync(&mut self) -> io::Result<()> {
        self.disk.flush()?;
        self.disk.sync()?;
        self.freed = false;
        Ok(())
    }

    /// Calls `change` for each part of a range that has one L2 table.
    ///
    /// A cluster that was given back may be used anew, at once for an L2 table, before the storage
    /// has it that it was given back: after a kill it would have two users. So all is brought to
    /// stable storage before clusters are taken for tables, which is once for each span (512 MiB,
    /// as images mostly are), and after a discard.
    fn each_span(
        &mut self,
        offset: u64,
        len: u64,
        mut change: impl FnMut(&mut Access, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let index = (at / self.span) as usize;
            let count = (end - at).min(self.span - at % self.span);
            let is_known = self.touched.get(index).copied().unwrap_or(false);
            if self.freed || !is_known {
                self.sync()?;
            }
            change(self, at, count)?;
            if let Some(touched) = self.touched.get_mut(index) {
                *touched = true;
            }
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
    file: File,
    readonly: bool,
    backing: &mut dyn Iterator<Item = (&Path, File)>,
) -> Result<FormatAccess<Storage>> {
    let shown = path.display();
    let cannot = || format!("cannot open qcow2 image {shown}");
    let storage = Storage::try_from(file).with_context(cannot)?;
    let mut image = Qcow2::<Storage>::open_image(storage, !readonly).with_context(cannot)?;
    if image.requires_external_data_file() {
        bail!("qcow2 image {shown} has its data in another file, which armlet does not support");
    }
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
                    look_at_header(other, &file, true)?;
                    open_chain(other, file, true, backing)?
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
) -> Result<FormatAccess<Storage>> {
    if let Some((other, _)) = backing.next() {
        bail!(
            "{} is a raw image, which stands alone; leave backing={} out",
            path.display(),
            other.display()
        );
    }
    let storage = Storage::try_from(file);
    let raw = storage.and_then(|storage| Raw::open_image(storage, false));
    let raw = raw.with_context(|| format!("cannot open backing file {}", path.display()))?;
    Ok(FormatAccess::new(raw))
}

fn begins_like_qcow2(file: &File) -> bool {
    let mut magic = [0; QCOW2.len()];
    file.read_exact_at(&mut magic, 0).is_ok() && magic == QCOW2
}

fn write_zeroes(access: &FormatAccess<Storage>, offset: u64, len: u64) -> io::Result<()> {
    let zeroes = [0; ZEROES];
    let mut done = 0;
    while done < len {
        let count = (len - done).min(ZEROES as u64);
        access.write(&zeroes[..count as usize], offset + done)?;
        done += count;
    }
    Ok(())
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
        let access = super::lock(&self.image.access);
        if access.unchanged.is_some() {
            return;
        }
        let result = access.disk.flush();
        let complaints = &self.image.complaints;
        let _ = complaints.outcome(Operation::Flush, 0, 0, result);
    }
}
