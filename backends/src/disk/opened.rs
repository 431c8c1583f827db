//! A file or block device of the host: opened, locked, and what the host says of it.

use super::image::Alignment;
use super::options::FLAG;
use crate::locks::{self, Conflict, Use};
use anyhow::{Context, Result, bail};
use armlet_devices::virtio::block::Shape;
use armlet_system::files::{self, Accepted};
use rustix::fs::{AtFlags, StatxFlags};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// A file or block device that is open.
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) metadata: Metadata,
    pub(super) is_device: bool,
}

impl Opened {
    /// Opens an image to read, and to write as well where `writable`.
    ///
    /// # Errors
    /// What is not there, not to be had, or no image.
    pub(super) fn open(path: &Path, writable: bool) -> Result<Opened> {
        let shown = path.display();
        let cannot = || format!("cannot open disk image {shown}");
        let file = files::open(path, Accepted::FileOrDisk, writable).map_err(|error| {
            let kind = error.downcast_ref().map(io::Error::kind);
            let forbidden = [
                io::ErrorKind::PermissionDenied,
                io::ErrorKind::ReadOnlyFilesystem,
            ];
            match writable && kind.is_some_and(|kind| forbidden.contains(&kind)) {
                true => error.context(format!(
                    "cannot open disk image {shown} for writing; add readonly to only read it"
                )),
                false => error.context(cannot()),
            }
        })?;
        Opened::of(file).with_context(cannot)
    }

    /// An image that is open already.
    ///
    /// # Errors
    /// What the system says of it.
    pub(super) fn of(file: File) -> io::Result<Opened> {
        let metadata = file.metadata()?;
        let is_device = metadata.file_type().is_block_device();
        Ok(Opened {
            file,
            metadata,
            is_device,
        })
    }

    /// Whether `other` is the same file.
    pub(super) fn is_same(&self, other: &File) -> io::Result<bool> {
        let other = other.metadata()?;
        let of = |metadata: &Metadata| (metadata.dev(), metadata.ino());
        Ok(of(&self.metadata) == of(&other))
    }

    /// Locks it against those whose use of it does not go with this one.
    ///
    /// # Errors
    /// One that is in use.
    pub(super) fn lock(&self, path: &Path, used: Use) -> Result<()> {
        let shown = path.display();
        let conflict = match locks::lock(&self.file, used) {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(conflict)) => conflict,
            Err(error) => {
                log::warn!(
                    "disk image {shown} cannot be locked: {error}; see to it that nobody else writes to it"
                );
                return Ok(());
            }
        };
        let writes = matches!(used, Use::WriteRaw | Use::WriteFormat);
        bail!(
            "disk image {shown} is in use by another process or another {FLAG}; {}",
            match conflict {
                Conflict::Written => "it writes to it",
                Conflict::Kept if writes =>
                    "only readers can share it: add readonly to all of them",
                Conflict::Kept => "it has the image for itself",
            }
        )
    }

    /// What the host says of an image's blocks; the guest sees blocks of `wanted` bytes, if that is
    /// said.
    pub(super) fn limits(&self, shape: &mut Shape, wanted: Option<u32>) -> io::Result<()> {
        let file = &self.file;
        if self.is_device {
            let logical = rustix::fs::ioctl_blksszget(file)?.max(shape.block_size);
            shape.block_size = wanted.unwrap_or(logical);
            shape.physical_block_size = rustix::fs::ioctl_blkpbszget(file)?.max(logical);
            let limit = |name| queue_limit(self.metadata.rdev(), name);
            shape.optimal_io_size = limit("optimal_io_size");
            shape.discard_granularity = limit("discard_granularity").max(logical);
        } else {
            // The guest's blocks stay as they are on whatever file system the image comes to lie;
            // only what is best to write is told.
            let block = self.metadata.blksize().next_power_of_two();
            shape.block_size = wanted.unwrap_or(shape.block_size);
            shape.physical_block_size = block.clamp(512, 4096) as u32;
            shape.discard_granularity = block.clamp(512, 65536) as u32;
        }
        shape.physical_block_size = shape.physical_block_size.max(shape.block_size);
        shape.discard_granularity = shape.discard_granularity.max(shape.block_size);
        Ok(())
    }

    /// What direct I/O on it asks for.
    pub(super) fn direct_alignment(&self) -> Result<Alignment> {
        let file = &self.file;
        // Since Linux 6.1 (statx(2): STATX_DIOALIGN).
        let flags = StatxFlags::DIOALIGN;
        if let Ok(found) = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, flags)
            && found.stx_mask & flags.bits() != 0
        {
            let (memory, offset) = (found.stx_dio_mem_align, found.stx_dio_offset_align);
            if offset == 0 {
                bail!("the file system has no direct I/O for it");
            }
            return Ok(Alignment {
                memory: memory.max(1).next_power_of_two() as usize,
                offset: offset.max(512).next_power_of_two() as usize,
            });
        }
        let block = match self.is_device {
            true => rustix::fs::ioctl_blksszget(file)? as usize,
            // No file system asks for more on the devices that there are.
            false => 4096,
        };
        Ok(Alignment {
            memory: block,
            offset: block,
        })
    }
}

/// Whether a file lies in memory, where no read has to wait.
pub(super) fn is_in_memory(file: &File) -> bool {
    // include/uapi/linux/magic.h: TMPFS_MAGIC, RAMFS_MAGIC.
    rustix::fs::fstatfs(file).is_ok_and(|found| [0x0102_1994, 0x8584_58f6].contains(&found.f_type))
}

/// A limit of a block device's queue (Documentation/ABI/stable/sysfs-block); 0 where there is none.
fn queue_limit(device: u64, name: &str) -> u32 {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    // A partition has its disk's queue.
    ["queue", "../queue"]
        .iter()
        .find_map(|queue| {
            let path = format!("/sys/dev/block/{major}:{minor}/{queue}/{name}");
            std::fs::read_to_string(path).ok()?.trim().parse().ok()
        })
        .unwrap_or(0)
}
