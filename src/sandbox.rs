//! What armlet may still do when its guest runs: decided as one value, shown, then applied.
//!
//! Whoever breaks out of a guest finds a process that cannot open files, start programs, reach the
//! network or other processes, nor gain rights. [`Sandbox::of`] decides from what the devices need;
//! [`Sandbox::enter`] applies it before the guest's first instruction and before there are threads, so
//! that all of them are in it. The broker, which starts passt and virtiofsd, was forked before.

use crate::kvm::{HostArch, KvmArch};
use anyhow::{Context, Result, anyhow, bail};
use armlet_backends::kind::Need;
use armlet_backends::open::Wanted;
use armlet_system::seccomp::{Instruction, Outcome, add_filter};
use armlet_system::status::{Fault, Status};
use armlet_system::{landlock, messages, rights};
use rustix::thread::CapabilitySet;
use std::sync::{Arc, OnceLock};

mod calls;
mod made;
mod names;
mod requests;
mod show;
mod trap;

pub use calls::{Answer, NUMBERS, Role, Rules};
pub use names::name;
pub use requests::Request;

/// How far armlet is to confine itself: `--sandbox`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// By every layer that the host has.
    #[default]
    On,
    /// By all layers, or not at all.
    Strict,
    /// System calls that are not allowed are told of by the kernel's log, and done.
    Log,
    /// Not.
    Off,
}

impl Mode {
    /// Reads the option's value; none is the default.
    ///
    /// # Errors
    /// Another word.
    pub fn parse(text: Option<&str>) -> Result<Mode> {
        Ok(match text {
            None | Some("on") => Mode::On,
            Some("strict") => Mode::Strict,
            Some("log") => Mode::Log,
            Some("off") => Mode::Off,
            Some(other) => bail!("--sandbox '{other}' is not known; use on, strict, log or off"),
        })
    }

    /// The option's value.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Mode::On => "on",
            Mode::Strict => "strict",
            Mode::Log => "log",
            Mode::Off => "off",
        }
    }
}

/// What the threads of armlet may do once a guest runs.
#[derive(Debug)]
pub struct Sandbox {
    /// How far it goes.
    pub mode: Mode,
    /// What the devices need beyond what all do.
    pub needs: Vec<Need>,
    /// The filters of threads that are narrowed further, by role, once they were asked for.
    narrower: [OnceLock<Vec<Instruction>>; Role::ALL.len()],
}

impl Sandbox {
    /// Decides from the devices that are asked for, whether clients control the machine, and what else it
    /// takes (`others`).
    #[must_use]
    pub fn of(mode: Mode, devices: &[Wanted], is_controlled: bool, others: &[Need]) -> Sandbox {
        let mut needs = Vec::new();
        let clients = [Need::Sockets, Need::Snapshots];
        let clients = clients.into_iter().filter(|_| is_controlled);
        let of_devices = devices.iter().map(|device| match is_controlled {
            false => device.options().needs(),
            true => {
                let options = device.options();
                [options.needs(), options.needs_for_changes()].concat()
            }
        });
        for need in of_devices
            .flatten()
            .chain(clients)
            .chain(others.iter().copied())
        {
            if !needs.contains(&need) {
                needs.push(need);
            }
        }
        Sandbox::new(mode, needs)
    }

    /// As it is with these needs.
    #[must_use]
    pub fn new(mode: Mode, needs: Vec<Need>) -> Sandbox {
        Sandbox {
            mode,
            needs,
            narrower: [const { OnceLock::new() }; Role::ALL.len()],
        }
    }

    /// What threads of a role may call.
    #[must_use]
    pub fn rules(&self, role: Role) -> Rules {
        Rules::of(role, &self.needs, &HostArch::OTHER_CALLS)
    }

    /// Confines the calling thread, and all threads that it starts, as [`Role::Machine`] is.
    ///
    /// # Errors
    /// A layer that the host refuses; one that it lacks, if the mode is [`Mode::Strict`].
    pub fn enter(&self) -> Result<()> {
        match self.mode {
            Mode::On | Mode::Strict => {}
            Mode::Log => {
                messages::say("--sandbox log: no system call is kept from whoever breaks out");
            }
            Mode::Off => {
                messages::say(
                    "--sandbox off: whoever breaks out of the guest has all rights of this process",
                );
                return Ok(());
            }
        }
        messages::prepare();
        rights::give_up(CapabilitySet::empty()).context("cannot give up this process's rights")?;
        let lack =
            landlock::restrict(&[]).context("cannot restrict access to files by Landlock")?;
        match lack {
            Some(lack) if self.mode == Mode::Strict => {
                return Err(anyhow!("{lack}; --sandbox on does without")).fault(Status::Host);
            }
            Some(lack) => log::info!("sandbox: {lack}"),
            None => log::info!("sandbox: files by Landlock, and system calls by seccomp"),
        }
        trap::install();
        self.filter()
    }

    /// Confines the calling thread as those of a role are. It is in the sandbox already.
    ///
    /// # Errors
    /// What the kernel says of the filter.
    pub fn enter_as(&self, role: Role) -> Result<()> {
        match self.mode {
            Mode::Off => Ok(()),
            _ => add(self.narrower(role)),
        }
    }

    /// What a thread of a role is to begin with, once it is in the sandbox. Its filter is made now.
    pub fn entrance(
        self: &Arc<Sandbox>,
        role: Role,
    ) -> impl FnOnce() -> Result<()> + Send + 'static {
        if self.mode != Mode::Off {
            self.narrower(role);
        }
        let sandbox = Arc::clone(self);
        move || sandbox.enter_as(role)
    }

    fn filter(&self) -> Result<()> {
        let process = std::process::id();
        if self.is_made() {
            return match self.needs.is_empty() {
                true => add(&made::started::first(process)),
                false => add(&made::restored::first(process)),
            };
        }
        let rules = self.rules(Role::Machine);
        let program = rules.write(self.forbidden(), &HostArch::OTHER_CALLS, process);
        add(program.code())
    }

    /// The filter of a thread that is in the sandbox already.
    fn narrower(&self, role: Role) -> &[Instruction] {
        if role == Role::Vcpu && self.is_made() {
            return match self.needs.is_empty() {
                true => &made::started::VCPU_CODE,
                false => &made::restored::VCPU_CODE,
            };
        }
        self.narrower[role as usize].get_or_init(|| {
            let outer = self.rules(Role::Machine);
            let program = self.rules(role).write_within(&outer, self.forbidden());
            program.code().to_vec()
        })
    }

    /// Whether its first filters are those that were made when the program was compiled.
    fn is_made(&self) -> bool {
        matches!(&*self.needs, [] | [Need::Restoring]) && self.mode != Mode::Log
    }

    fn forbidden(&self) -> Outcome {
        match self.mode {
            Mode::Log => Outcome::Log,
            _ => Outcome::Trap,
        }
    }
}

fn add(code: &[Instruction]) -> Result<()> {
    // One that did not fit is empty, which the kernel refuses.
    add_filter(code).context("cannot restrict system calls")
}

#[cfg(test)]
mod tests;
