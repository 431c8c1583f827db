//! Snapshots' files, made by the broker while the guest runs: the process itself is confined by then.

pub use crate::broker::Place;
use crate::broker::{Broker, DraftStep, Service, ServiceId};
use anyhow::{Context, Result, anyhow, bail};
use armlet_snapshot::Id;
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

/// Has the broker make the files of snapshots.
#[derive(Clone, Debug)]
pub struct Drafts {
    broker: Arc<Broker>,
    service: ServiceId,
    /// The folder that was this process's at the start, to which paths are relative.
    here: PathBuf,
}

/// The files of a snapshot that is being written.
#[derive(Debug)]
pub struct Files {
    /// The snapshot.
    pub id: Id,
    /// The file for the state. It is empty.
    pub state: File,
    /// The file for memory. It is empty.
    pub memory: File,
    drafts: Drafts,
    is_committed: bool,
}

/// The most bytes of what the broker says of a failure.
const MOST_WORDS: u64 = 4096;

impl Drafts {
    /// Has `broker` offer it.
    ///
    /// # Errors
    /// A broker that is sealed; no current folder.
    pub fn offer(broker: &Arc<Broker>) -> Result<Drafts> {
        Ok(Drafts {
            broker: Arc::clone(broker),
            service: broker.offer(Service::Snapshots)?,
            here: std::env::current_dir().context("cannot find the current folder")?,
        })
    }

    /// Makes the files of a snapshot under temporary names.
    ///
    /// # Errors
    /// What the system says; another writer at the same place.
    pub fn create(&self, place: &Place) -> Result<Files> {
        let id = Id::random().context("cannot get random numbers")?;
        let memory = file(
            self.broker
                .draft(self.service, id, &place.below(&self.here)),
        )?;
        let state = file(self.broker.step(self.service, DraftStep::State))?;
        Ok(Files {
            id,
            state,
            memory,
            drafts: self.clone(),
            is_committed: false,
        })
    }
}

impl Files {
    /// Makes what was written the snapshot that is there, in place of an earlier one.
    ///
    /// # Errors
    /// What the system says. The earlier snapshot is still there then, or the new one already.
    pub fn commit(&mut self) -> Result<()> {
        let drafts = &self.drafts;
        file(drafts.broker.step(drafts.service, DraftStep::Commit))?;
        self.is_committed = true;
        Ok(())
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        if !self.is_committed {
            let drafts = &self.drafts;
            // If the broker is gone, the next writer removes them.
            let _ = drafts.broker.step(drafts.service, DraftStep::Abandon);
        }
    }
}

/// Returns the file that the broker made, or what it says of a failure.
fn file(answer: io::Result<(bool, File)>) -> Result<File> {
    match answer? {
        (true, file) => Ok(file),
        (false, words) => {
            let mut text = String::new();
            match words.take(MOST_WORDS).read_to_string(&mut text) {
                Ok(1..) => Err(anyhow!(text)),
                _ => bail!("the broker does not say why it made no file"),
            }
        }
    }
}
