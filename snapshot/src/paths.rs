//! Where the files of a snapshot are.

use crate::state::Id;
use anyhow::{Context, Result};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// The files of a snapshot: a folder's, or two that are named one by one, as in Firecracker's API.
///
/// The memory file has the banks and nothing else, as handlers of page faults that were made for
/// Firecracker want it. So it cannot say which snapshot it belongs to. While a new pair takes the place
/// of an earlier one, its memory file still has a name with the snapshot's id in it; what is read is
/// that file, where there is one with the id that the state has, and else the one with the plain name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// The state.
    pub state: PathBuf,
    /// The memory.
    pub memory: PathBuf,
    /// The list of pages that are needed first.
    pub prefetch: PathBuf,
    /// The folder, which is made if it is missing; that of a pair is the user's.
    folder: Option<PathBuf>,
}

impl Paths {
    /// Returns those in a folder.
    #[must_use]
    pub fn folder(folder: &Path) -> Paths {
        Paths {
            state: folder.join("state"),
            memory: folder.join("memory"),
            prefetch: folder.join("prefetch"),
            folder: Some(folder.to_owned()),
        }
    }

    /// Returns a pair. The list of pages is beside the memory, with `.prefetch` behind its name.
    #[must_use]
    pub fn pair(state: &Path, memory: &Path) -> Paths {
        let mut prefetch = memory.as_os_str().to_owned();
        prefetch.push(".prefetch");
        Paths {
            state: state.to_owned(),
            memory: memory.to_owned(),
            prefetch: prefetch.into(),
            folder: None,
        }
    }

    /// Returns the folder, of files that are in one.
    pub(crate) fn to_make(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// Returns the path of the memory file of a snapshot whose memory has no plain name yet.
    pub(crate) fn memory_of(&self, id: Id) -> Result<PathBuf> {
        let (folder, name) = split(&self.memory)?;
        Ok(folder.join(with_id(name, id)))
    }
}

/// Returns the folder and the name of a file.
pub(crate) fn split(path: &Path) -> Result<(&Path, &OsStr)> {
    let name = path
        .file_name()
        .with_context(|| format!("{} is no name of a file", path.display()))?;
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    Ok((folder.unwrap_or(Path::new(".")), name))
}

/// Returns the name under which something is written first.
pub(crate) fn temporary(name: &OsStr) -> OsString {
    let mut name = name.to_owned();
    name.push(".tmp");
    name
}

/// Returns the name that the memory file of a snapshot has first.
pub(crate) fn with_id(name: &OsStr, id: Id) -> OsString {
    let mut name = name.to_owned();
    name.push(format!(".{id}.tmp"));
    name
}

/// Returns the id in a name that [`with_id`] made of `name`.
pub(crate) fn id_in(candidate: &OsStr, name: &OsStr) -> Option<Id> {
    let rest = candidate
        .as_encoded_bytes()
        .strip_prefix(name.as_encoded_bytes())?;
    let id = rest.strip_prefix(b".")?.strip_suffix(b".tmp")?;
    str::from_utf8(id).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_ids_are_told_from_others() {
        let id: Id = "0123456789abcdef".parse().expect("an id");
        let name = OsStr::new("memory");
        assert_eq!(with_id(name, id), "memory.0123456789abcdef.tmp");
        assert_eq!(id_in(&with_id(name, id), name), Some(id));
        for other in [
            "memory",
            "memory.tmp",
            "memory.0123456789abcde.tmp",
            "memory.0123456789ABCDEF.tmp",
            "memory.0000000000000000.tmp",
            "memory.0123456789abcdef",
            "other.0123456789abcdef.tmp",
        ] {
            assert_eq!(id_in(OsStr::new(other), name), None, "{other}");
        }
    }

    #[test]
    fn a_path_is_split_into_folder_and_name() {
        let (folder, name) = split(Path::new("memory")).expect("a name");
        assert_eq!((folder, name), (Path::new("."), OsStr::new("memory")));
        assert!(split(Path::new("/")).is_err());
        assert!(split(Path::new("a/..")).is_err());
    }
}
