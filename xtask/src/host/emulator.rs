//! A running QEMU, and what is heard of it.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::isa::Isa;
use crate::signals::Watch;
use crate::terminal::RawTerminal;

/// Ctrl-], as telnet has it: ends the emulated host at once.
const LEAVE: u8 = 0x1d;

/// How often an emulated x86_64 host is woken.
const WAKE_EVERY: Duration = Duration::from_millis(200);

/// What concerns a running host.
#[derive(Debug)]
pub(super) enum Event {
    /// Its console printed this.
    Output(Vec<u8>),
    /// Its console is gone.
    Closed,
    /// The user pressed Ctrl-].
    Leave,
    /// This process got a signal.
    Signal(i32),
}

/// A running QEMU, which ends when this is dropped.
pub(super) struct Emulator {
    pub(super) child: Child,
}

impl Emulator {
    pub(super) fn start(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = command.spawn().context("cannot start QEMU")?;
        Ok(Self { child })
    }

    /// Returns what the console prints, signals, and with a terminal what the user asks of the rig
    /// itself.
    pub(super) fn events(
        &mut self,
        terminal: Option<&RawTerminal>,
        isa: Isa,
    ) -> Result<(Receiver<Event>, Watch)> {
        let (sender, receiver) = mpsc::channel();
        let signals = sender.clone();
        let watch = Watch::start(move |signal| signals.send(Event::Signal(signal)).is_ok())?;
        let mut console = self.child.stdout.take().context("QEMU has no console")?;
        let mut keys = self.child.stdin.take().context("QEMU has no keyboard")?;

        if terminal.is_some() {
            let sender = sender.clone();
            // Ends with the process: nothing else reads the terminal until then.
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(length @ 1..) = std::io::stdin().read(&mut buffer) {
                    let typed = &buffer[..length];
                    if typed.contains(&LEAVE) {
                        let _ = sender.send(Event::Leave);
                        return;
                    }
                    if keys.write_all(typed).and_then(|()| keys.flush()).is_err() {
                        return;
                    }
                }
            });
        } else if isa == Isa::X86 {
            // QEMU 10.0 now and then loses an interrupt that comes while its CPU enters or leaves a
            // guest (VMRUN sets bits of the CPU's pending interrupts without an atomic operation).
            // Where the lost one is the timer's, and the host idles, nothing wakes it again but an
            // interrupt of another device: the console's, here. Nobody reads what is typed.
            std::thread::spawn(move || {
                while keys.write_all(&[0]).and_then(|()| keys.flush()).is_ok() {
                    std::thread::sleep(WAKE_EVERY);
                }
            });
        }
        std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(length @ 1..) = console.read(&mut buffer) {
                if sender
                    .send(Event::Output(buffer[..length].to_vec()))
                    .is_err()
                {
                    return;
                }
            }
            let _ = sender.send(Event::Closed);
        });
        Ok((receiver, watch))
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // It may have ended by itself, and then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
