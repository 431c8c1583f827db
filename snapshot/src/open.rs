//! Opens the two files of a snapshot, as a pair.

use crate::draft::{ATTRIBUTE, is_at};
use crate::paths::Paths;
use crate::state::{Id, State};
use anyhow::{Context, Result, bail};
use armlet_system::eintr::uninterrupted;
use armlet_system::files;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

/// How often a pair is opened anew that is replaced meanwhile.
const TRIES: usize = 10;
/// Bytes that are read at once: a state of some vCPUs.
const AT_ONCE: usize = 128 << 10;

/// A snapshot, open.
#[derive(Debug)]
pub struct Snapshot {
    /// What the machine is besides its memory.
    pub state: State,
    /// The file with its memory: the banks one after another, and nothing else. It may shrink in others'
    /// hands.
    pub memory: File,
}

impl Snapshot {
    /// Opens a snapshot and checks that its memory belongs to it and is all there. A diff is opened
    /// too; [`Self::check_whole`] refuses it.
    ///
    /// # Errors
    /// What is wrong with it, and with which file.
    pub fn open(paths: &Paths) -> Result<Snapshot> {
        for _ in 0..TRIES {
            let (state, file) = read_state(&paths.state)?;
            let memory = open_memory(paths, state.id);
            // A new snapshot's state is put in place before its memory loses the old name.
            if !is_at(&file, &paths.state)? {
                continue;
            }
            let (memory, size) = memory?;
            let wanted = state.memory_size();
            if size != wanted {
                bail!(
                    "{}: it has {size} bytes, and the memory of this snapshot has {wanted}; copy it again, whole",
                    paths.memory.display()
                );
            }
            return Ok(Snapshot { state, memory });
        }
        bail!(
            "{}: it is replaced by one snapshot after another; try again when that has ended",
            paths.state.display()
        )
    }

    /// Reads only the state.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn state(paths: &Paths) -> Result<State> {
        Ok(read_state(&paths.state)?.0)
    }

    /// Refuses a diff, which has only a part of the memory.
    ///
    /// # Errors
    /// That it is one, and what would work.
    pub fn check_whole(state: &State) -> Result<()> {
        match state.base {
            None => Ok(()),
            Some(base) => bail!(
                "it has only what changed since snapshot {base}; apply it to that one: armlet snapshot merge BASE DIFF"
            ),
        }
    }
}

fn read_state(path: &Path) -> Result<(State, File)> {
    let shown = || path.display().to_string();
    let (file, _) = files::open_regular(path).with_context(shown)?;
    let mut from = BufReader::with_capacity(AT_ONCE, &file);
    let state = State::read(&mut from).with_context(shown)?;
    Ok((state, file))
}

/// Opens the memory of the snapshot with this id; returns its size too.
fn open_memory(paths: &Paths, id: Id) -> Result<(File, u64)> {
    let fresh = paths.memory_of(id)?;
    let (path, opened) = match files::open_regular(&fresh) {
        Ok(opened) => (fresh, opened),
        Err(_) => {
            let opened = files::open_regular(&paths.memory);
            let opened = opened.with_context(|| paths.memory.display().to_string())?;
            (paths.memory.clone(), opened)
        }
    };
    let mut told = [0_u8; 16];
    // Copies have lost it, and some filesystems have none: then there is nothing to compare.
    let size = uninterrupted(|| rustix::fs::fgetxattr(&opened.0, ATTRIBUTE, &mut told[..]));
    let other = size
        .ok()
        .and_then(|size| str::from_utf8(&told[..size]).ok());
    let other = other.and_then(|other| other.parse::<Id>().ok());
    if let Some(other) = other.filter(|other| *other != id) {
        bail!(
            "{}: it is the memory of snapshot {other}, and the state is that of {id}; use the two files of one snapshot",
            path.display()
        );
    }
    Ok(opened)
}
