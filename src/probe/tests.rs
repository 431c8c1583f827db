//! Reports of hosts other than this one.

use super::*;
use crate::kvm::facts::ArmFacts;
use crate::kvm::offers::Offers;
use armlet_arch::aarch64;

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
        landlock: None,
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
