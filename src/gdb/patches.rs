//! Breakpoint instructions that stand in the guest's memory in place of its own.

use std::collections::BTreeMap;

/// The most of them.
const MOST: usize = 4096;

/// Guest-physical memory.
pub(super) trait Memory {
    /// Reads some of it; false where there is none.
    fn read(&self, address: u64, bytes: &mut [u8]) -> bool;
    /// Writes some of it, and has vCPUs execute it; false where there is none.
    fn write(&self, address: u64, bytes: &[u8]) -> bool;
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Patch {
    physical: u64,
    original: Vec<u8>,
}

/// The breakpoint instructions, by guest-virtual address.
#[derive(Debug, Default)]
pub(super) struct Patches {
    patches: BTreeMap<u64, Patch>,
}

impl Patches {
    /// Writes one at `address`, which is `physical`; returns whether that was possible.
    pub(super) fn add(
        &mut self,
        address: u64,
        physical: u64,
        code: &[u8],
        memory: &impl Memory,
    ) -> bool {
        if self.patches.contains_key(&address) {
            return true;
        }
        let mut original = vec![0; code.len()];
        if self.patches.len() == MOST
            || !memory.read(physical, &mut original)
            || !memory.write(physical, code)
        {
            return false;
        }
        // Another address may lead to the same memory.
        let mut others = self.patches.values();
        if let Some(other) = others.find(|other| other.physical == physical) {
            original.clone_from(&other.original);
        }
        self.patches.insert(address, Patch { physical, original });
        true
    }

    /// Writes back what was there, unless something else is there by now, such as the kernel that a reset
    /// has loaded again; returns whether there was one.
    pub(super) fn remove(&mut self, address: u64, code: &[u8], memory: &impl Memory) -> bool {
        let Some(patch) = self.patches.remove(&address) else {
            return false;
        };
        let mut others = self.patches.values();
        if others.any(|other| other.physical == patch.physical) {
            return true;
        }
        let mut now = vec![0; code.len()];
        if memory.read(patch.physical, &mut now) && now == code {
            memory.write(patch.physical, &patch.original);
        }
        true
    }

    /// Removes all of them.
    pub(super) fn clear(&mut self, code: &[u8], memory: &impl Memory) {
        while let Some(address) = self.patches.keys().next().copied() {
            self.remove(address, code, memory);
        }
    }

    /// Whether one is at `address`.
    pub(super) fn has(&self, address: u64) -> bool {
        self.patches.contains_key(&address)
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.patches.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    struct Ram(RefCell<Vec<u8>>);

    impl Memory for Ram {
        fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
            let (ram, at) = (self.0.borrow(), address as usize);
            match ram.get(at..at + bytes.len()) {
                Some(found) => bytes.copy_from_slice(found),
                None => return false,
            }
            true
        }

        fn write(&self, address: u64, bytes: &[u8]) -> bool {
            let (mut ram, at) = (self.0.borrow_mut(), address as usize);
            match ram.get_mut(at..at + bytes.len()) {
                Some(found) => found.copy_from_slice(bytes),
                None => return false,
            }
            true
        }
    }

    const CODE: &[u8] = &[0xcc];

    #[test]
    fn memory_is_as_before_once_they_are_removed() {
        let ram = Ram(RefCell::new((0..16).collect()));
        let mut patches = Patches::default();
        assert!(patches.add(0xf000, 4, CODE, &ram) && patches.add(0xf000, 4, CODE, &ram));
        // By another address, too.
        assert!(patches.add(0x4, 4, CODE, &ram));
        assert!(!patches.add(0x8, 99, CODE, &ram), "there is no memory");
        assert!(patches.has(0xf000) && !patches.has(0x8));
        assert_eq!(ram.0.borrow()[4], 0xcc);
        assert!(patches.remove(0xf000, CODE, &ram));
        assert_eq!(ram.0.borrow()[4], 0xcc, "the other is there");
        assert!(patches.remove(0x4, CODE, &ram) && !patches.remove(0x4, CODE, &ram));
        assert_eq!(ram.0.borrow()[4], 4);
        assert!(patches.is_empty());
    }

    #[test]
    fn what_the_guest_wrote_since_is_kept() {
        let ram = Ram(RefCell::new(vec![1; 16]));
        let mut patches = Patches::default();
        assert!(patches.add(1, 1, CODE, &ram) && patches.add(2, 2, CODE, &ram));
        ram.0.borrow_mut()[1] = 7;
        patches.clear(CODE, &ram);
        assert_eq!(ram.0.borrow()[..4], [1, 7, 1, 1]);
    }

    #[test]
    fn there_are_only_so_many() {
        let ram = Ram(RefCell::new(vec![1; 1 << 16]));
        let mut patches = Patches::default();
        for address in 0..MOST as u64 {
            assert!(patches.add(address, address, CODE, &ram));
        }
        assert!(!patches.add(60_000, 60_000, CODE, &ram));
    }
}
