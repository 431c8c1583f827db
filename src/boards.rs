//! Boards: the built-in ones, and files that the user names.

use crate::status::{Fault, Status};
use anyhow::{Context, Result, anyhow};
use armlet_arch::Board;
use std::path::Path;

/// The board that is taken when none is named.
pub const DEFAULT: &str = "virt";

/// Built-in boards: name and file.
pub const BUILT_IN: &[(&str, &str)] = &[
    ("virt", include_str!("../boards/virt.toml")),
    ("pc", include_str!("../boards/pc.toml")),
];

/// A board file larger than this is no board file.
const MAX_BYTES: u64 = 1 << 20;

/// The text of a board's file: a built-in one by its name, any other by its path.
///
/// # Errors
/// An unknown name, or a file that cannot be read.
pub fn text(name: &str) -> Result<String> {
    if let Some((_, text)) = BUILT_IN.iter().find(|(known, _)| *known == name) {
        return Ok((*text).to_owned());
    }
    let path = Path::new(name);
    let looks_like_a_path = name.contains('/') || name.ends_with(".toml");
    if !looks_like_a_path && !path.is_file() {
        let known: Vec<_> = BUILT_IN.iter().map(|(name, _)| *name).collect();
        return Err(anyhow!(
            "board '{name}' is not known; built in: {}; or give the path of a TOML file",
            known.join(", ")
        ))
        .fault(Status::Usage);
    }
    read(path)
        .with_context(|| format!("cannot read board file '{name}'"))
        .fault(Status::Usage)
}

fn read(path: &Path) -> Result<String> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(anyhow!("it is no regular file"));
    }
    if metadata.len() > MAX_BYTES {
        return Err(anyhow!(
            "it has {} bytes; a board file has {MAX_BYTES} at most",
            metadata.len()
        ));
    }
    Ok(std::fs::read_to_string(path)?)
}

/// Finds and reads a board.
///
/// # Errors
/// As [`text`], and a file that is no board, with line and reason.
pub fn find(name: &str) -> Result<Board> {
    Board::parse(&text(name)?)
        .with_context(|| format!("board '{name}'"))
        .fault(Status::Usage)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::status_of;

    #[test]
    fn every_built_in_board_is_found_under_its_own_name() {
        for (name, _) in BUILT_IN {
            assert_eq!(find(name).expect("valid").name, *name);
        }
    }

    #[test]
    fn an_unknown_board_is_refused_with_the_known_ones() {
        let error = find("rpi6").expect_err("unknown");
        assert!(format!("{error:#}").contains("virt"), "{error:#}");
        assert_eq!(status_of(&error), Status::Usage);
    }

    #[test]
    fn a_path_may_be_given() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/boards/virt.toml");
        assert_eq!(find(path).expect("the file").name, "virt");
        assert!(find("/nonexistent/x.toml").is_err());
        assert!(find("/").is_err());
    }
}
