//! Commands to a running machine, from signals, keys, or other threads of this process.

use crate::console::Escape;
use crate::snapshot::{Wanted, Written};
use armlet_backends::backend::Flow;
use armlet_devices::counts::Tally;
use armlet_devices::rate::Limits;
use armlet_devices::virtio::Statistics;
use armlet_system::signals::Taken;
use kvm_ioctls::VcpuFd;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// A command to the machine.
pub enum Command {
    /// Show the counters.
    ShowCounters,
    /// The terminal has changed: its size, or (`true`) its modes too, after a shell had it.
    TerminalChanged(bool),
    /// Press the guest's power key, repeatedly, until it powers off or takes too long.
    PowerKey,
    /// Stop the guest at once. A stop by a signal is reported.
    Stop(By),
    /// Send a break to the serial console.
    Break,
    /// Print the escape keys.
    Help,
    /// Pause the machine until [`Command::Resume`]; answered when it is paused, or with the reason
    /// why it cannot be.
    Pause(Reply<Result<(), String>>),
    /// Resume a paused machine; answered with the reason why it cannot be.
    Resume(Reply<Result<(), String>>),
    /// Save the machine, which is paused meanwhile; answered when the snapshot is there, or with the
    /// reason why there is none.
    Snapshot(Wanted, Reply<Result<Written, String>>),
    /// Set the balloon's target in bytes; answered once the device has it, or with the reason why it
    /// cannot be set.
    SetBalloon(u64, Reply<Result<(), String>>),
    /// Read again the size of a disk's image, by the disk's name; answered with the disk's bytes once
    /// the device has them, or with the reason why not.
    LookAtDisk(String, Reply<Result<u64, String>>),
    /// Answer with what the balloon holds and the guest said of its memory; it is asked anew.
    LookAtBalloon(Reply<Result<BalloonReport, String>>),
    /// Press the guest's power key once; answered with the reason why it cannot be.
    PressPowerKey(Reply<Result<(), String>>),
    /// Give a disk, by its name, the image at this path in place of the one that it has; answered with
    /// the disk's bytes once the device has it, or with the reason why it keeps what it had.
    ChangeDisk(String, PathBuf, Reply<Result<u64, String>>),
    /// Change limits of a device, by its name: those that are named, of what flow. Answered when they
    /// hold, or with the reason why they cannot.
    SetLimits(String, Flow, Limits, Reply<Result<(), String>>),
    /// Tell the guest by VMGenID and VMClock that it was cloned; answered once it is told, or with the
    /// reason why it cannot be. While vCPUs run, this is for hosts whose CPUs have FEAT_S2FWB
    /// ([`Generation::renew`](armlet_devices::generation::Generation::renew)).
    NewGeneration(Reply<Result<(), String>>),
    /// Answer with the machine's state.
    Status(Reply<State>),
    /// Answer with what vCPUs and devices have done.
    Tally(Reply<Done>),
    /// Answer with the counters, as lines for people.
    Counters(Reply<Vec<String>>),
    /// Reset the guest as if it had asked for it; answered before that, or with the reason why it cannot
    /// be.
    Reset(Reply<Result<(), String>>),
    /// Hold all vCPUs for the debugger, until they are released; answered when they stand still, or with
    /// the reason why they do not.
    Hold(Reply<Result<(), String>>),
    /// Release a vCPU that is held, or all.
    Release(Option<usize>),
    /// Run a closure on a vCPU's thread, between two instructions of the guest. It is dropped if
    /// there is no such vCPU, or the vCPU ends first.
    WithVcpu(usize, Box<dyn FnOnce(&mut VcpuFd) + Send>),
}

/// What stopped the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// An escape key at the terminal.
    Key,
    /// A signal.
    Signal,
    /// A client of the control socket.
    Control,
    /// The debugger.
    Debugger,
}

/// The state of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Whether it is paused.
    pub is_paused: bool,
    /// How often the guest was started again.
    pub restarts: u64,
}

/// What vCPUs and devices have done, as far as it is counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// How often vCPUs left KVM for armlet, by reason, in this life of the guest.
    pub exits: Vec<(&'static str, u64)>,
    /// What devices have done, by name, in all lives.
    pub devices: Vec<(String, Tally)>,
    /// Faults of the drivers of virtio devices in this life of the guest, by the device's name.
    pub faults: Vec<(String, u64)>,
    /// How often the guest was started again.
    pub restarts: u64,
}

/// What a balloon holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BalloonReport {
    /// Whether a driver uses it.
    pub is_active: bool,
    /// Bytes that it should hold.
    pub target: u64,
    /// Bytes that it holds.
    pub actual: u64,
    /// What the guest said last of its memory.
    pub statistics: Statistics,
}

/// The sender of a command's answer. It is dropped unused if the guest ends first.
pub struct Reply<T>(SyncSender<T>);

impl<T> Reply<T> {
    /// Creates a reply and its receiver, which reports a disconnection if there will be no answer.
    #[must_use]
    pub fn channel() -> (Reply<T>, Receiver<T>) {
        let (sender, receiver) = sync_channel(1);
        (Reply(sender), receiver)
    }

    pub(crate) fn send(self, answer: T) {
        // The receiver may have given up.
        let _ = self.0.try_send(answer);
    }
}

/// Returns the commands that signals stand for, in the order in which they are carried out.
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
