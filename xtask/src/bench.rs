//! `cargo xtask bench`: what armlet costs, measured where two runs agree.
//!
//! The emulated host counts instructions: a virtual nanosecond is one instruction, so the figures
//! are the same on any machine, whatever else it does. They are no times of real hardware, for
//! QEMU models no caches. The measuring itself is [`crate::measure`], inside the host.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use argh::FromArgs;
use serde_json::{Value, json};

use crate::assets::{self, Choice};
use crate::boot;
use crate::elf;
use crate::figures::{self, Figures, Row};
use crate::host::{Ended, HostFile, HostSpec, Job};
use crate::isa::Isa;
use crate::measure::Pass;
use crate::packages::{Kernel, Store};
use crate::progress::say;
use crate::rig;
use crate::runner;

/// How armlet is started. The guest's memory is that with which the peers were measured.
pub(crate) const ARMLET: [&str; 10] = [
    "run",
    "--kernel",
    "{kernel}",
    "--initrd",
    "{initrd}",
    "--memory",
    "256M",
    "--cmdline",
    "console=ttyAMA0 {cmdline}",
    "--cpus=1",
];

/// How long all passes on one host may take.
const LIMIT: Duration = Duration::from_secs(1800);

/// Measure what armlet costs, beside what other VMMs cost on the same rig (`bench io`: its devices).
///
/// Everything runs in an emulated host that counts instructions, also on a machine that could run
/// it: a virtual nanosecond is one instruction. Takes three to six minutes. After `--` another VMM may
/// follow, a static ARM64 program with its arguments, to be measured in the same way: {kernel},
/// {initrd} and {cmdline} stand for the guest's, of which the last names no console.
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "bench")]
pub(crate) struct Bench {
    /// measure guests of this architecture: aarch64 (the default) or x86_64, for which no peers
    /// were measured
    #[argh(option, default = "String::from(\"aarch64\")")]
    arch: String,

    /// print every figure of every run as JSON
    #[argh(switch)]
    json: bool,

    /// how many VMs count in each pass (default 3)
    #[argh(option, default = "3")]
    runs: u32,

    /// measure only this, separated by commas: timing, marker, peak, reading, calls, verbose,
    /// host-quiet, host-verbose, idle, thp-always, thp-madvise, thp-never
    #[argh(option)]
    only: Option<String>,

    /// another VMM to measure too, after `--`
    #[argh(positional, greedy)]
    other: Vec<String>,
}

/// A host of the bench: its name, its kernel, and whether every pass is worth running there.
const HOSTS: [(&str, Kernel, bool); 2] = [
    ("4k", Kernel::V6_12, true),
    ("16k", Kernel::V6_12Pages16K, false),
];

/// The host of x86_64 guests; figures have the same names as on the first one above.
const X86_HOSTS: [(&str, Kernel, bool); 1] = [("4k", Kernel::V6_1X86, true)];

/// What shows how a host's page size matters.
const PAGE_PASSES: [&str; 5] = [
    "timing",
    "reading",
    "thp-always",
    "thp-madvise",
    "thp-never",
];

/// A VMM, as a file of this machine and arguments with places to fill in.
struct Vmm {
    name: String,
    file: PathBuf,
    arguments: Vec<String>,
}

impl Bench {
    /// Measures and prints a table, or JSON.
    pub(crate) fn run(&self) -> Result<i32> {
        ensure!(self.runs > 0, "--runs is at least 1");
        let isa = Isa::from_name(&self.arch)?;
        let passes = self.passes(isa)?;
        let hosts = match isa {
            Isa::Arm64 => HOSTS.to_vec(),
            Isa::X86 => X86_HOSTS.to_vec(),
        };
        let store = Store::open()?;
        let folder = assets::prepare(&store, isa, Choice::Standard)?;
        let armlet = boot::build(isa, "armlet", true)?;
        let measurer = boot::build(isa, "xtask", true)?;

        let mut vmms = vec![Vmm {
            name: "armlet".to_owned(),
            file: armlet,
            arguments: ARMLET
                .map(|word| word.replace("ttyAMA0", isa.console()))
                .to_vec(),
        }];
        let other = self.other.iter().skip_while(|word| *word == "--");
        let other = other.cloned().collect::<Vec<_>>();
        if let Some((program, arguments)) = other.split_first() {
            let file = PathBuf::from(program);
            let name = file.file_name().context("the other VMM names no file")?;
            let name = match name.to_string_lossy().into_owned() {
                same if same == vmms[0].name => "other".to_owned(),
                name => name,
            };
            vmms.push(Vmm {
                name,
                file,
                arguments: arguments.to_vec(),
            });
        }

        let mut measured = Vec::new();
        for vmm in &vmms {
            let mut figures = Figures::default();
            let size = binary(&vmm.file, &mut figures)?;
            for &(host, kernel, all) in &hosts {
                let here = passes
                    .iter()
                    .filter(|pass| all || PAGE_PASSES.contains(pass));
                let here = here.copied().collect::<Vec<_>>();
                if !here.is_empty() {
                    let lines = self.host(&store, &folder, &measurer, vmm, kernel, &here)?;
                    figures.take(host, &lines)?;
                }
            }
            figures.derive();
            measured.push((vmm, figures, size));
        }

        let other = measured
            .get(1)
            .map(|(vmm, figures, _)| (vmm.name.as_str(), figures));
        let (_, ours, sections) = &measured[0];
        let rows = figures::rows(ours);
        if self.json {
            let vmms = measured.iter().map(|(vmm, figures, sections)| {
                (
                    vmm.name.clone(),
                    json!({"figures": figures.json(), "sections": sections}),
                )
            });
            let mut rows = rows.iter().map(Row::json).collect::<Vec<_>>();
            if isa != Isa::Arm64 {
                // Peers, and what is asked beside them, are those of ARM64.
                for key in ["peers", "reach", "met"] {
                    for row in rows.iter_mut().filter_map(Value::as_object_mut) {
                        row.remove(key);
                    }
                }
            }
            let all = json!({
                "peers": (isa == Isa::Arm64).then_some(figures::SOURCE),
                "rows": rows,
                "vmms": vmms.collect::<BTreeMap<_, _>>(),
                "not_measured": figures::NOT_MEASURED,
            });
            println!("{all:#}");
        } else {
            figures::print(&rows, other, isa == Isa::Arm64);
            if let Some(names) = ours.text("4k/marker/thread_names") {
                println!("Threads: {names}.");
            }
            println!("Sections of the program, in bytes:{}.", list(sections));
            for line in figures::NOT_MEASURED {
                println!("{line}");
            }
        }
        let mut status = 0;
        for (vmm, figures, _) in &measured {
            for failure in figures.failures() {
                say(&format!("error: {}: {failure}", vmm.name));
                status = 1;
            }
        }
        Ok(status)
    }

    fn passes(&self, isa: Isa) -> Result<Vec<&'static str>> {
        let names = Pass::ALL.map(|pass| pass.0);
        let Some(only) = &self.only else {
            let mut all = names.to_vec();
            if isa == Isa::X86 {
                say(
                    "host-verbose takes half an hour on x86_64 and is left out; --only host-verbose runs it",
                );
                all.retain(|name| *name != "host-verbose");
            }
            return Ok(all);
        };
        let asked = only.split(',').collect::<Vec<_>>();
        if let Some(name) = asked.iter().find(|name| !names.contains(name)) {
            bail!("{name:?} is not one of {}", names.join(", "));
        }
        Ok(names
            .into_iter()
            .filter(|name| asked.contains(name))
            .collect())
    }

    /// Runs `passes` on one host and gives the lines of JSON that it printed.
    fn host(
        &self,
        store: &Store,
        folder: &Path,
        measurer: &Path,
        vmm: &Vmm,
        kernel: Kernel,
        passes: &[&str],
    ) -> Result<Vec<Value>> {
        let in_host = PathBuf::from(assets::FOLDER_IN_HOST);
        let program = Path::new("/bin").join(vmm.file.file_name().context("no file")?);
        let mut files = runner::asset_files(folder, kernel.isa(), Choice::Standard);
        files.push(HostFile::program(measurer, "/bin/xtask"));
        files.push(HostFile::program(&vmm.file, &program));

        let path = |name| in_host.join(name).to_string_lossy().into_owned();
        let mut command = vec!["/bin/xtask".to_owned(), "measure".to_owned()];
        for (option, value) in [
            ("--passes", passes.join(",")),
            ("--runs", self.runs.to_string()),
            ("--kernel", path(assets::kernel(kernel.isa()))),
            ("--initrd", path("initrd")),
        ] {
            command.extend([option.to_owned(), value]);
        }
        command.extend(["--".to_owned(), program.to_string_lossy().into_owned()]);
        command.extend_from_slice(&vmm.arguments);
        let job = Job {
            files,
            command,
            folder: "/root".into(),
            limit: Some(LIMIT),
            ..Job::default()
        };
        let spec = HostSpec {
            kernel,
            smp: 1,
            icount: true,
            ..HostSpec::of(kernel.isa())
        };

        let mut output = Vec::new();
        let mut lines = Vec::new();
        let mut said = String::new();
        let mut print = |bytes: &[u8]| {
            output.extend_from_slice(bytes);
            while let Some(end) = output.iter().position(|byte| *byte == b'\n') {
                let line = output.drain(..=end).collect::<Vec<_>>();
                match serde_json::from_slice::<Value>(&line) {
                    Ok(value) => {
                        if let (Some(pass), Some(run)) =
                            (value["pass"].as_str(), &value["run"].as_u64())
                        {
                            say(&format!("{}: {pass}, VM {run} of {}", vmm.name, self.runs));
                        }
                        lines.push(value);
                    }
                    Err(_) => said.push_str(&String::from_utf8_lossy(&line)),
                }
            }
            Ok(())
        };
        match rig::run(store, &spec, &job, None, &mut print)? {
            Ended::Exit(0) => Ok(lines),
            ended => bail!("measuring {} failed ({ended:?})\n{said}", vmm.name),
        }
    }
}

/// Notes the size of a program and gives its sections.
fn binary(path: &Path, figures: &mut Figures) -> Result<Value> {
    let file = std::fs::read(path).with_context(|| format!("cannot read {path:?}"))?;
    figures.add("binary_kib", file.len() as f64 / 1024.0);
    let sections = elf::sections(&file).with_context(|| format!("cannot read {path:?}"))?;
    let sections = sections
        .into_iter()
        .map(|section| json!([section.name, section.size]));
    Ok(Value::Array(sections.collect()))
}

/// Sections as a person reads them, without those that are next to nothing.
fn list(sections: &Value) -> String {
    let mut text = String::new();
    for section in sections.as_array().into_iter().flatten() {
        if let (Some(name), Some(size @ 256..)) = (section[0].as_str(), section[1].as_u64()) {
            text.push_str(&format!(" {name} {size}"));
        }
    }
    text
}
