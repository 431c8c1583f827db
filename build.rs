//! Prepares the built-in boards, and tells the linker what a release does without.

use std::ffi::OsStr;
use std::path::Path;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let variable = |name| env::var(name).map_err(io::Error::other);
    let (root, out) = (variable("CARGO_MANIFEST_DIR")?, variable("OUT_DIR")?);
    boards(Path::new(&root), Path::new(&out))?;
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=RUSTC_LINKER");
    let musl = variable("CARGO_CFG_TARGET_ENV")? == "musl";
    // GNU ld does not leave out what the compiler's own objects refer to, and lays sections out by
    // its own script first.
    let lld = env::var("RUSTC_LINKER").is_ok_and(|linker| linker.ends_with("lld"));
    if musl && lld && variable("PROFILE")? == "release" {
        println!("cargo::rerun-if-changed=packaging/release.ld");
        println!("cargo::rustc-link-arg-bins=-T{root}/packaging/release.ld");
    }
    Ok(())
}

/// Makes of each board file two for the program: the board without the lines that are comments,
/// and what a host is recognised by. A parser reads files letter by letter, and this is done at each
/// start. Lines stay, if need be empty, for messages count them.
fn boards(root: &Path, out: &Path) -> io::Result<()> {
    println!("cargo::rerun-if-changed=boards");
    for entry in fs::read_dir(root.join("boards"))? {
        let path = entry?.path();
        let (Some(name), Some("toml")) =
            (path.file_name(), path.extension().and_then(OsStr::to_str))
        else {
            continue;
        };
        let text = fs::read_to_string(&path)?;
        let mut bare = String::new();
        let mut signature = String::new();
        let mut table = "";
        for line in text
            .lines()
            .map(|line| if line.starts_with('#') { "" } else { line })
        {
            if line.starts_with('[') {
                table = line;
            }
            bare += &format!("{line}\n");
            if table.starts_with("[match]") || table.is_empty() && line.starts_with("arch ") {
                signature += &format!("{line}\n");
            }
        }
        let file = out.join(name);
        fs::write(file.with_extension("match"), signature)?;
        fs::write(file, bare)?;
    }
    Ok(())
}
