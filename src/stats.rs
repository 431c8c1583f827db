//! Statistics of a guest: its exits by reason, and KVM's counters.

use crate::kvm::stats::{Counter, Kind, Statistics};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a vCPU left KVM_RUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The guest read a device register at an address.
    MemoryRead,
    /// It wrote one.
    MemoryWrite,
    /// It accessed an I/O port.
    Port,
    /// A signal interrupted it.
    Signal,
    /// Anything else.
    Other,
}

impl Reason {
    const ALL: [(Reason, &'static str); 5] = [
        (Reason::MemoryRead, "register reads"),
        (Reason::MemoryWrite, "register writes"),
        (Reason::Port, "port accesses"),
        (Reason::Signal, "signals"),
        (Reason::Other, "other"),
    ];
}

/// One vCPU's exits, counted by its thread and read by another.
#[derive(Debug, Default)]
pub struct Exits([AtomicU64; Reason::ALL.len()]);

impl Exits {
    /// Counts an exit.
    pub fn count(&self, reason: Reason) {
        self.0[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self, reason: Reason) -> u64 {
        self.0[reason as usize].load(Ordering::Relaxed)
    }
}

/// The counters of a running machine.
#[derive(Default)]
pub struct Counters {
    /// Each vCPU's exits.
    pub exits: Vec<Arc<Exits>>,
    /// The VM's statistics, where KVM offers them.
    pub vm: Option<Statistics>,
    /// Each vCPU's statistics.
    pub vcpus: Vec<Statistics>,
}

impl Counters {
    /// Returns how often vCPUs left KVM for armlet, by reason; nothing where that is not counted.
    #[must_use]
    pub fn exits(&self) -> Vec<(&'static str, u64)> {
        let sum = |reason| self.exits.iter().map(|exits| exits.get(reason)).sum();
        let named = Reason::ALL.map(|(reason, name)| (name, sum(reason)));
        named
            .into_iter()
            .filter(|_| !self.exits.is_empty())
            .collect()
    }

    /// Formats the counters as lines for people.
    #[must_use]
    pub fn report(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (index, exits) in self.exits.iter().enumerate() {
            lines.push(exit_line(index, |reason| exits.get(reason)));
        }
        let read = |statistics: &Statistics| statistics.read().unwrap_or_default();
        let vm = self.vm.as_ref().map(read).unwrap_or_default();
        let vcpus = self.vcpus.iter().flat_map(read).collect();
        for (what, counters) in [("the VM", vm), ("all vCPUs", vcpus)] {
            lines.extend(counter_line(what, counters));
        }
        lines
    }
}

fn exit_line(index: usize, count: impl Fn(Reason) -> u64) -> String {
    let mut line = format!("vCPU {index} left KVM for armlet");
    let mut separator = ": ";
    for (reason, name) in Reason::ALL {
        // Writing to a String cannot fail.
        let _ = write!(line, "{separator}{name} {}", count(reason));
        separator = ", ";
    }
    line
}

/// Formats the counters that are not 0, by name, with counters of the same name combined.
fn counter_line(what: &str, counters: Vec<Counter>) -> Option<String> {
    let mut sums: BTreeMap<String, u64> = BTreeMap::new();
    for Counter { name, kind, value } in counters {
        let sum = sums.entry(name).or_default();
        *sum = match kind {
            Kind::Cumulative | Kind::Instant => sum.saturating_add(value),
            Kind::Peak => (*sum).max(value),
        };
    }
    let shown: Vec<_> = sums
        .iter()
        .filter(|(_, value)| **value > 0)
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    (!shown.is_empty()).then(|| format!("KVM counted for {what}: {}", shown.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_shown_by_reason() {
        let exits = Exits::default();
        exits.count(Reason::Port);
        exits.count(Reason::Port);
        exits.count(Reason::Signal);
        let counters = Counters {
            exits: vec![Arc::new(exits)],
            ..Counters::default()
        };
        assert_eq!(
            counters.report(),
            [
                "vCPU 0 left KVM for armlet: register reads 0, register writes 0, port accesses 2, signals 1, other 0"
            ]
        );
    }

    #[test]
    fn counters_of_one_name_add_up_and_peaks_do_not() {
        let counter = |name: &str, kind, value| Counter {
            name: name.to_owned(),
            kind,
            value,
        };
        let counters = vec![
            counter("exits", Kind::Cumulative, 3),
            counter("exits", Kind::Cumulative, 4),
            counter("size", Kind::Peak, 9),
            counter("size", Kind::Peak, 2),
            counter("never", Kind::Cumulative, 0),
        ];
        assert_eq!(
            counter_line("all vCPUs", counters).as_deref(),
            Some("KVM counted for all vCPUs: exits 7, size 9")
        );
        assert_eq!(counter_line("the VM", Vec::new()), None);
    }
}
