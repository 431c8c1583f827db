//! KVM's paravirtual features (Documentation/virt/kvm/x86/cpuid.rst), and the instructions that
//! cause exits: each is on, off, or as the host has it.

use std::fmt::Write;

use serde::Serialize;

use super::Host;
use crate::error::PlanError;
use crate::switch::{Switch, pairs};

/// A paravirtual feature: its name in options, and its bits in CPUID 0x4000_0001 EAX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// "steal-time".
    pub name: &'static str,
    /// What it is, for people.
    pub label: &'static str,
    /// Its bits; those that Linux uses together form one feature.
    pub bits: u32,
}

const fn feature(name: &'static str, label: &'static str, bits: u32) -> Feature {
    Feature { name, label, bits }
}

/// The features of KVM's feature leaf (arch/x86/include/uapi/asm/kvm_para.h).
pub const PARAVIRTUAL: [Feature; 9] = [
    feature("clock", "Paravirtual clock", 1 << 0 | 1 << 3 | 1 << 24),
    feature(
        "async-pf",
        "Asynchronous page faults",
        1 << 4 | 1 << 10 | 1 << 14,
    ),
    feature("steal-time", "Stolen time", 1 << 5),
    feature("eoi", "Paravirtual EOI", 1 << 6),
    feature("unhalt", "Paravirtual spinlocks", UNHALT),
    feature("tlb-flush", "Paravirtual TLB flush", 1 << 9),
    feature("send-ipi", "Paravirtual IPIs", 1 << 11),
    feature("poll-control", "Poll control", 1 << 12),
    feature("sched-yield", "Directed yield", 1 << 13),
];

/// PV_UNHALT, which KVM clears when HLT does not exit (arch/x86/kvm/cpuid.c).
const UNHALT: u32 = 1 << 7;
/// Two more switches of the same option.
const REALTIME: &str = "realtime";
const TSC_DEADLINE: &str = "tsc-deadline";

/// Instructions whose exits can be disabled, with their bits of KVM_CAP_X86_DISABLE_EXITS.
pub const EXITS: [(&str, u32); 4] = [("mwait", 1), ("hlt", 2), ("pause", 4), ("cstate", 8)];
const HLT: u32 = 2;

/// What was asked for by `--pv` and `--exits`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct FeatureRequest {
    /// Indexed like [`PARAVIRTUAL`].
    paravirtual: [Switch; PARAVIRTUAL.len()],
    realtime: Switch,
    tsc_deadline: Switch,
    /// Indexed like [`EXITS`]: whether the instruction exits.
    exits: [Switch; EXITS.len()],
}

/// What a guest gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Features {
    /// CPUID 0x4000_0001 EAX.
    pub paravirtual: u32,
    /// The same leaf's EDX: bit 0 says that vCPUs are never descheduled.
    pub hints: u32,
    /// Whether the local APIC's timer has a deadline in TSC ticks.
    pub tsc_deadline: bool,
    /// Bits of KVM_CAP_X86_DISABLE_EXITS.
    pub exits_off: u32,
}

impl FeatureRequest {
    /// Reads the values of `--pv` and `--exits`: `name=on|off|auto`, separated by commas.
    ///
    /// # Errors
    /// A name or a value that is not known.
    pub fn parse(paravirtual: Option<&str>, exits: Option<&str>) -> Result<FeatureRequest, String> {
        let mut request = FeatureRequest::default();
        for (name, switch) in pairs("--pv", paravirtual)? {
            let known = PARAVIRTUAL.iter().map(|feature| feature.name);
            let index = known.clone().position(|known| known == name);
            let place = match (index, name) {
                (Some(index), _) => &mut request.paravirtual[index],
                (None, REALTIME) => &mut request.realtime,
                (None, TSC_DEADLINE) => &mut request.tsc_deadline,
                _ => {
                    let known = known.chain([REALTIME, TSC_DEADLINE]).collect::<Vec<_>>();
                    return Err(format!("--pv: '{name}' is not one of {}", known.join(", ")));
                }
            };
            *place = switch;
        }
        for (name, switch) in pairs("--exits", exits)? {
            let Some(index) = EXITS.iter().position(|(known, _)| *known == name) else {
                let known = EXITS.map(|(known, _)| known).join(", ");
                return Err(format!("--exits: '{name}' is not one of {known}"));
            };
            request.exits[index] = switch;
        }
        Ok(request)
    }

    /// Decides which features the guest gets on this host.
    pub(super) fn decide(&self, host: &Host) -> Result<Features, PlanError> {
        let mut paravirtual = host.paravirtual;
        for (feature, switch) in PARAVIRTUAL.iter().zip(self.paravirtual) {
            let has = host.paravirtual & feature.bits != 0;
            match switch {
                Switch::Auto => {}
                Switch::Off => paravirtual &= !feature.bits,
                Switch::On if has => {}
                Switch::On => return Err(lacks("--pv", feature.name, "on", &offered(host))),
            }
        }
        let mut exits_off = 0;
        for ((name, bit), switch) in EXITS.into_iter().zip(self.exits) {
            match switch {
                Switch::Off if host.exits_off & bit == 0 => {
                    return Err(lacks("--exits", name, "off", &offered_exits(host)));
                }
                Switch::Off => exits_off |= bit,
                Switch::Auto | Switch::On => {}
            }
        }
        if exits_off & HLT != 0 {
            paravirtual &= !UNHALT;
        }
        if self.tsc_deadline == Switch::On && !host.tsc_deadline {
            return Err(lacks("--pv", TSC_DEADLINE, "on", &offered(host)));
        }
        Ok(Features {
            paravirtual,
            hints: u32::from(self.realtime == Switch::On),
            tsc_deadline: host.tsc_deadline && self.tsc_deadline != Switch::Off,
            exits_off,
        })
    }
}

fn lacks(option: &str, name: &str, value: &str, offered: &str) -> PlanError {
    PlanError::FeatureNotOffered {
        asked: format!("{option} {name}={value}"),
        offered: offered.to_owned(),
    }
}

/// Returns the names of what this host offers.
fn offered(host: &Host) -> String {
    let mut names = String::new();
    for feature in PARAVIRTUAL {
        if host.paravirtual & feature.bits != 0 {
            // Writing to a String cannot fail.
            let _ = write!(names, "{}, ", feature.name);
        }
    }
    if host.tsc_deadline {
        names.push_str("tsc-deadline, ");
    }
    names.push_str(REALTIME);
    names
}

fn offered_exits(host: &Host) -> String {
    let names = EXITS.iter().filter(|(_, bit)| host.exits_off & bit != 0);
    let names: Vec<_> = names.map(|(name, _)| *name).collect();
    match names.is_empty() {
        true => "none to turn off".to_owned(),
        false => names.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Host {
        Host {
            phys_bits: 40,
            max_vcpus: 8,
            paravirtual: 1 << 0 | 1 << 5 | UNHALT | 1 << 11,
            tsc_deadline: true,
            wide_apic_ids: false,
            exits_off: 2 | 4,
        }
    }

    fn decided(pv: &str, exits: &str) -> Result<Features, String> {
        let request = FeatureRequest::parse(Some(pv), Some(exits))?;
        request.decide(&host()).map_err(|error| error.to_string())
    }

    #[test]
    fn auto_is_what_the_host_has_and_every_exit() {
        let features = decided("", "").expect("offered");
        assert_eq!(
            features,
            decided("clock=auto,realtime=auto", "hlt=auto").expect("offered")
        );
        assert_eq!(features.paravirtual, host().paravirtual);
        assert_eq!((features.hints, features.exits_off), (0, 0));
        assert!(features.tsc_deadline);
    }

    #[test]
    fn what_is_off_is_not_there() {
        let features = decided(
            "steal-time=off,send-ipi=off,tsc-deadline=off,realtime=on",
            "",
        );
        let features = features.expect("offered");
        assert_eq!(features.paravirtual, 1 | UNHALT);
        assert_eq!((features.hints, features.tsc_deadline), (1, false));
    }

    #[test]
    fn spinlocks_need_the_exit_at_hlt() {
        let features = decided("", "hlt=off,pause=on").expect("offered");
        assert_eq!(features.exits_off, 2);
        assert_eq!(features.paravirtual & UNHALT, 0);
    }

    #[test]
    fn what_the_host_lacks_is_refused_with_what_it_has() {
        assert_eq!(
            decided("eoi=on", ""),
            Err("--pv eoi=on is not offered by this host's KVM, which has clock, steal-time, unhalt, send-ipi, tsc-deadline, realtime; leave it out".to_owned())
        );
        assert_eq!(
            decided("", "mwait=off"),
            Err("--exits mwait=off is not offered by this host's KVM, which has hlt, pause; leave it out".to_owned())
        );
        assert!(decided("steal-time=on", "").is_ok());
    }

    #[test]
    fn unknown_names_and_values_are_refused_with_the_known() {
        for (pv, exits, part) in [
            ("spin=on", "", "--pv: 'spin' is not one of clock, async-pf,"),
            (
                "eoi=yes",
                "",
                "--pv: eoi: 'yes' is not known; use on, off or auto",
            ),
            ("eoi", "", "--pv: 'eoi' has no value; write eoi=off, say"),
            (
                "",
                "halt=off",
                "--exits: 'halt' is not one of mwait, hlt, pause, cstate",
            ),
        ] {
            let error = decided(pv, exits).expect_err(part);
            assert!(error.contains(part), "{error}");
        }
    }
}
