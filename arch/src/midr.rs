//! Kinds of core, as identified by MIDR_EL1.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A kind of core: MIDR_EL1 without the variant in bits 23:20 and the revision in bits 3:0 (Arm DDI
/// 0487, D23.2.122).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Midr(u32);

impl Midr {
    /// Returns the kind of core whose register holds `register`.
    #[must_use]
    pub const fn kind(register: u64) -> Midr {
        Midr(register as u32 & 0xff0f_fff0)
    }

    /// Returns the register's value for this kind of core, with zeros for variant and revision.
    #[must_use]
    pub const fn register(self) -> u64 {
        self.0 as u64
    }
}

impl fmt::Display for Midr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MIDR {:#010x}", self.0)
    }
}
