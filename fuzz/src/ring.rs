//! A queue as the specification has it (virtio 1.2, section 2.7), read anew and apart from the
//! devices' code: what a device may write, and what it owes.

use std::collections::HashMap;

use super::memory::Memory;

/// Flags of a descriptor.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;

/// A queue that the driver said is ready.
#[derive(Debug, Default)]
pub struct Ring {
    /// Entries.
    pub size: u16,
    /// Addresses of descriptor table, available ring and used ring.
    pub table: u64,
    pub available: u64,
    pub used: u64,
    /// The used ring's index as the device last wrote it.
    pub next_used: u16,
    /// The available ring's index as the device last could have seen it.
    last_available: u16,
    /// Whether that index ever passed the ring's size: then each slot may be in use.
    wrapped: bool,
    /// The most requests that the device can have and has not completed.
    owed: u64,
    heads: HashMap<u32, Head>,
}

/// What is known of the requests that began at a descriptor.
#[derive(Clone, Copy, Debug, Default)]
struct Head {
    /// The most bytes that the device may say that it wrote.
    most_written: u64,
    /// Whether one of them was by the rules, as far as they are looked at here.
    was_sound: bool,
}

impl Ring {
    /// One of so many entries, with its rings at these addresses.
    pub fn new(size: u16, [table, available, used]: [u64; 3]) -> Ring {
        Ring {
            size,
            table,
            available,
            used,
            ..Ring::default()
        }
    }

    /// Whether the rings lie in memory as they must.
    pub fn is_valid(&self, memory: &Memory, most: u16) -> bool {
        let size = u64::from(self.size);
        let areas = self.areas();
        size.is_power_of_two()
            && self.size <= most
            && areas.iter().zip([16, 2, 4]).all(|((start, len), align)| {
                start.is_multiple_of(align) && memory.holds(*start, *len)
            })
    }

    /// Start and bytes of the three areas.
    pub fn areas(&self) -> [(u64, u64); 3] {
        let size = u64::from(self.size);
        [
            (self.table, DESCRIPTOR * size),
            (self.available, 6 + 2 * size),
            (self.used, 6 + 8 * size),
        ]
    }

    /// The available ring's index.
    pub fn index(&self, memory: &Memory) -> u16 {
        memory.u16(self.available + 2)
    }

    /// Whether the driver made more available than there is room for, or took something back.
    pub fn is_overfull(&self, memory: &Memory) -> bool {
        self.index(memory).wrapping_sub(self.next_used) > self.size
    }

    /// Whether the device completed all that was made available.
    pub fn is_drained(&self, memory: &Memory) -> bool {
        self.index(memory) == self.next_used
    }

    /// Another process wrote the used ring so far: what it says holds from here on.
    pub fn hand_over(&mut self, memory: &Memory) {
        self.next_used = memory.u16(self.used + 2);
        let waiting = self.index(memory).wrapping_sub(self.next_used);
        self.owed = u64::from(waiting);
        self.wrapped |= self.index(memory) < self.last_available;
        self.last_available = self.index(memory);
    }

    /// Notes what the device can find in the ring now, and what it then may write.
    pub fn look(&mut self, memory: &mut Memory) {
        let index = self.index(memory);
        let fresh = index.wrapping_sub(self.last_available);
        // From an index that is too far ahead, or behind, the device takes nothing. But it need not
        // have looked before the driver went on, so it may have the ring's size more each time.
        self.owed += u64::from(fresh.min(self.size));
        self.wrapped |= index > self.size || index < self.last_available || fresh > self.size;
        self.last_available = index;
        let slots = if self.wrapped { self.size } else { index };
        for slot in 0..u64::from(slots) {
            let head = memory.u16(self.available + 4 + 2 * slot);
            if head < self.size {
                let now = self.walk(memory, head);
                let known = self.heads.entry(u32::from(head)).or_default();
                known.most_written = known.most_written.max(now.most_written);
                known.was_sound |= now.was_sound;
            }
        }
    }

    /// Marks what a request lets the device write.
    fn walk(&self, memory: &mut Memory, head: u16) -> Head {
        let (mut table, mut count, mut index) = (self.table, u64::from(self.size), u64::from(head));
        let mut left = count;
        let (mut most_written, mut has_writable) = (0, false);
        let (mut is_in_order, mut is_ended) = (true, false);
        let mut is_indirect = false;
        while left > 0 && index < count {
            let at = table.wrapping_add(DESCRIPTOR * index);
            if !memory.holds(at, DESCRIPTOR) {
                break;
            }
            if is_indirect {
                memory.note_table(at, DESCRIPTOR);
            }
            let (address, len) = (memory.u64(at), memory.u32(at + 8));
            let (flags, next) = (memory.u16(at + 12), memory.u16(at + 14));
            if flags & INDIRECT != 0 {
                if is_indirect {
                    break;
                }
                is_indirect = true;
                (table, count, index) = (address, u64::from(len) / DESCRIPTOR, 0);
                left = count.min(0xffff);
                continue;
            }
            let is_there = memory.holds(address, u64::from(len));
            if flags & WRITE != 0 {
                if is_there {
                    memory.allow(address, u64::from(len));
                    most_written += u64::from(len);
                }
                has_writable |= len > 0;
            } else {
                is_in_order &= !has_writable;
            }
            if flags & NEXT == 0 {
                is_ended = true;
                break;
            }
            left -= 1;
            index = u64::from(next);
        }
        Head {
            most_written,
            // A buffer outside memory fails the request, which is an answer.
            was_sound: is_in_order && is_ended,
        }
    }

    /// Checks what the device put into the used ring since it was last looked at.
    pub fn check_used(&mut self, memory: &Memory) {
        let index = memory.u16(self.used + 2);
        let count = index.wrapping_sub(self.next_used);
        assert!(
            u64::from(count) <= self.owed,
            "the device completes {count} requests and had {}",
            self.owed
        );
        self.owed -= u64::from(count);
        for back in 0..count.min(self.size) {
            let slot = index.wrapping_sub(1).wrapping_sub(back) % self.size;
            let at = self.used + 4 + 8 * u64::from(slot);
            let (head, len) = (memory.u32(at), memory.u32(at + 4));
            let known = self.heads.get(&head);
            let known = known.unwrap_or_else(|| panic!("request {head} was never made available"));
            let most = known.most_written;
            assert!(
                u64::from(len) <= most,
                "request {head}: the device says that it wrote {len} bytes of {most}"
            );
            assert!(
                known.was_sound,
                "request {head} breaks rules and is answered"
            );
        }
        self.next_used = index;
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::BASE;
    use super::*;

    /// A ring with two requests of 16 bytes to write, of which the first has these flags, and a
    /// device that completes so many of them, with `len` bytes each.
    fn complete(flags: u16, count: u16, len: u32) {
        let (table, available, used) = (BASE, BASE + 0x100, BASE + 0x200);
        let mut memory = Memory::new();
        let mut ring = Ring::new(4, [table, available, used]);
        assert!(ring.is_valid(&memory, 4));
        for (head, flags) in [(0, flags), (1, WRITE)] {
            let at = table + 16 * head;
            memory.poke(at, &(BASE + 0x400 + 16 * head).to_le_bytes());
            memory.poke(at + 8, &16_u32.to_le_bytes());
            memory.poke(at + 12, &flags.to_le_bytes());
            memory.poke(available + 4 + 2 * head, &(head as u16).to_le_bytes());
        }
        memory.poke(available + 2, &2_u16.to_le_bytes());
        ring.look(&mut memory);
        for head in 0..2_u32 {
            let at = used + 4 + 8 * u64::from(head);
            memory.poke(at, &head.to_le_bytes());
            memory.poke(at + 4, &len.to_le_bytes());
        }
        memory.poke(used + 2, &count.to_le_bytes());
        ring.check_used(&memory);
        assert_eq!(ring.is_drained(&memory), count == 2);
    }

    #[test]
    fn a_device_completes_what_it_was_given() {
        complete(WRITE, 0, 0);
        complete(WRITE, 1, 16);
        complete(WRITE, 2, 16);
    }

    #[test]
    #[should_panic(expected = "the device completes 3 requests and had 2")]
    fn one_request_too_many_is_found() {
        complete(WRITE, 3, 16);
    }

    #[test]
    #[should_panic(expected = "request 1: the device says that it wrote 17 bytes of 16")]
    fn a_byte_too_many_is_found() {
        complete(WRITE, 2, 17);
    }

    #[test]
    #[should_panic(expected = "request 0 breaks rules and is answered")]
    fn an_answer_to_what_does_not_end_is_found() {
        complete(WRITE | NEXT, 2, 0);
    }
}
