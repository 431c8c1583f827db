//! Records the pages that a restored guest needs in its first moments, once for a snapshot: on a thread of
//! its own, as a large guest has many.

use crate::snapshot::{Recording, pagemap};
use anyhow::{Context, Result};
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;

/// How long the first moments last.
const MOMENTS: Duration = Duration::from_secs(1);
/// Small, so that a huge page never backs it.
const STACK_BYTES: usize = 128 << 10;

/// Confines the thread that calls it.
type Begin = Box<dyn FnOnce() -> Result<()> + Send>;

/// What is to be recorded, if anything.
#[derive(Default)]
pub(super) struct Recorder {
    job: Option<Job>,
    due: Option<Instant>,
}

struct Job {
    recording: Recording,
    memory: Arc<GuestMemoryMmap>,
    pagemap: File,
    begin: Begin,
}

impl Recorder {
    /// Prepares for it, before this process is confined.
    pub(super) fn wait_for(
        &mut self,
        recording: Recording,
        memory: &Arc<GuestMemoryMmap>,
        begin: Begin,
    ) {
        self.job = pagemap().map(|pagemap| Job {
            recording,
            memory: Arc::clone(memory),
            pagemap,
            begin,
        });
    }

    /// Notes that the guest runs.
    pub(super) fn guest_runs(&mut self) {
        if self.job.is_some() && self.due.is_none() {
            self.due = Some(Instant::now() + MOMENTS);
        }
    }

    /// Returns when [`Self::begin`] is to be called.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.due
    }

    /// Records what the guest has used.
    pub(super) fn begin(&mut self) {
        self.due = None;
        let Some(job) = self.job.take() else {
            return;
        };
        let write = move || {
            let begun = (job.begin)();
            let written = begun.and_then(|()| job.recording.write(&job.memory, &job.pagemap));
            if let Err(error) = written {
                log::info!("the pages that the guest needed first are not recorded: {error:#}");
            }
        };
        let builder = std::thread::Builder::new().name("prefetch".to_owned());
        let started = builder.stack_size(STACK_BYTES).spawn(write);
        if let Err(error) = started.context("cannot start the thread prefetch") {
            log::info!("{error:#}");
        }
    }
}
