//! The pages that a restored guest needs in its first moments: recorded when a snapshot is first restored, and
//! brought later. A thread does either, beside the guest: a large one has many.

use crate::sandbox::{Role, Sandbox};
use crate::snapshot::FirstPages;
use anyhow::{Context, Result};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;

/// How long the first moments last.
const MOMENTS: Duration = Duration::from_secs(1);
/// How long pages that are known are waited with: where there is one CPU, the guest enters it first.
const HEAD_START: Duration = Duration::from_millis(1);
/// Small, so that a huge page never backs it.
const STACK_BYTES: usize = 128 << 10;

/// What is to be done, if anything.
#[derive(Default)]
pub(super) struct Recorder {
    job: Option<Job>,
    due: Option<Instant>,
}

struct Job {
    pages: FirstPages,
    memory: Arc<GuestMemoryMmap>,
    sandbox: Arc<Sandbox>,
}

impl Recorder {
    /// Prepares for it, before this process is confined. `sandbox` will confine the thread.
    pub(super) fn wait_for(
        &mut self,
        pages: Option<FirstPages>,
        memory: &Arc<GuestMemoryMmap>,
        sandbox: &Arc<Sandbox>,
    ) {
        self.job = pages.map(|pages| Job {
            pages,
            memory: Arc::clone(memory),
            sandbox: Arc::clone(sandbox),
        });
    }

    /// Notes that the guest runs, or waits in its vCPUs to be resumed.
    pub(super) fn guest_is_there(&mut self, is_paused: bool) {
        let Some(job) = &self.job else {
            return;
        };
        let wait = match job.pages {
            FirstPages::Known { .. } => HEAD_START,
            FirstPages::Recorded { .. } if is_paused => return,
            FirstPages::Recorded { .. } => MOMENTS,
        };
        self.due.get_or_insert_with(|| Instant::now() + wait);
    }

    /// Returns when [`Self::begin`] is to be called.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.due
    }

    /// Begins.
    pub(super) fn begin(&mut self) {
        self.due = None;
        let Some(job) = self.job.take() else {
            return;
        };
        // The guest gets its pages when it asks for them, too.
        if let Err(error) = job.start() {
            log::info!("the pages that the guest needs first: {error:#}");
        }
    }
}

impl Job {
    fn start(self) -> Result<()> {
        let begin = self.sandbox.entrance(Role::Device);
        let work = move || {
            let done = begin().and_then(|()| self.pages.handle(&self.memory));
            if let Err(error) = done {
                log::info!("the pages that the guest needs first: {error:#}");
            }
        };
        let builder = std::thread::Builder::new().name("prefetch".to_owned());
        let started = builder.stack_size(STACK_BYTES).spawn(work);
        started.context("cannot start the thread prefetch")?;
        Ok(())
    }
}
