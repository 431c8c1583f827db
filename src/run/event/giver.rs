//! The process that gives guest memory, where one does: without it the guest would wait for ever, and whatever
//! of armlet touches its memory, the event loop too. So a thread that touches none waits for its end.

use anyhow::{Context, Result};
use armlet_snapshot::faults::Handler;
use armlet_system::messages;
use armlet_system::status::Status;
use armlet_system::terminal;

/// Small, so that a huge page never backs it.
const STACK_BYTES: usize = 64 << 10;

/// The process, until it is watched.
#[derive(Default)]
pub(super) struct Giver(Option<Handler>);

impl Giver {
    /// Keeps it.
    pub(super) fn keep(&mut self, handler: Handler) {
        self.0 = Some(handler);
    }

    /// Begins to watch it on a thread that `begin` confines, if there is one that is not watched yet.
    pub(super) fn watch(&mut self, begin: impl FnOnce() -> Result<()> + Send + 'static) {
        if let Some(handler) = self.0.take()
            && let Err(error) = start(handler, begin)
        {
            messages::say(&format!(
                "nobody watches the process that gives guest memory: {error:#}"
            ));
        }
    }
}

fn start(handler: Handler, begin: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    let work = move || match begin().and_then(|()| handler.wait_for_end()) {
        Ok(()) => end(),
        // Its descriptors stay open: pages that it never gave would read as zeros.
        Err(error) => {
            messages::say(&format!("{error:#}"));
            std::mem::forget(handler);
        }
    };
    let builder = std::thread::Builder::new().name("giver".to_owned());
    let started = builder.stack_size(STACK_BYTES).spawn(work);
    started.context("cannot start the thread giver")?;
    Ok(())
}

/// Ends armlet at once: other threads may wait for pages, and what is written by a disk that gets zeros for
/// them is lost data.
fn end() -> ! {
    messages::say(
        "the process that gives guest memory (--memory-from uffd=SOCKET) has ended, and the guest with it",
    );
    terminal::restore();
    std::process::exit(Status::NoMemory.code().into())
}
