//! Why a file is not a kernel that can be started.

use super::bytes::MAX_IMAGE_SIZE;
use thiserror::Error;

/// What would work, for messages about things that do not.
pub(super) const WANTED: &str = "an arm64 guest takes an arm64 Image: plain, compressed with gzip, zstd, \
                      lz4, xz or lzma, or as an EFI zboot file";

pub(super) const X86_WANTED: &str = "an x86_64 guest takes a bzImage or an ELF vmlinux";

/// Why bytes are not a kernel that can be started.
#[derive(Clone, PartialEq, Eq, Error)]
pub enum ImageError {
    /// An unknown format.
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
        /// The size of the header in bytes.
        need: usize,
    },
    /// A known format that cannot be started.
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

/// Prints the message: a derived implementation would put the names of all variants and fields,
/// which are never shown, into the binary.
impl std::fmt::Debug for ImageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
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

/// Returns the error for bytes that no known format begins with.
pub(super) fn unknown(head: &[u8]) -> ImageError {
    ImageError::Unknown {
        start: head[..head.len().min(8)].to_vec(),
    }
}
