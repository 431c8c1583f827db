//! Kernel and initrd files: opened once, recognised by content, and loaded into guest memory at
//! each start.
//!
//! A plain Image is read straight into guest memory. A compressed one is unpacked into it as a
//! stream, by a process that can do nothing else (`unpacker`): nobody holds a copy, that process only
//! the decompressor's window (gzip 32 KiB, lz4 at most 16 MiB, zstd, xz and lzma at most
//! [`MAX_WINDOW`]).

use anyhow::{Context as _, Result, ensure};
use armlet_arch::image::{self, Compression, Format, HEAD, Header, ImageError, MAX_IMAGE_SIZE};
use armlet_arch::image::{MAX_NOTES, X86Elf, X86Kernel};
use read::{open_regular, read_at, read_head, read_span};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use unpack::lz4_legacy_span;

mod initrd;
mod read;
mod unpack;
mod unpacker;

pub use initrd::Initrd;
pub use unpack::MAX_WINDOW;
use unpacker::Unpacker;

/// An open kernel file: loading it again after a reset reads the same inode, whatever happens to
/// the path.
#[derive(Debug)]
pub struct Kernel {
    path: PathBuf,
    file: File,
    /// Size of the file when it was opened, bytes.
    file_size: u64,
    packing: Packing,
    header: Header,
    /// The size in bytes that the kernel's section table implies, if it has one.
    extent: Option<u64>,
}

/// Where in the file the kernel is, and how it is compressed.
#[derive(Debug)]
struct Packing {
    zboot: bool,
    compression: Option<Compression>,
    /// File bytes of the (compressed) kernel.
    span: Range<u64>,
    /// The unpacked size in bytes, where the file states it apart from the data.
    unpacked: Option<u64>,
    /// What unpacks it, if it is compressed.
    unpacker: Option<Unpacker>,
}

impl Kernel {
    /// Opens a kernel file and reads its header: an arm64 Image, plain, compressed or in an EFI
    /// zboot file, or an x86_64 bzImage or ELF vmlinux.
    ///
    /// # Errors
    /// When the path is not a readable regular file, or its content is not such a kernel: then an
    /// [`ImageError`] or the decompressor's error is in the chain.
    pub fn open(path: &Path) -> Result<Self> {
        open_kernel(path).with_context(|| format!("cannot open kernel {}", path.display()))
    }

    /// Returns what the kernel's header says.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Returns how many bytes of guest memory the kernel needs from its load address on, according
    /// to its header. Kernels before 3.17 do not state it and get twice the file's size, for a BSS
    /// of unknown size.
    #[must_use]
    pub fn memory_size(&self) -> u64 {
        match &self.header {
            Header::Arm64(image) if image.image_size == 0 => 2 * self.file_size,
            Header::Arm64(image) => image.image_size,
            Header::X86(X86Kernel::Bz(image)) => image.init_size,
            Header::X86(X86Kernel::Elf(elf)) => elf.memory().end - elf.memory().start,
        }
    }

    /// Describes the kernel: `gzip-compressed arm64 Image, 26 MiB, 4 KiB pages`. The
    /// size is [`Self::memory_size`].
    #[must_use]
    pub fn describe(&self) -> String {
        let packing = match (self.packing.zboot, self.packing.compression) {
            (true, Some(compression)) => format!("EFI zboot ({}) ", compression.name()),
            (false, Some(compression)) => format!("{}-compressed ", compression.name()),
            (_, None) => String::new(),
        };
        let size = self.memory_size().div_ceil(1 << 20);
        match &self.header {
            Header::Arm64(image) => {
                let pages = match image.page_size {
                    Some(bytes) => format!("{} KiB pages", bytes / 1024),
                    None => "page size not stated".into(),
                };
                let endian = if image.big_endian { ", big-endian" } else { "" };
                format!("{packing}arm64 Image, {size} MiB, {pages}{endian}")
            }
            Header::X86(X86Kernel::Bz(image)) => format!(
                "{packing}x86_64 bzImage, {size} MiB, boot protocol {}.{:02}",
                image.version >> 8,
                image.version & 0xff
            ),
            Header::X86(X86Kernel::Elf(_)) => format!("x86_64 ELF vmlinux, {size} MiB"),
        }
    }

    /// Loads the kernel at the start of `dst`, the guest memory set aside for it
    /// ([`Self::memory_size`] bytes), while nothing else uses that memory. Returns the number of
    /// bytes written; the rest is left unchanged. Of a bzImage the protected-mode part is loaded.
    ///
    /// # Errors
    /// When the file has changed since it was opened, when its data is damaged or truncated, or
    /// exceeds `dst`; `dst` is then partly written. Damage is detected by checksums, which plain
    /// Images, legacy lz4 and lzma data do not have.
    pub fn load_into(&self, dst: &mut [u8]) -> Result<u64> {
        self.load(dst)
            .with_context(|| format!("cannot load kernel {}", self.path.display()))
    }

    fn load(&self, dst: &mut [u8]) -> Result<u64> {
        if let Header::X86(X86Kernel::Elf(elf)) = &self.header {
            return load_elf(&self.file, elf, self.file_size, dst);
        }
        let written = match self.packing.compression {
            None => read_span(&self.file, &self.packing.span, self.file_size, dst)?,
            Some(_) => {
                let unpacker = self.packing.unpacker.as_ref();
                unpacker.context("nothing unpacks it")?.all(dst)?
            }
        };
        if let Some(stated) = self.packing.unpacked {
            ensure!(
                stated == written,
                "truncated or damaged: unpacks to {written} bytes, its last word says {stated}"
            );
        }
        check_extent(self.extent, written)?;
        // The machine was planned from the header read at open.
        if let Header::Arm64(opened) = &self.header {
            let loaded = &dst[..HEAD.min(written as usize)];
            ensure!(
                image::recognise(loaded) == Ok(Format::Arm64(opened.clone())),
                "its header changed since it was opened"
            );
        }
        Ok(written)
    }
}

fn open_kernel(path: &Path) -> Result<Kernel> {
    let (file, file_size) = open_regular(path)?;
    ensure!(
        file_size <= MAX_IMAGE_SIZE,
        "it has {file_size} bytes; a kernel has at most {MAX_IMAGE_SIZE}"
    );
    let head = read_head(&file, &(0..file_size))?;
    let whole = |compression| Packing {
        zboot: false,
        compression,
        span: 0..file_size,
        unpacked: None,
        unpacker: None,
    };
    let (packing, header, extent) = match image::recognise(&head)? {
        Format::Arm64(image) => {
            let extent = image::file_extent(&head);
            check_extent(extent, file_size)?;
            check_fits(file_size, image.image_size)?;
            (whole(None), Header::Arm64(image), extent)
        }
        Format::X86(image) => {
            check_extent(Some(image.payload.end), file_size)?;
            let mut packing = whole(None);
            packing.span = image.payload.clone();
            (packing, Header::X86(X86Kernel::Bz(image)), None)
        }
        Format::Elf { machine: X86_64 } => {
            let elf = open_elf(&file, &head)?;
            check_extent(Some(elf.extent()), file_size)?;
            (whole(None), Header::X86(X86Kernel::Elf(elf)), None)
        }
        Format::Elf { machine } => return Err(ImageError::Elf { machine }.into()),
        Format::Compressed(compression) => {
            open_packed(&file, whole(Some(compression)), compression)?
        }
        Format::Zboot(zboot) => {
            let span = zboot.payload;
            if span.is_empty() || span.end > file_size {
                return Err(ImageError::ZbootPayload {
                    offset: span.start,
                    size: span.end - span.start,
                    len: file_size,
                }
                .into());
            }
            let inside = || format!("in the EFI zboot payload ({})", zboot.compression);
            let payload = image::recognise(&read_head(&file, &span)?).with_context(inside)?;
            let Format::Compressed(compression) = payload else {
                return Err(not_packable("EFI zboot", &payload)).with_context(inside);
            };
            let packing = Packing {
                zboot: true,
                compression: Some(compression),
                span,
                unpacked: None,
                unpacker: None,
            };
            open_packed(&file, packing, compression).with_context(inside)?
        }
    };
    Ok(Kernel {
        path: path.into(),
        file,
        file_size,
        packing,
        header,
        extent,
    })
}

/// `e_machine` of x86_64 (System V ABI, AMD64 supplement, section 4.1).
const X86_64: u16 = 62;

/// Reads an ELF file's headers and notes.
fn open_elf(file: &File, head: &[u8]) -> Result<X86Elf> {
    let mut elf = X86Elf::parse(head)?;
    let len = (elf.notes.end - elf.notes.start).min(MAX_NOTES);
    let mut notes = vec![0; len as usize];
    let got = read_at(file, &mut notes, elf.notes.start).context("cannot read it")?;
    elf.find_entry(&notes[..got])?;
    Ok(elf)
}

/// Loads the segments of an ELF file at their offsets from the first one, and zeros the gaps.
fn load_elf(file: &File, elf: &X86Elf, opened: u64, dst: &mut [u8]) -> Result<u64> {
    let memory = elf.memory();
    let room = dst.len();
    let dst = usize::try_from(memory.end - memory.start)
        .ok()
        .and_then(|len| dst.get_mut(..len))
        .with_context(|| format!("its segments do not fit into the {room} bytes set aside"))?;
    let within = |address: u64| (address - memory.start) as usize;
    // After a reset the memory still holds the guest's data.
    let mut in_order: Vec<_> = elf.segments.iter().map(|segment| &segment.memory).collect();
    in_order.sort_by_key(|memory| memory.start);
    let mut filled = 0;
    for segment in in_order {
        if let Some(gap) = dst.get_mut(filled..within(segment.start)) {
            gap.fill(0);
        }
        filled = filled.max(within(segment.end));
    }
    for segment in &elf.segments {
        let [start, end] = [segment.memory.start, segment.memory.end].map(within);
        let written = read_span(file, &segment.file, opened, &mut dst[start..end])?;
        dst[start + written as usize..end].fill(0);
    }
    Ok(dst.len() as u64)
}

/// Unpacks the first bytes of compressed data, which must be those of an arm64 Image.
fn open_packed(
    file: &File,
    mut packing: Packing,
    compression: Compression,
) -> Result<(Packing, Header, Option<u64>)> {
    if compression == Compression::Lz4Legacy {
        (packing.span, packing.unpacked) = lz4_legacy_span(file, packing.span)?;
    }
    let unpacker = Unpacker::start(file, &packing.span, compression)?;
    let head = unpacker.head()?;
    packing.unpacker = Some(unpacker);
    let name = compression.name();
    let format = image::recognise(&head).with_context(|| format!("in the {name} data"))?;
    let Format::Arm64(image) = format else {
        return Err(not_packable(name, &format));
    };
    // Without a size, the unpacked data would be unbounded.
    ensure!(image.image_size > 0, ImageError::SizeUnknown);
    let extent = image::file_extent(&head);
    Ok((packing, Header::Arm64(image), extent))
}

fn not_packable(outer: &'static str, inner: &Format) -> anyhow::Error {
    let inner = match inner {
        Format::Arm64(_) => "an uncompressed arm64 Image",
        Format::X86(_) => "an x86_64 bzImage",
        Format::Elf { .. } => "an ELF file",
        Format::Zboot(_) => "an EFI zboot file",
        Format::Compressed(_) => "compressed data again",
    };
    ImageError::Packed { outer, inner }.into()
}

fn check_extent(extent: Option<u64>, len: u64) -> Result<(), ImageError> {
    match extent {
        Some(need) if len < need => Err(ImageError::Truncated { len, need }),
        _ => Ok(()),
    }
}

/// Refuses a plain Image whose file is larger than its memory size.
fn check_fits(file_size: u64, image_size: u64) -> Result<()> {
    ensure!(
        image_size == 0 || file_size <= image_size,
        "it has {file_size} bytes, more than the {image_size} that its header asks for: \
         something is appended to the Image"
    );
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests;
