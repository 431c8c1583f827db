//! What a partition table says of the sectors of the disk that it was made for.

use crate::root;

/// Sizes of sectors that disks have, in bytes.
const SIZES: [u32; 4] = [512, 1024, 2048, 4096];
/// What a GPT's header begins with, in the second sector (UEFI 2.10, section 5.3.2).
const GPT: &[u8] = b"EFI PART";
/// The partitions of an MBR, and the bytes of each: type, first sector (UEFI 2.10, section 5.2.1).
const PARTITIONS: u64 = 446;
const PARTITION: usize = 16;
const TYPE: usize = 4;
const START: usize = 8;
/// Types of partitions that hold no file system: none, those that hold others, GPT's.
const NO_FILE_SYSTEM: [u8; 5] = [0, 0x05, 0x0f, 0x85, 0xee];

/// The sectors that the partition table of a disk is for, in bytes, if it shows and they are not of
/// `sector` bytes. `read` fills a buffer with what the disk holds at an offset, and says whether it
/// could.
///
/// A GPT has its header in the second sector. An MBR does not say: the size is the one with which
/// its partitions begin with file systems.
pub(super) fn other_sector(sector: u32, read: impl Fn(u64, &mut [u8]) -> bool) -> Option<u32> {
    let has = |(offset, magic): (u64, &[u8])| {
        let mut bytes = vec![0; magic.len()];
        read(offset, &mut bytes) && bytes == magic
    };
    if !has(root::PARTITIONED) {
        return None;
    }
    let has_gpt = |size: &u32| has((u64::from(*size), GPT));
    let mut starts = Vec::new();
    if !SIZES.iter().any(has_gpt) {
        let mut table = [0; 4 * PARTITION];
        if !read(PARTITIONS, &mut table) {
            return None;
        }
        let used = table.chunks(PARTITION);
        let used = used.filter(|entry| !NO_FILE_SYSTEM.contains(&entry[TYPE]));
        let start = |entry: &[u8]| {
            let bytes = entry[START..].iter().take(4).rev();
            bytes.fold(0, |start, byte| start << 8 | u64::from(*byte))
        };
        starts.extend(used.map(start).filter(|start| *start > 0));
    }
    let has_file_system = |size: &u32| {
        starts.iter().any(|start| {
            let start = start * u64::from(*size);
            root::FILE_SYSTEMS
                .into_iter()
                .any(|(offset, magic)| has((start + offset, magic)))
        })
    };
    let fits = |size: &u32| has_gpt(size) || has_file_system(size);
    match fits(&sector) {
        true => None,
        false => SIZES.into_iter().find(fits),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(sector: u32, disk: &[u8]) -> Option<u32> {
        other_sector(sector, |offset, bytes| {
            let from = disk.get(offset as usize..offset as usize + bytes.len());
            from.is_some_and(|from| {
                bytes.copy_from_slice(from);
                true
            })
        })
    }

    fn partitioned() -> Vec<u8> {
        let mut disk = vec![0; 1 << 20];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        disk
    }

    #[test]
    fn a_gpt_tells_by_its_place() {
        let mut disk = partitioned();
        assert_eq!(found(512, &disk), None);
        disk[450] = 0xee;
        disk[4096..4104].copy_from_slice(GPT);
        assert_eq!((found(512, &disk), found(4096, &disk)), (Some(4096), None));
        disk[512..520].copy_from_slice(GPT);
        assert_eq!((found(512, &disk), found(4096, &disk)), (None, None));
        disk[4096] = 0;
        assert_eq!((found(512, &disk), found(4096, &disk)), (None, Some(512)));
        disk[510] = 0;
        assert_eq!(found(4096, &disk), None);
        assert_eq!(found(4096, &[]), None);
    }

    #[test]
    fn an_mbr_tells_by_its_file_systems() {
        let mut disk = partitioned();
        // The second partition, of Linux, from sector 40.
        disk[446 + 16 + 4] = 0x83;
        disk[446 + 16 + 8] = 40;
        assert_eq!((found(512, &disk), found(4096, &disk)), (None, None));
        let magic = [0x53, 0xef];
        disk[40 * 512 + 0x438..][..2].copy_from_slice(&magic);
        assert_eq!((found(512, &disk), found(4096, &disk)), (None, Some(512)));
        disk[40 * 512 + 0x438] = 0;
        disk[40 * 4096 + 0x438..][..2].copy_from_slice(&magic);
        assert_eq!((found(512, &disk), found(4096, &disk)), (Some(4096), None));
        // Behind the end of the disk.
        disk[446 + 16 + 11] = 0xff;
        assert_eq!(found(4096, &disk), None);
    }
}
