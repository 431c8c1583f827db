//! Another image for a disk whose guest runs.

use super::image::Current;
use super::opener::Opener;
use super::options::DiskOptions;
use anyhow::{Context, Result, bail};
use armlet_devices::virtio::Change;
use rustix::fs::SeekFrom;
use std::path::Path;

/// What it takes to give a disk with a raw image another one.
pub(super) struct Replacement {
    pub(super) name: String,
    pub(super) options: DiskOptions,
    pub(super) opener: Opener,
    /// Bytes of the guest's blocks.
    pub(super) block: u32,
    pub(super) current: Current,
}

impl Replacement {
    /// As [`DiskHandle::change`](super::DiskHandle::change).
    pub(super) fn open(&self, path: &Path) -> Result<(u64, Change)> {
        let options = &self.options;
        let opened = self.opener.open(path, !options.readonly)?;
        let cannot = || format!("cannot look at disk image {}", path.display());
        let before = self.current.get();
        if opened.is_same(&before.file).with_context(cannot)? {
            let size = rustix::fs::seek(&before.file, SeekFrom::End(0)).with_context(cannot)?;
            let bytes = before.set_len(size);
            return Ok((bytes, Change::DiskSize(bytes)));
        }
        if options.is_qcow2(path, &opened.file)? {
            bail!(
                "disk image {} is no raw one, as that of {} is",
                path.display(),
                self.name
            );
        }
        let (size, direct) = options.prepare(path, &opened)?;
        let image = options.image(&self.name, path, opened, direct, self.block);
        let bytes = image.set_len(size);
        options.check_sectors(bytes, path)?;
        self.current.replace(image);
        Ok((bytes, Change::DiskStorage(bytes)))
    }
}
