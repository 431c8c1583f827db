//! Who chose what of a machine: an option wins over the board, the board over the default.

use crate::cli::MachineArgs;
use armlet_arch::backing::HugePages;
use armlet_arch::cores::{PinPolicy, Pinning};
use armlet_arch::size::show_size;
use armlet_arch::{Arch, Board, Request};
use std::fmt::Display;

/// A value of the machine and who chose it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// What it is ("memory").
    pub name: &'static str,
    /// Its value, as one writes it.
    pub value: String,
    /// Who chose it: an option, a board or nobody ("default").
    pub from: String,
}

/// What was chosen for a machine on `board`, which was taken because of `why`.
#[must_use]
pub fn settings<A: Arch>(
    args: &MachineArgs,
    board: &Board,
    why: &str,
    request: &Request<A>,
    pin: &PinPolicy,
    pinning: &Pinning,
    pages: HugePages,
) -> Vec<Setting> {
    let from = |option: &'static str, given: bool, default: bool| match (given, default) {
        (true, _) => option.to_owned(),
        (false, true) => "default".to_owned(),
        (false, false) => format!("board {}", board.name),
    };
    let setting = |name, value: &dyn Display, from| Setting {
        name,
        value: value.to_string(),
        from,
    };
    vec![
        setting("board", &board.name, why.to_owned()),
        setting(
            "vCPUs",
            &request.cpus,
            from("--cpus", args.cpus.is_some(), false),
        ),
        setting(
            "memory",
            &show_size(request.memory),
            from("--memory", args.memory.is_some(), false),
        ),
        setting(
            "GIC",
            &request.gic,
            from(
                "--gic",
                args.gic.is_some(),
                board.guest.gic == Default::default(),
            ),
        ),
        setting(
            "IPA bits",
            &request.width,
            from(
                "--ipa-bits",
                args.ipa_bits.is_some(),
                board.guest.width == Default::default(),
            ),
        ),
        setting(
            "pinning",
            &match pinning.words.as_str() {
                "" => pin.to_string(),
                words => format!("{pin}, to {words}"),
            },
            from(
                "--pin",
                args.pin.is_some(),
                board.guest.pin == Default::default(),
            ),
        ),
        setting(
            "huge pages",
            &pages,
            from(
                "--hugepages",
                args.hugepages.is_some(),
                board.guest.huge_pages == Default::default(),
            ),
        ),
        setting(
            "command line",
            &request.cmdline,
            from("--cmdline", args.cmdline.is_some(), false),
        ),
    ]
}
