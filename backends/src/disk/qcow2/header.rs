//! The header of a qcow2 image: what the image is, and whether armlet can work with it.
//!
//! It is read before anything else looks at the image, and nothing is written. What the header
//! tells is checked against the file: tables lie in it, so that memory is bounded by the file and
//! not by what a header claims.
//!
//! The format: QEMU's docs/interop/qcow2.txt. All numbers in it are big-endian.

use anyhow::{Context, Result, bail};
use armlet_system::eintr::uninterrupted;
use armlet_system::messages::shell_word;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of the header of version 2, and of the part that every version 3 has.
const HEADER_2: usize = 72;
const HEADER_3: usize = 104;
/// Where the disk's size, the incompatible and the autoclear features are.
pub(super) const SIZE: usize = 24;
pub(super) const FEATURES: usize = 72;
pub(super) const AUTOCLEAR: usize = 88;
/// Where the compression type is, in headers that are longer.
const COMPRESSION_TYPE: usize = 104;
/// The most bytes of an L1 table and of a reference count table, and the most snapshots (QEMU's
/// block/qcow2.h: QCOW_MAX_L1_SIZE, QCOW_MAX_REFTABLE_SIZE, QCOW_MAX_SNAPSHOTS).
const MOST_L1: u64 = 32 << 20;
const MOST_REFCOUNT_TABLE: u64 = 8 << 20;
const MOST_SNAPSHOTS: u32 = 65536;
/// Log2 of the bytes of a cluster, least and most (QEMU's MIN_CLUSTER_BITS, MAX_CLUSTER_BITS); the
/// least for extended L2 entries.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
const LEAST_EXTENDED: u32 = 14;

/// Incompatible features: the reference counts may be wrong; anything may be wrong; the data are in
/// another file; clusters are not compressed by deflate; L2 entries have twice the size, with a
/// bitmap of subclusters.
pub(super) const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
/// Those that the format has.
const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;

/// The header extension that leads to bitmaps.
const BITMAPS: u32 = 0x2385_2875;

/// How clusters are encrypted.
const CRYPT_NONE: u32 = 0;
const CRYPT_AES: u32 = 1;
const CRYPT_LUKS: u32 = 2;

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Deflate,
    Zstd,
}

/// What the header says.
#[derive(Clone, Debug)]
pub struct Header {
    /// Log2 of the bytes of a cluster.
    pub(super) cluster_bits: u32,
    pub(super) l1_offset: u64,
    pub(super) l1_bytes: u64,
    pub(super) refcounts_offset: u64,
    pub(super) refcounts_bytes: u64,
    /// Log2 of the bits of a reference count.
    pub(super) refcount_order: u32,
    /// Whether it has version 3.
    pub(super) is_new: bool,
    /// Incompatible features.
    pub(super) features: u64,
    pub(super) autoclear: u64,
    pub(super) compression: Compression,
    pub(super) snapshots: u32,
    /// Bytes of the disk, and of the file.
    pub(super) size: u64,
    pub(super) len: u64,
    /// Whether it has bitmaps, good or not.
    pub(super) has_bitmaps: bool,
    crypt_method: u32,
}

impl Header {
    /// Reads it, and checks what it says against the file.
    ///
    /// # Errors
    /// A version, a feature or a size that is not supported, or tables that are not in the file.
    pub fn read(mut file: &File) -> Result<Header> {
        let mut bytes = [0; HEADER_3 + 8];
        let there = read_up_to(file, &mut bytes, 0)?;
        let len = file
            .seek(SeekFrom::End(0))
            .context("cannot look how long it is")?;
        let is_new = match word(&bytes, 4) {
            2 if there >= HEADER_2 => false,
            3 if there >= HEADER_3 => true,
            2 | 3 => bail!("it ends in its header, after {there} bytes"),
            version => bail!("it has version {version} of the format; armlet knows 2 and 3"),
        };
        let cluster_bits = word(&bytes, 20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            bail!("it has clusters of 2^{cluster_bits} bytes; there are those of 2^9 to 2^21");
        }
        let mut header = Header {
            cluster_bits,
            l1_offset: long(&bytes, 40),
            l1_bytes: 8 * u64::from(word(&bytes, 36)),
            refcounts_offset: long(&bytes, 48),
            refcounts_bytes: u64::from(word(&bytes, 56)) << cluster_bits,
            refcount_order: 4,
            is_new,
            features: 0,
            autoclear: 0,
            compression: Compression::Deflate,
            snapshots: word(&bytes, 60),
            size: long(&bytes, SIZE),
            len,
            has_bitmaps: false,
            crypt_method: word(&bytes, 32),
        };
        if is_new {
            header.features = long(&bytes, FEATURES);
            header.autoclear = long(&bytes, AUTOCLEAR);
            header.refcount_order = word(&bytes, 96);
            header.read_lengths(&bytes)?;
            header.has_bitmaps = header.has_extension(file, u64::from(word(&bytes, 100)))?;
        }
        header.check_tables(long(&bytes, 64))?;
        Ok(header)
    }

    /// Reads what version 3 has of variable length.
    fn read_lengths(&mut self, bytes: &[u8]) -> Result<()> {
        let header_len = word(bytes, 100);
        if u64::from(header_len) > self.cluster_size() || (header_len as usize) < HEADER_3 {
            bail!("its header has {header_len} bytes");
        }
        let kind = match header_len as usize > COMPRESSION_TYPE {
            true => bytes[COMPRESSION_TYPE],
            false => 0,
        };
        self.compression = match (self.features & COMPRESSION != 0, kind) {
            (false, 0) => Compression::Deflate,
            (true, 1) => Compression::Zstd,
            _ => bail!("its clusters are compressed in way {kind}, which armlet does not know"),
        };
        Ok(())
    }

    /// Whether bitmaps are among the extensions that begin at this byte of the file.
    fn has_extension(&self, file: &File, mut at: u64) -> Result<bool> {
        loop {
            let mut bytes = [0; 8];
            let there = read_up_to(file, &mut bytes, at)?;
            let (kind, len) = (word(&bytes, 0), u64::from(word(&bytes, 4)));
            at += 8 + len.next_multiple_of(8);
            match kind {
                0 => return Ok(false),
                BITMAPS => return Ok(true),
                _ if there < bytes.len() || at > self.cluster_size() => return Ok(false),
                _ => {}
            }
        }
    }

    /// Checks that the tables that the header leads to are in the file and cover the disk.
    fn check_tables(&self, snapshots_offset: u64) -> Result<()> {
        if self.refcount_order > 6 {
            bail!(
                "it counts with 2^{} bits; 2^6 is the most",
                self.refcount_order
            );
        }
        if self.has_extended_l2() && self.cluster_bits < LEAST_EXTENDED {
            bail!("it has extended L2 entries and clusters of less than 16 KiB");
        }
        if self.l1_bytes > MOST_L1 || self.refcounts_bytes > MOST_REFCOUNT_TABLE {
            bail!(
                "its tables are too large: {} bytes of L1 and {} of reference counts",
                self.l1_bytes,
                self.refcounts_bytes
            );
        }
        let covered = u128::from(self.l1_bytes / 8) * u128::from(self.span());
        if u128::from(self.size) > covered {
            let size = self.size;
            bail!("its disk has {size} bytes, and its L1 table covers {covered}");
        }
        self.check_table("L1 table", self.l1_offset, self.l1_bytes)?;
        self.check_table(
            "table of reference counts",
            self.refcounts_offset,
            self.refcounts_bytes,
        )?;
        if self.snapshots > MOST_SNAPSHOTS {
            bail!("it has {} snapshots", self.snapshots);
        }
        // Each has 40 bytes and more.
        self.check_table(
            "table of snapshots",
            snapshots_offset,
            40 * u64::from(self.snapshots),
        )
    }

    fn check_table(&self, name: &str, offset: u64, bytes: u64) -> Result<()> {
        if bytes > 0 && !offset.is_multiple_of(self.cluster_size()) {
            bail!("its {name} begins in the middle of a cluster, at byte {offset}");
        }
        match self.is_inside(offset, bytes) {
            true => Ok(()),
            false => bail!(
                "its {name} has {bytes} bytes at byte {offset} of a file that has {}",
                self.len
            ),
        }
    }

    /// Whether this range lies in the file. The last cluster may be cut: what lacks of it is zero.
    pub(super) fn is_inside(&self, offset: u64, bytes: u64) -> bool {
        let end = offset.checked_add(bytes);
        let whole = self.len.checked_next_multiple_of(self.cluster_size());
        bytes == 0 || end.is_some_and(|end| end <= whole.unwrap_or(u64::MAX))
    }

    /// Refuses an image that armlet cannot work with, and says what can be done. `path` is the
    /// image's name.
    ///
    /// # Errors
    /// As above.
    pub(super) fn check_features(&self, path: &Path, readonly: bool) -> Result<()> {
        let word = shell_word(path);
        match self.crypt_method {
            CRYPT_NONE => {}
            method @ (CRYPT_AES | CRYPT_LUKS) => bail!(
                "it is encrypted ({}), which armlet does not do; decrypt it: qemu-img convert --object secret,id=s,file=PASSPHRASE_FILE --image-opts driver=qcow2,encrypt.key-secret=s,file.filename={} -O qcow2 NEW",
                match method {
                    CRYPT_AES => "AES",
                    _ => "LUKS",
                },
                as_option(path)
            ),
            method => bail!("it is encrypted in way {method}, which armlet does not know"),
        }
        let unknown = self.features & !KNOWN;
        if unknown != 0 {
            bail!(
                "it needs feature {} of the format, which armlet does not know; 'qemu-img convert -O qcow2 {word} NEW' by the QEMU that made it makes one without",
                unknown.trailing_zeros()
            );
        }
        if self.features & DATA_FILE != 0 {
            bail!(
                "it has its data in another file, which armlet does not do; 'qemu-img convert -O qcow2 {word} NEW' makes one file of it"
            );
        }
        if self.has_extended_l2() && !readonly {
            bail!(
                "it has extended L2 entries, and armlet can only read such images: add readonly, or 'qemu-img convert -O qcow2 {word} NEW' makes an image without"
            );
        }
        if self.is_dirty() && !readonly && (self.snapshots > 0 || self.has_bitmaps) {
            bail!(
                "it was not closed in order, and has snapshots or bitmaps, with which armlet cannot repair it: qemu-img check -r all {word}"
            );
        }
        if self.features & CORRUPT != 0 && !readonly {
            bail!(
                "it is marked as corrupt and can only be read: add readonly, or repair it: qemu-img check -r all {word}"
            );
        }
        Ok(())
    }

    /// Bytes of a cluster.
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of the disk that one L2 table maps.
    pub(super) fn span(&self) -> u64 {
        (self.cluster_size() / self.entry_size()) << self.cluster_bits
    }

    /// Bytes of an L2 entry.
    pub(super) fn entry_size(&self) -> u64 {
        match self.has_extended_l2() {
            true => 16,
            false => 8,
        }
    }

    /// Whether its reference counts may be wrong.
    pub(super) fn is_dirty(&self) -> bool {
        self.features & DIRTY != 0
    }

    pub(super) fn has_extended_l2(&self) -> bool {
        self.features & EXTENDED_L2 != 0
    }
}

/// A path as the last value among options of QEMU, which end at commas, and there as a word of a
/// shell.
fn as_option(path: &Path) -> String {
    let bytes = path.as_os_str().as_bytes();
    let doubled: Vec<u8> = bytes
        .iter()
        .flat_map(|byte| std::iter::repeat_n(*byte, 1 + usize::from(*byte == b',')))
        .collect();
    shell_word(OsStr::from_bytes(&doubled))
}

/// Reads as much as there is; returns how many bytes that was.
pub(super) fn read_up_to(file: &File, data: &mut [u8], offset: u64) -> Result<usize> {
    let mut done = 0;
    while done < data.len() {
        let at = offset.saturating_add(done as u64);
        let read = uninterrupted(|| file.read_at(&mut data[done..], at));
        match read.context("cannot read its tables")? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

/// The 4 bytes at this place.
pub(super) fn word(bytes: &[u8], at: usize) -> u32 {
    (0..4).fold(0, |value, index| value << 8 | u32::from(bytes[at + index]))
}

/// The 8 bytes at this place.
pub(super) fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) << 32 | u64::from(word(bytes, at + 4))
}
