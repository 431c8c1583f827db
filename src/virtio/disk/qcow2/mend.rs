//! Mends a qcow2 image whose last user was killed, before it is written to again.
//!
//! The format counts the references to each cluster. imago writes an entry of the L1 table before
//! the count of the cluster that it leads to, and does not wait for the storage between counts and
//! other tables: after a kill or a power cut there may be clusters that are in use and not counted,
//! which would be handed out a second time. They are counted here. The other way round, clusters
//! that are counted and not in use, costs room only and is left alone.
//!
//! The format: QEMU's docs/interop/qcow2.txt. All numbers in it are big-endian.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Bytes of the header that are of interest here, as far as version 3 has it.
const HEADER: usize = 104;
/// Bytes of a header of version 2.
const HEADER_2: usize = 72;
/// The most bytes of an L1 table and of a reference count table (QEMU's block/qcow2.h:
/// QCOW_MAX_L1_SIZE, QCOW_MAX_REFTABLE_SIZE).
const MOST_L1: u64 = 32 << 20;
const MOST_REFCOUNT_TABLE: u64 = 8 << 20;
/// The most clusters that are looked after: 32 TiB of 64 KiB each, in 64 MiB of memory.
const MOST_CLUSTERS: u64 = 1 << 29;

/// The part of an L1 or L2 entry that is an offset in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The flag of an L2 entry whose cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Incompatible features that change what is read here: an external data file, and L2 entries of
/// twice the size.
const OTHER_LAYOUTS: u64 = 1 << 2 | 1 << 4;

/// What the header says.
pub struct Header {
    /// Log2 of the bytes of a cluster: 9 to 21.
    pub(super) cluster_bits: u32,
    l1_offset: u64,
    l1_bytes: u64,
    refcounts_offset: u64,
    refcounts_bytes: u64,
    /// Log2 of the bits of a reference count.
    refcount_order: u32,
}

impl Header {
    /// Reads it.
    ///
    /// # Errors
    /// A version, a feature or a size that is not supported.
    pub fn read(file: &File) -> Result<Header> {
        let mut bytes = [0; HEADER];
        let there = read_up_to(file, &mut bytes, 0)?;
        let (features, refcount_order) = match word(&bytes, 4) {
            2 if there >= HEADER_2 => (0, 4),
            3 if there == HEADER => (long(&bytes, 72), word(&bytes, 96)),
            version => bail!("version {version} of the format is not supported"),
        };
        if features & OTHER_LAYOUTS != 0 {
            bail!("it has its data in another file, or extended L2 entries: not supported");
        }
        let cluster_bits = word(&bytes, 20);
        if !(9..=21).contains(&cluster_bits) || refcount_order > 6 {
            bail!(
                "clusters of 2^{cluster_bits} bytes, counted with 2^{refcount_order} bits, are not supported"
            );
        }
        let header = Header {
            cluster_bits,
            l1_offset: long(&bytes, 40),
            l1_bytes: 8 * u64::from(word(&bytes, 36)),
            refcounts_offset: long(&bytes, 48),
            refcounts_bytes: u64::from(word(&bytes, 56)) << cluster_bits,
            refcount_order,
        };
        if header.l1_bytes > MOST_L1 || header.refcounts_bytes > MOST_REFCOUNT_TABLE {
            bail!("its tables are too large");
        }
        Ok(header)
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }
}

/// Clusters of the file that are in use.
struct InUse {
    cluster_bits: u32,
    bits: Vec<u64>,
}

impl InUse {
    /// Notes the clusters of a range; returns whether one of them was noted before.
    fn add(&mut self, offset: u64, bytes: u64) -> Result<bool> {
        if bytes == 0 {
            return Ok(false);
        }
        let first = offset >> self.cluster_bits;
        let last = offset.saturating_add(bytes - 1) >> self.cluster_bits;
        if last >= MOST_CLUSTERS {
            bail!("it points too far");
        }
        let words = (last / 64 + 1) as usize;
        if words > self.bits.len() {
            self.bits.resize(words, 0);
        }
        let mut twice = false;
        for cluster in first..=last {
            let (word, bit) = (&mut self.bits[(cluster / 64) as usize], 1 << (cluster % 64));
            twice |= *word & bit != 0;
            *word |= bit;
        }
        Ok(twice)
    }

    /// Notes a table or cluster that has one user.
    fn add_once(&mut self, offset: u64, bytes: u64) -> Result<()> {
        if !offset.is_multiple_of(1 << self.cluster_bits) {
            bail!("it points into the middle of a cluster");
        }
        match self.add(offset, bytes)? {
            true => bail!("it points to one cluster twice"),
            false => Ok(()),
        }
    }

    /// Those of a range, in order. An image that points far has few of many, so it is words that are
    /// looked through, not clusters.
    fn within(&self, clusters: Range<u64>) -> impl Iterator<Item = u64> + '_ {
        let words = clusters.start / 64..clusters.end.div_ceil(64);
        let all = words.flat_map(|word| {
            let mut left = self.bits.get(word as usize).copied().unwrap_or(0);
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros())?;
                left &= left - 1;
                Some(64 * word + u64::from(bit))
            })
        });
        all.filter(move |cluster| clusters.contains(cluster))
    }
}

/// Counts the clusters of the image that are in use and not counted; returns how many there were.
///
/// # Errors
/// An image that is damaged in other ways.
pub fn mend(file: &File, header: &Header) -> Result<u64> {
    let refcounts = table(file, header.refcounts_offset, header.refcounts_bytes)?;
    let mut in_use = InUse {
        cluster_bits: header.cluster_bits,
        bits: Vec::new(),
    };
    find(file, header, &refcounts, &mut in_use)?;
    let count = 64 * in_use.bits.len() as u64;
    let mut mended = 0;
    let per_block = (8 * header.cluster_size()) >> header.refcount_order;
    for (first, block) in (0..count).step_by(per_block as usize).zip(0..) {
        let entry = refcounts.get(block).copied().unwrap_or(0) & !0x1ff;
        let clusters = first..count.min(first + per_block);
        mended += mend_block(file, header, entry, clusters, &in_use)?;
    }
    if mended > 0 {
        file.sync_data().context("cannot write it")?;
    }
    Ok(mended)
}

/// Notes all clusters that are in use.
fn find(file: &File, header: &Header, refcounts: &[u64], in_use: &mut InUse) -> Result<()> {
    let cluster = header.cluster_size();
    in_use.add_once(0, cluster)?;
    in_use.add_once(header.refcounts_offset, header.refcounts_bytes)?;
    if header.l1_bytes > 0 {
        in_use.add_once(header.l1_offset, header.l1_bytes)?;
    }
    for block in refcounts.iter().filter(|entry| **entry & !0x1ff != 0) {
        in_use.add_once(block & !0x1ff, cluster)?;
    }
    for l2 in table(file, header.l1_offset, header.l1_bytes)? {
        let l2 = l2 & OFFSET;
        if l2 == 0 {
            continue;
        }
        in_use.add_once(l2, cluster)?;
        for entry in table(file, l2, cluster)? {
            if entry & COMPRESSED != 0 {
                // It lies where it does, several in one cluster.
                let size_at = 62 - (header.cluster_bits - 8);
                let offset = entry & ((1 << size_at) - 1);
                let sectors = (entry & (COMPRESSED - 1)) >> size_at;
                in_use.add(offset, 512 * (sectors + 1) - offset % 512)?;
            } else if entry & OFFSET != 0 {
                in_use.add_once(entry & OFFSET, cluster)?;
            }
        }
    }
    Ok(())
}

/// Counts the clusters in use of those whose counts are in the block at `offset`.
fn mend_block(
    file: &File,
    header: &Header,
    offset: u64,
    clusters: Range<u64>,
    in_use: &InUse,
) -> Result<u64> {
    let mut used = in_use.within(clusters.clone());
    if offset == 0 {
        return match used.next() {
            None => Ok(0),
            Some(_) => bail!("it lacks a table of reference counts"),
        };
    }
    let mut block = vec![0; header.cluster_size() as usize];
    if read_up_to(file, &mut block, offset)? == 0 {
        bail!("its reference counts lie behind its end");
    }
    let mut mended = 0;
    for cluster in used {
        let index = (cluster - clusters.start) as usize;
        // Counts of less than a byte begin at its lowest bit; others are big-endian.
        let is_counted = match header.refcount_order {
            order @ 0..3 => {
                let bits = 1_usize << order;
                let (byte, shift) = (index * bits / 8, index * bits % 8);
                let count = block[byte] >> shift & ((1 << bits) - 1) as u8;
                block[byte] |= u8::from(count == 0) << shift;
                count != 0
            }
            order => {
                let bytes = 1_usize << (order - 3);
                let count = &mut block[index * bytes..(index + 1) * bytes];
                let is_counted = count.iter().any(|byte| *byte != 0);
                if !is_counted {
                    count[bytes - 1] = 1;
                }
                is_counted
            }
        };
        mended += u64::from(!is_counted);
    }
    if mended > 0 {
        file.write_all_at(&block, offset)
            .context("cannot write reference counts")?;
    }
    Ok(mended)
}

/// A table of big-endian numbers; what lies behind the file's end is 0.
fn table(file: &File, offset: u64, bytes: u64) -> Result<Vec<u64>> {
    let mut data = vec![0; bytes as usize];
    read_up_to(file, &mut data, offset)?;
    Ok(data.chunks_exact(8).map(|entry| long(entry, 0)).collect())
}

/// Reads as much as there is; returns how many bytes that was.
fn read_up_to(file: &File, data: &mut [u8], offset: u64) -> Result<usize> {
    let mut done = 0;
    while done < data.len() {
        match file.read_at(&mut data[done..], offset.saturating_add(done as u64)) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("cannot read its tables"),
        }
    }
    Ok(done)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    (0..4).fold(0, |value, index| value << 8 | u32::from(bytes[at + index]))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) << 32 | u64::from(word(bytes, at + 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_in_use_are_found_however_far_apart() {
        let mut in_use = InUse {
            cluster_bits: 9,
            bits: Vec::new(),
        };
        let last = MOST_CLUSTERS - 1;
        for cluster in [0, 63, 64, 1000, last] {
            in_use.add(cluster << 9, 512).expect("near enough");
        }
        let found = |range| in_use.within(range).collect::<Vec<_>>();
        // Each cluster of these looked at by itself took a second and more.
        assert_eq!(found(0..MOST_CLUSTERS), [0, 63, 64, 1000, last]);
        assert_eq!(found(1..64), [63]);
        assert_eq!(found(64..1000), [64]);
        assert!(found(1001..last).is_empty());
        assert!(in_use.add(MOST_CLUSTERS << 9, 1).is_err());
    }
}
