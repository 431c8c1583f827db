//! The terminal's modes: raw while a guest uses it, and restored however armlet ends.

use crate::raise::raise;
use anyhow::{Context, Result};
use armlet_devices::sync::lock;
use rustix::stdio;
use rustix::termios::{self, LocalModes, OptionalActions, Termios};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// The terminal's original modes, while armlet has changed them.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);
/// Whether the terminal is raw, so that messages need carriage returns.
static RAW: AtomicBool = AtomicBool::new(false);

/// Returns the line ending for the terminal's current mode.
#[must_use]
pub fn line_end() -> &'static str {
    match RAW.load(Ordering::Relaxed) {
        true => "\r\n",
        false => "\n",
    }
}

/// The terminal in raw mode, from [`RawTerminal::enter`] until it is dropped. A crash of armlet
/// restores the modes too.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes standard input raw if it is a terminal.
    ///
    /// # Errors
    /// When the terminal's modes cannot be set.
    pub fn enter() -> Result<Option<RawTerminal>> {
        let input = stdio::stdin();
        if !termios::isatty(input) {
            return Ok(None);
        }
        let modes = termios::tcgetattr(input).context("cannot read the terminal's modes")?;
        let raw = raw_of(&modes);
        *saved() = Some(modes);
        restore_at_crash();
        termios::tcsetattr(input, OptionalActions::Now, &raw)
            .context("cannot make the terminal raw")?;
        RAW.store(true, Ordering::Relaxed);
        Ok(Some(RawTerminal(())))
    }
}

fn raw_of(modes: &Termios) -> Termios {
    let mut raw = modes.clone();
    raw.make_raw();
    raw
}

/// Makes the terminal raw again after another program changed the modes that a [`RawTerminal`] set:
/// a shell restores its own while armlet is stopped. In the background the terminal is left alone
/// until the next call.
pub fn make_raw_again() {
    let input = stdio::stdin();
    let mut saved = saved();
    let Some(before) = saved.as_mut() else {
        return;
    };
    if !is_foreground() {
        RAW.store(false, Ordering::Relaxed);
        return;
    }
    let Ok(modes) = termios::tcgetattr(input) else {
        return;
    };
    // If the modes are still raw, there is nothing to do.
    if modes.local_modes.contains(LocalModes::ICANON) {
        *before = modes;
    }
    let set = termios::tcsetattr(input, OptionalActions::Now, &raw_of(before));
    RAW.store(set.is_ok(), Ordering::Relaxed);
}

/// Returns whether armlet has put the terminal into raw mode.
#[must_use]
pub fn is_raw() -> bool {
    RAW.load(Ordering::Relaxed)
}

/// Returns whether the terminal may be changed: in the background, that would stop the process
/// (SIGTTOU). A terminal of another session has no background.
fn is_foreground() -> bool {
    termios::tcgetpgrp(stdio::stdin()).map_or(true, |group| group == rustix::process::getpgrp())
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn saved() -> std::sync::MutexGuard<'static, Option<Termios>> {
    lock(&SAVED)
}

/// Restores the terminal's original modes. Async-signal-safe.
pub fn restore() {
    // If armlet crashes while the modes are being saved, the lock is held, and they are unchanged.
    if let Ok(mut saved) = SAVED.try_lock()
        && let Some(modes) = saved.take()
    {
        RAW.store(false, Ordering::Relaxed);
        // In the background, the shell has restored them already.
        if is_foreground() {
            let _ = termios::tcsetattr(stdio::stdin(), OptionalActions::Now, &modes);
        }
    }
}

/// Restores the modes on a crash. A panic aborts, so handlers for the signals of crashes cover it
/// too.
fn restore_at_crash() {
    extern "C" fn crashed(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        restore();
        // SAFETY: the call is async-signal-safe; the default action of these signals ends the
        // process as it would have ended without this handler.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        raise(signal);
    }
    for signal in [
        libc::SIGABRT,
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
    ] {
        let _ = vmm_sys_util::signal::register_signal_handler(signal, crashed);
    }
}
