//! What pages of the host a guest's memory is made of.

use crate::size::{parse_size, show_size};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What was asked for by `--hugepages`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// Transparent ones, as far as the host finds some.
    #[default]
    Transparent,
    /// None.
    None,
    /// Only pages of this size in bytes, from the pool that the administrator set aside.
    Of(u64),
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
