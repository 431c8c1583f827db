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
use armlet_system::messages;
use armlet_system::status::{Fault, Status};
use filter::Program;

mod calls;
mod files;
mod filter;
mod names;
mod requests;
mod rights;
mod show;
mod sys;
mod trap;

pub use calls::{Answer, NUMBERS, Role, Rules};
pub use files::{Lack, landlock};
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandbox {
    /// How far it goes.
    pub mode: Mode,
    /// What the devices need beyond what all do.
    pub needs: Vec<Need>,
}

impl Sandbox {
    /// Decides from the devices that are asked for, and whether clients control the machine.
    #[must_use]
    pub fn of(mode: Mode, devices: &[Wanted], is_controlled: bool) -> Sandbox {
        let mut needs = Vec::new();
        let control = is_controlled.then_some(Need::Sockets);
        let devices = devices.iter().flat_map(|device| device.options().needs());
        for need in devices.chain(control) {
            if !needs.contains(&need) {
                needs.push(need);
            }
        }
        Sandbox { mode, needs }
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
        rights::give_up().context("cannot give up this process's rights")?;
        let lack = files::restrict().context("cannot restrict access to files by Landlock")?;
        match lack {
            Some(lack) if self.mode == Mode::Strict => {
                return Err(anyhow!("{lack}; --sandbox on does without")).fault(Status::Host);
            }
            Some(lack) => log::info!("sandbox: {lack}"),
            None => log::info!("sandbox: files by Landlock, and system calls by seccomp"),
        }
        trap::install();
        self.filter(Role::Machine)
    }

    /// Confines the calling thread as those of a role are. It is in the sandbox already.
    ///
    /// # Errors
    /// What the kernel says of the filter.
    pub fn enter_as(&self, role: Role) -> Result<()> {
        match self.mode {
            Mode::Off => Ok(()),
            _ => self.filter(role),
        }
    }

    fn filter(&self, role: Role) -> Result<()> {
        let mut program = Program::new(self.mode == Mode::Log);
        let rules = self.rules(role);
        let others = (role != Role::Machine).then(|| self.rules(Role::Machine));
        let process = std::process::id();
        let other = &HostArch::OTHER_CALLS;
        rules
            .write(&mut program, other, process, others.as_ref())
            .with_context(|| format!("the filter of a thread as {} is too long", role.name()))
            .and_then(|code| Ok(sys::add_filter(code)?))
            .context("cannot restrict system calls")
    }
}

#[cfg(test)]
mod tests;
