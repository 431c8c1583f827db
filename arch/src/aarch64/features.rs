//! Optional features of a vCPU: PMU, SVE, pointer authentication (Documentation/virt/kvm/api.rst,
//! KVM_ARM_VCPU_INIT), and stolen time (Documentation/virt/kvm/arm/pvtime.rst).

use super::{Aarch64, Host, Offered};
use crate::arch::Request;
use crate::cores::Counters;
use crate::error::PlanError;
use crate::switch::{Switch, pairs};
use serde::Serialize;

/// The interrupt of performance counters: PPI 7, as on QEMU's virt machine. KVM raises the one that
/// is configured (Documentation/virt/kvm/devices/vcpu.rst, KVM_ARM_VCPU_PMU_V3_IRQ).
const PMU_INTID: u32 = 23;

/// The name that `--pv` takes.
pub(super) const STEAL_TIME: &str = "steal-time";

/// What was asked for by `--pmu`, `--sve`, `--pauth` and `--pv`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeatureRequest {
    /// Performance counters.
    pub pmu: Switch,
    /// Scalable vectors.
    pub sve: Switch,
    /// Pointer authentication.
    pub pauth: Switch,
    /// Stolen time.
    pub steal_time: Switch,
}

/// What each vCPU gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Features {
    /// Performance counters.
    pub pmu: Option<Pmu>,
    /// Scalable vectors, of every length that the host supports.
    pub sve: bool,
    /// Pointer authentication.
    pub pauth: bool,
    /// Stolen time.
    pub steal_time: bool,
}

/// Performance counters of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Pmu {
    /// The number of its interrupt, a PPI.
    pub intid: u32,
    /// The host's PMU behind it, by its perf event type; `None` where the host's cores are of one
    /// kind, and KVM uses its only PMU.
    pub perf_type: Option<u32>,
}

/// Decides which features the guest gets on this host.
pub(super) fn decide(request: &Request<Aarch64>, host: &Host) -> Result<Features, PlanError> {
    let wanted = &request.features;
    let offered = host.offered;
    Ok(Features {
        pmu: pmu(wanted.pmu, &request.topology.counters, offered)?,
        sve: switched(wanted.sve, "--sve on", offered.sve, offered)?,
        pauth: switched(wanted.pauth, "--pauth on", offered.pauth, offered)?,
        steal_time: switched(
            wanted.steal_time,
            "--pv steal-time=on",
            offered.steal_time,
            offered,
        )?,
    })
}

/// Reads the value of `--pv`.
pub(super) fn steal_time(paravirtual: Option<&str>) -> Result<Switch, String> {
    let mut wish = Switch::Auto;
    for (name, switch) in pairs("--pv", paravirtual)? {
        if name != STEAL_TIME {
            return Err(format!(
                "--pv: '{name}' is not {STEAL_TIME}, which is all that ARM64 guests can have"
            ));
        }
        wish = switch;
    }
    Ok(wish)
}

fn pmu(wish: Switch, counters: &Counters, offered: Offered) -> Result<Option<Pmu>, PlanError> {
    if !switched(wish, "--pmu on", offered.pmu, offered)? {
        return Ok(None);
    }
    let perf_type = match counters {
        Counters::Only => None,
        Counters::Type(number) => Some(*number),
        Counters::None(_) if wish == Switch::Auto => return Ok(None),
        Counters::None(why) => return Err(PlanError::NoCounters(why.clone())),
    };
    Ok(Some(Pmu {
        intid: PMU_INTID,
        perf_type,
    }))
}

fn switched(wish: Switch, asked: &str, has: bool, offered: Offered) -> Result<bool, PlanError> {
    match wish {
        Switch::Off => Ok(false),
        Switch::Auto => Ok(has),
        Switch::On if has => Ok(true),
        Switch::On => Err(PlanError::FeatureNotOffered {
            asked: asked.to_owned(),
            offered: names(offered),
        }),
    }
}

/// Returns the names of what a host offers, as in the options.
fn names(offered: Offered) -> String {
    let names = [
        (offered.pmu, "pmu"),
        (offered.sve, "sve"),
        (offered.pauth, "pauth"),
        (offered.steal_time, "steal-time"),
    ];
    let names: Vec<_> = names.iter().filter(|(has, _)| *has).collect();
    match names.is_empty() {
        true => "none of pmu, sve, pauth, steal-time".to_owned(),
        false => {
            let names: Vec<_> = names.iter().map(|(_, name)| *name).collect();
            names.join(", ")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Offered = Offered {
        pmu: true,
        sve: true,
        pauth: true,
        steal_time: true,
    };

    #[test]
    fn auto_is_what_the_host_has() {
        let got = |has| pmu(Switch::Auto, &Counters::Only, Offered { pmu: has, ..ALL });
        assert_eq!(got(false), Ok(None));
        let only = Pmu {
            intid: 23,
            perf_type: None,
        };
        assert_eq!(got(true), Ok(Some(only)));
        assert_eq!(switched(Switch::Auto, "--sve on", true, ALL), Ok(true));
        assert_eq!(pmu(Switch::Off, &Counters::Only, ALL), Ok(None));
    }

    #[test]
    fn counters_are_those_of_the_cores_that_vcpus_run_on() {
        let typed = pmu(Switch::On, &Counters::Type(9), ALL).expect("offered");
        assert_eq!(typed.and_then(|pmu| pmu.perf_type), Some(9));
        let none = Counters::None("vCPUs run on several kinds".to_owned());
        assert_eq!(pmu(Switch::Auto, &none, ALL), Ok(None));
        assert_eq!(pmu(Switch::Off, &none, ALL), Ok(None));
        let error = pmu(Switch::On, &none, ALL).expect_err("no counters");
        assert_eq!(
            error.to_string(),
            "--pmu on: vCPUs run on several kinds; pin the vCPUs to CPUs of one kind (--pin), or leave it out"
        );
    }

    #[test]
    fn what_the_host_lacks_is_refused_with_what_it_has() {
        let some = Offered { sve: false, ..ALL };
        let error = switched(Switch::On, "--sve on", some.sve, some).expect_err("lacking");
        assert_eq!(
            error.to_string(),
            "--sve on is not offered by this host's KVM, which has pmu, pauth, steal-time; leave it out"
        );
        let none = Offered::default();
        let error = pmu(Switch::On, &Counters::Only, none).expect_err("lacking");
        assert!(
            error
                .to_string()
                .contains("none of pmu, sve, pauth, steal-time"),
            "{error}"
        );
    }

    #[test]
    fn stolen_time_is_the_only_thing_that_pv_takes() {
        assert_eq!(steal_time(None), Ok(Switch::Auto));
        assert_eq!(steal_time(Some("steal-time=off")), Ok(Switch::Off));
        for (value, part) in [
            ("eoi=on", "'eoi' is not steal-time"),
            ("steal-time", "write steal-time=off"),
            ("steal-time=yes", "use on, off or auto"),
        ] {
            let error = steal_time(Some(value)).expect_err(value);
            assert!(error.contains(part), "{error}");
        }
    }
}
