//! SIGTERM, SIGINT and SIGHUP while an emulated host runs: QEMU has to end with xtask, and a
//! terminal has to be as it was.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Takes a signal, and says whether somebody still listens.
type Listener = Box<dyn Fn(i32) -> bool + Send>;

/// Who hears of signals. Without one a signal ends the program as if it were not caught.
static LISTENER: Mutex<Option<Listener>> = Mutex::new(None);

/// Set once this process catches signals, which it then does until its end.
static CAUGHT: OnceLock<()> = OnceLock::new();

/// Passes signals on until this is dropped.
#[derive(Debug)]
pub(crate) struct Watch;

impl Watch {
    /// Passes signals to `heard`, which says whether somebody still hears of them.
    pub(crate) fn start(heard: impl Fn(i32) -> bool + Send + 'static) -> Result<Self> {
        *listener() = Some(Box::new(heard));
        if CAUGHT.set(()).is_ok() {
            let signals = Signals::new([SIGTERM, SIGINT, SIGHUP]);
            let mut signals = signals.context("cannot catch signals")?;
            thread::spawn(move || {
                for signal in signals.forever() {
                    let told = listener().as_ref().is_some_and(|heard| heard(signal));
                    if !told {
                        std::process::exit(128 + signal);
                    }
                }
            });
        }
        Ok(Self)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        *listener() = None;
    }
}

fn listener() -> MutexGuard<'static, Option<Listener>> {
    LISTENER.lock().unwrap_or_else(PoisonError::into_inner)
}
