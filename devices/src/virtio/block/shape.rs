//! What the guest sees of a disk: its features and its configuration space.

/// VIRTIO_BLK_F_SEG_MAX, bit 2 (virtio 1.2, section 5.2.3, as all of these).
pub const FEATURE_SEG_MAX: u64 = 1 << 2;
/// VIRTIO_BLK_F_RO.
pub const FEATURE_RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_BLK_SIZE.
pub const FEATURE_BLK_SIZE: u64 = 1 << 6;
/// VIRTIO_BLK_F_FLUSH.
pub const FEATURE_FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_TOPOLOGY.
pub const FEATURE_TOPOLOGY: u64 = 1 << 10;
/// VIRTIO_BLK_F_CONFIG_WCE.
pub const FEATURE_CONFIG_WCE: u64 = 1 << 11;
/// VIRTIO_BLK_F_MQ.
pub const FEATURE_MQ: u64 = 1 << 12;
/// VIRTIO_BLK_F_DISCARD.
pub const FEATURE_DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES.
pub const FEATURE_WRITE_ZEROES: u64 = 1 << 14;

/// Entries of each queue.
pub(super) const ENTRIES: u16 = 256;
/// The most buffers of one request's data: header and status take two more entries.
pub(super) const SEG_MAX: u32 = ENTRIES as u32 - 2;
/// The unit of sector numbers, in bytes, whatever the block size.
pub(super) const SECTOR: u64 = 512;
/// The most sectors of a discard: 1 GiB.
pub(super) const DISCARD_SECTORS: u32 = 1 << 21;
/// The most sectors of a write of zeroes: 128 MiB, for hosts where each zero has to be written.
pub(super) const ZERO_SECTORS: u32 = 1 << 18;

/// Offsets in the configuration space (virtio 1.2, section 5.2.4).
pub(super) mod field {
    pub(in crate::virtio::block) const CAPACITY: usize = 0;
    pub(in crate::virtio::block) const SEG_MAX: usize = 12;
    pub(in crate::virtio::block) const BLK_SIZE: usize = 20;
    pub(in crate::virtio::block) const PHYSICAL_BLOCK_EXP: usize = 24;
    pub(in crate::virtio::block) const MIN_IO_SIZE: usize = 26;
    pub(in crate::virtio::block) const OPT_IO_SIZE: usize = 28;
    pub(in crate::virtio::block) const WRITEBACK: usize = 32;
    pub(in crate::virtio::block) const NUM_QUEUES: usize = 34;
    pub(in crate::virtio::block) const MAX_DISCARD_SECTORS: usize = 36;
    pub(in crate::virtio::block) const MAX_DISCARD_SEG: usize = 40;
    pub(in crate::virtio::block) const DISCARD_SECTOR_ALIGNMENT: usize = 44;
    pub(in crate::virtio::block) const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub(in crate::virtio::block) const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub(in crate::virtio::block) const WRITE_ZEROES_MAY_UNMAP: usize = 56;
    /// As far as the features reach that are offered here.
    pub(in crate::virtio::block) const END: usize = 60;
}

/// What the guest sees of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Its size in bytes; what lies behind the last whole sector is not seen.
    pub size: u64,
    /// Whether the guest may only read it.
    pub readonly: bool,
    /// Its serial number: up to 20 bytes, more are cut off.
    pub serial: String,
    /// Its queues: 1 or more.
    pub queues: u16,
    /// Whether the guest can have what it wrote reach stable storage. If not, it is not offered that, and a
    /// write is done when the host has it.
    pub flushes: bool,
    /// Bytes of the smallest piece that the guest should read or write: a power of two from 512.
    pub block_size: u32,
    /// Bytes of the smallest piece that the storage writes without reading it first: a power of
    /// two from `block_size`.
    pub physical_block_size: u32,
    /// Bytes that are best read or written at once; 0 where nobody knows.
    pub optimal_io_size: u32,
    /// Bytes of the smallest piece that can be discarded: a multiple of 512.
    pub discard_granularity: u32,
}

/// The features that a disk offers.
pub(super) fn features(shape: &Shape) -> u64 {
    let mut features = FEATURE_SEG_MAX | FEATURE_BLK_SIZE | FEATURE_TOPOLOGY;
    features |= match shape.readonly {
        true => FEATURE_RO,
        false => FEATURE_DISCARD | FEATURE_WRITE_ZEROES,
    };
    if shape.flushes {
        features |= FEATURE_FLUSH;
        if !shape.readonly {
            features |= FEATURE_CONFIG_WCE;
        }
    }
    if shape.queues > 1 {
        features |= FEATURE_MQ;
    }
    features
}

/// The configuration space of a disk.
pub(super) fn config_bytes(shape: &Shape) -> Vec<u8> {
    let mut bytes = vec![0; field::END];
    let mut set = |offset, value: &[u8]| put(&mut bytes, offset, value);
    let blocks = |size: u32| size / shape.block_size;
    let exponent = blocks(shape.physical_block_size).max(1).ilog2() as u8;
    let min_io = u16::try_from(blocks(shape.physical_block_size)).unwrap_or(1);
    set(field::CAPACITY, &(shape.size / SECTOR).to_le_bytes());
    set(field::SEG_MAX, &SEG_MAX.to_le_bytes());
    set(field::BLK_SIZE, &shape.block_size.to_le_bytes());
    set(field::PHYSICAL_BLOCK_EXP, &[exponent]);
    set(field::MIN_IO_SIZE, &min_io.to_le_bytes());
    let optimal = blocks(shape.optimal_io_size);
    set(field::OPT_IO_SIZE, &optimal.to_le_bytes());
    set(field::WRITEBACK, &[1]);
    set(field::NUM_QUEUES, &shape.queues.to_le_bytes());
    if !shape.readonly {
        let granularity = shape.discard_granularity / SECTOR as u32;
        set(field::MAX_DISCARD_SECTORS, &DISCARD_SECTORS.to_le_bytes());
        set(field::MAX_DISCARD_SEG, &1_u32.to_le_bytes());
        set(field::DISCARD_SECTOR_ALIGNMENT, &granularity.to_le_bytes());
        set(field::MAX_WRITE_ZEROES_SECTORS, &ZERO_SECTORS.to_le_bytes());
        set(field::MAX_WRITE_ZEROES_SEG, &1_u32.to_le_bytes());
        set(field::WRITE_ZEROES_MAY_UNMAP, &[1]);
    }
    bytes
}

/// Writes a field of the configuration space.
pub(super) fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    bytes[offset..offset + value.len()].copy_from_slice(value);
}
