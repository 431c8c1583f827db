//! Kernel headers: the format of a file by its first bytes, and the requirements of the kernel in
//! it.
//!
//! [`recognise`] looks only at content, never at names. It does no I/O: `src/kernel.rs` reads the
//! bytes, unpacks compressed formats and calls it again for the result.

mod arm64;
mod bytes;
mod bzimage;
mod compression;
mod efi;
pub(crate) mod elf;
mod error;

pub use arm64::{Arm64Image, Placement};
pub use bytes::{HEAD, MAX_IMAGE_SIZE};
pub use bzimage::X86BzImage;
pub use compression::Compression;
pub use efi::{Zboot, file_extent};
pub use elf::{MAX_NOTES, Segment, X86Elf};
pub use error::ImageError;

use arm64::ARM64_MAGIC;
use bytes::u32_at;
use bzimage::is_bz_image;
use compression::compression;
use efi::zboot;
use error::{WANTED, X86_WANTED, unknown};
use serde::{Deserialize, Serialize};

/// The format of a kernel file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// A plain arm64 Image.
    Arm64(Arm64Image),
    /// An x86_64 bzImage.
    X86(X86BzImage),
    /// An ELF file.
    Elf {
        /// `e_machine` of its header.
        machine: u16,
    },
    /// An EFI zboot file.
    Zboot(Zboot),
    /// Compressed data.
    Compressed(Compression),
}

/// The header of a kernel that can be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Header {
    /// For arm64 guests.
    Arm64(Arm64Image),
    /// For x86_64 guests.
    X86(X86Kernel),
}

/// A kernel in one of the forms that an x86_64 guest starts from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum X86Kernel {
    /// A bzImage: its 64-bit entry, and a zero page.
    Bz(X86BzImage),
    /// An ELF file: its 32-bit entry, and a start info.
    Elf(X86Elf),
}

impl Header {
    /// Returns the header for an arm64 guest.
    ///
    /// # Errors
    /// When it is an x86_64 kernel.
    pub fn arm64(&self) -> Result<&Arm64Image, ImageError> {
        match self {
            Self::Arm64(image) => Ok(image),
            Self::X86(X86Kernel::Bz(_)) => Err(ImageError::Architecture {
                found: "an x86_64 bzImage",
                needed: WANTED,
            }),
            Self::X86(X86Kernel::Elf(_)) => Err(ImageError::Architecture {
                found: "an ELF file for x86_64",
                needed: WANTED,
            }),
        }
    }

    /// Returns the header for an x86_64 guest.
    ///
    /// # Errors
    /// When it is an arm64 kernel.
    pub fn x86_64(&self) -> Result<&X86Kernel, ImageError> {
        match self {
            Self::X86(kernel) => Ok(kernel),
            Self::Arm64(_) => Err(ImageError::Architecture {
                found: "an arm64 Image",
                needed: X86_WANTED,
            }),
        }
    }
}

/// Recognises the format of a file by `head`, its first [`HEAD`] bytes (or all, if it is shorter).
///
/// # Errors
/// Formats that cannot be started, by name where they are known, and damaged headers.
pub fn recognise(head: &[u8]) -> Result<Format, ImageError> {
    // zboot first: it begins with "MZ" like every EFI kernel, and its magic number at 0x38 does not
    // identify the architecture, because the x86 EFI stub has the same one.
    if head.starts_with(b"MZ") && head.get(4..8) == Some(b"zimg") {
        return zboot(head).map(Format::Zboot);
    }
    if u32_at(head, 0x38) == Some(ARM64_MAGIC) {
        return Arm64Image::parse(head).map(Format::Arm64);
    }
    if is_bz_image(head) {
        return X86BzImage::parse(head).map(Format::X86);
    }
    if head.starts_with(b"\x7fELF") {
        return elf(head);
    }
    if let Some(compression) = compression(head) {
        return Ok(Format::Compressed(compression));
    }
    Err(match unsupported(head) {
        Some(what) => ImageError::Unsupported {
            what,
            remedy: WANTED,
        },
        None => unknown(head),
    })
}

fn elf(head: &[u8]) -> Result<Format, ImageError> {
    // EI_DATA at 5 is 2 for big-endian files; e_machine is at 18 in both classes.
    let machine = head.get(18..20).map(|m| match head[5] {
        2 => u16::from_be_bytes([m[0], m[1]]),
        _ => u16::from_le_bytes([m[0], m[1]]),
    });
    machine
        .map(|machine| Format::Elf { machine })
        .ok_or(ImageError::Short {
            what: "an ELF file",
            len: head.len(),
            need: 20,
        })
}

/// Returns the name of a format that is recognised only to be refused.
fn unsupported(head: &[u8]) -> Option<&'static str> {
    const MAGIC: [(usize, &[u8], &str); 9] = [
        // include/image.h of U-Boot: IH_MAGIC.
        (
            0,
            b"\x27\x05\x19\x56",
            "a U-Boot uImage (unpack it with dumpimage)",
        ),
        // Devicetree Specification 5.2: a FIT image is a device tree.
        (
            0,
            b"\xd0\x0d\xfe\xed",
            "a device tree or a U-Boot FIT image (unpack it with dumpimage)",
        ),
        (0, b"ANDROID!", "an Android boot image"),
        (0, b"\x89LZO\0\r\n\x1a\n", "lzop-compressed data"),
        (0, b"BZh", "bzip2-compressed data"),
        // arch/arm/boot/compressed/head.S.
        (0x24, b"\x18\x28\x6f\x01", "a 32-bit arm zImage"),
        // Documentation/arch/riscv/boot-image-header.rst: magic2.
        (0x38, b"RSC\x05", "a RISC-V Image"),
        // Any EFI program without one of the kernel headers above.
        (0, b"MZ", "an EFI program without a kernel header"),
        (0, b"070701", "a cpio archive, as an initrd is"),
    ];
    MAGIC
        .iter()
        .find(|(at, magic, _)| head.get(*at..).is_some_and(|rest| rest.starts_with(magic)))
        .map(|&(_, _, what)| what)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests;
