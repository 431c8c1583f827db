//! What is asked of a running machine, by signals, by keys, or by another thread of this process.

use super::event::{Events, tell_counters};
use super::queue::Queue;
use super::{Ending, input};
use crate::console::{self, ESCAPE_HELP, Escape};
use crate::kvm::KvmArch;
use crate::machine::{Devices, Machine};
use crate::messages;
use crate::shutdown::Shutdown;
use crate::signals::Taken;
use crate::virtio::console::terminal_size;
use armlet_devices::sync::lock;
use kvm_ioctls::VcpuFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// How long the machine may take until it is held. The event loop waits for it.
const LIMIT: Duration = Duration::from_secs(5);

/// What is asked.
pub enum Command {
    /// Show the counters.
    ShowCounters,
    /// The terminal is another: its size, or its modes since a shell had it (`true`).
    TerminalChanged(bool),
    /// Press the guest's power key, again and again until it powers off or takes too long.
    PowerKey,
    /// End the guest at once. By a key, or by a signal, which is said.
    Stop(By),
    /// Send the serial console a break.
    Break,
    /// Say which keys there are.
    Help,
    /// Hold all vCPUs until [`Command::Resume`]; answered when they are held, or why they are not.
    Pause(Reply<Result<(), String>>),
    /// Let held vCPUs run on.
    Resume(Reply<()>),
    /// Do something with a vCPU on its own thread, between two instructions of the guest. It is
    /// dropped where there is no such vCPU, or it ends.
    WithVcpu(usize, Box<dyn FnOnce(&mut VcpuFd) + Send>),
}

/// Who ends the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// Somebody at the terminal.
    Key,
    /// A signal.
    Signal,
}

/// The way to answer a command: once, or never where the guest ends before.
pub struct Reply<T>(SyncSender<T>);

impl<T> Reply<T> {
    /// A reply, and where it arrives; a sender that is gone means that there will be none.
    #[must_use]
    pub fn channel() -> (Reply<T>, Receiver<T>) {
        let (sender, receiver) = sync_channel(1);
        (Reply(sender), receiver)
    }

    fn send(self, answer: T) {
        // Who asked may have given up.
        let _ = self.0.try_send(answer);
    }
}

/// Where other threads send commands to, for as long as a guest runs, through its resets.
#[derive(Clone, Debug)]
pub struct Commands(pub(super) Queue);

impl Commands {
    /// Sends a command. It waits for nothing.
    ///
    /// # Errors
    /// The command, where the guest has ended, or takes no more of them at the time.
    pub fn send(&self, command: Command) -> Result<(), Command> {
        self.0.ask(command)
    }
}

/// What signals ask for, in the order in which it is done.
fn of_signals(taken: Taken) -> impl Iterator<Item = Command> {
    let changed = taken.resized || taken.continued;
    [
        taken.counters.then_some(Command::ShowCounters),
        changed.then_some(Command::TerminalChanged(taken.continued)),
        taken.stop.then_some(Command::Stop(By::Signal)),
        taken.power_key.then_some(Command::PowerKey),
    ]
    .into_iter()
    .flatten()
}

impl From<Escape> for Command {
    fn from(escape: Escape) -> Command {
        match escape {
            Escape::Leave => Command::Stop(By::Key),
            Escape::Help => Command::Help,
            Escape::Break => Command::Break,
        }
    }
}

impl Events {
    /// Does what signals ask for.
    pub(super) fn obey_signals<A: KvmArch>(
        &mut self,
        taken: Taken,
        machine: &Machine<A>,
    ) -> Option<Ending> {
        of_signals(taken).find_map(|command| self.obey(command, machine))
    }

    /// Does what is asked; returns the guest's end, if that is what comes of it.
    pub(super) fn obey<A: KvmArch>(
        &mut self,
        command: Command,
        machine: &Machine<A>,
    ) -> Option<Ending> {
        let devices = &machine.devices;
        match command {
            Command::ShowCounters => tell_counters(&machine.counters),
            Command::TerminalChanged(by_a_shell) => self.look_at_terminal(by_a_shell, devices),
            Command::Help => messages::say(ESCAPE_HELP),
            Command::Break => {
                if let Some(mut serial) = devices.serial.as_deref().and_then(input::at_hand) {
                    self.queue.tell_action(serial.receive_break());
                }
            }
            Command::Stop(by) => {
                if by == By::Signal {
                    messages::say("stopped by a signal");
                }
                return Some(Ending::Stopped);
            }
            Command::PowerKey => return self.ask_to_power_off(devices),
            Command::Pause(reply) => reply.send(machine.pause(LIMIT)),
            Command::Resume(reply) => {
                machine.resume();
                reply.send(());
            }
            Command::WithVcpu(index, task) => {
                // Dropped where nobody does it, which whoever waits for it hears.
                let _ = machine.vcpus.ask(index, task);
            }
        }
        None
    }

    fn look_at_terminal(&self, by_a_shell: bool, devices: &Devices) {
        if by_a_shell && self.input.terminal {
            console::make_raw_again();
        }
        let console = devices.hvc.as_ref().and_then(|hvc| hvc.current());
        if let (Some(console), Some(size)) = (console, terminal_size()) {
            lock(&console).resize(size);
        }
    }

    /// The first SIGTERM or SIGHUP asks the guest to power off, where a vCPU is on to hear it.
    fn ask_to_power_off(&mut self, devices: &Devices) -> Option<Ending> {
        if self.all_off {
            messages::say("stopped by a signal: all of its CPUs are off");
            return Some(Ending::Stopped);
        }
        if !self.press(devices) {
            messages::say("stopped by a signal: this board has no power key");
            return Some(Ending::Stopped);
        }
        self.shutdown = Some(Shutdown::new(Instant::now(), self.patience));
        messages::say("pressed the guest's power key; a second signal stops it at once");
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_obeyed_in_the_order_of_what_they_ask_for() {
        let taken = Taken {
            power_key: true,
            stop: true,
            counters: true,
            resized: false,
            continued: true,
        };
        let commands: Vec<Command> = of_signals(taken).collect();
        assert!(matches!(
            commands[..],
            [
                Command::ShowCounters,
                Command::TerminalChanged(true),
                Command::Stop(By::Signal),
                Command::PowerKey
            ]
        ));
        assert_eq!(of_signals(Taken::default()).count(), 0);
    }

    #[test]
    fn a_reply_that_nobody_waits_for_is_lost_and_one_that_is_dropped_is_noticed() {
        let (reply, answered) = Reply::channel();
        drop(answered);
        reply.send(1);
        let (reply, answered) = Reply::<()>::channel();
        drop(reply);
        assert!(answered.recv().is_err());
    }
}
