//! The values of a machine's options and where each comes from: an option takes precedence over the
//! board, the board over the default.

use crate::cli::MachineArgs;
use armlet_arch::backing::HugePages;
use armlet_arch::cores::{PinPolicy, Pinning};
use armlet_arch::irq::GicChoice;
use armlet_arch::size::show_size;
use armlet_arch::switch::Switch;
use armlet_arch::{Architecture, Board, FeatureOptions, WidthPolicy};

/// A value of the machine, with its origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its name ("memory").
    pub name: &'static str,
    /// Its value, as in an option.
    pub value: String,
    /// Its origin: an option, a board, or the default.
    pub from: String,
}

/// The values chosen for a machine.
pub struct ChosenValues<'a> {
    /// The options.
    pub args: &'a MachineArgs,
    /// The board.
    pub board: &'a Board,
    /// Why the board was chosen.
    pub why: &'a str,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// The interrupt controller.
    pub gic: GicChoice,
    /// How the address width is chosen.
    pub width: WidthPolicy,
    /// The requested CPUs.
    pub pin: &'a PinPolicy,
    /// The resulting CPUs.
    pub pinning: &'a Pinning,
    /// The host's pages.
    pub pages: HugePages,
    /// What a vCPU has.
    pub features: &'a FeatureOptions<'a>,
    /// VMGenID and VMClock.
    pub vmgenid: Switch,
    /// The kernel's command line.
    pub cmdline: &'a str,
}

impl ChosenValues<'_> {
    /// Returns each value with its origin.
    #[must_use]
    pub fn settings(&self) -> Vec<Setting> {
        let (args, guest) = (self.args, &self.board.guest);
        let pinning = match self.pinning.description.as_str() {
            "" => self.pin.to_string(),
            words => format!("{}, to {words}", self.pin),
        };
        // Name, value, option, whether the option was given, whether the board has the default.
        let rows = [
            (
                "vCPUs",
                self.cpus.to_string(),
                "--cpus",
                args.cpus.is_some(),
                false,
            ),
            (
                "memory",
                show_size(self.memory),
                "--memory",
                args.memory.is_some(),
                false,
            ),
            (
                "GIC",
                self.gic.to_string(),
                "--gic",
                args.gic.is_some(),
                guest.gic == Default::default(),
            ),
            (
                "IPA bits",
                self.width.to_string(),
                "--ipa-bits",
                args.ipa_bits.is_some(),
                guest.width == Default::default(),
            ),
            (
                "pinning",
                pinning,
                "--pin",
                args.pin.is_some(),
                guest.pin == Default::default(),
            ),
            (
                "huge pages",
                self.pages.to_string(),
                "--hugepages",
                args.hugepages.is_some(),
                guest.huge_pages == Default::default(),
            ),
            (
                "PMU",
                self.features.pmu.to_string(),
                "--pmu",
                args.pmu.is_some(),
                guest.pmu == Default::default(),
            ),
            (
                "SVE",
                self.features.sve.to_string(),
                "--sve",
                args.sve.is_some(),
                guest.sve == Default::default(),
            ),
            (
                "pointer authentication",
                self.features.pauth.to_string(),
                "--pauth",
                args.pauth.is_some(),
                guest.pauth == Default::default(),
            ),
            (
                "VMGenID",
                self.vmgenid.to_string(),
                "--vmgenid",
                args.vmgenid.is_some(),
                guest.vmgenid == Default::default(),
            ),
            (
                "command line",
                self.cmdline.to_owned(),
                "--cmdline",
                args.cmdline.is_some(),
                false,
            ),
        ];
        let mut settings = vec![Setting {
            name: "board",
            value: self.board.name.clone(),
            from: self.why.to_owned(),
        }];
        let is_arm = self.board.arch == Architecture::Aarch64;
        let of_arm = ["--gic", "--pmu", "--sve", "--pauth"];
        let rows = rows.into_iter();
        let rows = rows.filter(|(_, _, option, ..)| is_arm || !of_arm.contains(option));
        settings.extend(rows.map(|(name, value, option, given, default)| Setting {
            name,
            value,
            from: match (given, default) {
                (true, _) => option.to_owned(),
                (false, true) => "default".to_owned(),
                (false, false) => format!("board {}", self.board.name),
            },
        }));
        settings
    }
}
