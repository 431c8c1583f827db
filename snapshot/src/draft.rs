//! A snapshot on its way: two files under temporary names, which replace the earlier pair in one step.
//!
//! The step is the renaming of `state.tmp`. Before it, what is read is the earlier pair. After it, the
//! new state names the new memory by its id ([`Paths`]), whether that has its plain name already or
//! not. Each step is on the disk before the next: so after a kill or a power cut at any moment one pair
//! or the other is there, whole.

use crate::paths::{Paths, id_in, split, temporary, with_id};
use crate::state::{Error, Id, State};
use anyhow::{Context, Result, bail};
use armlet_system::eintr::uninterrupted;
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, XattrFlags, flock, fsetxattr, fstat,
    fsync, mkdirat, openat, renameat, statat, unlinkat,
};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The attribute of a memory file that says which snapshot it belongs to, on filesystems that have
/// attributes. It notices files that people put together.
pub(crate) const ATTRIBUTE: &str = "user.armlet.snapshot";

/// Two files that become a snapshot. What it made is removed if it is dropped before that.
#[derive(Debug)]
pub struct Draft {
    id: Id,
    state: Slot,
    memory: Slot,
    prefetch: Slot,
    /// Whether the state has its name, and so the temporary files are no longer the draft's.
    is_there: bool,
}

/// A file, its folder, and its names there.
#[derive(Debug)]
struct Slot {
    folder: OwnedFd,
    name: OsString,
    temporary: OsString,
    file: Option<File>,
}

impl Slot {
    /// Finds the folder, and refuses a name that something else than a file has.
    fn find(path: &Path) -> Result<Slot> {
        let (folder, name) = split(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = uninterrupted(|| openat(CWD, folder, flags, Mode::empty()))
            .with_context(|| format!("cannot open the folder {}", folder.display()))?;
        match statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::RegularFile => {}
            Err(Errno::NOENT) => {}
            Ok(_) => bail!(
                "{} is there, and is no file; name another place",
                path.display()
            ),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        }
        Ok(Slot {
            folder,
            name: name.to_owned(),
            temporary: temporary(name),
            file: None,
        })
    }

    /// Makes the file under its temporary name.
    fn make(&mut self) -> Result<(), Errno> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let mode = Mode::RUSR | Mode::WUSR;
        let make = || openat(&self.folder, &self.temporary, flags | OFlags::CLOEXEC, mode);
        self.file = Some(uninterrupted(make)?.into());
        Ok(())
    }

    fn open(&self, name: &OsStr) -> Result<File, Errno> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        uninterrupted(|| openat(&self.folder, name, flags, Mode::empty())).map(File::from)
    }

    fn remove(&self, name: &OsStr) -> Result<(), Errno> {
        match unlinkat(&self.folder, name, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            result => result,
        }
    }

    /// Gives the file that has its temporary name its name.
    fn rename(&self, temporary: &OsStr) -> Result<()> {
        renameat(&self.folder, temporary, &self.folder, &self.name)
            .with_context(|| format!("cannot rename {temporary:?} to {:?}", self.name))
    }

    fn sync_folder(&self) -> Result<()> {
        sync(&self.folder).with_context(|| format!("cannot write the folder of {:?}", self.name))
    }
}

/// Has the system write a file or folder to its disk. Filesystems that have no such thing for folders
/// say so.
fn sync(file: impl AsFd) -> Result<(), Errno> {
    match uninterrupted(|| fsync(&file)) {
        Err(Errno::INVAL) => Ok(()),
        result => result,
    }
}

impl Draft {
    /// Makes the folder if there is none, and the files in it, for a snapshot with a new id. What a
    /// writer that was killed left there is brought to an end or removed.
    ///
    /// # Errors
    /// What the system says; another writer at the same place.
    pub fn create(paths: &Paths) -> Result<Draft> {
        Draft::create_as(paths, Id::random().context("cannot get random numbers")?)
    }

    /// As [`Self::create`], with this id.
    pub fn create_as(paths: &Paths, id: Id) -> Result<Draft> {
        if let Some(folder) = paths.to_make() {
            make_folder(folder)?;
        }
        let mut draft = Draft {
            id,
            state: Slot::find(&paths.state)?,
            memory: Slot::find(&paths.memory)?,
            prefetch: Slot::find(&paths.prefetch)?,
            is_there: false,
        };
        draft.lock(&paths.state)?;
        draft.settle()?;
        draft.memory.temporary = with_id(&draft.memory.name, id);
        // Left by a merge that was killed, which begins again with the same id.
        draft.memory.remove(&draft.memory.temporary)?;
        draft
            .memory
            .make()
            .with_context(|| format!("cannot make a file beside {}", paths.memory.display()))?;
        let attribute = id.to_string();
        // Not every filesystem has attributes.
        let _ = fsetxattr(
            draft.memory(),
            ATTRIBUTE,
            attribute.as_bytes(),
            XattrFlags::empty(),
        );
        Ok(draft)
    }

    /// Returns the snapshot's id, which belongs into its state.
    #[must_use]
    pub fn id(&self) -> Id {
        self.id
    }

    /// Returns the file for the state. It is empty.
    #[must_use]
    pub fn state(&self) -> &File {
        self.state.file.as_ref().expect("it was made")
    }

    /// Returns the file for memory. It is empty.
    #[must_use]
    pub fn memory(&self) -> &File {
        self.memory.file.as_ref().expect("it was made")
    }

    /// Makes what was written the snapshot that is there, in place of an earlier one.
    ///
    /// # Errors
    /// What the system says. The earlier snapshot is still there then, or the new one already.
    pub fn commit(mut self) -> Result<()> {
        step()?;
        sync(self.memory()).context("cannot write the memory file to its disk")?;
        sync(self.state()).context("cannot write the state file to its disk")?;
        self.memory.sync_folder()?;
        step()?;
        self.state.rename(&self.state.temporary)?;
        self.is_there = true;
        step()?;
        self.state.sync_folder()?;
        step()?;
        self.memory.rename(&self.memory.temporary)?;
        step()?;
        self.memory.sync_folder()?;
        // It was the earlier snapshot's. One that stays has that one's id, and is not used.
        let _ = self.prefetch.remove(&self.prefetch.name);
        step()
    }

    /// Takes the place's lock: that of `state.tmp`, which is gone with its holders however they end.
    fn lock(&mut self, path: &Path) -> Result<()> {
        let busy = || {
            let path = path.display();
            format!("another snapshot is being written to {path}; wait, or name another place")
        };
        let cannot = || format!("cannot make a file beside {}", path.display());
        if let Ok(left) = self.state.open(&self.state.temporary) {
            match flock(&left, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => bail!(busy()),
                // Not every filesystem has locks.
                _ => self
                    .state
                    .remove(&self.state.temporary)
                    .with_context(cannot)?,
            }
        }
        match self.state.make() {
            Err(Errno::EXIST) => bail!(busy()),
            made => made.with_context(cannot)?,
        }
        match flock(self.state(), FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => {
                // The other one is about to remove it.
                self.state.file = None;
                bail!(busy())
            }
            _ => Ok(()),
        }
    }

    /// Gives the memory file of the snapshot that is there its plain name if it has none yet, and
    /// removes those of snapshots that never were.
    fn settle(&self) -> Result<()> {
        let current = match self.state.open(&self.state.name) {
            Err(Errno::NOENT) => None,
            Err(error) => return Err(error).context("cannot open the state that is there"),
            Ok(mut file) => match State::read_id(&mut file) {
                Ok(id) => Some(id),
                Err(Error::Io(error)) => {
                    return Err(error).context("cannot read the state that is there");
                }
                // Not known what is its memory: nothing is removed.
                Err(_) => return Ok(()),
            },
        };
        for name in self.leftovers().context("cannot read the folder")? {
            if id_in(&name, &self.memory.name) == current {
                self.memory.rename(&name)?;
                self.memory.sync_folder()?;
            } else {
                let removed = self.memory.remove(&name);
                removed.with_context(|| format!("cannot remove {name:?}, left by a snapshot"))?;
            }
        }
        Ok(())
    }

    /// Returns the names of memory files with an id.
    fn leftovers(&self) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.memory.folder)? {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if id_in(name, &self.memory.name).is_some() {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.is_there || is_cut() {
            return;
        }
        // What stays, the next draft removes.
        if self.memory.file.is_some() {
            let _ = self.memory.remove(&self.memory.temporary);
        }
        if self.state.file.is_some() {
            let _ = self.state.remove(&self.state.temporary);
        }
    }
}

/// Makes a folder, which nobody else may look into, and has its own folder know it.
fn make_folder(folder: &Path) -> Result<()> {
    match mkdirat(CWD, folder, Mode::RWXU) {
        Err(Errno::EXIST) => Ok(()),
        made => {
            made.with_context(|| format!("cannot make the folder {}", folder.display()))?;
            let (parent, _) = split(folder)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            // A folder that may be written to and not be read is no reason to fail.
            match uninterrupted(|| openat(CWD, parent, flags, Mode::empty())) {
                Ok(parent) => Ok(sync(&parent)?),
                Err(_) => Ok(()),
            }
        }
    }
}

/// Whether a file at `path` is this one.
pub(crate) fn is_at(file: &File, path: &Path) -> Result<bool, Errno> {
    let ours = uninterrupted(|| fstat(file))?;
    match uninterrupted(|| statat(CWD, path, AtFlags::empty())) {
        Ok(there) => Ok((there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(not(test))]
fn step() -> Result<()> {
    Ok(())
}

#[cfg(not(test))]
fn is_cut() -> bool {
    false
}

#[cfg(test)]
thread_local! {
    /// How many steps are done before everything ends as by a kill.
    pub(crate) static STEPS: std::cell::Cell<Option<usize>> = const { std::cell::Cell::new(None) };
}

#[cfg(test)]
fn step() -> Result<()> {
    match STEPS.get() {
        Some(0) => bail!("killed"),
        Some(left) => STEPS.set(Some(left - 1)),
        None => {}
    }
    Ok(())
}

#[cfg(test)]
fn is_cut() -> bool {
    STEPS.get().is_some()
}
