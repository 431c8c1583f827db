//! Unpacks compressed kernels as a stream.

mod gzip;

use super::read::read_at;
use anyhow::{Context as _, Result, anyhow, bail};
use armlet_arch::image::{Compression, HEAD};
use armlet_system::eintr::uninterrupted;
use ruzstd::decoding::{
    BlockDecodingStrategy, FrameDecoder, StreamingDecoder, errors::FrameDecoderError,
};
use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

/// The largest window (dictionary) that data may ask for, bytes. The kernel's own build uses
/// `zstd --ultra -22` on a pipe, which asks for just this much (scripts/Makefile.lib).
pub const MAX_WINDOW: u64 = 128 << 20;

/// The buffer size in bytes, for compressed and for unpacked data.
const BUFFER: usize = 64 << 10;

/// Unpacks a span in pieces that `take` is given, and fails at more than `room` bytes. Returns their
/// number.
pub(super) fn unpack_all(
    file: &File,
    span: &Range<u64>,
    compression: Compression,
    room: u64,
    take: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> Result<u64> {
    let mut reader = unpacker(file, span, compression)?;
    let mut piece = vec![0; BUFFER];
    let mut done = 0;
    loop {
        // One byte more than there is room for: the end of the data, with its checksum, is read too.
        let most = (room - done).clamp(1, BUFFER as u64) as usize;
        let got = unpack(&mut *reader, compression, &mut piece[..most], done)?;
        if got as u64 > room - done {
            bail!(
                "the {} data unpack to more than the {room} bytes that the kernel's header asks for",
                compression.name()
            );
        }
        take(&piece[..got]).context("cannot pass it on")?;
        done += got as u64;
        // After the end a decompressor is not to be asked again.
        if got < most {
            return Ok(done);
        }
    }
}

/// Unpacks the first [`HEAD`] bytes, or fewer if there are no more.
pub(super) fn unpack_head(
    file: &File,
    span: &Range<u64>,
    compression: Compression,
) -> Result<Vec<u8>> {
    let mut head = vec![0; HEAD];
    let mut reader = match compression {
        Compression::Zstd => zstd_head(file, span)?,
        _ => unpacker(file, span, compression)?,
    };
    let got = unpack(&mut *reader, compression, &mut head, 0)?;
    head.truncate(got);
    Ok(head)
}

/// Reads unpacked bytes, of which `before` came already, until `dst` is full or they end.
fn unpack(
    reader: &mut dyn Read,
    compression: Compression,
    dst: &mut [u8],
    before: u64,
) -> Result<usize> {
    let mut done = 0;
    while done < dst.len() {
        match uninterrupted(|| reader.read(&mut dst[done..])) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(error) => return Err(damaged(error, compression, before + done as u64)),
        }
    }
    Ok(done)
}

/// Returns the error for data that a decompressor rejects after about `done` bytes of output.
fn damaged(error: io::Error, compression: Compression, done: u64) -> anyhow::Error {
    let name = compression.name();
    if error.kind() == ErrorKind::OutOfMemory {
        // lzma-rust2's error for a dictionary over its limit.
        let limit = MAX_WINDOW >> 20;
        return anyhow!("the {name} data need a dictionary of more than {limit} MiB");
    }
    // The decompressors' errors repeat their causes: the root cause is enough.
    let mut cause: &dyn std::error::Error = &error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    match cause.downcast_ref::<io::Error>() {
        // Only system errors carry an errno: reading the file failed.
        Some(system) if system.raw_os_error().is_some() => anyhow!("cannot read it: {system}"),
        _ => anyhow!("truncated or damaged {name} data after {done} bytes: {cause}"),
    }
}

/// Returns a stream of the unpacked bytes.
fn unpacker<'a>(
    file: &'a File,
    span: &Range<u64>,
    compression: Compression,
) -> Result<Box<dyn Read + 'a>> {
    let input = Span::buffered(file, span);
    // lzma-rust2's limit is in KiB and includes its own tables: .xz 104 KiB, .lzma 22.
    let limit = (MAX_WINDOW >> 10) as u32 + 128;
    Ok(match compression {
        Compression::Gzip => {
            Box::new(gzip::Gzip::new(input).map_err(|error| damaged(error, compression, 0))?)
        }
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

/// The bytes of a span of a file, read through a buffer. It reads by position, so that a shared
/// file offset is not moved.
type Input<'a> = BufReader<Span<'a>>;

struct Span<'a> {
    file: &'a File,
    position: u64,
    end: u64,
    /// Whether a decompressor has tried to read past the end.
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

/// Returns the first blocks of a zstd frame, enough for [`HEAD`] bytes. The decoder outputs only
/// what has left its window, which may be larger than the whole kernel; therefore the frame is
/// terminated early with an empty last block.
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

/// A zstd decoder that verifies the content checksum, which ruzstd leaves to its user.
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

/// A decoder of both LZ4 formats. lz4_flex treats the end of input between two blocks as the end of
/// the data: that is right for the legacy format, which has no end mark, but means truncation in
/// the other.
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

/// Finds the end of legacy LZ4 data by walking its blocks: it has no end mark, and the kernel's
/// build may append the unpacked size as a 32-bit word (`lz4_with_size` in scripts/Makefile.lib),
/// which the decoder would take for a block. Returns the span without that word, and the word.
pub(super) fn lz4_legacy_span(file: &File, span: Range<u64>) -> Result<(Range<u64>, Option<u64>)> {
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
