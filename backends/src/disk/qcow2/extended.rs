//! Images with extended L2 entries, which imago does not know: each cluster has 32 subclusters, which
//! are in the image or not, or zero. They are read here, as what a raw image lies in.

use super::clusters::{Entry, Place, read_compressed};
use super::header::Header;
use super::order::Below;
use super::storage::Layer;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::{FormatAccess, StorageExt as _};
use std::io;

/// Subclusters of a cluster.
const SUBCLUSTERS: u64 = 32;

/// The disk that such an image stands for.
#[derive(Debug)]
pub(super) struct Extended {
    pub(super) layer: Layer,
    pub(super) header: Header,
    pub(super) backing: Option<FormatAccess<Layer>>,
}

/// What some bytes of a disk are.
enum Run {
    /// Those of the image's file at this offset.
    Data(u64),
    Zero,
    /// Those that stand behind it.
    Behind,
    Compressed,
}

impl Extended {
    /// What the bytes at `offset` are, and how many are of that kind, up to the cluster's end.
    fn run(&self, offset: u64) -> io::Result<(Run, u64)> {
        let cluster = self.header.cluster_size();
        let entry = Entry::find(&self.layer, &self.header, offset)?;
        let within = offset % cluster;
        let place = entry.place(&self.header);
        if let Place::Compressed(..) = place {
            return Ok((Run::Compressed, cluster - within));
        }
        let subcluster = cluster / SUBCLUSTERS;
        let first = within / subcluster;
        let status = |index: u64| {
            let bit = |at: u64| entry.bitmap >> at & 1 != 0;
            (bit(index), bit(SUBCLUSTERS + index))
        };
        let same = |index: &u64| status(*index) == status(first);
        let count = (first..SUBCLUSTERS).take_while(same).count() as u64;
        let run = match (status(first), place) {
            ((true, false), Place::Plain(at)) => Run::Data(at + within),
            ((false, true), _) => Run::Zero,
            ((false, false), _) => Run::Behind,
            _ => {
                return Err(io::Error::other(
                    "the image has data of a subcluster nowhere, or twice",
                ));
            }
        };
        Ok((run, (first + count) * subcluster - within))
    }
}

impl Below for Extended {
    fn size(&self) -> io::Result<u64> {
        Ok(self.header.size)
    }

    fn readv(&self, mut vector: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        while !vector.is_empty() {
            let left = self.header.size.saturating_sub(offset);
            if left == 0 {
                vector.fill(0);
                break;
            }
            let (run, count) = self.run(offset)?;
            let count = count.min(left).min(vector.len());
            let (mut part, rest) = vector.split_at(count);
            match (run, &self.backing) {
                (Run::Data(at), _) => self.layer.readv(part, at)?,
                (Run::Behind, Some(backing)) => backing.readv(part, offset)?,
                (Run::Zero | Run::Behind, _) => part.fill(0),
                (Run::Compressed, _) => {
                    let cluster = read_compressed(&self.layer, &self.header, offset)?;
                    let from = (offset % self.header.cluster_size()) as usize;
                    part.copy_from_slice(&cluster[from..from + count as usize]);
                }
            }
            vector = rest;
            offset += count;
        }
        Ok(())
    }

    fn writev(&self, _vector: IoVector<'_>, _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _allocate: bool) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
