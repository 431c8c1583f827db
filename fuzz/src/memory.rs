//! Guest memory with a copy beside it, by which every byte that a device changes is found.

use std::cell::Cell;
use std::collections::HashSet;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Where guest memory begins; not at 0, so that a null address is wrong.
pub const BASE: u64 = 0x10_0000;
/// Banks by offset and bytes: two that meet, a hole, and a small one for indirect tables.
const BANKS: [(u64, u64); 3] = [(0, 0x4000), (0x4000, 0x3000), (TABLES, 0x1000)];
/// Offset of the small bank.
pub const TABLES: u64 = 0x8000;
/// Offset of the hole.
pub const HOLE: u64 = 0x7000;
/// Bytes to the end of the last bank.
pub const END: u64 = TABLES + 0x1000;
/// Bytes that are compared at a time.
const BLOCK: usize = 256;

/// What a byte is, as bits: the device may write it; it is of rings or descriptors, which say what
/// the device may write.
const ALLOWED: u8 = 1;
const RING: u8 = 2;

thread_local! {
    /// One for all inputs: mapping it takes longer than many of them.
    static GUEST: Arc<GuestMemoryMmap> = Arc::new(make());
    /// The copies, for the same reason.
    static SPARE: Cell<Option<Copies>> = const { Cell::new(None) };
}

/// What is known of each byte from [`BASE`] on, the hole among them.
struct Copies {
    /// As the guest and the device left it.
    known: Vec<u8>,
    /// As it is.
    now: Vec<u8>,
    /// What each is.
    bytes: Vec<u8>,
}

fn make() -> GuestMemoryMmap {
    let banks = BANKS.map(|(offset, len)| (GuestAddress(BASE + offset), len as usize));
    GuestMemoryMmap::from_ranges(&banks).expect("memory")
}

/// Memory, and what was there before the device did anything.
pub struct Memory {
    pub guest: Arc<GuestMemoryMmap>,
    copies: Copies,
    marked: HashSet<(u64, u64)>,
    /// Whether the device may write what says what it may write: then nothing can be said.
    pub tainted: bool,
}

impl Memory {
    /// All zero.
    pub fn new() -> Memory {
        let mut copies = SPARE.take().unwrap_or_else(|| Copies {
            known: vec![0; END as usize],
            now: vec![0; END as usize],
            bytes: vec![0; END as usize],
        });
        copies.known.fill(0);
        copies.now.fill(0);
        copies.bytes.fill(0);
        let memory = Memory {
            guest: GUEST.with(Arc::clone),
            copies,
            marked: HashSet::new(),
            tainted: false,
        };
        for (offset, len) in BANKS {
            let zeros = &memory.copies.known[..len as usize];
            let written = memory.guest.write_slice(zeros, GuestAddress(BASE + offset));
            written.expect("it is there");
        }
        memory
    }

    /// Whether all of a range is memory.
    pub fn holds(&self, start: u64, len: u64) -> bool {
        let (Some(from), Some(end)) = (start.checked_sub(BASE), start.checked_add(len)) else {
            return false;
        };
        let end = end - BASE;
        // The first two banks meet.
        end <= BANKS[1].0 + BANKS[1].1 || (from >= TABLES && end <= END)
    }

    fn slice(&self, start: u64, len: usize) -> &[u8] {
        let at = (start - BASE) as usize;
        &self.copies.known[at..at + len]
    }

    fn array<const N: usize>(&self, at: u64) -> [u8; N] {
        self.slice(at, N).try_into().expect("so many")
    }

    /// Little-endian numbers; they must be in memory.
    pub fn u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    /// As [`Self::u16`].
    pub fn u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    /// As [`Self::u16`].
    pub fn u64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    /// The guest, or someone who may, writes; what is not memory is not written.
    pub fn poke(&mut self, at: u64, data: &[u8]) {
        if self.holds(at, data.len() as u64) {
            let offset = (at - BASE) as usize;
            self.copies.known[offset..offset + data.len()].copy_from_slice(data);
            let written = self.guest.write_slice(data, GuestAddress(at));
            written.expect("it is memory");
        }
    }

    /// The device may write nothing from here on.
    pub fn forbid_all(&mut self) {
        self.copies.bytes.fill(0);
        self.marked.clear();
        self.tainted = false;
    }

    /// Marks bytes, which are memory; returns what they were, together.
    fn mark(&mut self, start: u64, len: u64, bits: u8) -> u8 {
        let at = start.saturating_sub(BASE) as usize;
        let bytes = &mut self.copies.bytes[at..at + len as usize];
        // With no branches: the fuzzer's code for each would take most of the time.
        bytes.iter_mut().fold(0, |all, byte| {
            let before = *byte;
            *byte |= bits;
            all | before
        })
    }

    /// A queue's rings; the device writes the last of them.
    pub fn note_rings(&mut self, areas: [(u64, u64); 3]) {
        for (start, len) in areas {
            self.tainted |= self.mark(start, len, RING) != 0;
        }
        let (start, len) = areas[2];
        self.mark(start, len, ALLOWED);
    }

    /// These rings are a queue's no longer; the device may not write the last of them.
    pub fn forget_rings(&mut self, areas: [(u64, u64); 3]) {
        for (start, len) in areas {
            let at = (start - BASE) as usize;
            self.copies.bytes[at..at + len as usize].fill(0);
        }
    }

    /// Entries of an indirect table.
    pub fn note_table(&mut self, start: u64, len: u64) {
        // Several requests may have the same one.
        if self.marked.insert((start, len | 1 << 63)) {
            self.tainted |= self.mark(start, len, RING) & ALLOWED != 0;
        }
    }

    /// The device may write this.
    pub fn allow(&mut self, start: u64, len: u64) {
        if len > 0 && self.marked.insert((start, len)) {
            self.tainted |= self.mark(start, len, ALLOWED) & RING != 0;
        }
    }

    /// All of it, as it is.
    pub fn all(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for (offset, len) in BANKS {
            let mut bytes = vec![0; len as usize];
            let read = self
                .guest
                .read_slice(&mut bytes, GuestAddress(BASE + offset));
            read.expect("it is memory");
            all.extend(bytes);
        }
        all
    }

    /// Takes note of what the device wrote, all of which it must be allowed to.
    pub fn check(&mut self) {
        for (offset, len) in BANKS {
            let range = offset as usize..(offset + len) as usize;
            let read = self
                .guest
                .read_slice(&mut self.copies.now[range], GuestAddress(BASE + offset));
            read.expect("it is memory");
        }
        if self.copies.now == self.copies.known {
            return;
        }
        let Copies { known, now, bytes } = &mut self.copies;
        let blocks = known.chunks_mut(BLOCK).zip(now.chunks(BLOCK));
        let blocks = blocks.zip(bytes.chunks(BLOCK)).zip(0..);
        for (((known, now), bytes), block) in blocks {
            let wrong = |((known, now), byte): ((&u8, &u8), &u8)| {
                (known ^ now) & (byte & ALLOWED).wrapping_sub(1)
            };
            let each = || known.iter().zip(now).zip(bytes);
            // With no branches, as above.
            if each().fold(0, |all, byte| all | wrong(byte)) != 0 && !self.tainted {
                let at = each().position(|byte| wrong(byte) != 0).unwrap_or(0);
                panic!(
                    "the device wrote {:#x} over {:#x} at {:#x}, which is in no buffer",
                    now[at],
                    known[at],
                    BASE as usize + block * BLOCK + at
                );
            }
            known.copy_from_slice(now);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let copies = Copies {
            known: std::mem::take(&mut self.copies.known),
            now: std::mem::take(&mut self.copies.now),
            bytes: std::mem::take(&mut self.copies.bytes),
        };
        SPARE.set(Some(copies));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a device does that writes 4 bytes to 0x20 and was given `len` of them.
    fn write(len: u64) {
        let mut memory = Memory::new();
        memory.poke(BASE + 0x20, &[1; 8]);
        memory.allow(BASE + 0x20, len);
        let written = memory.guest.write_slice(&[2; 4], GuestAddress(BASE + 0x20));
        written.expect("memory");
        memory.check();
        assert_eq!(memory.u64(BASE + 0x20), 0x0101_0101_0202_0202);
    }

    #[test]
    fn a_device_may_write_its_buffers() {
        write(4);
    }

    #[test]
    #[should_panic(expected = "the device wrote 0x2 over 0x1 at 0x100023, which is in no buffer")]
    fn a_byte_behind_a_buffer_is_found() {
        write(3);
    }

    #[test]
    fn nothing_is_said_of_buffers_that_are_rings() {
        let mut memory = Memory::new();
        memory.note_rings([(BASE, 16), (BASE + 16, 8), (BASE + 24, 14)]);
        assert!(!memory.tainted);
        memory.allow(BASE + 38, 100);
        assert!(!memory.tainted);
        memory.allow(BASE + 37, 1);
        assert!(memory.tainted);
    }
}
