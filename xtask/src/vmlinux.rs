//! The ELF file in a bzImage, as distributions ship it (Documentation/arch/x86/boot.rst:
//! payload_offset, payload_length).

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

/// Fields of the setup header.
const SETUP_SECTS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// The word behind the compressed data that says how long they are unpacked.
const SIZE_WORD: usize = 4;

/// Unpacks the kernel in the bzImage at `path`.
pub(crate) fn unpack(path: &Path) -> Result<Vec<u8>> {
    let file = std::fs::read(path).with_context(|| format!("cannot read {path:?}"))?;
    unpacked(&file).with_context(|| format!("cannot unpack the kernel in {path:?}"))
}

fn unpacked(file: &[u8]) -> Result<Vec<u8>> {
    let word = |at: usize| {
        let bytes = file.get(at..at + 4).and_then(|bytes| bytes.first_chunk());
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes) as usize)
    };
    let sectors = match file.get(SETUP_SECTS) {
        Some(0) | None => 4,
        Some(sectors) => usize::from(*sectors),
    };
    let start = (sectors + 1) * 512 + word(PAYLOAD_OFFSET);
    let payload = file.get(start..start + word(PAYLOAD_LENGTH));
    let payload = payload.context("its payload does not lie in the file")?;
    let packed = payload.len().saturating_sub(SIZE_WORD);
    let (packed, size) = payload.split_at(packed);
    let size = size
        .first_chunk()
        .map_or(0, |size| u32::from_le_bytes(*size));
    let mut kernel = Vec::new();
    match packed {
        [0x02, 0x21, 0x4c, 0x18, ..] => {
            lz4_flex::frame::FrameDecoder::new(packed).read_to_end(&mut kernel)?;
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(packed);
            decoder.context("no zstd")?.read_to_end(&mut kernel)?;
        }
        other => bail!(
            "nothing is known that begins with {:02x?}",
            &other[..other.len().min(4)]
        ),
    }
    ensure!(
        kernel.len() == size as usize && kernel.starts_with(b"\x7fELF"),
        "{} bytes came out, and {size} are said",
        kernel.len()
    );
    Ok(kernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert!(unpacked(b"MZ").is_err());
        let mut file = vec![0; 0x2000];
        file[SETUP_SECTS] = 1;
        file[PAYLOAD_LENGTH] = 0x40;
        file[0x400..0x404].copy_from_slice(b"text");
        let error = unpacked(&file).expect_err("no kernel").to_string();
        assert!(error.contains("[74, 65, 78, 74]"), "{error}");
    }
}
