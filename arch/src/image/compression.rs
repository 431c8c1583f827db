//! Compression formats, recognised by their first bytes.

use super::bytes::{MAX_IMAGE_SIZE, u32_at, u64_at};

/// A compression format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
    /// LZ4 frame format.
    Lz4,
    /// The older LZ4 format of blocks that unpack to 8 MiB: `lz4 -l`, which the kernel's build
    /// uses.
    Lz4Legacy,
    /// The .xz format.
    Xz,
    /// The .lzma format ("LZMA alone").
    Lzma,
}

impl Compression {
    /// Returns the name that users know.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Lz4 | Self::Lz4Legacy => "lz4",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
        }
    }
}

/// Returns how data that begin with `head` are compressed, if they are.
pub(super) fn compression(head: &[u8]) -> Option<Compression> {
    const MAGIC: [(&[u8], Compression); 5] = [
        // With the method, deflate, of which there is no other.
        (b"\x1f\x8b\x08", Compression::Gzip),
        (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        (b"\x04\x22\x4d\x18", Compression::Lz4),
        (b"\x02\x21\x4c\x18", Compression::Lz4Legacy),
        (b"\xfd7zXZ\0", Compression::Xz),
    ];
    MAGIC
        .iter()
        .find(|(magic, _)| head.starts_with(magic))
        .map(|&(_, compression)| compression)
        .or_else(|| is_lzma(head).then_some(Compression::Lzma))
}

/// .lzma has no magic number: its 13 bytes are properties, dictionary size and unpacked size. As
/// file(1) does, only what encoders write is taken for it: the default properties, a dictionary
/// of a power of two, and a size unknown (all ones) or believable.
fn is_lzma(head: &[u8]) -> bool {
    let (Some(dictionary), Some(size)) = (u32_at(head, 1), u64_at(head, 5)) else {
        return false;
    };
    head[0] == 0x5d
        && dictionary.is_power_of_two()
        && dictionary >= 4096
        && (size == u64::MAX || size <= MAX_IMAGE_SIZE)
}
