//! How many guest-physical (IPA) address bits a machine gets, and why.

use crate::error::PlanError;
use crate::range::Region;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The smallest width that KVM supports (`ARM64_MIN_PARANGE_BITS`,
/// arch/arm64/include/asm/sysreg.h).
pub const MIN_BITS: u8 = 32;
/// The largest width, with the architecture's 52-bit extensions (FEAT_LPA, FEAT_LPA2).
pub const MAX_BITS: u8 = 52;

/// What was asked for by `--ipa-bits`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum WidthPolicy {
    /// As few bits as the machine's highest address needs.
    #[default]
    Fit,
    /// As many as the host offers.
    Max,
    /// Exactly this many bits, 32 to 52.
    Exact(u8),
}

impl FromStr for WidthPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "fit" => Ok(WidthPolicy::Fit),
            "max" => Ok(WidthPolicy::Max),
            number => match number.parse() {
                Ok(bits @ MIN_BITS..=MAX_BITS) => Ok(WidthPolicy::Exact(bits)),
                _ => Err(format!(
                    "IPA bits '{number}' are not known; use fit, max or a number from {MIN_BITS} to {MAX_BITS}"
                )),
            },
        }
    }
}

impl fmt::Display for WidthPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WidthPolicy::Fit => f.write_str("fit"),
            WidthPolicy::Max => f.write_str("max"),
            WidthPolicy::Exact(bits) => write!(f, "{bits}"),
        }
    }
}

/// The chosen width with its reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Width {
    /// Guest-physical address bits that the VM is created with.
    pub bits: u8,
    /// Bits that the machine needs: those of its highest address, at least 32.
    pub need: u8,
    /// The region with the highest address.
    pub highest: Region,
    /// The most that the host offers, in bits.
    pub limit: u8,
    /// Whether the host offers only this width (KVM before 4.20).
    pub fixed: bool,
    /// Stage-2 translation levels at `bits` on the host's page size.
    pub levels: u8,
    /// Stage-2 translation levels at `limit`.
    pub levels_at_limit: u8,
    /// The host's page size in bytes, which is stage 2's granule.
    pub host_page: u64,
}

/// The widths that a host offers, and their translation levels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offer {
    /// The most bits.
    pub(crate) limit: u8,
    /// Whether it offers only this width.
    pub(crate) fixed: bool,
    /// Bytes of a host page.
    pub(crate) page: u64,
    /// Returns the levels of stage-2 translation for a width in bits and a page size in bytes.
    pub(crate) levels: fn(u8, u64) -> u8,
}

impl Offer {
    /// Chooses the width for a machine whose highest address lies in `highest`. The advice in an
    /// error about the fit is left empty: [`crate::plan()`] fills it in.
    pub(crate) fn choose(self, highest: &Region, policy: WidthPolicy) -> Result<Width, PlanError> {
        let Offer { limit, fixed, .. } = self;
        let need = highest.range.bits().max(MIN_BITS);
        let least = if fixed { limit } else { MIN_BITS };
        if let WidthPolicy::Exact(asked) = policy
            && !(least..=limit).contains(&asked)
        {
            return Err(PlanError::WidthNotOffered {
                asked,
                offered: match fixed {
                    true => format!(
                        "{limit} bits and no other number (its KVM is older than Linux 4.20)"
                    ),
                    false => format!("{MIN_BITS} to {limit} bits"),
                },
            });
        }
        if need > limit {
            return Err(PlanError::TooWide {
                name: highest.name.to_string(),
                last: highest.range.last(),
                need,
                limit,
                fixed,
                advice: String::new(),
            });
        }
        let bits = match policy {
            _ if fixed => limit,
            WidthPolicy::Fit => need,
            WidthPolicy::Max => limit,
            WidthPolicy::Exact(asked) if asked < need => {
                return Err(PlanError::TooNarrow {
                    asked,
                    name: highest.name.to_string(),
                    last: highest.range.last(),
                    need,
                    advice: String::new(),
                });
            }
            WidthPolicy::Exact(asked) => asked,
        };
        Ok(Width {
            bits,
            need,
            highest: highest.clone(),
            limit,
            fixed,
            levels: (self.levels)(bits, self.page),
            levels_at_limit: (self.levels)(limit, self.page),
            host_page: self.page,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_read_back_as_they_are_shown() {
        for policy in [
            WidthPolicy::Fit,
            WidthPolicy::Max,
            WidthPolicy::Exact(32),
            WidthPolicy::Exact(52),
        ] {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
    }

    #[test]
    fn zero_and_widths_out_of_the_architecture_are_refused() {
        for text in ["0", "31", "53", "256", "-1", "", "Fit", "40 "] {
            let error = text.parse::<WidthPolicy>().expect_err(text);
            assert!(error.contains("32 to 52"), "{error}");
        }
    }
}
