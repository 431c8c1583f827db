//! Clusters of an image that are read without imago, which does not know of zstd and of extended L2
//! entries.

use super::header::{Compression, Header, long};
use super::storage::Layer;
use flate2::read::DeflateDecoder;
use imago::StorageExt as _;
use ruzstd::decoding::StreamingDecoder;
use std::io::{self, Read};

/// The part of an entry that is an offset in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The flag of an L2 entry whose cluster is compressed.
const COMPRESSED: u64 = 1 << 62;

/// A window that each decoder of zstd should take (RFC 8878, section 3.1.1.1.2), in bytes.
const LEAST_WINDOW: u64 = 8 << 20;

/// An entry of an L2 table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    descriptor: u64,
    /// Which subclusters have data (the lower half) and which are zero; 0 without extended entries.
    pub(super) bitmap: u64,
}

/// Where a cluster's data are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Nowhere in this image.
    None,
    /// At this offset.
    Plain(u64),
    /// At this offset, in at most so many bytes.
    Compressed(u64, usize),
}

impl Entry {
    /// The entry for the cluster that begins at `offset` of the disk, or around it.
    pub(super) fn find(layer: &Layer, header: &Header, offset: u64) -> io::Result<Entry> {
        let index = offset / header.span();
        if 8 * (index + 1) > header.l1_bytes {
            return Ok(Entry::default());
        }
        let mut bytes = [0; 16];
        layer.read(&mut bytes[..8], header.l1_offset + 8 * index)?;
        let table = long(&bytes, 0) & OFFSET;
        if table == 0 {
            return Ok(Entry::default());
        }
        let size = header.entry_size();
        let within = (offset % header.span()) >> header.cluster_bits;
        layer.read(&mut bytes[..size as usize], table + size * within)?;
        Ok(Entry {
            descriptor: long(&bytes, 0),
            bitmap: match size {
                16 => long(&bytes, 8),
                _ => 0,
            },
        })
    }

    pub(super) fn place(self, header: &Header) -> Place {
        let Entry { descriptor, .. } = self;
        if descriptor & COMPRESSED != 0 {
            let size_at = 62 - (header.cluster_bits - 8);
            let offset = descriptor & ((1 << size_at) - 1);
            let sectors = (descriptor & (COMPRESSED - 1)) >> size_at;
            return Place::Compressed(offset, (512 * (sectors + 1) - offset % 512) as usize);
        }
        match descriptor & OFFSET {
            0 => Place::None,
            offset => Place::Plain(offset),
        }
    }
}

/// Reads a compressed cluster of the disk, the one around `offset`, as a whole.
///
/// # Errors
/// One that is not compressed, or that is damaged.
pub(super) fn read_compressed(layer: &Layer, header: &Header, offset: u64) -> io::Result<Vec<u8>> {
    let Place::Compressed(at, len) = Entry::find(layer, header, offset)?.place(header) else {
        return Err(io::Error::other("a cluster is not compressed any more"));
    };
    let mut packed = vec![0; len];
    layer.read(&mut packed, at)?;
    let mut cluster = vec![0; header.cluster_size() as usize];
    match header.compression {
        Compression::Deflate => DeflateDecoder::new(&*packed).read_exact(&mut cluster)?,
        // What was compressed is a cluster, and a window larger than that is of no use.
        Compression::Zstd => {
            let window = header.cluster_size().max(LEAST_WINDOW);
            let decoder = StreamingDecoder::new_with_max_window_size(&*packed, window);
            decoder
                .map_err(io::Error::other)?
                .read_exact(&mut cluster)?;
        }
    }
    Ok(cluster)
}
