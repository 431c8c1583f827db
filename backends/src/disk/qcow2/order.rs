//! The order in which tables reach the file, so that the image survives a power cut at any moment.
//!
//! imago writes an entry of the L1 table before the count of the cluster that it leads to, and
//! never waits for the storage. So tables are held in memory until the guest flushes; data are
//! written at once, to clusters that nothing in the file leads to. What is held goes to the file in
//! four steps, and each is on stable storage before the next begins: counts that rise, and tables
//! that nothing leads to yet; the table of counts; what leads to data; counts that fall. Whatever
//! part of a step is lost, each cluster in use is counted and lies in the file. What can be left are
//! clusters that are counted and not in use, as with QEMU, whose order this is.

use super::header::{AUTOCLEAR, Header, long, word};
use imago::io_buffers::{IoVector, IoVectorMut};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of tables that are held before they are written without the guest's wish.
const MOST_HELD: usize = 16 << 20;
/// What differs is looked for in pieces of this many bytes.
const PIECE: usize = 4096;
/// The part of an entry of the L1 table, and of one of the table of counts, that is an offset.
const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The flag of an entry whose cluster has one user.
const COPIED: u64 = 1 << 63;
const COUNTS_OFFSET: u64 = !0x1ff;

/// A file beneath an image.
pub(super) trait Below: fmt::Debug + Send + Sync {
    /// Its size in bytes.
    fn size(&self) -> io::Result<u64>;
    /// Reads; what lies behind the end is zero.
    fn readv(&self, vector: IoVectorMut<'_>, offset: u64) -> io::Result<()>;
    /// Writes, and grows the file where it has to.
    fn writev(&self, vector: IoVector<'_>, offset: u64) -> io::Result<()>;
    /// Makes a range zero; with `allocate` it has room on the host's storage afterwards.
    fn write_zeroes(&self, offset: u64, len: u64, allocate: bool) -> io::Result<()>;
    /// Brings all that was written to stable storage.
    fn sync(&self) -> io::Result<()>;
}

/// What a cluster of tables is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Header,
    L1,
    /// The table of counts.
    CountsTable,
    L2,
    /// A block of counts.
    Counts,
}

/// A cluster of tables in memory.
#[derive(Debug)]
struct Held {
    kind: Kind,
    /// As the file has it.
    old: Vec<u8>,
    new: Vec<u8>,
    is_changed: bool,
}

/// The tables of an image that is written to.
#[derive(Debug)]
pub(super) struct Tables {
    below: Arc<dyn Below>,
    cluster: u64,
    refcount_order: u32,
    /// Clusters that were changed, and some that were not, by offset.
    held: BTreeMap<u64, Held>,
    changed: usize,
    /// Clusters of the L1 table and of the table of counts.
    l1: Range<u64>,
    counts: Range<u64>,
    /// Where there are L2 tables and blocks of counts.
    others: HashMap<u64, Kind>,
    /// Clusters of tables that nothing in the file leads to yet.
    fresh: HashSet<u64>,
    /// Clusters that the file has for tables and the image has no more.
    retired: HashSet<u64>,
    /// Whether autoclear features are to be cleared before anything is written.
    has_autoclear: bool,
    /// Whether an attempt to write what is held failed.
    is_torn: bool,
    /// Whether writes were lost on their way to stable storage.
    is_lost: bool,
}

impl Tables {
    /// Those of the image with this header.
    ///
    /// # Errors
    /// Tables that cannot be read.
    pub(super) fn new(below: Arc<dyn Below>, header: &Header) -> io::Result<Tables> {
        let cluster = header.cluster_size();
        let l1 = header.l1_offset..header.l1_offset + header.l1_bytes;
        let counts = header.refcounts_offset..header.refcounts_offset + header.refcounts_bytes;
        let mut tables = Tables {
            below,
            cluster,
            refcount_order: header.refcount_order,
            held: BTreeMap::new(),
            changed: 0,
            l1: l1.start..l1.end.next_multiple_of(cluster),
            counts: counts.start..counts.end.next_multiple_of(cluster),
            others: HashMap::new(),
            fresh: HashSet::new(),
            retired: HashSet::new(),
            has_autoclear: header.autoclear != 0,
            is_torn: false,
            is_lost: false,
        };
        for (range, kind) in [(l1, Kind::L2), (counts, Kind::Counts)] {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            tables.read(&mut bytes, range.start)?;
            let entries = entries(&bytes, kind);
            tables.others.extend(entries.map(|entry| (entry, kind)));
        }
        Ok(tables)
    }

    /// Whether so much is held that it should be written.
    pub(super) fn is_full(&self) -> bool {
        self.changed >= MOST_HELD
    }

    /// Whether something of this range is held.
    pub(super) fn holds(&self, offset: u64, len: u64) -> bool {
        let first = offset - offset % self.cluster;
        self.held
            .range(first..offset.saturating_add(len))
            .next()
            .is_some()
    }

    /// Reads a range as it will be.
    pub(super) fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.below.readv(IoVectorMut::from(&mut *bytes), offset)?;
        for (at, part) in parts(offset, bytes.len(), self.cluster) {
            let first = at - at % self.cluster;
            if let Some(held) = self.held.get(&first) {
                let from = (at - first) as usize;
                bytes[part.clone()].copy_from_slice(&held.new[from..from + part.len()]);
            }
        }
        Ok(())
    }

    /// Whether a range holds data only, as almost all that is written does.
    pub(super) fn is_data(&self, offset: u64, len: u64) -> bool {
        let first = offset - offset % self.cluster;
        let mut clusters = (first..offset.saturating_add(len)).step_by(self.cluster as usize);
        !clusters.any(|at| self.kind(at).is_some() || self.retired.contains(&at))
    }

    /// Whether an L2 table of its own is there for this entry of the L1 table.
    pub(super) fn has_l2(&self, index: u64) -> bool {
        let at = self.l1.start + 8 * index;
        let mut entry = [0; 8];
        self.l1.contains(&at) && self.read(&mut entry, at).is_ok() && long(&entry, 0) & COPIED != 0
    }

    /// Gets the file ready for the first write.
    pub(super) fn begin(&mut self) -> io::Result<()> {
        if self.has_autoclear {
            // They say of the image's other parts (bitmaps) that they are up to date.
            self.put(AUTOCLEAR as u64, &[0; 8])?;
            self.sync()?;
            self.has_autoclear = false;
        }
        Ok(())
    }

    /// Writes a range: tables are held.
    pub(super) fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        for (at, part) in parts(offset, bytes.len(), self.cluster) {
            let first = at - at % self.cluster;
            match self.kind(first) {
                Some(kind) => self.hold(kind, at, &bytes[part])?,
                None => {
                    if self.retired.contains(&first) {
                        self.commit()?;
                    }
                    self.put(at, &bytes[part])?;
                }
            }
        }
        Ok(())
    }

    fn kind(&self, cluster: u64) -> Option<Kind> {
        match cluster {
            0 => Some(Kind::Header),
            _ if self.l1.contains(&cluster) => Some(Kind::L1),
            _ if self.counts.contains(&cluster) => Some(Kind::CountsTable),
            _ => self.others.get(&cluster).copied(),
        }
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.below.writev(IoVector::from(bytes), offset)
    }

    /// Changes a part of a cluster of tables, in memory.
    fn hold(&mut self, kind: Kind, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let first = offset - offset % self.cluster;
        let at = (offset - first) as usize;
        let len = self.cluster as usize;
        if !self.held.contains_key(&first) {
            let mut old = vec![0; len];
            self.read(&mut old, first)?;
            let held = Held {
                kind,
                new: old.clone(),
                old,
                is_changed: false,
            };
            self.held.insert(first, held);
        }
        let Some(held) = self.held.get_mut(&first) else {
            return Ok(());
        };
        let part = &mut held.new[at..at + bytes.len()];
        let before = part.to_vec();
        part.copy_from_slice(bytes);
        if !held.is_changed && held.new != held.old {
            held.is_changed = true;
            self.changed += len;
        }
        match kind {
            Kind::L1 => self.leads(&before, bytes, Kind::L2),
            Kind::CountsTable => self.leads(&before, bytes, Kind::Counts),
            Kind::Header => self.move_tables()?,
            Kind::L2 | Kind::Counts => {}
        }
        Ok(())
    }

    /// Takes note of entries that lead to other tables of this kind than before.
    fn leads(&mut self, before: &[u8], after: &[u8], kind: Kind) {
        let changed = |(one, other): &(&[u8], &[u8])| one != other;
        let pairs = before.chunks_exact(8).zip(after.chunks_exact(8));
        for (was, is) in pairs.filter(changed) {
            let was = entries(was, kind).next();
            let is = entries(is, kind).next();
            if was == is {
                continue;
            }
            if let Some(was) = was {
                self.others.remove(&was);
                self.retire(was);
            }
            if let Some(is) = is {
                self.others.insert(is, kind);
                self.fresh.insert(is);
            }
        }
    }

    fn retire(&mut self, cluster: u64) {
        if let Some(held) = self.held.remove(&cluster)
            && held.is_changed
        {
            self.changed -= held.new.len();
        }
        if !self.fresh.remove(&cluster) {
            self.retired.insert(cluster);
        }
    }

    /// Looks in the header where the L1 table and the table of counts are.
    fn move_tables(&mut self) -> io::Result<()> {
        let Some(header) = self.held.get(&0) else {
            return Ok(());
        };
        let header = &header.new;
        let l1 = long(header, 40)..long(header, 40) + 8 * u64::from(word(header, 36));
        let counts =
            long(header, 48)..long(header, 48) + u64::from(word(header, 56)) * self.cluster;
        for (now, kind) in [(l1, Kind::L2), (counts, Kind::Counts)] {
            let range = now.start..now.end.next_multiple_of(self.cluster);
            let place = match kind {
                Kind::L2 => &mut self.l1,
                _ => &mut self.counts,
            };
            let before = std::mem::replace(place, range.clone());
            if before == range {
                continue;
            }
            let step = self.cluster as usize;
            before.step_by(step).for_each(|at| self.retire(at));
            self.fresh.extend(range.step_by(step));
            let mut bytes = vec![0; (now.end - now.start) as usize];
            self.read(&mut bytes, now.start)?;
            for entry in entries(&bytes, kind) {
                if self.others.insert(entry, kind).is_none() {
                    self.fresh.insert(entry);
                }
            }
        }
        Ok(())
    }

    /// Brings all to stable storage, in the order that the module tells of.
    pub(super) fn commit(&mut self) -> io::Result<()> {
        if self.is_torn {
            // Some of it may be in the file.
            for (at, held) in &mut self.held {
                self.below.readv(IoVectorMut::from(&mut held.old), *at)?;
            }
        }
        self.is_torn = true;
        self.write_held()?;
        self.is_torn = false;
        let mut room = MOST_HELD;
        self.held.retain(|_, held| {
            if held.is_changed {
                held.old.copy_from_slice(&held.new);
                held.is_changed = false;
            }
            room = room.saturating_sub(held.new.len());
            room > 0
        });
        self.changed = 0;
        self.fresh.clear();
        self.retired.clear();
        Ok(())
    }

    fn write_held(&mut self) -> io::Result<()> {
        let order = self.refcount_order;
        let risen = |held: &Held| highest(&held.old, &held.new, order);
        let mut wrote = false;
        for (at, held) in self.changed() {
            match held.kind {
                _ if self.fresh.contains(at) => self.put_changes(*at, &held.old, &held.new)?,
                Kind::Counts => self.put_changes(*at, &held.old, &risen(held))?,
                _ => {}
            }
            wrote = true;
        }
        if wrote {
            self.sync()?;
        }
        wrote = false;
        for (at, held) in self.changed() {
            let leads = matches!(held.kind, Kind::Header | Kind::CountsTable);
            if leads && !self.fresh.contains(at) {
                self.put_changes(*at, &held.old, &held.new)?;
                wrote = true;
            }
        }
        if wrote {
            self.sync()?;
        }
        for (at, held) in self.changed() {
            let leads = matches!(held.kind, Kind::L1 | Kind::L2);
            if leads && !self.fresh.contains(at) {
                self.put_changes(*at, &held.old, &held.new)?;
            }
        }
        self.sync()?;
        for (at, held) in self.changed() {
            if held.kind == Kind::Counts && !self.fresh.contains(at) {
                self.put_changes(*at, &risen(held), &held.new)?;
            }
        }
        Ok(())
    }

    fn changed(&self) -> impl Iterator<Item = (&u64, &Held)> {
        self.held.iter().filter(|(_, held)| held.is_changed)
    }

    /// Writes those pieces of a cluster that differ.
    fn put_changes(&self, offset: u64, old: &[u8], new: &[u8]) -> io::Result<()> {
        let pairs = old.chunks(PIECE).zip(new.chunks(PIECE));
        for (index, (_, new)) in pairs.enumerate().filter(|(_, (old, new))| old != new) {
            self.put(offset + (index * PIECE) as u64, new)?;
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.is_lost {
            return Err(io::Error::other("writes were lost before"));
        }
        // Linux tells once of pages that it could not write, and drops them.
        let result = self.below.sync();
        self.is_lost = result.is_err();
        result
    }
}

/// The tables of `kind` that these entries of its parent lead to.
fn entries(bytes: &[u8], kind: Kind) -> impl Iterator<Item = u64> + '_ {
    let mask = match kind {
        Kind::L2 => L1_OFFSET,
        _ => COUNTS_OFFSET,
    };
    let offsets = bytes
        .chunks_exact(8)
        .map(move |entry| long(entry, 0) & mask);
    offsets.filter(|offset| *offset != 0)
}

/// The parts of a range by clusters: where each is in the file, and in the range.
fn parts(offset: u64, len: usize, cluster: u64) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let count = (len - done).min((cluster - at % cluster) as usize);
        let part = done..done + count;
        done += count;
        (count > 0).then_some((at, part))
    })
}

/// The higher one of each two counts of 2^order bits.
fn highest(one: &[u8], other: &[u8], order: u32) -> Vec<u8> {
    if order >= 3 {
        let bytes = 1 << (order - 3);
        let pairs = one.chunks(bytes).zip(other.chunks(bytes));
        return pairs
            .flat_map(|(one, other)| one.max(other))
            .copied()
            .collect();
    }
    let bits = 1_u32 << order;
    let mask = ((1_u32 << bits) - 1) as u8;
    let highest = |(one, other): (&u8, &u8)| {
        (0..8).step_by(bits as usize).fold(0, |byte, shift| {
            let count = |of: u8| of >> shift & mask;
            byte | count(*one).max(count(*other)) << shift
        })
    };
    one.iter().zip(other).map(highest).collect()
}
