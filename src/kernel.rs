//! Kernel and initrd files: opened once, recognised by content, loaded into guest memory as often
//! as the guest starts.
//!
//! A plain Image is read straight into guest memory. A compressed one is unpacked into it as a
//! stream: the VMM never holds a copy, only what the decompressor itself keeps (gzip 32 KiB, lz4
//! at most 16 MiB, zstd, xz and lzma what their window asks for, at most [`MAX_WINDOW`]).

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use armlet_arch::image::{self, Compression, Format, HEAD, Header, ImageError, MAX_IMAGE_SIZE};
use armlet_arch::image::{MAX_NOTES, X86Elf, X86Kernel};
use armlet_system::eintr::uninterrupted;
use armlet_system::files::{self, Accepted};
use ruzstd::decoding::{
    BlockDecodingStrategy, FrameDecoder, StreamingDecoder, errors::FrameDecoderError,
};
use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// The largest window (dictionary) that data may ask for, bytes. The kernel's own build uses
/// `zstd --ultra -22` on a pipe, which asks for just this much (scripts/Makefile.lib).
pub const MAX_WINDOW: u64 = 128 << 20;

/// Compressed bytes read from the file, and unpacked bytes asked for, at a time.
const BUFFER: usize = 64 << 10;

/// A kernel file that stays open: loading again after a reset reads the same inode, whatever
/// happens to the path.
#[derive(Debug)]
pub struct Kernel {
    path: PathBuf,
    file: File,
    /// Size of the file when it was opened, bytes.
    file_size: u64,
    packing: Packing,
    header: Header,
    /// Bytes that the kernel's sections claim, if it has a section table.
    extent: Option<u64>,
}

/// Where in the file the kernel lies, and how it is packed.
#[derive(Debug)]
struct Packing {
    zboot: bool,
    compression: Option<Compression>,
    /// File bytes of the (compressed) kernel.
    span: Range<u64>,
    /// Unpacked size in bytes, where something apart from the data states it.
    unpacked: Option<u64>,
}

impl Kernel {
    /// Opens a kernel file and reads its header: an arm64 Image, plain, compressed or in an EFI
    /// zboot file, or an x86_64 bzImage or ELF vmlinux.
    ///
    /// # Errors
    /// A path that is no readable regular file, and everything in it that is not such a kernel:
    /// then an [`ImageError`] or the decompressor's error is in the chain.
    pub fn open(path: &Path) -> Result<Self> {
        open_kernel(path).with_context(|| format!("cannot open kernel {}", path.display()))
    }

    /// What the kernel's header says.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of guest memory that the kernel needs from its load address on: what its header asks
    /// for. A kernel of before 3.17 does not say; it gets twice its file, for a BSS of unknown
    /// size.
    #[must_use]
    pub fn memory_size(&self) -> u64 {
        match &self.header {
            Header::Arm64(image) if image.image_size == 0 => 2 * self.file_size,
            Header::Arm64(image) => image.image_size,
            Header::X86(X86Kernel::Bz(image)) => image.init_size,
            Header::X86(X86Kernel::Elf(elf)) => elf.memory().end - elf.memory().start,
        }
    }

    /// The kernel in words, for people: `gzip-compressed arm64 Image, 26 MiB, 4 KiB pages`. The
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

    /// Loads the kernel to the start of `dst`, the guest memory set aside for it
    /// ([`Self::memory_size`] bytes), while nothing else uses that memory. Returns the bytes
    /// written; what follows them is left as it is. Of a bzImage the protected-mode part is
    /// loaded.
    ///
    /// # Errors
    /// A file that changed since it was opened, damaged or truncated data, and data that exceed
    /// `dst`: unpacking stops there. `dst` is then partly written. Damage is told by checksums,
    /// which plain Images, legacy lz4 and lzma data do not have.
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
            Some(compression) => unpack_all(&self.file, &self.packing.span, compression, dst)?,
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

/// An initial RAM disk that stays open. What is in it is the guest's business.
#[derive(Debug)]
pub struct Initrd {
    path: PathBuf,
    file: File,
    size: u64,
}

impl Initrd {
    /// Opens an initrd file.
    ///
    /// # Errors
    /// A path that is no readable regular file, or an empty one.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, size) =
            open_regular(path).with_context(|| format!("cannot open initrd {}", path.display()))?;
        Ok(Self {
            path: path.into(),
            file,
            size,
        })
    }

    /// Bytes that [`Self::load_into`] writes: the size of the file when it was opened.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Loads the initrd to the start of `dst`, at least [`Self::size`] bytes of guest memory. Of a
    /// file that grew since, only as many bytes are read.
    ///
    /// # Errors
    /// The file shrank, cannot be read, or `dst` is too small.
    pub fn load_into(&self, dst: &mut [u8]) -> Result<u64> {
        read_span(&self.file, &(0..self.size), self.size, dst)
            .with_context(|| format!("cannot load initrd {}", self.path.display()))
    }
}

/// Opens a file that has bytes, and returns it with their number.
fn open_regular(path: &Path) -> Result<(File, u64)> {
    let file = files::open(path, Accepted::File, false)?;
    let size = file.metadata()?.len();
    ensure!(size > 0, "it is empty");
    Ok((file, size))
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

/// Loads the segments of an ELF file to where they lie behind the first, and zeros between them.
fn load_elf(file: &File, elf: &X86Elf, opened: u64, dst: &mut [u8]) -> Result<u64> {
    let memory = elf.memory();
    let room = dst.len();
    let dst = usize::try_from(memory.end - memory.start)
        .ok()
        .and_then(|len| dst.get_mut(..len))
        .with_context(|| format!("its segments do not fit into the {room} bytes set aside"))?;
    for segment in &elf.segments {
        let [start, end] = [segment.memory.start, segment.memory.end]
            .map(|address| (address - memory.start) as usize);
        let written = read_span(file, &segment.file, opened, &mut dst[start..end])?;
        // After a reset there is what the guest left.
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
    let head = unpack_head(file, &packing.span, compression)?;
    let name = compression.name();
    let format = image::recognise(&head).with_context(|| format!("in the {name} data"))?;
    let Format::Arm64(image) = format else {
        return Err(not_packable(name, &format));
    };
    // With no size, there is no bound for what the data may unpack to.
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

/// Refuses a plain Image with more bytes in its file than in memory.
fn check_fits(file_size: u64, image_size: u64) -> Result<()> {
    ensure!(
        image_size == 0 || file_size <= image_size,
        "it has {file_size} bytes, more than the {image_size} that its header asks for: \
         something is appended to the Image"
    );
    Ok(())
}

/// Reads the first [`HEAD`] bytes of a span, or all of a smaller one.
fn read_head(file: &File, span: &Range<u64>) -> Result<Vec<u8>> {
    let len = (span.end - span.start).min(HEAD as u64);
    let mut head = vec![0; len as usize];
    let got = read_at(file, &mut head, span.start).context("cannot read it")?;
    head.truncate(got);
    Ok(head)
}

/// Reads file bytes straight to the start of `dst`. `opened` is the file's size at open.
fn read_span(file: &File, span: &Range<u64>, opened: u64, dst: &mut [u8]) -> Result<u64> {
    let (len, room) = (span.end - span.start, dst.len());
    let Some(dst) = usize::try_from(len).ok().and_then(|len| dst.get_mut(..len)) else {
        bail!("its {len} bytes do not fit into the {room} set aside for them");
    };
    let got = read_at(file, dst, span.start).context("cannot read it")?;
    ensure!(
        got == dst.len(),
        "the file shrank: it had {opened} bytes when it was opened, now {}",
        file.metadata().map_or(span.start + got as u64, |m| m.len())
    );
    Ok(len)
}

/// Reads until `dst` is full or the file ends; returns the number of bytes.
fn read_at(file: &File, dst: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < dst.len() {
        match uninterrupted(|| file.read_at(&mut dst[done..], offset + done as u64))? {
            0 => break,
            got => done += got,
        }
    }
    Ok(done)
}

/// Unpacks a span to the start of `dst`, to its end and no further. Returns the bytes written.
fn unpack_all(
    file: &File,
    span: &Range<u64>,
    compression: Compression,
    dst: &mut [u8],
) -> Result<u64> {
    let mut reader = unpacker(file, span, compression)?;
    let written = unpack(&mut *reader, compression, dst)?;
    // The end of the data has still to come, with its checksum.
    if written == dst.len() && unpack(&mut *reader, compression, &mut [0])? > 0 {
        bail!(
            "the {} data unpack to more than the {} bytes that the kernel's header asks for",
            compression.name(),
            dst.len()
        );
    }
    Ok(written as u64)
}

/// Unpacks the first [`HEAD`] bytes, or all of fewer.
fn unpack_head(file: &File, span: &Range<u64>, compression: Compression) -> Result<Vec<u8>> {
    let mut head = vec![0; HEAD];
    let mut reader = match compression {
        Compression::Zstd => zstd_head(file, span)?,
        _ => unpacker(file, span, compression)?,
    };
    let got = unpack(&mut *reader, compression, &mut head)?;
    head.truncate(got);
    Ok(head)
}

/// Reads unpacked bytes until `dst` is full or they end.
fn unpack(reader: &mut dyn Read, compression: Compression, dst: &mut [u8]) -> Result<usize> {
    let mut done = 0;
    while done < dst.len() {
        // By pieces: after an error nobody knows how much of its piece was written.
        let end = dst.len().min(done + BUFFER);
        match uninterrupted(|| reader.read(&mut dst[done..end])) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(error) => return Err(damaged(error, compression, done)),
        }
    }
    Ok(done)
}

/// The error for data that a decompressor does not take after it made about `done` bytes.
fn damaged(error: io::Error, compression: Compression, done: usize) -> anyhow::Error {
    let name = compression.name();
    if error.kind() == ErrorKind::OutOfMemory {
        // How lzma-rust2 refuses a dictionary over its limit.
        let limit = MAX_WINDOW >> 20;
        return anyhow!("the {name} data need a dictionary of more than {limit} MiB");
    }
    // The decompressors repeat each cause in its effect: the first one says it all.
    let mut cause: &dyn std::error::Error = &error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    match cause.downcast_ref::<io::Error>() {
        // Only the system's errors carry its number: it is the file that cannot be read.
        Some(system) if system.raw_os_error().is_some() => anyhow!("cannot read it: {system}"),
        _ => anyhow!("truncated or damaged {name} data after {done} bytes: {cause}"),
    }
}

/// A stream of the unpacked bytes.
fn unpacker<'a>(
    file: &'a File,
    span: &Range<u64>,
    compression: Compression,
) -> Result<Box<dyn Read + 'a>> {
    let input = Span::buffered(file, span);
    // lzma-rust2 counts in KiB, and its own tables with the dictionary: .xz 104 KiB, .lzma 22.
    let limit = (MAX_WINDOW >> 10) as u32 + 128;
    Ok(match compression {
        Compression::Gzip => Box::new(flate2::bufread::GzDecoder::new(input)),
        Compression::Zstd => Box::new(Zstd(
            StreamingDecoder::new_with_decoder(input, zstd()).map_err(zstd_refusal)?,
        )),
        Compression::Lz4 | Compression::Lz4Legacy => Box::new(Lz4 {
            decoder: lz4_flex::frame::FrameDecoder::new(input),
            ends_with_input: compression == Compression::Lz4Legacy,
        }),
        Compression::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(input, false, limit)),
        Compression::Lzma => Box::new(
            lzma_rust2::LzmaReader::new_mem_limit(input, limit, None)
                .map_err(|error| damaged(error, compression, 0))?,
        ),
    })
}

/// The bytes of a span of a file, read through a buffer. It reads by position, so it moves no
/// offset that others share.
type Input<'a> = BufReader<Span<'a>>;

struct Span<'a> {
    file: &'a File,
    position: u64,
    end: u64,
    /// A decompressor asked for more bytes than there are.
    exhausted: bool,
}

impl<'a> Span<'a> {
    fn buffered(file: &'a File, span: &Range<u64>) -> Input<'a> {
        let span = Self {
            file,
            position: span.start,
            end: span.end,
            exhausted: false,
        };
        BufReader::with_capacity(BUFFER, span)
    }
}

impl Read for Span<'_> {
    fn read(&mut self, dst: &mut [u8]) -> io::Result<usize> {
        let left = (self.end - self.position).min(dst.len() as u64) as usize;
        let got = self.file.read_at(&mut dst[..left], self.position)?;
        self.position += got as u64;
        self.exhausted |= got == 0;
        Ok(got)
    }
}

fn zstd() -> FrameDecoder {
    let mut decoder = FrameDecoder::new();
    decoder.set_max_window_size(MAX_WINDOW);
    decoder
}

/// The first blocks of a zstd frame, enough for [`HEAD`] bytes. The decoder gives out only what
/// has left its window, which may be larger than the whole kernel; therefore the frame is ended
/// early with an empty last block of our own.
fn zstd_head<'a>(file: &File, span: &Range<u64>) -> Result<Box<dyn Read + 'a>> {
    // RFC 8878, 3.1.1.2: Last_Block, Raw_Block, size 0; then four bytes for a content checksum,
    // which the decoder reads and does not compare.
    const END: [u8; 7] = [1, 0, 0, 0, 0, 0, 0];
    let mut input = Span::buffered(file, span);
    let mut decoder = zstd();
    decoder
        .init(&mut input)
        .and_then(|()| decoder.decode_blocks(&mut input, BlockDecodingStrategy::UptoBytes(HEAD)))
        .and_then(|finished| match finished {
            true => Ok(true),
            false => decoder.decode_blocks(&END[..], BlockDecodingStrategy::All),
        })
        .map_err(zstd_refusal)?;
    Ok(Box::new(decoder))
}

/// zstd with the comparison of the content checksum, which ruzstd leaves to its user.
struct Zstd<'a>(StreamingDecoder<Input<'a>, FrameDecoder>);

impl Read for Zstd<'_> {
    fn read(&mut self, dst: &mut [u8]) -> io::Result<usize> {
        let got = self.0.read(dst)?;
        let stated = self.0.decoder.get_checksum_from_data();
        if got == 0
            && !dst.is_empty()
            && stated.is_some()
            && stated != self.0.decoder.get_calculated_checksum()
        {
            return Err(io::Error::other("the content checksum differs"));
        }
        Ok(got)
    }
}

fn zstd_refusal(error: FrameDecoderError) -> anyhow::Error {
    match error {
        FrameDecoderError::WindowSizeTooBig { requested, max } => anyhow!(
            "the zstd data need a window of {} MiB; {} MiB (zstd --long=27) is the most",
            requested.div_ceil(1 << 20),
            max >> 20
        ),
        error => damaged(io::Error::other(error), Compression::Zstd, 0),
    }
}

/// LZ4 of both formats. lz4_flex takes an end of input between two blocks for the end of the
/// data: that is so in the legacy format, which has no end mark, and truncation in the other.
struct Lz4<'a> {
    decoder: lz4_flex::frame::FrameDecoder<Input<'a>>,
    ends_with_input: bool,
}

impl Read for Lz4<'_> {
    fn read(&mut self, dst: &mut [u8]) -> io::Result<usize> {
        let got = self.decoder.read(dst)?;
        let exhausted = self.decoder.get_ref().get_ref().exhausted;
        if got == 0 && !dst.is_empty() && exhausted && !self.ends_with_input {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(got)
    }
}

/// Finds where legacy LZ4 data end, by going from block to block: they have no end mark, and the
/// kernel's build may append the unpacked size as a 32-bit word (`lz4_with_size` in
/// scripts/Makefile.lib), which the decoder would take for a block. Returns the bytes without
/// that word, and the word.
fn lz4_legacy_span(file: &File, span: Range<u64>) -> Result<(Range<u64>, Option<u64>)> {
    // Every block but the last unpacks to 8 MiB; LZ4_compressBound(8 MiB) of lz4.h.
    const LARGEST: u64 = (8 << 20) + (8 << 20) / 255 + 16;
    // For kernels of up to MAX_IMAGE_SIZE 128 would do; a bound for files made of tiny blocks.
    const BLOCKS: usize = 4096;
    let mut at = span.start + 4; // the magic number
    for _ in 0..BLOCKS {
        let left = span.end.saturating_sub(at);
        if left == 0 {
            return Ok((span, None));
        }
        let mut word = [0; 4];
        let got = read_at(file, &mut word, at).context("cannot read it")?;
        let word = u64::from(u32::from_le_bytes(word));
        if left == 4 && got == 4 {
            return Ok((span.start..at, Some(word)));
        }
        let end = at + 4 + word;
        if got < 4 || word == 0 || word > LARGEST || end > span.end {
            bail!(
                "truncated or damaged lz4 data: a block at {at:#x} claims {word} of {left} bytes"
            );
        }
        at = end;
    }
    bail!("damaged lz4 data: more than {BLOCKS} blocks")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests;
