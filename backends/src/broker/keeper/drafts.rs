//! The files of snapshots, as the broker makes them.

use super::super::draft::{DraftStep, Place};
use armlet_snapshot::{Draft, Paths};
use rustix::io::Errno;
use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

/// The most bytes of what is said of a failure: what a pipe takes without a reader.
const MOST_WORDS: usize = 4096;

/// Makes the files of one snapshot at a time.
#[derive(Debug, Default)]
pub(super) struct Drafts(RefCell<Option<Draft>>);

impl Drafts {
    /// Begins one, as the bytes of `request` say, in place of one that was not brought to its end. Returns
    /// the file for memory, or why there is none, and which of them it is.
    pub(super) fn create(&self, request: &Path) -> io::Result<(bool, OwnedFd)> {
        let (id, place) = Place::from_path(request).ok_or(Errno::INVAL)?;
        let paths = match &place {
            Place::Folder(folder) => Paths::folder(folder),
            Place::Pair(state, memory) => Paths::pair(state, memory),
        };
        self.0.take();
        match Draft::create_as(&paths, id) {
            Ok(draft) => {
                let memory = draft.memory().try_clone()?;
                self.0.replace(Some(draft));
                Ok((true, memory.into()))
            }
            Err(error) => words(&error),
        }
    }

    /// Goes on with the one that was begun. Returns a file of it, or as [`Self::create`].
    pub(super) fn step(&self, step: u32) -> io::Result<(bool, OwnedFd)> {
        let step = DraftStep::of(step).ok_or(Errno::INVAL)?;
        let mut draft = self.0.borrow_mut();
        let state = draft.as_ref().ok_or(Errno::NOENT)?.state().try_clone()?;
        match step {
            DraftStep::State => {}
            DraftStep::Abandon => drop(draft.take()),
            DraftStep::Commit => {
                if let Some(draft) = draft.take()
                    && let Err(error) = draft.commit()
                {
                    return words(&error);
                }
            }
        }
        Ok((true, state.into()))
    }
}

/// Returns a pipe that says what failed.
fn words(error: &anyhow::Error) -> io::Result<(bool, OwnedFd)> {
    let (words, end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let text = format!("{error:#}");
    let text = &text.as_bytes()[..text.len().min(MOST_WORDS)];
    File::from(end).write_all(text)?;
    Ok((false, words))
}
