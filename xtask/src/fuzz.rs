//! `cargo xtask fuzz`: feeds the fuzz targets in `fuzz/`, with the toolchain that is there.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use argh::FromArgs;

use crate::packages::Store;
use crate::progress::say;

/// The version of cargo-fuzz that is installed.
const CARGO_FUZZ: &str = "0.13.2";
/// The longest input in bytes: some hundred steps of a guest. Kernels and boards are longer.
const LONGEST: u32 = 1024;
const LONGEST_FILE: u32 = 4096;
/// Seconds that one input may take.
const PATIENCE: u32 = 60;
/// Lines of the fuzzer that are shown: not each input that it keeps.
const SHOWN: [&str; 6] = ["panicked", "ERROR", "SUMMARY", "Test unit", "DONE", "pulse"];

/// Fuzz what reads bytes of guests and of other processes, beginning with the inputs in fuzz/corpus.
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "fuzz")]
pub(crate) struct Fuzz {
    /// seconds for each target (default 600); with 0 only what is kept is tried
    #[argh(option, default = "600")]
    seconds: u32,

    /// put into fuzz/corpus what reaches most with fewest inputs, in place of what is there
    #[argh(switch)]
    minimise: bool,

    /// the targets; all of them when none is named
    #[argh(positional)]
    targets: Vec<String>,
}

/// What came of a target.
struct Outcome {
    target: String,
    executions: u64,
    /// Edges of the control flow that were reached.
    edges: u64,
    time: Duration,
    /// The input that a target fell over.
    crash: Option<String>,
    passed: bool,
}

impl Fuzz {
    /// Feeds the targets one after another; 0 when none fell.
    pub(crate) fn run(&self) -> Result<i32> {
        let folder = crate::repository::repository().join("fuzz");
        let all = targets(&folder)?;
        for target in &self.targets {
            ensure!(
                all.contains(target),
                "there is no fuzz target {target:?}; there are {}",
                all.join(", ")
            );
        }
        let chosen = if self.targets.is_empty() {
            &all
        } else {
            &self.targets
        };
        let tool = cargo_fuzz(&Store::open()?)?;
        let mut outcomes = Vec::new();
        for target in chosen {
            say(&format!("==== {target}, {} s", self.seconds));
            let outcome = self.feed(&tool, &folder, target)?;
            if outcome.passed && self.minimise {
                minimise(&tool, &folder, target)?;
            }
            outcomes.push(outcome);
        }
        Ok(summary(&outcomes))
    }

    fn feed(&self, tool: &Path, folder: &Path, target: &str) -> Result<Outcome> {
        let found = found(folder, target)?;
        let mut command = run(tool, target);
        command.arg(&found).arg(kept(folder, target)?).arg("--");
        match self.seconds {
            0 => command.arg("-runs=0"),
            seconds => command.arg(format!("-max_total_time={seconds}")),
        };
        command.arg(format!("-max_len={}", longest(target)));
        command.arg(format!("-timeout={PATIENCE}"));
        command.args(["-len_control=0", "-print_final_stats=1"]);
        let started = Instant::now();
        let mut outcome = Outcome {
            target: target.to_owned(),
            executions: 0,
            edges: 0,
            time: Duration::ZERO,
            crash: None,
            passed: false,
        };
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot run cargo fuzz")?;
        let output = child.stderr.take().context("it has no standard error")?;
        // What is kept of the rest, for those who look for the reason.
        let mut last = std::collections::VecDeque::new();
        for line in BufReader::new(output).split(b'\n') {
            let line = line.context("cannot read what the fuzzer says")?;
            let line = String::from_utf8_lossy(&line).into_owned();
            outcome.note(&line);
            if SHOWN.iter().any(|word| line.contains(word)) {
                say(&line);
            }
            last.push_back(line);
            if last.len() > 40 {
                last.pop_front();
            }
        }
        outcome.passed = child.wait().context("cannot wait for it")?.success();
        if outcome.time.is_zero() {
            // It did not come to its end; this has the time for building it in it.
            outcome.time = started.elapsed();
        }
        if !outcome.passed {
            for line in &last {
                say(line);
            }
        }
        Ok(outcome)
    }
}

impl Outcome {
    /// Takes the figures out of a line of libFuzzer.
    fn note(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        while let Some(word) = words.next() {
            let number = |next: Option<&str>| next.and_then(|word| word.parse().ok());
            match word {
                "cov:" => self.edges = number(words.next()).unwrap_or(self.edges),
                "stat::number_of_executed_units:" => {
                    self.executions = number(words.next()).unwrap_or(self.executions);
                }
                _ => {}
            }
        }
        if let Some((_, rest)) = line.split_once(" runs in ") {
            let seconds = rest.split(' ').next().and_then(|word| word.parse().ok());
            self.time = seconds.map_or(self.time, Duration::from_secs);
        }
        if let Some((_, path)) = line.split_once("Test unit written to ") {
            self.crash = Some(path.trim().to_owned());
        }
    }
}

/// Returns the names of all targets, in order.
fn targets(folder: &Path) -> Result<Vec<String>> {
    let folder = folder.join("fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {folder:?}"))? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default();
        names.push(name.to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Returns the folder with the inputs that are kept in the repository.
fn kept(folder: &Path, target: &str) -> Result<PathBuf> {
    made(folder.join("corpus").join(target))
}

/// Returns the folder with all inputs that were found here.
fn found(folder: &Path, target: &str) -> Result<PathBuf> {
    made(folder.join("target/found").join(target))
}

fn made(folder: PathBuf) -> Result<PathBuf> {
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {folder:?}"))?;
    Ok(folder)
}

fn longest(target: &str) -> u32 {
    match target {
        "kernel" | "board" => LONGEST_FILE,
        _ => LONGEST,
    }
}

/// Returns the command that builds a target with coverage and address sanitizer, and runs it.
fn run(tool: &Path, target: &str) -> Command {
    let mut command = Command::new(tool);
    command.current_dir(crate::repository::repository());
    // Both are options of nightly compilers, which a stable one has as well.
    command.env("RUSTC_BOOTSTRAP", "1");
    // Errors are no news here, and where they arise is costly to tell.
    command.env("RUST_LIB_BACKTRACE", "0");
    command.args(["fuzz", "run", "--sanitizer", sanitizer(), target]);
    command
}

/// Returns the sanitizer whose runtime this compiler brings: rustup's has it, a distribution's may
/// not.
fn sanitizer() -> &'static str {
    let asked = Command::new("rustc").args(["--print", "sysroot"]).output();
    let sysroot = asked.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let folder = Path::new(&sysroot.unwrap_or_default()).join("lib/rustlib");
    let runtimes = fs::read_dir(folder.join(host).join("lib"));
    let has = runtimes.is_ok_and(|all| {
        let mut names = all.flatten().map(|entry| entry.file_name());
        names.any(|name| name.to_string_lossy().ends_with("_rt.asan.a"))
    });
    if has { "address" } else { "none" }
}

/// cargo-fuzz, installed into the cache folder where it is not there.
fn cargo_fuzz(store: &Store) -> Result<PathBuf> {
    let compiler = Command::new("c++").arg("--version").output();
    if !compiler.is_ok_and(|output| output.status.success()) {
        bail!("libFuzzer is built by a C++ compiler, and c++ is missing; apt-get install g++");
    }
    let folder = store.assets().join(format!("cargo-fuzz-{CARGO_FUZZ}"));
    let tool = folder.join("bin/cargo-fuzz");
    let _lock = store.lock_for("cargo-fuzz", "installs cargo-fuzz")?;
    if tool.is_file() {
        return Ok(tool);
    }
    say(&format!(
        "installing cargo-fuzz {CARGO_FUZZ} from crates.io into {folder:?}; it takes some minutes"
    ));
    let mut install = crate::repository::cargo();
    install.args(["install", "cargo-fuzz", "--locked", "--quiet"]);
    install
        .args(["--version", CARGO_FUZZ, "--root"])
        .arg(&folder);
    let status = install.status().context("cannot run cargo install")?;
    ensure!(status.success(), "cargo install cargo-fuzz failed");
    Ok(tool)
}

/// Keeps, of the inputs that were found and those that are kept, few that reach as much.
fn minimise(tool: &Path, folder: &Path, target: &str) -> Result<()> {
    let (kept, found) = (kept(folder, target)?, found(folder, target)?);
    let fresh = folder.join("target/minimised");
    // Of an earlier try that was broken off.
    let _ = fs::remove_dir_all(&fresh);
    let fresh = made(fresh)?;
    let mut command = run(tool, target);
    command.arg(&fresh).args([&kept, &found]).arg("--");
    // Not how often something is reached, but whether it is.
    command.args(["-set_cover_merge=1", "-use_counters=0"]);
    command.arg(format!("-max_len={}", longest(target)));
    command.stdin(Stdio::null()).stderr(Stdio::null());
    let status = command.status().context("cannot run cargo fuzz")?;
    ensure!(
        status.success(),
        "the corpus of {target} cannot be minimised"
    );
    fs::remove_dir_all(&kept).with_context(|| format!("cannot remove {kept:?}"))?;
    fs::rename(&fresh, &kept).with_context(|| format!("cannot rename {fresh:?}"))?;
    let count = fs::read_dir(&kept).with_context(|| format!("cannot list {kept:?}"))?;
    say(&format!("{} inputs are kept in {kept:?}", count.count()));
    Ok(())
}

/// Prints a table of what came of each target, and gives the exit status.
fn summary(outcomes: &[Outcome]) -> i32 {
    println!();
    println!("target         executions    edges   minutes");
    for outcome in outcomes {
        let came = match (&outcome.crash, outcome.passed) {
            (Some(path), _) => format!("  FELL over {path}"),
            (None, false) => "  FAILED".to_owned(),
            (None, true) => String::new(),
        };
        println!(
            "{:12} {:12} {:8} {:9.1}{came}",
            outcome.target,
            outcome.executions,
            outcome.edges,
            outcome.time.as_secs_f32() / 60.0
        );
    }
    i32::from(outcomes.iter().any(|outcome| !outcome.passed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome() -> Outcome {
        Outcome {
            target: "rng".to_owned(),
            executions: 0,
            edges: 0,
            time: Duration::ZERO,
            crash: None,
            passed: true,
        }
    }

    #[test]
    fn figures_are_taken_from_what_the_fuzzer_says() {
        let mut outcome = outcome();
        outcome.note("#3\tNEW    cov: 1584 ft: 7444 corp: 412/101Kb lim: 1024 exec/s: 177");
        outcome.note("stat::number_of_executed_units: 8125");
        assert_eq!((outcome.edges, outcome.executions), (1584, 8125));
        outcome.note("Done 8125 runs in 61 second(s)");
        assert_eq!(outcome.time, Duration::from_secs(61));
        assert_eq!(outcome.crash, None);
        let path = "fuzz/artifacts/rng/crash-00";
        outcome.note(&format!(
            "artifact_prefix='fuzz/artifacts/rng/'; Test unit written to {path}"
        ));
        assert_eq!(outcome.crash.as_deref(), Some(path));
    }

    #[test]
    fn each_target_is_a_program_of_the_package() {
        let folder = crate::repository::repository().join("fuzz");
        let manifest = fs::read_to_string(folder.join("Cargo.toml")).expect("a manifest");
        let targets = targets(&folder).expect("targets");
        assert!(!targets.is_empty());
        for target in targets {
            assert!(
                manifest.contains(&format!("name = \"{target}\"")),
                "{target}"
            );
        }
    }
}
