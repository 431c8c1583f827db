//! Snapshots of a machine that runs: it is paused, its state is taken, and a thread writes that and
//! guest memory, while the event loop goes on.

use super::command::Reply;
use super::queue::{Event, Queue};
use crate::kvm::KvmArch;
use crate::machine::Machine;
use crate::sandbox::Role;
use crate::snapshot::{Head, Outcome, Savers, Wanted, Written};
use anyhow::{Context, Result};

/// Whether and how the machine can be saved.
#[derive(Default)]
pub(super) struct Saving {
    /// What writes snapshots, where clients may ask for them.
    pub(super) savers: Option<Savers>,
    /// The one that is being written.
    current: Option<Current>,
}

/// A snapshot that is being written.
struct Current {
    reply: Reply<Result<Written, String>>,
    /// Whether the machine is resumed when it is there.
    resumes: bool,
}

/// A snapshot that is there, or is not: whoever asked for it is to be answered.
pub(super) struct Ended {
    reply: Reply<Result<Written, String>>,
    written: Result<Written, String>,
    /// Whether the machine is to be resumed before.
    pub(super) resumes: bool,
}

impl Ended {
    /// Answers.
    pub(super) fn answer(self) {
        self.reply.send(self.written);
    }
}

impl Saving {
    /// Returns why the machine has to stand still.
    pub(super) fn refusal(&self) -> Option<String> {
        self.current
            .is_some()
            .then(|| "a snapshot is being written; try again when it is there".to_owned())
    }

    /// Begins a snapshot of a paused machine, which `head` describes. `resumes` says whether it is to be
    /// resumed when the snapshot is there, of which `queue` hears.
    ///
    /// # Errors
    /// Why there will be none, and who is to be told.
    pub(super) fn begin<A: KvmArch>(
        &mut self,
        machine: &Machine<A>,
        head: Result<Head>,
        (wanted, resumes): (Wanted, bool),
        queue: &Queue,
        reply: Reply<Result<Written, String>>,
    ) -> Result<(), Box<Ended>> {
        match self.begin_to_write(machine, head, wanted, queue) {
            Ok(()) => {
                self.current = Some(Current { reply, resumes });
                Ok(())
            }
            Err(error) => Err(Box::new(Ended {
                reply,
                written: Err(format!("{error:#}")),
                resumes,
            })),
        }
    }

    fn begin_to_write<A: KvmArch>(
        &self,
        machine: &Machine<A>,
        head: Result<Head>,
        wanted: Wanted,
        queue: &Queue,
    ) -> Result<()> {
        let savers = self.savers.as_ref();
        let savers = savers.context("this machine cannot be saved")?;
        let (state, action) = machine.save()?;
        queue.tell_action(action);
        let bell = queue.clone();
        let told = move |outcome| bell.tell(Event::Saved(Box::new(outcome)));
        let begin = machine.entrance(Role::Device);
        savers.begin(wanted, head?, &state, begin, told)
    }

    /// Ends the snapshot that was being written.
    pub(super) fn end(&mut self, outcome: Outcome) -> Option<Ended> {
        let Current { reply, resumes } = self.current.take()?;
        let written = match (outcome.written, &mut self.savers) {
            (Ok((written, base)), Some(savers)) => {
                savers.base = Some(base);
                Ok(written)
            }
            (Ok((written, _)), None) => Ok(written),
            (Err(error), _) => Err(format!("{error:#}")),
        };
        Some(Ended {
            reply,
            written,
            resumes,
        })
    }
}
