//! What is asked of a running machine, by signals, by keys, or by another thread of this process.

use crate::console::Escape;
use armlet_system::signals::Taken;
use kvm_ioctls::VcpuFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

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
    /// Hold the machine until [`Command::Resume`]; answered when it is held, or why it is not.
    Pause(Reply<Result<(), String>>),
    /// Let a machine that is held go on.
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
    /// Returns a reply, and where it arrives; a sender that is gone means that there will be none.
    #[must_use]
    pub fn channel() -> (Reply<T>, Receiver<T>) {
        let (sender, receiver) = sync_channel(1);
        (Reply(sender), receiver)
    }

    pub(super) fn send(self, answer: T) {
        // Who asked may have given up.
        let _ = self.0.try_send(answer);
    }
}

/// Returns what signals ask for, in the order in which it is done.
pub(super) fn of_signals(taken: Taken) -> impl Iterator<Item = Command> {
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
