//! What a qcow2 image lies in, as imago sees it.
//!
//! What is written goes through [`Tables`], which keep the order. What imago would refuse, and need
//! not know of, is not shown to it: incompatible features (an image that was not closed in order is
//! repaired, and what lies in clusters that imago cannot read is read elsewhere), and autoclear
//! features, which are cleared before the first write and not before.

use super::header::{AUTOCLEAR, Compression, FEATURES, Header, SIZE};
use super::order::{Below, Tables};
use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageExt};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

impl Below for File {
    fn size(&self) -> io::Result<u64> {
        Storage::size(self)
    }

    fn readv(&self, vector: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        StorageExt::readv(self, vector, offset)
    }

    fn writev(&self, vector: IoVector<'_>, offset: u64) -> io::Result<()> {
        StorageExt::writev(self, vector, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64, allocate: bool) -> io::Result<()> {
        match allocate {
            true => StorageExt::write_allocated_zeroes(self, offset, len),
            false => StorageExt::write_zeroes(self, offset, len),
        }
    }

    fn sync(&self) -> io::Result<()> {
        Storage::sync(self)
    }
}

/// What an image lies in. Copies are the same one.
#[derive(Clone)]
pub(super) struct Layer(Arc<Inner>);

struct Inner {
    below: Arc<dyn Below>,
    helper: CommonStorageHelper,
    /// `None` for a raw image.
    header: Option<Header>,
    /// `None` where the image is only read.
    tables: Option<Mutex<Tables>>,
    /// Whether clusters were given back since it was last asked for.
    freed: AtomicBool,
}

impl Layer {
    /// A raw image, which is only read.
    pub(super) fn raw(below: Arc<dyn Below>) -> Layer {
        Layer::new(below, None, None)
    }

    /// A qcow2 image, which has this header.
    ///
    /// # Errors
    /// Tables that cannot be read.
    pub(super) fn qcow2(
        below: Arc<dyn Below>,
        header: &Header,
        readonly: bool,
    ) -> io::Result<Layer> {
        let tables = match readonly {
            true => None,
            false => Some(Tables::new(Arc::clone(&below), header)?),
        };
        Ok(Layer::new(below, Some(header.clone()), tables))
    }

    fn new(below: Arc<dyn Below>, header: Option<Header>, tables: Option<Tables>) -> Layer {
        Layer(Arc::new(Inner {
            below,
            helper: CommonStorageHelper::default(),
            header,
            tables: tables.map(Mutex::new),
            freed: AtomicBool::new(false),
        }))
    }

    /// Whether clusters were given back since the last flush.
    pub(super) fn has_freed(&self) -> bool {
        self.0.freed.load(Relaxed)
    }

    /// Takes note of a flush.
    pub(super) fn forget_freed(&self) {
        self.0.freed.store(false, Relaxed);
    }

    /// Whether so much is held that it should be flushed.
    pub(super) fn is_full(&self) -> bool {
        self.tables().is_some_and(|tables| tables.is_full())
    }

    /// Whether an L2 table of its own is there for this entry of the L1 table.
    pub(super) fn has_l2(&self, index: u64) -> bool {
        self.tables().is_some_and(|tables| tables.has_l2(index))
    }

    fn tables(&self) -> Option<MutexGuard<'_, Tables>> {
        self.0.tables.as_ref().map(armlet_devices::sync::lock)
    }

    fn writable(&self) -> io::Result<MutexGuard<'_, Tables>> {
        let tables = self.tables();
        tables.ok_or_else(|| io::Error::other("the image is only read"))
    }

    /// Whether a range lies in the file, as all that tables lead to has to.
    fn is_inside(&self, header: &Header, offset: u64) -> io::Result<bool> {
        let size = self.0.below.size()?;
        Ok(offset < size.next_multiple_of(header.cluster_size()))
    }
}

/// Hides from imago what it would refuse, in these bytes from `offset` of the file.
fn hide(header: &Header, offset: u64, bytes: &mut [u8]) {
    let mut hidden = Vec::new();
    if header.is_new {
        hidden.extend([(FEATURES, 0), (AUTOCLEAR, 0)]);
    }
    if header.compression == Compression::Zstd {
        // Else the last cluster could not be written as a whole.
        let whole = header.size.next_multiple_of(header.cluster_size());
        hidden.push((SIZE, whole));
    }
    for (place, number) in hidden {
        for (at, byte) in (place as u64..).zip(number.to_be_bytes()) {
            let index = at.checked_sub(offset);
            if let Some(shown) = index.and_then(|index| bytes.get_mut(index as usize)) {
                *shown = byte;
            }
        }
    }
}

// imago asks for it, and shows it nowhere: what a layer holds would be 3 KiB of program.
impl fmt::Debug for Layer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("image")
    }
}

/// The methods that imago has as unsafe ask for aligned requests and no others at the same time.
/// Here requests need no alignment, and are safe in any order.
impl Storage for Layer {
    fn size(&self) -> io::Result<u64> {
        self.0.below.size()
    }

    unsafe fn pure_readv(&self, mut vector: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let Some(header) = &self.0.header else {
            return self.0.below.readv(vector, offset);
        };
        if !self.is_inside(header, offset)? {
            return Err(io::Error::other(
                "the image points behind the end of its file",
            ));
        }
        let len = vector.len();
        let tables = self.tables();
        let is_held = tables
            .as_ref()
            .is_some_and(|tables| tables.holds(offset, len));
        if !is_held && offset >= header.cluster_size() {
            drop(tables);
            return self.0.below.readv(vector, offset);
        }
        let mut bytes = vec![0; len as usize];
        match tables {
            Some(tables) => tables.read(&mut bytes, offset)?,
            None => self.0.below.readv(IoVectorMut::from(&mut bytes), offset)?,
        }
        hide(header, offset, &mut bytes);
        vector.copy_from_slice(&bytes);
        Ok(())
    }

    unsafe fn pure_writev(&self, vector: IoVector<'_>, offset: u64) -> io::Result<()> {
        let mut tables = self.writable()?;
        tables.begin()?;
        let len = vector.len();
        if tables.is_data(offset, len) {
            drop(tables);
            return self.0.below.writev(vector, offset);
        }
        let mut bytes = vec![0; len as usize];
        vector.copy_into_slice(&mut bytes);
        if offset == 0 {
            // What was hidden stays as it is.
            bytes.truncate(FEATURES);
            if let (Some(header), Some(size)) = (&self.0.header, bytes.get_mut(SIZE..SIZE + 8)) {
                size.copy_from_slice(&header.size.to_be_bytes());
            }
        }
        tables.write(&bytes, offset)
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len, false)
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len, true)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        match self.tables() {
            Some(mut tables) => tables.commit(),
            None => Ok(()),
        }
    }

    fn settle_writes(&self) -> io::Result<()> {
        // imago asks for it where it is about to give clusters back, and nowhere else.
        self.0.freed.store(true, Relaxed);
        Ok(())
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.0.helper
    }
}

impl Layer {
    fn zero(&self, offset: u64, len: u64, allocate: bool) -> io::Result<()> {
        let mut tables = self.writable()?;
        tables.begin()?;
        if tables.is_data(offset, len) {
            drop(tables);
            return self.0.below.write_zeroes(offset, len, allocate);
        }
        // imago zeroes clusters of data only.
        Err(io::Error::other("the image points to one of its tables"))
    }
}
