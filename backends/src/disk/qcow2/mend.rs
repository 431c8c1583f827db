//! Mends a qcow2 image whose last user was killed, before it is written to again.
//!
//! The format counts the references to each cluster. Programs that do not keep an order of writes
//! (imago by itself is one) leave clusters that are in use and not counted after a kill or a power
//! cut, which would be handed out a second time. They are counted here. The other way round,
//! clusters that are counted and not in use, costs room only and is left alone. An image that is
//! marked as dirty, because QEMU left the counts for later and did not come to write them (lazy
//! refcounts), is counted anew, as QEMU does.
//!
//! The format: QEMU's docs/interop/qcow2.txt. All numbers in it are big-endian.

use super::header::{DIRTY, FEATURES, Header, long, read_up_to};
use anyhow::{Context, Result, bail};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};

/// The most clusters that are looked after: 32 TiB of 64 KiB each, in 64 MiB of memory.
const MOST_CLUSTERS: u64 = 1 << 29;
/// The most that are counted anew, in 256 MiB of memory.
const MOST_RECOUNTED: u64 = 1 << 27;
/// Bytes of tables that are read without a look whether the file has them at all.
const FEW: u64 = 16 << 20;
/// Holes of the file that are shorter than this many bytes are not told from data.
const SHORT_HOLE: u64 = 64 << 10;

const TOO_OFTEN: &str = "it points to one cluster too often";

/// The part of an L1 or L2 entry that is an offset in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The flag of an L2 entry whose cluster is compressed.
const COMPRESSED: u64 = 1 << 62;

/// Clusters of the file that are in use.
struct InUse {
    cluster_bits: u32,
    /// Clusters of the file.
    count: u64,
    bits: Vec<u64>,
    /// Those with compressed data, of which several may lie in one, and how often.
    packed: HashMap<u64, u16>,
    /// How often each is in use, where that is asked for.
    counts: Option<Vec<u16>>,
}

impl InUse {
    /// Notes the clusters of a range; returns whether one of them was noted before.
    fn add(&mut self, offset: u64, bytes: u64) -> Result<bool> {
        if bytes == 0 {
            return Ok(false);
        }
        let first = offset >> self.cluster_bits;
        let last = offset.saturating_add(bytes - 1) >> self.cluster_bits;
        if last >= self.count {
            bail!("it points behind its end, to byte {offset}");
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
            if let Some(counts) = &mut self.counts {
                let index = cluster as usize;
                if counts.len() <= index {
                    counts.resize(index + 1, 0);
                }
                let count = counts[index].checked_add(1);
                counts[index] = count.context(TOO_OFTEN)?;
            }
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

    /// Notes the clusters of compressed data.
    fn add_packed(&mut self, offset: u64, bytes: u64) -> Result<()> {
        let first = offset >> self.cluster_bits;
        let last = offset.saturating_add(bytes - 1) >> self.cluster_bits;
        if last >= self.count {
            bail!("it points behind its end, to byte {offset}");
        }
        for cluster in first..=last {
            let is_new = !self.add(cluster << self.cluster_bits, 1)?;
            let count = self.packed.entry(cluster).or_default();
            if *count == 0 && !is_new {
                bail!("it points to one cluster twice");
            }
            *count = count.checked_add(1).context(TOO_OFTEN)?;
        }
        Ok(())
    }

    /// How often a cluster that is in use should be counted.
    fn times(&self, cluster: u64) -> u64 {
        u64::from(self.packed.get(&cluster).copied().unwrap_or(1))
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

/// Where a file has data; elsewhere it reads as zeros.
struct Extents(Vec<Range<u64>>);

impl Extents {
    /// Those of a file, where it is worth to look: where there are more bytes of tables to read than
    /// the file has. Who makes a file can have it tell any length, for nothing.
    fn find(file: &File, tables: u64) -> Result<Extents> {
        let allocated = file.metadata().context("cannot look at it")?.blocks() * 512;
        let mut extents = Vec::<Range<u64>>::new();
        if tables <= allocated.saturating_add(FEW) {
            extents.push(0..u64::MAX);
            return Ok(Extents(extents));
        }
        let mut at = 0;
        loop {
            let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(Errno::NXIO) => return Ok(Extents(extents)),
                // A block device, which has no holes.
                Err(Errno::INVAL) => 0,
                Err(error) => return Err(error).context("cannot look where it has data"),
            };
            at = match rustix::fs::seek(file, SeekFrom::Hole(data)) {
                Err(Errno::INVAL) => u64::MAX,
                hole => hole.context("cannot look where it has data")?,
            };
            match extents.last_mut() {
                Some(last) if data - last.end < SHORT_HOLE => last.end = at,
                _ => extents.push(data..at),
            }
            if at == u64::MAX {
                return Ok(Extents(extents));
            }
        }
    }

    /// Whether there may be something else than zeros in this range.
    fn meet(&self, offset: u64, bytes: u64) -> bool {
        let next = self.0.partition_point(|extent| extent.end <= offset);
        let next = self.0.get(next);
        next.is_some_and(|extent| extent.start < offset.saturating_add(bytes))
    }
}

/// What is to be mended.
#[derive(Debug, Default)]
pub struct Repair {
    /// Clusters that are in use and not counted, or less often, in order, and their counts.
    uncounted: Vec<(u64, u64)>,
    /// What all counts should be, and how many are not, of an image that is marked as dirty.
    recount: Option<(Vec<u16>, usize)>,
}

impl Repair {
    /// How many clusters are not counted as often as they are in use.
    #[must_use]
    pub fn count(&self) -> usize {
        match &self.recount {
            Some((_, changed)) => *changed,
            None => self.uncounted.len(),
        }
    }

    /// Writes it to the file.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn apply(&self, file: &File, header: &Header) -> Result<()> {
        let cannot = "cannot write reference counts";
        if let Some((counts, _)) = &self.recount {
            let refcounts = table(file, header.refcounts_offset, header.refcounts_bytes)?;
            let extents = Extents::find(file, u64::MAX)?;
            recount(
                file,
                header,
                &refcounts,
                counts,
                &extents,
                |offset, block, _| file.write_all_at(block, offset).context(cannot),
            )?;
            file.sync_data().context(cannot)?;
            let features = header.features & !DIRTY;
            file.write_all_at(&features.to_be_bytes(), FEATURES as u64)
                .context("cannot write its header")?;
            return file.sync_data().context("cannot write its header");
        }
        if self.uncounted.is_empty() {
            return Ok(());
        }
        let refcounts = table(file, header.refcounts_offset, header.refcounts_bytes)?;
        let per_block = per_block(header);
        let mut block = vec![0; header.cluster_size() as usize];
        for clusters in self
            .uncounted
            .chunk_by(|(one, _), (other, _)| one / per_block == other / per_block)
        {
            let number = clusters[0].0 / per_block;
            let offset = refcounts.get(number as usize).copied().unwrap_or(0) & !0x1ff;
            block.fill(0);
            read_up_to(file, &mut block, offset)?;
            for (cluster, count) in clusters {
                let index = (cluster % per_block) as usize;
                set_count(&mut block, header.refcount_order, index, *count);
            }
            file.write_all_at(&block, offset).context(cannot)?;
        }
        file.sync_data().context(cannot)
    }
}

/// Looks for clusters of the image that are in use and not counted; of one that is marked as dirty,
/// for all that are not counted as often as they are in use. Nothing is written.
///
/// # Errors
/// An image that is damaged in other ways.
pub fn survey(file: &File, header: &Header) -> Result<Repair> {
    let count = header.len.div_ceil(header.cluster_size());
    if count > MOST_CLUSTERS {
        bail!("it has {count} clusters; armlet looks after {MOST_CLUSTERS}");
    }
    if header.is_dirty() && count > MOST_RECOUNTED {
        bail!("it was not closed in order; armlet counts {MOST_RECOUNTED} of its {count} clusters");
    }
    let refcounts = table(file, header.refcounts_offset, header.refcounts_bytes)?;
    let l1 = table(file, header.l1_offset, header.l1_bytes)?;
    let entries = refcounts.iter().chain(&l1);
    let tables = entries.filter(|entry| **entry & OFFSET != 0).count() as u64;
    let extents = Extents::find(file, tables.saturating_mul(header.cluster_size()))?;
    let mut in_use = InUse {
        cluster_bits: header.cluster_bits,
        count,
        bits: Vec::new(),
        packed: HashMap::new(),
        counts: header.is_dirty().then(Vec::new),
    };
    find(file, header, &refcounts, &l1, &extents, &mut in_use)?;
    if let Some(counts) = in_use.counts {
        let mut changed = 0;
        recount(
            file,
            header,
            &refcounts,
            &counts,
            &extents,
            |_, _, count| {
                changed += count;
                Ok(())
            },
        )?;
        return Ok(Repair {
            uncounted: Vec::new(),
            recount: Some((counts, changed)),
        });
    }
    let most = most(header);
    if in_use.packed.values().any(|count| u64::from(*count) > most) {
        bail!(TOO_OFTEN);
    }
    let count = 64 * in_use.bits.len() as u64;
    let per_block = per_block(header);
    let mut uncounted = Vec::new();
    for (first, block) in (0..count).step_by(per_block as usize).zip(0..) {
        let entry = refcounts.get(block).copied().unwrap_or(0) & !0x1ff;
        let clusters = first..count.min(first + per_block);
        let used = in_use.within(clusters);
        let mut used = used
            .map(|cluster| (cluster, in_use.times(cluster)))
            .peekable();
        if used.peek().is_none() {
            continue;
        }
        if entry == 0 {
            bail!("it lacks a table of reference counts");
        }
        if !extents.meet(entry, header.cluster_size()) {
            uncounted.extend(used);
            continue;
        }
        let mut block = vec![0; header.cluster_size() as usize];
        read_up_to(file, &mut block, entry)?;
        uncounted.extend(used.filter(|(cluster, times)| {
            let index = (cluster - first) as usize;
            get_count(&block, header.refcount_order, index) < *times
        }));
    }
    Ok(Repair {
        uncounted,
        recount: None,
    })
}

/// Calls `each` for each block of counts that is not as it should be: with where it is, what should
/// be in it, and how many counts differ.
fn recount(
    file: &File,
    header: &Header,
    refcounts: &[u64],
    counts: &[u16],
    extents: &Extents,
    mut each: impl FnMut(u64, &[u8], usize) -> Result<()>,
) -> Result<()> {
    let (order, per_block) = (header.refcount_order, per_block(header) as usize);
    let most = most(header);
    if counts.iter().any(|count| u64::from(*count) > most) {
        bail!(TOO_OFTEN);
    }
    let mut block = vec![0; header.cluster_size() as usize];
    let blocks = refcounts.len().max(counts.len().div_ceil(per_block));
    for number in 0..blocks {
        let first = counts.len().min(number * per_block);
        let last = counts.len().min(first + per_block);
        let counts = &counts[first..last];
        let offset = refcounts.get(number).copied().unwrap_or(0) & !0x1ff;
        if offset == 0 {
            if counts.iter().any(|count| *count > 0) {
                bail!("it lacks a table of reference counts");
            }
            continue;
        }
        block.fill(0);
        match extents.meet(offset, header.cluster_size()) {
            true => _ = read_up_to(file, &mut block, offset)?,
            false if counts.iter().all(|count| *count == 0) => continue,
            false => {}
        }
        let mut changed = 0;
        for index in 0..per_block {
            let count = u64::from(counts.get(index).copied().unwrap_or(0));
            if get_count(&block, order, index) != count {
                set_count(&mut block, order, index, count);
                changed += 1;
            }
        }
        if changed > 0 {
            each(offset, &block, changed)?;
        }
    }
    Ok(())
}

/// The highest count that there is room for.
fn most(header: &Header) -> u64 {
    match header.refcount_order {
        order @ 0..6 => (1 << (1 << order)) - 1,
        _ => u64::MAX,
    }
}

/// Clusters whose counts are in one block.
fn per_block(header: &Header) -> u64 {
    (8 * header.cluster_size()) >> header.refcount_order
}

/// Notes all clusters that are in use.
fn find(
    file: &File,
    header: &Header,
    refcounts: &[u64],
    l1: &[u64],
    extents: &Extents,
    in_use: &mut InUse,
) -> Result<()> {
    let cluster = header.cluster_size();
    in_use.add_once(0, cluster)?;
    in_use.add_once(header.refcounts_offset, header.refcounts_bytes)?;
    if header.l1_bytes > 0 {
        in_use.add_once(header.l1_offset, header.l1_bytes)?;
    }
    for block in refcounts.iter().filter(|entry| **entry & !0x1ff != 0) {
        in_use.add_once(block & !0x1ff, cluster)?;
    }
    for l2 in l1 {
        let l2 = l2 & OFFSET;
        if l2 == 0 {
            continue;
        }
        in_use.add_once(l2, cluster)?;
        if !extents.meet(l2, cluster) {
            continue;
        }
        for entry in table(file, l2, cluster)? {
            if entry & COMPRESSED != 0 {
                // It lies where it does, several in one cluster.
                let size_at = 62 - (header.cluster_bits - 8);
                let offset = entry & ((1 << size_at) - 1);
                let sectors = (entry & (COMPRESSED - 1)) >> size_at;
                in_use.add_packed(offset, 512 * (sectors + 1) - offset % 512)?;
            } else if entry & OFFSET != 0 {
                in_use.add_once(entry & OFFSET, cluster)?;
            }
        }
    }
    Ok(())
}

/// A count in a block. Those of less than a byte begin at its lowest bit; others are big-endian.
fn get_count(block: &[u8], refcount_order: u32, index: usize) -> u64 {
    match refcount_order {
        order @ 0..3 => {
            let bits = 1_usize << order;
            let (byte, shift) = (index * bits / 8, index * bits % 8);
            u64::from(block[byte] >> shift & ((1 << bits) - 1) as u8)
        }
        order => {
            let bytes = 1_usize << (order - 3);
            let count = &block[index * bytes..(index + 1) * bytes];
            count
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte))
        }
    }
}

/// Changes a count in a block.
fn set_count(block: &mut [u8], refcount_order: u32, index: usize, count: u64) {
    match refcount_order {
        order @ 0..3 => {
            let bits = 1_usize << order;
            let (byte, shift) = (index * bits / 8, index * bits % 8);
            let mask = (((1 << bits) - 1) as u8) << shift;
            block[byte] = block[byte] & !mask | (count as u8) << shift;
        }
        order => {
            let bytes = 1_usize << (order - 3);
            let number = count.to_be_bytes();
            block[index * bytes..(index + 1) * bytes].copy_from_slice(&number[8 - bytes..]);
        }
    }
}

/// A table of big-endian numbers; what lies behind the file's end is 0.
fn table(file: &File, offset: u64, bytes: u64) -> Result<Vec<u64>> {
    let mut data = vec![0; bytes as usize];
    read_up_to(file, &mut data, offset)?;
    Ok(data.chunks_exact(8).map(|entry| long(entry, 0)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_in_use_are_found_however_far_apart() {
        let mut in_use = InUse {
            cluster_bits: 9,
            count: MOST_CLUSTERS,
            bits: Vec::new(),
            packed: HashMap::new(),
            counts: None,
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
