//! The tables of `cargo xtask bench io`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::Value;

use crate::load::PERCENTILES;

/// What the issue asks for: memory of a VMM with one disk and one network card, KiB.
const MEMORY_KIB: f64 = 2560.0;

/// What one VMM took for one operation.
#[derive(Clone, Debug, Default, PartialEq)]
struct Row {
    /// Instructions of the VMM in user space.
    user: f64,
    /// Of those, on threads that are not vCPUs.
    user_workers: f64,
    /// Instructions of the host's kernel on behalf of the VMM's threads.
    kernel: f64,
    /// Instructions of the host's kernel on behalf of anybody.
    kernel_all: f64,
    guest: f64,
    user_exits: f64,
    exits: f64,
    nanos: f64,
    /// Nanoseconds of one operation, at each of [`PERCENTILES`].
    latencies: Option<[f64; PERCENTILES.len()]>,
}

impl Row {
    /// The mean over `lines`, each divided by its operations.
    fn of(lines: &[&Value]) -> Row {
        let mut row = Row::default();
        for line in lines {
            let per = |number: f64| {
                let operations = line["operations"].as_f64().unwrap_or(1.0).max(1.0);
                number / unit(text(line, "name")).0.recip() / operations / lines.len() as f64
            };
            let sum = |key: &str, all: bool| {
                let threads = line[key].as_object().into_iter().flatten();
                let counted = threads
                    .filter(|(name, _)| all || !name.contains("vcpu") && !name.starts_with("CPU"));
                counted.filter_map(|(_, count)| count.as_f64()).sum::<f64>()
            };
            let number = |key: &str| line[key].as_f64().unwrap_or(0.0);
            row.user += per(sum("user", true));
            row.user_workers += per(sum("user", false));
            row.kernel += per(sum("kernel", true));
            row.kernel_all += per(number("kernel_all"));
            row.guest += per(number("guest"));
            row.user_exits += per(number("user_exits"));
            row.exits += per(number("exits"));
            row.nanos += per(number("nanos"));
            let latencies = line["latencies"].as_array().into_iter().flatten();
            let latencies = latencies.filter_map(Value::as_f64).collect::<Vec<_>>();
            if let Ok(latencies) = <[f64; PERCENTILES.len()]>::try_from(latencies) {
                let sums = row.latencies.get_or_insert_default();
                for (sum, nanos) in sums.iter_mut().zip(latencies) {
                    *sum += nanos / lines.len() as f64;
                }
            }
        }
        row
    }

    /// What the host does for one operation: the VMM and the kernel on its threads.
    fn sum(&self) -> f64 {
        self.user + self.kernel
    }
}

/// How many of the guest's operations make one of the table, and what that is called.
fn unit(name: &str) -> (f64, &'static str) {
    match name {
        "send" | "receive" | "some-bytes" => (65536.0, "64 KiB"),
        "serial" | "virtio" => (1.0, "byte"),
        "request-response" => (1.0, "request and response"),
        _ => (1.0, "request"),
    }
}

/// The tables, and what of the goals is met.
pub(super) fn tables(lines: &[Value]) -> String {
    let mut out = String::new();
    let mut names: Vec<(&str, &str)> = Vec::new();
    for line in lines.iter().filter(|line| line["operations"].is_number()) {
        let key = (text(line, "work"), text(line, "name"));
        if !names.contains(&key) && !["memory", "crowd"].contains(&key.0) {
            names.push(key);
        }
    }
    let mut goals = Vec::new();
    let mut comparison = Vec::new();
    for (work, name) in names {
        let mut vmms: BTreeMap<usize, (&str, Vec<&Value>)> = BTreeMap::new();
        let of_row = lines
            .iter()
            .enumerate()
            .filter(|(_, line)| text(line, "work") == work && text(line, "name") == name);
        for (index, line) in of_row {
            let vmm = text(line, "vmm");
            let known = vmms.values_mut().find(|(known, _)| *known == vmm);
            match known {
                Some((_, lines)) => lines.push(line),
                None => drop(vmms.insert(index, (vmm, vec![line]))),
            }
        }
        let rows = vmms
            .into_values()
            .map(|(vmm, lines)| (vmm, Row::of(&lines)));
        let rows = rows.collect::<Vec<_>>();
        let _ = writeln!(
            out,
            "{work}: {name}, for each {}\n  {:<18}{:>10}{:>10}{:>10}{:>10}{:>10}{:>9}{:>9}{:>10}{:>9}{:>9}{:>9}{:>9}",
            unit(name).1,
            "",
            "VMM",
            "(workers)",
            "its kernel",
            "kernel",
            "guest",
            "to user",
            "exits",
            "us",
            "p50",
            "p99",
            "p99.9",
            "most"
        );
        for (vmm, row) in &rows {
            let _ = writeln!(
                out,
                "  {vmm:<18}{:>10.0}{:>10.0}{:>10.0}{:>10.0}{:>10.0}{:>9.3}{:>9.3}{:>10.2}{}",
                row.user,
                row.user_workers,
                row.kernel,
                row.kernel_all,
                row.guest,
                row.user_exits,
                row.exits,
                row.nanos / 1e3,
                latencies(row)
            );
        }
        out.push('\n');
        goals.extend(goal(work, name, &rows));
        comparison.extend(compare(name, &rows));
    }
    out += &compared(&comparison);
    let memory = lines
        .iter()
        .filter(|line| text(line, "name") == "memory" && text(line, "work") == "memory");
    for line in memory {
        let kib = line["vmm_rss_kib"].as_f64().unwrap_or(0.0);
        let threads = line["threads"].as_array().into_iter().flatten();
        let threads = threads.filter_map(Value::as_str).collect::<Vec<_>>();
        let vmm = text(line, "vmm");
        let _ = writeln!(
            out,
            "memory with one disk and one network card: {vmm} {kib:.0} KiB; threads: {}",
            threads.join(" ")
        );
        if vmm == "armlet" {
            goals.push((
                format!("memory at most {MEMORY_KIB} KiB: {kib:.0}"),
                kib <= MEMORY_KIB,
            ));
        }
    }
    out += &crowd(lines, &mut goals);
    if !goals.is_empty() {
        out.push_str("\nGoals:\n");
    }
    for (goal, met) in goals {
        let _ = writeln!(out, "  {} {goal}", if met { "met   " } else { "MISSED" });
    }
    out.push_str(
        "\nVMM: instructions in user space; its kernel: of the host's kernel on its threads; kernel: \
         of the host's kernel, whoever runs. us: virtual microseconds, one instruction a \
         nanosecond; p50, p99, p99.9, most: of one operation, as the guest sees it.\n",
    );
    out
}

/// How many times its median the longest request of a busy device among many may take.
const LONGEST: f64 = 10.0;

/// A line for each of many devices that were busy at once.
fn crowd(lines: &[Value], goals: &mut Vec<(String, bool)>) -> String {
    let mut out = String::new();
    let devices = lines.iter().filter(|line| text(line, "work") == "crowd");
    for line in devices.filter(|line| line["latencies"].is_array()) {
        let latencies = line["latencies"].as_array().into_iter().flatten();
        let latencies = latencies.filter_map(Value::as_f64).map(|nanos| nanos / 1e3);
        let latencies = latencies.collect::<Vec<_>>();
        let (Some(median), Some(most)) = (latencies.first(), latencies.last()) else {
            continue;
        };
        let (vmm, name) = (text(line, "vmm"), text(line, "name"));
        let figures = latencies.iter().map(|us| format!("{us:>10.0}"));
        let _ = writeln!(
            out,
            "many at once: {vmm}: {name:<8}{:>8} requests; us p50, p99, p99.9, most:{}",
            line["operations"],
            figures.collect::<String>()
        );
        let ratio = most / median.max(1e-9);
        goals.push((
            format!(
                "{vmm}: {name}: longest request {ratio:.1} times the median, at most {LONGEST}"
            ),
            ratio <= LONGEST,
        ));
    }
    out
}

fn latencies(row: &Row) -> String {
    let latencies = row.latencies.into_iter().flatten();
    latencies
        .map(|nanos| format!("{:>9.1}", nanos / 1e3))
        .collect()
}

/// What one of armlet's setups takes in one row, and how many times that each other VMM takes, in
/// the best of its setups.
struct Compared {
    row: String,
    sum: f64,
    exits: f64,
    others: Vec<(String, f64, f64)>,
}

/// A VMM's name is its setup's up to the comma.
fn compare(name: &str, rows: &[(&str, Row)]) -> Vec<Compared> {
    let vmm = |setup: &str| setup.split(',').next().unwrap_or_default().to_owned();
    let mut others: Vec<(String, f64, f64)> = Vec::new();
    for (setup, row) in rows.iter().filter(|(setup, _)| !is_ours(setup)) {
        match others.iter_mut().find(|(known, ..)| *known == vmm(setup)) {
            Some((_, sum, exits)) => {
                *sum = sum.min(row.sum());
                *exits = exits.min(row.exits);
            }
            None => others.push((vmm(setup), row.sum(), row.exits)),
        }
    }
    let ours = rows.iter().filter(|(setup, _)| is_ours(setup));
    ours.map(|(setup, row)| Compared {
        row: format!("{name}: {setup}"),
        sum: row.sum(),
        exits: row.exits,
        others: others.clone(),
    })
    .collect()
}

/// A line for each of armlet's setups in each row, with the ratio to each other VMM of the run.
fn compared(comparison: &[Compared]) -> String {
    if comparison.iter().all(|line| line.others.is_empty()) {
        return String::new();
    }
    let mut out =
        "Beside the others: instructions of the VMM and its kernel, and exits\n".to_owned();
    for line in comparison {
        let _ = write!(
            out,
            "  {:<42}{:>9.0} {:>7.3}",
            line.row, line.sum, line.exits
        );
        let is_first = line.others.iter().all(|(_, sum, _)| line.sum <= *sum);
        for (vmm, sum, exits) in &line.others {
            let ratio = sum / line.sum;
            let _ = write!(out, "   {vmm} {sum:.0} ({ratio:.2} x) {exits:.3}");
        }
        let _ = writeln!(out, "   {}", if is_first { "first" } else { "NOT FIRST" });
    }
    out.push('\n');
    out
}

fn is_ours(setup: &str) -> bool {
    setup.split(',').next() == Some("armlet")
}

/// What is asked of armlet in this row.
fn goal(work: &str, name: &str, rows: &[(&str, Row)]) -> Vec<(String, bool)> {
    let ours = rows.iter().filter(|(vmm, _)| is_ours(vmm));
    let mut goals = Vec::new();
    if work == "disk" && name.starts_with("4k") {
        let least = |ours: bool| {
            let users = rows.iter().filter(|(vmm, _)| is_ours(vmm) == ours);
            users.map(|(_, row)| row.user).reduce(f64::min)
        };
        if let (Some(armlet), Some(peer)) = (least(true), least(false)) {
            let goal = format!("{name}: VMM's instructions {armlet:.0}, best peer {peer:.0}");
            goals.push((goal, armlet <= peer));
        }
    }
    if work == "disk" || work == "net" {
        for (vmm, row) in ours {
            let goal = format!("{name}, {vmm}: exits to user space {:.3}", row.user_exits);
            // The console and the timer of a guest that sleeps leave a few.
            goals.push((goal, row.user_exits < 0.02));
        }
    }
    goals
}

pub(crate) fn text<'a>(line: &'a Value, key: &str) -> &'a str {
    line[key].as_str().unwrap_or("?")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn line(vmm: &str, name: &str, user: u64, exits: u64) -> Value {
        json!({
            "vmm": vmm, "work": "disk", "run": 1, "name": name, "operations": 100,
            "nanos": 1_000_000, "user": {"vcpu0": 1000, "disk0": user}, "kernel": {"disk0": 5000},
            "kernel_all": 9000, "guest": 70_000, "user_exits": exits, "exits": 300,
        })
    }

    #[test]
    fn figures_are_divided_by_operations() {
        let line = line("armlet", "4k-random-read-1", 200_000, 1);
        let row = Row::of(&[&line]);
        assert_eq!((row.user, row.user_workers), (2010.0, 2000.0));
        assert_eq!(
            (row.exits, row.user_exits, row.nanos),
            (3.0, 0.01, 10_000.0)
        );
    }

    #[test]
    fn goals_compare_with_the_best_peer() {
        let lines = [
            line("armlet, io_uring", "4k-random-read-1", 100_000, 0),
            line("QEMU, io_uring", "4k-random-read-1", 300_000, 0),
            line("QEMU, threads", "4k-random-read-1", 50_000, 90),
        ];
        let text = tables(&lines);
        assert!(
            text.contains("MISSED 4k-random-read-1: VMM's instructions 1010, best peer 510"),
            "{text}"
        );
        assert!(
            text.contains("met    4k-random-read-1, armlet, io_uring: exits"),
            "{text}"
        );
        let sums = text
            .lines()
            .filter(|line| line.ends_with("irst") || line.ends_with("FIRST"));
        let sums = sums.map(|line| line.split_whitespace().collect::<Vec<_>>());
        assert_eq!(
            sums.collect::<Vec<_>>(),
            [[
                "4k-random-read-1:",
                "armlet,",
                "io_uring",
                "1060",
                "3.000",
                "QEMU",
                "560",
                "(0.53",
                "x)",
                "3.000",
                "NOT",
                "FIRST"
            ]]
        );
    }

    #[test]
    fn a_device_among_many_waits_at_most_ten_times_its_median() {
        let line = |name: &str, most: u64| {
            json!({"vmm": "armlet", "work": "crowd", "name": name, "operations": 9,
                   "latencies": [1000, 2000, 3000, most]})
        };
        let text = tables(&[line("disk-a", 10_000), line("card-1", 10_001_000)]);
        assert!(
            text.contains("met    armlet: disk-a: longest request 10.0 times"),
            "{text}"
        );
        assert!(
            text.contains("MISSED armlet: card-1: longest request 10001.0"),
            "{text}"
        );
        assert!(!text.contains("for each"), "{text}");
    }
}
