//! What would stop or slow a guest on a host, with the fix.

use crate::host::HugePagePolicy;
use crate::kvm::facts::{ArmFacts, X86Facts};
use armlet_arch::board::Severity;
use armlet_arch::size::show_size;
use armlet_system::huge::huge_page;

/// One line of the diagnosis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// What was found.
    pub what: String,
    /// What to do about it.
    pub fix: String,
}

/// Diagnoses a host that gives guests no huge pages.
pub(super) fn diagnose_huge_pages(policy: &HugePagePolicy, page_size: u64) -> Vec<Finding> {
    let block = show_size(huge_page(page_size as usize) as u64);
    let cost = format!(
        "each page of {} is a fault and an entry in stage 2 of its own",
        show_size(page_size)
    );
    let pool = format!("--hugepages {block} takes pages of a pool that was set aside");
    let mut findings = Vec::new();
    let mut add = |severity, what: String, fix: String| {
        findings.push(Finding {
            severity,
            what,
            fix,
        });
    };
    match policy.private.as_deref() {
        None => add(
            Severity::Limits,
            format!("this kernel has no transparent huge pages, as those with PREEMPT_RT: {cost}"),
            format!("{pool} (docs/options.md, Guest memory), or use another kernel"),
        ),
        Some("never") => add(
            Severity::Limits,
            format!("transparent huge pages are switched off: {cost}"),
            format!(
                "as root, 'echo madvise > {}', or {pool}",
                policy.private_file
            ),
        ),
        Some(_) => {}
    }
    if policy.private.is_some() && policy.shared.as_deref() == Some("never") {
        add(
            Severity::Note,
            "memory of guests with --share comes in small pages: transparent huge pages are switched off for shared memory".to_owned(),
            format!("as root, 'echo advise > {}', or {pool}", policy.shared_file),
        );
    }
    findings
}

pub(super) fn diagnose_x86(facts: &X86Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !facts.hardware {
        findings.push(Finding {
            severity: Severity::Limits,
            what: "the CPU shows neither VMX nor SVM: KVM runs guests in software".to_owned(),
            fix: "most kernels do not start; use a host with virtualisation switched on in its firmware, or nested virtualisation".to_owned(),
        });
    }
    if facts.timers.posted && !facts.timers.injected {
        findings.push(Finding {
            severity: Severity::Note,
            what: "guests' timers are exits".to_owned(),
            fix: "with CPUs isolated for guests (nohz_full=, isolcpus=) or kvm.pi_inject_timer=1, and --exits hlt=off or mwait=off for pinned vCPUs, the other CPUs take them".to_owned(),
        });
    }
    findings
}

pub(super) fn diagnose_arm(
    facts: &ArmFacts,
    cpus: usize,
    cpu_interface: Option<u64>,
) -> Vec<Finding> {
    let host = &facts.host;
    let mut findings = Vec::new();
    let mut add = |severity, what: String, fix: &str| {
        findings.push(Finding {
            severity,
            what,
            fix: fix.to_owned(),
        });
    };
    if !host.gic_v2 && !host.gic_v3 {
        add(
            Severity::Stops,
            "KVM has no virtual GIC".to_owned(),
            "the board has no GIC (Raspberry Pi 3), or its device tree lacks the GIC's maintenance interrupt (some Raspberry Pi 5 and Orin kernels): update kernel and device tree, and see 'dmesg | grep -i vgic'",
        );
    } else if !host.gic_v3 {
        add(
            Severity::Limits,
            "GICv2 only: at most 8 vCPUs, and no message-signalled interrupts".to_owned(),
            "nothing to do for guests of up to 8 vCPUs; --gic auto chooses it",
        );
    }
    match host.ipa_limit {
        None => add(
            Severity::Limits,
            "KVM is older than Linux 4.20: each guest gets 40 address bits, no more and no fewer"
                .to_owned(),
            "guests up to 1023G run; a newer kernel would fit the width to the guest",
        ),
        Some(limit) if limit < 40 => add(
            Severity::Note,
            format!("the IPA limit of {limit} bits is under the 40 that older VMMs ask for"),
            "nothing to do: armlet asks for as few as the guest needs",
        ),
        Some(_) => {}
    }
    if host.page_size > 0x1000 {
        let block = huge_page(host.page_size as usize) as u64;
        add(
            Severity::Note,
            format!(
                "host pages of {}: huge blocks are {}, so a smaller guest gets none",
                show_size(host.page_size),
                show_size(block)
            ),
            "give a guest that must be fast a multiple of that; armlet aligns memory and GIC windows by itself",
        );
        // KVM maps the CPU interface to guests in whole host pages, or not at all
        // (arch/arm64/kvm/vgic/vgic-v2.c: vgic_v2_probe).
        let page = show_size(host.page_size);
        let fix = "use a kernel with 4K pages where interrupts matter (Raspberry Pi 5: kernel=kernel8.img in config.txt)";
        match cpu_interface {
            _ if !host.gic_v2 => {}
            Some(bytes) if bytes.is_multiple_of(host.page_size) => {}
            Some(bytes) => add(
                Severity::Limits,
                format!(
                    "KVM traps each access to the GICv2's CPU interface, at each interrupt: its window of {} is no whole page of {page}",
                    show_size(bytes)
                ),
                fix,
            ),
            None => add(
                Severity::Limits,
                format!(
                    "GICv2 on {page} pages: KVM may have to trap the GIC's CPU interface at each interrupt ('dmesg | grep GICV' says so)"
                ),
                fix,
            ),
        }
    }
    if !facts.pa_range_writable {
        add(
            Severity::Note,
            "this kernel does not let the guest's PARange be lowered (Linux before 6.7)".to_owned(),
            "nothing to do: guests see the host's value, and run",
        );
    }
    if !host.offered.pmu {
        add(
            Severity::Note,
            "KVM has no performance counters for guests".to_owned(),
            "perf counts no hardware events in guests; the host's kernel needs the driver of its own counters ('dmesg | grep -i pmu'), and they in its device tree or ACPI tables",
        );
    }
    if cpus == 1 {
        add(
            Severity::Note,
            "this host has one CPU".to_owned(),
            "guests with more vCPUs run, but not faster",
        );
    }
    findings
}
