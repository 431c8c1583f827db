//! Plans a configured machine for a host, with advice on errors and warnings about mismatches with
//! the host.

use crate::config::Config;
use anyhow::{Context, Result, anyhow};
use armlet_arch::aarch64;
use armlet_arch::board::Severity;
use armlet_arch::{Arch, Board, Plan};
use armlet_system::files;
use armlet_system::status::{Fault, Status, status_of};
use std::path::Path;

/// Warns about properties of a valid machine that do not suit the host. `host` is given if the
/// machine is for this host.
pub fn warn_of_host<A: Arch>(config: &Config<A>, host: Option<&A::Host>) {
    for warning in &config.pinning.warnings {
        log::warn!("{warning}");
    }
    let board = &config.board;
    let differences = host.map(|host| A::differences(board, host));
    if let Some(differences) = differences.filter(|found| !found.is_empty()) {
        log::warn!(
            "board '{}' is for another host: {}; the guest gets what is here, and --board auto takes the board that this host is",
            board.name,
            differences.join(", ")
        );
    }
}

/// Plans the machine for a host that is, or is assumed to be, the board `known`. A failure counts
/// as an error of the request, unless the host is the limit.
///
/// # Errors
/// [`armlet_arch::PlanError`], and huge pages that do not fit the plan's memory.
pub fn decide<A: Arch>(config: &Config<A>, host: &A::Host, known: &Board) -> Result<Plan<A>> {
    use armlet_arch::PlanError;
    let plan = armlet_arch::plan(&config.board, &config.request, host).or_else(|error| {
        let status = match error {
            PlanError::TooWide { .. }
            | PlanError::WidthNotOffered { .. }
            | PlanError::IrqchipNotOffered { .. }
            | PlanError::FeatureNotOffered { .. }
            | PlanError::PageSize { .. } => Status::Host,
            _ => Status::Usage,
        };
        let no_irqchip = matches!(error, PlanError::IrqchipNotOffered { .. });
        let mut notes = known.host.notes.iter();
        let stops = notes.find(|note| no_irqchip && note.severity == Severity::Stops);
        let result = Err(error);
        match stops {
            // The board's note is more specific than the plan's error.
            Some(note) => Err(anyhow!(
                "no guest runs on a host like board '{}': {}; {}",
                known.name,
                note.what,
                note.fix
            )),
            None => result.map_err(Into::into),
        }
        .fault(status)
    })?;
    let pages = config.backing.pages;
    pages
        .check(A::ARCHITECTURE, plan.width.host_page, &plan.layout.ram)
        .map_err(|cause| anyhow!("--hugepages {pages}: {cause}"))
        .fault(Status::Usage)?;
    Ok(plan)
}

/// Says of a machine that is restored why it cannot be planned: without advice on options, which its guest
/// has seen.
///
/// # Errors
/// The error that it is given.
pub fn for_restore<T>(planned: Result<T>) -> Result<T> {
    let error = match planned {
        Ok(plan) => return Ok(plan),
        Err(error) => error,
    };
    let text = format!("{error:#}");
    let what = text.rsplit_once("; ").map_or(&*text, |(what, _)| what);
    Err(anyhow!(
        "the guest of this snapshot cannot go on there: {what}"
    ))
    .fault(status_of(&error))
}

/// Writes the plan's device tree to a file that only its owner may read.
///
/// # Errors
/// A file that cannot be written.
pub fn write_tree<A: Arch>(path: &str, plan: &Plan<A>) -> Result<()> {
    let tree = plan
        .blobs
        .iter()
        .find(|blob| blob.name == aarch64::DEVICE_TREE);
    let tree = tree.context("this machine has no device tree")?;
    // It holds the guest's seeds.
    files::write_private(Path::new(path), &tree.bytes)
        .with_context(|| format!("cannot write the device tree to '{path}'"))
}
