//! Writes snapshots of a paused machine.

use super::head::Head;
use super::restore::Restore;
use super::{pagemap, pieces};
use anyhow::{Context, Result, anyhow, bail};
use armlet_backends::drafts::{Drafts, Place};
use armlet_snapshot::pages::{Backing, Piece, Progress};
use armlet_snapshot::{Bank, Id, Runs, State, pages};
use armlet_system::eintr::uninterrupted;
use armlet_system::messages;
use serde::Serialize;
use serde_json::Value;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Small, so that a huge page never backs it.
const STACK_BYTES: usize = 256 << 10;
/// How long writing may take before it is said how far it has come, and how often it is said.
const SILENCE: Duration = Duration::from_secs(2);

/// A snapshot that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Where it is to be.
    pub place: Place,
    /// Whether only what changed since the last snapshot is to be in it.
    pub is_diff: bool,
    /// Whether a machine that runs is refused, rather than paused meanwhile.
    pub only_paused: bool,
    /// How the machine was configured, as the API shows it.
    pub microvm: Option<Value>,
}

/// A snapshot that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// What it is called.
    pub id: String,
    /// Bytes of guest memory in it, without holes.
    pub bytes: u64,
    /// How long the writing took, while the machine was paused.
    pub time: Duration,
}

/// How the writing of a snapshot ended.
#[derive(Debug)]
pub struct Outcome {
    /// What was written, and what the next diff is to: or what failed.
    pub written: Result<(Written, Base)>,
}

/// A snapshot that a diff can be to: a whole one, or the last of the diffs since.
#[derive(Clone, Debug)]
pub struct Base {
    id: Id,
    memory: Arc<File>,
    later: Vec<(Arc<File>, Arc<Runs>)>,
}

/// The most diffs to one whole snapshot: each keeps a file open, and its list of pages.
const MOST_DIFFS: usize = 64;

/// What snapshots of a guest are written with, in all of its lives.
#[derive(Debug)]
pub struct Savers {
    drafts: Drafts,
    /// Which pages of this process there are; `None` where /proc does not tell.
    pagemap: Option<Arc<File>>,
    memory: Arc<GuestMemoryMmap>,
    /// What the guest's memory is mapped from, where it is.
    image: Option<Arc<File>>,
    /// Whether a process gives the pages of the guest's memory.
    is_given: bool,
    /// What the next diff is to.
    pub base: Option<Base>,
}

impl Savers {
    /// Prepares for snapshots, before this process is confined. `restored` is the snapshot that the guest
    /// goes on from.
    ///
    /// # Errors
    /// A process without room for another descriptor.
    pub fn new(
        drafts: Drafts,
        memory: &Arc<GuestMemoryMmap>,
        restored: Option<&Restore>,
    ) -> Result<Savers> {
        let mut image = None;
        let mut base = None;
        let from = restored.map(|restore| (restore.id, restore.image()));
        if let Some((id, Some(from))) = from {
            let memory = Arc::new(from.file.try_clone()?);
            let is_mapped = !from.is_copied;
            image = is_mapped.then(|| Arc::clone(&memory));
            let later = Vec::new();
            base = Some(Base { id, memory, later });
        }
        let is_given = matches!(from, Some((_, None)));
        Ok(Savers {
            drafts,
            pagemap: match is_given {
                false => pagemap().map(Arc::new),
                true => None,
            },
            is_given,
            memory: Arc::clone(memory),
            image,
            base,
        })
    }

    /// Begins to write a snapshot of a paused machine, on a thread that `begin` confines. `told` hears how
    /// it ended.
    ///
    /// # Errors
    /// A place where none can be made; a diff to nothing; a host without room for another thread.
    pub fn begin(
        &self,
        wanted: Wanted,
        mut head: Head,
        state: &impl Serialize,
        begin: impl FnOnce() -> Result<()> + Send + 'static,
        told: impl FnOnce(Outcome) + Send + 'static,
    ) -> Result<()> {
        let begun = Instant::now();
        let base = match (wanted.is_diff, &self.base) {
            (false, _) => None,
            (true, Some(base)) if base.later.len() >= MOST_DIFFS => {
                bail!(
                    "there are {MOST_DIFFS} diffs since the last whole snapshot; make a whole one"
                )
            }
            (true, Some(base)) => Some(base.clone()),
            (true, None) => {
                bail!(
                    "there is no earlier snapshot that it could be a diff to; make a whole one first"
                )
            }
        };
        let body = postcard::to_allocvec(state).context("cannot write the machine's state")?;
        head.asked.microvm = wanted.microvm;
        let head = head.to_bytes()?;
        let banks = self.memory.iter().map(|region| Bank {
            start: region.start_addr().0,
            size: region.len(),
        });
        let banks: Vec<Bank> = banks.collect();
        let job = Job {
            drafts: self.drafts.clone(),
            place: wanted.place,
            state: (head, banks, body),
            pagemap: self.pagemap.clone(),
            memory: Arc::clone(&self.memory),
            image: self.image.clone(),
            is_given: self.is_given,
            base,
            begun,
        };
        let work = move || {
            let mut told = Told(Some(told));
            told.tell(begin().and_then(|()| job.write()));
        };
        let builder = std::thread::Builder::new().name("snapshot".to_owned());
        let started = builder.stack_size(STACK_BYTES).spawn(work);
        started.context("cannot start the thread that writes the snapshot")?;
        Ok(())
    }
}

/// Who hears how it ended, whatever happens: a machine waits for it. A release ends at a panic; where threads
/// unwind, their end is told of.
struct Told<F: FnOnce(Outcome)>(Option<F>);

impl<F: FnOnce(Outcome)> Told<F> {
    fn tell(&mut self, written: Result<(Written, Base)>) {
        if let Some(told) = self.0.take() {
            told(Outcome { written });
        }
    }
}

impl<F: FnOnce(Outcome)> Drop for Told<F> {
    fn drop(&mut self) {
        self.tell(Err(anyhow!("the thread that writes the snapshot failed")));
    }
}

/// A snapshot to be written.
struct Job {
    drafts: Drafts,
    place: Place,
    state: (Vec<u8>, Vec<Bank>, Vec<u8>),
    pagemap: Option<Arc<File>>,
    memory: Arc<GuestMemoryMmap>,
    image: Option<Arc<File>>,
    is_given: bool,
    base: Option<Base>,
    begun: Instant,
}

impl Job {
    fn write(self) -> Result<(Written, Base)> {
        let mut files = self.drafts.create(&self.place)?;
        let pieces = match self.is_given {
            false => pieces(&self.memory, self.image.as_deref())?,
            // What was not given yet is no hole.
            true => {
                let whole = self.memory.iter().map(|region| {
                    let slice = region.as_volatile_slice()?;
                    Ok(Piece::new(slice, Backing::Private))
                });
                whole.collect::<Result<_>>()?
            }
        };
        let mut due = self.begun + SILENCE;
        let mut tell = |progress: Progress| {
            if Instant::now() >= due {
                due = Instant::now() + SILENCE;
                messages::say(&format!(
                    "snapshot: {} of {} MiB of guest memory",
                    progress.done >> 20,
                    progress.total >> 20
                ));
            }
            Ok(())
        };
        let pagemap = self.pagemap.as_deref();
        let memory = match &self.base {
            None => pages::write(&pieces, pagemap, &files.memory, &mut tell),
            Some(base) => {
                let later = base.later.iter();
                let base = pages::Base {
                    whole: &base.memory,
                    later: later.map(|(file, runs)| (&**file, &**runs)).collect(),
                };
                pages::write_diff(&pieces, pagemap, &base, &files.memory, &mut tell)
            }
        };
        let memory = memory.context("cannot write guest memory")?;
        let (head, banks, body) = self.state;
        let state = State {
            id: files.id,
            base: self.base.as_ref().map(|base| base.id),
            banks,
            changed: memory.changed.clone(),
            head,
            body,
        };
        state
            .write(&files.state)
            .context("cannot write the machine's state")?;
        // Here, as the broker has others to serve meanwhile.
        for file in [&files.memory, &files.state] {
            let synced = uninterrupted(|| file.sync_all());
            synced.context("cannot write the snapshot to its disk")?;
        }
        files.commit()?;
        let written = Written {
            id: files.id.to_string(),
            bytes: memory.bytes,
            time: self.begun.elapsed(),
        };
        let file = Arc::new(files.memory.try_clone()?);
        let base = match self.base {
            None => Base {
                id: files.id,
                memory: file,
                later: Vec::new(),
            },
            // A diff alone does not say what memory was.
            Some(mut base) => {
                base.later.push((file, Arc::new(memory.changed)));
                Base {
                    id: files.id,
                    ..base
                }
            }
        };
        Ok((written, base))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_thread_that_panics_is_told_of() {
        let (sender, told) = channel();
        let work = move || {
            let mut told = Told(Some(move |outcome: Outcome| {
                let _ = sender.send(
                    outcome
                        .written
                        .expect_err("nothing was written")
                        .to_string(),
                );
            }));
            let nothing = || -> Result<(Written, Base)> { panic!("as it is to") };
            told.tell(nothing());
        };
        assert!(std::thread::spawn(work).join().is_err());
        let why = told.recv().expect("somebody tells");
        assert!(why.contains("thread that writes the snapshot"), "{why}");
    }
}
