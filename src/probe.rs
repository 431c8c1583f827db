//! What this host offers, and what would stop or slow a guest on it, with the fix.

use crate::host::HugePagePolicy;
use crate::kvm::facts::Virtualization;
use crate::kvm::open::{self, Access};
use crate::kvm::{HostArch, KvmArch, offers};
use crate::{boards, host};
use anyhow::Result;
use armlet_arch::board::Severity;
use armlet_arch::{Arch, Architecture, Board};
use armlet_system::huge::huge_page;
use armlet_system::landlock::{self, Lack};
use armlet_system::messages::visible;
use armlet_system::page_size::page_size;
use diagnosis::{diagnose_arm, diagnose_huge_pages, diagnose_x86};
use facts::{Fact, arm_facts, x86_facts};
use serde_json::{Value, json};
use std::fmt::Write;

mod diagnosis;
mod facts;

pub use diagnosis::Finding;

/// A host, as `armlet probe` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The kernel's release.
    pub kernel: String,
    /// The board, as its firmware names it.
    pub board: String,
    /// The built-in board that matches it.
    pub profile: Option<Recognised>,
    /// The instruction set that this binary was built for.
    pub architecture: Architecture,
    /// Page size in bytes.
    pub page_size: u64,
    /// The number of online CPUs.
    pub cpus: usize,
    /// Memory in bytes.
    pub memory: u64,
    /// The size of a GICv2's virtual CPU interface (GICV) in bytes, where the device tree gives it.
    pub cpu_interface: Option<u64>,
    /// The policy for transparent huge pages, of memory that only armlet has and of memory that it
    /// shares (`--share`): always, madvise or never, say; `None` on a kernel without them.
    pub huge_pages: HugePagePolicy,
    /// The mode of KVM/arm64 that the kernel's command line selects.
    pub kvm_mode: String,
    /// What the kernel's Landlock lacks of what `run` asks for.
    pub landlock: Option<Lack>,
    /// KVM, or why there is none.
    pub kvm: Result<Virtualization, NoKvm>,
}

/// The built-in board that matches a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recognised {
    /// The board.
    pub board: Board,
    /// Why it matches.
    pub why: String,
}

/// Why KVM cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoKvm {
    /// There is no `/dev/kvm`; what helps.
    Missing(String),
    /// Permission to open it is missing; what helps.
    Denied(String),
    /// It can be opened but does not work.
    Broken(String),
}

/// Probes this host.
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
        page_size: page_size() as u64,
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        memory: (system.totalram as u64).saturating_mul(u64::from(system.mem_unit)),
        cpu_interface: files.gic_v2_cpu_interface(),
        huge_pages: files.huge_page_policy(huge_page(page_size())),
        kvm_mode: offers::mode_of(&files.kernel_cmdline()),
        landlock: landlock::lack(),
        kvm,
    }
}

impl Report {
    /// Returns whether a guest of this host's architecture can run at all.
    #[must_use]
    pub fn runs_guests(&self) -> bool {
        !self
            .diagnosis()
            .iter()
            .any(|finding| finding.severity == Severity::Stops)
    }

    /// Returns everything that would stop or slow a guest, with the fix.
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
        findings.extend(diagnose_huge_pages(&self.huge_pages, self.page_size));
        if self.landlock == Some(Lack::All) {
            findings.push(finding(
                Severity::Note,
                "this kernel has no Landlock, or it is switched off: the sandbox does without",
                "nothing has to be done; where the kernel has it, lsm=landlock before the others on its command line switches it on",
            ));
        }
        let notes = self
            .profile
            .iter()
            .flat_map(|known| &known.board.host.notes);
        findings.extend(notes.map(|note| finding(note.severity, &note.what, &note.fix)));
        findings
    }

    /// Formats the report for people.
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

    /// Formats the report as JSON.
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

    fn facts(&self) -> Vec<Fact> {
        let mut facts = vec![
            ("board", "Board", json!(self.board)),
            (
                "profile",
                "Profile",
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
            (
                "landlock",
                "Landlock, for the sandbox",
                json!(match self.landlock {
                    None => "whole",
                    Some(Lack::Newer(_)) => "part",
                    Some(Lack::All) => "none",
                }),
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

#[cfg(test)]
mod tests;
