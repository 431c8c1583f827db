//! SIGTERM, SIGINT and SIGHUP while an emulated host runs: QEMU has to end with xtask, and a
//! terminal has to be as it was.

use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::host::Event;

/// To whom a signal is told; nobody, when it shall end the program as if it were not caught.
static LISTENER: Mutex<Option<Sender<Event>>> = Mutex::new(None);

/// Set once this process catches signals, which it then does until its end.
static CAUGHT: OnceLock<()> = OnceLock::new();

/// Tells `sender` about signals until this is dropped.
#[derive(Debug)]
pub(crate) struct Watch;

impl Watch {
    pub(crate) fn start(sender: Sender<Event>) -> Result<Self> {
        *listener() = Some(sender);
        if CAUGHT.set(()).is_ok() {
            let signals = Signals::new([SIGTERM, SIGINT, SIGHUP]);
            let mut signals = signals.context("cannot catch signals")?;
            thread::spawn(move || {
                for signal in signals.forever() {
                    let told = listener()
                        .as_ref()
                        .is_some_and(|sender| sender.send(Event::Signal(signal)).is_ok());
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

fn listener() -> MutexGuard<'static, Option<Sender<Event>>> {
    LISTENER.lock().unwrap_or_else(PoisonError::into_inner)
}
