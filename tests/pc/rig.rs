use crate::gdb::Meets;
pub(crate) use crate::tools::{program, tools_disk};
pub(crate) use crate::turn::Turn;
use std::fs::File;
use std::path::PathBuf;
use std::sync::OnceLock;

/// The serial console of guests.
pub(crate) const CONSOLE: &str = "ttyS0";

/// The kernel that guests with devices run, the one that boots fastest here, and its drivers.
pub(crate) const WITH_DEVICES: [&str; 2] = ["vmlinux-6.1", "devices-6.1.cpio"];

/// How many bytes are sent each way where every one is looked at: fewer than on ARM64, for guests
/// are slower here.
pub(crate) const TRANSFER: usize = 16 << 20;

/// How many of 300 MiB that such a guest has freed it gives back. Linux 6.1 keeps up to its low
/// watermark, 43 MiB, in lists of each CPU, huge pages too (mm/page_alloc.c, `zone_highsize`), and
/// reports nothing that lies there.
pub(crate) const GIVEN_BACK: usize = 250;

/// The variable that names the folder of kernels and initramfs.
const ASSETS: &str = "ARMLET_TEST_ASSETS";

/// A host with KVM on x86_64, and what guests boot there.
pub(crate) struct Rig {
    assets: PathBuf,
}

impl Rig {
    /// One of the files to boot.
    pub(crate) fn asset(&self, name: &str) -> PathBuf {
        self.assets.join(name)
    }

    /// Whether guests may have pages of so many bytes.
    pub(crate) fn has_guest_pages(&self, size: u64) -> bool {
        size == 0x1000
    }
}

/// The host, for a test that boots Linux. `None` where there is none; this was said then.
pub(crate) fn linux() -> Option<&'static Rig> {
    static RIG: OnceLock<Option<Rig>> = OnceLock::new();
    let rig = RIG.get_or_init(|| {
        let assets = PathBuf::from(std::env::var_os(ASSETS)?);
        // From here on nothing is skipped: who set the variable wants to see guests.
        assert!(small(), "{ASSETS} is set, but this host runs no guests");
        Some(Rig { assets })
    });
    if rig.is_none() {
        println!("skipped: needs kernels; `cargo xtask test --arch x86_64` boots an emulated host");
    }
    rig.as_ref()
}

/// The same, for tests that run on several hosts or one: there is one here.
pub(crate) use {linux as any, linux as main};

/// Whether a guest of a few instructions runs here; if not, this was said.
pub(crate) fn small() -> bool {
    if std::env::consts::ARCH != "x86_64" {
        println!("skipped: needs an x86_64 host");
        return false;
    }
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            println!("skipped: cannot open /dev/kvm ({error})");
            false
        }
    }
}

/// Whether guests run by the CPU's help; without it, KVM emulates their instructions, those that it knows.
pub(crate) fn virtualizes() -> bool {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut flags = flags.split_whitespace();
    flags.any(|flag| flag == "vmx" || flag == "svm")
}

/// What KVM stops guests at here. Without the CPU's help it has neither breakpoint instructions nor
/// watchpoints. QEMU's emulated SVM does not tell KVM of INT3 (target/i386/tcg/excp_helper.c:
/// raise_interrupt2 checks for SVM_EXIT_SWINT alone); it emulates no VMX.
pub(crate) fn meets() -> Meets {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |name: &str| flags.split_whitespace().any(|flag| flag == name);
    let meets = Meets {
        instructions: has("vmx"),
        watchpoints: has("vmx") || has("svm"),
    };
    if !meets.instructions {
        println!("skipped: breakpoint instructions, which need a CPU with VMX");
    }
    meets
}
