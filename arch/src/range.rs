//! Ranges of guest-physical addresses.

use serde::Serialize;
use std::borrow::Cow;
use std::fmt;

/// A range of guest-physical addresses in bytes: never empty, never past 2^64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Range {
    start: u64,
    size: u64,
}

impl Range {
    /// Creates the range of `size` bytes from `start`; `None` if it is empty or wraps.
    #[must_use]
    pub const fn new(start: u64, size: u64) -> Option<Range> {
        if size == 0 || start.checked_add(size - 1).is_none() {
            return None;
        }
        Some(Range { start, size })
    }

    /// Returns the first address.
    #[must_use]
    pub const fn start(self) -> u64 {
        self.start
    }

    /// Returns the number of bytes, at least 1.
    #[must_use]
    pub const fn size(self) -> u64 {
        self.size
    }

    /// Returns the last address, inclusive (an exclusive end may not exist in 64 bits).
    #[must_use]
    pub const fn last(self) -> u64 {
        self.start + (self.size - 1)
    }

    /// Returns the first address after the range, or `u64::MAX` if there is none.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.last().saturating_add(1)
    }

    /// Returns whether the two share an address.
    #[must_use]
    pub const fn overlaps(self, other: Range) -> bool {
        self.start <= other.last() && other.start <= self.last()
    }

    /// Returns whether all of `other` lies in this range.
    #[must_use]
    pub const fn contains(self, other: Range) -> bool {
        self.start <= other.start && other.last() <= self.last()
    }

    /// Returns how many address bits the last address needs; at least 1.
    #[must_use]
    pub const fn bits(self) -> u8 {
        let bits = u64::BITS - self.last().leading_zeros();
        if bits == 0 { 1 } else { bits as u8 }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.last())
    }
}

/// Rounds `address` up to a multiple of `align` (a power of two); returns `None` past 2^64.
#[must_use]
pub const fn align_up(address: u64, align: u64) -> Option<u64> {
    match address.checked_add(align - 1) {
        Some(sum) => Some(sum & !(align - 1)),
        None => None,
    }
}

/// A named range of the machine's address map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Region {
    /// What lies there ("RAM bank 0", "GIC distributor").
    pub name: Cow<'static, str>,
    /// Where.
    pub range: Range,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn empty_and_wrapping_ranges_do_not_exist() {
        assert_eq!(Range::new(5, 0), None);
        assert_eq!(Range::new(u64::MAX, 2), None);
        assert_eq!(
            Range::new(u64::MAX, 1).map(Range::last),
            Some(u64::MAX),
            "the last byte of all is a range"
        );
    }

    #[test]
    fn bits_are_those_of_the_last_address() {
        let bits = |start, size| Range::new(start, size).map(Range::bits);
        assert_eq!(bits(0, 1 << 32), Some(32));
        assert_eq!(bits(0, (1 << 32) + 1), Some(33));
        assert_eq!(bits(1 << 48, 1), Some(49));
        assert_eq!(bits(0, 1), Some(1));
    }

    proptest! {
        #[test]
        fn overlap_is_symmetric_and_means_a_shared_address(
            a in 0_u64..64, n in 1_u64..32, b in 0_u64..64, m in 1_u64..32,
        ) {
            let (x, y) = (Range::new(a, n).expect("small"), Range::new(b, m).expect("small"));
            let shared = (a..a + n).any(|address| (b..b + m).contains(&address));
            prop_assert_eq!(x.overlaps(y), shared);
            prop_assert_eq!(y.overlaps(x), shared);
            prop_assert_eq!(x.contains(y), a <= b && b + m <= a + n);
        }
    }
}
