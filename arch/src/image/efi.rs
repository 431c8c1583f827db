//! EFI programs: the zboot file, and how long a file its section table promises.

use super::bytes::{u16_at, u32_at};
use super::error::ImageError;
use std::ops::Range;

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

/// Reads the header of a zboot file.
pub(super) fn zboot(head: &[u8]) -> Result<Zboot, ImageError> {
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

/// Returns the number of file bytes that an EFI-stub kernel claims: the largest end of raw data in
/// the PE section table that the word at 0x3c leads to, or the end of that table where `head` does
/// not reach it. A file of fewer bytes is truncated. `None` without such a table.
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
