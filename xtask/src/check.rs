//! `cargo xtask test`: everything that must hold before a change is kept.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use argh::FromArgs;

use crate::host::{HostSpec, Machine, X86_CPU};
use crate::isa::{self, Isa};
use crate::packages::{self, Kernel};
use crate::progress::say;
use crate::toolchain::Toolchain;

/// Check formatting, lints and documents, and run every test, guests on real KVM included.
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "test")]
pub(crate) struct Test {
    /// run the rig for guests of this architecture: aarch64 (the default) or x86_64
    #[argh(option, default = "String::from(\"aarch64\")")]
    arch: String,

    /// run only these steps, separated by commas: fmt, clippy, doc, unit, rig
    #[argh(option)]
    only: Option<String>,

    /// run the rig on these hosts only, separated by commas, such as a53-gic3
    #[argh(option)]
    host: Option<String>,

    /// how many emulated hosts run at once (default 1)
    #[argh(option, default = "1")]
    jobs: usize,

    /// run every test on every host of the rig, not only on the first
    #[argh(switch)]
    thorough: bool,

    /// boot a whole Debian system too, on the first host (made by `cargo xtask image` when needed)
    #[argh(switch)]
    system: bool,

    /// run only those tests of the rig whose names contain one of these
    #[argh(positional)]
    filter: Vec<String>,
}

const STEPS: [&str; 5] = ["fmt", "clippy", "doc", "unit", "rig"];

/// A host of the matrix: its name, CPU, GIC (of ARM64) and kernel.
type NamedHost = (&'static str, &'static str, u8, Kernel);

/// The IPA limits of these CPUs are 52, 48, 44 and 40 bits.
const ARM64_HOSTS: [NamedHost; 13] = [
    ("max-gic3", "max", 3, Kernel::V6_12),
    ("max-gic3-16k", "max", 3, Kernel::V6_12Pages16K),
    ("n1-gic3", "neoverse-n1", 3, Kernel::V6_12),
    ("a72-gic2", "cortex-a72", 2, Kernel::V6_12),
    ("a53-gic3", "cortex-a53", 3, Kernel::V6_12),
    ("max-gic3-6.1", "max", 3, Kernel::V6_1),
    ("max-gic3-7.3", "max", 3, Kernel::V7_3),
    ("max-gic2", "max", 2, Kernel::V6_12),
    ("a55-gic3", "cortex-a55", 3, Kernel::V6_12),
    ("a76-gic2-16k", "cortex-a76", 2, Kernel::V6_12Pages16K),
    ("n2-gic3", "neoverse-n2", 3, Kernel::V6_12),
    ("v1-gic3", "neoverse-v1", 3, Kernel::V6_12),
    (RASPBERRY_PI_4, "cortex-a72", 2, Kernel::V6_12),
];

/// The host that is QEMU's model of a board, and not its own machine.
const RASPBERRY_PI_4: &str = "rpi4";
const X86_HOSTS: [NamedHost; 1] = [("epyc", X86_CPU, 0, Kernel::V6_1X86)];

/// The tests that hosts after the first run, unless `--thorough` is given: those whose outcome
/// hangs on the host's CPU, pages, kernel or GIC.
const ELSEWHERE: [&str; 23] = [
    "boards::",
    "console::every_byte",
    "disk::a_guest_reads",
    "disk::disks_work_on_after_reboots",
    "features::",
    "kinds::",
    "life::a_reset_is_no_leak",
    "life::linux_reboots",
    "linux::a_kernel_with_16_kib",
    "linux::debian_boots",
    "linux::debians_7_3",
    "linux::dmesg",
    "linux::eight_vcpus",
    "linux::the_kernel_finds",
    "machine::",
    "memory::",
    "refusals::the_largest",
    "refusals::vcpus_beyond",
    "rig::",
    "sharing::a_guest_gives",
    "sharing::every_byte",
    "sharing::the_host_gives",
    "width::",
];

/// What came of a step.
struct Outcome {
    name: String,
    passed: bool,
    time: Duration,
}

impl Test {
    /// Runs the steps and gives the exit status: 0 when all of them passed.
    pub(crate) fn run(&self) -> Result<i32> {
        let steps = chosen(self.only.as_deref(), &STEPS)?;
        let isa = Isa::from_name(&self.arch)?;
        let all: &[NamedHost] = match isa {
            Isa::Arm64 => &ARM64_HOSTS,
            Isa::X86 => &X86_HOSTS,
        };
        let names = all.iter().map(|host| host.0).collect::<Vec<_>>();
        let names = chosen(self.host.as_deref(), &names)?;
        let hosts = all.iter().filter(|host| names.contains(&host.0));
        let hosts = hosts.copied().collect::<Vec<_>>();
        ensure!(self.jobs > 0, "--jobs is at least 1");

        let mut outcomes = Vec::new();
        for step in steps {
            match step {
                "fmt" => outcomes.push(one("fmt", &mut cargo(&["fmt", "--all", "--check"]))?),
                "clippy" => {
                    let arguments = [
                        "clippy",
                        "--workspace",
                        "--all-targets",
                        "--keep-going",
                        "--",
                        "-D",
                        "warnings",
                    ];
                    outcomes.push(one("clippy", &mut cargo(&arguments))?);
                }
                "doc" => {
                    let mut doc = cargo(&[
                        "doc",
                        "--workspace",
                        "--no-deps",
                        "--keep-going",
                        "--document-private-items",
                    ]);
                    outcomes.push(one("doc", doc.env("RUSTDOCFLAGS", "-D warnings"))?);
                }
                "unit" => outcomes.push(one(
                    "unit",
                    &mut cargo(&["test", "--workspace", "--no-fail-fast"]),
                )?),
                _ => outcomes.extend(self.rig(isa, &hosts, all[0].0)?),
            }
        }
        Ok(summary(&outcomes))
    }

    /// Builds the tests that need KVM and runs them on each of `hosts`, all of them on the host
    /// `first`.
    fn rig(&self, isa: Isa, hosts: &[NamedHost], first: &str) -> Result<Vec<Outcome>> {
        let toolchain = isa.toolchain()?;
        let mut build = rig_tests(isa, &toolchain)?;
        let built = one("rig: build", build.arg("--no-run"))?;
        if !built.passed {
            return Ok(vec![built]);
        }
        let mut outcomes = vec![built];
        let test = |name: &str, spec: Option<HostSpec>| -> Result<(String, Command)> {
            let mut command = rig_tests(isa, &toolchain)?;
            command.env(isa::VARIABLE, isa.name());
            if !self.filter.is_empty() {
                // Who asks for some tests is told of each.
                command.arg("--").args(&self.filter);
            } else {
                command.args(["--quiet", "--"]);
                if name != first && spec.is_some() && !self.thorough {
                    command.args(ELSEWHERE);
                }
            }
            if let Some(spec) = spec {
                let variables = [
                    ("ARMLET_RIG_CPU", spec.cpu),
                    ("ARMLET_RIG_GIC", spec.gic.to_string()),
                    ("ARMLET_RIG_KERNEL", spec.kernel.name().to_owned()),
                ];
                command.envs(variables);
                if spec.machine == Machine::RaspberryPi4 {
                    command.env("ARMLET_RIG_MACHINE", "raspi4b");
                }
            }
            if name == first && packages::can_make_systems() {
                // Passt and its like, for the tests that run on the first host only.
                command.env("ARMLET_RIG_TOOLS", "1");
                if self.system {
                    command.env("ARMLET_RIG_SYSTEM", "1");
                }
            }
            Ok((format!("rig: {name}"), command))
        };
        if isa.is_native() {
            let (name, mut command) = test("this machine", None)?;
            outcomes.push(one(&name, &mut command)?);
            return Ok(outcomes);
        }

        let mut commands = Vec::new();
        for &(name, cpu, gic, kernel) in hosts {
            let spec = HostSpec {
                machine: match name {
                    RASPBERRY_PI_4 => Machine::RaspberryPi4,
                    _ => Machine::Virt,
                },
                cpu: cpu.to_owned(),
                gic,
                kernel,
                ..HostSpec::of(isa)
            };
            commands.push(test(name, Some(spec))?);
        }
        if self.jobs == 1 {
            for (name, mut command) in commands {
                outcomes.push(one(&name, &mut command)?);
            }
        } else {
            outcomes.extend(several(commands, self.jobs)?);
        }
        Ok(outcomes)
    }
}

/// The entries of `all` that a list separated by commas names, in the order of `all`.
fn chosen<'a>(list: Option<&str>, all: &[&'a str]) -> Result<Vec<&'a str>> {
    let Some(list) = list else {
        return Ok(all.to_vec());
    };
    let asked = list.split(',').collect::<Vec<_>>();
    for name in &asked {
        ensure!(
            all.contains(name),
            "{name:?} is not one of {}",
            all.join(", ")
        );
    }
    Ok(all
        .iter()
        .copied()
        .filter(|name| asked.contains(name))
        .collect())
}

fn cargo(arguments: &[&str]) -> Command {
    let mut cargo = crate::cargo();
    cargo.args(arguments);
    cargo
}

/// The command that builds and runs the tests of guests, with this program as cargo's runner.
fn rig_tests(isa: Isa, toolchain: &Toolchain) -> Result<Command> {
    let tests = match isa {
        Isa::Arm64 => "boot",
        Isa::X86 => "pc",
    };
    let mut command = cargo(&["test", "--package", "armlet", "--test", tests]);
    command.args(["--profile", "rig"]);
    command
        .args(["--target", &toolchain.target])
        .args(&toolchain.args);
    command.envs(toolchain.env.iter().map(|(name, value)| (name, value)));
    // Cargo would build xtask once more, with the other compiler, to find its runner.
    let this = std::env::current_exe().context("cannot tell where xtask lies")?;
    let runner = format!(
        "CARGO_TARGET_{}_RUNNER",
        toolchain.target.replace('-', "_").to_uppercase()
    );
    command.env(runner, format!("{} runner", this.display()));
    Ok(command)
}

/// Runs one step with its output on the terminal.
fn one(name: &str, command: &mut Command) -> Result<Outcome> {
    say(&format!("==== {name}"));
    let started = Instant::now();
    let status = command.stdin(Stdio::null()).status();
    let status = status.with_context(|| format!("cannot run {command:?}"))?;
    Ok(ended(name, status.success(), started))
}

/// Runs commands, `jobs` at a time, and prints the output of each when it has ended.
fn several(commands: Vec<(String, Command)>, jobs: usize) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    let mut waiting = commands.into_iter();
    std::thread::scope(|scope| {
        let (sender, receiver) = std::sync::mpsc::channel();
        let mut running = 0;
        loop {
            while running < jobs {
                let Some((name, mut command)) = waiting.next() else {
                    break;
                };
                say(&format!("==== {name}"));
                let sender = sender.clone();
                running += 1;
                scope.spawn(move || {
                    let started = Instant::now();
                    let output = command.stdin(Stdio::null()).output();
                    // The receiver outlives the scope's threads.
                    let _ = sender.send((name, started, output));
                });
            }
            if running == 0 {
                return Ok(outcomes);
            }
            let (name, started, output) = receiver.recv().context("a host's thread is gone")?;
            running -= 1;
            let output = output.with_context(|| format!("cannot run {name}"))?;
            say(&format!("---- output of {name}"));
            let text = [output.stdout, output.stderr].concat();
            eprint!("{}", String::from_utf8_lossy(&text));
            outcomes.push(ended(&name, output.status.success(), started));
        }
    })
}

fn ended(name: &str, passed: bool, started: Instant) -> Outcome {
    let time = started.elapsed();
    let word = if passed { "passed" } else { "FAILED" };
    say(&format!(
        "==== {name} {word} after {:.1} s",
        time.as_secs_f32()
    ));
    Outcome {
        name: name.to_owned(),
        passed,
        time,
    }
}

/// Prints a table of what came of each step, and gives the exit status.
fn summary(outcomes: &[Outcome]) -> i32 {
    println!();
    for outcome in outcomes {
        let word = if outcome.passed { "passed" } else { "FAILED" };
        println!(
            "{:20} {word}  {:7.1} s",
            outcome.name,
            outcome.time.as_secs_f32()
        );
    }
    let failed = outcomes.iter().filter(|outcome| !outcome.passed).count();
    println!("{} of {} steps failed", failed, outcomes.len());
    i32::from(failed > 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn lists_choose_steps_in_their_own_order() {
        assert_eq!(chosen(None, &STEPS).unwrap(), STEPS);
        assert_eq!(chosen(Some("rig,fmt"), &STEPS).unwrap(), ["fmt", "rig"]);
        let error = chosen(Some("fnt"), &STEPS).unwrap_err().to_string();
        assert!(error.contains("fmt, clippy"), "{error}");
    }
}
