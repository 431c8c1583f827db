//! Snapshots of a machine that runs: it is paused, its state is taken, and a thread writes that and
//! guest memory, while the event loop goes on.

use super::command::Reply;
use super::event::{Events, LIMIT, Life};
use super::queue::Event;
use crate::kvm::KvmArch;
use crate::machine::Machine;
use crate::sandbox::Role;
use crate::snapshot::{Outcome, Savers, Wanted, Written};
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

impl Saving {
    /// Returns why the machine has to stand still.
    pub(super) fn refusal(&self) -> Option<String> {
        self.current
            .is_some()
            .then(|| "a snapshot is being written; try again when it is there".to_owned())
    }
}

impl Events {
    /// Begins a snapshot.
    pub(super) fn snapshot<A: KvmArch>(
        &mut self,
        life: &Life<'_, A>,
        wanted: Wanted,
        reply: Reply<Result<Written, String>>,
    ) {
        if let Some(why) = self.saving.refusal() {
            return reply.send(Err(why));
        }
        let resumes = !self.input.held;
        if resumes && wanted.only_paused {
            return reply.send(Err("the machine is not paused".to_owned()));
        }
        if let Err(why) = life.machine.pause(LIMIT) {
            return reply.send(Err(why));
        }
        self.input.held = true;
        match self.begin_to_write(life, wanted) {
            Ok(()) => self.saving.current = Some(Current { reply, resumes }),
            Err(error) => {
                if resumes {
                    life.machine.resume();
                    self.input.held = false;
                }
                reply.send(Err(format!("{error:#}")));
            }
        }
    }

    fn begin_to_write<A: KvmArch>(&mut self, life: &Life<'_, A>, wanted: Wanted) -> Result<()> {
        let savers = self.saving.savers.as_ref();
        let savers = savers.context("this machine cannot be saved")?;
        let (state, action) = life.machine.save()?;
        self.queue.tell_action(action);
        let head = (life.describe)()?;
        let queue = self.queue.clone();
        let told = move |outcome| queue.tell(Event::Saved(Box::new(outcome)));
        let begin = life.machine.entrance(Role::Device);
        savers.begin(wanted, head, &state, begin, told)
    }

    /// Ends a snapshot: whoever asked for it is answered.
    pub(super) fn snapshot_ended<A: KvmArch>(
        &mut self,
        machine: &Machine<A>,
        outcome: Outcome,
    ) -> Result<()> {
        let Some(Current { reply, resumes }) = self.saving.current.take() else {
            return Ok(());
        };
        let written = match (outcome.written, &mut self.saving.savers) {
            (Ok((written, base)), Some(savers)) => {
                savers.base = Some(base);
                Ok(written)
            }
            (Ok((written, _)), None) => Ok(written),
            (Err(error), _) => Err(format!("{error:#}")),
        };
        if resumes {
            self.resume(machine)?;
        }
        reply.send(written);
        Ok(())
    }
}
