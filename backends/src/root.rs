//! What a guest without a command line of its own boots from: the file system of its first disk.

use armlet_system::files::{self, Accepted};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Magic numbers of file systems: offset in bytes, and what stands there. In Linux:
/// fs/ext4/ext4.h (EXT4_SUPER_MAGIC), fs/xfs/libxfs/xfs_format.h (XFS_SB_MAGIC), fs/btrfs/fs.h
/// (BTRFS_MAGIC), fs/squashfs/squashfs_fs.h, fs/erofs/erofs_fs.h, fs/f2fs.
pub(super) const FILE_SYSTEMS: [(u64, &[u8]); 6] = [
    (0x438, &[0x53, 0xef]),
    (0, b"XFSB"),
    (0x1_0040, b"_BHRfS_M"),
    (0, b"hsqs"),
    (0x400, &[0xe2, 0xe1, 0xf5, 0xe0]),
    (0x400, &[0x10, 0x20, 0xf5, 0xf2]),
];

/// The boot signature at the end of the first sector, where a partition table begins the disk (a
/// GPT has one for the sake of older tools: UEFI 2.10, section 5.2.3).
pub(super) const PARTITIONED: (u64, &[u8]) = (510, &[0x55, 0xaa]);

/// The first disk's root file system in words for the kernel's command line, if the raw image at
/// `path` shows one: a file system on the whole disk, or a first partition.
#[must_use]
pub fn words(path: &Path) -> Option<&'static str> {
    let file = files::open(path, Accepted::FileOrDisk, false).ok()?;
    let has = |(offset, magic): (u64, &[u8])| {
        let mut bytes = vec![0; magic.len()];
        file.read_exact_at(&mut bytes, offset).is_ok() && bytes == magic
    };
    if FILE_SYSTEMS.into_iter().any(has) {
        Some("root=/dev/vda rw")
    } else if has(PARTITIONED) {
        Some("root=/dev/vda1 rw")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_where_the_first_disk_has_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk");
        let with = |offset: usize, magic: &[u8]| {
            let mut disk = vec![0; 1 << 20];
            disk[offset..offset + magic.len()].copy_from_slice(magic);
            std::fs::write(&path, disk).expect("a file");
            words(&path)
        };
        assert_eq!(with(0x438, &[0x53, 0xef]), Some("root=/dev/vda rw"));
        assert_eq!(with(510, &[0x55, 0xaa]), Some("root=/dev/vda1 rw"));
        assert_eq!(with(0, b"nothing"), None);
        std::fs::write(&path, b"short").expect("a file");
        assert_eq!(words(&path), None);
        assert_eq!(words(Path::new("/nonexistent")), None);
    }
}
