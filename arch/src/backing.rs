//! The host pages that back guest memory.

use crate::Architecture;
use crate::range::Range;
use crate::size::{parse_size, show_size};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What was asked for by `--hugepages`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// Transparent huge pages, as far as the host has them.
    #[default]
    Transparent,
    /// None.
    None,
    /// Only huge pages of this size in bytes, from the host's hugetlbfs pool.
    Of(u64),
}

impl HugePages {
    /// Checks that such pages can back the RAM of a guest of architecture `arch`, on a host with
    /// pages of `page` bytes.
    ///
    /// # Errors
    /// When no such host has this size, or a bank is not a multiple of it; with what would work.
    pub fn check(&self, arch: Architecture, page: u64, banks: &[Range]) -> Result<(), String> {
        let HugePages::Of(size) = *self else {
            return Ok(());
        };
        let known = sizes(arch, page);
        if !known.contains(&size) {
            let known: Vec<_> = known.iter().map(|size| show_size(*size)).collect();
            return Err(format!(
                "hosts with pages of {} have no huge pages of that size; use {}",
                show_size(page),
                known.join(", ")
            ));
        }
        let suits = |bank: &Range, size| (bank.start() | bank.size()).is_multiple_of(size);
        let Some(bank) = banks.iter().find(|bank| !suits(bank, size)) else {
            return Ok(());
        };
        let last = banks.last().is_some_and(|last| last == bank);
        let advice = match last && bank.start().is_multiple_of(size) {
            true => {
                let total: u64 = banks.iter().map(|bank| bank.size()).sum();
                let missing = bank.size().next_multiple_of(size) - bank.size();
                format!("use --memory {}", show_size(total + missing))
            }
            false => {
                let fits = |size: &&u64| banks.iter().all(|bank| suits(bank, **size));
                match known.iter().rev().find(fits) {
                    Some(smaller) => format!("use --hugepages {}", show_size(*smaller)),
                    None => "use --hugepages thp".to_owned(),
                }
            }
        };
        Err(format!(
            "the bank at {:#x} with {} is no whole number of such pages; {advice}",
            bank.start(),
            show_size(bank.size())
        ))
    }
}

/// Returns the sizes of huge pages that Linux has in its pools on hosts with pages of `page` bytes,
/// in ascending order (Documentation/arch/arm64/hugetlbpage.rst;
/// arch/x86/include/asm/page_types.h).
fn sizes(arch: Architecture, page: u64) -> &'static [u64] {
    const K: u64 = 1 << 10;
    const M: u64 = 1 << 20;
    const G: u64 = 1 << 30;
    match (arch, page) {
        (Architecture::X86_64, _) => &[2 * M, G],
        (Architecture::Aarch64, 0x4000) => &[2 * M, 32 * M, G],
        (Architecture::Aarch64, 0x1_0000) => &[2 * M, 512 * M, 16 * G],
        (Architecture::Aarch64, _) => &[64 * K, 2 * M, 32 * M, G],
    }
}

impl FromStr for HugePages {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "thp" => Ok(HugePages::Transparent),
            "none" => Ok(HugePages::None),
            size => match parse_size(size) {
                Ok(bytes) if bytes.is_power_of_two() && (1 << 16..=1 << 40).contains(&bytes) => {
                    Ok(HugePages::Of(bytes))
                }
                _ => Err(format!(
                    "'{size}' is not known; use thp, none, or the size of a huge page: 2M, 32M, 1G"
                )),
            },
        }
    }
}

impl fmt::Display for HugePages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HugePages::Transparent => f.write_str("thp"),
            HugePages::None => f.write_str("none"),
            HugePages::Of(size) => f.write_str(&show_size(*size)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_no_such_host_has_or_that_do_not_fill_a_bank_are_refused() {
        let bank = |start, size| Range::new(start, size).expect("a bank");
        let arm = |pages: &str, page, banks: &[Range]| {
            let pages: HugePages = pages.parse().expect("valid");
            pages.check(Architecture::Aarch64, page, banks)
        };
        let one = [bank(1 << 30, 768 << 20)];
        for (pages, page, advice) in [
            ("128K", 0x1000, "use 64K, 2M, 32M, 1G"),
            ("64K", 0x4000, "use 2M, 32M, 1G"),
            ("32M", 0x1_0000, "use 2M, 512M, 16G"),
            ("1G", 0x1000, "use --memory 1G"),
            ("512M", 0x1_0000, "use --memory 1G"),
            // The bank's start is no multiple of it.
            ("16G", 0x1_0000, "use --hugepages 2M"),
        ] {
            let error = arm(pages, page, &one).expect_err(pages);
            assert!(error.ends_with(advice), "{pages}: {error}");
        }
        for pages in ["thp", "none", "2M", "32M"] {
            arm(pages, 0x1000, &one).expect(pages);
        }
        // What is below 4 GiB on a PC does not grow with the memory.
        let two = [bank(0, 3584 << 20), bank(1 << 32, 1 << 30)];
        let pages = HugePages::Of(1 << 30);
        let error = pages
            .check(Architecture::X86_64, 0x1000, &two)
            .expect_err("1G");
        assert!(error.ends_with("use --hugepages 2M"), "{error}");
    }

    #[test]
    fn choices_read_back_as_they_are_shown() {
        for text in ["thp", "none", "64K", "2M", "32M", "1G"] {
            let pages: HugePages = text.parse().expect("valid");
            assert_eq!(pages.to_string(), text);
        }
        for text in ["", "always", "3M", "4K", "0", "2T"] {
            let error = text.parse::<HugePages>().expect_err(text);
            assert!(error.contains("thp, none"), "{error}");
        }
    }
}
