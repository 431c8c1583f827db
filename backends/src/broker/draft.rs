//! What is said between armlet and its broker of a snapshot's files.

use armlet_snapshot::Id;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Where the files of a snapshot are to be, by absolute paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Draft {
    /// In a folder.
    Folder(PathBuf),
    /// The state, and the memory.
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

impl Draft {
    /// Writes it, with the snapshot's id, in the place of a path: the id, a letter, and the paths with a
    /// NUL between them.
    pub(super) fn to_path(&self, id: Id) -> PathBuf {
        let mut bytes = id.to_string().into_bytes();
        match self {
            Draft::Folder(folder) => {
                bytes.push(b'f');
                bytes.extend(folder.as_os_str().as_bytes());
            }
            Draft::Pair(state, memory) => {
                bytes.push(b'p');
                bytes.extend(state.as_os_str().as_bytes());
                bytes.push(0);
                bytes.extend(memory.as_os_str().as_bytes());
            }
        }
        OsString::from_vec(bytes).into()
    }

    /// Reads what [`Self::to_path`] wrote.
    pub(super) fn from_path(path: &Path) -> Option<(Id, Draft)> {
        let (id, rest) = path.as_os_str().as_bytes().split_first_chunk::<16>()?;
        let id = std::str::from_utf8(id).ok()?.parse().ok()?;
        let (kind, paths) = rest.split_first()?;
        let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
        let mut paths = paths.split(|byte| *byte == 0).map(path);
        let first = paths.next()?;
        let draft = match kind {
            b'f' => Draft::Folder(first),
            b'p' => Draft::Pair(first, paths.next()?),
            _ => return None,
        };
        paths.next().is_none().then_some((id, draft))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_as_they_were_written() {
        let id = Id::random().expect("random numbers");
        let drafts = [
            Draft::Folder("/a b".into()),
            Draft::Pair("/s".into(), "/tmp/m".into()),
        ];
        for draft in drafts {
            assert_eq!(Draft::from_path(&draft.to_path(id)), Some((id, draft)));
        }
        for wrong in [
            "",
            "0123456789abcdef",
            "0123456789abcdefp/s",
            "g123456789abcdeff/s",
        ] {
            assert_eq!(Draft::from_path(Path::new(wrong)), None, "{wrong}");
        }
    }
}
