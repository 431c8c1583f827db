//! Images that are compressed by zstd, which imago does not know: it is not told, and does not get to
//! see a compressed cluster. They are read here; who writes to a part of one writes the whole of it
//! first.

use super::clusters::read_compressed;
use super::header::Header;
use super::storage::Layer;
use imago::format::drivers::FormatDriverInstance;
use imago::format::{Format, PreallocateMode};
use imago::io_buffers::IoVectorMut;
use imago::qcow2::Qcow2;
use imago::{PreparedDataMapping, ShallowMapping};
use std::fmt;
use std::io;

/// An image whose clusters imago cannot decompress.
#[derive(Debug)]
pub(super) struct Zstd {
    pub(super) image: Qcow2<Layer>,
    pub(super) layer: Layer,
    pub(super) header: Header,
}

impl fmt::Display for Zstd {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.image.fmt(formatter)
    }
}

impl FormatDriverInstance for Zstd {
    type Storage = Layer;

    fn format(&self) -> Format {
        Format::Qcow2
    }

    unsafe fn probe(_storage: &Layer) -> io::Result<bool> {
        Ok(false)
    }

    fn size(&self) -> u64 {
        self.image.size()
    }

    fn zero_granularity(&self) -> Option<u64> {
        self.image.zero_granularity()
    }

    fn collect_storage_dependencies(&self) -> Vec<&Layer> {
        self.image.collect_storage_dependencies()
    }

    fn writable(&self) -> bool {
        self.image.writable()
    }

    fn get_mapping(
        &self,
        offset: u64,
        max_length: u64,
    ) -> io::Result<(ShallowMapping<'_, Layer>, u64)> {
        self.image.get_mapping(offset, max_length)
    }

    fn prepare_data_mapping(
        &self,
        offset: u64,
        length: u64,
        overwrite: bool,
    ) -> io::Result<PreparedDataMapping<'_, Layer>> {
        self.image.prepare_data_mapping(offset, length, overwrite)
    }

    fn commit_data_mapping(&self, mapping: PreparedDataMapping<'_, Layer>) -> io::Result<()> {
        self.image.commit_data_mapping(mapping)
    }

    fn ensure_zero_mapping(&self, offset: u64, length: u64) -> io::Result<(u64, u64)> {
        self.image.ensure_zero_mapping(offset, length)
    }

    unsafe fn discard_to_zero_unsafe(&self, offset: u64, length: u64) -> io::Result<(u64, u64)> {
        // SAFETY: the caller holds no mappings, of this image and so of the one inside.
        unsafe { self.image.discard_to_zero_unsafe(offset, length) }
    }

    unsafe fn discard_to_any_unsafe(&self, offset: u64, length: u64) -> io::Result<(u64, u64)> {
        // SAFETY: the caller holds no mappings, of this image and so of the one inside.
        unsafe { self.image.discard_to_any_unsafe(offset, length) }
    }

    fn try_readv_special<'a>(
        &self,
        mut vector: IoVectorMut<'a>,
        mut offset: u64,
    ) -> io::Result<Option<(IoVectorMut<'a>, u64)>> {
        while !vector.is_empty() {
            let cluster = read_compressed(&self.layer, &self.header, offset)?;
            let from = (offset % self.header.cluster_size()) as usize;
            let count = vector.len().min((cluster.len() - from) as u64);
            let (mut part, rest) = vector.split_at(count);
            part.copy_from_slice(&cluster[from..from + count as usize]);
            vector = rest;
            offset += count;
        }
        Ok(None)
    }

    fn flush(&self) -> io::Result<()> {
        self.image.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.image.sync()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn resize_grow(&self, _size: u64, _mode: PreallocateMode) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn resize_shrink(&mut self, _size: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
