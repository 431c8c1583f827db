//! Why a board file is refused, and where in it.

use std::fmt;
use std::sync::Arc;

/// Why a board file was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BoardError {
    /// Invalid TOML.
    #[error("{place}: {cause}")]
    Syntax {
        /// Where.
        place: Place,
        /// What the parser says.
        cause: String,
    },
    /// An unknown key.
    #[error(
        "{place}: unknown key '{key}' in {table}; did you mean '{nearest}'? Known here: {known}"
    )]
    UnknownKey {
        /// Where.
        place: Place,
        /// The key.
        key: String,
        /// The table that contains it.
        table: String,
        /// The known key that is most similar.
        nearest: String,
        /// All known keys of the table.
        known: String,
    },
    /// A key that each board must have.
    #[error("{table} lacks '{key}'; add {example}")]
    Missing {
        /// The table.
        table: String,
        /// The key.
        key: String,
        /// How it is written.
        example: String,
    },
    /// An invalid value.
    #[error("{place}: '{key}' {cause}")]
    Value {
        /// Where.
        place: Place,
        /// The key.
        key: String,
        /// What is wrong and what is valid.
        cause: String,
    },
}

/// The place of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The board file, if it is not the one that was asked for.
    pub parent: Option<Arc<str>>,
    /// Its line, from 1.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.parent {
            None => write!(f, "line {}", self.line),
            Some(parent) => write!(f, "line {} of '{parent}'", self.line),
        }
    }
}
