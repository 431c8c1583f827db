//! Prepares the built-in boards, and tells the linker what a release does without.

use armlet_arch::board::{Profile, Signature};
use armlet_arch::midr::Midr;
use std::borrow::Cow;
use std::error::Error;
use std::ffi::OsStr;
use std::path::Path;
use std::{env, fs};

fn main() -> Result<(), Box<dyn Error>> {
    let (root, out) = (env::var("CARGO_MANIFEST_DIR")?, env::var("OUT_DIR")?);
    boards(Path::new(&root), Path::new(&out))?;
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=RUSTC_LINKER");
    let musl = env::var("CARGO_CFG_TARGET_ENV")? == "musl";
    // GNU ld does not leave out what the compiler's own objects refer to, and lays sections out by
    // its own script first.
    let lld = env::var("RUSTC_LINKER").is_ok_and(|linker| linker.ends_with("lld"));
    if musl && lld && env::var("PROFILE")? == "release" {
        // Functions that are the same are there once. None here is known by its address.
        println!("cargo::rustc-link-arg-bins=--icf=all");
        // What the first one names is not there for the second.
        for script in ["order.ld", "release.ld"] {
            println!("cargo::rerun-if-changed=packaging/{script}");
            println!("cargo::rustc-link-arg-bins=-T{root}/packaging/{script}");
        }
    }
    Ok(())
}

/// Makes of each board file what the program starts from: the board and what its hosts are recognised
/// by, as values, the one in postcard's format and the other as an expression. To read the files at
/// each start would take longer than all else does.
fn boards(root: &Path, out: &Path) -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=boards");
    let folder = root.join("boards");
    let text = |name: &str| fs::read_to_string(folder.join(name).with_extension("toml"));
    let parent = |_: &str, name: &str| {
        let text = text(name).map_err(|error| format!("leads nowhere: {error}"))?;
        Ok((name.to_owned(), text))
    };
    for entry in fs::read_dir(&folder)? {
        let path = entry?.path();
        let (Some(name), Some("toml")) = (
            path.file_stem().and_then(OsStr::to_str),
            path.extension().and_then(OsStr::to_str),
        ) else {
            continue;
        };
        let text = text(name)?;
        let refused = |error| format!("{}: {error}", path.display());
        let board = Profile::read(name, &text, &parent).map_err(refused)?.board;
        let signature = Signature::read(&text).map_err(refused)?;
        let file = out.join(name);
        fs::write(file.with_extension("board"), postcard::to_allocvec(&board)?)?;
        let signature = signature.map(|signature| expression(&signature));
        let signature = signature.map_or("None".into(), |value| format!("Some({value})"));
        fs::write(file.with_extension("match"), signature)?;
    }
    Ok(())
}

/// A value as Rust has it in its source: all boards' are looked at in each start, so that they need
/// not be read.
fn expression(signature: &Signature) -> String {
    let Signature {
        arch,
        compatible,
        vendors,
        products,
        cores,
    } = signature;
    let list = |items: Vec<String>| format!("Cow::Borrowed(&[{}])", items.join(", "));
    let names = |names: &[Cow<'_, str>]| {
        let names = names.iter().map(|name| format!("Cow::Borrowed({name:?})"));
        list(names.collect())
    };
    let kind = |core: &Midr| format!("Midr::kind({:#x})", core.register());
    format!(
        "Signature {{ arch: Architecture::{arch:?}, compatible: {}, vendors: {}, products: {}, cores: {} }}",
        names(compatible),
        names(vendors),
        names(products),
        list(cores.iter().map(kind).collect()),
    )
}
