//! The event loop's queue. It holds at most one event of each kind, however often a guest causes
//! it.

use super::command::Command;
use crate::snapshot::Outcome;
use crate::vcpu::VcpuEvent;
use armlet_devices::action::Action;
use armlet_devices::sync::{lock, ring};
use std::fmt;
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

/// An event.
#[derive(Debug)]
pub(super) enum Event {
    /// A vCPU's event.
    Vcpu(VcpuEvent),
    /// The console has room for input.
    Room,
    /// A burst of output began.
    Burst,
    /// The clock's alarm was changed.
    Deadline,
    /// The snapshot that was being written is there, or is not.
    Saved(Box<Outcome>),
}

/// The most pending commands. A sender usually waits for an answer before it sends the next one.
const COMMANDS: usize = 16;

/// The pending events and commands.
#[derive(Default)]
pub(super) struct News {
    /// The commands, in order.
    commands: Vec<Command>,
    /// Whether the event loop has ended.
    closed: bool,
    /// The first panic that the guest's kernel printed.
    pub(super) panicked: Option<String>,
    /// The guest's end or reset: the first one reported.
    pub(super) end: Option<VcpuEvent>,
    /// A vCPU is to be asked whether it is off.
    pub(super) asked: bool,
    /// All vCPUs are off.
    pub(super) all_off: bool,
    /// The console has room for input.
    pub(super) room: bool,
    /// A burst of output began.
    pub(super) burst: bool,
    /// The clock's alarm was changed.
    pub(super) deadline: bool,
    /// How the writing of a snapshot ended.
    pub(super) saved: Option<Box<Outcome>>,
}

impl News {
    /// Adds an event; returns whether it is new.
    fn add(&mut self, event: Event) -> bool {
        let flag = match event {
            Event::Vcpu(VcpuEvent::Panicked(what)) => {
                let is_first = self.panicked.is_none();
                self.panicked.get_or_insert(what);
                return is_first;
            }
            Event::Vcpu(VcpuEvent::Asked) => &mut self.asked,
            Event::Vcpu(VcpuEvent::AllOff) => &mut self.all_off,
            Event::Vcpu(told) => {
                let is_first = self.end.is_none();
                self.end.get_or_insert(told);
                return is_first;
            }
            Event::Room => &mut self.room,
            Event::Burst => &mut self.burst,
            Event::Deadline => &mut self.deadline,
            Event::Saved(outcome) => {
                self.saved = Some(outcome);
                return true;
            }
        };
        !std::mem::replace(flag, true)
    }
}

/// The sender of commands for other threads, valid as long as the guest runs, across its resets.
#[derive(Clone, Debug)]
pub struct Commands(Queue);

impl Commands {
    /// Sends a command without blocking.
    ///
    /// # Errors
    /// Returns the command if the guest has ended, or the queue is full.
    pub fn send(&self, command: Command) -> Result<(), Command> {
        self.0.ask(command)
    }
}

/// A handle of the queue. Sending wakes the event loop.
#[derive(Clone)]
pub(super) struct Queue {
    news: Arc<Mutex<News>>,
    bell: &'static EventFd,
}

impl Queue {
    /// Creates a queue that signals the eventfd `bell` when there is something to take. The caller
    /// of [`Queue::take_events`] reads `bell` first.
    pub(super) fn new(bell: &'static EventFd) -> Queue {
        Queue {
            news: Arc::default(),
            bell,
        }
    }

    /// Returns a sender of commands.
    pub(super) fn commands(&self) -> Commands {
        Commands(self.clone())
    }

    /// Sends an event to the event loop.
    pub(super) fn tell(&self, event: Event) {
        // An event that is still pending has signalled the loop already.
        if lock(&self.news).add(event) {
            ring(self.bell);
        }
    }

    /// Sends the event for an action that the guest's console output caused.
    pub(super) fn tell_action(&self, action: Action) {
        if let Some(told) = VcpuEvent::by(action) {
            self.tell(Event::Vcpu(told));
        }
    }

    /// Sends a command; returns it if there is no room, or the event loop has ended.
    pub(super) fn ask(&self, command: Command) -> Result<(), Command> {
        let mut news = lock(&self.news);
        if news.closed || news.commands.len() == COMMANDS {
            return Err(command);
        }
        news.commands.push(command);
        ring(self.bell);
        Ok(())
    }

    /// Takes the pending events. Commands stay, so that they reach a guest that is reset in its
    /// next life.
    pub(super) fn take_events(&self) -> News {
        let mut news = lock(&self.news);
        let kept = News {
            commands: std::mem::take(&mut news.commands),
            closed: news.closed,
            ..News::default()
        };
        if !kept.commands.is_empty() {
            ring(self.bell);
        }
        std::mem::replace(&mut news, kept)
    }

    /// Takes the pending commands, in order.
    pub(super) fn take_commands(&self) -> Vec<Command> {
        std::mem::take(&mut lock(&self.news).commands)
    }

    /// Closes the queue. Pending commands are dropped, which tells their senders that there will be
    /// no answer.
    pub(super) fn close(&self) {
        let mut news = lock(&self.news);
        news.closed = true;
        let commands = std::mem::take(&mut news.commands);
        // Dropping a command may run arbitrary code, so it happens without the lock.
        drop(news);
        drop(commands);
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::command::Reply;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn queue() -> Queue {
        let bell = EventFd::new(EFD_NONBLOCK).expect("a descriptor");
        Queue::new(Box::leak(Box::new(bell)))
    }

    #[test]
    fn a_flood_of_events_is_one_of_each_kind() {
        let queue = queue();
        for number in 0..65_776 {
            queue.tell(Event::Deadline);
            queue.tell(Event::Room);
            queue.tell(Event::Vcpu(VcpuEvent::Panicked(number.to_string())));
            queue.tell(Event::Vcpu(VcpuEvent::Asked));
        }
        assert_eq!(queue.bell.read().expect("it rang"), 4);
        queue.tell(Event::Burst);
        assert_eq!(queue.bell.read().expect("it rings again"), 1);
        let news = queue.take_events();
        assert_eq!(news.panicked.as_deref(), Some("0"));
        assert!(news.deadline && news.room && news.burst && news.asked);
        assert!(news.end.is_none() && !news.all_off);
        let news = queue.take_events();
        assert!(!news.deadline && !news.room && !news.burst && news.panicked.is_none());
        queue.tell(Event::Deadline);
        assert_eq!(queue.bell.read().expect("it rings again"), 1);
    }

    #[test]
    fn the_first_end_wins() {
        let queue = queue();
        queue.tell(Event::Vcpu(VcpuEvent::Reset));
        queue.tell(Event::Vcpu(VcpuEvent::PowerOff));
        assert_eq!(queue.take_events().end, Some(VcpuEvent::Reset));
    }

    #[test]
    fn commands_wait_in_order_up_to_a_number_and_through_a_reset() {
        let queue = queue();
        for index in 0..COMMANDS {
            let command = Command::WithVcpu(index, Box::new(|_| {}));
            assert!(queue.ask(command).is_ok());
        }
        assert!(matches!(queue.ask(Command::Help), Err(Command::Help)));
        // The guest is reset.
        queue.tell(Event::Vcpu(VcpuEvent::Reset));
        queue.bell.read().expect("it rang");
        assert_eq!(queue.take_events().end, Some(VcpuEvent::Reset));
        assert!(queue.take_events().end.is_none());
        assert!(queue.bell.read().is_ok(), "they are not forgotten");
        let commands = queue.take_commands();
        let indices = commands.iter().map(|command| match command {
            Command::WithVcpu(index, _) => *index,
            _ => panic!("another command"),
        });
        assert!(indices.eq(0..COMMANDS));
        assert!(queue.take_commands().is_empty());
    }

    #[test]
    fn commands_after_the_end_are_returned() {
        let queue = queue();
        let (reply, answered) = Reply::channel();
        assert!(queue.ask(Command::Resume(reply)).is_ok());
        queue.close();
        assert!(answered.recv().is_err());
        assert!(queue.ask(Command::Help).is_err());
        queue.take_events();
        assert!(queue.ask(Command::Help).is_err());
    }
}
