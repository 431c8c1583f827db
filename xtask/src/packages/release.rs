//! Which release this machine runs, and where its packages come from.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::files::{output_of, run_silently};
use crate::progress::say;

/// The distributions whose archives we know our way in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Distribution {
    Debian,
    Ubuntu,
}

/// What the machine's os-release file says.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Release {
    pub(super) distribution: Distribution,
    pub(super) codename: String,
    /// Whether it has been released; only then has Debian backports for it.
    pub(super) stable: bool,
}

impl Release {
    pub(super) fn parse(os_release: &str) -> Result<Self> {
        let value = |key: &str| {
            let mut lines = os_release.lines().filter_map(|line| line.split_once('='));
            lines
                .find(|(found, _)| *found == key)
                .map(|(_, value)| value.trim_matches('"'))
        };
        let distribution = match value("ID") {
            Some("debian") => Distribution::Debian,
            Some("ubuntu") => Distribution::Ubuntu,
            other => bail!(
                "the rig takes its kernels from Debian's or Ubuntu's archive; this machine runs {}",
                other.unwrap_or("an unknown distribution")
            ),
        };
        let codename = value("VERSION_CODENAME").context("os-release has no VERSION_CODENAME")?;
        let stable = value("VERSION_ID").is_some();
        Ok(Self {
            distribution,
            codename: codename.to_owned(),
            stable,
        })
    }
}

/// Returns what apt knows of the machine's sources; from lists of our own when the machine has
/// none.
pub(super) fn machine_targets(folder: &Path) -> Result<String> {
    let format = "$(CREATED_BY)|$(REPO_URI)|$(RELEASE)|$(CODENAME)|$(COMPONENT)|$(ARCHITECTURE)|\
                  $(ORIGIN)|$(SOURCESENTRY)";
    let targets = output_of(Command::new("apt-get").args(["indextargets", "--format", format]))?;
    if !targets.trim().is_empty() {
        return Ok(targets);
    }
    let lists = folder.join("machine-lists");
    let partial = lists.join("partial");
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {partial:?}"))?;
    let option = format!("Dir::State::Lists={}", lists.display());
    say("this machine has no lists of packages yet: fetching them into the cache folder");
    run_silently(Command::new("apt-get").args(["update", "-q", "-o", &option]))?;
    output_of(Command::new("apt-get").args(["indextargets", "-o", &option, "--format", format]))
}

/// One archive as the machine's sources name it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Target<'a> {
    pub(super) uri: &'a str,
    pub(super) release: &'a str,
    pub(super) codename: &'a str,
    pub(super) component: &'a str,
    pub(super) architecture: &'a str,
    pub(super) origin: &'a str,
    pub(super) entry: &'a str,
}

pub(super) fn parse_target(line: &str) -> Option<Target<'_>> {
    let parts = line.split('|').collect::<Vec<_>>();
    let &[
        "Packages",
        uri,
        release,
        codename,
        component,
        architecture,
        origin,
        entry,
    ] = &parts[..]
    else {
        return None;
    };
    Some(Target {
        uri,
        release,
        codename,
        component,
        architecture,
        origin,
        entry,
    })
}

/// Returns the private sources, in apt's deb822 format, from what the machine's apt knows.
///
/// `signature` gives the `Signed-By` value of a sources entry, if it has one.
pub(super) fn sources(
    targets: &str,
    release: &Release,
    native: &str,
    signature: &dyn Fn(&str) -> Option<String>,
) -> Result<String> {
    let targets = targets.lines().filter_map(parse_target).collect::<Vec<_>>();
    let origin = match release.distribution {
        Distribution::Debian => "Debian",
        Distribution::Ubuntu => "Ubuntu",
    };
    let base = |suite: &str, architecture: &str| {
        let fits = |target: &&Target<'_>| {
            (target.release == suite || target.codename == suite)
                && target.component == "main"
                && target.architecture == architecture
        };
        let mut fitting = targets.iter().filter(fits);
        fitting
            .clone()
            .find(|target| target.origin == origin)
            .or_else(|| fitting.next())
    };
    let codename = &release.codename;
    let main = base(codename, native).with_context(|| {
        format!("this machine's apt has no source for {codename}, so the archive is unknown")
    })?;

    let stanza = |target: &Target<'_>, suites: &[String], architectures: &str| {
        let components = match release.distribution {
            Distribution::Debian => "main",
            Distribution::Ubuntu => "main universe",
        };
        let signed = signature(target.entry).map(|key| format!("Signed-By:{key}\n"));
        format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: {components}\nArchitectures: \
             {architectures}\n{}\n",
            target.uri,
            suites.join(" "),
            signed.unwrap_or_default()
        )
    };
    match release.distribution {
        Distribution::Debian => {
            let both = if native == "arm64" {
                "arm64".to_owned()
            } else {
                format!("{native} arm64")
            };
            let mut suites = vec![codename.clone()];
            if release.stable {
                suites.extend([format!("{codename}-updates"), backports_of(codename)]);
            }
            for guest in [
                GUEST_RELEASE.to_owned(),
                backports_of(GUEST_RELEASE),
                backports_of(NEWEST_RELEASE),
            ] {
                if !suites.contains(&guest) {
                    suites.push(guest);
                }
            }
            let mut text = stanza(main, &suites, &both);
            let security = format!("{codename}-security");
            if let Some(target) = base(&security, native) {
                text.push_str(&stanza(target, &[security], &both));
            }
            Ok(text)
        }
        Distribution::Ubuntu => {
            let suites = ["", "-updates", "-security"].map(|end| format!("{codename}{end}"));
            let mut text = stanza(main, &suites, native);
            // Where this is missing, asking for an arm64 package says what to add.
            if let Some(ports) = base(codename, "arm64").filter(|_| native != "arm64") {
                text.push_str(&stanza(ports, &suites, "arm64"));
            }
            Ok(text)
        }
    }
}

/// Returns the text of the file that an entry such as `/etc/apt/sources.list:3` lies in.
pub(super) fn read_source(entry: &str) -> String {
    let file = entry.rsplit_once(':').map_or(entry, |(file, _)| file);
    fs::read_to_string(file).unwrap_or_default()
}

/// Returns the `Signed-By` value of `entry` in the sources file `text`, as it would stand after the
/// colon.
///
/// An entry is numbered by stanza in a deb822 file and by line in a one-line-style file.
pub(super) fn source_signature(entry: &str, text: &str) -> Option<String> {
    let (file, number) = entry.rsplit_once(':')?;
    let index = number.parse::<usize>().ok()?.checked_sub(1)?;
    if file.ends_with(".list") {
        let line = text.lines().nth(index)?;
        let (options, _) = line.split_once('[')?.1.split_once(']')?;
        let mut options = options.split_whitespace();
        return options
            .find_map(|one| one.strip_prefix("signed-by="))
            .map(|key| format!(" {key}"));
    }
    let stanzas = text
        .split("\n\n")
        .filter(|stanza| stanza.lines().any(|line| line.contains(':')));
    let stanza = stanzas.into_iter().nth(index)?;
    let mut lines = stanza
        .lines()
        .skip_while(|line| !line.to_lowercase().starts_with("signed-by:"));
    let mut value = lines.next()?.split_once(':')?.1.to_owned();
    // A key written into the sources file goes on in indented lines.
    for line in lines.take_while(|line| line.starts_with([' ', '\t'])) {
        value.push('\n');
        value.push_str(line);
    }
    Some(value)
}

/// The Debian release that kernels and busybox come from, on every machine.
pub(super) const GUEST_RELEASE: &str = "bookworm";

/// The one whose backports have the newest kernel.
pub(super) const NEWEST_RELEASE: &str = "trixie";

/// Returns the suite of what was made for a Debian release after it came out.
pub(super) fn backports_of(release: &str) -> String {
    format!("{release}-backports")
}
