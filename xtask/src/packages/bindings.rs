//! Linux's bindings of device trees, from its documentation's package, and dt-schema, which checks trees
//! against them, from PyPI.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Store, empty_folder, field, output_of, run_silently, unpack};
use crate::progress::say;

/// The release of dt-schema.
const DT_SCHEMA: &str = "2026.9";

/// What checks a device tree.
pub(crate) struct Bindings {
    /// The program.
    pub(crate) validate: PathBuf,
    /// The bindings as it reads them.
    pub(crate) schema: PathBuf,
}

impl Store {
    /// Returns the bindings of the newest kernel that this machine's release has, ready to be used.
    pub(crate) fn bindings(&self) -> Result<Bindings> {
        let documents = self.stored("bindings", |apt, into| {
            let suite = apt.backports();
            let record = apt.record("linux-doc", suite.as_deref())?;
            let depends = field(&record, "Depends").unwrap_or_default();
            let name = depends.split_whitespace().next();
            let name = name.context("linux-doc depends on no version")?;
            let package = apt.candidate(name, suite.as_deref())?;
            for archive in apt.download(std::slice::from_ref(&package))? {
                unpack(&archive, into)?;
            }
            Ok(package)
        })?;
        let folder = self.root.join(format!("dt-schema-{DT_SCHEMA}"));
        let bindings = Bindings {
            validate: folder.join("bin/dt-validate"),
            schema: documents.join("processed-schema.json"),
        };
        let _lock = self.lock_for("bindings", "prepares the bindings of device trees")?;
        if !bindings.validate.exists() {
            say(&format!(
                "dt-schema {DT_SCHEMA} is installed into {folder:?}"
            ));
            empty_folder(&folder)?;
            run_silently(Command::new("python3").args(["-m", "venv"]).arg(&folder))
                .context("cannot make an environment for dt-schema (Debian: python3-venv)")?;
            let pip = folder.join("bin/pip");
            let wanted = format!("dtschema=={DT_SCHEMA}");
            run_silently(Command::new(pip).args(["install", "--quiet", &wanted]))
                .with_context(|| format!("cannot install {wanted}"))?;
        }
        if !bindings.schema.exists() {
            say("the bindings are processed, which takes a minute");
            let sources = unpacked(&documents)?;
            let unfinished = bindings.schema.with_extension("unfinished");
            let mut make = Command::new(folder.join("bin/dt-mk-schema"));
            make.arg("-j").arg("-o").arg(&unfinished).arg(sources);
            run_silently(&mut make).context("cannot process the bindings")?;
            fs::rename(&unfinished, &bindings.schema).context("cannot keep the bindings")?;
        }
        Ok(bindings)
    }
}

/// Returns the folder of bindings within the package, each of which is packed by itself.
fn unpacked(documents: &Path) -> Result<PathBuf> {
    let mut find = Command::new("find");
    find.arg(documents).args(["-type", "d", "-path"]);
    let found = output_of(find.arg("*/devicetree/bindings"))?;
    let folder = found
        .lines()
        .next()
        .context("the package has no bindings")?;
    let mut gunzip = Command::new("find");
    gunzip.arg(folder).args(["-name", "*.gz", "-exec"]);
    run_silently(gunzip.args(["gunzip", "-f", "{}", "+"])).context("cannot unpack the bindings")?;
    Ok(PathBuf::from(folder))
}
