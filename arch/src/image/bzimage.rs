//! The x86 bzImage (Documentation/arch/x86/boot.rst).

use super::bytes::{MAX_IMAGE_SIZE, u16_at, u32_at, u64_at};
use super::error::{ImageError, unknown};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The setup header of an x86 bzImage (Documentation/arch/x86/boot.rst), 64-bit kernels only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct X86BzImage {
    /// Boot protocol, major in the high byte: 0x020f is 2.15. At least 0x020c.
    pub version: u16,
    /// `xloadflags`: bit 0 (64-bit entry at load address + 0x200) is always set here; bit 1 means
    /// that kernel, boot parameters and initrd may lie above 4 GiB.
    pub xloadflags: u16,
    /// The kernel may be loaded elsewhere than at `pref_address`.
    pub relocatable: bool,
    /// Bytes of the file to load: the protected-mode kernel. What follows (a signature) is not
    /// part of it.
    pub payload: Range<u64>,
    /// Bytes of memory that it needs from its load address while it unpacks itself.
    pub init_size: u64,
    /// Load address that it prefers, a guest-physical address.
    pub pref_address: u64,
    /// Alignment of any other load address, bytes.
    pub kernel_alignment: u64,
    /// Longest command line in bytes, without the terminating NUL.
    pub cmdline_size: u32,
    /// The setup header itself, file bytes from 0x1f1 on, to be copied into the zero page at
    /// 0x1f1.
    pub setup_header: Vec<u8>,
}

impl X86BzImage {
    /// Reads the setup header from the start of a bzImage; [`HEAD`](super::HEAD) bytes suffice.
    ///
    /// # Errors
    /// Fewer bytes than the header takes, another magic number, a protocol before 2.12, a 32-bit
    /// kernel, or sizes that cannot be.
    pub fn parse(head: &[u8]) -> Result<Self, ImageError> {
        if !is_bz_image(head) {
            return Err(unknown(head));
        }
        // The jump at 0x200 ends the header: its displacement counts from 0x202.
        let end = 0x202 + usize::from(head[0x201]);
        let version = u16_at(head, 0x206).unwrap_or(0);
        if version < 0x020c && head.len() >= 0x208 {
            return Err(ImageError::BzVersion { version });
        }
        let need = end.max(0x264);
        let Some(header) = head.get(0x1f1..need) else {
            return Err(ImageError::Short {
                what: "a bzImage",
                len: head.len(),
                need,
            });
        };
        // Within `header` from here on; every field below lies before 0x264.
        let byte = |at: usize| header[at - 0x1f1];
        let word = |at: usize| u32_at(header, at - 0x1f1).unwrap_or(0);
        let xloadflags = u16_at(header, 0x236 - 0x1f1).unwrap_or(0);
        if xloadflags & 1 == 0 {
            return Err(ImageError::Bz32Bit { xloadflags });
        }
        let (init_size, alignment) = (u64::from(word(0x260)), u64::from(word(0x230)));
        if !(1..=MAX_IMAGE_SIZE).contains(&init_size) || !alignment.is_power_of_two() {
            return Err(ImageError::BzSize {
                init_size,
                alignment,
            });
        }
        let setup_sects = match byte(0x1f1) {
            0 => 4,
            n => u64::from(n),
        };
        let payload = (setup_sects + 1) * 512;
        Ok(Self {
            version,
            xloadflags,
            relocatable: byte(0x234) != 0,
            // syssize counts units of 16 bytes.
            payload: payload..payload + u64::from(word(0x1f4)) * 16,
            init_size,
            pref_address: u64_at(header, 0x258 - 0x1f1).unwrap_or(0),
            kernel_alignment: alignment,
            cmdline_size: word(0x238),
            setup_header: header[..end.min(need) - 0x1f1].to_vec(),
        })
    }
}

/// Returns whether `head` begins a bzImage.
pub(super) fn is_bz_image(head: &[u8]) -> bool {
    u16_at(head, 0x1fe) == Some(0xaa55) && head.get(0x202..0x206) == Some(b"HdrS")
}
