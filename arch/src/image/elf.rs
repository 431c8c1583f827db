//! The ELF form of an x86_64 kernel, vmlinux, as far as it takes to start it: segments, and the
//! entry that a hypervisor uses (Documentation/arch/x86, "PVH"; Xen's
//! include/xen/interface/elfnote.h).

use serde::{Deserialize, Serialize};
use std::ops::Range;

use super::bytes::{HEAD, MAX_IMAGE_SIZE};
use super::error::ImageError;

/// Bytes of notes that are looked at: Linux has a few hundred.
pub const MAX_NOTES: u64 = 0x1_0000;

/// XEN_ELFNOTE_PHYS32_ENTRY: the physical address of the 32-bit entry.
const PHYS32_ENTRY: u32 = 18;

/// An ELF kernel for x86_64.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct X86Elf {
    /// What is loaded, in the order of the file.
    pub segments: Vec<Segment>,
    /// The bytes of the file that hold its notes.
    pub notes: Range<u64>,
    /// The 32-bit entry point, a guest-physical address; [`X86Elf::find_entry`] finds it.
    pub entry: u64,
}

/// A part of the file that is loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Bytes of the file.
    pub file: Range<u64>,
    /// Guest-physical addresses; what lies beyond the file's bytes is zero.
    pub memory: Range<u64>,
}

/// Offsets and sizes in bytes (ELF-64 Object File Format, version 1.5).
mod field {
    pub(super) const CLASS: usize = 4;
    pub(super) const DATA: usize = 5;
    pub(super) const PHOFF: usize = 0x20;
    pub(super) const PHENTSIZE: usize = 0x36;
    pub(super) const PHNUM: usize = 0x38;
    pub(super) const HEADER: usize = 0x40;
    pub(super) const PROGRAM_HEADER: usize = 0x38;
}

/// Kinds of program header.
const LOAD: u32 = 1;
const NOTE: u32 = 4;

impl X86Elf {
    /// Reads the program headers from the start of an ELF file for x86_64; [`HEAD`] bytes
    /// suffice. The entry has still to be found.
    ///
    /// # Errors
    /// A file of 32 bits, a damaged header, segments that do not lie in 1 GiB, no notes.
    pub fn parse(head: &[u8]) -> Result<X86Elf, ImageError> {
        let wrong = |cause: &str| ImageError::BadElf {
            cause: cause.to_owned(),
        };
        if head.len() < field::HEADER {
            return Err(wrong("it is shorter than its own header"));
        }
        if head[field::CLASS] != 2 || head[field::DATA] != 1 {
            return Err(wrong("it is not of the 64-bit little-endian kind"));
        }
        let number = |at: usize, size: usize| little_endian(head, at, size);
        let (table, size, count) = (
            number(field::PHOFF, 8).unwrap_or(0),
            number(field::PHENTSIZE, 2).unwrap_or(0),
            number(field::PHNUM, 2).unwrap_or(0),
        );
        let end = size
            .checked_mul(count)
            .and_then(|all| all.checked_add(table));
        if size != field::PROGRAM_HEADER as u64
            || end.is_none_or(|end| end > head.len().min(HEAD) as u64)
        {
            return Err(wrong("its program headers do not lie in its first 4 KiB"));
        }
        let (mut segments, mut notes) = (Vec::new(), None);
        for index in 0..count {
            let at = (table + index * size) as usize;
            let word = |offset: usize| number(at + offset, 8).unwrap_or(0);
            // p_type, p_offset, p_paddr, p_filesz, p_memsz.
            let kind = number(at, 4).unwrap_or(0) as u32;
            let (offset, address, file, memory) = (word(8), word(24), word(32), word(40));
            let (Some(file_end), Some(memory_end)) =
                (offset.checked_add(file), address.checked_add(memory))
            else {
                return Err(wrong("a segment ends past 2^64"));
            };
            match kind {
                LOAD if file > memory => {
                    return Err(wrong("a segment has more bytes in the file than in memory"));
                }
                LOAD if memory > 0 => segments.push(Segment {
                    file: offset..file_end,
                    memory: address..memory_end,
                }),
                NOTE if notes.is_none() => notes = Some(offset..file_end),
                _ => {}
            }
        }
        let elf = X86Elf {
            segments,
            notes: notes.unwrap_or(0..0),
            entry: 0,
        };
        let memory = elf.memory();
        if memory.is_empty() {
            return Err(wrong("it has nothing to load"));
        }
        if memory.end - memory.start > MAX_IMAGE_SIZE {
            return Err(wrong("its segments lie more than 1 GiB apart"));
        }
        Ok(elf)
    }

    /// Finds the entry in the bytes of [`Self::notes`].
    ///
    /// # Errors
    /// No note names one.
    pub fn find_entry(&mut self, notes: &[u8]) -> Result<(), ImageError> {
        let found = entry(notes).filter(|entry| self.memory().contains(entry));
        self.entry = found.ok_or_else(|| ImageError::BadElf {
            cause: "no note names the entry that a hypervisor starts at (CONFIG_PVH)".to_owned(),
        })?;
        Ok(())
    }

    /// Returns the guest-physical addresses from its first segment to the end of its last.
    #[must_use]
    pub fn memory(&self) -> Range<u64> {
        let segments = self.segments.iter();
        let start = segments.clone().map(|segment| segment.memory.start).min();
        let end = segments.map(|segment| segment.memory.end).max();
        start.unwrap_or(0)..end.unwrap_or(0)
    }

    /// Bytes that the file has at least.
    #[must_use]
    pub fn extent(&self) -> u64 {
        let ends = self.segments.iter().map(|segment| segment.file.end);
        ends.max().unwrap_or(0).max(self.notes.end)
    }
}

/// Returns the value of the note PHYS32_ENTRY. A note has three words (size of its name, size of
/// its value, type), then both, each padded to four bytes.
fn entry(notes: &[u8]) -> Option<u64> {
    let mut at = 0_usize;
    loop {
        let word = |offset: usize| little_endian(notes, at.checked_add(offset)?, 4);
        let (name, size, kind) = (word(0)?, word(4)?, word(8)?);
        let name_at = at.checked_add(12)?;
        let value_at = name_at.checked_add(usize::try_from(name).ok()?.next_multiple_of(4))?;
        let is_xen = notes.get(name_at..name_at.checked_add(4)?)? == b"Xen\0" && name == 4;
        if is_xen && kind == u64::from(PHYS32_ENTRY) {
            return little_endian(notes, value_at, if size == 8 { 8 } else { 4 });
        }
        at = value_at.checked_add(usize::try_from(size).ok()?.next_multiple_of(4))?;
    }
}

fn little_endian(bytes: &[u8], at: usize, size: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(size)?)?;
    Some(
        bytes
            .iter()
            .rev()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte)),
    )
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Returns an ELF kernel of two segments at 16 MiB, the second with 4 KiB of BSS, whose notes
    /// name `entry`.
    pub(crate) fn vmlinux(entry: u32) -> Vec<u8> {
        let mut file = vec![0; 0x3000];
        let mut put = |at: usize, value: &[u8]| file[at..at + value.len()].copy_from_slice(value);
        put(0, b"\x7fELF\x02\x01\x01");
        put(0x10, &[2, 0, 62, 0]);
        put(0x20, &0x40_u64.to_le_bytes());
        put(0x36, &[0x38, 0, 3, 0]);
        let headers: [(u32, u64, u64, u64, u64); 3] = [
            (LOAD, 0x1000, 0x100_0000, 0x1000, 0x1000),
            (LOAD, 0x2000, 0x100_1000, 0x800, 0x1800),
            (NOTE, 0x2800, 0, 0x38, 0x38),
        ];
        for (index, (kind, offset, address, size, memory)) in headers.into_iter().enumerate() {
            let at = 0x40 + index * 0x38;
            put(at, &kind.to_le_bytes());
            for (field, value) in [(8, offset), (24, address), (32, size), (40, memory)] {
                put(at + field, &value.to_le_bytes());
            }
        }
        put(0x2800, &note(b"Linux\0\0\0", 6, 0x101, &[0; 8]));
        put(
            0x281c,
            &note(b"Xen\0", 4, PHYS32_ENTRY, &u64::from(entry).to_le_bytes()),
        );
        file
    }

    fn note(name: &[u8], name_size: u32, kind: u32, value: &[u8]) -> Vec<u8> {
        let words = [name_size, value.len() as u32, kind]
            .map(u32::to_le_bytes)
            .concat();
        [&words, name, value].concat()
    }

    fn parsed(file: &[u8]) -> Result<X86Elf, ImageError> {
        let mut elf = X86Elf::parse(file)?;
        let notes = file.get(elf.notes.start as usize..elf.notes.end as usize);
        elf.find_entry(notes.unwrap_or_default())?;
        Ok(elf)
    }

    #[test]
    fn segments_and_the_entry_are_found() {
        let elf = parsed(&vmlinux(0x100_0010)).expect("a kernel");
        assert_eq!(elf.entry, 0x100_0010);
        assert_eq!(elf.memory(), 0x100_0000..0x100_2800);
        assert_eq!(elf.extent(), 0x2838);
        let second = &elf.segments[1];
        assert_eq!(
            (&second.file, &second.memory),
            (&(0x2000..0x2800), &(0x100_1000..0x100_2800))
        );
    }

    #[test]
    fn what_cannot_be_started_is_refused_with_the_cause() {
        let refused = |change: fn(&mut Vec<u8>), cause: &str| {
            let mut file = vmlinux(0x100_0010);
            change(&mut file);
            let error = parsed(&file).expect_err(cause).to_string();
            assert!(error.contains(cause), "{error}");
        };
        refused(|file| file[4] = 1, "64-bit little-endian");
        refused(|file| file[0x38] = 0xff, "program headers");
        refused(|file| file[0x281c + 8] = 17, "CONFIG_PVH");
        refused(
            |file| file[0x40 + 40 + 1] = 0,
            "more bytes in the file than in memory",
        );
        refused(|file| file[0x40 + 24 + 4] = 1, "1 GiB apart");
        refused(|file| file[0x40 + 24..0x40 + 32].fill(0xff), "past 2^64");
        refused(|file| file.truncate(0x30), "shorter than its own header");
        let outside = parsed(&vmlinux(0x1000)).expect_err("an entry outside");
        assert!(outside.to_string().contains("CONFIG_PVH"));
    }

    proptest! {
        #[test]
        fn no_damage_panics(changes: Vec<(u16, u8)>) {
            let mut file = vmlinux(0x100_0010);
            for (at, value) in changes {
                let at = usize::from(at) % file.len();
                file[at] = value;
            }
            let _ = parsed(&file);
        }

        #[test]
        fn no_notes_panic(notes: Vec<u8>) {
            let _ = entry(&notes);
        }
    }
}
