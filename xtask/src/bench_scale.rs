//! `cargo xtask bench scale`: what many vCPUs, many disks and many guests cost, beside any other
//! VMM.
//!
//! All VMMs run in one emulated ARM64 host with one CPU that counts instructions. The measuring
//! itself is [`crate::measure_scale`].

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use anyhow::{Context, Result, bail};
use argh::FromArgs;
use serde_json::{Value, json};

use crate::assets::{self, Choice};
use crate::bench_io::{measure, measuring, text};
use crate::boot;
use crate::host::{HostFile, HostSpec};
use crate::isa::Isa;
use crate::packages::Store;
use crate::progress::say;
use crate::vmms::Vmm;

/// MiB of the host: 20 guests touch some 80 MiB each.
const HOST_MIB: u32 = 6144;

/// Measure what many vCPUs, disks and guests cost.
///
/// Everything runs in an emulated ARM64 host that counts instructions: a virtual nanosecond is one
/// instruction. Of many vCPUs the guest starts one (maxcpus=1). Other VMMs run in the same host, and each row has armlet's figure, theirs, and the
/// ratio. A VMM is a static ARM64 program with its arguments: {kernel}, {initrd}, {cmdline} (which
/// names no console) and {cpus} stand for the guest's; what holds {disk} is repeated for each disk.
///
/// cargo xtask bench scale --only cpus --vmm "lkvm=/tmp/lkvm run -k {kernel} -i {initrd} -c {cpus}
/// -m 256 -d {disk} -p 'console=ttyS0 {cmdline}'"
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "scale")]
pub(crate) struct BenchScale {
    /// print every figure as JSON
    #[argh(switch)]
    json: bool,

    /// measure only this, separated by commas: cpus, disks, guests
    #[argh(option)]
    only: Option<String>,

    /// measure only these rows, separated by commas, as "128 vCPUs,20 guests"
    #[argh(option)]
    rows: Option<String>,

    /// measure this VMM too: "NAME=PROGRAM ARGUMENTS"; may be repeated
    #[argh(option)]
    vmm: Vec<String>,
}

/// A machine that is measured: what it belongs to, vCPUs, disks, and guests at a time (0: one is
/// started, and ends).
struct Case {
    group: &'static str,
    cpus: u32,
    disks: u32,
    guests: u32,
}

impl Case {
    fn row(&self) -> String {
        match (self.guests, self.disks) {
            (0, 0) => format!("{} vCPUs", self.cpus),
            (0, disks) => format!("{disks} disks"),
            (guests, _) => format!("{guests} guests"),
        }
    }
}

const GROUPS: [&str; 3] = ["cpus", "disks", "guests"];

const fn case(group: &'static str, cpus: u32, disks: u32, guests: u32) -> Case {
    Case {
        group,
        cpus,
        disks,
        guests,
    }
}

const CASES: [Case; 11] = [
    case("cpus", 1, 0, 0),
    case("cpus", 16, 0, 0),
    case("cpus", 64, 0, 0),
    case("cpus", 96, 0, 0),
    case("cpus", 128, 0, 0),
    case("disks", 1, 1, 0),
    case("disks", 1, 8, 0),
    case("disks", 1, 24, 0),
    case("guests", 1, 0, 1),
    case("guests", 1, 0, 10),
    case("guests", 1, 0, 20),
];

/// Of many vCPUs the guest starts one. The host has one CPU, on which the others would wait for each
/// other: QEMU traps no WFE, by which KVM notices those that do.
const ONE_STARTED: &str = "maxcpus=1";

/// The figures of a row: key and what it is.
const FIGURES: [(&str, &str, &str); 9] = [
    ("entry_ms", "exec to first KVM_RUN", "ms"),
    ("marker_ms", "exec to the guest's init", "ms"),
    ("threads", "threads", ""),
    ("stacks_kib", "kernel stacks", "KiB"),
    ("user_k", "the VMM's instructions to there", "k"),
    (PER_CPU, "of these for a vCPU more", "k"),
    ("memory_kib", "memory beside RAM, each", "KiB"),
    ("slab_kib", "kernel slab, each", "KiB"),
    ("idle_us", "CPU of an idle one, each second", "us"),
];

/// The figure that comes of two rows: thousands of instructions for a vCPU more.
const PER_CPU: &str = "user_k_per_cpu";

impl BenchScale {
    /// Measures and prints a table, or JSON.
    pub(crate) fn run(&self) -> Result<i32> {
        let cases = self.cases()?;
        let others = Vmm::parse_all(&self.vmm, &["armlet"])?;
        let store = Store::open()?;
        let folder = assets::prepare(&store, Isa::Arm64, Choice::Standard)?;
        let mut vmms = vec![Vmm {
            name: "armlet".to_owned(),
            file: boot::build(Isa::Arm64, "armlet", true)?,
            arguments: [
                "run", "--kernel", "{kernel}", "--initrd", "{initrd}", "--memory", "256M",
            ]
            .into_iter()
            .chain(["--cmdline", "console=ttyAMA0 {cmdline}", "--cpus={cpus}"])
            .chain(["--disk=path={disk}"])
            .map(str::to_owned)
            .collect(),
        }];
        vmms.extend(others);
        let measurer = boot::build(Isa::Arm64, "xtask", true)?;
        let image = fs::canonicalize(folder.join("Image")).context("no kernel for the guest")?;
        let mut files: Vec<HostFile> = vmms.iter().map(Vmm::host_file).collect();
        files.push(HostFile::program(&measurer, "/bin/xtask"));
        files.push(HostFile::program(&image, "/assets/Image"));
        files.push(HostFile::program(&folder.join("initrd"), "/assets/initrd"));
        let spec = HostSpec {
            smp: 1,
            memory_mib: HOST_MIB,
            icount: true,
            ..HostSpec::of(Isa::Arm64)
        };
        let mut lines = measure(&store, &spec, files, &script_of(&vmms, &cases), "row")?;
        add_vcpus(&mut lines);
        match self.json {
            true => println!("{:#}", json!({"lines": lines})),
            false => print!("{}", table(&lines)),
        }
        let failed = lines.iter().filter(|line| !line["error"].is_null());
        let mut status = 0;
        for line in failed {
            let (vmm, row, error) = (text(line, "vmm"), text(line, "row"), text(line, "error"));
            say(&format!("error: {vmm}: {row}: {}", error.trim_end()));
            status = 1;
        }
        Ok(status)
    }

    fn cases(&self) -> Result<Vec<Case>> {
        let mut cases: Vec<Case> = CASES.into();
        if let Some(only) = &self.only {
            let asked = only.split(',').collect::<Vec<_>>();
            if let Some(group) = asked.iter().find(|group| !GROUPS.contains(group)) {
                bail!("{group:?} is not one of {}", GROUPS.join(", "));
            }
            cases.retain(|case| asked.contains(&case.group));
        }
        if let Some(rows) = &self.rows {
            let asked = rows.split(',').map(str::trim).collect::<Vec<_>>();
            let known = cases.iter().map(Case::row).collect::<Vec<_>>();
            if let Some(row) = asked
                .iter()
                .find(|row| !known.iter().any(|known| known == *row))
            {
                bail!("{row:?} is not one of {}", known.join(", "));
            }
            cases.retain(|case| asked.contains(&&*case.row()));
        }
        Ok(cases)
    }
}

/// What the host runs: for each case one VMM after the other.
fn script_of(vmms: &[Vmm], cases: &[Case]) -> String {
    let mut script = String::new();
    for case in cases {
        let disks: Vec<String> = (0..case.disks)
            .map(|disk| format!("/tmp/disk{disk}"))
            .collect();
        for vmm in vmms {
            let (row, guests) = (case.row(), case.guests.to_string());
            let mut options = vec![
                ("--name", &*vmm.name),
                ("--row", &row),
                ("--guests", &guests),
            ];
            if case.group == "cpus" {
                options.push(("--cmdline", ONE_STARTED));
            }
            options.extend(disks.iter().map(|disk| ("--disk", &**disk)));
            let command = vmm.command(case.cpus, &disks);
            script += &measuring("measure-scale", &options, &command);
        }
    }
    script
}

/// Adds to rows on vCPUs what each takes, by the row of the same VMM with one.
fn add_vcpus(lines: &mut [Value]) {
    let vcpus =
        |line: &Value| -> Option<u32> { text(line, "row").strip_suffix(" vCPUs")?.parse().ok() };
    let user = |line: &Value| line["values"]["user_k"].as_f64();
    let ones = lines.iter().filter(|line| vcpus(line) == Some(1));
    let ones: BTreeMap<String, f64> = ones
        .filter_map(|line| Some((text(line, "vmm").to_owned(), user(line)?)))
        .collect();
    for line in lines {
        let one = ones.get(text(line, "vmm"));
        if let (Some(count @ 2..), Some(all), Some(one)) = (vcpus(line), user(line), one) {
            line["values"][PER_CPU] = json!((all - one) / f64::from(count - 1));
        }
    }
}

/// A line for each figure of each row: armlet's, and of each other VMM its own and how many times
/// armlet's that is.
fn table(lines: &[Value]) -> String {
    let mut vmms: Vec<&str> = Vec::new();
    let mut rows: Vec<&str> = Vec::new();
    let mut values: BTreeMap<(&str, &str), &Value> = BTreeMap::new();
    for line in lines {
        let (vmm, row) = (text(line, "vmm"), text(line, "row"));
        if !vmms.contains(&vmm) {
            vmms.push(vmm);
        }
        if !rows.contains(&row) {
            rows.push(row);
        }
        values.insert((row, vmm), &line["values"]);
    }
    let mut out = format!("{:46}", "");
    for (index, vmm) in vmms.iter().enumerate() {
        let width = if index == 0 { 10 } else { 18 };
        let _ = write!(out, "{vmm:>width$}");
    }
    out.push('\n');
    for row in rows {
        for (key, what, unit) in FIGURES {
            let of = |vmm| values.get(&(row, vmm)).and_then(|line| line[key].as_f64());
            if vmms.iter().all(|vmm| of(vmm).is_none()) {
                continue;
            }
            let label = format!("{row}: {what}");
            let _ = write!(out, "{label:46}");
            let ours = vmms.first().and_then(|vmm| of(vmm));
            for (index, vmm) in vmms.iter().enumerate() {
                let figure = match of(vmm) {
                    Some(figure) => format!("{figure:.1}"),
                    None => "-".to_owned(),
                };
                let ratio = of(vmm).zip(ours).filter(|(_, ours)| *ours > 0.0);
                match (index, ratio) {
                    (0, _) => {
                        let _ = write!(out, "{figure:>10}");
                    }
                    (_, Some((theirs, ours))) => {
                        let _ = write!(out, "{figure:>10} {:>5.2} x", theirs / ours);
                    }
                    (_, None) => {
                        let _ = write!(out, "{figure:>10}        ");
                    }
                }
            }
            let _ = writeln!(out, " {unit}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_the_ratio_to_each_vmm() {
        let line = |vmm, row, ms: f64| json!({"vmm": vmm, "row": row, "values": {"entry_ms": ms}});
        let failed = json!({"vmm": "b", "row": "2 disks", "error": "no"});
        let lines = [
            line("armlet", "1 disks", 2.0),
            line("b", "1 disks", 5.0),
            line("armlet", "2 disks", 4.0),
            failed,
        ];
        let table = table(&lines);
        let rows: Vec<Vec<&str>> = table
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(rows[0], ["armlet", "b"]);
        assert_eq!(rows[1][6..], ["2.0", "5.0", "2.50", "x", "ms"]);
        assert_eq!(rows[2][6..], ["4.0", "-", "ms"]);
        assert_eq!(rows.len(), 3);
    }

    #[test]
    fn a_vcpu_costs_what_a_row_has_more_than_the_one_with_one() {
        let line =
            |vmm, row, user: f64| json!({"vmm": vmm, "row": row, "values": {"user_k": user}});
        let mut lines = [
            line("a", "1 vCPUs", 100.0),
            line("a", "16 vCPUs", 250.0),
            line("b", "16 vCPUs", 250.0),
            line("a", "24 disks", 250.0),
        ];
        add_vcpus(&mut lines);
        let added = lines.map(|line| line["values"][PER_CPU].as_f64());
        assert_eq!(added, [None, Some(10.0), None, None]);
    }

    #[test]
    fn rows_are_chosen_by_name() {
        let rows = |words: &[&str]| -> Result<Vec<String>> {
            let bench = BenchScale::from_args(&["bench scale"], words);
            let cases = bench
                .map_err(|exit| anyhow::anyhow!(exit.output))?
                .cases()?;
            Ok(cases.iter().map(Case::row).collect())
        };
        let chosen = rows(&["--rows", "20 guests, 96 vCPUs"]).expect("there are such rows");
        assert_eq!(chosen, ["96 vCPUs", "20 guests"]);
        let error = rows(&["--only", "disks", "--rows", "96 vCPUs"]).expect_err("no disks");
        assert!(
            error.to_string().contains("is not one of 1 disks"),
            "{error}"
        );
    }

    #[test]
    fn each_case_is_run_by_each_vmm() {
        let vmms = ["a=/a {cpus} {disk}", "b=/b"].map(|text| Vmm::parse(text).expect("one"));
        let script = script_of(&vmms, &CASES);
        assert_eq!(script.lines().count(), 2 * CASES.len());
        assert!(script.contains("'/bin/vmm-a' '128'"));
        let started = script.lines().filter(|line| line.contains("'maxcpus=1'"));
        assert_eq!(started.count(), 2 * 5);
    }
}
