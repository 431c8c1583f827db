//! Options that are on, off, or follow what the host offers.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Switch {
    /// On where the host offers it, unless most guests are better off without it.
    #[default]
    Auto,
    /// Required.
    On,
    /// Off.
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

/// `name=switch` pairs of an option's value.
pub(crate) fn pairs<'a>(
    option: &str,
    text: Option<&'a str>,
) -> Result<Vec<(&'a str, Switch)>, String> {
    let items = text.unwrap_or_default().split(',');
    items
        .filter(|item| !item.is_empty())
        .map(|item| {
            let (name, switch) = item
                .split_once('=')
                .ok_or_else(|| format!("{option}: '{item}' has no value; write {item}=off, say"))?;
            let switch = switch
                .parse()
                .map_err(|cause| format!("{option}: {name}: {cause}"))?;
            Ok((name, switch))
        })
        .collect()
}
