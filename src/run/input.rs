//! Standard input on its way to the guest: escape keys, type-ahead, and the pace at which a console
//! takes it.

use super::Ending;
use super::event::{Events, INPUT};
use crate::console::{self, EscapeFilter};
use crate::eintr::uninterrupted;
use crate::kvm::KvmArch;
use crate::machine::{Devices, Machine};
use crate::serial::TICK;
use anyhow::{Context, Result};
use armlet_devices::console::Console;
use armlet_devices::sync::lock;
use rustix::io::Errno;
use rustix::stdio;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

/// How long a guest listens before it gets input: Linux's driver listens for a moment before it
/// throws away what came and begins in earnest (`pl011_hwinit`).
const SETTLE: Duration = Duration::from_millis(1);
/// How often a lock that a vCPU holds is tried before the loop goes on to other things.
const TRIES: usize = 100;
/// Bytes of type-ahead that are kept for a guest that does not read.
const INPUT_BYTES: usize = 4096;

/// Standard input on its way to the guest.
#[derive(Debug, Default)]
pub(super) struct Input {
    filter: EscapeFilter,
    /// Read, and not yet taken by the guest.
    pending: Vec<u8>,
    /// Whether epoll watches it.
    watched: bool,
    /// A file, which epoll does not watch: it can be read at any time.
    always_ready: bool,
    /// A terminal, where escape keys work.
    pub(super) terminal: bool,
    ended: bool,
    /// The time of the guest's listening that has lasted for [`SETTLE`].
    pub(super) session: Option<u64>,
}

/// What came of giving the console input.
enum Handed {
    /// As much as it wanted; whether it wants more than there was.
    All { wants_more: bool },
    /// Nothing; when to try again, if not when it says so itself.
    NotNow(Option<Duration>),
}

impl Events {
    /// Takes what was typed; returns the guest's end, if a key asks for it.
    pub(super) fn read_input<A: KvmArch>(
        &mut self,
        machine: &Machine<A>,
    ) -> Result<Option<Ending>> {
        let devices = &machine.devices;
        let mut buffer = [0_u8; INPUT_BYTES];
        // It is ready, or does not wait.
        let count = match uninterrupted(|| rustix::io::read(stdio::stdin(), &mut buffer)) {
            Ok(0) => {
                self.input.ended = true;
                self.watch_input(false)?;
                return Ok(None);
            }
            Ok(count) => count,
            Err(Errno::AGAIN) => 0,
            Err(error) => {
                log::warn!("cannot read standard input ({error}); the guest gets no more of it");
                self.input.ended = true;
                self.watch_input(false)?;
                0
            }
        };
        if !self.input.terminal {
            self.input.pending.extend_from_slice(&buffer[..count]);
            self.feed(devices)?;
            return Ok(None);
        }
        if !console::is_raw() {
            // Brought back from the background without a signal.
            console::make_raw_again();
        }
        let mut typed = &buffer[..count];
        while !typed.is_empty() {
            let (used, escape) = self.input.filter.take(typed, &mut self.input.pending);
            typed = &typed[used..];
            let ending = escape.and_then(|escape| self.obey(escape.into(), machine));
            if ending.is_some() {
                return Ok(ending);
            }
        }
        // A person who types at a guest that does not read is better off with working escape
        // keys than with all that was typed.
        self.input.pending.truncate(INPUT_BYTES);
        self.feed(devices)?;
        Ok(None)
    }

    /// Hands the guest what it wants of what was typed, and reads on where there is room.
    pub(super) fn feed(&mut self, devices: &Devices) -> Result<()> {
        loop {
            let wants_more = match self.hand_over(devices) {
                Handed::All { wants_more } => wants_more,
                Handed::NotNow(retry) => {
                    self.feed = retry.map(|wait| Instant::now() + wait);
                    false
                }
            };
            // While the guest takes nothing, reading on would only fill our memory. A terminal is
            // read all the same, for its escape keys.
            let read_on = self.input.pending.is_empty() || self.input.terminal;
            self.watch_input(read_on)?;
            let from_file = self.input.always_ready && !self.input.ended;
            if !(from_file && read_on && wants_more) {
                return Ok(());
            }
            self.read_file();
        }
    }

    /// Gives the console as much of what is pending as it wants.
    fn hand_over(&mut self, devices: &Devices) -> Handed {
        if let Some(console) = devices.hvc.as_ref().and_then(|hvc| hvc.current()) {
            // Only this thread and a vCPU that starts or stops the device ever hold it for long.
            let mut console = lock(&console);
            if console.listening().is_some() {
                let (taken, wants_more) = console.receive(&self.input.pending);
                self.input.pending.drain(..taken);
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
        if session != self.input.session {
            self.input.session = session;
            return Handed::NotNow(session.map(|_| SETTLE));
        }
        let (taken, wants_more, action) = serial.receive(&self.input.pending);
        self.queue.tell_action(action);
        self.input.pending.drain(..taken);
        Handed::All { wants_more }
    }

    fn read_file(&mut self) {
        let mut buffer = [0_u8; INPUT_BYTES];
        match uninterrupted(|| rustix::io::read(stdio::stdin(), &mut buffer)) {
            Ok(0) | Err(_) => self.input.ended = true,
            Ok(count) => self.input.pending.extend_from_slice(&buffer[..count]),
        }
    }

    /// Has epoll watch standard input, or not.
    fn watch_input(&mut self, watch: bool) -> Result<()> {
        let fd: RawFd = stdio::stdin().as_raw_fd();
        let event = EpollEvent::new(EventSet::IN, INPUT);
        let watch = watch && !self.input.ended;
        if watch == self.input.watched || self.input.always_ready {
            return Ok(());
        }
        let operation = match watch {
            true => ControlOperation::Add,
            false => ControlOperation::Delete,
        };
        match self.epoll.ctl(operation, fd, event) {
            Ok(()) => self.input.watched = watch,
            // A file or /dev/null.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                self.input.always_ready = true;
            }
            // A closed one.
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => self.input.ended = true,
            Err(error) => return Err(error).context("cannot watch standard input"),
        }
        Ok(())
    }
}

/// The console, if it can be used without waiting for a reader of the output: neither for a vCPU
/// that writes, nor to write what a burst has left. The loop waits for nobody.
pub(super) fn at_hand(
    serial: &Mutex<dyn Console>,
) -> Option<MutexGuard<'_, dyn Console + 'static>> {
    // A vCPU that tells of room still holds the lock, as a rule for an instant only.
    let serial = (0..TRIES).find_map(|_| {
        let free = serial.try_lock().ok();
        if free.is_none() {
            std::thread::yield_now();
        }
        free
    })?;
    (!serial.in_burst() || console::is_output_ready()).then_some(serial)
}
