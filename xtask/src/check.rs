//! `cargo xtask test`: everything that must hold before a change is kept.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use argh::FromArgs;

use crate::clients;
use crate::host::{HostSpec, Machine, X86_CPU};
use crate::isa::{self, Isa};
use crate::packages::{self, Kernel, Store};
use crate::progress::say;
use crate::toolchain::Toolchain;

/// Check formatting, lints and documents, and run every test, guests on real KVM included.
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "test")]
pub(crate) struct Test {
    /// run the rig for guests of this architecture: aarch64 (the default) or x86_64
    #[argh(option, default = "String::from(\"aarch64\")")]
    arch: String,

    /// run only these steps, separated by commas: fmt, clippy, doc, unit, bindings, clients, rig
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

    /// run what takes some minutes: all steps, and of the rig the tests that were chosen for it, on
    /// a host with a GICv3, on one with a GICv2 and 16 KiB pages, and on x86_64
    #[argh(switch)]
    quick: bool,

    /// boot a whole Debian system too, on the first host (made by `cargo xtask image` when needed)
    #[argh(switch)]
    system: bool,

    /// run only those tests of the rig whose names contain one of these
    #[argh(positional)]
    filter: Vec<String>,
}

const STEPS: [&str; 7] = ["fmt", "clippy", "doc", "unit", "bindings", "clients", "rig"];

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
const ELSEWHERE: [&str; 26] = [
    "attack::",
    "boards::",
    "console::every_byte",
    "disk::a_guest_reads",
    "disk::disks_work_on_after_reboots",
    "features::",
    "firecracker::",
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
    "reboots::",
    "refusals::the_largest",
    "refusals::vcpus_beyond",
    "rig::",
    "sharing::a_guest_gives",
    "sharing::every_byte",
    "sharing::the_host_gives",
    "width::",
];

/// What `--quick` runs, and on which hosts. On the first one: what armlet promises, each promise
/// once, by the tests that take the least time for it.
const QUICK: [(&str, &[&str]); 3] = [
    (
        "max-gic3",
        &[
            "attack::",
            "boards::",
            "console::a_guest",
            "console::an_input",
            "console::input",
            "console::output",
            "cuts::",
            "disk::a_disk_works",
            "disk::a_guest_reads",
            "disk::a_locked",
            "disk::a_read_only",
            "disk::disks_are",
            "disk::disks_work",
            "disk::fio",
            "kernels::a_kernel",
            "life::",
            "linux::debian_boots",
            "linux::dmesg",
            "linux::the_kernel",
            "linux::two_vcpus",
            "machine::",
            "messages::",
            "metadata::",
            "net::a_guest_talks_over_tap",
            "net::a_network",
            "net::passt",
            "reboots::",
            "refusals::",
            "rig::",
            "sharing::a_folder",
            "sharing::a_share_whose",
            "sharing::every_byte",
            "sharing::persistent",
            "sharing::the_host_gives",
            "unplugged::",
            "width::the",
        ],
    ),
    // What hangs on the interrupt controller, whose CPU interface is trapped here at each access,
    // and on the host's pages: interrupts of each device, MMIO of vCPUs, memory's blocks, and the
    // registers that the guest reads from a page.
    (
        "a76-gic2-16k",
        &[
            "attack::",
            "boards::",
            "console::every_byte",
            "disk::a_guest_reads",
            "disk::disks_work_on_after_reboots",
            "firecracker::",
            "life::a_reset",
            "life::linux_reboots",
            "linux::a_kernel_with_16_kib",
            "linux::debian_boots",
            "linux::dmesg",
            "linux::eight_vcpus",
            "machine::",
            "memory::",
            "reboots::",
            "refusals::vcpus_beyond",
            "rig::",
            "sharing::a_guest_gives",
            "sharing::every_byte",
            "width::the",
        ],
    ),
    // Small guests show the machine, one Linux that a distribution's kernel likes it.
    (
        "epyc",
        &[
            "linux::debians_6_1_boots_from_a_bzimage",
            "linux::sigterm",
            "linux::virtio_devices",
            "reboots::",
            "refusals::",
            "small::",
        ],
    ),
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
        let rigs = self.rigs()?;
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
                "bindings" => match Store::open().and_then(|store| store.bindings()) {
                    Ok(bindings) => {
                        let arguments = ["test", "--package", "armlet", "--test", "devicetree"];
                        let mut test = cargo(&arguments);
                        test.env("ARMLET_DT_VALIDATE", &bindings.validate);
                        test.env("ARMLET_DT_SCHEMA", &bindings.schema);
                        outcomes.push(one("bindings", &mut test)?);
                    }
                    Err(error) => say(&format!("==== bindings: skipped: {error:#}")),
                },
                "clients" => match clients::lack() {
                    None => outcomes.extend(driven()?),
                    Some(lack) => say(&format!("==== clients: skipped: {lack}")),
                },
                _ => {
                    for (isa, hosts) in &rigs {
                        outcomes.extend(self.rig(*isa, hosts)?);
                    }
                }
            }
        }
        Ok(summary(&outcomes))
    }

    /// Returns the hosts on which guests are tested, by the architecture that tests are built for.
    fn rigs(&self) -> Result<Vec<(Isa, Vec<NamedHost>)>> {
        let architectures = match self.quick {
            false => vec![Isa::from_name(&self.arch)?],
            true if std::env::consts::ARCH == Isa::X86.name() => vec![Isa::Arm64, Isa::X86],
            true => vec![Isa::Arm64],
        };
        let mut hosts = Vec::new();
        for isa in &architectures {
            hosts.extend_from_slice(all_hosts(*isa));
        }
        hosts.retain(|host| !self.quick || QUICK.iter().any(|(name, _)| *name == host.0));
        let names = hosts.iter().map(|host| host.0).collect::<Vec<_>>();
        let names = chosen(self.host.as_deref(), &names)?;
        hosts.retain(|host| names.contains(&host.0));
        let of = |isa: &Isa| {
            let ours = hosts.iter().filter(|host| host.3.isa() == *isa);
            (*isa, ours.copied().collect::<Vec<_>>())
        };
        let rigs = architectures.iter().map(of);
        Ok(rigs.filter(|(_, hosts)| !hosts.is_empty()).collect())
    }

    /// Parts of the names of the tests to run on the host `name`; all tests where there are none.
    fn filters(&self, name: &str, first: &str) -> Vec<&str> {
        if !self.filter.is_empty() {
            return self.filter.iter().map(String::as_str).collect();
        }
        let quick = QUICK.iter().find(|(host, _)| self.quick && *host == name);
        match quick {
            Some((_, filters)) => filters.to_vec(),
            None if name != first && !self.thorough => ELSEWHERE.to_vec(),
            None => Vec::new(),
        }
    }

    /// Builds the tests that need KVM and runs them on each of `hosts`.
    fn rig(&self, isa: Isa, hosts: &[NamedHost]) -> Result<Vec<Outcome>> {
        let first = all_hosts(isa)[0].0;
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
            if self.filter.is_empty() {
                // Who asks for some tests is told of each.
                command.arg("--quiet");
            }
            command.arg("--").args(self.filters(name, first));
            let emulated = spec.is_some();
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
            if emulated && name == first && packages::can_make_systems() {
                // Passt and its like, for the tests that run on the first host only.
                command.env("ARMLET_RIG_TOOLS", "1");
                if self.system {
                    command.env("ARMLET_RIG_SYSTEM", "1");
                }
            }
            let name = if emulated { name } else { "this machine" };
            Ok((format!("rig: {name}"), command))
        };
        if isa.is_native() {
            let (name, mut command) = test(first, None)?;
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

/// Has Firecracker's clients drive guests, where the package indexes that have them can be reached.
fn driven() -> Result<Option<Outcome>> {
    say("==== clients");
    let started = Instant::now();
    match clients::drive(&[]) {
        Ok(status) => Ok(Some(ended("clients", status == 0, started))),
        Err(error) if error.is::<clients::Unreachable>() => {
            say(&format!("==== clients: skipped: {error:#}"));
            Ok(None)
        }
        Err(error) => {
            say(&format!("{error:#}"));
            Ok(Some(ended("clients", false, started)))
        }
    }
}

/// Returns the hosts of the matrix for guests of this architecture.
fn all_hosts(isa: Isa) -> &'static [NamedHost] {
    match isa {
        Isa::Arm64 => &ARM64_HOSTS,
        Isa::X86 => &X86_HOSTS,
    }
}

/// Returns the entries of `all` that a list separated by commas names, in the order of `all`.
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
    let mut cargo = crate::repository::cargo();
    cargo.args(arguments);
    cargo
}

/// Returns the command that builds and runs the tests of guests, with this program as cargo's
/// runner.
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

    /// Returns the test program's modules and its tests, as `module::test`, from its sources.
    fn tests_of(program: &str) -> Vec<String> {
        let folder = crate::repository::repository().join("tests");
        let root = std::fs::read_to_string(folder.join(format!("{program}.rs"))).unwrap();
        let paths = root
            .lines()
            .filter_map(|line| line.strip_prefix("#[path = \"")?.strip_suffix("\"]"));
        let mut tests = Vec::new();
        for path in paths {
            let module = path.rsplit('/').next().unwrap().trim_end_matches(".rs");
            let text = std::fs::read_to_string(folder.join(path)).unwrap();
            for test in text.split("#[test]").skip(1) {
                let name = test.split("fn ").nth(1).unwrap();
                let name = name.split('(').next().unwrap();
                tests.push(format!("{module}::{name}"));
            }
        }
        tests
    }

    #[test]
    fn every_filter_means_a_test() {
        let quick = QUICK.iter().flat_map(|(host, filters)| {
            let program = if *host == "epyc" { "pc" } else { "boot" };
            filters.iter().map(move |filter| (program, *filter))
        });
        let elsewhere = ELSEWHERE.iter().map(|filter| ("boot", *filter));
        for (program, filter) in quick.chain(elsewhere) {
            let tests = tests_of(program);
            assert!(
                tests.iter().any(|test| test.contains(filter)),
                "{filter:?} is no test of {program}"
            );
        }
    }

    #[test]
    fn quick_runs_on_hosts_of_both_architectures() {
        let test = |quick| Test {
            arch: "aarch64".to_owned(),
            only: None,
            host: None,
            jobs: 1,
            thorough: false,
            quick,
            system: false,
            filter: Vec::new(),
        };
        let names = |rigs: Vec<(Isa, Vec<NamedHost>)>| {
            let hosts = rigs.into_iter().flat_map(|(_, hosts)| hosts);
            hosts.map(|host| host.0).collect::<Vec<_>>()
        };
        let quick = names(test(true).rigs().unwrap());
        assert_eq!(quick[..2], ["max-gic3", "a76-gic2-16k"]);
        let x86 = std::env::consts::ARCH == Isa::X86.name();
        assert_eq!(quick.get(2).copied(), x86.then_some("epyc"));
        assert_eq!(names(test(false).rigs().unwrap()).len(), ARM64_HOSTS.len());
        assert!(
            test(true)
                .filters("max-gic3", "max-gic3")
                .contains(&"rig::")
        );
        assert!(test(false).filters("max-gic3", "max-gic3").is_empty());
        assert_eq!(test(false).filters("n1-gic3", "max-gic3"), ELSEWHERE);
    }

    #[test]
    fn lists_choose_steps_in_their_own_order() {
        assert_eq!(chosen(None, &STEPS).unwrap(), STEPS);
        assert_eq!(chosen(Some("rig,fmt"), &STEPS).unwrap(), ["fmt", "rig"]);
        let error = chosen(Some("fnt"), &STEPS).unwrap_err().to_string();
        assert!(error.contains("fmt, clippy"), "{error}");
    }
}
