//! The sections of a 64-bit little-endian ELF file, which say what a program's size is made of.

use anyhow::{Context, Result, ensure};

/// A section and the bytes that it takes in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Section {
    /// Such as `.text`.
    pub(crate) name: String,
    /// In the file.
    pub(crate) size: u64,
}

/// Sections that hold no bytes of the file.
const NOBITS: u64 = 8;

/// Returns the sections of `file`, the largest first.
pub(crate) fn sections(file: &[u8]) -> Result<Vec<Section>> {
    let mut sections = headers(file)?
        .into_iter()
        .filter(|header| header.size > 0 && header.kind != NOBITS)
        .map(|header| Section {
            name: header.name,
            size: header.size,
        })
        .collect::<Vec<_>>();
    sections.sort_by_key(|section| std::cmp::Reverse(section.size));
    Ok(sections)
}

/// Returns what the section called `name` holds, if there is one.
pub(crate) fn section<'a>(file: &'a [u8], name: &str) -> Result<Option<&'a [u8]>> {
    let headers = headers(file)?;
    let Some(header) = headers.iter().find(|header| header.name == name) else {
        return Ok(None);
    };
    let start = usize::try_from(header.offset).context(SHORT)?;
    let size = usize::try_from(header.size).context(SHORT)?;
    let end = start.checked_add(size).context(SHORT)?;
    Ok(Some(file.get(start..end).context(SHORT)?))
}

const SHORT: &str = "the ELF file is cut short";

/// A section header (ELF-64 Object File Format, version 1.5, figure 8).
struct Header {
    name: String,
    kind: u64,
    offset: u64,
    size: u64,
}

fn headers(file: &[u8]) -> Result<Vec<Header>> {
    ensure!(file.starts_with(b"\x7fELF\x02\x01"), "no 64-bit ELF file");
    let table = number(file, 0x28, 8).context(SHORT)?;
    let entry = number(file, 0x3a, 2).context(SHORT)?;
    let count = number(file, 0x3c, 2).context(SHORT)?;
    let names = number(file, 0x3e, 2).context(SHORT)?;
    let field = |index: u64, at: u64, length| {
        let start = index
            .checked_mul(entry)?
            .checked_add(table)?
            .checked_add(at)?;
        number(file, start, length)
    };
    let strings = field(names, 0x18, 8).context(SHORT)?;
    let mut headers = Vec::new();
    for index in 0..count {
        let read = |at, length| field(index, at, length).context(SHORT);
        let name = strings.checked_add(read(0, 4)?).context(SHORT)?;
        let name = file.get(usize::try_from(name).context(SHORT)?..);
        let name = name.context(SHORT)?.split(|byte| *byte == 0).next();
        headers.push(Header {
            name: String::from_utf8_lossy(name.unwrap_or_default()).into_owned(),
            kind: read(4, 4)?,
            offset: read(0x18, 8)?,
            size: read(0x20, 8)?,
        });
    }
    Ok(headers)
}

/// Returns the little-endian number of `length` bytes at `at`.
fn number(file: &[u8], at: u64, length: usize) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    let bytes = file.get(at..at.checked_add(length)?)?;
    Some(
        bytes
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | u64::from(*byte)),
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_program_has_code() {
        let this = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let found = sections(&this).unwrap();
        assert!(
            found
                .iter()
                .any(|section| section.name == ".text" && section.size > 1000)
        );
        assert!(found.iter().all(|section| section.name != ".bss"));
        assert!(found.iter().map(|section| section.size).sum::<u64>() <= this.len() as u64);
        let text = section(&this, ".text").unwrap().unwrap();
        assert!(found.iter().any(|found| found.size == text.len() as u64));
        assert_eq!(section(&this, ".no-such-section").unwrap(), None);
    }

    #[test]
    fn what_is_no_program_is_refused() {
        assert!(sections(b"#!/bin/sh").is_err());
        let this = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(sections(&this[..0x30]).is_err());
        assert!(sections(&this[..0x1000]).is_err());
    }
}
