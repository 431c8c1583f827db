//! Boards: built-in ones, and files that the user names.

use crate::kvm::HostArch;
use anyhow::{Context, Result, anyhow};
use armlet_arch::board::{self, Identity, Profile, Signature};
use armlet_arch::midr::Midr;
use armlet_arch::{Arch, Architecture, Board};
use armlet_system::files;
use armlet_system::status::{Fault, Status};
use std::borrow::Cow;
use std::path::Path;

/// The default of `--board`: the board that matches this host.
pub const AUTO: &str = "auto";

/// The board for hosts that no built-in board matches.
pub const FALLBACK: &str = "virt";

/// Returns the board for guests that run on an x86_64 host that no built-in board matches.
#[must_use]
pub const fn fallback_of(guests: Architecture) -> &'static str {
    match guests {
        Architecture::Aarch64 => FALLBACK,
        Architecture::X86_64 => "pc",
    }
}

/// Includes files of `boards/`, and their compiled form from `build.rs`.
macro_rules! built_in {
    ($($name:literal),* $(,)?) => {
        &[$(BuiltIn {
            name: $name,
            text: include_str!(concat!("../boards/", $name, ".toml")),
            packed: include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".board")),
            signature: include!(concat!(env!("OUT_DIR"), "/", $name, ".match")),
        }),*]
    };
}

/// A board that is part of the program.
#[derive(Debug)]
pub struct BuiltIn {
    /// Its name.
    pub name: &'static str,
    /// Its file.
    pub text: &'static str,
    /// The resolved board, a [`Board`] in postcard's format.
    packed: &'static [u8],
    /// The signature by which its hosts are recognised.
    signature: Option<Signature>,
}

impl BuiltIn {
    fn named(name: &str) -> Option<&'static BuiltIn> {
        BUILT_IN.iter().find(|board| board.name == name)
    }

    fn board(&self) -> Result<Board> {
        postcard::from_bytes(self.packed).context("it was built in as it cannot be read")
    }
}

/// Built-in boards.
pub static BUILT_IN: &[BuiltIn] = built_in![
    "virt",
    "rpi3",
    "rpi4",
    "rpi5",
    "rk3588",
    "orin",
    "imx8mp",
    "altra",
    "graviton2",
    "graviton3",
    "graviton4",
    "grace",
    "ampereone",
    "m1-asahi",
    "server52",
    "qemu-virt",
    "firecracker",
    "pc",
];

/// The maximum size of a board file in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Reads a board's file: a built-in one by its name, any other by its path.
fn text(name: &str) -> Result<String> {
    if let Some(board) = BuiltIn::named(name) {
        return Ok(board.text.to_owned());
    }
    let path = Path::new(name);
    if !looks_like_a_path(name) && !path.is_file() {
        let known: Vec<_> = BUILT_IN.iter().map(|board| board.name).collect();
        return Err(anyhow!(
            "board '{name}' is not known; built in: {}; or give the path of a TOML file",
            known.join(", ")
        ));
    }
    files::text(path, MAX_BYTES).with_context(|| format!("cannot read board file '{name}'"))
}

fn looks_like_a_path(name: &str) -> bool {
    name.contains('/') || name.ends_with(".toml")
}

/// Finds the board that the file `from` inherits from: a path is relative to that file.
fn parent(from: &str, wanted: &str) -> Result<(String, String), String> {
    let name = match Path::new(from).parent() {
        Some(folder) if looks_like_a_path(wanted) => folder.join(wanted).to_string_lossy().into(),
        _ => wanted.to_owned(),
    };
    let text = text(&name).map_err(|error| format!("leads nowhere: {error:#}"))?;
    Ok((name, text))
}

/// Finds and reads a board, and records where each of its values comes from.
///
/// # Errors
/// An unknown name, or a file that cannot be read or is not a board, with line and reason.
pub fn profile(name: &str) -> Result<Profile> {
    let read = |text: String| Profile::read(name, &text, &parent);
    let profile = text(name).and_then(|text| read(text).with_context(|| format!("board '{name}'")));
    profile.fault(Status::Usage)
}

/// Finds and reads a board.
///
/// # Errors
/// As [`profile`].
pub fn find(name: &str) -> Result<Board> {
    match BuiltIn::named(name) {
        Some(built_in) => built_in.board().with_context(|| format!("board '{name}'")),
        None => Ok(profile(name)?.board),
    }
}

/// A board, and why it was chosen.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The board.
    pub board: Board,
    /// Why it was chosen: the option that named it, or how the host was recognised.
    pub why: String,
}

/// Returns the board called `name`; for [`AUTO`] the one that matches the host's `identity`, or
/// else `fallback`.
///
/// # Errors
/// As [`profile`].
pub fn choose(
    name: &str,
    fallback: &'static str,
    identity: impl FnOnce() -> Identity,
) -> Result<Chosen> {
    if name != AUTO {
        let why = "--board".to_owned();
        let board = find(name)?;
        return Ok(Chosen { board, why });
    }
    let (name, why) = recognize(&identity()).unwrap_or_else(|| {
        (
            fallback,
            "this host is no other board that is built in".into(),
        )
    });
    let board = find(name)?;
    Ok(Chosen { board, why })
}

/// Finds the built-in board that matches a host of this program's architecture, and says why.
#[must_use]
pub fn recognize(host: &Identity) -> Option<(&'static str, String)> {
    let signatures = BUILT_IN.iter().map(|board| {
        let signature = board.signature.as_ref();
        signature.filter(|signature| signature.arch == HostArch::ARCHITECTURE)
    });
    let (index, why) = board::recognize(host, signatures)?;
    BUILT_IN.get(index).map(|board| (board.name, why))
}

#[cfg(test)]
mod tests {
    use super::*;
    use armlet_arch::midr::Midr;
    use armlet_system::status::status_of;

    #[test]
    fn every_built_in_board_is_what_its_file_says() {
        for board in BUILT_IN {
            let found = find(board.name).expect(board.name);
            assert_eq!(found.name, board.name);
            assert_eq!(found, profile(board.name).expect(board.name).board);
            assert_eq!(Ok(board.signature.clone()), Signature::read(board.text));
        }
    }

    /// The identities of known hosts, and the boards that they match.
    #[test]
    fn hosts_are_recognised_by_what_they_say() {
        let tree = |names: &str| Identity {
            compatible: names.split(' ').map(str::to_owned).collect(),
            ..Identity::default()
        };
        let firmware = |vendor: &str, core: u64| Identity {
            vendor: vendor.to_owned(),
            product: "a product".to_owned(),
            cores: vec![Midr::kind(core)],
            ..Identity::default()
        };
        let (n1, v1, v2, ampere) = (0x413f_d0c1, 0x411f_d401, 0x410f_d4f1, 0xc00f_ac30);
        for (host, expected) in [
            (
                tree("raspberrypi,3-model-b-plus brcm,bcm2837"),
                Some("rpi3"),
            ),
            (tree("raspberrypi,4-model-b brcm,bcm2711"), Some("rpi4")),
            (tree("raspberrypi,5-model-b brcm,bcm2712"), Some("rpi5")),
            (tree("raspberrypi,6-model-b brcm,bcm2713"), None),
            (tree("radxa,rock-5b rockchip,rk3588"), Some("rk3588")),
            (
                tree("nvidia,p3737-0000+p3701-0000 nvidia,tegra234"),
                Some("orin"),
            ),
            (tree("fsl,imx8mp-evk fsl,imx8mp"), Some("imx8mp")),
            (
                tree("apple,j274 apple,t8103 apple,arm-platform"),
                Some("m1-asahi"),
            ),
            (tree("linux,dummy-virt"), Some("qemu-virt")),
            (firmware("QEMU", n1), Some("qemu-virt")),
            (firmware("Amazon EC2", n1), Some("graviton2")),
            (firmware("Amazon EC2", v1), Some("graviton3")),
            (firmware("Amazon EC2", v2), Some("graviton4")),
            (firmware("Some maker", n1), Some("altra")),
            (firmware("Some maker", v2), Some("grace")),
            (firmware("Some maker", ampere), Some("ampereone")),
            (firmware("Some maker", 0x480f_d010), None),
            (Identity::default(), None),
        ] {
            let found =
                board::recognize(&host, BUILT_IN.iter().map(|board| board.signature.as_ref()));
            let name = found.as_ref().map(|(index, _)| BUILT_IN[*index].name);
            assert_eq!(name, expected, "{host:?}: {found:?}");
        }
    }

    #[test]
    fn a_host_that_is_not_recognised_gets_the_generic_board() {
        let chosen = choose(AUTO, FALLBACK, Identity::default).expect("a board");
        assert_eq!(chosen.board.name, "virt");
        let named =
            choose("rpi5", FALLBACK, || panic!("the host does not matter")).expect("a board");
        assert_eq!(named.board.name, "rpi5");
    }

    #[test]
    fn an_unknown_board_is_refused_with_the_known_ones() {
        let error = find("rpi6").expect_err("unknown");
        assert!(format!("{error:#}").contains("virt"), "{error:#}");
        assert_eq!(status_of(&error), Status::Usage);
    }

    #[test]
    fn a_path_may_be_given() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/boards/virt.toml");
        assert_eq!(find(path).expect("the file").name, "virt");
        assert!(find("/nonexistent/x.toml").is_err());
        assert!(find("/").is_err());
    }

    #[test]
    fn a_file_inherits_from_one_beside_it_and_from_built_in_ones() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).expect("a file");
            path.to_string_lossy().into_owned()
        };
        write(
            "base.toml",
            "name = \"base\"\ninherits = \"virt\"\n[guest]\ncpus = 3\nmemory = \"1G\"\n",
        );
        let path = write(
            "mine.toml",
            "name = \"mine\"\ninherits = \"base.toml\"\n[guest]\nmemory = \"2G\" # more\n",
        );
        let profile = profile(&path).expect("valid");
        assert_eq!(profile.board.name, "mine");
        assert_eq!(profile.board.guest.cpus, 3);
        assert_eq!(profile.board.guest.memory, 2 << 30);
        assert_eq!(profile.board.devices, find("virt").expect("virt").devices);
        let shown = profile.show();
        for (value, from) in [
            ("memory = \"2G\"", "# mine:4  more"),
            ("cpus = 3", "base.toml:4"),
            ("[[device]]", ""),
            ("kind = \"pl031\"", "# virt:"),
            ("gic = \"auto\"", "# default"),
        ] {
            let line = shown.lines().find(|line| line.starts_with(value));
            assert!(
                line.is_some_and(|line| line.contains(from)),
                "{value} {from}: {shown}"
            );
        }
        // The output is itself a valid board file, for the same board.
        let again = write("again.toml", &shown);
        assert_eq!(find(&again).expect("valid").guest, profile.board.guest);
    }

    #[test]
    fn inheritance_that_leads_nowhere_is_refused_with_its_line() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("loop.toml");
        let path = path.to_string_lossy();
        for (parent, word) in [
            ("loop.toml", "inherit from itself"),
            ("none.toml", "none.toml"),
            ("pi9", "built in: virt"),
        ] {
            let text = format!("name = \"x\"\ninherits = \"{parent}\"\n");
            std::fs::write(&*path, text).expect("a file");
            let error = format!("{:#}", find(&path).expect_err(parent));
            assert!(error.contains("line 2") && error.contains(word), "{error}");
        }
    }
}
