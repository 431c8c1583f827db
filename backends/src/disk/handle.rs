//! A disk's image for those who do not work with it.

use super::image::Image;
use anyhow::{Context, Result};
use std::io::{Seek, SeekFrom};
use std::sync::Arc;

/// A disk's image for those who do not work with it.
pub struct DiskHandle {
    pub(super) name: String,
    pub(super) image: Measured,
}

/// An image with a size.
pub(super) enum Measured {
    /// One whose file says how large the disk is.
    Raw(Arc<Image>),
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
            Measured::Raw(image) => {
                let size = (&image.file).seek(SeekFrom::End(0));
                let size =
                    size.with_context(|| format!("cannot look at the image of {}", self.name))?;
                Ok(image.set_len(size))
            }
            Measured::Fixed(size) => Ok(*size),
        }
    }
}
