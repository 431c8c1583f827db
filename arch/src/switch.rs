//! Something that a guest can have, or not, or as the host offers it.

use std::fmt;
use std::str::FromStr;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Switch {
    /// As the host offers it and as is best for most guests.
    #[default]
    Auto,
    /// It has to be there.
    On,
    /// It is not there.
    Off,
}

impl FromStr for Switch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Switch::Auto),
            "on" => Ok(Switch::On),
            "off" => Ok(Switch::Off),
            other => Err(format!("'{other}' is not known; use on, off or auto")),
        }
    }
}

impl fmt::Display for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Switch::Auto => "auto",
            Switch::On => "on",
            Switch::Off => "off",
        })
    }
}
