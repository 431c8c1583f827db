//! A board as its file gives it, with the places that its values come from.

use super::Board;
use super::error::BoardError;
use super::fields::{Fields, Line, Record};
use super::layers::{self, Find};
use super::read::board;

impl Board {
    /// Reads the text of a board file that inherits from no other.
    ///
    /// # Errors
    /// As [`Profile::read`].
    pub fn parse(text: &str) -> Result<Board, BoardError> {
        let alone =
            |_: &str, name: &str| Err(format!("is '{name}', and no other board is at hand"));
        Ok(Profile::read("", text, &alone)?.board)
    }
}

/// A board with the places that its values come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// The board.
    pub board: Board,
    lines: Vec<Line>,
}

impl Profile {
    /// Reads a board file's text. `name` is what the file is called, `find` finds those that it
    /// inherits from.
    ///
    /// # Errors
    /// [`BoardError`]: no TOML, unknown or missing keys, values out of range. Overlaps are found
    /// when a machine is planned, since they depend on the memory asked for.
    pub fn read(name: &str, text: &str, find: Find<'_>) -> Result<Profile, BoardError> {
        let tree = layers::read(name, text, find)?;
        let record = Record::default();
        let board = board(Fields::top(tree, Some(&record)))?;
        Ok(Profile {
            board,
            lines: record.into_inner(),
        })
    }

    /// Returns the board as a file that inherits from no other: behind each value the line that it
    /// comes from, in this board's own file or in the one named, and the comment that stands there.
    #[must_use]
    pub fn show(&self) -> String {
        let mut out = String::new();
        for line in &self.lines {
            match line {
                Line::Table(head) => out += &format!("\n{head}\n"),
                Line::Value {
                    key,
                    written,
                    place,
                    note,
                } => {
                    let from = match place {
                        None => "default".to_owned(),
                        Some(place) => {
                            let file = place.parent.as_deref().unwrap_or(&self.board.name);
                            format!("{file}:{}", place.line)
                        }
                    };
                    let space = if note.is_empty() { "" } else { "  " };
                    out += &format!(
                        "{:<39} # {from}{space}{note}\n",
                        format!("{key} = {written}")
                    );
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VIRT: &str = include_str!("../../../boards/virt.toml");

    fn refused(from: &str, to: &str) -> BoardError {
        assert!(VIRT.contains(from), "the test replaces what is not there");
        Board::parse(&VIRT.replacen(from, to, 1)).expect_err(to)
    }

    #[test]
    fn the_built_in_board_is_read() {
        let board = Board::parse(VIRT).expect("valid");
        assert_eq!(board.name, "virt");
        assert_eq!(board.guest.memory, 512 << 20);
        assert_eq!(board.memory[0].base, 0x4000_0000);
        assert_eq!(board.devices.len(), 3);
        assert_eq!(board.gic.map(|gic| gic.redistributor_frames), Some(123));
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_the_nearest_one() {
        let error = refused("ipa-limit = 48", "ipa-limit = 48\nipa-limitt = 3");
        let BoardError::UnknownKey {
            place,
            key,
            nearest,
            ..
        } = &error
        else {
            panic!("{error}");
        };
        assert_eq!(
            (key.as_str(), nearest.as_str()),
            ("ipa-limitt", "ipa-limit")
        );
        assert!(
            VIRT.lines()
                .nth(place.line - 2)
                .is_some_and(|text| text.contains("ipa-limit"))
        );
    }

    #[test]
    fn a_missing_field_is_named_with_an_example() {
        let error = refused("distributor = 0x0800_0000\n", "");
        assert_eq!(
            error.to_string(),
            "[gic] lacks 'distributor'; add distributor = 0x0800_0000"
        );
        assert!(matches!(
            refused("[[memory]]\nbase = 0x4000_0000", ""),
            BoardError::Missing { .. }
        ));
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for (from, to) in [
            ("ipa-limit = 48", "ipa-limit = 56"),
            ("page-size = \"4K\"", "page-size = \"8K\""),
            ("gic = [3]", "gic = [4]"),
            ("features = [\"pmu\"", "features = [\"fpu\""),
            ("cpus = 1", "cpus = 1\npmu = \"yes\""),
            ("memory = \"512M\"", "memory = \"many\""),
            ("memory = \"512M\"", "memory = 512"),
            ("cpus = 1", "cpus = -1"),
            ("spi = 1", "spi = 960"),
            ("0x0800_0000", "0x0800_1000"),
            ("kind = \"pl011\"", "kind = \"ns16550\""),
            ("arch = \"aarch64\"", "arch = \"riscv\""),
        ] {
            assert!(
                matches!(refused(from, to), BoardError::Value { .. }),
                "{to}"
            );
        }
        assert!(matches!(
            refused("cpus = 1", "cpus = "),
            BoardError::Syntax { .. }
        ));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC*", at in 0..VIRT.len()) {
            let _ = Board::parse(&text);
            if VIRT.is_char_boundary(at) {
                let _ = Board::parse(&format!("{}{text}{}", &VIRT[..at], &VIRT[at..]));
            }
        }
    }
}
