//! What is said between armlet and its broker of a snapshot's files.

use armlet_snapshot::Id;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Where a snapshot is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a folder, which is made if it is missing.
    Folder(PathBuf),
    /// In two files: the state, and the memory.
    Pair(PathBuf, PathBuf),
}

/// What is to become of a snapshot that was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DraftStep {
    /// The file for its state is asked for.
    State,
    /// It takes the place of the earlier one.
    Commit,
    /// It is removed.
    Abandon,
}

impl DraftStep {
    pub(super) fn of(number: u32) -> Option<DraftStep> {
        let steps = [DraftStep::State, DraftStep::Commit, DraftStep::Abandon];
        steps.into_iter().find(|step| *step as u32 == number)
    }
}

impl Place {
    /// Returns it with paths that are relative to a folder made absolute.
    pub(crate) fn below(&self, folder: &Path) -> Place {
        match self {
            Place::Folder(path) => Place::Folder(folder.join(path)),
            Place::Pair(state, memory) => Place::Pair(folder.join(state), folder.join(memory)),
        }
    }

    /// Writes it, with the snapshot's id, in the place of a path: the id, a letter, and the paths with a
    /// NUL between them.
    pub(super) fn to_path(&self, id: Id) -> PathBuf {
        let mut bytes = id.to_string().into_bytes();
        match self {
            Place::Folder(folder) => {
                bytes.push(b'f');
                bytes.extend(folder.as_os_str().as_bytes());
            }
            Place::Pair(state, memory) => {
                bytes.push(b'p');
                bytes.extend(state.as_os_str().as_bytes());
                bytes.push(0);
                bytes.extend(memory.as_os_str().as_bytes());
            }
        }
        OsString::from_vec(bytes).into()
    }

    /// Reads what [`Self::to_path`] wrote.
    pub(super) fn from_path(path: &Path) -> Option<(Id, Place)> {
        let (id, rest) = path.as_os_str().as_bytes().split_first_chunk::<16>()?;
        let id = std::str::from_utf8(id).ok()?.parse().ok()?;
        let (kind, paths) = rest.split_first()?;
        let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
        let mut paths = paths.split(|byte| *byte == 0).map(path);
        let first = paths.next()?;
        let place = match kind {
            b'f' => Place::Folder(first),
            b'p' => Place::Pair(first, paths.next()?),
            _ => return None,
        };
        paths.next().is_none().then_some((id, place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_as_they_were_written() {
        let id = Id::random().expect("random numbers");
        let places = [
            Place::Folder("/a b".into()),
            Place::Pair("/s".into(), "/tmp/m".into()),
        ];
        for place in places {
            assert_eq!(Place::from_path(&place.to_path(id)), Some((id, place)));
        }
        for wrong in [
            "",
            "0123456789abcdef",
            "0123456789abcdefp/s",
            "g123456789abcdeff/s",
        ] {
            assert_eq!(Place::from_path(Path::new(wrong)), None, "{wrong}");
        }
    }
}
