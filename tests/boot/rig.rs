pub(crate) use crate::tools::{program, tools_disk};
pub(crate) use crate::turn::Turn;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The serial console of guests.
pub(crate) const CONSOLE: &str = "ttyAMA0";

/// The kernel that guests with devices run, and the archive of its drivers.
pub(crate) const WITH_DEVICES: [&str; 2] = ["Image", "devices.cpio"];

/// How many bytes are sent each way where every one is looked at.
pub(crate) const TRANSFER: usize = 100 << 20;

/// How many of 300 MiB that such a guest has freed it gives back.
pub(crate) const GIVEN_BACK: usize = 280;

/// The variable that names the folder of kernels and initramfs.
const ASSETS: &str = "ARMLET_TEST_ASSETS";

/// A host with KVM/arm64, and what guests boot there.
pub(crate) struct Rig {
    assets: PathBuf,
    /// What `armlet probe --json` says.
    pub(crate) facts: Facts,
}

/// What `armlet probe` says of the host.
pub(crate) struct Facts {
    /// Most guest-physical address bits.
    pub(crate) ipa_limit: u8,
    /// Bytes of a host page.
    pub(crate) page_size: u64,
    /// Versions of the interrupt controller that guests can have.
    pub(crate) gics: Vec<String>,
    /// Most vCPUs.
    pub(crate) max_vcpus: u64,
    /// Page sizes that guests can have, bytes.
    pub(crate) guest_pages: Vec<u64>,
    /// Memory of the host, bytes.
    pub(crate) memory: u64,
    /// Everything.
    pub(crate) all: Value,
}

impl Rig {
    /// One of the files to boot.
    pub(crate) fn asset(&self, name: &str) -> PathBuf {
        self.assets.join(name)
    }

    /// Whether guests may have pages of so many bytes.
    pub(crate) fn has_guest_pages(&self, size: u64) -> bool {
        self.facts.guest_pages.contains(&size)
    }

    /// Whether guests get a GICv3.
    pub(crate) fn has_gic_v3(&self) -> bool {
        self.facts.gics.iter().any(|gic| gic == "3")
    }
}

/// The host, for a test that runs on any that has KVM/arm64. `None` where there is none; this was
/// said then.
pub(crate) fn any() -> Option<&'static Rig> {
    static RIG: OnceLock<Option<Rig>> = OnceLock::new();
    let rig = RIG.get_or_init(find).as_ref();
    if rig.is_none() {
        println!("skipped: needs KVM/arm64; `cargo xtask test` boots an emulated host");
    }
    rig
}

/// Whether a guest of a few instructions runs here; if not, this was said.
pub(crate) fn small() -> bool {
    any().is_some()
}

/// The host, for a test that one host is enough for: the first of the rig's matrix, or a real one.
pub(crate) fn main() -> Option<&'static Rig> {
    let rig = any()?;
    let is = |variable: &str, value: &str| {
        std::env::var(format!("ARMLET_RIG_{variable}")).map_or(true, |set| set == value)
    };
    if is("CPU", "max") && is("GIC", "3") && is("KERNEL", "6.12") {
        return Some(rig);
    }
    println!("skipped: runs on the main host of the rig only (max-gic3)");
    None
}

fn find() -> Option<Rig> {
    let assets = PathBuf::from(std::env::var_os(ASSETS)?);
    // From here on nothing is skipped: who set the variable wants to see guests.
    assert_eq!(
        std::env::consts::ARCH,
        "aarch64",
        "{ASSETS} is set, but these tests are built for another architecture"
    );
    assert!(
        Path::new("/dev/kvm").exists(),
        "{ASSETS} is set, but there is no /dev/kvm"
    );
    let facts = Facts::of(&probe());
    Some(Rig { assets, facts })
}

fn probe() -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_armlet"))
        .args(["probe", "--json"])
        .output()
        .expect("armlet can be run");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "armlet probe ended with {}: this host runs no guests\n{text}{errors}",
        output.status
    );
    serde_json::from_str(&text).expect("armlet probe --json prints JSON")
}

impl Facts {
    fn of(report: &Value) -> Facts {
        let all = report["facts"].clone();
        let number = |key: &str| {
            all[key]
                .as_u64()
                .unwrap_or_else(|| panic!("no {key} in {all}"))
        };
        let list = |key: &str| {
            all[key]
                .as_array()
                .unwrap_or_else(|| panic!("no {key} in {all}"))
        };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Facts {
            ipa_limit: u8::try_from(number("ipa_limit")).expect("a number of bits"),
            page_size: number("page_size"),
            gics: list("gic").iter().map(text).collect(),
            max_vcpus: number("max_vcpus"),
            guest_pages: list("guest_pages")
                .iter()
                .filter_map(Value::as_u64)
                .collect(),
            memory: number("memory_bytes"),
            all,
        }
    }
}

#[test]
fn the_probe_finds_what_the_rig_emulates() {
    let Some(rig) = any() else { return };
    let facts = &rig.facts;
    println!("{:#}", facts.all);
    if facts.all["board"] != "linux,dummy-virt" {
        println!("this host is real: there is nothing to compare its facts with");
        return;
    }
    let variable = |name: &str, default: &str| {
        std::env::var(format!("ARMLET_RIG_{name}")).unwrap_or_else(|_| default.to_owned())
    };
    let (cpu, gic) = (variable("CPU", "max"), variable("GIC", "3"));
    let kernel = variable("KERNEL", "6.12");
    let old = kernel == "6.1";
    // QEMU's CPU models, by what they implement of ID_AA64MMFR0_EL1.PARange; 52 bits on pages
    // below 64 KiB need FEAT_LPA2, which Linux knows from 6.8 on.
    let limit = match cpu.as_str() {
        "max" if old => 48,
        "max" => 52,
        "neoverse-n1" | "neoverse-n2" | "neoverse-v1" => 48,
        "cortex-a72" | "cortex-a57" => 44,
        _ => 40,
    };
    assert_eq!(
        facts.ipa_limit, limit,
        "IPA limit of {cpu} on Linux {kernel}"
    );
    let page = if kernel.contains("16k") {
        0x4000
    } else {
        0x1000
    };
    assert_eq!(facts.page_size, page, "page size of Linux {kernel}");
    assert_eq!(facts.gics, [gic.as_str()], "GIC versions");
    assert_eq!(facts.all["its"], gic == "3", "ITS");
    assert_eq!(facts.max_vcpus > 8, gic == "3", "{} vCPUs", facts.max_vcpus);
    let small = ["cortex-a72", "cortex-a57", "cortex-a53"].contains(&cpu.as_str());
    assert_eq!(
        facts.guest_pages.contains(&0x4000),
        !small,
        "guest pages of {cpu}: {:?}",
        facts.guest_pages
    );
    // ID registers can be written from Linux 6.7 on.
    assert_eq!(facts.all["writable_id_registers"], !old);
    assert_eq!(facts.all["pa_range_writable"], !old);
}
