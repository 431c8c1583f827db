//! Kernel headers as facts: what a file is by its first bytes, and what the kernel in it asks for.
//!
//! [`recognise`] looks at content only, never at names. It does no I/O: `src/kernel.rs` reads the
//! bytes, unpacks compressed forms and asks again about what came out.

use crate::elf::X86Elf;
use crate::x86_64::Kernel;
use std::ops::Range;
use thiserror::Error;

/// Bytes from the start of a file (or of unpacked data) that hold every header and section table
/// read here. The arm64 Image keeps its PE header in its first 4 KiB page
/// (arch/arm64/kernel/efi-header.S), the bzImage its setup header below 0x301.
pub const HEAD: usize = 4096;

/// The largest kernel that is believed, in bytes from the load address to the end of its BSS.
///
/// Distributions' kernels need 25 to 60 MiB and a build with everything in it some hundreds, so
/// 1 GiB refuses nothing real, and bounds what a damaged header can make the VMM set aside.
pub const MAX_IMAGE_SIZE: u64 = 1 << 30;

/// `text_offset` of arm64 kernels before 3.17, whose header does not state it reliably
/// (Documentation/arch/arm64/booting.rst section 4).
const OLD_TEXT_OFFSET: u64 = 0x8_0000;

/// What would work, for messages about things that do not.
const WANTED: &str = "an arm64 guest takes an arm64 Image: plain, compressed with gzip, zstd, \
                      lz4, xz or lzma, or as an EFI zboot file";

const X86_WANTED: &str = "an x86_64 guest takes a bzImage or an ELF vmlinux";

/// Why bytes are not a kernel that can be started.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ImageError {
    /// Nothing that is known begins like this.
    #[error("no known kernel format begins with the bytes {start:02x?}; {WANTED}; {X86_WANTED}")]
    Unknown {
        /// The first bytes, at most eight.
        start: Vec<u8>,
    },
    /// A known format ends before its header does.
    #[error("{what} of {len} bytes is shorter than its own header of {need} bytes")]
    Short {
        /// The format.
        what: &'static str,
        /// Bytes that there are.
        len: usize,
        /// Bytes that the header takes.
        need: usize,
    },
    /// A format that is known and cannot be started.
    #[error("this is {what}; {remedy}")]
    Unsupported {
        /// The format, with its article.
        what: &'static str,
        /// What would work.
        remedy: &'static str,
    },
    /// An ELF file, which is not the bootable form of a kernel.
    #[error("this is an ELF file for {}; {}", elf_machine(*machine), elf_remedy(*machine))]
    Elf {
        /// `e_machine` of its header.
        machine: u16,
    },
    /// A kernel for guests of another architecture.
    #[error("this is {found}; {needed}")]
    Architecture {
        /// What it is, with its article.
        found: &'static str,
        /// What such a guest takes.
        needed: &'static str,
    },
    /// The header of an arm64 Image asks for more memory than is believed.
    #[error(
        "the arm64 Image header asks for {image_size:#x} bytes at offset {text_offset:#x}; more \
         than {MAX_IMAGE_SIZE:#x} bytes together means a damaged header"
    )]
    ImageSize {
        /// Bytes of memory from the first byte of the kernel.
        image_size: u64,
        /// Bytes between the 2 MiB boundary and the kernel.
        text_offset: u64,
    },
    /// The header of an arm64 Image states a size that does not even hold the header.
    #[error("the arm64 Image header states a size of {image_size} bytes; it takes 64 itself")]
    ImageTooSmall {
        /// Bytes of memory.
        image_size: u64,
    },
    /// A kernel of before 3.17 does not say how much memory it needs, so it cannot be unpacked
    /// into memory set aside for it.
    #[error(
        "the arm64 Image inside does not state its size (Linux before 3.17); unpack it and give \
         the plain Image"
    )]
    SizeUnknown,
    /// The payload of a zboot file does not lie in the file.
    #[error(
        "the EFI zboot header places {size} bytes of kernel at {offset:#x}; the file has {len} bytes"
    )]
    ZbootPayload {
        /// Offset in the file, bytes.
        offset: u64,
        /// Compressed size, bytes.
        size: u64,
        /// Size of the file, bytes.
        len: u64,
    },
    /// An x86_64 ELF file that is no kernel to start.
    #[error("this is an ELF file for x86_64 that cannot be started: {cause}")]
    BadElf {
        /// What is wrong with it.
        cause: String,
    },
    /// What is packed in a file is not an arm64 Image.
    #[error("the {outer} data holds {inner}; only an arm64 Image can be packed so")]
    Packed {
        /// Name of the outer form.
        outer: &'static str,
        /// What is inside.
        inner: &'static str,
    },
    /// A bzImage from before the 64-bit entry point was described.
    #[error(
        "this bzImage speaks boot protocol {}.{:02}; 2.12 (Linux 3.8) is the oldest that names a \
         64-bit entry", version >> 8, version & 0xff
    )]
    BzVersion {
        /// Protocol version, major in the high byte.
        version: u16,
    },
    /// A bzImage of a 32-bit kernel.
    #[error("this bzImage is a 32-bit kernel (xloadflags {xloadflags:#x}); x86_64 is needed")]
    Bz32Bit {
        /// Flags of the setup header, bit 0 clear.
        xloadflags: u16,
    },
    /// A setup header whose sizes cannot be.
    #[error(
        "the bzImage setup header asks for {init_size:#x} bytes aligned to {alignment:#x}; the \
         size must be 1 to {MAX_IMAGE_SIZE:#x} and the alignment a power of two"
    )]
    BzSize {
        /// Memory that the kernel needs while it unpacks itself, bytes.
        init_size: u64,
        /// Alignment of the load address, bytes.
        alignment: u64,
    },
    /// The file or the unpacked data ends before the kernel does.
    #[error("truncated: there are {len} bytes, its sections need {need}")]
    Truncated {
        /// Bytes that there are.
        len: u64,
        /// Bytes that the headers claim.
        need: u64,
    },
}

/// Where in RAM a kernel wants to be (booting.rst, flags bit 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// At any 2 MiB boundary.
    Anywhere,
    /// As close to the start of RAM as possible: memory below the kernel may stay unused.
    NearRamBase,
}

/// The header of an arm64 Image (Documentation/arch/arm64/booting.rst section 4, 64 bytes, little
/// endian even for a big-endian kernel).
#[derive(Debug, Clone, PartialEq, Eq)]
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

/// The setup header of an x86 bzImage (Documentation/arch/x86/boot.rst), 64-bit kernels only.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// Reads the setup header from the start of a bzImage; [`HEAD`] bytes suffice.
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

/// How data are compressed, told by their first bytes.
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
    /// The name that users know.
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

/// The header of an EFI zboot file (drivers/firmware/efi/libstub/zboot-header.S): a small EFI
/// program with a compressed arm64 Image inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Zboot {
    /// Where the compressed Image lies in the file, bytes; without the size that some
    /// compressions have appended.
    pub payload: Range<u64>,
    /// The compression that the header names, such as "gzip" or "zstd22". For people: the
    /// payload's own first bytes decide.
    pub compression: String,
}

/// What a file is.
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
    X86(X86BzImage),
    /// For x86_64 guests, as an ELF file.
    X86Elf(X86Elf),
}

impl Header {
    /// The header for an arm64 guest.
    ///
    /// # Errors
    /// It is an x86_64 kernel.
    pub fn arm64(&self) -> Result<&Arm64Image, ImageError> {
        match self {
            Self::Arm64(image) => Ok(image),
            Self::X86(_) => Err(ImageError::Architecture {
                found: "an x86_64 bzImage",
                needed: WANTED,
            }),
            Self::X86Elf(_) => Err(ImageError::Architecture {
                found: "an ELF file for x86_64",
                needed: WANTED,
            }),
        }
    }

    /// The header for an x86_64 guest.
    ///
    /// # Errors
    /// It is an arm64 kernel.
    pub fn x86_64(&self) -> Result<Kernel, ImageError> {
        match self {
            Self::X86(image) => Ok(Kernel::Bz(image.clone())),
            Self::X86Elf(elf) => Ok(Kernel::Elf(elf.clone())),
            Self::Arm64(_) => Err(ImageError::Architecture {
                found: "an arm64 Image",
                needed: X86_WANTED,
            }),
        }
    }
}

/// "ARM\x64" at 0x38 of an arm64 Image.
const ARM64_MAGIC: u32 = 0x644d_5241;

/// Says what `head`, the first [`HEAD`] bytes of a file (or all, if it is shorter), belongs to.
///
/// # Errors
/// Formats that cannot be started, by name where they are known, and damaged headers.
pub fn recognise(head: &[u8]) -> Result<Format, ImageError> {
    // zboot first: it has "MZ" like every EFI kernel, and its mark at 0x38 is no proof of an
    // architecture, for the x86 EFI stub has the same.
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

/// The number of file bytes that an EFI-stub kernel claims: the largest end of raw data in the PE
/// section table that the word at 0x3c leads to, or the end of that table where `head` does not
/// reach it. A file of fewer bytes is truncated. `None` without such a table.
#[must_use]
pub fn file_extent(head: &[u8]) -> Option<u64> {
    // Offsets within the PE and COFF headers: Microsoft PE format, "COFF File Header" (24 bytes
    // with the signature) and "Section Table" (40 bytes a section).
    if !head.starts_with(b"MZ") {
        return None;
    }
    let offset = u32_at(head, 0x3c)?;
    let pe = head.get(offset as usize..).unwrap_or_default();
    if pe.len() < 24 {
        return Some(u64::from(offset) + 24);
    }
    if !pe.starts_with(b"PE\0\0") {
        return None;
    }
    let (sections, optional) = (usize::from(u16_at(pe, 6)?), usize::from(u16_at(pe, 20)?));
    let (start, end) = (24 + optional, 24 + optional + sections * 40);
    let Some(table) = pe.get(start..end) else {
        return Some(u64::from(offset) + end as u64);
    };
    table
        .chunks_exact(40)
        .filter_map(|section| {
            let (size, start) = (u32_at(section, 16)?, u32_at(section, 20)?);
            // Sections without file bytes (BSS) may carry any pointer.
            (size != 0).then_some(u64::from(start) + u64::from(size))
        })
        .max()
}

fn zboot(head: &[u8]) -> Result<Zboot, ImageError> {
    // The compression's name has the bytes from 0x18 up to the mark at 0x38.
    let (Some(offset), Some(size), Some(name)) =
        (u32_at(head, 0x08), u32_at(head, 0x0c), head.get(0x18..0x38))
    else {
        return Err(ImageError::Short {
            what: "an EFI zboot file",
            len: head.len(),
            need: 0x38,
        });
    };
    let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
    let offset = u64::from(offset);
    Ok(Zboot {
        payload: offset..offset + u64::from(size),
        compression: String::from_utf8_lossy(name).into_owned(),
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

fn elf_machine(machine: u16) -> String {
    match machine {
        3 => "32-bit x86".into(),
        40 => "32-bit arm".into(),
        62 => "x86_64".into(),
        183 => "arm64".into(),
        243 => "RISC-V".into(),
        258 => "LoongArch".into(),
        other => format!("machine {other}"),
    }
}

fn elf_remedy(machine: u16) -> &'static str {
    match machine {
        183 => "vmlinux is not bootable: use arch/arm64/boot/Image of the same build",
        _ => WANTED,
    }
}

fn is_bz_image(head: &[u8]) -> bool {
    u16_at(head, 0x1fe) == Some(0xaa55) && head.get(0x202..0x206) == Some(b"HdrS")
}

fn compression(head: &[u8]) -> Option<Compression> {
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

/// Names formats that are recognised only to be refused.
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

fn unknown(head: &[u8]) -> ImageError {
    ImageError::Unknown {
        start: head[..head.len().min(8)].to_vec(),
    }
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes_at(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes_at(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes_at(bytes, at).map(u64::from_le_bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
        bytes[at..at + value.len()].copy_from_slice(value);
    }

    fn arm64(text_offset: u64, image_size: u64, flags: u64) -> Vec<u8> {
        let mut head = vec![0; 64];
        put(&mut head, 0x00, b"MZ\x40\xfa");
        put(&mut head, 0x08, &text_offset.to_le_bytes());
        put(&mut head, 0x10, &image_size.to_le_bytes());
        put(&mut head, 0x18, &flags.to_le_bytes());
        put(&mut head, 0x38, b"ARM\x64");
        head
    }

    fn bz(version: u16, xloadflags: u16) -> Vec<u8> {
        let mut head = vec![0; 0x400];
        put(&mut head, 0x1f1, &[39]);
        put(&mut head, 0x1f4, &0x1000_u32.to_le_bytes());
        put(&mut head, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
        put(&mut head, 0x202, b"HdrS");
        put(&mut head, 0x206, &version.to_le_bytes());
        put(&mut head, 0x230, &0x20_0000_u32.to_le_bytes());
        put(&mut head, 0x234, &[1]);
        put(&mut head, 0x236, &xloadflags.to_le_bytes());
        put(&mut head, 0x238, &2047_u32.to_le_bytes());
        put(&mut head, 0x258, &0x100_0000_u64.to_le_bytes());
        put(&mut head, 0x260, &0x200_0000_u32.to_le_bytes());
        head
    }

    /// Start of Debian's vmlinuz-6.1.0-56-cloud-arm64: header, PE header, two sections.
    fn debian() -> Vec<u8> {
        let mut head = arm64(0, 0x1ab_0000, 0x0a);
        head.resize(HEAD, 0);
        put(&mut head, 0x3c, &[0x40]);
        put(&mut head, 0x40, b"PE\0\0\x64\xaa\x02\0");
        put(&mut head, 0x54, &[0xa0, 0, 6, 2]);
        for (at, name, size, start) in [
            (0xf8, b".text", 0x144_0000_u32, 0x1_0000_u32),
            (0x120, b".data", 0x5b_9a00, 0x145_0000),
        ] {
            put(&mut head, at, name);
            put(&mut head, at + 16, &size.to_le_bytes());
            put(&mut head, at + 20, &start.to_le_bytes());
        }
        head
    }

    #[test]
    fn debian_image() {
        let image = Arm64Image {
            text_offset: 0,
            image_size: 0x1ab_0000,
            page_size: Some(4096),
            placement: Placement::Anywhere,
            big_endian: false,
        };
        assert_eq!(recognise(&debian()), Ok(Format::Arm64(image)));
        // The file has 0x5c0 bytes of signature after this.
        assert_eq!(file_extent(&debian()), Some(0x1a0_9a00));
    }

    #[test]
    fn arm64_flags() {
        let parse = |flags| Arm64Image::parse(&arm64(0, 0x1000, flags)).unwrap();
        assert_eq!(parse(0).page_size, None);
        assert_eq!(parse(0).placement, Placement::NearRamBase);
        assert_eq!(parse(0x0c).page_size, Some(16384));
        assert_eq!(parse(0x0e).page_size, Some(65536));
        assert_eq!(parse(0x0e).placement, Placement::Anywhere);
        assert!(parse(1).big_endian);
        assert!(!parse(0x0e).big_endian);
    }

    #[test]
    fn kernels_before_3_17_lie_at_0x80000() {
        let image = Arm64Image::parse(&arm64(0x1234_5678_9abc, 0, 0)).unwrap();
        assert_eq!((image.text_offset, image.image_size), (0x8_0000, 0));
    }

    #[test]
    fn absurd_arm64_sizes() {
        let parse = |offset, size| Arm64Image::parse(&arm64(offset, size, 0));
        assert!(parse(0, MAX_IMAGE_SIZE).is_ok());
        for (text_offset, image_size) in [
            (0, MAX_IMAGE_SIZE + 1),
            (0x8_0000, MAX_IMAGE_SIZE),
            (0, u64::MAX),
            (u64::MAX, 0x1000),
        ] {
            let error = parse(text_offset, image_size).unwrap_err();
            assert_eq!(
                error,
                ImageError::ImageSize {
                    image_size,
                    text_offset
                }
            );
            assert!(error.to_string().contains(&format!("{image_size:#x}")));
        }
        assert_eq!(
            parse(0, 63),
            Err(ImageError::ImageTooSmall { image_size: 63 })
        );
    }

    #[test]
    fn short_and_foreign_arm64_headers() {
        let head = arm64(0, 0x1000, 0);
        assert_eq!(
            Arm64Image::parse(&head[..63]),
            Err(ImageError::Short {
                what: "an arm64 Image",
                len: 63,
                need: 64
            })
        );
        assert!(matches!(
            Arm64Image::parse(&bz(0x20f, 3)),
            Err(ImageError::Unknown { .. })
        ));
    }

    #[test]
    fn bz_image() {
        let Ok(Format::X86(image)) = recognise(&bz(0x20f, 0x7f)) else {
            panic!("not recognised")
        };
        assert_eq!(image.version, 0x20f);
        assert_eq!(image.xloadflags, 0x7f);
        assert!(image.relocatable);
        assert_eq!(image.payload, 40 * 512..40 * 512 + 0x1_0000);
        assert_eq!(image.init_size, 0x200_0000);
        assert_eq!(image.pref_address, 0x100_0000);
        assert_eq!(image.kernel_alignment, 0x20_0000);
        assert_eq!(image.cmdline_size, 2047);
        assert_eq!(image.setup_header.len(), 0x202 + 0x6a - 0x1f1);
        assert_eq!(&image.setup_header[0x11..0x15], b"HdrS");
    }

    #[test]
    fn no_setup_sectors_means_four() {
        let mut head = bz(0x20f, 1);
        head[0x1f1] = 0;
        assert_eq!(X86BzImage::parse(&head).unwrap().payload.start, 5 * 512);
    }

    #[test]
    fn refused_bz_images() {
        let error = X86BzImage::parse(&bz(0x20b, 1)).unwrap_err();
        assert_eq!(error, ImageError::BzVersion { version: 0x20b });
        assert!(error.to_string().contains("protocol 2.11"));
        assert_eq!(
            X86BzImage::parse(&bz(0x20f, 2)),
            Err(ImageError::Bz32Bit { xloadflags: 2 })
        );
        assert_eq!(
            X86BzImage::parse(&bz(0x20f, 1)[..0x240]),
            Err(ImageError::Short {
                what: "a bzImage",
                len: 0x240,
                need: 0x26c
            })
        );
        for (at, value) in [(0x260, 0_u32), (0x260, u32::MAX), (0x230, 0x30_0000)] {
            let mut head = bz(0x20f, 1);
            put(&mut head, at, &value.to_le_bytes());
            assert!(matches!(
                X86BzImage::parse(&head),
                Err(ImageError::BzSize { .. })
            ));
        }
    }

    #[test]
    fn zboot_before_the_image_mark() {
        // Also with the arm64 mark where a zboot file has another: "zimg" decides.
        let mut head = arm64(0, 0x1000, 0);
        put(&mut head, 0, b"MZ\0\0zimg");
        put(&mut head, 8, &0x5000_u32.to_le_bytes());
        put(&mut head, 12, &0x1234_u32.to_le_bytes());
        put(&mut head, 0x18, b"zstd22\0\0");
        assert_eq!(
            recognise(&head),
            Ok(Format::Zboot(Zboot {
                payload: 0x5000..0x6234,
                compression: "zstd22".into()
            }))
        );
        assert_eq!(
            recognise(&head[..0x30]),
            Err(ImageError::Short {
                what: "an EFI zboot file",
                len: 0x30,
                need: 0x38
            })
        );
        // Offsets near the end of u32 do not overflow.
        put(&mut head, 8, &[0xff; 8]);
        assert!(matches!(recognise(&head), Ok(Format::Zboot(_))));
    }

    #[test]
    fn compressed_forms() {
        let lzma = [b"\x5d\0\0\x80\0".as_slice(), &[0xff; 8]].concat();
        for (head, compression) in [
            (b"\x1f\x8b\x08\0".as_slice(), Compression::Gzip),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
            (b"\x04\x22\x4d\x18", Compression::Lz4),
            (b"\x02\x21\x4c\x18", Compression::Lz4Legacy),
            (b"\xfd7zXZ\0", Compression::Xz),
            (&lzma, Compression::Lzma),
        ] {
            assert_eq!(recognise(head), Ok(Format::Compressed(compression)));
        }
        // Text that begins with ']' is not .lzma.
        assert!(recognise(b"]\n[kernel]\nimage = ").is_err());
    }

    #[test]
    fn elf_files_are_named() {
        let mut head = b"\x7fELF\x02\x01\x01".to_vec();
        head.resize(64, 0);
        head[18] = 183;
        assert_eq!(recognise(&head), Ok(Format::Elf { machine: 183 }));
        // Big-endian arm64.
        head[5] = 2;
        put(&mut head, 18, &[0, 183]);
        assert_eq!(recognise(&head), Ok(Format::Elf { machine: 183 }));
        assert!(matches!(
            recognise(&head[..10]),
            Err(ImageError::Short { .. })
        ));
        let message = ImageError::Elf { machine: 183 }.to_string();
        assert!(message.contains("arm64") && message.contains("arch/arm64/boot/Image"));
    }

    #[test]
    fn refused_by_name() {
        let mut riscv = arm64(0, 0x1000, 0);
        put(&mut riscv, 0x38, b"RSC\x05");
        let mut zimage = vec![0; 64];
        put(&mut zimage, 0x24, &0x016f_2818_u32.to_le_bytes());
        for (head, name) in [
            (b"\x27\x05\x19\x56".as_slice(), "uImage"),
            (b"\xd0\x0d\xfe\xed", "FIT"),
            (b"ANDROID!", "Android"),
            (b"\x89LZO\0\r\n\x1a\n", "lzop"),
            (b"BZh9", "bzip2"),
            (b"070701", "cpio"),
            (b"MZ\x90\0", "EFI program"),
            (&riscv, "RISC-V"),
            (&zimage, "32-bit arm zImage"),
        ] {
            let error = recognise(head).unwrap_err();
            assert!(matches!(error, ImageError::Unsupported { .. }), "{error}");
            let message = error.to_string();
            assert!(message.contains(name), "{message}");
            assert!(message.contains("zboot"), "says what works: {message}");
        }
    }

    #[test]
    fn unknown_bytes_are_shown() {
        let error = recognise(b"#!/bin/sh").unwrap_err();
        assert_eq!(
            error,
            ImageError::Unknown {
                start: b"#!/bin/s".to_vec()
            }
        );
        assert!(error.to_string().contains("[23, 21, 2f"));
        assert_eq!(recognise(b""), Err(ImageError::Unknown { start: vec![] }));
    }

    #[test]
    fn architectures_are_told_apart() {
        let arm = Header::Arm64(Arm64Image::parse(&debian()).unwrap());
        let x86 = Header::X86(X86BzImage::parse(&bz(0x20f, 1)).unwrap());
        assert!(arm.arm64().is_ok() && x86.x86_64().is_ok());
        let message = x86.arm64().unwrap_err().to_string();
        assert!(message.starts_with("this is an x86_64 bzImage; an arm64 guest takes"));
        assert!(
            arm.x86_64()
                .unwrap_err()
                .to_string()
                .contains("this is an arm64 Image")
        );
    }

    #[test]
    fn damaged_section_tables() {
        let good = debian();
        // Cut off: the table alone needs more.
        assert_eq!(file_extent(&good[..64]), Some(0x58));
        assert_eq!(file_extent(&good[..0x140]), Some(0x148));
        let damaged = |at, value: u32| {
            let mut head = good.clone();
            put(&mut head, at, &value.to_le_bytes());
            file_extent(&head)
        };
        assert_eq!(damaged(0, 0), None);
        assert_eq!(damaged(0x40, 0), None);
        assert_eq!(damaged(0x3c, u32::MAX), Some(0xffff_ffff + 24));
        assert_eq!(damaged(0x46, 0xffff), Some(0x40 + 24 + 0xa0 + 0xffff * 40));
        // Ends beyond 4 GiB do not wrap.
        let mut head = good.clone();
        put(&mut head, 0x120 + 16, &[0xff; 8]);
        assert_eq!(file_extent(&head), Some(0x1_ffff_fffe));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(head in proptest::collection::vec(any::<u8>(), 0..700)) {
            let _ = recognise(&head).map_err(|error| error.to_string());
            let _ = file_extent(&head);
        }

        /// Good headers cut anywhere, with a byte changed anywhere.
        #[test]
        fn no_damage_panics(
            which in 0..3,
            cut in 0..HEAD,
            at in 0..HEAD,
            value: u8,
        ) {
            let mut head = match which {
                0 => debian(),
                1 => bz(0x20f, 1),
                _ => [b"MZ\0\0zimg".as_slice(), &debian()[8..]].concat(),
            };
            head.truncate(cut);
            if let Some(byte) = head.get_mut(at) {
                *byte = value;
            }
            let _ = recognise(&head).map_err(|error| error.to_string());
            let _ = Arm64Image::parse(&head);
            let _ = X86BzImage::parse(&head);
            let _ = file_extent(&head);
        }
    }
}
