//! Standard input on its way to the guest: escape keys, type-ahead, and flow control of the
//! console.

use super::queue::Queue;
use crate::console::{self, Escape, EscapeFilter};
use crate::machine::Devices;
use crate::serial::{SerialConsole, TICK};
use anyhow::{Context, Result};
use armlet_devices::sync::lock;
use armlet_system::eintr::uninterrupted;
use armlet_system::terminal;
use rustix::io::Errno;
use rustix::stdio;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// How long a guest must have listened before it gets input: Linux's driver listens briefly before
/// it discards its input and opens the port (`pl011_hwinit`).
const SETTLE: Duration = Duration::from_millis(1);
/// How often to try a lock that a vCPU holds before the loop moves on.
const TRIES: usize = 100;
/// Bytes of type-ahead that are kept for a guest that does not read.
const INPUT_BYTES: usize = 4096;

/// Standard input on its way to the guest.
#[derive(Debug)]
pub(super) struct Input {
    /// The epoll token of standard input.
    token: u64,
    filter: EscapeFilter,
    /// Input that was read and that the guest has not taken yet.
    pending: Vec<u8>,
    /// Whether epoll watches it.
    watched: bool,
    /// Whether it is a file, which epoll cannot watch: it can be read at any time.
    always_ready: bool,
    /// Whether it is a terminal, where escape keys work.
    pub(super) terminal: bool,
    /// Whether the machine is paused: its consoles take no input then, and what is typed waits.
    pub(super) held: bool,
    ended: bool,
    /// The session of the guest's listening that has lasted for [`SETTLE`].
    session: Option<u64>,
    /// When to try again.
    retry: Option<Instant>,
}

/// The result of passing input to the console.
enum Handed {
    /// It took as much as it wanted; whether it wants more than there was.
    All { wants_more: bool },
    /// It took nothing; when to try again, unless it signals that itself.
    NotNow(Option<Duration>),
}

impl Input {
    /// Creates the state of standard input, which has the epoll token `token`.
    pub(super) fn new(token: u64) -> Input {
        Input {
            token,
            filter: EscapeFilter::default(),
            pending: Vec::new(),
            watched: false,
            always_ready: false,
            terminal: false,
            held: false,
            ended: false,
            session: None,
            retry: None,
        }
    }

    /// Begins a new life of the guest, which does not listen yet.
    pub(super) fn begin_life(&mut self) {
        (self.session, self.retry, self.held) = (None, None, false);
    }

    /// Returns when to call [`Self::feed`] again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.retry
    }

    /// Reads what was typed, and returns the escape keys in it. The rest waits for [`Self::feed`].
    ///
    /// # Errors
    /// An error of epoll.
    pub(super) fn read(&mut self, epoll: &Epoll) -> Result<Vec<Escape>> {
        let mut buffer = [0_u8; INPUT_BYTES];
        // The descriptor is ready, or never blocks.
        let count = match uninterrupted(|| rustix::io::read(stdio::stdin(), &mut buffer)) {
            Ok(0) => {
                self.ended = true;
                self.watch(epoll, false)?;
                return Ok(Vec::new());
            }
            Ok(count) => count,
            Err(Errno::AGAIN) => 0,
            Err(error) => {
                log::warn!("cannot read standard input ({error}); the guest gets no more of it");
                self.ended = true;
                self.watch(epoll, false)?;
                0
            }
        };
        if !self.terminal {
            self.pending.extend_from_slice(&buffer[..count]);
            return Ok(Vec::new());
        }
        if !terminal::is_raw() {
            // A shell may have put armlet into the foreground again without a signal.
            terminal::make_raw_again();
        }
        let mut escapes = Vec::new();
        let mut typed = &buffer[..count];
        while !typed.is_empty() {
            let (used, escape) = self.filter.take(typed, &mut self.pending);
            typed = &typed[used..];
            escapes.extend(escape);
        }
        // For a user who types at a guest that does not read, working escape keys are worth more
        // than all of the type-ahead.
        self.pending.truncate(INPUT_BYTES);
        Ok(escapes)
    }

    /// Passes to the guest what it wants of what was typed, and reads more where there is room.
    /// Actions that the guest's output causes meanwhile are sent to `queue`.
    ///
    /// # Errors
    /// An error of epoll.
    pub(super) fn feed(&mut self, epoll: &Epoll, queue: &Queue, devices: &Devices) -> Result<()> {
        self.retry = None;
        loop {
            let wants_more = match self.hand_over(queue, devices) {
                Handed::All { wants_more } => wants_more,
                Handed::NotNow(retry) => {
                    self.retry = retry.map(|wait| Instant::now() + wait);
                    false
                }
            };
            // While the guest takes nothing, reading more would only use memory. A terminal is read
            // anyway, for its escape keys.
            let read_on = self.pending.is_empty() || self.terminal;
            self.watch(epoll, read_on)?;
            let from_file = self.always_ready && !self.ended;
            if !(from_file && read_on && wants_more) {
                return Ok(());
            }
            self.read_file();
        }
    }

    /// Passes as much of the pending input to the console as it wants.
    fn hand_over(&mut self, queue: &Queue, devices: &Devices) -> Handed {
        if self.held {
            return Handed::NotNow(None);
        }
        if let Some(console) = devices.hvc.as_ref().and_then(|hvc| hvc.current()) {
            // Only this thread and a vCPU that starts or stops the device take this lock, none of
            // them for long.
            let mut console = lock(&console);
            if console.listening().is_some() {
                let (taken, wants_more) = console.receive(&self.pending);
                self.pending.drain(..taken);
                return Handed::All { wants_more };
            }
        }
        let Some(serial) = &devices.serial else {
            return Handed::NotNow(None);
        };
        let Some(mut serial) = at_hand(serial) else {
            return Handed::NotNow(Some(TICK));
        };
        let session = serial.listening();
        if session != self.session {
            self.session = session;
            return Handed::NotNow(session.map(|_| SETTLE));
        }
        let (taken, wants_more, action) = serial.receive(&self.pending);
        queue.tell_action(action);
        self.pending.drain(..taken);
        Handed::All { wants_more }
    }

    fn read_file(&mut self) {
        let mut buffer = [0_u8; INPUT_BYTES];
        match uninterrupted(|| rustix::io::read(stdio::stdin(), &mut buffer)) {
            Ok(0) | Err(_) => self.ended = true,
            Ok(count) => self.pending.extend_from_slice(&buffer[..count]),
        }
    }

    /// Adds standard input to epoll, or removes it.
    fn watch(&mut self, epoll: &Epoll, watch: bool) -> Result<()> {
        let fd: RawFd = stdio::stdin().as_raw_fd();
        let event = EpollEvent::new(EventSet::IN, self.token);
        let watch = watch && !self.ended;
        if watch == self.watched || self.always_ready {
            return Ok(());
        }
        let operation = match watch {
            true => ControlOperation::Add,
            false => ControlOperation::Delete,
        };
        match epoll.ctl(operation, fd, event) {
            Ok(()) => self.watched = watch,
            // Standard input is a file or /dev/null.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                self.always_ready = true;
            }
            // Standard input is closed.
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => self.ended = true,
            Err(error) => return Err(error).context("cannot watch standard input"),
        }
        Ok(())
    }
}

/// Returns the console, if it can be used without waiting for a reader of its output: neither for a
/// vCPU that is writing, nor to flush a burst. The event loop must not block.
pub(super) fn at_hand(
    serial: &Mutex<dyn SerialConsole>,
) -> Option<MutexGuard<'_, dyn SerialConsole + 'static>> {
    // A vCPU that has signalled room still holds the lock, usually for an instant only.
    let serial = (0..TRIES).find_map(|_| {
        let free = serial.try_lock().ok();
        if free.is_none() {
            std::thread::yield_now();
        }
        free
    })?;
    (!serial.in_burst() || console::is_output_ready()).then_some(serial)
}
