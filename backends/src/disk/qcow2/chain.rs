//! An image with all that stands behind it.

use super::extended::Extended;
use super::header::{Compression, Header};
use super::storage::Layer;
use super::zstd::Zstd;
use crate::disk::options::QCOW2;
use anyhow::{Context, Result, bail};
use armlet_system::messages::{shell_word, visible};
use imago::FormatAccess;
use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The most bytes of a backing file's name that are shown.
const NAME: usize = 512;

/// A file that stands behind an image, open and locked.
pub(in crate::disk) struct Behind {
    path: PathBuf,
    file: File,
    below: Storage,
}

impl Behind {
    /// The file that is open.
    ///
    /// # Errors
    /// What the system says of it.
    pub(in crate::disk) fn new(path: PathBuf, file: File) -> Result<Behind> {
        Ok(Behind {
            file: file.try_clone()?,
            below: Storage::try_from(file)?,
            path,
        })
    }
}

/// Reads an image's header.
///
/// # Errors
/// No image, or one that armlet cannot work with.
pub(in crate::disk) fn look_at_header(path: &Path, file: &File, readonly: bool) -> Result<Header> {
    let header = Header::read(file).and_then(|header| {
        header.check_features(path, readonly)?;
        Ok(header)
    });
    header.with_context(|| format!("cannot open qcow2 image {}", path.display()))
}

/// Opens an image with all that stands behind it.
pub(super) fn open_chain(
    path: &Path,
    layer: Layer,
    header: &Header,
    readonly: bool,
    backing: &mut dyn Iterator<Item = Behind>,
) -> Result<FormatAccess<Layer>> {
    let shown = path.display();
    let image = Qcow2::<Layer>::open_image(layer.clone(), !readonly);
    let cannot = || format!("cannot open qcow2 image {shown}");
    let mut image = image.with_context(cannot)?;
    let mut behind_it = None;
    let wanted = image.implicit_backing_file();
    let wanted = wanted.map(|name| visible(name.as_bytes(), NAME));
    let format = image.implicit_backing_format().cloned();
    match (wanted, backing.next()) {
        (None, None) => {}
        (None, Some(other)) => bail!(
            "qcow2 image {shown} stands alone; leave backing={} out",
            other.path.display()
        ),
        // The image is not trusted to name files of the host.
        (Some(wanted), None) => bail!(
            "qcow2 image {shown} needs '{wanted}' behind it; if that is right, say so: backing=PATH"
        ),
        (Some(_), Some(other)) => {
            let behind = match format.as_deref() {
                Some("qcow2") => {
                    let header = look_at_header(&other.path, &other.file, true)?;
                    let layer = Layer::qcow2(Arc::new(other.below), &header, true)?;
                    open_chain(&other.path, layer, &header, true, backing)?
                }
                Some("raw") => open_raw(other, backing)?,
                None if !begins_like_qcow2(&other.file) => open_raw(other, backing)?,
                _ => bail!(
                    "qcow2 image {shown} does not say that {} is raw or qcow2; 'qemu-img rebase -u -F FORMAT -b FILE {}' does",
                    other.path.display(),
                    shell_word(path)
                ),
            };
            behind_it = Some(behind);
        }
    }
    let header = header.clone();
    if header.has_extended_l2() {
        let disk = Extended {
            layer,
            header,
            backing: behind_it,
        };
        let raw = Raw::open_image(Layer::raw(Arc::new(disk)), false);
        return Ok(FormatAccess::new(raw.with_context(cannot)?));
    }
    image.set_backing(behind_it);
    Ok(match header.compression {
        Compression::Deflate => FormatAccess::new(image),
        Compression::Zstd => FormatAccess::new(Zstd {
            image,
            layer,
            header,
        }),
    })
}

fn open_raw(
    behind: Behind,
    backing: &mut dyn Iterator<Item = Behind>,
) -> Result<FormatAccess<Layer>> {
    let path = behind.path.display();
    if let Some(other) = backing.next() {
        bail!(
            "{path} is a raw image, which stands alone; leave backing={} out",
            other.path.display()
        );
    }
    let raw = Raw::open_image(Layer::raw(Arc::new(behind.below)), false);
    let raw = raw.with_context(|| format!("cannot open backing file {path}"))?;
    Ok(FormatAccess::new(raw))
}

fn begins_like_qcow2(file: &File) -> bool {
    let mut magic = [0; QCOW2.len()];
    file.read_exact_at(&mut magic, 0).is_ok() && magic == QCOW2
}
