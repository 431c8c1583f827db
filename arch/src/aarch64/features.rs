//! What a vCPU can have beside the base architecture: performance counters, scalable vectors,
//! pointer authentication (Documentation/virt/kvm/api.rst, KVM_ARM_VCPU_INIT).

use super::{Aarch64, Host};
use crate::cores::Counters;
use crate::plan::{PlanError, Request};
use crate::switch::Switch;
use serde::Serialize;

/// The interrupt of performance counters: PPI 7, as on QEMU's virt machine. KVM raises what it is
/// told to (Documentation/virt/kvm/devices/vcpu.rst, KVM_ARM_VCPU_PMU_V3_IRQ).
const PMU_INTID: u32 = 23;

/// What KVM offers on a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Offered {
    /// Performance counters: PMUv3 (KVM_CAP_ARM_PMU_V3).
    pub pmu: bool,
    /// Scalable vectors: SVE (KVM_CAP_ARM_SVE).
    pub sve: bool,
    /// Pointer authentication, of addresses and generic (KVM_CAP_ARM_PTRAUTH_ADDRESS, _GENERIC).
    pub pauth: bool,
}

/// What was asked for by `--pmu`, `--sve` and `--pauth`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Performance counters.
    pub pmu: Switch,
    /// Scalable vectors.
    pub sve: Switch,
    /// Pointer authentication.
    pub pauth: Switch,
}

/// What each vCPU gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Features {
    /// Performance counters.
    pub pmu: Option<Pmu>,
    /// Scalable vectors, of every length that the host has.
    pub sve: bool,
    /// Pointer authentication.
    pub pauth: bool,
}

/// Performance counters of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Pmu {
    /// The number of its interrupt, a PPI.
    pub intid: u32,
    /// The host's counters behind it, by the type of their perf events; `None` where the host's
    /// cores are of one kind, and KVM takes the only ones.
    pub perf_type: Option<u32>,
}

/// What the guest gets on this host.
pub(super) fn decide(request: &Request<Aarch64>, host: &Host) -> Result<Features, PlanError> {
    let wishes = &request.wishes;
    let offered = host.offered;
    Ok(Features {
        pmu: pmu(wishes.pmu, &request.topology.counters, offered)?,
        sve: switched(wishes.sve, "--sve", offered.sve, offered)?,
        pauth: switched(wishes.pauth, "--pauth", offered.pauth, offered)?,
    })
}

fn pmu(wish: Switch, counters: &Counters, offered: Offered) -> Result<Option<Pmu>, PlanError> {
    if !switched(wish, "--pmu", offered.pmu, offered)? {
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

fn switched(wish: Switch, option: &str, has: bool, offered: Offered) -> Result<bool, PlanError> {
    match wish {
        Switch::Off => Ok(false),
        Switch::Auto => Ok(has),
        Switch::On if has => Ok(true),
        Switch::On => Err(PlanError::FeatureNotOffered {
            asked: format!("{option} on"),
            offered: names(offered),
        }),
    }
}

/// What a host has, by the options' names.
fn names(offered: Offered) -> String {
    let names = [
        (offered.pmu, "pmu"),
        (offered.sve, "sve"),
        (offered.pauth, "pauth"),
    ];
    let names: Vec<_> = names.iter().filter(|(has, _)| *has).collect();
    match names.is_empty() {
        true => "none of pmu, sve, pauth".to_owned(),
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
        assert_eq!(switched(Switch::Auto, "--sve", true, ALL), Ok(true));
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
        let error = switched(Switch::On, "--sve", some.sve, some).expect_err("lacking");
        assert_eq!(
            error.to_string(),
            "--sve on is not offered by this host's KVM, which has pmu, pauth; leave it out"
        );
        let none = Offered::default();
        let error = pmu(Switch::On, &Counters::Only, none).expect_err("lacking");
        assert!(
            error.to_string().contains("none of pmu, sve, pauth"),
            "{error}"
        );
    }
}
