//! What KVM offers, as `armlet probe` shows it.

use crate::kvm::facts::{ArmFacts, X86Facts};
use armlet_arch::aarch64;
use armlet_arch::x86_64::features::{EXITS, PARAVIRTUAL};
use serde_json::{Value, json};

/// A fact: its key for programs, its name for people, and its value.
pub(super) type Fact = (&'static str, &'static str, Value);

pub(super) fn x86_facts(x86: &X86Facts) -> Vec<Fact> {
    let host = &x86.host;
    let mut facts = vec![
        ("phys_bits", "Guest address bits", json!(host.phys_bits)),
        ("max_vcpus", "vCPUs, at most", json!(host.max_vcpus)),
        ("hardware", "VMX or SVM", json!(x86.hardware)),
    ];
    for feature in PARAVIRTUAL {
        let has = host.paravirtual & feature.bits != 0;
        facts.push((feature.name, feature.label, json!(has)));
    }
    let exits = EXITS.iter().filter(|(_, bit)| host.exits_off & bit != 0);
    let exits: Vec<_> = exits.map(|(name, _)| *name).collect();
    facts.extend([
        (
            "tsc-deadline",
            "TSC deadline timer",
            json!(host.tsc_deadline),
        ),
        ("exits_off", "Exits that can be off", json!(exits)),
        (
            "exitless_timers",
            "Timers without an exit",
            json!(x86.timers.injected && x86.timers.posted),
        ),
    ]);
    facts.extend(x86.offers.facts());
    facts
}

pub(super) fn arm_facts(arm: &ArmFacts) -> Vec<Fact> {
    let host = &arm.host;
    let limit = host.ipa_limit.unwrap_or(aarch64::ipa::LEGACY_BITS);
    let mut gic = Vec::new();
    if host.gic_v2 {
        gic.push("2");
    }
    if host.gic_v3 {
        gic.push("3");
    }
    let mut facts = vec![
        ("ipa_limit", "IPA bits, at most", json!(limit)),
        (
            "ipa_selectable",
            "IPA bits selectable",
            json!(host.ipa_limit.is_some()),
        ),
        ("pa_range", "PARange, bits", json!(arm.pa_range)),
        (
            "pa_range_writable",
            "PARange can be lowered",
            json!(arm.pa_range_writable),
        ),
        (
            "writable_id_registers",
            "ID registers writable",
            json!(arm.writable_id_registers),
        ),
        ("gic", "GIC versions", json!(gic)),
        ("its", "ITS", json!(arm.its)),
        ("max_vcpus", "vCPUs, at most", json!(host.max_vcpus)),
        (
            "guest_pages",
            "Guest page sizes, bytes",
            json!(host.guest_pages),
        ),
        ("pmu", "PMU", json!(host.offered.pmu)),
        ("sve", "SVE", json!(host.offered.sve)),
        ("pauth", "Pointer authentication", json!(host.offered.pauth)),
        ("mte", "MTE", json!(arm.mte)),
        ("steal_time", "Steal time", json!(host.offered.steal_time)),
        ("nested", "Nested virtualisation", json!(arm.nested)),
    ];
    facts.extend(arm.offers.arm_facts());
    facts
}
