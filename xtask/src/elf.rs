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

/// The sections of `file`, the largest first.
pub(crate) fn sections(file: &[u8]) -> Result<Vec<Section>> {
    ensure!(file.starts_with(b"\x7fELF\x02\x01"), "no 64-bit ELF file");
    let short = "the ELF file is cut short";
    let table = number(file, 0x28, 8).context(short)?;
    let entry = number(file, 0x3a, 2).context(short)?;
    let count = number(file, 0x3c, 2).context(short)?;
    let names = number(file, 0x3e, 2).context(short)?;
    let field = |index: u64, at: u64, length| {
        let start = index
            .checked_mul(entry)?
            .checked_add(table)?
            .checked_add(at)?;
        number(file, start, length)
    };
    let strings = field(names, 0x18, 8).context(short)?;
    let mut sections = Vec::new();
    for index in 0..count {
        let read = |at, length| field(index, at, length).context(short);
        let name = usize::try_from(strings + read(0, 4)?).context(short)?;
        let name = file
            .get(name..)
            .context(short)?
            .split(|byte| *byte == 0)
            .next();
        let size = read(0x20, 8)?;
        if size > 0 && read(4, 4)? != NOBITS {
            sections.push(Section {
                name: String::from_utf8_lossy(name.unwrap_or_default()).into_owned(),
                size,
            });
        }
    }
    sections.sort_by_key(|section| std::cmp::Reverse(section.size));
    Ok(sections)
}

/// The little-endian number of `length` bytes at `at`.
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
    }

    #[test]
    fn what_is_no_program_is_refused() {
        assert!(sections(b"#!/bin/sh").is_err());
        let this = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(sections(&this[..0x30]).is_err());
        assert!(sections(&this[..0x1000]).is_err());
    }
}
