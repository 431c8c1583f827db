//! Instructions, counted by the CPU: who executed how many.
//!
//! Where QEMU counts instructions, the CPU that it emulates has a counter of them, so the kernel's
//! perf events tell the VMM, the host's kernel and the guest apart, exactly.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use perf_event::events::Hardware;
use perf_event::{Builder, Counter};

use crate::procfs;

/// Counters of one VMM and of the CPU that it runs on.
pub(crate) struct Counters {
    /// For each thread that there was at the start, with those that it starts: its name, what it
    /// executes in user space, and what in the host's kernel.
    threads: Vec<(String, Counter, Counter)>,
    /// The host's kernel, whoever runs.
    kernel: Counter,
    /// Guests.
    guest: Counter,
}

/// What was counted up to some moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Instructions of the VMM in user space, by thread.
    pub(crate) user: BTreeMap<String, u64>,
    /// Instructions of the VMM in the host's kernel, by thread.
    pub(crate) kernel: BTreeMap<String, u64>,
    /// Instructions of the host's kernel, whoever runs.
    pub(crate) kernel_all: u64,
    /// Instructions of guests.
    pub(crate) guest: u64,
}

impl Counters {
    /// Starts to count what the process `pid` and its CPU, the first, do.
    pub(crate) fn start(pid: u32) -> Result<Self> {
        let mut threads = Vec::new();
        for thread in procfs::threads(pid)? {
            let id = thread.id.cast_signed();
            let count = |build: &mut dyn FnMut(&mut Builder<'_>)| -> Result<Counter> {
                let mut builder = Builder::new(Hardware::INSTRUCTIONS);
                builder.observe_pid(id).any_cpu().inherit(true);
                builder.exclude_guest(true);
                build(&mut builder);
                let mut counter = builder.build().context("cannot count instructions")?;
                counter.enable().context("cannot count instructions")?;
                Ok(counter)
            };
            let user = count(&mut |builder| {
                builder.exclude_kernel(true).exclude_hv(true);
            })?;
            let kernel = count(&mut |builder| {
                builder.exclude_user(true).include_kernel().include_hv();
            })?;
            threads.push((thread.name, user, kernel));
        }
        let whole = |build: &mut dyn FnMut(&mut Builder<'_>)| -> Result<Counter> {
            let mut builder = Builder::new(Hardware::INSTRUCTIONS);
            builder.any_pid().one_cpu(0).include_kernel().include_hv();
            build(&mut builder);
            let mut counter = builder.build().context("cannot count instructions")?;
            counter.enable().context("cannot count instructions")?;
            Ok(counter)
        };
        let kernel = whole(&mut |builder| {
            builder.exclude_user(true).exclude_guest(true);
        })?;
        let guest = whole(&mut |builder| {
            builder.exclude_host(true);
        })?;
        Ok(Self {
            threads,
            kernel,
            guest,
        })
    }

    /// Returns what was counted so far.
    pub(crate) fn read(&mut self) -> Result<Counts> {
        let read = |counter: &mut Counter| counter.read().context("cannot read a counter");
        let mut counts = Counts {
            kernel_all: read(&mut self.kernel)?,
            guest: read(&mut self.guest)?,
            ..Counts::default()
        };
        for (name, user, kernel) in &mut self.threads {
            *counts.user.entry(name.clone()).or_default() += read(user)?;
            *counts.kernel.entry(name.clone()).or_default() += read(kernel)?;
        }
        Ok(counts)
    }
}

/// Counters of what this thread executes in user space, with and without the processes that it
/// starts.
pub(crate) struct Started {
    all: Counter,
    own: Counter,
}

impl Started {
    /// Starts to count.
    pub(crate) fn count() -> Result<Self> {
        let count = |inherit| -> Result<Counter> {
            let mut builder = Builder::new(Hardware::INSTRUCTIONS);
            builder.observe_self().any_cpu().inherit(inherit);
            builder.exclude_kernel(true).exclude_hv(true);
            builder.exclude_guest(true);
            let mut counter = builder.build().context("cannot count instructions")?;
            counter.enable().context("cannot count instructions")?;
            Ok(counter)
        };
        Ok(Self {
            all: count(true)?,
            own: count(false)?,
        })
    }

    /// Returns the instructions of the processes that this thread started.
    pub(crate) fn read(&mut self) -> Result<u64> {
        let own = self.own.read().context("cannot read a counter")?;
        let all = self.all.read().context("cannot read a counter")?;
        Ok(all.saturating_sub(own))
    }
}

impl Counts {
    /// Returns what was counted after `before`.
    pub(crate) fn since(&self, before: &Self) -> Self {
        let subtract = |now: &BTreeMap<String, u64>, then: &BTreeMap<String, u64>| {
            let part = |(name, count): (&String, &u64)| {
                let before = then.get(name).copied().unwrap_or(0);
                (name.clone(), count.saturating_sub(before))
            };
            now.iter().map(part).collect()
        };
        Self {
            user: subtract(&self.user, &before.user),
            kernel: subtract(&self.kernel, &before.kernel),
            kernel_all: self.kernel_all.saturating_sub(before.kernel_all),
            guest: self.guest.saturating_sub(before.guest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_subtracted_thread_by_thread() {
        let counts = |user: u64, all: u64| Counts {
            user: BTreeMap::from([("vcpu0".to_owned(), user)]),
            kernel_all: all,
            ..Counts::default()
        };
        assert_eq!(counts(9, 90).since(&counts(4, 50)), counts(5, 40));
        assert_eq!(counts(9, 90).since(&Counts::default()), counts(9, 90));
    }
}
