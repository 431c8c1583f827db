//! Pins threads to CPUs of the host.

use anyhow::{Context, Result, ensure};
use rustix::thread::{CpuSet, sched_setaffinity};

/// Pins the calling thread to these CPUs. Threads that it starts later inherit this.
///
/// # Errors
/// CPUs that this process may not use.
pub fn run_on(cpus: &[u32]) -> Result<()> {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        ensure!(
            (cpu as usize) < CpuSet::MAX_CPU,
            "CPU {cpu} is beyond the {} that armlet can pin to",
            CpuSet::MAX_CPU
        );
        set.set(cpu as usize);
    }
    sched_setaffinity(None, &set).with_context(|| format!("cannot run on CPUs {cpus:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::allowed_cpus;

    #[test]
    fn a_thread_runs_where_it_is_told_to() {
        let last = allowed_cpus().pop().expect("a CPU");
        let there = std::thread::spawn(move || {
            run_on(&[last]).expect("allowed");
            allowed_cpus()
        });
        assert_eq!(there.join().expect("no panic"), [last]);
        assert!(run_on(&[1 << 15]).is_err());
        assert!(run_on(&[]).is_err());
    }
}
