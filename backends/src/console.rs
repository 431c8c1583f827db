//! The terminal as the guest's hvc0 (`--console virtio`).
//!
//! A thread of its own writes the output, so that a reader who does not read holds up that thread
//! only; the guest waits when `ROOM` is full.

use crate::backend::Backend;
use crate::kind::{DeviceOptions, Kind, Place};
use anyhow::{Context, Result, bail};
use armlet_devices::action::Action;
use armlet_devices::console::Output;
use armlet_devices::sync::{self, lock, ring};
use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::console::{Console, Sink};
use rustix::stdio;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// Bytes of output that wait for the reader, beside those on their way to it.
const ROOM: usize = 32 << 10;
/// How often [`HvcConsole::drain`] asks whether to go on.
const ASK: Duration = Duration::from_millis(10);
/// The writer's stack in bytes: it only writes.
const STACK_BYTES: usize = 128 << 10;

/// The virtio console. What the serial port prints is shown too.
pub static KIND: Kind = Kind {
    name: "console",
    letter: None,
    value: "serial|virtio",
    help: "where the terminal is: serial (ttyAMA0, the default) or\nvirtio (hvc0)",
    repeats: false,
    slot: 6,
    default: None,
    parse: |text, _| match text {
        "serial" => Ok(None),
        "virtio" => Ok(Some(Box::new(ConsoleOptions))),
        _ => bail!("--console '{text}' is not known; use serial or virtio"),
    },
};

/// A console that the terminal is connected to: there is nothing else to say of it.
#[derive(Clone, Copy, Debug)]
pub struct ConsoleOptions;

impl DeviceOptions for ConsoleOptions {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn is_terminal(&self) -> bool {
        true
    }

    /// The last console that a command line names is the main one, as soon as its driver is there.
    fn cmdline(&self, _number: usize) -> Option<&'static str> {
        Some("console=hvc0")
    }

    fn open_backend(&self, place: &Place<'_>) -> Result<Box<dyn Backend>> {
        let console = place.console.context("nothing stands behind the console")?;
        Ok(Box::new(Arc::clone(console)))
    }
}

/// Columns and rows of the terminal that armlet runs in; `None` where there is none.
#[must_use]
pub fn terminal_size() -> Option<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(stdio::stdout())
        .or_else(|_| rustix::termios::tcgetwinsize(stdio::stdin()))
        .ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// The virtio console and the thread that writes its output.
pub struct HvcConsole {
    outlet: Arc<Outlet>,
    on_room: Arc<dyn Fn() + Send + Sync>,
    /// The device of the guest that runs now.
    current: Mutex<Option<Arc<Mutex<Console>>>>,
    /// What the thread does, until there is a device: the process is confined by then.
    work: Mutex<Option<Work>>,
}

type Work = Box<dyn FnOnce() + Send>;

impl HvcConsole {
    /// A console whose output goes to `output`, which may wait for its reader. The thread that writes
    /// calls `begin` first, and writes nothing unless that succeeds. `on_room` is called by the
    /// device's thread when the guest has room for input after it had none, `on_action` by the thread
    /// that writes when the output means something for the machine.
    ///
    /// # Errors
    /// A host without room for another descriptor.
    pub fn open(
        output: Box<dyn Output>,
        begin: impl FnOnce() -> Result<()> + Send + 'static,
        on_room: impl Fn() + Send + Sync + 'static,
        on_action: impl Fn(Action) + Send + 'static,
    ) -> Result<HvcConsole> {
        let room = sync::bell().context("cannot make an eventfd")?;
        let outlet = Arc::new(Outlet {
            waiting: Mutex::default(),
            changed: Condvar::new(),
            room,
        });
        let writer = Arc::clone(&outlet);
        let work: Work = Box::new(move || match begin() {
            Ok(()) => writer.write_to(output, on_action),
            Err(error) => log::error!("nothing writes the console's output: {error:#}"),
        });
        Ok(HvcConsole {
            outlet,
            on_room: Arc::new(on_room),
            current: Mutex::default(),
            work: Mutex::new(Some(work)),
        })
    }

    /// The device of the guest that runs now, to give it input and the terminal's size.
    #[must_use]
    pub fn current(&self) -> Option<Arc<Mutex<Console>>> {
        lock(&self.current).clone()
    }

    /// Waits until all output is written, as long as `goes_on` says so, which is asked again and
    /// again. Returns whether it is.
    pub fn drain(&self, mut goes_on: impl FnMut() -> bool) -> bool {
        let mut waiting = lock(&self.outlet.waiting);
        while !(waiting.bytes.is_empty() && waiting.on_their_way == 0) {
            if !goes_on() {
                return false;
            }
            let changed = self.outlet.changed.wait_timeout(waiting, ASK);
            waiting = changed.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Backend for HvcConsole {
    fn name(&self) -> String {
        "console".to_owned()
    }

    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
        if let Some(work) = lock(&self.work).take() {
            // Nobody joins it: it may wait for a reader for ever, and holds nothing.
            std::thread::Builder::new()
                .name("console".to_owned())
                .stack_size(STACK_BYTES)
                .spawn(work)
                .context("cannot start the thread console")?;
        }
        let sink = Box::new(Inlet(Arc::clone(&self.outlet)));
        let on_room = Arc::clone(&self.on_room);
        let console = Console::new(sink, Box::new(move || on_room()), terminal_size());
        let console = Arc::new(Mutex::new(console));
        *lock(&self.current) = Some(Arc::clone(&console));
        Ok(console)
    }
}

/// Output between the device and the thread that writes it.
struct Outlet {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    /// Written when there is room again.
    room: EventFd,
}

#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    /// Bytes that the thread took and writes.
    on_their_way: usize,
    /// Whether the device had bytes for which there was no room.
    refused: bool,
}

impl Outlet {
    /// Takes what there is room for; returns how many bytes.
    fn take(&self, bytes: &[u8]) -> usize {
        let mut waiting = lock(&self.waiting);
        let taken = bytes.len().min(ROOM - waiting.bytes.len());
        waiting.bytes.extend_from_slice(&bytes[..taken]);
        waiting.refused |= taken < bytes.len();
        if taken > 0 && waiting.on_their_way == 0 {
            self.changed.notify_all();
        }
        taken
    }

    /// The thread's life.
    fn write_to(&self, mut output: Box<dyn Output>, on_action: impl Fn(Action)) {
        let mut bytes = Vec::new();
        loop {
            let mut waiting = lock(&self.waiting);
            waiting.on_their_way = 0;
            if waiting.bytes.is_empty() {
                // For those who drain.
                self.changed.notify_all();
            }
            while waiting.bytes.is_empty() {
                let changed = self.changed.wait(waiting);
                waiting = changed.unwrap_or_else(PoisonError::into_inner);
            }
            std::mem::swap(&mut bytes, &mut waiting.bytes);
            waiting.on_their_way = bytes.len();
            if std::mem::take(&mut waiting.refused) {
                ring(&self.room);
            }
            drop(waiting);
            match output.write(&bytes) {
                Action::None => {}
                action => on_action(action),
            }
            bytes.clear();
        }
    }
}

/// The device's end.
struct Inlet(Arc<Outlet>);

impl Sink for Inlet {
    fn write(&mut self, bytes: &[u8]) -> usize {
        self.0.take(bytes)
    }

    fn room(&self) -> Option<RawFd> {
        Some(self.0.room.as_raw_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// An output that writes only when the test lets it.
    fn gated() -> (Box<dyn Output>, Sender<()>, Receiver<Vec<u8>>) {
        let (go, gate) = channel();
        let (tell, told) = channel();
        let write = move |bytes: &[u8]| {
            // Without a test there is nobody left to wait for.
            let _ = gate.recv();
            let _ = tell.send(bytes.to_vec());
        };
        (Box::new(write), go, told)
    }

    fn sink(console: &HvcConsole) -> Inlet {
        // The thread that writes starts with the first device.
        console.device().expect("a device");
        Inlet(Arc::clone(&console.outlet))
    }

    #[test]
    fn output_is_taken_while_the_reader_does_not_read() {
        let (output, go, told) = gated();
        let console = HvcConsole::open(output, || Ok(()), || {}, |_| {}).expect("a thread");
        let mut sink = sink(&console);
        let chunk = vec![b'x'; 1000];
        let mut taken = 0;
        while let count @ 1.. = sink.write(&chunk) {
            taken += count;
            // Waiting, and on their way.
            assert!(taken <= 2 * ROOM, "it takes without end");
        }
        assert!(!console.drain(|| false), "nobody read yet");
        for _ in 0..3 {
            let _ = go.send(());
        }
        assert!(told.recv().expect("output").len() <= ROOM);
    }

    #[test]
    fn room_is_told_after_it_was_missed() {
        let (output, go, told) = gated();
        let console = HvcConsole::open(output, || Ok(()), || {}, |_| {}).expect("a thread");
        let mut sink = sink(&console);
        sink.write(b"first");
        // It is on its way now, or will be with what follows.
        let mut all = 5;
        loop {
            let taken = sink.write(&[b'x'; 4096]);
            all += taken;
            if taken == 0 {
                break;
            }
        }
        let mut written = 0;
        while written < all {
            go.send(()).expect("the thread");
            written += told.recv().expect("output").len();
        }
        assert_eq!(written, all, "every byte, once");
        assert!(console.outlet.room.read().is_ok(), "there is room again");
        assert!(console.drain(|| true));
        assert_eq!(sink.write(b"more"), 4);
    }

    #[test]
    fn output_comes_out_in_order_and_whole() {
        let (tell, told) = channel();
        let write = move |bytes: &[u8]| {
            let _ = tell.send(bytes.to_vec());
        };
        let console =
            HvcConsole::open(Box::new(write), || Ok(()), || {}, |_| {}).expect("a thread");
        let mut sink = sink(&console);
        let wanted: Vec<u8> = (0..200_000_u32).map(|number| number as u8).collect();
        let mut rest = &wanted[..];
        while !rest.is_empty() {
            let taken = sink.write(rest);
            rest = &rest[taken..];
            if taken == 0 {
                std::thread::yield_now();
            }
        }
        assert!(console.drain(|| true));
        let got: Vec<u8> = told.try_iter().flatten().collect();
        assert!(got == wanted);
    }

    #[test]
    fn each_guest_gets_a_device_of_its_own() {
        let console =
            HvcConsole::open(Box::new(|_: &[u8]| {}), || Ok(()), || {}, |_| {}).expect("a thread");
        assert!(console.current().is_none());
        let first = console.device().expect("a device");
        let second = console.device().expect("a device");
        let current = console.current().expect("a device");
        let current: Arc<Mutex<dyn VirtioDevice>> = current;
        assert!(Arc::ptr_eq(&current, &second) && !Arc::ptr_eq(&current, &first));
        assert_eq!(lock(&current).sources().len(), 1);
    }
}
