//! Which pages are in the balloon, where the host's pages are larger than those.

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// The unit of page numbers in bytes (section 5.5.6).
pub(super) const PAGE: u64 = 4096;

/// Which pages of 4 KiB are in the balloon: a bit for each. It takes memory of the host only where
/// a bit was ever set.
pub(super) struct Inside(Vec<Bank>);

struct Bank {
    /// Address of the first bit's page.
    start: u64,
    words: Vec<u64>,
}

/// Bytes of guest memory that a word is about: more than any host's page.
const WORD_BYTES: u64 = 64 * PAGE;

impl Inside {
    pub(super) fn new(memory: &GuestMemoryMmap) -> Inside {
        let bank = |start: u64, end: u64| {
            let start = start - start % WORD_BYTES;
            let words = vec![0; (end - start).div_ceil(WORD_BYTES) as usize];
            Bank { start, words }
        };
        let banks = memory.iter();
        Inside(
            banks
                .map(|region| {
                    let start = region.start_addr().raw_value();
                    bank(start, start + region.len())
                })
                .collect(),
        )
    }

    /// Returns whether it tells of the pages of this memory.
    pub(super) fn is_of(&self, memory: &GuestMemoryMmap) -> bool {
        let banks = Inside::new(memory);
        let shape = |bank: &Bank| (bank.start, bank.words.len());
        self.0.iter().map(shape).eq(banks.0.iter().map(shape))
    }

    pub(super) fn save(&self) -> Vec<(u64, Vec<u64>)> {
        let banks = self.0.iter();
        banks.map(|bank| (bank.start, bank.words.clone())).collect()
    }

    pub(super) fn restore(banks: Vec<(u64, Vec<u64>)>) -> Inside {
        let banks = banks.into_iter();
        Inside(banks.map(|(start, words)| Bank { start, words }).collect())
    }

    /// Returns the word and the bit of a page; banks that share a word share the first of them.
    fn find(&mut self, page: u64) -> Option<(&mut u64, u32)> {
        self.0.iter_mut().find_map(|bank| {
            let offset = page.checked_sub(bank.start)?;
            let word = bank.words.get_mut((offset / WORD_BYTES) as usize)?;
            Some((word, (offset / PAGE % 64) as u32))
        })
    }

    /// Marks a page; true where that was the last of its page of the host.
    pub(super) fn insert(&mut self, page: u64, host_page: u64) -> bool {
        let Some((word, bit)) = self.find(page) else {
            return false;
        };
        let before = *word;
        *word |= 1 << bit;
        let count = (host_page / PAGE).clamp(1, 64) as u32;
        let all = (u64::MAX >> (64 - count)) << (bit - bit % count);
        *word != before && *word & all == all
    }

    pub(super) fn remove(&mut self, page: u64) {
        if let Some((word, bit)) = self.find(page) {
            *word &= !(1 << bit);
        }
    }
}

/// Calls `each` for the ranges that addresses of pages make, which are in order.
pub(super) fn runs(pages: &[u64], size: u64, mut each: impl FnMut(u64, u64)) {
    let mut run: Option<(u64, u64)> = None;
    for page in pages {
        match &mut run {
            Some((start, len)) if *start + *len == *page => *len += size,
            _ => {
                if let Some((start, len)) = run.replace((*page, size)) {
                    each(start, len);
                }
            }
        }
    }
    if let Some((start, len)) = run {
        each(start, len);
    }
}
