//! `cargo xtask order`: which code runs in every guest, for the linker to put together.
//!
//! Linux maps a program's pages 16 at a time where one is touched, so what is strewn over the file
//! is all in memory. A release is traced through the life of a guest, and the sections of code that
//! ran are named in `packaging/order.ld`, in the order in which they first ran.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use argh::FromArgs;

use crate::assets::{self, Choice};
use crate::bench::ARMLET;
use crate::host::{Ended, HostFile, HostSpec, Job, TRACED};
use crate::isa::Isa;
use crate::measure::{self, Pass};
use crate::packages::Store;
use crate::progress::say;
use crate::rig;
use crate::{boot, runner};

/// What is written, below the workspace's folder.
const FILE: &str = "packaging/order.ld";

/// How often armlet is traced at most. Of functions that are the same the linker keeps one
/// (`build.rs`), and with another order another one, which has another name: so each pass adds those
/// that the passes before did not see.
const MOST_PASSES: usize = 12;

/// How long the guest may take.
const LIMIT: Duration = Duration::from_secs(600);

/// Find out what code of armlet runs in every guest, for releases to have it in one place
/// (packaging/order.ld).
///
/// A guest boots in an emulated host, which writes down each piece of code that it comes by. Takes
/// some minutes. Run it after large changes; what the file does not name, or names in vain, costs
/// memory and nothing else ('cargo xtask bench --only peak' shows it).
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "order")]
pub(crate) struct Order {}

impl Order {
    /// Traces armlet and writes the file.
    pub(crate) fn run(&self) -> Result<i32> {
        let isa = Isa::Arm64;
        ensure!(
            isa.toolchain()?.is_active(),
            "releases are laid out with rustup's compiler, which is not the one in use"
        );
        let store = Store::open()?;
        let assets = assets::prepare(&store, isa, Choice::Standard)?;
        let target = crate::repository::target_folder()?;
        let (map, log) = (target.join("order.map"), target.join("order.log"));
        let flags = [
            format!("-Clink-arg=-Map={}", map.display()),
            format!("-Clink-arg=--image-base={:#x}", TRACED.start),
        ];
        let read = |path: &Path| {
            std::fs::read_to_string(path).with_context(|| format!("cannot read {path:?}"))
        };
        let path = crate::repository::repository().join(FILE);
        let mut patterns: Vec<String> = Vec::new();
        for _ in 0..MOST_PASSES {
            let armlet = boot::build_with(isa, "armlet", true, &flags)?;
            trace(&store, &assets, &armlet, &log)?;
            let sections = sections(&read(&map)?);
            ensure!(
                !sections.is_empty(),
                "the linker's map {map:?} names no code"
            );
            let ran = ran(&sections, addresses(&read(&log)?));
            ensure!(!ran.is_empty(), "no code of armlet's is in {log:?}");
            let bytes: u64 = ran.iter().map(|section| section.size).sum();
            say(&format!(
                "{} of {} sections of code ran, {} of {} KiB",
                ran.len(),
                sections.len(),
                bytes >> 10,
                sections.values().map(|section| section.size).sum::<u64>() >> 10,
            ));
            let known = patterns.len();
            for pattern in ran.iter().filter_map(|section| pattern(section)) {
                if !patterns.contains(&pattern) {
                    patterns.push(pattern);
                }
            }
            if patterns.len() == known {
                break;
            }
            std::fs::write(&path, script(&patterns))
                .with_context(|| format!("cannot write {path:?}"))?;
            say(&format!("written: {}", path.display()));
        }
        Ok(0)
    }
}

/// Boots a guest, and lets it power off, where what runs is written to `log`.
fn trace(store: &Store, assets: &Path, armlet: &Path, log: &Path) -> Result<()> {
    let isa = Isa::Arm64;
    let in_host = PathBuf::from(assets::FOLDER_IN_HOST);
    let path = |name| in_host.join(name).to_string_lossy().into_owned();
    let (kernel, initrd) = (path(assets::kernel(isa)), path("initrd"));
    let fill = |word| measure::fill(word, &kernel, &initrd, Pass::Timing.cmdline());
    let program = "/bin/armlet".to_owned();
    let mut files = runner::asset_files(assets, isa, Choice::Standard);
    files.push(HostFile::program(armlet, &program));
    let mut command = vec![program];
    command.extend(ARMLET.map(fill));
    let job = Job {
        files,
        command,
        folder: "/root".into(),
        limit: Some(LIMIT),
        ..Job::default()
    };
    let spec = HostSpec {
        executed: Some(log.to_owned()),
        ..HostSpec::of(isa)
    };
    let mut said = Vec::new();
    let mut print = |bytes: &[u8]| {
        said.extend_from_slice(bytes);
        Ok(())
    };
    match rig::run(store, &spec, &job, None, &mut print)? {
        Ended::Exit(0) => Ok(()),
        ended => bail!(
            "the guest failed ({ended:?})\n{}",
            String::from_utf8_lossy(&said)
        ),
    }
}

/// A section of code that the linker put into the program.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Section {
    size: u64,
    /// The file that it comes from, with the archive around it: `libc.a(memcpy.lo)`.
    file: String,
    /// Such as `.text.memcpy`.
    name: String,
}

/// Returns the sections of code in a map of lld's, by address.
fn sections(map: &str) -> BTreeMap<u64, Section> {
    let section = |line: &str| {
        // VMA, LMA, size, alignment, and what it is: an input section has its file before it.
        let mut words = line.split_whitespace();
        let mut number = |radix| u64::from_str_radix(words.next()?, radix).ok();
        let (start, _, size, _) = (number(16)?, number(16)?, number(16)?, number(10)?);
        let (path, name) = words.next()?.strip_suffix(')')?.split_once(":(")?;
        let (file, name) = (path.rsplit('/').next()?.to_owned(), name.to_owned());
        (size > 0 && name.starts_with(".text")).then_some((start, Section { size, file, name }))
    };
    map.lines().filter_map(section).collect()
}

/// Returns the addresses of the instructions in a log of QEMU's (`-d in_asm`), in its order.
fn addresses(log: &str) -> impl Iterator<Item = u64> {
    log.lines().filter_map(|line| {
        let (address, _) = line.strip_prefix("0x")?.split_once(':')?;
        u64::from_str_radix(address, 16).ok()
    })
}

/// Returns the sections in which these addresses lie, each once.
fn ran(sections: &BTreeMap<u64, Section>, addresses: impl Iterator<Item = u64>) -> Vec<&Section> {
    let mut ran: Vec<&Section> = Vec::new();
    let mut known = BTreeSet::new();
    for address in addresses {
        let Some((start, section)) = sections.range(..=address).next_back() else {
            continue;
        };
        if address - start < section.size && known.insert(*start) {
            ran.push(section);
        }
    }
    ran
}

/// Returns the linker's script.
fn script(patterns: &[String]) -> String {
    let list = patterns.iter().map(String::as_str).chain(KINDS);
    let lines = |list: &mut dyn Iterator<Item = &str>| -> String {
        list.map(|one| format!("    {one}\n")).collect()
    };
    let (list, next) = (lines(&mut { list }), lines(&mut NEXT.into_iter()));
    format!(
        "/* Code that runs in every guest, in the order in which it first does: \
         written by `cargo xtask order`. */\n\
         SECTIONS\n{{\n  .text.first :\n  {{\n{list}    *({OUTLINED}*)\n  }}\n  \
         .text.next :\n  {{\n{next}  }}\n}}\nINSERT BEFORE .text;\n"
    )
}

/// Functions of a kind that are all the same: with each order, and each change of the source, the linker
/// keeps another one of them, which no run has seen, and each that lies elsewhere brings 16 pages into
/// memory. They are argh's closures, the methods of errors, backends and devices that nobody overrides,
/// and what vectors, slices and strings are compiled to for each type.
const KINDS: [&str; 12] = [
    "*(.text._RNvYNCNvX*_6armlet3cli*9from_args*call_once*)",
    "*(.text._RNvY*_4core5error5Error*)",
    "*(.text._RNvY*7backend7Backend*)",
    "*(.text._RNvY*_14armlet_device*6virtio*)",
    "*(.text._R*_5alloc7raw_vec*)",
    "*(.text._R*_5alloc3vec*with_capacity*)",
    "*(.text._R*_5alloc6string*5Write*)",
    "*(.text._R*_4core3cmp5impls*)",
    "*(.text._R*_4core5slice3cmp*)",
    "*(.text._R*_4core5slice5index*)",
    "*(.text._R*4iter8adapters6copied*)",
    "*(.text._R*_14armlet_devices4sync4lock*)",
];

/// As [`KINDS`], but so many that they lie behind what ran: how values are dropped, and methods of all
/// traits that nobody overrides.
const NEXT: [&str; 3] = [
    "*(.text._R*_4core3ptr13drop_in_place*)",
    "*(.text._RNvX*_4core3ops4drop4Drop4drop*)",
    "*(.text._RNvY*)",
];

/// What the compiler has found in several functions and made one. It numbers them anew each time.
const OUTLINED: &str = ".text.OUTLINED_FUNCTION_";

/// Returns how the linker knows a section whatever the versions of compiler and crates.
fn pattern(section: &Section) -> Option<String> {
    if section.name.starts_with(OUTLINED) {
        return None;
    }
    if section.name == ".text" {
        // Of a library of C's, whose files hold a function or two.
        let (archive, member) = section.file.strip_suffix(')')?.split_once('(')?;
        return Some(format!("*{archive}:{member}(.text)"));
    }
    let name = without_hashes(&section.name);
    Some(match copied(&name) {
        Some(name) => format!("*({name} {name}.*)"),
        None => format!("*({name})"),
    })
}

/// Returns the name of a function that was compiled several times, without the number that LLVM has
/// added to tell the copies apart. Any of them may be the one that the linker keeps (`build.rs`).
fn copied(name: &str) -> Option<&str> {
    let (name, number) = name.rsplit_once('.')?;
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then_some(name)
}

/// Returns a mangled name with `*` for each number that stands for a version of a crate: `Cs`,
/// digits in base 62, `_` (Rust RFC 2603, "crate-root"), and for one that LLVM added.
fn without_hashes(name: &str) -> String {
    let name = match name.split_once(".llvm.") {
        Some((name, _)) => format!("{name}.llvm.*"),
        None => name.to_owned(),
    };
    let mut parts = name.split("Cs");
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        kept.push_str("Cs");
        match part.split_once('_') {
            Some((hash, rest))
                if !hash.is_empty() && hash.bytes().all(|byte| byte.is_ascii_alphanumeric()) =>
            {
                kept.push_str("*_");
                kept.push_str(rest);
            }
            _ => kept.push_str(part),
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "\
             VMA              LMA     Size Align Out     In      Symbol
        100411d0         100411d0    8d3b8     8 .text
        100411d0         100411d0       1c     4         /lib/self-contained/crt1.o:(.text)
        100411d0         100411d0        0     1                 $x
        100411ec         100411ec      100     4         /deps/a.rcgu.o:(.text._RNvNtCsc8dZ_6armlet8commands7execute)
        100412ec         100412ec        8     4         /deps/a.rcgu.o:(.text.OUTLINED_FUNCTION_7)
        10041300         10041300       40    16         /lib/libc.a(memcpy.lo):(.text)
        10050000         10050000       40    16         /deps/a.rcgu.o:(.rodata.x)
";
    const LOG: &str = "\
----------------
IN: memcpy
0x10041304:  d503245f  bti      c

----------------
IN: 
0x100412f0:  d280001e  movz     x30, #0
0x100411ec:  d280001e  movz     x30, #0
0x100411f0:  d280001e  movz     x30, #0
0x10050000:  d280001e  movz     x30, #0
";

    #[test]
    fn what_ran_is_named_in_the_order_in_which_it_ran() {
        let sections = sections(MAP);
        assert_eq!(sections.len(), 4);
        let ran = ran(&sections, addresses(LOG));
        let patterns = ran.iter().filter_map(|section| pattern(section));
        let script = script(&patterns.collect::<Vec<_>>());
        let lines: Vec<&str> = script.lines().map(str::trim).collect();
        assert_eq!(
            lines[5..7],
            [
                "*libc.a:memcpy.lo(.text)",
                "*(.text._RNvNtCs*_6armlet8commands7execute)",
            ],
            "{script}"
        );
        let (kinds, rest) = lines[7..].split_at(KINDS.len());
        assert_eq!(kinds, KINDS, "{script}");
        assert_eq!(rest[0], "*(.text.OUTLINED_FUNCTION_*)");
        assert_eq!(rest[2..4], [".text.next :", "{"]);
        assert_eq!(rest[4..4 + NEXT.len()], NEXT);
    }

    #[test]
    fn whichever_copy_of_a_function_is_kept_is_named() {
        let pattern = |name: &str| {
            let (file, name) = ("a.o".to_owned(), name.to_owned());
            pattern(&Section {
                size: 4,
                file,
                name,
            })
        };
        let both = "*(.text._RNvCs*_4core4next .text._RNvCs*_4core4next.*)";
        assert_eq!(
            pattern(".text._RNvCs1_4core4next.2462").as_deref(),
            Some(both)
        );
        let one = "*(.text._RNvCs*_4core4next)";
        assert_eq!(pattern(".text._RNvCs1_4core4next").as_deref(), Some(one));
        let of_llvm = pattern(".text.start.llvm.1234");
        assert_eq!(of_llvm.as_deref(), Some("*(.text.start.llvm.*)"));
    }

    #[test]
    fn names_are_kept_but_for_what_changes_with_versions() {
        for (name, kept) in [
            ("memcpy", "memcpy"),
            (
                "_RNvXNtCs1_4core3fmtNtCsAbC9_6armlet5Width",
                "_RNvXNtCs*_4core3fmtNtCs*_6armlet5Width",
            ),
            ("_RNvMNtB2_10Csomething", "_RNvMNtB2_10Csomething"),
            ("Cs.x", "Cs.x"),
            ("start.llvm.1234", "start.llvm.*"),
        ] {
            assert_eq!(without_hashes(name), kept);
        }
    }
}
