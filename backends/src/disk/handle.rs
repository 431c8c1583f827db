//! A disk's image for those who do not work with it.

use super::image::Current;
use anyhow::{Context, Result, bail};
use armlet_devices::virtio::Change;
use std::io::{Seek, SeekFrom};
use std::path::Path;

/// A disk's image for those who do not work with it.
pub struct DiskHandle {
    pub(super) name: String,
    pub(super) image: Measured,
    pub(super) replace: Option<Replace>,
}

/// Gives a disk the image at a path: its bytes, and what the device is to be told.
pub(super) type Replace = Box<dyn Fn(&Path) -> Result<(u64, Change)> + Send>;

/// An image with a size.
pub(super) enum Measured {
    /// One whose file says how large the disk is.
    Raw(Current),
    /// One that has had so many bytes since it was opened.
    Fixed(u64),
}

impl DiskHandle {
    /// Looks how large the image is now, in bytes, and has its engine go by that. It takes as long as
    /// the storage takes.
    ///
    /// # Errors
    /// What the system says.
    pub fn look(&self) -> Result<u64> {
        match &self.image {
            Measured::Raw(current) => {
                let image = current.get();
                let size = (&image.file).seek(SeekFrom::End(0));
                let size =
                    size.with_context(|| format!("cannot look at the image of {}", self.name))?;
                Ok(image.set_len(size))
            }
            Measured::Fixed(size) => Ok(*size),
        }
    }

    /// Gives the disk the image at `path`, opened and locked as the first one was, and returns its bytes
    /// and what the device is to be told: until it is, its engine works on the image before. For the file
    /// that the disk has already, this is the same as [`Self::look`].
    ///
    /// # Errors
    /// An image that cannot be opened, is in use, or is of no use here; a disk whose image is not raw. The
    /// disk keeps the image that it has.
    pub fn change(&self, path: &Path) -> Result<(u64, Change)> {
        match &self.replace {
            Some(replace) => replace(path),
            None => bail!(
                "the image of {} is no raw one, and only those are replaced",
                self.name
            ),
        }
    }
}
