//! What this host offers, and what would stop or slow a guest on it, with the fix.

use crate::host::HugePagePolicy;
use crate::kvm::facts::{ArmFacts, Virtualization, X86Facts};
use crate::kvm::open::{self, Access};
use crate::kvm::{HostArch, KvmArch, offers};
use crate::{boards, host};
use anyhow::Result;
use armlet_arch::board::Severity;
use armlet_arch::size::show_size;
use armlet_arch::x86_64::features::{EXITS, PARAVIRTUAL};
use armlet_arch::{Arch, Architecture, Board, aarch64};
use armlet_system::huge::huge_page;
use armlet_system::messages::visible;
use serde_json::{Value, json};
use std::fmt::Write;

/// A host, as `armlet probe` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The kernel's release.
    pub kernel: String,
    /// The board, as its firmware names it.
    pub board: String,
    /// The built-in board that it is.
    pub profile: Option<Recognised>,
    /// Instruction set that this armlet was built for.
    pub architecture: Architecture,
    /// Page size in bytes.
    pub page_size: u64,
    /// CPUs that are on.
    pub cpus: usize,
    /// Memory in bytes.
    pub memory: u64,
    /// Bytes of the window by which a GICv2 shows guests their CPU interface (GICV), where the
    /// device tree says so.
    pub cpu_interface: Option<u64>,
    /// The policy for transparent huge pages, of memory that only armlet has and of memory that it
    /// shares (`--share`): always, madvise or never, say; `None` on a kernel without them.
    pub huge_pages: HugePagePolicy,
    /// The mode that the kernel's command line asks of KVM/arm64.
    pub kvm_mode: String,
    /// KVM, or why there is none.
    pub kvm: Result<Virtualization, NoKvm>,
}

/// The built-in board that a host is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recognised {
    /// The board.
    pub board: Board,
    /// By what it was recognised.
    pub why: String,
}

/// Why KVM cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoKvm {
    /// There is no `/dev/kvm`; what helps.
    Missing(String),
    /// It may not be opened; what helps.
    Denied(String),
    /// It was opened and does not work.
    Broken(String),
}

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

/// Looks at this host.
#[must_use]
pub fn probe() -> Report {
    let kvm = match open::access() {
        Access::Open(kvm) => {
            HostArch::facts(&kvm).map_err(|error| NoKvm::Broken(format!("{error:#}")))
        }
        Access::Missing => Err(NoKvm::Missing(open::missing())),
        Access::Denied => Err(NoKvm::Denied(open::denied())),
        Access::Broken(cause) => Err(NoKvm::Broken(cause)),
    };
    let system = rustix::system::sysinfo();
    let files = host::this();
    Report {
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        board: files
            .name()
            .unwrap_or_else(|| "not named by the firmware".to_owned()),
        profile: boards::recognize(&files.identity()).and_then(|(name, why)| {
            let board = boards::find(name).ok()?;
            Some(Recognised { board, why })
        }),
        architecture: HostArch::ARCHITECTURE,
        page_size: rustix::param::page_size() as u64,
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        memory: (system.totalram as u64).saturating_mul(u64::from(system.mem_unit)),
        cpu_interface: files.gic_v2_cpu_interface(),
        huge_pages: files.huge_page_policy(huge_page(rustix::param::page_size())),
        kvm_mode: offers::mode_of(&files.kernel_cmdline()),
        kvm,
    }
}

impl Report {
    /// Whether a guest of this host's architecture can run at all.
    #[must_use]
    pub fn runs_guests(&self) -> bool {
        !self
            .diagnosis()
            .iter()
            .any(|finding| finding.severity == Severity::Stops)
    }

    /// Each thing that would stop or slow a guest, with the fix.
    #[must_use]
    pub fn diagnosis(&self) -> Vec<Finding> {
        let finding = |severity, what: &str, fix: &str| Finding {
            severity,
            what: what.to_owned(),
            fix: fix.to_owned(),
        };
        let mut findings = match &self.kvm {
            Err(NoKvm::Missing(fix)) => vec![finding(Severity::Stops, "no /dev/kvm", fix)],
            Err(NoKvm::Denied(fix)) => {
                vec![finding(Severity::Stops, "/dev/kvm may not be opened", fix)]
            }
            Err(NoKvm::Broken(cause)) => vec![finding(
                Severity::Stops,
                &format!("KVM does not work: {cause}"),
                "see 'dmesg | grep -i kvm' for the kernel's reason",
            )],
            Ok(Virtualization::Arm(facts)) => diagnose_arm(facts, self.cpus, self.cpu_interface),
            Ok(Virtualization::X86(facts)) => diagnose_x86(facts),
        };
        findings.extend(self.diagnose_huge_pages());
        let notes = self
            .profile
            .iter()
            .flat_map(|known| &known.board.host.notes);
        findings.extend(notes.map(|note| finding(note.severity, &note.what, &note.fix)));
        findings
    }

    /// What it means for guests that the host gives them no huge pages.
    fn diagnose_huge_pages(&self) -> Vec<Finding> {
        let block = show_size(huge_page(self.page_size as usize) as u64);
        let cost = format!(
            "each page of {} is a fault and an entry in stage 2 of its own",
            show_size(self.page_size)
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
        let policy = &self.huge_pages;
        match policy.private.as_deref() {
            None => add(
                Severity::Limits,
                format!(
                    "this kernel has no transparent huge pages, as those with PREEMPT_RT: {cost}"
                ),
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

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        for (_, label, value) in self.facts() {
            let value = visible(show(&value).as_bytes(), usize::MAX);
            let _ = writeln!(out, "{label:<28} {value}");
        }
        let _ = writeln!(out, "\nDiagnosis");
        let findings = self.diagnosis();
        if findings.is_empty() {
            let _ = writeln!(out, "  Nothing found that would stop or slow a guest.");
        }
        for finding in findings {
            let mark = match finding.severity {
                Severity::Stops => "STOPS ",
                Severity::Limits => "LIMITS",
                Severity::Note => "note  ",
            };
            let [what, fix] =
                [finding.what, finding.fix].map(|text| visible(text.as_bytes(), usize::MAX));
            let _ = writeln!(out, "  {mark}  {what}\n          {fix}");
        }
        out
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> Value {
        let facts = self.facts().into_iter();
        let facts: serde_json::Map<String, Value> = facts
            .map(|(key, _, value)| (key.to_owned(), value))
            .collect();
        let findings: Vec<Value> = self
            .diagnosis()
            .into_iter()
            .map(|finding| {
                json!({
                    "severity": match finding.severity {
                        Severity::Stops => "stops",
                        Severity::Limits => "limits",
                        Severity::Note => "note",
                    },
                    "what": finding.what,
                    "fix": finding.fix,
                })
            })
            .collect();
        json!({ "runs_guests": self.runs_guests(), "facts": facts, "diagnosis": findings })
    }

    fn facts(&self) -> Vec<(&'static str, &'static str, Value)> {
        let mut facts = vec![
            ("board", "Board", json!(self.board)),
            (
                "profile",
                "Board of armlet's",
                json!(
                    self.profile
                        .as_ref()
                        .map_or(boards::fallback_of(HostArch::ARCHITECTURE), |known| {
                            &known.board.name
                        })
                ),
            ),
            ("kernel", "Kernel", json!(self.kernel)),
            ("architecture", "Architecture", json!(self.architecture)),
            ("cpus", "CPUs", json!(self.cpus)),
            ("memory_bytes", "Memory, bytes", json!(self.memory)),
            ("page_size", "Page size, bytes", json!(self.page_size)),
            (
                "transparent_huge_pages",
                "Transparent huge pages",
                json!(self.huge_pages.private.as_deref().unwrap_or("none")),
            ),
            (
                "shared_huge_pages",
                "The same, shared memory",
                json!(self.huge_pages.shared.as_deref().unwrap_or("none")),
            ),
            ("kvm", "KVM", json!(self.kvm.is_ok())),
        ];
        if self.architecture == Architecture::Aarch64 {
            facts.push(("kvm_mode", "KVM's mode", json!(self.kvm_mode)));
            let protected = self.kvm_mode == "protected";
            facts.push(("protected", "Protected VMs", json!(protected)));
        }
        match &self.kvm {
            Ok(Virtualization::Arm(arm)) => facts.extend(arm_facts(arm)),
            Ok(Virtualization::X86(x86)) => facts.extend(x86_facts(x86)),
            Err(_) => {}
        }
        facts
    }
}

fn x86_facts(x86: &X86Facts) -> Vec<(&'static str, &'static str, Value)> {
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

fn diagnose_x86(facts: &X86Facts) -> Vec<Finding> {
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

fn arm_facts(arm: &ArmFacts) -> Vec<(&'static str, &'static str, Value)> {
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

fn show(value: &Value) -> String {
    match value {
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::Null => "unknown".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.is_empty() => "none".to_owned(),
        Value::Array(items) => items.iter().map(show).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

fn diagnose_arm(facts: &ArmFacts, cpus: usize, cpu_interface: Option<u64>) -> Vec<Finding> {
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
        // KVM maps the interface to guests by whole host pages, or not at all
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::offers::Offers;

    fn pi5() -> ArmFacts {
        ArmFacts {
            host: aarch64::Host {
                ipa_limit: Some(40),
                page_size: 0x4000,
                gic_v2: true,
                gic_v3: false,
                max_vcpus: 8,
                guest_pages: vec![0x1000, 0x4000, 0x1_0000],
                offered: aarch64::Offered {
                    pmu: true,
                    ..Default::default()
                },
            },
            its: false,
            pa_range: Some(40),
            mte: false,
            nested: false,
            writable_id_registers: true,
            pa_range_writable: true,
            offers: Offers::default(),
        }
    }

    fn report(kvm: Result<Virtualization, NoKvm>) -> Report {
        Report {
            kernel: "6.12".to_owned(),
            board: "Raspberry Pi 5".to_owned(),
            profile: Some(Recognised {
                board: boards::find("rpi5").expect("a board"),
                why: String::new(),
            }),
            architecture: Architecture::Aarch64,
            page_size: 0x4000,
            cpus: 4,
            memory: 8 << 30,
            cpu_interface: None,
            huge_pages: HugePagePolicy {
                private: Some("madvise".to_owned()),
                shared: Some("advise".to_owned()),
                ..HugePagePolicy::default()
            },
            kvm_mode: "default".to_owned(),
            kvm,
        }
    }

    fn said(facts: ArmFacts) -> String {
        report(Ok(Virtualization::Arm(facts))).text()
    }

    #[test]
    fn a_raspberry_pi_5_runs_guests_within_its_limits() {
        let report = report(Ok(Virtualization::Arm(pi5())));
        assert!(report.runs_guests());
        let text = report.text();
        assert!(text.contains("at most 8 vCPUs"), "{text}");
        assert!(text.contains("kernel8.img"), "{text}");
        assert!(text.contains("huge blocks are 32M"), "{text}");
    }

    #[test]
    fn a_cpu_interface_that_is_no_whole_page_is_said_to_be_trapped() {
        let mut report = report(Ok(Virtualization::Arm(pi5())));
        assert!(report.text().contains("may have to trap"));
        report.cpu_interface = Some(0x2000);
        let text = report.text();
        assert!(text.contains("KVM traps"), "{text}");
        assert!(
            text.contains("its window of 8K is no whole page of 16K"),
            "{text}"
        );
        report.cpu_interface = Some(0x1_0000);
        assert!(!report.text().contains("trap"), "{}", report.text());
    }

    #[test]
    fn what_stops_guests_is_said_with_its_fix() {
        let mut facts = pi5();
        facts.host.gic_v2 = false;
        let no_gic = report(Ok(Virtualization::Arm(facts)));
        assert!(!no_gic.runs_guests());
        assert!(no_gic.text().contains("maintenance interrupt"));
        for (kvm, fix) in [
            (NoKvm::Missing("start at EL2".to_owned()), "EL2"),
            (NoKvm::Denied("join a group".to_owned()), "join a group"),
            (NoKvm::Broken("odd".to_owned()), "odd"),
        ] {
            let report = report(Err(kvm));
            assert!(!report.runs_guests());
            assert!(report.text().contains(fix), "{}", report.text());
            assert_eq!(report.json()["runs_guests"], json!(false));
        }
    }

    #[test]
    fn a_host_without_transparent_huge_pages_is_told_what_guests_pay() {
        let mut report = report(Ok(Virtualization::Arm(pi5())));
        report.page_size = 0x1000;
        assert!(!report.text().contains("transparent huge pages are"));
        report.huge_pages.private = Some("never".to_owned());
        report.huge_pages.private_file = "/sys/thp".to_owned();
        let text = report.text();
        assert!(
            text.contains("LIMITS  transparent huge pages are switched off"),
            "{text}"
        );
        assert!(
            text.contains("'echo madvise > /sys/thp', or --hugepages 2M"),
            "{text}"
        );
        assert_eq!(
            report.json()["facts"]["transparent_huge_pages"],
            json!("never")
        );
        report.huge_pages.private = None;
        let text = report.text();
        assert!(
            text.contains("PREEMPT_RT") && text.contains("--hugepages 2M"),
            "{text}"
        );
        assert!(report.runs_guests());
        report.huge_pages.private = Some("always".to_owned());
        report.huge_pages.shared = Some("never".to_owned());
        assert!(
            report.text().contains("guests with --share"),
            "{}",
            report.text()
        );
    }

    #[test]
    fn what_kvm_of_newer_kernels_offers_is_shown() {
        let mut facts = pi5();
        facts.offers = Offers::ask(|cap| i32::from(matches!(cap, 234 | 245)));
        let mut report = report(Ok(Virtualization::Arm(facts)));
        report.kvm_mode = "protected".to_owned();
        let facts = &report.json()["facts"];
        for key in ["guest_memfd", "sea_to_user", "protected"] {
            assert_eq!(facts[key], json!(true), "{key}");
        }
        assert_eq!(facts["pmu_v3_strict"], json!(false));
        assert_eq!(facts["block_sizes"], json!([]));
    }

    #[test]
    fn old_kernels_and_narrow_hosts_are_told_apart() {
        let mut legacy = pi5();
        legacy.host.ipa_limit = None;
        assert!(said(legacy).contains("40 address bits"));
        let mut narrow = pi5();
        narrow.host.ipa_limit = Some(36);
        assert!(said(narrow).contains("36 bits"));
    }

    #[test]
    fn a_host_without_counters_for_guests_says_so() {
        let counters = "no performance counters";
        assert!(!said(pi5()).contains(counters));
        let mut without = pi5();
        without.host.offered.pmu = false;
        assert!(said(without).contains(counters));
    }
}
