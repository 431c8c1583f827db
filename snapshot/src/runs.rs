//! Sets of pages as runs of them, in the form in which they are kept.

use std::ops::Range;

/// Pages by number, as runs in rising order with at least a page between two of them. Each run is two
/// numbers in LEB128: how many pages lie between it and the one before, and how many it has. Kept in
/// this form a list takes as many bytes in memory as in its file, whatever the file claims.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    bytes: Vec<u8>,
    /// The first page behind the last run.
    end: u64,
    pages: u64,
}

impl Runs {
    /// Reads a list that is to hold pages below `limit` only; `None` if it is not one.
    #[must_use]
    pub fn from_bytes(bytes: &[u8], limit: u64) -> Option<Runs> {
        let (mut rest, mut end, mut pages) = (bytes, 0_u64, 0_u64);
        while !rest.is_empty() {
            let gap = take(&mut rest)?;
            let count = take(&mut rest)?;
            // Runs that touch would have been one.
            if count == 0 || (gap == 0 && pages > 0) {
                return None;
            }
            end = end.checked_add(gap)?.checked_add(count)?;
            if end > limit {
                return None;
            }
            pages += count;
        }
        Some(Runs {
            bytes: bytes.to_vec(),
            end,
            pages,
        })
    }

    /// Returns the list as it is kept.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns whether there are no pages.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Returns the number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Adds pages, none of which lies before one that is there.
    ///
    /// # Panics
    /// When one does.
    pub fn push(&mut self, pages: Range<u64>) {
        assert!(pages.start >= self.end, "pages are added in order");
        if pages.is_empty() {
            return;
        }
        let count = pages.end - pages.start;
        if pages.start == self.end && self.pages > 0 {
            // The last run becomes longer.
            let (at, last) = self.last();
            self.bytes.truncate(at);
            put(&mut self.bytes, last + count);
        } else {
            put(&mut self.bytes, pages.start - self.end);
            put(&mut self.bytes, count);
        }
        self.end = pages.end;
        self.pages += count;
    }

    /// Returns the runs, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> {
        let (mut rest, mut end) = (self.bytes.as_slice(), 0);
        std::iter::from_fn(move || {
            let start = end + take(&mut rest)?;
            end = start + take(&mut rest)?;
            Some(start..end)
        })
    }

    /// Returns the pages that are in this list or in `other`.
    #[must_use]
    pub fn union(&self, other: &Runs) -> Runs {
        let mut union = Runs::default();
        let (mut ours, mut theirs) = (self.iter().peekable(), other.iter().peekable());
        loop {
            let next = match (ours.peek(), theirs.peek()) {
                (Some(one), Some(two)) if one.start <= two.start => ours.next(),
                (Some(_), None) => ours.next(),
                (_, Some(_)) => theirs.next(),
                (None, None) => return union,
            };
            if let Some(run) = next {
                let start = run.start.max(union.end);
                union.push(start..run.end.max(start));
            }
        }
    }

    /// Returns where the length of the last run stands, and the length.
    fn last(&self) -> (usize, u64) {
        // A number's last byte alone has the top bit clear.
        let body = &self.bytes[..self.bytes.len() - 1];
        let at = body.iter().rposition(|byte| byte & 0x80 == 0);
        let at = at.map_or(0, |before| before + 1);
        let count = take(&mut &self.bytes[at..]);
        (at, count.unwrap_or_default())
    }
}

/// Writes a number in LEB128.
fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// Takes a number in LEB128, in as few bytes as it needs, from the front.
fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let part = u64::from(byte & 0x7f);
        if part.checked_shl(shift).is_none_or(|it| it >> shift != part) {
            return None;
        }
        number |= part << shift;
        if byte & 0x80 == 0 {
            return (byte != 0 || shift == 0).then_some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn runs(pages: &BTreeSet<u64>) -> Runs {
        let mut runs = Runs::default();
        for page in pages {
            runs.push(*page..page + 1);
        }
        runs
    }

    fn set(runs: &Runs) -> BTreeSet<u64> {
        runs.iter().flatten().collect()
    }

    proptest! {
        #[test]
        fn a_list_holds_what_was_added(pages: BTreeSet<u16>, other: BTreeSet<u16>) {
            let pages = pages.into_iter().map(u64::from).collect();
            let other: BTreeSet<u64> = other.into_iter().map(u64::from).collect();
            let list = runs(&pages);
            prop_assert_eq!(&set(&list), &pages);
            prop_assert_eq!(list.pages(), pages.len() as u64);
            let limit = pages.last().map_or(0, |last| last + 1);
            prop_assert_eq!(Runs::from_bytes(list.bytes(), limit), Some(list.clone()));
            if limit > 0 {
                prop_assert_eq!(Runs::from_bytes(list.bytes(), limit - 1), None);
            }
            let union = list.union(&runs(&other));
            prop_assert_eq!(union, runs(&pages.union(&other).copied().collect()));
        }

        #[test]
        fn no_bytes_are_read_as_pages_beyond_the_limit(bytes: Vec<u8>, limit in 0..200_u64) {
            if let Some(list) = Runs::from_bytes(&bytes, limit) {
                prop_assert!(list.iter().all(|run| run.start < run.end && run.end <= limit));
                prop_assert_eq!(&runs(&set(&list)), &list, "the one form of these pages");
            }
        }
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        assert_eq!(take(&mut &[0xff; 9][..]), None);
        assert_eq!(
            take(&mut &[&[0xff; 9][..], &[1]].concat()[..]),
            Some(u64::MAX)
        );
        assert_eq!(take(&mut &[&[0xff; 9][..], &[2]].concat()[..]), None);
        assert_eq!(take(&mut &[0x80, 0][..]), None);
    }
}
