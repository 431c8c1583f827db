//! Interrupts in the three numberings that meet here.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A shared peripheral interrupt, by its SPI number: the device tree's cell, KVM's irqfd GSI,
/// and INTID - 32 (Arm IHI 0069, section 2.2; virt/kvm: default GSI routing).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Spi(pub u32);

impl Spi {
    /// Returns the INTID of the GIC architecture.
    #[must_use]
    pub const fn intid(self) -> u32 {
        self.0 + 32
    }
}

/// What was asked for by `--gic`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum GicChoice {
    /// GICv3 where the host emulates it, else GICv2.
    #[default]
    Auto,
    /// GICv2.
    V2,
    /// GICv3.
    V3,
}

impl FromStr for GicChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(GicChoice::Auto),
            "2" => Ok(GicChoice::V2),
            "3" => Ok(GicChoice::V3),
            other => Err(format!(
                "GIC version '{other}' is not known; use auto, 2 or 3"
            )),
        }
    }
}

impl fmt::Display for GicChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GicChoice::Auto => "auto",
            GicChoice::V2 => "2",
            GicChoice::V3 => "3",
        })
    }
}
