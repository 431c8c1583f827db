//! Kernel and initrd files: opened once, recognised by content, loaded into guest memory as often
//! as the guest starts.
//!
//! A plain Image is read straight into guest memory. A compressed one is unpacked into it as a
//! stream: the VMM never holds a copy, only what the decompressor itself keeps (gzip 32 KiB, lz4
//! at most 16 MiB, zstd, xz and lzma what their window asks for, at most [`MAX_WINDOW`]).

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use armlet_arch::image::{self, Compression, Format, HEAD, Header, ImageError, MAX_IMAGE_SIZE};
use ruzstd::decoding::{
    BlockDecodingStrategy, FrameDecoder, StreamingDecoder, errors::FrameDecoderError,
};
use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
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
    /// zboot file, or an x86_64 bzImage.
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
            Header::X86(image) => image.init_size,
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
            Header::X86(image) => format!(
                "{packing}x86_64 bzImage, {size} MiB, boot protocol {}.{:02}",
                image.version >> 8,
                image.version & 0xff
            ),
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
    // Before opening, because opening alone does things to devices (a watchdog starts) ...
    check_regular(&std::fs::metadata(path)?)?;
    let file = File::options()
        .read(true)
        // ... and without waiting for a FIFO's writer, should one have taken the file's place.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    check_regular(&metadata)?;
    ensure!(metadata.len() > 0, "it is empty");
    Ok((file, metadata.len()))
}

fn check_regular(metadata: &std::fs::Metadata) -> Result<()> {
    ensure!(!metadata.is_dir(), "it is a directory");
    ensure!(
        metadata.is_file(),
        "it is not a regular file but a device, FIFO or socket"
    );
    Ok(())
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
            (packing, Header::X86(image), None)
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
        match file.read_at(&mut dst[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
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
        match reader.read(&mut dst[done..end]) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
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
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write as _;
    use tempfile::NamedTempFile;

    // `image()` by the tool in the comment, reading a pipe (gzip 1.12, zstd 1.5.4, lz4 1.9.4, xz
    // 5.4.1).

    // `gzip -n -9`
    const GZIP: &str = "\
        1f8b0800000000000203edce3d0e82401040e1111011450515ffc5a34041b989b1a4de23cd293ca2952fb1a1\
        2026b66626f932c916f3d675f54bfa73fbac54be4ff370be66df5b11ff1c0d9df86d26e89d894594274d3005\
        ffd119e6c8b0c0122be428b0c6065b94d8618f038e38e18c0baea8404ac96a801011c6b0bef5ad6f7deb5bff\
        9ffb6fe54bfaa200080000";
    // `zstd -q -22 --ultra -`
    const ZSTD: &str = "\
        28b52ffd0488bd0300124a1821a06b1903ffffffe717fdffe85c13450fe32feefbbeeffbbeeffb7bf6fbffff\
        4e017bb0053bb0015bdaf7666b766663f6655b766553f6644b766443f6633b766333f6622b766223f66153db\
        b00b7bda844f92e8daf3797559a04eeae71c55212b0600807207f6a512621a22c0084805a2e4c01beecba7cb";
    // `lz4 -q -9 - -`
    const LZ4: &str = "\
        04224d186440a7c1000000584d5a40fa000100122007002f0a0001000bfe0041524d64400000005045000064\
        aa0143000f01001d47070000004700ff71060000940700009408000094090000940a0000940b0000940c0000\
        940d0000940e0000940f00009410000094110000941200009413000094140000941500009416000094170000\
        9418000094190000941a0000941b0000941c0000941d0000941e0000941f0000940000009401000094020000\
        940300009404000094050000948000ffffffffffffd650941f00009400000000b0511d9b";
    // `lz4 -q -l -9 - -`
    const LZ4_LEGACY: &str = "\
        02214c18c1000000584d5a40fa000100122007002f0a0001000bfe0041524d64400000005045000064aa0143\
        000f01001d47070000004700ff71060000940700009408000094090000940a0000940b0000940c0000940d00\
        00940e0000940f00009410000094110000941200009413000094140000941500009416000094170000941800\
        0094190000941a0000941b0000941c0000941d0000941e0000941f0000940000009401000094020000940300\
        009404000094050000948000ffffffffffffd650941f000094";
    // `xz --check=crc32 --arm64 --lzma2=dict=128MiB`
    const XZ: &str = "\
        fd377a585a0000016922de3602010a0021011e00756de6ede007ff01475d002696840e9fcf0738be7b391486\
        a791b76f3a309ceba0e54872ea95ccb7bc3728eef196eca3c5b9878b8f9e3b51aedecc39fd202e07154a4b8e\
        e70ef6343db7e05387a22e12a52a341f370d6e8ca5bbdf5510aa494bd69ef9a4e51577fa3d0d67baafcfe3db\
        3bcfd4f2c5d18b444ab362f0b7645a2e91c8ee88f305f7f999383613ce8528cb6641d87ed7aae795f8559d1c\
        0a918be9b359b7546a18b11f6027f15fab4ba4f6625e8a2bdfd7375f2f1ee05ac591e4cd72ebb9317bd3b1f5\
        c547c80c0286cacd1efabb8e529a2f54f00e5eef3d1edfbfbe31814ba0424e40e2da064f11cdaffaa30f6e34\
        60f0bdd519b54f2bba68e7abcb1588d6f0287e91faf0042d516f7821d5453b18349cc516e64ad49663ae5ca1\
        f812e9bed1e34e69223b33d25765b304bf3ccf72f38179d9f86dfd44495a00e5a6326f2617cf97326cec6860\
        d38a787536050000e54bfaa20001df02801000000c3c82ab3e300d8b020000000001595a";
    // `lzma -9`
    const LZMA: &str = "\
        5d00000004ffffffffffffffff002696840e9fcf0738be7b391486a791b76f3a309ceba0e54872ea95ccb7bc\
        3728eef196eb691202f6aacb5e0f9ce99bcccb99da8337979cab0fe4044f6a8d055a6c5474135066b3ff218d\
        81fe0124106ed1b4f2d748f3259421773a939b5e61f661564e72079b93ffff40100000";
    // `zstd -q --long=28 -`
    const ZSTD_LONG: &str = "\
        28b52ffd0490ed0300e2091923902bd301ffffff7fbf1fddddf5b374a0d168dc7587f77ddff77ddff777edfb\
        ff273b052dd0010dd0914e7a6b744663f4455b744553f4444b744443f4433b744333f4422b744223f4411bf4\
        d2054dd04a0f5c612620cf1c1d6f1ec763e39219d27c38010800807207f6a512620220bc1817e01610180898\
        035aeecba7cb";
    // `xz --check=crc32 --lzma2=dict=192MiB`
    const XZ_LARGE: &str = "\
        fd377a585a0000016922de36020021011f000000fe60eddee007ff00675d002696840e9fcf0738be7b391486\
        a791b76f3a309ceba0e54872ea95ccb7bc3728eef196eb691202f6aacb5e0f9ce99bcccb99da8337979cab0f\
        e4044f6a8d055a6c5474135066b3ff218d81fe0124106ed1b4f2d748f3259421773a939b5e61f661564e6ffc\
        4f000000e54bfaa200017f8010000000c48cded83e300d8b020000000001595a";

    /// Bytes of `image()`; its header asks for four times as many.
    const LEN: usize = 2048;
    const MEMORY: usize = 4 * LEN;

    /// A small arm64 Image: header, a table of one section that ends with the file, and branch
    /// instructions, which the arm64 filter of xz changes.
    fn image() -> Vec<u8> {
        let mut image: Vec<u8> = (0..LEN as u32 / 4)
            .flat_map(|i| (0x9400_0000 | i & 0x1f).to_le_bytes())
            .collect();
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[0; 0x98]);
        put(0, b"MZ\x40\xfa");
        put(0x10, &(MEMORY as u64).to_le_bytes());
        put(0x18, &[0x0a]);
        put(0x38, b"ARM\x64\x40\0\0\0PE\0\0\x64\xaa\x01\0");
        put(0x54, &[0x20]);
        put(0x78 + 16, &(LEN as u32 - 0x100).to_le_bytes());
        put(0x78 + 20, &0x100_u32.to_le_bytes());
        image
    }

    fn hex(text: &str) -> Vec<u8> {
        let digit = |c: u8| (c as char).to_digit(16).unwrap() as u8;
        let digits: Vec<u8> = text.bytes().map(digit).collect();
        digits
            .chunks(2)
            .map(|pair| pair[0] << 4 | pair[1])
            .collect()
    }

    /// Each form of `image()`.
    fn forms() -> Vec<Vec<u8>> {
        let packed = [GZIP, ZSTD, LZ4, LZ4_LEGACY, XZ, LZMA].map(hex);
        let zboots: Vec<_> = packed.iter().map(|data| zboot(data, "any")).collect();
        [
            vec![image(), with_size(&hex(LZ4_LEGACY))],
            packed.to_vec(),
            zboots,
        ]
        .concat()
    }

    fn with_size(data: &[u8]) -> Vec<u8> {
        [data, &(LEN as u32).to_le_bytes()].concat()
    }

    fn zboot(payload: &[u8], name: &str) -> Vec<u8> {
        let mut file = vec![0; 0x100];
        file[..8].copy_from_slice(b"MZ\0\0zimg");
        file[8] = 0;
        file[9] = 1;
        file[12..16].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        file[0x18..0x18 + name.len()].copy_from_slice(name.as_bytes());
        file[0x38..0x3c].copy_from_slice(&0x8182_23cd_u32.to_le_bytes());
        // The appended size, and what the linker adds.
        [&file, payload, &(LEN as u32).to_le_bytes(), &[0; 12]].concat()
    }

    fn bz_image() -> Vec<u8> {
        let mut file = vec![0; 5 * 512];
        file[0x1f4] = 2; // 32 bytes of protected-mode kernel
        file[0x1fe..0x202].copy_from_slice(&[0x55, 0xaa, 0xeb, 0x6a]);
        file[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
        file[0x232] = 0x20;
        file[0x236] = 1;
        file[0x261] = 0x10;
        file.extend([0xa5; 32]);
        file.extend([0xee; 8]); // a signature
        file
    }

    fn file(bytes: &[u8]) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn open(bytes: &[u8]) -> Result<Kernel> {
        Kernel::open(file(bytes).path())
    }

    /// Opens and loads into memory filled with 0x5a; says what is there afterwards.
    fn load(bytes: &[u8]) -> Result<Vec<u8>> {
        let kernel = open(bytes)?;
        let mut memory = vec![0x5a; kernel.memory_size() as usize];
        let written = kernel.load_into(&mut memory)? as usize;
        assert!(memory[written..].iter().all(|&byte| byte == 0x5a));
        memory.truncate(written);
        Ok(memory)
    }

    fn message(result: Result<impl Sized>) -> String {
        format!("{:#}", result.err().expect("an error"))
    }

    fn image_error(result: Result<impl Sized>) -> ImageError {
        let error = result.err().expect("an error");
        error
            .downcast_ref::<ImageError>()
            .expect("an ImageError")
            .clone()
    }

    #[test]
    fn every_form_loads_the_same_bytes() {
        for (index, form) in forms().iter().enumerate() {
            assert_eq!(load(form).unwrap(), image(), "form {index}");
        }
    }

    #[test]
    fn loads_again_from_the_same_inode() {
        for form in forms() {
            let file = file(&form);
            let kernel = Kernel::open(file.path()).unwrap();
            drop(file); // removes the path
            for _ in 0..2 {
                let mut memory = vec![0; MEMORY];
                assert_eq!(kernel.load_into(&mut memory).unwrap(), LEN as u64);
                assert_eq!(memory[..LEN], image());
            }
        }
    }

    #[test]
    fn descriptions() {
        let describe = |bytes: &[u8]| open(bytes).unwrap().describe();
        assert_eq!(describe(&image()), "arm64 Image, 1 MiB, 4 KiB pages");
        assert_eq!(
            describe(&hex(GZIP)),
            "gzip-compressed arm64 Image, 1 MiB, 4 KiB pages"
        );
        assert_eq!(
            describe(&zboot(&hex(ZSTD), "zstd22")),
            "EFI zboot (zstd) arm64 Image, 1 MiB, 4 KiB pages"
        );
        assert_eq!(
            describe(&bz_image()),
            "x86_64 bzImage, 1 MiB, boot protocol 2.15"
        );
        let mut odd = image();
        odd[0x18] = 1;
        assert_eq!(
            describe(&odd),
            "arm64 Image, 1 MiB, page size not stated, big-endian"
        );
    }

    #[test]
    fn bz_image_loads_its_protected_mode_part() {
        let kernel = open(&bz_image()).unwrap();
        assert!(kernel.header().x86_64().is_ok());
        assert_eq!(kernel.memory_size(), 0x1000);
        assert_eq!(load(&bz_image()).unwrap(), [0xa5; 32]);
        let cut = &bz_image()[..5 * 512 + 31];
        let (len, need) = (5 * 512 + 31, 5 * 512 + 32);
        assert_eq!(image_error(open(cut)), ImageError::Truncated { len, need });
    }

    #[test]
    fn an_image_that_does_not_state_its_size() {
        let mut old = image();
        old[0x11] = 0;
        let kernel = open(&old).unwrap();
        assert_eq!(kernel.memory_size(), 2 * LEN as u64);
        assert_eq!(load(&old).unwrap(), old);
        assert_eq!(image_error(open(&gzip(&old))), ImageError::SizeUnknown);
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn packed_things_that_are_no_image() {
        for (inner, name) in [
            (hex(GZIP), "compressed data again"),
            (zboot(&hex(GZIP), "gzip"), "an EFI zboot file"),
            (bz_image(), "an x86_64 bzImage"),
            ([b"\x7fELF".as_slice(), &[0; 60]].concat(), "an ELF file"),
        ] {
            let error = image_error(open(&gzip(&inner)));
            assert_eq!(
                error,
                ImageError::Packed {
                    outer: "gzip",
                    inner: name
                }
            );
        }
        assert!(message(open(&gzip(b"some text"))).contains("in the gzip data: no known"));
        let plain = message(open(&zboot(&image(), "none")));
        assert!(
            plain.contains("EFI zboot data holds an uncompressed arm64 Image"),
            "{plain}"
        );
        let lzo = message(open(&zboot(b"\x89LZO\0\r\n\x1a\n", "lzo")));
        assert!(
            lzo.contains("payload (lzo): this is lzop-compressed"),
            "{lzo}"
        );
    }

    #[test]
    fn zboot_payload_outside_the_file() {
        let mut form = zboot(&hex(GZIP), "gzip");
        form[15] = 0xff;
        let error = image_error(open(&form));
        assert!(matches!(
            error,
            ImageError::ZbootPayload { offset: 0x100, .. }
        ));
        form[12..16].fill(0);
        assert!(matches!(
            image_error(open(&form)),
            ImageError::ZbootPayload { size: 0, .. }
        ));
    }

    /// Cut anywhere, each form is refused: when opened, or at the latest when loaded.
    #[test]
    fn truncation_at_every_length() {
        for (index, form) in forms().iter().enumerate() {
            // What follows a zboot payload is not needed.
            let end = if index < 8 {
                form.len()
            } else {
                form.len() - 16
            };
            for len in 0..end {
                // Without the word that was appended the data are whole.
                if index != 1 || len != end - 4 {
                    let error = load(&form[..len]).map(|_| format!("form {index} cut to {len}"));
                    let error = format!("{:#}", error.unwrap_err());
                    assert!(!error.contains('\n'), "{error}");
                }
            }
        }
    }

    /// Damage that every decompressor could take for data: the checksums tell.
    #[test]
    fn damage_is_seen() {
        for form in [GZIP, ZSTD, XZ] {
            let form = hex(form);
            for at in 4..form.len() {
                let mut bad = form.clone();
                bad[at] ^= 0x10;
                // Some bytes mean nothing (time stamps), but none changes the kernel unseen.
                if let Ok(memory) = load(&bad) {
                    assert_eq!(memory, image(), "byte {at}");
                }
            }
        }
    }

    #[test]
    fn truncation_is_named() {
        for (form, name) in [GZIP, ZSTD, LZ4, XZ, LZMA]
            .iter()
            .zip(["gzip", "zstd", "lz4", "xz", "lzma"])
        {
            let form = hex(form);
            let error = message(load(&form[..form.len() - 5]));
            let expected = format!("truncated or damaged {name} data after ");
            assert!(error.contains(&expected), "{error}");
            assert!(error.starts_with("cannot "), "{error}");
        }
        let error = image_error(open(&image()[..LEN - 1]));
        let (len, need) = (LEN as u64 - 1, LEN as u64);
        assert_eq!(error, ImageError::Truncated { len, need });
    }

    /// Legacy lz4 data cut between two blocks look whole: the section table tells.
    #[test]
    fn legacy_lz4_that_ends_early() {
        let mut word = hex(LZ4_LEGACY);
        word.extend((LEN as u32 + 1).to_le_bytes());
        assert!(message(load(&word)).contains("its last word says 2049"));
        // One block of the first 15 literals and more, as a raw LZ4 sequence.
        let start = &image()[..200];
        let mut block = vec![0xf0, 200 - 15];
        block.extend(start);
        let mut cut = b"\x02\x21\x4c\x18".to_vec();
        cut.extend((block.len() as u32).to_le_bytes());
        cut.extend(block);
        assert_eq!(
            image_error(load(&cut)),
            ImageError::Truncated {
                len: 200,
                need: LEN as u64
            }
        );
    }

    #[test]
    fn more_data_than_the_header_asks_for() {
        // An Image that claims less memory than its file has.
        let mut small = image();
        small[0x11] = 4;
        assert!(message(open(&small)).contains("something is appended"));
        let error = message(load(&gzip(&small)));
        assert!(
            error.contains("unpack to more than the 1024 bytes"),
            "{error}"
        );
        for form in forms().iter().skip(1) {
            let kernel = open(form).unwrap();
            let mut memory = vec![0x5a; LEN + 8];
            assert!(kernel.load_into(&mut memory[..LEN - 1]).is_err());
            assert_eq!(memory[LEN - 1..], [0x5a; 9]);
            // Just enough is enough.
            assert_eq!(kernel.load_into(&mut memory[..LEN]).unwrap(), LEN as u64);
            assert_eq!(memory[LEN..], [0x5a; 8]);
        }
        let kernel = open(&image()).unwrap();
        let error = message(kernel.load_into(&mut [0; LEN - 1]));
        assert!(
            error.contains("its 2048 bytes do not fit into the 2047"),
            "{error}"
        );
    }

    #[test]
    fn windows_are_bounded() {
        assert!(message(open(&hex(ZSTD_LONG))).contains("need a window of 256 MiB; 128 MiB"));
        let xz = message(open(&hex(XZ_LARGE)));
        assert!(
            xz.contains("xz data need a dictionary of more than 128 MiB"),
            "{xz}"
        );
        let mut lzma = hex(LZMA);
        lzma[4] = 0x10; // 256 MiB
        assert!(message(open(&lzma)).contains("lzma data need a dictionary of more than 128 MiB"));
    }

    #[test]
    fn changed_after_opening() {
        let file = file(&image());
        let kernel = Kernel::open(file.path()).unwrap();
        let mut other = image();
        other[0x18] = 0x0c;
        file.as_file().write_all_at(&other, 0).unwrap();
        let error = message(kernel.load_into(&mut [0; MEMORY]));
        assert!(error.contains("its header changed since"), "{error}");
        file.as_file().set_len(100).unwrap();
        let error = message(kernel.load_into(&mut [0; MEMORY]));
        assert!(
            error.contains("it had 2048 bytes when it was opened, now 100"),
            "{error}"
        );
    }

    #[test]
    fn paths_that_are_no_files() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        let empty = dir.path().join("empty");
        File::create(&empty).unwrap();
        let missing = dir.path().join("missing");
        for (path, reason) in [
            (dir.path(), "it is a directory"),
            (&fifo, "device, FIFO or socket"),
            (Path::new("/dev/null"), "device, FIFO or socket"),
            (&empty, "it is empty"),
            (&missing, "No such file"),
        ] {
            for (what, error) in [
                ("kernel", message(Kernel::open(path))),
                ("initrd", message(Initrd::open(path))),
            ] {
                let start = format!("cannot open {what} {}: ", path.display());
                assert!(
                    error.starts_with(&start) && error.contains(reason),
                    "{error}"
                );
            }
        }
    }

    #[test]
    fn oversized_file() {
        let file = file(&image());
        file.as_file().set_len(MAX_IMAGE_SIZE + 1).unwrap(); // a hole
        assert!(message(Kernel::open(file.path())).contains("1073741825 bytes"));
    }

    #[test]
    fn initrd() {
        let file = file(b"initrd");
        let initrd = Initrd::open(file.path()).unwrap();
        assert_eq!(initrd.size(), 6);
        let mut memory = [0x5a; 8];
        assert_eq!(initrd.load_into(&mut memory).unwrap(), 6);
        assert_eq!(&memory, b"initrdZZ");
        assert!(message(initrd.load_into(&mut [0; 5])).contains("its 6 bytes do not fit"));
        // Grown: still as many bytes as were planned for.
        file.as_file().set_len(100).unwrap();
        assert_eq!(initrd.load_into(&mut memory).unwrap(), 6);
        file.as_file().set_len(5).unwrap();
        let error = message(initrd.load_into(&mut memory));
        assert!(error.starts_with("cannot load initrd /"), "{error}");
        assert!(
            error.contains("it had 6 bytes when it was opened, now 5"),
            "{error}"
        );
    }

    #[test]
    fn lz4_of_tiny_blocks() {
        // Blocks of one literal byte each.
        let mut file = b"\x02\x21\x4c\x18".to_vec();
        for _ in 0..5000 {
            file.extend([2, 0, 0, 0, 0x10, 0]);
        }
        assert!(message(open(&file)).contains("more than 4096 blocks"));
    }

    proptest! {
        /// Damage anywhere ends in an error or in bytes within `dst`, never in a panic.
        #[test]
        fn no_damage_panics(
            which in 0..14_usize,
            damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut form = forms().swap_remove(which);
            for (at, value) in damage {
                let at = at.index(form.len());
                form[at] = value;
            }
            if let Ok(kernel) = open(&form) {
                let _ = kernel.describe();
                // Whatever the header claims now, the memory is this.
                let mut memory = vec![0x5a; MEMORY + 8];
                let _ = kernel.load_into(&mut memory[..MEMORY]);
                prop_assert_eq!(&memory[MEMORY..], &[0x5a; 8]);
            }
        }

        #[test]
        fn no_bytes_panic(
            magic in 0..7_usize,
            rest in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let start = forms()[magic][..4].to_vec();
            let _ = load(&[start, rest].concat());
        }
    }
}
