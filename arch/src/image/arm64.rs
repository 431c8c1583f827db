//! The arm64 Image (Documentation/arch/arm64/booting.rst).

use super::bytes::{MAX_IMAGE_SIZE, u32_at, u64_at};
use super::error::{ImageError, unknown};
use serde::{Deserialize, Serialize};

/// `text_offset` of arm64 kernels before 3.17, whose header does not state it reliably
/// (Documentation/arch/arm64/booting.rst section 4).
const OLD_TEXT_OFFSET: u64 = 0x8_0000;

/// "ARM\x64" at 0x38 of an arm64 Image.
pub(super) const ARM64_MAGIC: u32 = 0x644d_5241;

/// Where in RAM a kernel wants to be (booting.rst, flags bit 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Placement {
    /// At any 2 MiB boundary.
    Anywhere,
    /// As close to the start of RAM as possible: memory below the kernel may stay unused.
    NearRamBase,
}

/// The header of an arm64 Image (Documentation/arch/arm64/booting.rst section 4, 64 bytes, little
/// endian even for a big-endian kernel).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arm64Image {
    /// Bytes from a 2 MiB boundary to the kernel's first byte, which is also its entry.
    pub text_offset: u64,
    /// Bytes of memory from the first byte to the end of BSS: more than the file holds. 0 when
    /// the kernel does not say (before 3.17).
    pub image_size: u64,
    /// Page size that it was built for in bytes: 4096, 16384 or 65536; `None` if it does not say.
    /// The CPU must implement it.
    pub page_size: Option<u64>,
    /// Where it wants to be.
    pub placement: Placement,
    /// Built big-endian. Such a kernel switches the CPU itself: it starts like any other.
    pub big_endian: bool,
}

impl Arm64Image {
    /// Reads the header from the first 64 bytes of an Image.
    ///
    /// # Errors
    /// Fewer bytes, another magic number, or sizes that cannot be.
    pub fn parse(header: &[u8]) -> Result<Self, ImageError> {
        if u32_at(header, 0x38) != Some(ARM64_MAGIC) {
            return Err(unknown(header));
        }
        let short = ImageError::Short {
            what: "an arm64 Image",
            len: header.len(),
            need: 64,
        };
        if header.len() < 64 {
            return Err(short);
        }
        let (Some(text_offset), Some(image_size), Some(flags)) = (
            u64_at(header, 0x08),
            u64_at(header, 0x10),
            u64_at(header, 0x18),
        ) else {
            return Err(short);
        };
        let text_offset = match image_size {
            0 => OLD_TEXT_OFFSET,
            1..64 => return Err(ImageError::ImageTooSmall { image_size }),
            _ => text_offset,
        };
        if text_offset
            .checked_add(image_size)
            .is_none_or(|end| end > MAX_IMAGE_SIZE)
        {
            return Err(ImageError::ImageSize {
                image_size,
                text_offset,
            });
        }
        Ok(Self {
            text_offset,
            image_size,
            page_size: match flags >> 1 & 3 {
                1 => Some(4096),
                2 => Some(16384),
                3 => Some(65536),
                _ => None,
            },
            placement: if flags & 1 << 3 == 0 {
                Placement::NearRamBase
            } else {
                Placement::Anywhere
            },
            big_endian: flags & 1 != 0,
        })
    }
}
