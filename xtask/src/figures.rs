//! The figures of the bench: what they mean, what the peers reach, and what armlet should.

mod specs;

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use specs::{PEERS, Reach, SPECS, Spec};

/// Where the peers' figures come from.
pub(crate) const SOURCE: &str = "measured on this rig in November 2026: Linux 6.12 as host, 4 KiB \
    pages, -cpu max, GICv3, counting instructions; guest 1 CPU, 256 MiB, Debian's cloud kernel 6.12, \
    quiet cryptomgr.notests; kvmtool, alioth, Firecracker, libkrun, Cloud Hypervisor, QEMU 10.0.2";

/// What a reader might miss.
pub(crate) const NOT_MEASURED: [&str; 5] = [
    "Not measured: times on real hardware (QEMU models no caches), instructions of the VMM apart \
     from the host kernel's, more than one CPU, devices other than the console.",
    "The host's time for a byte of console is that between guest exits and entries, with the cost \
     of tracing taken off; the peers' was counted by perf for each exit.",
    "The peers' guest came to its init some 30 ms later than ours: alioth 0.12.0 with ours takes \
     489.0 ms to the init and 502.5 to the exit.",
    "The peers' reading is the difference of their first two rows: of kernel and initramfs, to judge \
     by alioth 0.12.0, which takes 2.7 ms here without both and 3.7 without the kernel alone, where \
     its row says 2.5.",
    "The binary is armlet's release build as it is, static and stripped.",
];

/// The figures of one VMM: for each name what every run gave.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    numbers: BTreeMap<String, Vec<f64>>,
    texts: BTreeMap<String, Vec<String>>,
    failures: Vec<String>,
}

impl Figures {
    /// Adds what a run gave.
    pub(crate) fn add(&mut self, name: &str, number: f64) {
        self.numbers
            .entry(name.to_owned())
            .or_default()
            .push(number);
    }

    /// Takes the lines that `measure` printed on `host`.
    pub(crate) fn take(&mut self, host: &str, lines: &[Value]) -> Result<()> {
        for line in lines {
            let Some(pass) = line["pass"].as_str() else {
                for (name, value) in line.as_object().into_iter().flatten() {
                    self.value(format!("{host}/{name}"), value);
                }
                continue;
            };
            if let Some(error) = line["error"].as_str() {
                self.failures
                    .push(format!("{host}: {pass}: {}", error.trim_end()));
                continue;
            }
            let values = line["values"].as_object().context("a run gave no values")?;
            for (name, value) in values {
                self.value(format!("{host}/{pass}/{name}"), value);
            }
        }
        Ok(())
    }

    fn value(&mut self, name: String, value: &Value) {
        match value {
            Value::String(text) => self.texts.entry(name).or_default().push(text.clone()),
            value => self.numbers.entry(name).or_default().extend(value.as_f64()),
        }
    }

    /// Adds those figures that follow from several others.
    pub(crate) fn derive(&mut self) {
        self.subtract(
            "entry_less_kernel_ms",
            "4k/timing/exec_to_entry_ms",
            "4k/reading/reading_kernel_ms",
        );
        self.subtract(
            "entry_less_reading_ms",
            "4k/timing/exec_to_entry_ms",
            "4k/reading/reading_ms",
        );

        let median = |name: &str| self.median(name);
        let mut derived = Vec::new();
        let bytes = median("4k/verbose/verbose_bytes")
            .zip(median("4k/timing/console_bytes"))
            .map(|(verbose, quiet)| verbose - quiet);
        if let Some(bytes) = bytes {
            let exits = median("4k/verbose/verbose_user_exits");
            let exits = exits.zip(median("4k/marker/user_exits"));
            derived.extend(
                exits.map(|(verbose, quiet)| ("exits_per_byte", (verbose - quiet) / bytes)),
            );
            let time = median("4k/verbose/verbose_marker_ms");
            let time = time.zip(median("4k/timing/exec_to_marker_ms"));
            let time = time.map(|(verbose, quiet)| (verbose - quiet) * 1e6 / bytes);
            derived.extend(time.map(|time| ("instructions_per_byte", time)));
            let host = self.host_millis("verbose", "4k/verbose/verbose_marker_ms");
            let host = host.zip(self.host_millis("quiet", "4k/timing/exec_to_marker_ms"));
            let host = host.map(|(verbose, quiet)| (verbose - quiet) * 1e6 / bytes);
            derived.extend(host.map(|host| ("host_instructions_per_byte", host)));
        }
        if let Some(kind) = median("4k/reading/vm_type") {
            // Type 0 means the 40 bits that KVM had before it could be asked.
            let bits = if kind == 0.0 { 40.0 } else { kind };
            derived.push(("ipa_bits", bits));
            for (name, page) in [("4k/stage2_levels", 4096), ("16k/stage2_levels", 16384)] {
                derived.push((name, f64::from(stage2_levels(bits as u32, page))));
            }
        }
        for (name, number) in derived {
            self.add(name, number);
        }
    }

    /// The difference of two figures, run by run.
    fn subtract(&mut self, name: &str, of: &str, less: &str) {
        let runs = |name| self.numbers.get(name).into_iter().flatten();
        let values = runs(of)
            .zip(runs(less))
            .map(|(of, less)| of - less)
            .collect::<Vec<_>>();
        if !values.is_empty() {
            self.numbers.insert(name.to_owned(), values);
        }
    }

    /// The time between exits and entries, without that of recording them. An event costs what it
    /// makes the boot longer; about one of an exit's two lies in the time that was summed up.
    fn host_millis(&self, boot: &str, untraced: &str) -> Option<f64> {
        let median = |name: &str| self.median(&format!("4k/host-{boot}/{name}"));
        let longer = median("traced_marker_ms")? - self.median(untraced)?;
        Some(median("host_ms")? - longer.max(0.0) / 2.0)
    }

    fn median(&self, name: &str) -> Option<f64> {
        let mut runs = self.numbers.get(name)?.clone();
        runs.sort_by(f64::total_cmp);
        runs.get(runs.len() / 2).copied()
    }

    /// The largest distance of a run from the median, in per cent of it.
    fn spread(&self, name: &str) -> Option<f64> {
        let median = self.median(name)?;
        let runs = self.numbers.get(name)?.iter();
        let most = runs.map(|run| (run - median).abs()).fold(0.0, f64::max);
        Some(if most == 0.0 {
            0.0
        } else {
            100.0 * most / median.abs()
        })
    }

    /// Every figure of every run.
    pub(crate) fn json(&self) -> Value {
        json!({"numbers": self.numbers, "texts": self.texts, "failures": self.failures})
    }

    /// The passes that could not be measured, and why.
    pub(crate) fn failures(&self) -> &[String] {
        &self.failures
    }

    /// What a figure is that is no number, such as the names of threads.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        Some(self.texts.get(name)?.first()?)
    }
}

/// The levels of stage-2 tables that KVM makes for an address width, as Linux computes them: the
/// top one may be sixteen tables side by side.
fn stage2_levels(bits: u32, page: u32) -> u32 {
    (bits - 4 - 4) / (page.trailing_zeros() - 3)
}

/// A row with our figure in it.
pub(crate) struct Row {
    spec: &'static Spec,
    median: f64,
    spread: f64,
}

/// The rows for which there is a figure.
pub(crate) fn rows(figures: &Figures) -> Vec<Row> {
    let row = |spec: &'static Spec| {
        Some(Row {
            spec,
            median: figures.median(spec.key)?,
            spread: figures.spread(spec.key)?,
        })
    };
    SPECS.iter().filter_map(row).collect()
}

impl Row {
    fn met(&self) -> Option<bool> {
        match self.spec.reach {
            Reach::Nothing => None,
            Reach::Below(limit) => Some(self.median < limit),
            Reach::AtMost(limit) => Some(self.median <= limit),
            Reach::AtLeast(limit) => Some(self.median >= limit),
        }
    }

    fn reach(&self) -> String {
        match self.spec.reach {
            Reach::Nothing => String::new(),
            Reach::Below(limit) => format!("< {}", figure(limit)),
            Reach::AtMost(limit) => format!("<= {}", figure(limit)),
            Reach::AtLeast(limit) => format!(">= {}", figure(limit)),
        }
    }

    /// The peer that takes least, and what it takes.
    fn best(&self) -> Option<(&'static str, f64)> {
        let peers = PEERS.into_iter().zip(self.spec.peers.iter().copied());
        let known = peers.filter(|(_, value)| !value.is_nan());
        known.min_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// The row for a program to read.
    pub(crate) fn json(&self) -> Value {
        let peers = PEERS.into_iter().zip(self.spec.peers);
        let peers = peers.filter(|(_, value)| !value.is_nan());
        json!({
            "name": self.spec.key,
            "label": self.spec.label.trim(),
            "unit": self.spec.unit,
            "median": self.median,
            "spread_percent": self.spread,
            "reach": self.reach(),
            "met": self.met(),
            "peers": peers.collect::<BTreeMap<_, _>>(),
        })
    }
}

/// Prints the table, with another VMM's figures in a column of its own, and the `peers` of ARM64.
pub(crate) fn print(rows: &[Row], other: Option<(&str, &Figures)>, peers: bool) {
    let theirs = |name: &str| match other {
        Some((_, figures)) => figures.median(name).map(figure).unwrap_or_default(),
        None => String::new(),
    };
    let other_name = other.map_or("", |(name, _)| name);
    let width = if other.is_some() { 12 } else { 0 };
    let heads = if peers {
        ["reach", "best peer"]
    } else {
        [""; 2]
    };
    let head = format!(
        "{:36} {:>10} {:4} {:>6} {other_name:>width$}  {:>9} {:4} {}",
        "", "armlet", "", "spread", heads[0], "", heads[1]
    );
    println!("{}", head.trim_end());
    for row in rows {
        let met = match row.met().filter(|_| peers) {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "",
        };
        let best = row
            .best()
            .filter(|_| peers)
            .map(|(name, value)| format!("{} {name}", figure(value)));
        let line = format!(
            "{:36} {:>10} {:4} {:>5.1}% {:>width$}  {:>9} {met:4} {}",
            row.spec.label,
            figure(row.median),
            row.spec.unit,
            row.spread,
            theirs(row.spec.key),
            if peers { row.reach() } else { String::new() },
            best.unwrap_or_default()
        );
        println!("{}", line.trim_end());
    }
    println!("\nA virtual ms is a million instructions.");
    if peers {
        println!("The peers: {SOURCE}.");
    }
}

/// A number with as many digits as it deserves.
fn figure(number: f64) -> String {
    if number.fract() == 0.0 {
        format!("{number:.0}")
    } else if number.abs() < 10.0 {
        format!("{number:.2}")
    } else {
        format!("{number:.1}")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn figures(pairs: &[(&str, &[f64])]) -> Figures {
        let mut figures = Figures::default();
        for (name, runs) in pairs {
            runs.iter().for_each(|run| figures.add(name, *run));
        }
        figures
    }

    #[test]
    fn a_row_has_the_median_and_the_limit() {
        let figures = figures(&[("4k/timing/exec_to_marker_ms", &[488.0, 519.0, 520.0])]);
        let rows = rows(&figures);
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].median, rows[0].met()), (519.0, Some(false)));
        assert!((rows[0].spread - 5.97).abs() < 0.01, "{}", rows[0].spread);
        assert_eq!(rows[0].best(), Some(("alioth", 519.4)));
    }

    #[test]
    fn lines_of_the_measurer_become_figures() {
        let lines = [
            json!({"page_size": 4096, "release": "6.12"}),
            json!({"pass": "timing", "run": 1, "values": {"exec_to_entry_ms": 23.0}}),
            json!({"pass": "timing", "run": 2, "values": {"exec_to_entry_ms": 23.5}}),
            json!({"pass": "reading", "run": 1, "values": {"reading_kernel_ms": 21.0}}),
            json!({"pass": "reading", "run": 2, "values": {"reading_kernel_ms": 22.0, "vm_type": 36}}),
        ];
        let mut figures = Figures::default();
        figures.take("4k", &lines).unwrap();
        figures.derive();
        assert_eq!(figures.numbers["entry_less_kernel_ms"], [2.0, 1.5]);
        assert_eq!(figures.numbers["4k/page_size"], [4096.0]);
        assert_eq!(figures.texts["4k/release"], ["6.12"]);
        assert_eq!(figures.median("ipa_bits"), Some(36.0));
    }

    #[test]
    fn stage_2_tables_are_as_deep_as_linux_makes_them() {
        for (bits, page, levels) in [
            (32, 4096, 2),
            (34, 4096, 2),
            (35, 4096, 3),
            (40, 4096, 3),
            (48, 4096, 4),
            (32, 16384, 2),
            (40, 16384, 2),
            (48, 16384, 3),
        ] {
            assert_eq!(stage2_levels(bits, page), levels, "{bits} bits, {page}");
        }
    }

    #[test]
    fn every_row_has_its_own_figure() {
        let mut keys = SPECS.iter().map(|spec| spec.key).collect::<Vec<_>>();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), SPECS.len());
        assert!(SPECS.iter().all(|spec| spec.peers.len() <= PEERS.len()));
    }
}
